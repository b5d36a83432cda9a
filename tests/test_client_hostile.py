"""Whatever a server sends: the client stays bounded, loses nothing typed and says what is wrong."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, no_leaks, run_chat, wait_until
from clients import Talk, chatting, enter, flush, greet, pretended, read_line, read_to_end, start

import client
import protocol
from client import ChatClient, Notice
from protocol import Line

MEMORY = 60_000  # KiB that a client may take, whatever comes
FUZZED = 150  # connections


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits long before trying again, and nothing is left."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(client, "RETRY_MAX", 0.02)
    with no_leaks():
        yield


def echo(sock: socket.socket) -> None:
    """Say what the client says until it leaves."""
    with suppress(ConnectionError):
        while not (line := read_line(sock)).endswith(b"/quit"):
            sock.sendall(line + b"\n")
        sock.sendall(b"-> bye\n")


@pytest.mark.parametrize("digits", [19, 30, 1000, 5000])
@pytest.mark.parametrize("line", ["-> at {}", "-> missed {} lines", "-> at 1+{}"])
def test_numbers_of_many_digits(line: str, digits: int) -> None:
    """A number that no server means ends nothing, and the client can still come back."""
    connections = []

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        introduction = protocol.introduction(read_line(sock).decode())
        connections.append(introduction)
        sock.sendall(b"-> Welcome, alice!\n" + line.format("9" * digits).encode() + b"\n")
        if len(connections) < 3:
            return
        sock.sendall(b"* alice joined the chat\n")
        while read_line(sock) != b"/names":
            pass
        sock.sendall(b"-> 1 here: alice\n")
        echo(sock)

    with pretended(talk) as port, chatting(port) as (chat, _):
        chat.send("hello")
        flush(chat)
    assert len(connections) == 3


def test_position_at_the_end_of_numbers() -> None:
    """Beyond the last position that a server takes, it asks for what there is."""
    asked = []

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        asked.append(protocol.introduction(read_line(sock).decode()))
        sock.sendall(b"-> Welcome, alice!\n-> at %d\n" % (10**18 - 1))
        sock.sendall(b"* alice joined the chat\n")
        while read_line(sock) != b"/names":
            pass
        sock.sendall(b"-> 1 here: alice\n")
        if len(asked) > 1:
            echo(sock)

    with pretended(talk) as port, chatting(port) as (chat, _):
        wait_until(lambda: len(asked) > 1)
        chat.send("hello")
        flush(chat)
    assert asked[1].position is None


def test_names_without_end_swallow_no_answer() -> None:
    """A count of names that do not come hides no answer, and no refusal."""

    def talk(sock: socket.socket) -> None:
        enter(sock)
        sock.sendall(b"-> 999999 here: alice, bob,\n")
        read_line(sock)
        sock.sendall(b"-> not sent: this room is read-only\n")
        echo(sock)

    with pretended(talk) as port, chatting(port) as (chat, shown):
        chat.send("hello")
        shown.wait_for("-> not sent: this room is read-only")
        flush(chat)
        assert chat.failed == 1


def test_welcome_and_then_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lets it in and says nothing is spoken of, then given up for another try."""
    monkeypatch.setattr(client, "PATIENCE", 0.1)
    monkeypatch.setattr(client, "CATCH_UP_TIMEOUT", 0.5)
    tries = []

    def talk(sock: socket.socket) -> None:
        tries.append(sock)
        if len(tries) > 1:
            greet(sock)
            echo(sock)
            return
        sock.settimeout(None)  # the client is to hang up
        sock.sendall(b"NICK\n")
        read_line(sock)
        sock.sendall(b"-> Welcome, alice!\n")
        read_to_end(sock)

    with pretended(talk) as port, chatting(port) as (chat, shown):
        chat.send("hello")
        shown.wait_for("no answer from the server for")
        shown.wait_for("connection lost")
        flush(chat)
        assert chat.failed == 0
    assert len(tries) > 1


