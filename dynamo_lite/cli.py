"""The command line. Heavy modules are imported by the command that needs them, so that `--help` is instant."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamo_lite import kv_cli, simulate_cli
from dynamo_lite.command_line import Overrides, told_errors, user_cache
from dynamo_lite.errors import ConfigError

if TYPE_CHECKING:
    from dynamo_lite.plan import Plan

EPILOG = """
Start here:  dynamo-lite serve configs/quickstart.yaml

What would it run?  dynamo-lite check configs/quickstart.yaml

Change one key:  dynamo-lite serve configs/quickstart.yaml --set workers.decode.count=2 --set frontend.port=9000

Look at the KV blocks of what runs:  dynamo-lite kv stats

What would it do under a load?  dynamo-lite simulate --help

Why did a request go where it went?  dynamo-lite explain REQUEST_ID
"""

app = typer.Typer(
    help="Serve a language model with prefill and decode on separate workers, from one YAML file.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(kv_cli.app, name="kv")
app.command(epilog=simulate_cli.EPILOG)(simulate_cli.simulate)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The deployment, in YAML; see the examples in configs/.")]


@app.command()
def serve(file: File, set_: Overrides = None) -> None:
    """Run what FILE describes.

    Starts nats-server and etcd (unless FILE names existing ones), the HTTP frontends and the workers, restarts what
    dies, and prints one line once requests are served. The first Ctrl-C (or SIGTERM)
    lets running requests finish, a second ends them.
    """
    from dynamo_lite.progress import Progress  # noqa: PLC0415
    from dynamo_lite.supervisor import Supervisor  # noqa: PLC0415

    with told_errors():
        plan = _plan(file, set_ or [])
        for warning in plan.warnings:
            typer.echo(f"Warning: {warning}", err=True)
        for way in {} if plan.problems else dict.fromkeys(path.via for path in plan.transfers):
            typer.echo(f"KV moves by: {way}", err=True)
        with Progress(sys.stderr) as progress:
            asyncio.run(Supervisor(plan, progress, os.environ).run())


@app.command()
def check(file: File, set_: Overrides = None) -> None:
    """Print what FILE would run here.

    The plan names processes, addresses, memory and KV transfers; nothing is started. An error in FILE is told with
    its line and column, and ends with exit code 2.
    """
    from dynamo_lite.plan_text import describe  # noqa: PLC0415

    with told_errors():
        typer.echo(describe(_plan(file, set_ or [])), nl=False)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Of the reply's header x-request-id.")],
    file: kv_cli.File = None,
    json: kv_cli.Json = False,
    set_: Overrides = None,
) -> None:
    """Tell why a request went where it went.

    \b
    queue     waiting for prompts, and for room, that others have before it
    prefill   computing what of the prompt no worker has
    transfer  moving what another worker has, or computes
    onboard   reading what lies in tiers
    decode    its answer in a batch rather than alone, and what its prompt takes from others there
    work      computing, which weighs more than waiting: others lose it
    late      queueing beyond router.patience_ms, likewise
    held      tokens of the prompt that the worker has, in any tier

    All are predicted milliseconds, from what the workers have measured lately. Frontends remember their last 1,000
    placements. A client gets the same in a header of its reply if its request has a header x-dynamo-lite-route.
    """
    from dynamo_lite.explain import explain as tell  # noqa: PLC0415

    with told_errors():
        asyncio.run(tell(kv_cli.deployment(file, set_), request_id, json))


SEVERAL = """
\b
Every host's file names it:
  kv_transfer: {metadata_server: "tcp://HOST:5557"}

\b
Two, independent of each other, survive the loss of one. Workers register with each:
  kv_transfer: {metadata_server: ["tcp://A:5557", "tcp://B:5557"]}

\b
From three hosts on, an etcd cluster of your own does it too:
  etcd: {endpoints: ["http://A:2379", "http://B:2379", "http://C:2379"]}
"""


@app.command("metadata-server", epilog=SEVERAL)
def metadata_server(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 lets the system choose.")] = 5557,
    host: Annotated[
        str, typer.Option(help="An address of this machine; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    data_dir: Annotated[
        Path | None, typer.Option(help="Its data and log, kept between starts.  [default: in the user's cache]")
    ] = None,
) -> None:
    """Run a discovery service, through which workers and frontends of several hosts find each other.

    It is an etcd, without password or encryption: keep it inside a trusted network. It prints its address once it
    serves, and ends on Ctrl-C or SIGTERM.
    """
    from dynamo_lite.embedded import run_metadata_server  # noqa: PLC0415
    from dynamo_lite.telemetry import setup_logging  # noqa: PLC0415

    setup_logging("info", "metadata-server")
    with told_errors():
        folder = data_dir or user_cache(os.environ) / "metadata-server" / str(port)
        asyncio.run(run_metadata_server(host, port, folder, lambda url: typer.echo(f"Ready: metadata_server: {url}")))


LEAVING = """
\b
Scale down, or free a machine for maintenance:
  dynamo-lite drain decode-1 configs/quickstart.yaml

\b
Restart every worker, one after the other, under load:
  for worker in prefill-0 decode-0 decode-1; do dynamo-lite drain $worker FILE --restart || break; done

\b
The cloud takes this machine back in two minutes:
  dynamo-lite drain decode-1 --spot
"""

SPOT_S, DRAIN_S = 120.0, 30.0


@app.command(epilog=LEAVING)
def drain(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="The worker, e.g. decode-1.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="What was started.  [default: the namespace 'default']", show_default=False
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Then it ends in any case.  [default: 30; with --spot 120]"),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start it again afterwards, and wait for that.")] = False,
    spot: Annotated[bool, typer.Option("--spot", help="Its machine goes: even if it is the last worker.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if it is the last worker that generates.")] = False,
    set_: Overrides = None,
) -> None:
    """Have a worker of a running deployment leave, without a stream noticing.

    It gets no new requests. What it generates goes on at other workers, which take the KV from it; it ends when all of
    that is done, and is not started again until the next `serve`. What is left at the deadline is computed again
    elsewhere. SIGTERM to a worker does the same, and starts it again.
    """
    from dynamo_lite.drain_client import drain as leave  # noqa: PLC0415
    from dynamo_lite.kv_cli import deployment  # noqa: PLC0415
    from dynamo_lite.plane.drain_wire import Drain  # noqa: PLC0415

    if spot and restart:
        raise typer.BadParameter("a machine that goes starts nothing again: give one of --spot and --restart")
    seconds = deadline if deadline is not None else SPOT_S if spot else DRAIN_S
    ask = Drain(seconds, restart, "spot" if spot else "drain")
    with told_errors():
        code = asyncio.run(leave(deployment(file, set_), instance, ask, force=force or spot))
    if code:
        raise typer.Exit(code)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed  # noqa: PLC0415

    typer.echo(installed("dynamo-lite"))


def main() -> None:
    app()


def _plan(file: Path, overrides: list[str]) -> Plan:
    """Raises ConfigError with the place of whatever is wrong."""
    from dynamo_lite import model_store  # noqa: PLC0415
    from dynamo_lite.config_file import load  # noqa: PLC0415
    from dynamo_lite.machine import Machine  # noqa: PLC0415
    from dynamo_lite.plan import resolve  # noqa: PLC0415

    source = load(file, overrides)
    machine = Machine.detect(visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        shape = model_store.shape(source.config)
        plan = resolve(source.config, machine=machine, shape=shape, cache=user_cache(os.environ))
        return replace(plan, problems=tuple(map(source.located, plan.problems)))
    except ConfigError as error:
        raise source.located(error) from error


if __name__ == "__main__":
    main()
