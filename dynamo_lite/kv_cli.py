"""`dynamo-lite kv`: look at the KV blocks of a running deployment, and act on them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lite.command_line import Overrides, told_errors, user_cache

if TYPE_CHECKING:
    from dynamo_lite.state import Run

EPILOG = """
\b
How full are the tiers, and are they of use?
  dynamo-lite kv stats configs/tiered.yaml

\b
Is what lies on disk still what was written?
  dynamo-lite kv verify configs/tiered.yaml --tier disk

\b
Forget everything:
  dynamo-lite kv purge configs/tiered.yaml --all
"""

app = typer.Typer(
    help="""Look at the KV blocks of a running deployment, and act on them.

    FILE is what it was started with; without one, the deployment of the namespace 'default' is meant. Run it on the
    host where that was started, as the same user. It asks the workers of every host of the namespace. The exit code
    is 1 when one of them does not answer, or not everything is as it should be.
    """,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
)


class AnyTier(StrEnum):
    """What can be listed."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


class BeneathTier(StrEnum):
    """What is ours to prove and drop."""

    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="What was started.  [default: the namespace 'default']", show_default=False),
]
WorkerName = Annotated[str | None, typer.Option("--worker", metavar="NAME", help="Only this one, e.g. decode-0.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def stats(file: File = None, worker: WorkerName = None, json: Json = False, set_: Overrides = None) -> None:
    """Show what each tier of each worker holds and does.

    \b
    used, size   bytes; of the device what running requests use, in other tiers what is stored
    blocks       that can be found there
    hits, misses looked for there, and found or not
    offloaded    came there
    onboarded    went back: from host to the device, from disk and object to host
    evicted      had to make room
    missed       given up on their way there: no room, or no time
    corrupt      not what was stored: dropped, and computed again
    waiting      to be written there

    A tier that is 'off' has failed; the worker's log says how. It is tried again until it works.
    """
    from dynamo_lite import kv_commands  # noqa: PLC0415

    _run(kv_commands.stats(deployment(file, set_), worker, json))


@app.command("ls")
def list_(
    file: File = None,
    tier: Annotated[AnyTier | None, typer.Option(help="Only blocks that are there.")] = None,
    worker: WorkerName = None,
    limit: Annotated[int, typer.Option(min=0, help="As many blocks at most; 0: all.")] = 100,
    json: Json = False,
    set_: Overrides = None,
) -> None:
    """List blocks by their hash, with every tier that has them.

    A hash names a block and all before it, so equal hashes are equal prefixes. Of a block that only the device has, the
    hash's last 16 digits are known.
    """
    from dynamo_lite import kv_commands  # noqa: PLC0415
    from kvbm.events import Tier  # noqa: PLC0415

    chosen = None if tier is None else Tier(tier.value)
    _run(kv_commands.list_blocks(deployment(file, set_), chosen, worker, limit, json))


@app.command()
def verify(
    file: File = None,
    tier: Annotated[BeneathTier | None, typer.Option(help="Only this one.  [default: all]")] = None,
    worker: WorkerName = None,
    json: Json = False,
    set_: Overrides = None,
) -> None:
    """Read every block of the tiers again, and drop those that are not what was stored.

    Requests go on meanwhile. Nothing is lost by dropping a block: it is computed again. The object tier is read by one
    worker, as all share it; that may cost money. Ctrl-C ends it; what was dropped by then is.
    """
    from dynamo_lite import kv_commands  # noqa: PLC0415
    from kvbm.events import Tier  # noqa: PLC0415

    chosen = None if tier is None else Tier(tier.value)
    _run(kv_commands.verify(deployment(file, set_), chosen, worker, json))


@app.command()
def purge(
    file: File = None,
    tier: Annotated[BeneathTier | None, typer.Option(help="This one.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every tier beneath the device.")] = False,
    worker: WorkerName = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    set_: Overrides = None,
) -> None:
    """Drop every block of a tier, or of all of them, after asking.

    Requests go on meanwhile, and their blocks are stored anew. What is dropped cannot be found again, not after a
    restart either. The object tier is emptied for everybody who uses the same model and bucket. Once begun, a worker
    goes on with it though this command may be ended.
    """
    from dynamo_lite import kv_commands  # noqa: PLC0415
    from kvbm.events import Tier  # noqa: PLC0415

    if (tier is None) is not all_:
        raise typer.BadParameter("give one of --tier and --all")
    chosen = None if tier is None else Tier(tier.value)
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to be asked: give --yes if you are sure")
    run = deployment(file, set_)
    if not yes:
        with told_errors():
            question = asyncio.run(kv_commands.purge_question(run, chosen, worker))
        typer.confirm(question, abort=True, err=True)
    _run(kv_commands.purge(run, chosen, worker))


def deployment(file: Path | None, overrides: list[str] | None) -> Run:
    """The one that was started with `file`. Raises NotRunning; a wrong file ends the command."""
    from dynamo_lite.config_file import load  # noqa: PLC0415
    from dynamo_lite.state import Run  # noqa: PLC0415

    with told_errors():
        config = load(file or Path(os.devnull), overrides or []).config  # an empty file is all defaults
        return Run.read((config.state_dir or user_cache(os.environ) / "state" / config.namespace).absolute())


def _run(command: Coroutine[Any, Any, int]) -> None:
    """`command` returns the exit code."""
    with told_errors():
        code = asyncio.run(command)
    if code:
        raise typer.Exit(code)
