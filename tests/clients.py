"""What the tests of the client share: who listens, who pretends, and processes.

with Room() as room, Ear(room.port, "bob") as bob:
    say("alice\\nhello\\n", port=room.port)
    bob.until("alice: hello")
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chat import DEADLINE

import protocol
from client import ChatClient, Mark, Notice
from protocol import Line

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
CLIENT = [sys.executable, str(ROOT / "client.py")]

Talk = Callable[[socket.socket], None]


class Shown:
    """Keeps what a `ChatClient` shows, and lets a test wait for it."""

    def __init__(self) -> None:
        self.items: list[Line | Notice] = []
        self._changed = threading.Condition()  # guards the items; notified when one comes

    def __call__(self, item: Line | Notice) -> None:
        """Take an item, as `show`."""
        with self._changed:
            self.items.append(item)
            self._changed.notify_all()

    @property
    def texts(self) -> list[str]:
        """What was shown, as text."""
        return [str(item) for item in self.items]

    @property
    def room(self) -> list[str]:
        """The lines of the room among it."""
        return [str(item) for item in self.items if isinstance(item, Line) and item.in_room]

    @property
    def notices(self) -> list[str]:
        """What the client itself had to say, without its marks."""
        return [
            item.text
            for item in self.items
            if isinstance(item, Notice) and not isinstance(item, Mark)
        ]

    def wait_for(self, wanted: str) -> None:
        """Wait until a text is shown that holds a wanted one."""
        with self._changed:
            found = self._changed.wait_for(lambda: any(wanted in t for t in self.texts), DEADLINE)
        assert found, f"{wanted!r} was not shown, but {self.texts}"


def flush(chat: ChatClient) -> None:
    """Wait until every line has its receipt."""
    waiting = threading.Thread(target=chat.flush, daemon=True)
    waiting.start()
    waiting.join(DEADLINE)
    assert not waiting.is_alive(), "a line has no receipt"


@contextmanager
def chatting(
    port: int, name: str = "alice", fmt: str = "ascii"
) -> Iterator[tuple[ChatClient, Shown]]:
    """Be in the room; leave it in the end, whatever the test has found."""
    shown = Shown()
    chat = ChatClient(name, port=port, fmt=fmt, show=shown)
    for attempt in range(5):  # a first connection that fails is the caller's to try again
        try:
            chat.connect()
        except OSError:
            if attempt == 4:
                raise
        else:
            break
    chat.start()
    try:
        yield chat, shown
    finally:
        chat.leave()


@contextmanager
def pretended(talk: Talk) -> Iterator[int]:
    """Listen like a server and `talk` with each who comes; give the port.

    When `talk` returns, the other end is read until it closes.
    """
    listener = socket.create_server((HOST, 0))
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            sock, _ = listener.accept()
            with sock, suppress(OSError):
                sock.settimeout(DEADLINE)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # for who resets it
                if not stopping.is_set():
                    talk(sock)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(4096):
                        pass

    thread = threading.Thread(target=serve, name="pretended")
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        socket.create_connection(listener.getsockname()).close()  # wakes accept()
        thread.join()
        listener.close()


def greet(sock: socket.socket, *lines: bytes) -> None:
    """Let a client in, tell it who is here, and send lines."""
    name = enter(sock)
    sock.sendall(f"-> 1 here: {name}\n".encode() + b"".join(lines))


def enter(sock: socket.socket) -> str:
    """Let a client in, or back in, and wait for its own /names; return its name."""
    sock.sendall(b"NICK\n")
    asked = protocol.introduction(read_line(sock).decode())
    name = asked.name
    if asked.position is None:
        sock.sendall(f"-> Welcome, {name}!\n-> at 1\n* {name} joined the chat\n".encode())
    else:
        at = protocol.at(asked.position, asked.whispers)
        sock.sendall(f"-> Welcome back, {name}!\n{at}\n".encode())
    while read_line(sock) != b"/names":
        pass
    return name


def read_line(sock: socket.socket) -> bytes:
    """Return the next line that a client sends, without its newline."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionError("the client has gone")
        line += byte
    return line[:-1]


def read_to_end(sock: socket.socket) -> None:
    """Wait until a client has said goodbye or gone."""
    with suppress(ConnectionError):
        while not read_line(sock).endswith(b"/quit"):
            pass


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which nobody's own settings matter."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "SYSTEMROOT") if key in os.environ}
    if sys.platform == "darwin":
        kept["HOME"] = os.devnull
    nowhere = {"XDG_CONFIG_HOME": os.devnull, "APPDATA": os.devnull}
    return {**kept, **nowhere, "LC_ALL": "C.UTF-8", **more}


def start(port: int, *options: str, **pipes: int) -> subprocess.Popen[bytes]:
    """Start a client whose input and outputs are pipes unless given."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*CLIENT, "--port", str(port), *options],
        stdin=pipes.get("stdin", pipe),
        stdout=pipes.get("stdout", pipe),
        stderr=pipes.get("stderr", pipe),
        env=environment(),
    )


def say(text: str | bytes, *options: str, port: int) -> subprocess.CompletedProcess[str]:
    """Run a client with an input, as `printf TEXT | python client.py OPTIONS` does."""
    done = subprocess.run(
        [*CLIENT, "--port", str(port), *options],
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        env=environment(),
        timeout=DEADLINE,
    )
    output, errors = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, output, errors)
