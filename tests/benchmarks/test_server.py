# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A port that is kept for a server until the server binds it."""

import socket
from contextlib import ExitStack

import pytest

from benchmarks.server import reserved_port

MANY = 4000
"""Of the 28,232 ports that Linux chooses from by default."""


def test_a_server_listens_on_its_reserved_port():
    with reserved_port() as port, socket.socket() as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        client.connect(("127.0.0.1", port))


def test_nothing_else_gets_a_reserved_port():
    with reserved_port() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_no_connection_gets_a_reserved_port():
    """Nor does a second reservation. The kernel chooses the next ports from all that are free."""
    with ExitStack() as stack:
        ports = {stack.enter_context(reserved_port()) for _ in range(MANY)}
        assert len(ports) == MANY
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(100):
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            stack.enter_context(listener.accept()[0])
            assert client.getsockname()[1] not in ports
