"""Tasks that run beside a body of code, and end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn


@asynccontextmanager
async def background(*loops: Coroutine[Any, Any, NoReturn]) -> AsyncIterator[None]:
    """A loop that fails cancels the body and its error is raised; the end of the body cancels the loops.

    Unlike a bare TaskGroup a single error is raised as itself, so callers need not know there is a group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in loops]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) > 1:
            raise
        raise errors.exceptions[0] from errors.exceptions[0].__cause__


class _Ended(Exception):  # not an error: the body of `scope` is done
    """Ends a task group."""


@asynccontextmanager
async def scope() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose remaining tasks are cancelled at the end of the body."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
            raise _Ended
    except* _Ended:
        pass
