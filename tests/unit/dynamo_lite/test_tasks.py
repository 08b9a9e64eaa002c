from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from dynamo_lite.tasks import background


async def for_ever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def fail() -> NoReturn:
    raise ValueError("the loop failed")


async def test_loops_end_with_the_body() -> None:
    ended = asyncio.Event()

    async def loop() -> NoReturn:
        try:
            await for_ever()
        finally:
            ended.set()

    async with background(loop()):
        await asyncio.sleep(0)
        assert not ended.is_set()
    assert ended.is_set()


async def test_a_failing_loop_cancels_the_body_and_raises_its_own_error() -> None:
    with pytest.raises(ValueError, match="the loop failed"):
        async with background(fail(), for_ever()):
            await asyncio.Event().wait()


async def test_an_error_of_the_body_is_raised_as_itself() -> None:
    error = KeyError("the body failed")
    with pytest.raises(KeyError) as raised:
        async with background(for_ever()):
            raise error
    assert raised.value is error


async def test_several_errors_are_raised_together() -> None:
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with background(fail()):
            try:
                await asyncio.Event().wait()
            finally:
                raise KeyError("the body failed too")
    assert raised.group_contains(ValueError)
    assert raised.group_contains(KeyError)


async def test_cancelling_the_task_cancels_body_and_loops() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), background(for_ever()):
            await asyncio.Event().wait()
