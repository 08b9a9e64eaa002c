"""The HTTP server itself."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import closing

import uvloop
from fastapi import FastAPI

from dynamo_lite.frontend.app import Server

DEADLINE_S = 20.0


def test_accepted_connections_do_not_wait_to_fill_packets() -> None:
    """With Nagle's algorithm on, a streamed token waits for the client's delayed acknowledgement: 40 ms."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(_accepted_option(socket.TCP_NODELAY)) != 0


async def _accepted_option(option: int) -> int:
    """An option of the server's side of a connection, as the kernel has it."""
    ready = asyncio.Event()
    server = Server(FastAPI(), ready.set)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve([listening]))
            await ready.wait()
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readline()
            (connection,) = server.server_state.connections
            descriptor = connection.transport.get_extra_info("socket").fileno()
            with socket.socket(fileno=os.dup(descriptor)) as accepted:
                value = accepted.getsockopt(socket.IPPROTO_TCP, option)
            with closing(writer):
                server.should_exit = True
            await serving
    return value
