"""`dynamo-lite explain`: why a request went where it went, asked of the frontends, for people or programs."""

from __future__ import annotations

import json

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from dynamo_lite.errors import DeadlineExceeded, NoResponders, NotThere
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.route_wire import Explain, Explained, RouteDecision
from dynamo_lite.plane.wire import Subjects, decode, encode
from dynamo_lite.state import Run

ANSWER_S = 3.0
_WIDE = 200  # columns, where no terminal has a width


async def explain(run: Run, request_id: str, as_program: bool) -> None:
    """Raises NotThere, PlaneError."""
    async with Bus.connect(run.nats, "dynamo-lite explain") as bus:
        try:
            answer = await bus.request(Subjects(run.namespace).explain(), encode(Explain(request_id)), ANSWER_S)
        except NoResponders:
            raise NotThere("there is no frontend: it starts, or is of a version without `explain`") from None
        except DeadlineExceeded:
            raise NotThere(
                f"no frontend knows of the request {request_id!r}. Each remembers its last 1,000 placements; the id is "
                "that of the reply's header x-request-id"
            ) from None
    decisions = decode(answer, Explained).decisions
    if as_program:
        typer.echo(json.dumps(msgspec.to_builtins(decisions), indent=1))
    else:
        for decision in decisions:
            _print(decision)


def _print(decision: RouteDecision) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_WIDE)
    console.print(f"{decision.request_id}: {decision.worker}, by {decision.frontend}, {decision.age_s:.1f} s ago")
    console.print(f"  {decision.mode}: {decision.reason}", markup=False)
    found = "not heard yet" if decision.found_tokens is None else f"{decision.found_tokens:,} found"
    held = f"{decision.predicted_tokens:,} expected there, {found}"
    console.print(f"  prompt: {decision.prompt_tokens:,} tokens; {held}")
    if decision.prefill:
        console.print(f"  prefill workers, best first: {', '.join(decision.prefill)}")
    console.print(_table(decision))


def _table(decision: RouteDecision) -> Table:
    """Milliseconds, the cheapest worker first."""
    parts = tuple(decision.candidates[0].parts_ms) if decision.candidates else ()
    table = Table(show_edge=False, pad_edge=False)
    for name in ("worker", "cost, ms", *parts, "way", "held", "queued", "running"):
        table.add_column(name, justify="left" if name in ("worker", "way") else "right", no_wrap=True)
    for one in decision.candidates:
        chosen = "→ " if one.name == decision.worker else "  "
        table.add_row(
            chosen + one.name, f"{one.cost_ms:,.1f}", *(f"{one.parts_ms[part]:,.1f}" for part in parts), one.way,
            f"{one.held_tokens:,}", f"{one.queued_tokens:,}", f"{one.sequences:,}",
        )  # fmt: skip
    return table
