"""Several servers of one room, servers old and new, and what a client tells them of itself."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, close_peers, no_leaks, run_chat, wait_until
from clients import (
    HOST,
    Shown,
    Talk,
    chatting,
    enter,
    flush,
    greet,
    pretended,
    read_line,
    read_to_end,
    say,
    start,
)
from proxy import DOWN, GHOST, STALL, Fault, Proxy

import client
import protocol
from client import ChatClient
from server import ChatServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits long before trying again, and nothing is left."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(client, "RETRY_MAX", 0.02)
    with no_leaks():
        yield


def unheard() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


# --- Where they are -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("chat", [("chat", 5)]),
        ("chat:7", [("chat", 7)]),
        ("a, b:7,[::1]:8", [("a", 5), ("b", 7), ("::1", 8)]),
        ("::1", [("::1", 5)]),
        ("[::1]", [("::1", 5)]),
        ("2001:db8::2", [("2001:db8::2", 5)]),
    ],
)
def test_addresses(text: str, found: list[tuple[str, int]]) -> None:
    """A host may have a port, also in brackets, and there may be several."""
    assert client.addresses(text, 5) == found


@pytest.mark.parametrize("text", ["", ",", "a:x", "[::1]:99999", ":5"])
def test_what_is_no_address(text: str) -> None:
    """What names no server is wrong usage."""
    done = say("", "--host", text, port=1)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_next_server_when_one_is_not_there() -> None:
    """Of several servers those that do not answer are passed over."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        hosts = f"{HOST}:{unheard()},{HOST},[::1]:{unheard()}"
        assert say("alice\nhello\n", "--host", hosts, port=server.port).returncode == 0
        bob.expect("* alice joined the chat", "alice: hello", "* alice left the chat")


def test_no_server_of_several() -> None:
    """When none of them answers, the one line names them all."""
    done = say("alice\n", "--host", f"{HOST}:{unheard()},{HOST}:{unheard()}", port=1)
    assert done.returncode == 1
    assert re.search(r"no server on 127.0.0.1 port \d+ or 127.0.0.1 port \d+;", done.stderr)


@pytest.mark.parametrize("between", ["", "b..ad,"])
def test_next_server_when_one_is_lost(between: str) -> None:
    """A client whose server goes comes back at the next one, and says there what waits.

    What is no name of a host is passed over.
    """
    servers = ChatServer(port=0), ChatServer(port=0)
    with servers[0] as first, servers[1] as second, Proxy(first.port) as proxy:
        shown = Shown()
        hosts = f"{HOST}:{proxy.port},{between}{HOST}:{second.port}"
        chat = ChatClient("alice", hosts, show=shown)
        chat.connect()
        chat.start()
        try:
            wait_until(lambda: chat.settled)
            bob = Peer(second.port).join("bob")
            proxy.go_away()
            bob.expect("* alice joined the chat")
            chat.send("hello")
            bob.expect("alice: hello")
            shown.wait_for("back after")
        finally:
            chat.leave()
        close_peers()
        assert shown.notices.count(f"now at {HOST}:{second.port}") == 1
        assert f"now at {HOST}:{proxy.port}" not in shown.notices


def scripted(*lines: bytes, answers: bool = True) -> Talk:
    """Return a server that lets a client in, sends lines and then echoes or only listens."""

    def talk(sock: socket.socket) -> None:
        name = enter(sock)
        sock.sendall(f"-> 1 here: {name}\n".encode() + b"".join(lines))
        with suppress(ConnectionError):
            while not (line := read_line(sock)).endswith(b"/quit"):
                if answers:
                    sock.sendall(line + b"\n")

    return talk


