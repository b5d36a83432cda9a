"""A peer that has vanished is noticed; one that is suspended is kept for as long as it is there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator

import pytest
from chat import DEADLINE, SMALL, Peer, run_chat, wait_until
from network import Network, network

import protocol
from protocol import Connection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")

# Connects and reads nothing.
VISIT = """
import socket, sys, time
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
sock.connect((sys.argv[1], int(sys.argv[2])))
time.sleep(1000)
"""
NEVER = 1e9  # seconds


@pytest.fixture
def net() -> Iterator[Network]:
    """A network whose other end can vanish."""
    with network() as net:
        yield net


@contextlib.contextmanager
def listening(host: str) -> Iterator[tuple[socket.socket, str]]:
    """Give a listener whose connections hold little, and its port."""
    with socket.create_server((host, 0)) as listener:
        listener.settimeout(DEADLINE)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        yield listener, str(listener.getsockname()[1])


@contextlib.contextmanager
def visited(net: Network) -> Iterator[tuple[Connection, int]]:
    """Give a connection from the other end, and its process there."""
    with listening(net.here) as (listener, port), net.start(VISIT, net.here, port) as process:
        connection = Connection(listener.accept()[0])
        try:
            yield connection, process.pid
        finally:
            connection.close()


def fill(connection: Connection) -> None:
    """Send until the peer's window is closed: it has acknowledged all that was sent to it."""

    def is_closed() -> bool:
        while connection.send(b"x" * 65536):
            pass
        unacknowledged, _, unsent, _ = told(connection)
        return bool(unsent and not unacknowledged)

    wait_until(is_closed, "the window to close")


def told(connection: Connection) -> tuple[int, ...]:
    """Return what the system tells of a connection."""
    size = protocol.TCP_INFO.size
    return protocol.TCP_INFO.unpack(
        connection._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    )


def silence(connection: Connection) -> float:
    """Return the seconds since the peer's last acknowledgement."""
    return told(connection)[1] / 1000


def patience(monkeypatch: pytest.MonkeyPatch, is_open: float, closed: float) -> None:
    """Have a peer count as dead after so many seconds, by its window."""
    monkeypatch.setattr(protocol, "UNACKNOWLEDGED", is_open)
    monkeypatch.setattr(protocol, "UNACKNOWLEDGED_CLOSED", closed)


def test_a_peer_that_vanished_is_dead(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who acknowledges nothing of what it could take is dead, and not before its time."""
    patience(monkeypatch, 1.0, NEVER)
    with visited(net) as (connection, _):
        net.cut()
        connection.send(b"hello\n")
        wait_until(lambda: connection.is_dead() or silence(connection) > 2.0, "the end")
        assert connection.is_dead()
        patience(monkeypatch, silence(connection) + DEADLINE, NEVER)
        assert not connection.is_dead()


def test_a_reader_that_vanished_with_a_closed_window_is_dead(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had no room left, and then answers no probe either, is dead after the longer time."""
    patience(monkeypatch, 0.1, 2.0)
    with visited(net) as (connection, _):
        fill(connection)
        net.cut()
        wait_until(connection.is_dead, "the end")
        assert silence(connection) > 2.0


def test_a_suspended_reader_is_not_dead(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped, its window closed, is kept: its system answers the probes."""
    patience(monkeypatch, 0.1, 60.0)
    with visited(net) as (connection, pid):
        os.kill(pid, signal.SIGSTOP)
        fill(connection)
        # The probes come ever more rarely: soon later than a dead peer would be given.
        wait_until(lambda: silence(connection) > 1.0, "a rare probe")
        assert not connection.is_dead()
        rare = silence(connection)
        wait_until(lambda: silence(connection) < rare, "its answer")
        assert not connection.is_dead()


def test_a_closed_window_is_given_the_time_of_two_probes() -> None:
    """A living reader whose probes come every 120 s, one of which is lost, is not dead."""
    assert protocol.UNACKNOWLEDGED <= 120
    assert protocol.UNACKNOWLEDGED_CLOSED > 2 * 120


def test_the_log_says_that_a_peer_was_dead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose connection the server gave up did not end the input, and the log does not say so."""
    monkeypatch.setattr("server.LOOK", 0.05)
    caplog.set_level("INFO")
    with run_chat() as server:
        Peer(server.port).join("bob")
        found = iter([True])
        monkeypatch.setattr(Connection, "is_dead", lambda connection: next(found, False))
        wait_until(lambda: not server.clients, "him to be gone")
    [left] = [line for line in caplog.messages if line.startswith("bob") and "left" in line]
    assert left.endswith("left: no acknowledgement came")


def test_a_silent_peer_that_is_owed_nothing_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has had all that there was is left to keepalive, however long it says nothing."""
    patience(monkeypatch, 0.01, 0.01)
    with (
        listening("127.0.0.1") as (listener, port),
        socket.create_connection(("127.0.0.1", int(port)), DEADLINE) as peer,
    ):
        connection = Connection(listener.accept()[0])
        connection.send(b"hello\n")
        assert peer.recv(100) == b"hello\n"
        wait_until(lambda: silence(connection) > 0.1, "a silence")
        assert not connection.is_dead()
        connection.close()
        assert not connection.is_dead()


def test_the_system_itself_ends_no_suspended_reader() -> None:
    """No option has the system end a connection whose peer answers but does not read."""
    with (
        listening("127.0.0.1") as (listener, port),
        socket.create_connection(("127.0.0.1", int(port)), DEADLINE),
    ):
        connection = Connection(listener.accept()[0])
        option = connection._sock.getsockopt
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        connection.close()