def test_silence_while_something_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer is spoken of once, and not cut off."""
    monkeypatch.setattr(client, "PATIENCE", 0.1)
    told = threading.Event()

    def talk(sock: socket.socket) -> None:
        greet(sock)
        line = read_line(sock)
        assert told.wait(DEADLINE)
        sock.sendall(line + b"\n")
        echo(sock)

    with pretended(talk) as port, chatting(port) as (chat, shown):
        chat.send("hello")
        shown.wait_for("no answer from the server for 0 s; 1 line waiting")
        wait_until(lambda: chat.status == "connected, 1 line waiting", "the status to tell")
        told.set()
        flush(chat)
        assert len(shown.notices) == 1


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to see memory in")
def test_replay_without_end() -> None:
    """A replay that does not end is shown as it comes, and not kept."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        read_line(sock)
        sock.sendall(b"-> Welcome, alice!\n-> at 1\n")
        with suppress(OSError):
            while True:
                sock.sendall(b"mallory: %s\n" % (b"x" * 900) * 100)

    with pretended(talk) as port, start(port, "--name", "alice", "--listen") as process:
        assert process.stdout
        taken = 0
        while taken < 100_000_000:
            taken += len(os.read(process.stdout.fileno(), 1 << 20))
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        process.kill()
    assert peak
    assert int(peak[1]) < MEMORY


