"""A proxy for tests: it carries connections until the fault that a test chose.

    with Proxy(server.port, [Fault(DOWN, 17, RESET)]) as proxy:
        chat = ChatClient("alice", port=proxy.port)

The first connection has the first fault, the second the next, and those that
come later have none.  One thread does all; it ends with the proxy.
"""

from __future__ import annotations

import enum
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from protocol import Waker

HOST = "127.0.0.1"
DEADLINE = 10.0  # seconds for anything that is waited for
CHUNK = 64 * 1024  # bytes


class Direction(enum.Enum):
    """Which way bytes go."""

    UP = "from the client to the server"
    DOWN = "from the server to the client"


class How(enum.Enum):
    """What becomes of a connection."""

    CLOSE = "both ends hear that it has ended"
    RESET = "both ends hear that it was reset"
    GHOST = "the client hears that it has ended, the server hears nothing more"
    STALL = "nobody hears anything more"


UP, DOWN = Direction
CLOSE, RESET, GHOST, STALL = How


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens as soon as so many bytes have passed in a direction."""

    direction: Direction
    after: int
    how: How


@dataclass(slots=True)
class Link:
    """One connection through the proxy: a socket to the client and one to the server."""

    client: socket.socket
    server: socket.socket
    selector: selectors.BaseSelector
    fault: Fault | None = None
    dead: bool = False  # what still comes is thrown away
    passed: dict[Direction, int] = field(default_factory=lambda: {UP: 0, DOWN: 0})  # bytes

    def carry(self, direction: Direction, data: bytes) -> None:
        """Pass bytes on, as many as there may be."""
        if self.dead:
            return
        target = self.server if direction is UP else self.client
        fault = self.fault if self.fault and self.fault.direction is direction else None
        allowed = fault.after - self.passed[direction] if fault else len(data)
        self.passed[direction] += len(data[:allowed])  # before somebody who gets them looks
        with suppress(OSError):  # its other end has gone
            target.sendall(data[:allowed])
        if fault and allowed <= len(data):
            self.end(fault.how)

    def end(self, how: How) -> None:
        """Let something become of the connection."""
        self.dead = True
        for sock in {STALL: [], GHOST: [self.client]}.get(how, [self.client, self.server]):
            with suppress(OSError):
                if how is RESET:
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close(sock)
                else:  # unread bytes would turn a close() into a reset
                    sock.shutdown(socket.SHUT_WR)

    def close(self, sock: socket.socket) -> None:
        """Give a descriptor back, once the selector has forgotten it."""
        with suppress(KeyError, ValueError):  # it has
            self.selector.unregister(sock)
        sock.close()


class Proxy:
    """Stands between clients and the server on a port; `port` is its own.

    `step` is how many bytes it carries at once.
    """

    def __init__(self, server: int, faults: Iterable[Fault] = (), *, step: int = CHUNK) -> None:
        self.server = server
        self.links: list[Link] = []  # in the order in which they came
        self._faults = [*faults]  # for the connections to come
        self._step = step
        self._away = False
        self._jobs: list[Callable[[], None]] = []  # for the thread, which owns the sockets
        # Guards the jobs and the links; notified when a job is done or bytes have passed.
        self._changed = threading.Condition()
        self._waker = Waker()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end)
        self._thread.join()

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that bytes or new connections bring about."""
        with self._changed:
            assert self._changed.wait_for(holds, DEADLINE), "the proxy waited in vain"

    def end(self, how: How) -> None:
        """Let something become of every connection now."""

        def end_all() -> None:
            for link in self.links:
                link.end(how)

        self._do(end_all)

    def go_away(self, how: How = CLOSE) -> None:
        """End every connection, and close every new one, until `come_back`."""
        self._away = True
        self.end(how)

    def plan(self, *faults: Fault) -> None:
        """Have these faults next."""
        self._faults += faults

    def come_back(self) -> None:
        """Carry connections again."""
        self._away = False

    def _do(self, job: Callable[[], None]) -> None:
        """Have the thread do something, and wait until it is done."""
        done = threading.Event()
        with self._changed:
            self._jobs += [job, done.set]
        self._waker.wake()
        assert done.wait(DEADLINE), "the proxy does not answer"

    def _run(self) -> None:
        while not self._ended:
            ready = [key.data for key, _ in self._selector.select() if key.data]
            self._waker.clear()
            with self._changed:
                jobs, self._jobs = self._jobs, []
            for step in [*ready, *jobs]:
                step()
            with self._changed:
                self._changed.notify_all()
        self._close()

    def _end(self) -> None:
        self._ended = True

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self._away:
            client.close()
            return
        try:
            server = socket.create_connection((HOST, self.server), DEADLINE)
        except OSError:  # nobody listens there at the moment
            client.close()
            return
        link = Link(client, server, self._selector, self._faults.pop(0) if self._faults else None)
        for sock, direction in ((client, UP), (server, DOWN)):
            sock.settimeout(DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._listen(link, sock, direction)
        with self._changed:
            self.links.append(link)
        if link.fault and not link.fault.after:
            link.end(link.fault.how)

    def _listen(self, link: Link, sock: socket.socket, direction: Direction) -> None:
        target = link.server if direction is UP else link.client

        def carry() -> None:
            try:
                data = sock.recv(self._step)
            except OSError:  # reset, or closed just now
                data = b""
            if data:
                link.carry(direction, data)
                return
            with suppress(KeyError, ValueError):
                self._selector.unregister(sock)
            if not link.dead:
                with suppress(OSError):
                    target.shutdown(socket.SHUT_WR)

        self._selector.register(sock, selectors.EVENT_READ, carry)

    def _close(self) -> None:
        for link in self.links:
            link.close(link.client)
            link.close(link.server)
        self._selector.close()
        self._listener.close()
        self._waker.close()
