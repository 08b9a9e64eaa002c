from __future__ import annotations

import socket

import pytest

from dynamo_lite.errors import StartError
from dynamo_lite.listening import Port


def test_port_zero_is_a_port_the_kernel_chose() -> None:
    with Port.reserve("127.0.0.1", 0) as port:
        assert port.number > 0
        assert port.url == f"http://127.0.0.1:{port.number}"


def test_several_frontends_listen_on_the_port_and_each_gets_connections() -> None:
    with Port.reserve("127.0.0.1", 0) as port, port.socket() as first, port.socket() as second:
        first.listen()
        second.listen()
        for listener in (first, second):
            listener.settimeout(0.01)
        accepted = {first: 0, second: 0}
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", port.number)):
                for listener in accepted:
                    try:
                        listener.accept()[0].close()
                    except TimeoutError:
                        continue
                    accepted[listener] += 1
                    break
            if all(accepted.values()):
                break
        assert all(accepted.values())


def test_nobody_is_let_in_before_a_frontend_listens() -> None:
    with Port.reserve("127.0.0.1", 0) as port, port.socket(), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port.number))


def test_a_taken_port_is_refused_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        with pytest.raises(StartError, match=f"port {number} is taken by another program; stop that one"):
            Port.reserve("127.0.0.1", number).__enter__()


def test_a_port_shared_by_another_deployment_is_taken_too() -> None:
    with Port.reserve("127.0.0.1", 0) as port, port.socket() as theirs:
        theirs.listen()
        with pytest.raises(StartError, match="is taken"):
            Port.reserve("127.0.0.1", port.number).__enter__()


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(StartError, match=f"'{host}' is no address of this machine"):
        Port.reserve(host, 0).__enter__()


def test_an_open_host_is_reached_through_loopback() -> None:
    with Port.reserve("0.0.0.0", 0) as port:
        assert port.url == f"http://127.0.0.1:{port.number}"
