"""What the tests share: a room in this process or in its own, and peers that talk to it.

A test reads as the script of a conversation::

    with run_chat() as server:
        alice = Peer(server.port).join("alice")
        alice.send("hello")
        alice.expect("alice: hello")

Every wait has a deadline, and nothing is left behind: `run_chat` fails a test
that leaks a thread or a descriptor, `run_server` one whose server left a trace
of a fault in its log.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import protocol
from server import ChatServer, Entry, Handed, Kicked, Promoted

SERVER = Path(__file__).parent.parent / "server.py"
ALTERED = """
import sys
sys.path.insert(0, {folder!r})
import server
vars(server).update({constants!r})
sys.exit(server.main())
"""
DEADLINE = 15.0  # seconds that anything may take on a busy machine
STOP = 5.0  # seconds within which the server promises to end
SMALL = 4096  # bytes of a socket's buffer that is soon full


def wait_until(happened: Callable[[], object], what: str = "it", seconds: float = DEADLINE) -> None:
    """Wait until `happened` returns something true, and fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds} seconds for {what}"
        time.sleep(0.005)


class Clock:
    """The module `time` but for some of its functions."""

    def __init__(self, **functions: Callable[..., object]) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> object:
        return self._functions.get(name) or getattr(time, name)


# --- Peers -------------------------------------------------------------------