def test_server_that_has_us_wait_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose room waits for long is let go when the next has let us in."""
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    waits = scripted(protocol.WAITING.encode() + b"\n", answers=False)
    with pretended(waits) as slow, pretended(scripted()) as fast:
        shown = Shown()
        chat = ChatClient("alice", f"{HOST}:{slow},{HOST}:{fast}", show=shown)
        chat.connect()
        chat.start()
        try:
            shown.wait_for("the room is waiting")
            chat.send("hello")
            shown.wait_for("alice: hello")
            flush(chat)
        finally:
            chat.leave()
        assert "connection lost; trying again" not in shown.notices


def test_server_that_has_us_wait_is_kept_when_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While no other server lets us in, the one that has us wait stays ours."""
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    goes_on = threading.Event()

    def talk(sock: socket.socket) -> None:
        name = enter(sock)
        sock.sendall(f"-> 1 here: {name}\n{protocol.WAITING}\n".encode())
        line = read_line(sock)
        assert goes_on.wait(DEADLINE)
        sock.sendall(protocol.GOES_ON.encode() + b"\n" + line + b"\n")
        with suppress(ConnectionError):
            while not read_line(sock).endswith(b"/quit"):
                pass

    tried = threading.Event()

    def refuse(sock: socket.socket) -> None:
        sock.sendall(protocol.WAITING_AT_THE_DOOR.encode() + b"\n")
        tried.set()

    with pretended(talk) as port, pretended(refuse) as other:
        shown = Shown()
        chat = ChatClient("alice", f"{HOST}:{port},{HOST}:{other}", show=shown)
        chat.connect()
        chat.start()
        try:
            chat.send("hello")
            assert tried.wait(DEADLINE)
            goes_on.set()
            shown.wait_for("alice: hello")
            flush(chat)
            assert chat.failed == 0
        finally:
            chat.leave()


def test_line_that_is_not_taken_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sees no status line is told, once, that a line waits though the room talks on."""
    monkeypatch.setattr(client, "PATIENCE", 2.0)
    told = threading.Event()

    def talk(sock: socket.socket) -> None:
        greet(sock)
        line = read_line(sock)
        while not told.wait(0.1):  # much less than it takes to be called silent
            sock.sendall(b"bob: la\n")
        sock.sendall(line + b"\n")
        read_to_end(sock)

    with pretended(talk) as port:
        shown = Shown()
        chat = ChatClient("alice", HOST, port, show=shown)
        chat.connect()
        chat.start()
        try:
            chat.send("hello")
            shown.wait_for("1 line waiting; the server has taken none for 2 s")
            told.set()
            flush(chat)
        finally:
            told.set()
            chat.leave()
        assert len(shown.notices) == 1


def test_give_up() -> None:
    """With --give-up the wait for a lost server ends, and what may not have been said is told."""
    hang_up = threading.Event()

    def once(sock: socket.socket) -> None:
        if hang_up.is_set():
            return
        name = enter(sock)
        sock.sendall(f"-> 1 here: {name}\n".encode())
        assert read_line(sock) == b"alice: one"
        hang_up.set()

    with pretended(once) as port, start(port, "--name", "alice", "--give-up", "1") as process:
        _, errors = process.communicate(b"one\n", DEADLINE)
    assert process.returncode == 1
    assert b"the server did not come back in 1 s" in errors
    assert b"seen" in errors
    assert b"one" in errors


def test_give_up_tells_what_was_not_said() -> None:
    """What was typed while the server was gone, and never said, is told line by line."""
    came: list[str] = []

    def once(sock: socket.socket) -> None:
        if not came:
            came.append(enter(sock))
            sock.sendall(b"-> 1 here: alice\n")

    with pretended(once) as port, start(port, "--name", "alice", "--give-up", "5") as process:
        assert process.stderr
        assert b"connection lost" in process.stderr.readline()
        _, errors = process.communicate(b"one\ntwo\n", DEADLINE)
    assert process.returncode == 1
    assert b"not sent: one\n" in errors
    assert b"not sent: two\n" in errors


# --- What a client tells of itself ----------------------------------------------


def introductions(
    answer: Callable[[protocol.Introduction], bytes], lives: int = 3
) -> tuple[Talk, list[protocol.Introduction]]:
    """Return a server that hangs up after each private line, and how clients came to it."""
    came: list[protocol.Introduction] = []

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        came.append(protocol.introduction(read_line(sock).decode()))
        sock.sendall(b"-> Welcome, alice!\n" + answer(came[-1]))
        while read_line(sock) != b"/names":
            pass
        sock.sendall(b"-> 1 here: alice\n")
        if len(came) < lives:
            sock.sendall(b"[from bob] psst\n[from bob] psst\n")
            return
        with suppress(ConnectionError):
            while not (line := read_line(sock)).endswith(b"/quit"):
                sock.sendall(line + b"\n")

    return talk, came


def test_private_lines_are_counted() -> None:
    """It tells how many private lines it had under its key, but not when it first shows it."""

    def answer(asked: protocol.Introduction) -> bytes:
        return protocol.at(1, asked.whispers).encode() + b"\n"

    talk, came = introductions(answer)
    with pretended(talk) as port, chatting(port) as (chat, _):
        wait_until(lambda: len(came) == 3)
        chat.send("hello")
        flush(chat)
    assert [asked.whispers for asked in came] == [None, 2, 4]
    assert len({asked.key for asked in came}) == 1


def test_count_that_is_answered_holds() -> None:
    """The server's count is taken, and what it says is lost is counted."""

    def answer(asked: protocol.Introduction) -> bytes:
        if asked.whispers is None:
            return b"-> at 1\n"
        return b"-> at 1+70\n-> missed 5 private lines\n"

    talk, came = introductions(answer)
    with pretended(talk) as port, chatting(port) as (chat, shown):
        shown.wait_for("-> missed 5 private lines")
        wait_until(lambda: len(came) == 3)
        chat.send("hello")
        flush(chat)
    assert [asked.whispers for asked in came] == [None, 2, 77]


