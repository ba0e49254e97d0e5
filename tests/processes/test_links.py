"""Connections that break when the other end's host does not answer, and what travels together."""

import os
import socket
import sys
import time
from contextlib import suppress

import pytest
import torch

from fivestep import processes, watchdog
from fivestep.processes import sum_together
from fivestep.watchdog import unanswered, watched_links


def connection():
    """Both ends of one, and who listens."""
    listening = socket.create_server(("127.0.0.1", 0))
    own = socket.create_connection(listening.getsockname())
    return own, listening.accept()[0], listening


def kept_alive(one):
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


@pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")
def test_what_is_connected_inside_is_watched(monkeypatch):
    before = connection()
    with watched_links():
        inside = connection()
    after = connection()
    assert all(kept_alive(one) for one in inside)
    assert not any(map(kept_alive, before + after))
    inside[0].setblocking(False)
    with suppress(BlockingIOError):
        while inside[0].send(bytes(100_000)):
            pass
    time.sleep(0.5)
    here = ["127.0.0.1"]
    assert unanswered(here) is None, "its host answers, though nobody reads"
    monkeypatch.setattr(watchdog, "CUT", 2.2)
    time.sleep(2.5)  # by now it asks the full one more seldom than that
    assert unanswered(here) is None
    monkeypatch.setattr(watchdog, "CUT", -0.001)
    assert unanswered(here) == "127.0.0.1", "a silence is seen"
    assert unanswered(["10.0.0.1"]) is None, "a connection of the user's own, to another host"
    for one in before + inside + after:
        one.close()


def test_sockets_stay_as_they_are_where_python_has_a_timeout():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with watched_links():
            inside = connection()
        for one in inside:
            one.settimeout(None)
        assert unanswered(["127.0.0.1"]) is None
        assert all(os.get_blocking(one.fileno()) for one in inside)
        assert socket.getdefaulttimeout() == 20
    finally:
        socket.setdefaulttimeout(before)
    for one in inside:
        one.close()


def test_what_travels_together(monkeypatch):
    """Each tensor gets its own sum, whatever its size, type and layout; small ones of a type in one message."""
    sent = []

    def doubled(tensor):
        sent.append((tensor.dtype, tensor.numel()))
        tensor *= 2

    monkeypatch.setattr(processes.dist, "all_reduce", doubled)
    monkeypatch.setattr(processes, "ALONE", 100)
    tensors = [
        torch.rand(3, 4),
        torch.rand(()),
        torch.rand(2, dtype=torch.float64),
        torch.rand(101),
        torch.rand(4, 3).T,
    ]
    wanted = [2 * one for one in tensors]
    sum_together(tensors)
    assert all(map(torch.equal, tensors, wanted))
    assert sorted(sent, key=str) == [
        (torch.float32, 101), (torch.float32, 12), (torch.float32, 13), (torch.float64, 2)
    ]  # fmt: skip
