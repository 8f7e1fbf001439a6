"""Ports for a cluster's own processes, some of which bind them long after they were chosen."""

from __future__ import annotations

import socket

from deployments.local import free_block, free_port


def test_nobody_gets_a_port_that_somebody_else_got_before() -> None:
    ports = [free_port() for _ in range(300)]
    assert len(set(ports)) == len(ports)


def test_a_block_has_no_port_that_is_in_use() -> None:
    block = free_block(100)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", block + 50))
        assert all(free_block(100) != block for _ in range(300))