def test_old_server_that_does_not_count() -> None:
    """A server that knows no count of private lines is told none, and works."""
    seen: list[bytes] = []
    lives: list[socket.socket] = []

    def talk(sock: socket.socket) -> None:
        lives.append(sock)
        sock.sendall(b"NICK\n")
        while b"+" in (introduction := read_line(sock)):
            seen.append(introduction)
            sock.sendall(protocol.answer(protocol.HOW_TO_ANSWER).encode() + b"\nNICK\n")
        seen.append(introduction)
        sock.sendall(b"-> Welcome back, alice!\n-> at 1\n")
        while read_line(sock) != b"/names":
            pass
        sock.sendall(b"-> 1 here: alice\n")
        if len(lives) == 3:
            with suppress(ConnectionError):
                while not (line := read_line(sock)).endswith(b"/quit"):
                    sock.sendall(line + b"\n")

    with pretended(talk) as port, chatting(port) as (chat, _):
        wait_until(lambda: len(lives) == 3)
        chat.send("hello")
        flush(chat)
    assert [b"+" in line for line in seen] == [False, True, False, False]


def test_old_server_that_knows_no_reply() -> None:
    """A command that an old server does not know is answered all the same, and holds up nothing."""

    def talk(sock: socket.socket) -> None:
        name = enter(sock)
        sock.sendall(f"-> 1 here: {name}\n".encode())
        while not (line := read_line(sock).decode()).endswith("/quit"):
            text = line.partition(": ")[2]
            if text.startswith("/nick"):
                sock.sendall(b"-> you are now rob\n")
            elif text.startswith("/"):
                sock.sendall(protocol.unknown_command(text[1:].split()[0]).encode() + b"\n")
            else:
                sock.sendall(line.encode() + b"\n")
        sock.sendall(b"-> bye\n")

    with pretended(talk) as port:
        done = say("/reply hush\n/r hush\n/nick rob\nend\n", "--name", "alice", port=port)
    assert done.stdout.splitlines()[-2:] == ["rob: end", "-> bye"]