@pytest.mark.parametrize("answers", [True, False])
def test_goodbye_to_a_server_that_answers_late(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """What keeps a client from sending its goodbye does not keep it from saying it in the end."""
    monkeypatch.setattr(client, "LEAVE_TIMEOUT", 0.1)
    heard: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        if answers:
            greet(sock)
        else:
            enter(sock)
        with suppress(ConnectionError):
            while True:
                heard.append(read_line(sock))

    with pretended(talk) as port, chatting(port) as (chat, shown):
        shown.wait_for("Welcome")
        if answers:
            chat.send("/nick rob")
            wait_until(lambda: bool(heard), "the command to be sent")
        chat.leave()
        wait_until(lambda: b"/quit" in heard, "the goodbye")
    assert heard == ([b"alice: /nick rob"] if answers else []) + [b"/quit"]


def test_leaving_while_nobody_reads_on() -> None:
    """Who stopped iterating, with as much unread as is kept, can leave, and says goodbye."""
    with run_chat() as room:
        chat = ChatClient("alice", port=room.port)
        chat.connect()
        chat.start()
        bob = Peer(room.port).join("bob")
        lines = iter(chat)
        bob.send("hello")
        next(lines)
        bob.send(*map(str, range(2 * client.MAX_WAITING)))
        wait_until(lambda: len(chat._inbox._lines) >= client.MAX_WAITING, "as much to be unread")
        chat.leave()
        bob.expect_eventually("* alice left the chat")
        assert not chat._receiver.is_alive()
        said = [str(line) for line in lines][-100:]
        first = int(said[0].removeprefix("bob: "))
        assert said == [f"bob: {number}" for number in range(first, first + 100)]
        assert first < client.MAX_WAITING


def test_goodbye_that_nobody_asked_for() -> None:
    """A server that says bye of itself does not end the conversation."""
    tries = []

    def talk(sock: socket.socket) -> None:
        tries.append(sock)
        greet(sock)
        if len(tries) == 1:
            sock.sendall(b"-> bye\n")
        else:
            echo(sock)

    with pretended(talk) as port, chatting(port) as (chat, _):
        chat.send("hello")
        flush(chat)
    assert len(tries) > 1


def test_last_words_before_a_reset() -> None:
    """What a server said before it broke the connection is heard, though something was to be sent.

    The server that has kicked us may have read no more of us.
    """
    is_busy, has_typed, may_go_on = threading.Event(), threading.Event(), threading.Event()

    def talk(sock: socket.socket) -> None:
        greet(sock, b"bob: first\n")
        assert has_typed.wait(DEADLINE)
        sock.sendall(b"bob: last\n-> you were kicked by bob\n")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        may_go_on.set()

    def show(item: Line | Notice) -> None:
        shown.append(str(item))
        if shown[-1] == "bob: first":
            is_busy.set()
            assert may_go_on.wait(DEADLINE)

    shown: list[str] = []
    with pretended(talk) as port:
        chat = ChatClient("alice", port=port, show=show)
        chat.connect()
        chat.start()
        assert is_busy.wait(DEADLINE)
        chat.send("hello")
        has_typed.set()
        wait_until(lambda: bool(chat.reason), "the client to end")
        chat.leave()
    assert chat.reason == "you were kicked by bob"
    assert chat.failed == 1
    assert shown[-3:-1] == ["bob: last", "-> you were kicked by bob"]
    assert "not sent again: hello" in shown[-1]


LINES = [
    *(b"NICK", b"-> Welcome, alice!", b"-> at 1", b"-> at 5+3", b"-> missed 3 lines"),
    *(
        b"-> missed 2 private lines",
        b"-> 2 here: alice, bob",
        b"-> 900 here: alice,",
        b"bob, carol",
    ),
    *(b"-> not sent: no", b"-> you are now rob", b"-> to bob: x", b"-> bye", b"alice: hello"),
    *(
        b"** alice nods",
        b"* alice joined the chat",
        b"* alice left the chat",
        b"* alice is now rob",
    ),
    *(b"* bob was kicked by carol: x", b"[from bob] psst", b"-> the room is waiting; what you say"),
    *(
        b"-> the room is waiting; what you say is kept",
        b"-> the room goes on",
        b"",
        b"\xff\xfe",
        b"x",
    ),
    *(
        b"-> answer with NAME, NAME FROM or NAME FROM KEY; a name is one word",
        b"\x1b[2J",
        b": ",
        b"->",
    ),
]


def fuzz(seed: int) -> Talk:
    """Return a server that says anything, its lines cut anywhere, and hangs up."""

    def talk(sock: socket.socket) -> None:
        chance = random.Random(seed + next(counter))
        if chance.random() < 0.7:
            sock.sendall(b"NICK\n-> Welcome, alice!\n-> at 1\n")
        data = b""
        for _ in range(chance.randrange(40)):
            kind = chance.random()
            if kind < 0.8:
                data += chance.choice(LINES) + b"\n"
            elif kind < 0.9:
                data += chance.randbytes(chance.randrange(30))
            else:
                data += chance.choice(LINES).replace(b"1", b"9" * chance.randrange(1, 40)) + b"\n"
        while data:
            cut = chance.randrange(1, 100)
            sock.sendall(data[:cut])
            data = data[cut:]

    counter = iter(range(10**9))
    return talk


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 64))]
)
def test_fuzzed_server(seed: int) -> None:
    """After a server that talks nonsense for many connections, what was typed is still said."""
    connections = 0
    nonsense = fuzz(seed * 1000)

    def talk(sock: socket.socket) -> None:
        nonlocal connections
        connections += 1
        if connections < FUZZED:
            nonsense(sock)
            return
        if connections == FUZZED:
            chat.send("sane")
        sock.sendall(b"NICK\n")
        name = ""
        while b"/names" not in (line := read_line(sock)):
            name = line.split()[0].decode()
            sock.sendall(f"-> Welcome, {name}!\n-> at 1\n* {name} joined the chat\n".encode())
        sock.sendall(f"-> 1 here: {name}\n".encode())
        echo(sock)

    def is_sane() -> bool:
        assert not ended.is_set(), chat.reason
        return any(line.endswith(": sane") for line in shown)

    shown: list[str] = []
    ended = threading.Event()
    with pretended(talk) as port:
        chat = ChatClient(
            "alice", port=port, show=lambda item: shown.append(str(item)), ended=ended.set
        )
        while not connections >= FUZZED:
            try:
                chat.connect()
                break
            except (OSError, client.Refused):
                continue
        chat.start()
        try:
            wait_until(is_sane, "a sane server", DEADLINE * 2)
        finally:
            chat.leave()
