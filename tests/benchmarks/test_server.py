# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A port that is kept for a server until the server binds it."""

import socket
from contextlib import ExitStack

import pytest

from benchmarks.server import reserved_port

MANY = 300
"""Twice as many are open at once, of 1,024 files that a process may often open."""


def test_a_server_listens_on_its_reserved_port():
    with reserved_port() as port, socket.socket() as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        client.connect(("127.0.0.1", port))


def test_nothing_else_gets_a_reserved_port():
    with reserved_port() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_who_asks_for_a_free_port_gets_no_reserved_one():
    with ExitStack() as stack:
        reserved = {stack.enter_context(reserved_port()) for _ in range(MANY)}
        assert len(reserved) == MANY
        others = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(MANY)]
        assert reserved.isdisjoint(other.getsockname()[1] for other in others)