def test_new_name_behind_the_welcome() -> None:
    """The name that the server says we have is ours, and the `/nick` that made it is done with."""
    came: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        came.append(read_line(sock))
        back = b"-> Welcome back, rob!\n-> you are now rob\n-> at 1\n"
        sock.sendall(back if len(came) > 1 else b"-> Welcome, alice!\n-> at 1\n")
        while read_line(sock) != b"/names":
            pass
        sock.sendall(b"-> 1 here: rob\n")
        if len(came) == 1:
            assert read_line(sock).endswith(b"/nick rob")
            return
        with suppress(ConnectionError):
            while not (line := read_line(sock)).endswith(b"/quit"):
                sock.sendall(line + b"\n")

    with pretended(talk) as port, chatting(port) as (chat, shown):
        chat.send("/nick rob")
        chat.send("hello")
        shown.wait_for("rob: hello")
        flush(chat)
        assert chat.name == "rob"
        assert not any("no answer" in notice for notice in shown.notices)


def test_answer_to_nick_is_lost() -> None:
    """Whoever holds the new name for us, we get it back; the old name is free for others."""
    with run_chat() as server, Proxy(server.port) as proxy, chatting(proxy.port) as (chat, shown):
        bob = Peer(server.port).join("bob")
        wait_until(lambda: chat.settled)
        shown.wait_for("* bob joined the chat")  # lost, it would end the connection too early
        lose_what_comes(proxy)
        chat.send("/nick rob")
        bob.expect("* alice is now rob")
        proxy.end(GHOST)
        shown.wait_for("back after")
        chat.send("hello")
        bob.expect("rob: hello")
        assert chat.name == "rob"
        Peer(server.port).join("alice")


def lose_what_comes(proxy: Proxy) -> None:
    """From now on, what is said to the client is lost and what it says still arrives."""
    [link] = proxy.links
    link.fault = Fault(DOWN, link.passed[DOWN], STALL)


def test_goodbye_at_its_own_end() -> None:
    """A client that ends of itself, however early, leaves at once and holds no place."""
    goodbyes: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        read_line(sock)
        if len(goodbyes) % 2:
            sock.sendall(b"-> Welcome, alice!\n")
        process.send_signal(signal.SIGTERM)
        line = b"/names"
        while line == b"/names":
            line = read_line(sock)
        goodbyes.append(line.rpartition(b": ")[2])

    with pretended(talk) as port:
        for _ in range(6):
            with start(port, "--name", "alice") as process:
                assert process.wait(DEADLINE) == 0
    assert goodbyes == [b"/quit"] * 6


# --- Leaving while nobody answers ------------------------------------------------


@pytest.fixture
def nowhere() -> Iterator[int]:
    """A port from which nobody who dials it gets an answer."""
    with ExitStack() as opened:
        full = opened.enter_context(socket.create_server((HOST, 0), backlog=0))
        port = full.getsockname()[1]
        for _ in range(4):  # the kernel answers no more than fit in its queue
            filler = opened.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((HOST, port))
        yield port


CONNECTIONS = Path("/proc/net/tcp")
SYN_SENT = "02"  # as it stands there


@pytest.mark.skipif(not CONNECTIONS.exists(), reason="no /proc to see who is dialling in")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_dialling(nowhere: int, number: int) -> None:
    """Whoever ends it at its first dialling does not wait for the connection either."""

    def dialling() -> int:
        rows = [line.split() for line in CONNECTIONS.read_text().splitlines()]
        return sum(row[2].endswith(f":{nowhere:04X}") and row[3] == SYN_SENT for row in rows)

    before = dialling()
    with start(nowhere, "--name", "alice") as process:
        wait_until(lambda: dialling() > before, "it to dial")
        process.send_signal(number)
        assert process.wait(client.CONNECT_TIMEOUT / 2) == 0
        assert process.stderr
        assert process.stderr.read() == b""


