"""`dynamo-lite simulate`: what a deployment would do under a load, without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamo_lite.command_line import Overrides, told_errors

if TYPE_CHECKING:
    from workers.simulate.command import Options

EPILOG = """
\b
What would this deployment do with last week's traffic?
  dynamo-lite simulate --config configs/simulate.yaml --trace conversation.jsonl

\b
Which routing policy, and how many of eight workers for prefill?
  dynamo-lite simulate --config configs/simulate.yaml --trace conversation.jsonl \\
      --compare --split 8 --split 2:6 --split 3:5 --plot policies.svg

\b
No trace? 40 requests a second for ten minutes, in conversations that share their system prompts:
  dynamo-lite simulate --config configs/simulate.yaml --split 100 --synthetic rate=40,seconds=600

\b
A trace is one JSON object a line, as Mooncake publishes them:
  {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, ...]}
with ms, tokens, tokens, and an id for each block of 512 tokens. Equal ids are equal content.

\b
Of --synthetic these keys can be given, separated by commas:
  rate=4       requests a second         seconds=600  for so long
  turns=3      of a conversation, mean   pause=60     seconds between two, mean
  prompt=3000  tokens a turn adds, mean  answer=300   tokens, mean
  systems=8    different system prompts  system=2000  tokens of each
  skew=1       the n-th of these is used n^-skew times as often as the first
  longest=120000  tokens of a prompt; a conversation ends before it

How fast workers are is told by the section 'sim' of FILE; docs/simulate.md says what is simulated, and what is not.
"""


def simulate(  # noqa: PLR0913 – each is an option
    *,
    config: Annotated[Path, typer.Option(metavar="FILE", help="The deployment, in YAML.")],
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Requests, in Mooncake's format.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE,…", help="Requests made up instead; '' takes all defaults.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="router.mode; several are compared.  [default: FILE's]")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare all policies.")] = False,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P:D",
            help="So many prefill and decode workers; or one number, of aggregated ones.  [default: FILE's]",
        ),
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Requests come so many times as fast.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is random: --synthetic, and the policy 'random'.")] = 0,
    ttft_ms: Annotated[float, typer.Option(min=0, help="A good answer's first token comes within this.")] = 2000.0,
    itl_ms: Annotated[float, typer.Option(min=0, help="And its others, on average, each within this.")] = 50.0,
    trace_block: Annotated[int, typer.Option(min=1, help="Tokens that a hash id stands for.")] = 512,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything, by worker too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw it.")] = None,
    write_trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what --synthetic made up, as a trace.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Say what a deployment would do under a load, in seconds and without a GPU.

    The router, the index, the schedulers, the block pools and the tiers are those that serve; computing and moving
    take the time that FILE says, on a clock that jumps. Nothing is started, and nothing sent. The same FILE, load and
    seed give the same figures.
    """
    from workers.simulate.command import Options  # noqa: PLC0415

    if (trace is None) is (synthetic is None):
        raise typer.BadParameter("give one of --trace and --synthetic")
    if write_trace is not None and synthetic is None:
        raise typer.BadParameter("--write-trace keeps what --synthetic makes up")
    options = Options(
        trace, synthetic, trace_block, _each(policy), compare, _each(split), speed, seed, ttft_ms, itl_ms, json, plot,
        write_trace,
    )  # fmt: skip
    with told_errors():
        _run(config, set_ or [], options)


def _run(file: Path, overrides: list[str], options: Options) -> None:
    """Raises ConfigError, TraceError."""
    from rich.console import Console  # noqa: PLC0415

    from dynamo_lite import model_store  # noqa: PLC0415
    from dynamo_lite.config_file import load  # noqa: PLC0415
    from dynamo_lite.errors import ConfigError  # noqa: PLC0415
    from workers.simulate import command  # noqa: PLC0415

    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 120  # files and pipes have no width
    source = load(file, overrides)
    config = source.config
    try:
        kv_bytes = config.sim.kv_bytes_per_token
        if kv_bytes is None and (shape := model_store.shape(config)) is not None:
            kv_bytes = shape.kv_bytes(config.dtype, config.kv_cache_dtype)
        command.run(config, kv_bytes, options, out, Console(stderr=True))
    except ConfigError as error:
        raise (source.located(error) if error.key else error) from error


def _each(values: list[str] | None) -> tuple[str, ...]:
    """`--split 8,2:6` is as good as two options."""
    return tuple(part.strip() for value in values or () for part in value.split(","))