class Peer:
    """A raw socket at the other end: sends bytes and expects lines."""

    opened: list[Peer] = []  # noqa: RUF012 - emptied after each test by `no_leaks`

    def __init__(
        self, port: int, *, source: str = "127.0.0.1", host: str = "127.0.0.1", buffer: int = 0
    ) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._lines: deque[bytes] = deque()  # whole ones that have come
        self._input = b""  # what has come behind them
        self._ended = False
        Peer.opened.append(self)
        if buffer:  # before connecting, or the window is agreed already
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.sock.settimeout(DEADLINE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.bind((source, 0))
        self.sock.connect((host, port))

    # What a peer does.

    def join(self, name: str) -> Peer:
        """Take a name and read on to the own entrance."""
        self.introduce(name)
        self.expect_eventually(f"* {name} joined the chat")
        return self

    def introduce(self, answer: str) -> Peer:
        """Wait for the question for the name and answer it, no more."""
        self.expect("NICK")
        self.send(answer)
        return self

    def send(self, *lines: str) -> Peer:
        """Send lines, all in one piece."""
        return self.send_raw("".join(line + "\n" for line in lines).encode())

    def send_raw(self, data: bytes) -> Peer:
        """Send bytes as they are."""
        self.sock.sendall(data)
        return self

    def send_slowly(self, data: bytes) -> Peer:
        """Send bytes one by one."""
        for byte in data:
            self.sock.sendall(bytes([byte]))
        return self

    def send_until_blocked(self, data: bytes, seconds: float = 0.3) -> int:
        """Send until the other end has taken nothing for a while; return how much it took."""
        sent = 0
        while sent < len(data) and select.select([], [self.sock], [], seconds)[1]:
            sent += self.sock.send(data[sent : sent + 65536], socket.MSG_DONTWAIT)
        return sent

    def end_input(self) -> Peer:
        """Say that nothing more will be sent, and go on reading."""
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def vanish(self) -> None:
        """Reset the connection, as a crash or a lost network does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    # What a peer gets.

    def next_line(self, wanted: str = "a line") -> str:
        """Return the next line that comes; fail at the deadline and at the end."""
        line = self._read_line(wanted)
        assert line is not None, f"closed, instead of {wanted}; unfinished: {self._input!r}"
        return line

    def take(self, count: int) -> bytes:
        """Return the next bytes, so many, whatever they are."""
        data = b"".join(line + b"\n" for line in self._lines) + self._input
        self._lines.clear()
        deadline = time.monotonic() + DEADLINE
        while len(data) < count:
            self._wait_for_bytes(deadline, f"{count} bytes")
            more = self.sock.recv(65536)
            assert more, f"the connection was closed behind {data!r}"
            data += more
        *lines, self._input = data[count:].split(b"\n")
        self._lines.extend(lines)
        return data[:count]

    def _read_line(self, wanted: str = "the end") -> str | None:
        deadline = time.monotonic() + DEADLINE
        while not self._lines and not self._ended:
            self._wait_for_bytes(deadline, wanted)
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                data = b""
            self._ended = not data
            *lines, self._input = (self._input + data).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft().decode("utf-8", "backslashreplace") if self._lines else None

    def _wait_for_bytes(self, deadline: float, wanted: str) -> None:
        readable = select.select([self.sock], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert readable, f"{wanted} did not come in {DEADLINE} s; unfinished: {self._input!r}"

    def expect(self, *lines: str) -> None:
        """Expect these lines next, exactly."""
        for line in lines:
            assert self.next_line(repr(line)) == line

    def expect_match(self, pattern: str) -> re.Match[str]:
        """Expect a line next that matches all of `pattern`."""
        line = self.next_line(repr(pattern))
        match = re.fullmatch(pattern, line)
        assert match, f"{line!r} does not match {pattern!r}"
        return match

    def expect_eventually(self, line: str) -> None:
        """Read on until this line comes."""
        self.lines_until(line)

    def lines_until(self, last: str) -> list[str]:
        """Return all lines up to `last`, with it."""
        lines = [self.next_line(repr(last))]
        while lines[-1] != last:
            lines.append(self.next_line(repr(last)))
        return lines

    def lines(self, count: int) -> list[str]:
        """Return the next `count` lines."""
        return [self.next_line() for _ in range(count)]

    def expect_nothing(self) -> None:
        """Expect that nothing was waiting: the answer to what is asked now comes next."""
        self.send("/is-there-anything")
        self.expect("-> there is no /is-there-anything; /help lists the commands")

    def has(self, line: str) -> bool:
        """Tell whether this line is the next, and there already, without taking it."""
        return self.arrived().startswith(line.encode() + b"\n")

    def arrived(self) -> bytes:
        """Return what is there already, without taking it; not inside TLS."""
        data = b""
        if select.select([self.sock], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                data = self.sock.recv(65536, socket.MSG_PEEK)
        return self.unread() + data

    def unread(self) -> bytes:
        """Return what was read from the socket and not taken."""
        return b"\n".join([*self._lines, self._input])

    def expect_closed(self) -> None:
        """Expect the end of the connection, and no line before it."""
        assert self.rest() == []

    def rest(self) -> list[str]:
        """Return all lines up to the end of the connection."""
        lines = []
        while (line := self._read_line()) is not None:
            lines.append(line)
        assert not self._input, f"the last line is torn: {self._input!r}"
        return lines


def pair(port: int) -> tuple[Peer, Peer]:
    """Return alice and bob, who are in the room and know of each other."""
    alice, bob = Peer(port).join("alice"), Peer(port).join("bob")
    alice.expect("* bob joined the chat")
    return alice, bob


def crowd(port: int, count: int) -> list[Peer]:
    """Return peers who are in the room, peer0 and so on, and have read all that was said in it."""
    peers = [Peer(port).join(f"peer{number}") for number in range(count)]
    peers[-1].send("ready")
    for peer in peers:
        peer.expect_eventually(f"peer{count - 1}: ready")
    return peers


# --- A room in this process --------------------------------------------------


@contextlib.contextmanager
def run_chat(*, shrunken: bool = False, **options: Any) -> Iterator[ChatServer]:
    """Run a room in this process, without a limit of lines, and see that it leaves nothing.

    With `shrunken`, its sockets hold little, so that a reader that stops is soon noticed.
    """
    options.setdefault("rate_limit", 0.0)
    with no_leaks():
        server = ChatServer(port=0, **options)
        if shrunken:
            shrink(server)
        with server:
            try:
                yield server
            finally:
                close_peers()


def is_away(server: ChatServer, name: str) -> bool:
    """Tell whether the place of somebody who lost their connection is kept for them."""
    stay = server.broadcaster.room.by_name(name)
    return stay is not None and stay.session is None


def session_of(server: ChatServer, name: str) -> int:
    """Return the session of somebody who is here."""
    stay = server.broadcaster.room.by_name(name)
    assert stay is not None
    assert stay.session is not None
    return stay.session


def hand_in(server: ChatServer, *entries: Entry) -> None:
    """Have things happen without a client."""
    for entry in entries:
        server.broadcaster.entries.hand_in(Handed(entry))


def kick(server: ChatServer, name: str, by: str, reason: str) -> None:
    """Have somebody put out by another, who is an operator from now on."""
    operator, stay = session_of(server, by), server.broadcaster.room.by_name(name)
    assert stay is not None
    hand_in(server, Promoted(operator), Kicked(operator, stay.number, reason))


@contextlib.contextmanager
def stopping(server: ChatServer) -> Iterator[None]:
    """Stop a room while something else happens, such as that its peers hear of it."""
    thread = threading.Thread(target=server.stop)
    thread.start()
    try:
        yield
    finally:
        close_peers()
        thread.join()


def shrink(server: ChatServer) -> None:
    """Give all sockets that a server will accept small buffers."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        server._listener.setsockopt(socket.SOL_SOCKET, option, SMALL)


def close_peers() -> None:
    """Close all peers of a test."""
    while Peer.opened:
        Peer.opened.pop().close()


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail when threads or descriptors are left that were not there before."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    try:
        yield
    finally:
        close_peers()
    wait_until(lambda: set(threading.enumerate()) <= threads, "the threads to end")
    wait_until(lambda: _descriptors() <= descriptors, "the descriptors to be closed", 2)


def _descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


# --- A server in a process of its own ----------------------------------------


class Server:
    """A running `server.py`, its log and its end."""

    def __init__(self, *options: str, **constants: float) -> None:
        program = [str(SERVER)]
        if constants:
            code = ALTERED.format(folder=str(SERVER.parent), constants=constants)
            program = ["-c", code]
        self.port = 0
        self._lines: list[str] = []
        self._news = threading.Condition()  # guards the lines; notified of each and of the end
        self._ended = False
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", *program, "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as log:
            for line in log:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def log(self) -> str:
        """Return all that was logged so far."""
        with self._news:
            return "".join(self._lines)

    def expect_log(self, pattern: str) -> re.Match[str]:
        """Wait until what matches `pattern` stands in the log."""
        with self._news:
            found = self._news.wait_for(
                lambda: re.search(pattern, "".join(self._lines)) or self._ended, DEADLINE
            )
            assert isinstance(found, re.Match), f"no {pattern!r} in {''.join(self._lines)!r}"
            return found

    def ask_to_end(self, number: int = signal.SIGTERM) -> None:
        """Ask the server to end."""
        self._process.send_signal(number)

    def wait(self, seconds: float = STOP) -> int:
        """Return the exit status; fail when there is none within the five seconds of an end."""
        status = self._process.wait(seconds)
        self._reader.join()
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status; fail when it takes over five seconds."""
        self.ask_to_end(number)
        return self.wait()

    def allow_descriptors(self, count: int | None = None) -> None:
        """Let the server open descriptors under `count` only, or as many as at its start."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = limits[0] if count is None else count
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (soft, limits[1]))

    def highest_descriptor(self) -> int:
        """Return the highest descriptor that the server has open."""
        return max(int(name) for name in os.listdir(f"/proc/{self.pid}/fd"))

    def end(self) -> None:
        """End the process, come what may."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()


@contextlib.contextmanager
def run_server(*options: str, **constants: float) -> Iterator[Server]:
    """Run `server.py` as a process on a free port, and see that it ends without a fault.

    Constants given by name, such as WRONG_DELAY, are other ones than its own.
    """
    with no_leaks():
        server = Server(*options, **constants)
        try:
            server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
            yield server
            close_peers()
            if server._process.poll() is None:
                assert server.stop() == 0
        finally:
            close_peers()
            server.end()
        log = server.log()
        assert "Traceback" not in log, log
        assert "Warning" not in log, log


def run_briefly(*options: str) -> subprocess.CompletedProcess[str]:
    """Run a `server.py` that is to end by itself."""
    return subprocess.run(
        [sys.executable, SERVER, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def room_lines(lines: list[str]) -> list[str]:
    """Return those of `lines` that have positions."""
    return [line for line in lines if protocol.parse(line).in_room]