def test_leaving_while_dialling(nowhere: int) -> None:
    """Who leaves while a connection is being made does not wait for it."""
    dialling = threading.Event()

    def hang_up(sock: socket.socket) -> None:
        enter(sock)

    with pretended(hang_up) as first:
        shown = Shown()
        chat = ChatClient("alice", f"{HOST}:{first}", show=shown)
        chat.connect()
        chat.entrance.servers = [(HOST, nowhere)]
        chat.entrance.turn = 0
        reach = client._reach

        def watched(*arguments: object) -> socket.socket:
            dialling.set()
            return reach(*arguments)  # type: ignore[arg-type]

        client._reach = watched  # type: ignore[assignment]
        try:
            chat.start()
            assert dialling.wait(DEADLINE)
            begun = time.monotonic()
            chat.send("unsaid")
            assert chat.leave() == ["unsaid"]
            assert time.monotonic() - begun < client.CONNECT_TIMEOUT / 2
        finally:
            client._reach = reach


# --- Bots -------------------------------------------------------------------------


def test_bot_does_not_hear_yesterday() -> None:
    """A bot that is started again is not given what was said before; on demand it is, marked."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        bob.send("!bye", "!time")
        bob.expect("bob: !bye", "bob: !time")
        for earlier in (False, True):
            with ChatClient("clock", port=server.port, earlier=earlier) as chat:
                bob.expect("* clock joined the chat")
                bob.send("now")
                bob.expect("bob: now")
                heard = []
                for line in chat:
                    heard.append((str(line), line.earlier))
                    if heard[-1] == ("bob: now", False):
                        break
            bob.expect("* clock left the chat")
            assert (("bob: !bye", True) in heard) is earlier
            assert ("bob: !bye", False) not in heard
            assert ("* clock joined the chat", False) in heard


def test_bot_hears_all_of_a_busy_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said since it came is given to a bot, however late its own answer comes."""
    monkeypatch.setattr(client, "MAX_HELD", 50)
    texts = [f"news {number}" for number in range(200)]

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        read_line(sock)
        sock.sendall(b"-> Welcome, clock!\n-> at 7\nbob: old\n* clock joined the chat\n")
        assert read_line(sock).endswith(b"/names")
        sock.sendall(b"".join(b"bob: %s\n" % text.encode() for text in texts))
        sock.sendall(b"-> 2 here: bob, clock\nbob: over\n")
        while line := read_line(sock):
            if line.endswith(b"/quit"):
                sock.sendall(b"-> bye\n")

    with pretended(talk) as port, ChatClient("clock", port=port) as chat:
        heard = []
        for line in chat:
            if line.in_room:
                heard.append(line)
            if line.text == "over":
                break
        assert [line.text for line in heard] == ["clock joined the chat", *texts, "over"]
        assert not any(line.earlier for line in heard)


def test_bot_hears_what_was_said_in_its_absence() -> None:
    """What was said while the connection was lost is given to a bot, and marked."""
    with run_chat() as server, Proxy(server.port) as proxy:
        bob = Peer(server.port).join("bob")
        with ChatClient("clock", port=proxy.port) as chat:
            bob.expect("* clock joined the chat")
            wait_until(lambda: chat.settled)
            proxy.go_away(GHOST)
            bob.send("missed")
            bob.expect("bob: missed")
            proxy.come_back()
            wait_until(lambda: chat.settled and len(proxy.links) > 1)
            bob.send("now")
            heard = {}
            for line in chat:
                heard[str(line)] = line.earlier
                if line.text == "now":
                    break
        assert heard["bob: missed"]
        assert not heard["bob: now"]


def test_old_python() -> None:
    """A Python that is too old gets one line that says what is needed."""
    code = "import sys; sys.version_info = (3, 10, 13); import client"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "client.py: this needs Python 3.11 or newer, and is run by 3.10\n"
