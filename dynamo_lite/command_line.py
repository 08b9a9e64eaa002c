"""What all commands of the command line have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dynamo_lite.errors import ConfigError, DynamoError

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. frontend.port=9000.")
]


def user_cache(environment: Mapping[str, str]) -> Path:
    """Our part of the user's cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dynamo-lite"


@contextmanager
def told_errors() -> Iterator[None]:
    """Errors we know are a sentence and an exit code, not a traceback."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except DynamoError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
