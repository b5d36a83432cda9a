"""What goes wrong: resources that run out, peers that vanish, faults inside, and crowds."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat import (
    DEADLINE,
    SMALL,
    STOP,
    Clock,
    Peer,
    close_peers,
    crowd,
    hand_in,
    is_away,
    kick,
    no_leaks,
    pair,
    room_lines,
    run_chat,
    run_server,
    session_of,
    stopping,
    wait_until,
)
from trust import TlsPeer, make_certificate

import protocol
import server as server_module
from protocol import Connection
from server import (
    Answered,
    Asked,
    Banned,
    ChatServer,
    Claim,
    Client,
    Kicked,
    Left,
    Lost,
    NotStored,
    Output,
    Passed,
    Promoted,
    Renamed,
    Room,
    Said,
    Unbanned,
    Whispered,
)

KEY = "0123456789abcdef"
CALL = "are you there"


@pytest.fixture
def room() -> Iterator[ChatServer]:
    """An empty room."""
    with run_chat() as server:
        yield server


# --- Accepting goes on -------------------------------------------------------


def test_the_room_goes_on_without_descriptors() -> None:
    """With no descriptor left the room talks on, says so once, and lets people in again later."""
    with run_server("--rate-limit", "0") as server:
        alice, bob = pair(server.port)
        highest = server.highest_descriptor()
        for episode in range(1, 3):
            wait_until(lambda: server.highest_descriptor() <= highest, "the others to be closed")
            server.allow_descriptors(highest + 1)
            waiting = [Peer(server.port) for _ in range(5)]
            server.expect_log("(?s)" + "cannot accept.*" * episode)
            alice.send(*(f"line {number}" for number in range(100)))
            for peer in alice, bob:
                peer.expect(*(f"alice: line {number}" for number in range(100)))
            server.allow_descriptors()
            for peer in waiting:
                peer.expect("NICK")
                peer.end_input()
                peer.expect_closed()
        assert server.log().count("cannot accept") == 2


def test_a_place_that_is_left_lets_the_next_one_in() -> None:
    """Whoever waits without a descriptor is let in when somebody leaves."""
    with run_server() as server:
        alice, bob = pair(server.port)
        server.allow_descriptors(server.highest_descriptor() + 1)
        carol = Peer(server.port)
        server.expect_log("cannot accept")
        bob.send("/quit").rest()
        bob.close()
        carol.join("carol")
        alice.expect("* bob left the chat", "* carol joined the chat")
        server.allow_descriptors()


def without_threads(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[object]:
    """Have as many threads for clients as `failures` fail to start; return the failed ones."""
    start, failed = threading.Thread.start, list[object]()

    def start_or_raise(thread: threading.Thread) -> None:
        target = getattr(thread, "_target", None)
        if getattr(target, "__name__", "") == "handle" and len(failed) < failures:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_raise)
    return failed


def test_a_thread_that_cannot_start_costs_one_connection(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who cannot be served is told so, counted and closed; the room goes on with the next one."""
    caplog.set_level("INFO", "chat")
    alice = Peer(room.port).join("alice")
    failed = without_threads(monkeypatch, failures=3)
    for _ in range(3):
        peer = Peer(room.port)
        peer.expect(protocol.BUSY)
        peer.expect_closed()
    assert len(failed) == 3
    Peer(room.port).join("bob")
    alice.expect("* bob joined the chat")
    assert caplog.text.count("cannot accept") == 1
    room.refusals.tell()
    assert "refused in the last minute: the server is busy (3)" in caplog.messages


def test_a_thread_that_cannot_start_for_who_is_gone_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two faults at once, a reset and no thread, leave no connection behind."""
    with no_leaks():
        server = ChatServer(port=0)
        try:
            without_threads(monkeypatch, failures=1)
            Peer(server.port).vanish()
            waiting = Peer(server.port)
            server.start()
            waiting.join("alice")
            wait_until(lambda: len(server.clients) == 1, "the lost one to be forgotten")
            assert server.names == ["alice"]
        finally:
            close_peers()
            server.stop()


def test_connections_reset_before_they_are_accepted() -> None:
    """Connections that are reset in the queue are nothing to those behind them."""
    with no_leaks():
        server = ChatServer(port=0)  # it listens, and accepts nothing before it is started
        for number in range(50):
            peer = Peer(server.port)
            if number % 2:
                peer.send("ghost")
            peer.vanish()
        alice = Peer(server.port)
        with server:
            alice.join("alice")
            wait_until(lambda: len(server.clients) == 1, "the lost ones to be forgotten")
            alice.send("hello")
            alice.expect_eventually("alice: hello")
            close_peers()


def test_a_reset_that_accept_tells_of_is_nothing(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where `accept` fails with the peer's reset or has no address, the next one is accepted."""
    accept = socket.socket.accept
    resets = [ConnectionAbortedError(errno.ECONNABORTED, "aborted"), None] * 3

    def accept_or_not(sock: socket.socket) -> object:
        reset = resets.pop() if resets else None
        if reset:  # as on BSD
            raise reset
        return accept(sock)[0], None if resets else ("127.0.0.1", 1)  # as on macOS

    monkeypatch.setattr(socket.socket, "accept", accept_or_not)
    for _ in range(3):
        Peer(room.port)
    Peer(room.port).join("alice")
    assert not resets
    assert "cannot accept" not in caplog.text


def test_a_server_that_cannot_listen_leaves_nothing() -> None:
    """A port in use raises `OSError`, and no descriptor stays open."""
    with run_chat() as server:
        Peer(server.port).join("alice")  # so that it has opened all that it needs
        close_peers()
        wait_until(lambda: not server.clients, "alice to be gone")
        with no_leaks():
            for _ in range(3):
                with pytest.raises(OSError, match="in use"):
                    ChatServer(port=server.port)


def test_a_server_that_never_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be stopped, and one that fails to start is."""

    def fail() -> None:
        raise RuntimeError("no thread left")

    with no_leaks():
        server = ChatServer(port=0)
        server.stop()
        server.stop()
        server = ChatServer(port=0)
        monkeypatch.setattr(server._receiver, "start", fail)
        with pytest.raises(RuntimeError, match="no thread left"), server:
            pass
        with pytest.raises(ConnectionError):
            Peer(server.port)
        close_peers()


@pytest.mark.parametrize("error", [OSError(24, "too many"), MemoryError(), RuntimeError("odd")])
def test_no_error_ends_accepting(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever goes wrong with one connection, the next one is accepted."""
    accept, left = room._accept, [error] * 3

    def accept_or_raise() -> None:
        if left:
            raise left.pop()
        accept()

    monkeypatch.setattr(room, "_accept", accept_or_raise)
    Peer(room.port).join("alice")
    assert not left


# --- Peers vanish ------------------------------------------------------------

STAGES: dict[str, Callable[[Peer], object]] = {
    "at once": lambda peer: None,
    "when asked": lambda peer: peer.expect("NICK"),
    "in the name": lambda peer: peer.send_raw(b"gho"),
    "behind the name": lambda peer: peer.send_raw(b"ghost\n"),
    "when refused": lambda peer: peer.send("1", "2", "3"),
    "joined": lambda peer: peer.join("ghost"),
    "in a line": lambda peer: peer.join("ghost").send_raw(b"hello wo"),
    "behind a line": lambda peer: peer.send("ghost", "hello"),
    "in a long line": lambda peer: peer.join("ghost").send_raw(b"x" * 5000),
    "behind a flood": lambda peer: peer.send("ghost", *["hello"] * 2000),
    "in an answer": lambda peer: peer.send("ghost", *["/history 200"] * 20),
    "behind a command": lambda peer: peer.send("ghost", "/nick spirit", "/msg bob boo", "/quit"),
    "with another protocol": lambda peer: peer.send_raw(b"GET / HTTP/1.1\r\n\r\n"),
    "with a key": lambda peer: peer.send(f"ghost -0 {KEY}"),
    "without end": lambda peer: peer.send_raw(b"ghost\n" + b"x" * 70_000),
}


@pytest.mark.parametrize("way", ["reset", "close", "half"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_peer_may_vanish_at_any_moment(
    room: ChatServer, stage: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of a peer that is gone, and the others talk on."""
    monkeypatch.setattr(server_module, "HELD", 0.05)
    alice = Peer(room.port).join("alice")
    for _ in range(3):
        ghost = Peer(room.port)
        STAGES[stage](ghost)
        if way == "half":
            ghost.end_input().rest()
        elif way == "reset":
            ghost.vanish()
        else:
            ghost.close()
        last = Peer(room.port)
        last.expect("NICK")  # so the ghost, who came before, has been accepted
        last.close()
        wait_until(lambda: len(room.clients) == 1, "the ghost to be forgotten")
        wait_until(lambda: room.names == ["alice"], "its place to be kept no longer")
    alice.send("still here")
    lines = alice.lines_until("alice: still here")
    names = ("ghost", "spirit")
    joined = [line for line in lines if line in map(protocol.joined, names)]
    left = [line for line in lines if line in map(protocol.left, names)]
    assert len(joined) == len(left)
    assert room.names == ["alice"]


def test_fifty_may_vanish_at_once(room: ChatServer) -> None:
    """Everyone who came is seen leaving, once."""
    alice = Peer(room.port).join("alice")
    names = [f"ghost{number}" for number in range(50)]
    ghosts = [Peer(room.port).join(name) for name in names]
    alice.send("now")
    alice.expect_eventually("alice: now")
    for ghost in ghosts:
        ghost.vanish()
    assert sorted(alice.lines(50)) == sorted(map(protocol.left, names))
    alice.expect_nothing()


def reading_late(monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """Have somebody's thread wait before it begins to read, for the event that is returned."""
    read, may_read = Client.read, threading.Event()

    def late(client: Client) -> None:
        if client.name == name:
            assert may_read.wait(DEADLINE)
        read(client)

    monkeypatch.setattr(Client, "read", late)
    return may_read


def say_and_break_off(room: ChatServer, ghost: Peer, alice: Peer, *lines: str) -> Output:
    """Have a ghost say lines and close, and others talk until nothing can be sent to it.

    Return its output.
    """
    output = room.broadcaster.outputs[session_of(room, "ghost")]
    ghost.send(*lines)
    ghost.close()

    def is_broken() -> bool:
        alice.send(CALL)
        return output.gate.broken

    wait_until(is_broken, "the connection to be found broken")
    return output


def heard_up_to(alice: Peer, last: str) -> list[str]:
    """Return what somebody hears up to a line, but for what they said to find out."""
    return [line for line in alice.lines_until(last) if line != f"alice: {CALL}"]


@pytest.mark.parametrize("inside_tls", [False, True], ids=["plain", "tls"])
def test_what_was_said_before_a_broken_connection_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside_tls: bool
) -> None:
    """Somebody who talks and closes at once has said it, and has left of their own will."""
    certificate = make_certificate(tmp_path) if inside_tls else None
    may_read = reading_late(monkeypatch, "ghost")
    with run_chat(tls=certificate.server() if certificate else None) as room:
        alice, ghost = (
            TlsPeer(room.port, certificate) if certificate else Peer(room.port) for _ in range(2)
        )
        alice.join("alice")
        ghost.introduce(f"ghost -0 {KEY}")
        alice.expect("* ghost joined the chat")
        said = "one", "/me waves", "/msg alice psst", "two", "/quit"
        say_and_break_off(room, ghost, alice, *said)
        may_read.set()
        assert heard_up_to(alice, "* ghost left the chat") == [
            "ghost: one",
            "** ghost waves",
            "[from ghost] psst",
            "ghost: two",
            "* ghost left the chat",
        ]


@pytest.mark.parametrize("held", [1000.0, 0.0])
def test_who_talks_more_than_it_may_and_closes_is_heard_for_a_while(
    monkeypatch: pytest.MonkeyPatch, held: float
) -> None:
    """What is left of somebody who is gone comes at their rate, for as long as a place is kept."""
    monkeypatch.setattr(server_module, "HELD", held)
    may_read = reading_late(monkeypatch, "ghost")
    with run_chat(rate_limit=50.0) as room:
        alice, ghost = Peer(room.port).join("alice"), Peer(room.port).join("ghost")
        lines = [f"line {number}" for number in range(server_module.BURST + 10)]
        alice.expect("* ghost joined the chat")
        say_and_break_off(room, ghost, alice, *lines, "/quit")
        may_read.set()
        *heard, _ = heard_up_to(alice, "* ghost left the chat")
        assert len(heard) == (len(lines) if held else server_module.BURST)
        assert heard == [f"ghost: {line}" for line in lines[: len(heard)]]


def test_questions_of_somebody_who_is_gone_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has an effect on others is done, in whatever form it came."""
    may_read = reading_late(monkeypatch, "ghost")
    searches: list[str] = []
    with run_chat() as room:
        monkeypatch.setattr(room.history, "search", lambda *what: searches.append(what[0]))
        alice, ghost = Peer(room.port).join("alice"), Peer(room.port).join("ghost")
        alice.expect("* ghost joined the chat")
        asked = "/search x", "ghost: /search x", "/Search x", "GHOST: /history", "/", "/names"
        done = "/me\twaves", "ghost: /me nods", "ghost: /msg\talice psst", "//names", "/what is"
        say_and_break_off(room, ghost, alice, *asked, *done, "/nick spirit", "/quit\tnow")
        may_read.set()
        assert heard_up_to(alice, "* spirit left the chat") == [
            "** ghost waves",
            "** ghost nods",
            "[from ghost] psst",
            "ghost: /names",
            "* ghost is now spirit",
            "* spirit left the chat",
        ]
    assert not searches


def test_what_is_said_to_a_broken_connection_waits_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is kept for somebody who cannot be reached; a kick ends what they say."""
    may_read = reading_late(monkeypatch, "ghost")
    with run_chat() as room:
        alice = Peer(room.port).join("alice")
        ghost = Peer(room.port).join("ghost")
        alice.expect("* ghost joined the chat")
        output = say_and_break_off(room, ghost, alice, "boo")
        alice.send("/msg ghost psst")
        alice.expect_eventually("-> not sent: ghost is not reading; try again later")
        hand_in(room, *[Answered(output.session, [b"-> x\n"])] * 3)
        kick(room, "ghost", "alice", "")
        alice.expect_eventually("* ghost was kicked by alice")
        alice.expect("-> ghost was put out")
        assert not output.outbox
        may_read.set()
        wait_until(lambda: len(room.clients) == 1, "its thread to end")
        alice.expect_nothing()


@pytest.mark.parametrize("way", ["reset", "close"])
def test_who_answers_all_questions_and_is_gone_was_here(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What comes with the answers at the door counts, though nobody is there to be asked."""
    next_line, gone = Client._next_line, threading.Event()

    def late(client: Client, deadline: float) -> bytes:
        line = next_line(client, deadline)
        if line == b"ghost":
            assert gone.wait(DEADLINE)
        return line

    with run_chat(password="sesame") as room:
        alice = Peer(room.port).introduce("alice")
        alice.expect("PASS")
        alice.send("sesame").expect_eventually("* alice joined the chat")
        monkeypatch.setattr(Client, "_next_line", late)
        ghost = Peer(room.port)
        ghost.expect("NICK")
        ghost.send("ghost", "sesame", "boo")
        ghost.vanish() if way == "reset" else ghost.close()
        gone.set()
        alice.expect("* ghost joined the chat", "ghost: boo", "* ghost left the chat")


class Disk:
    """Stands before a room's history: lets a round wait, and refuses the next ones."""

    def __init__(self, room: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        self.refuses = False
        self._append = room.history.append
        self.is_busy = threading.Event()
        self.may_go_on = threading.Event()
        monkeypatch.setattr(room.history, "append", self._append_or_refuse)

    def _append_or_refuse(self, lines: list[bytes], *others: object) -> None:
        if self.refuses:
            raise NotStored("no space left, says the test")
        self.is_busy.set()
        self.may_go_on.wait(DEADLINE)
        self._append(lines, *others)  # type: ignore[arg-type]

    def hold(self, peer: Peer) -> None:
        """Have somebody say a line of which the round waits for the disk."""
        peer.send("hold")
        assert self.is_busy.wait(DEADLINE)

    def wait_for(self, *kinds: type) -> None:
        """Wait until entries of these kinds, and no others, wait for the next round."""
        log = self.room.broadcaster.entries
        wait_until(lambda: [type(one.entry) for one in log._handed] == [*kinds], "the entries")

    def refuse_what_waits(self) -> None:
        """Store the round under way, and refuse the one that waits."""
        store, rounds = self.room.broadcaster._store, []
        keep = store.keep

        def keep_or_refuse(room: Room) -> bool:
            rounds.append(room)
            self.refuses = len(rounds) == 1
            return keep(room)

        store.keep = keep_or_refuse  # type: ignore[method-assign]
        self.may_go_on.set()


# --- Faults inside -----------------------------------------------------------


def fail_next_round(room: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next round in which there is something to store raise what nobody expected."""
    append, faults = room.history.append, [ValueError("a fault of the test")]

    def append_or_raise(lines: list[bytes], *others: object) -> None:
        if faults and lines:
            raise faults.pop()
        append(lines)

    monkeypatch.setattr(room.history, "append", append_or_raise)


def test_a_fault_in_a_round_does_not_end_the_room(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a round that failed people talk, ask, come and leave as before."""
    alice, bob = pair(room.port)
    fail_next_round(room, monkeypatch)
    alice.send("maybe lost")
    wait_until(lambda: "a fault of the test" in caplog.text, "the fault to be logged")
    alice.send("not lost")
    alice.expect_eventually("alice: not lost")
    bob.expect_eventually("alice: not lost")
    bob.send("/history 1")
    bob.expect_match("-> .* alice: not lost")
    bob.send("/quit")
    bob.expect("-> bye")
    bob.expect_closed()
    alice.expect("* bob left the chat")


def test_a_fault_in_the_round_in_which_somebody_leaves(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who leaves in a round that fails is gone all the same."""
    alice, bob = pair(room.port)
    fail_next_round(room, monkeypatch)
    bob.end_input()
    wait_until(lambda: "a fault of the test" in caplog.text, "the fault to be logged")
    alice.send("hello")
    alice.expect_eventually("alice: hello")
    bob.rest()
    wait_until(lambda: len(room.clients) == 1, "bob to be gone")


def test_a_fault_with_one_client_keeps_nothing_from_the_others(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When sending to one raises what nobody expected, the others get the line, now."""
    peers = crowd(room.port, 10)
    send, faults = Connection.send, [ValueError("a fault of the test")]

    def send_or_raise(connection: Connection, data: bytes | memoryview) -> int:
        if faults and threading.current_thread().name == "broadcaster":
            raise faults.pop()
        return send(connection, data)

    monkeypatch.setattr(Connection, "send", send_or_raise)
    peers[0].send("hello")
    wait_until(lambda: sum(peer.has("peer0: hello") for peer in peers) >= 9, "nine of ten to hear")
    assert "a fault of the test" in caplog.text


def test_who_was_to_be_served_when_a_round_failed_is_served_at_once(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a fault in a round of private lines alone, the others get theirs without more ado."""
    peers = crowd(room.port, 10)
    serve, faults = room.broadcaster._serve, [ValueError("a fault of the test")]

    def serve_or_raise(output: Output) -> None:
        if faults:
            raise faults.pop()
        serve(output)

    monkeypatch.setattr(room.broadcaster, "_serve", serve_or_raise)
    hand_in(room, *(Answered(client.session, [b"-> psst\n"]) for client in room.clients))
    wait_until(lambda: sum(peer.has("-> psst") for peer in peers) >= 9, "nine of ten to hear")
    assert "a fault of the test" in caplog.text


def test_a_selector_that_fails_costs_one_client(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full socket that cannot be watched ends its client; all others hear everything."""
    alice, stuck = Peer(room.port).join("alice"), Peer(room.port, buffer=SMALL).join("stuck")
    alice.expect("* stuck joined the chat")
    connection = room.broadcaster.outputs[session_of(room, "stuck")].connection
    connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space for another watch")

    monkeypatch.setattr(room.broadcaster._sockets._selector, "register", refuse)
    lines = [f"alice: {'x' * 1000}{number}" for number in range(100)]
    hand_in(room, Said(session_of(room, "alice"), [line.encode() for line in lines]))
    alice.expect(*lines, "* stuck left the chat")
    stuck.close()
    wait_until(lambda: len(room.clients) == 1, "the stuck one to be gone")


def test_who_has_left_is_not_served_again(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round in which somebody leaves does not come back to it, wherever it stands in it."""
    monkeypatch.setattr(server_module, "SLICE", 1)
    alice = Peer(room.port).join("alice")
    take_next, touched = room.broadcaster._take_next, []

    def watch(output: Output) -> bool:
        if output.gate.released:
            touched.append(output)
        return take_next(output)

    monkeypatch.setattr(room.broadcaster, "_take_next", watch)
    for _ in range(20):
        bob = Peer(room.port).join("bob")
        bob.send("/quit").rest()
        alice.expect("* bob joined the chat", "* bob left the chat")
    assert not touched


def test_a_fault_with_one_line_costs_one_client(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault in a client's thread is logged and ends that client, nobody else."""
    alice, bob = pair(room.port)

    def fail(*_: object) -> None:
        raise ValueError("a fault of the test")

    monkeypatch.setitem(server_module.COMMANDS, "names", fail)
    bob.send("/names")
    alice.expect("* bob left the chat")
    bob.expect_closed()
    assert "a fault of the test" in caplog.text
    alice.send("hello")
    alice.expect("alice: hello")


def fail_to_apply(monkeypatch: pytest.MonkeyPatch, kind: type, times: int = 1) -> list[object]:
    """Have entries of a kind fail when they are applied, so often; return those that did."""
    apply, failed = Room.apply, list[object]()

    def apply_or_raise(room: Room, entry: object) -> object:
        if type(entry) is kind and len(failed) < times:
            failed.append(entry)
            raise ValueError("a fault of the test")
        return apply(room, entry)

    monkeypatch.setattr(Room, "apply", apply_or_raise)
    return failed


UNFORESEEN = "-> not sent: something went wrong here; try again"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("hello", Said),
        ("/me waves", Said),
        ("/msg bob psst", Whispered),
        ("/nick alicia", Renamed),
        ("/names", Asked),
        ("/dance", Answered),
        ("/history 1", Answered),
        ("/op secret", Promoted),
        ("/kick bob", Kicked),
        ("/ban bob", Banned),
        ("/unban bob", Unbanned),
    ],
)
def test_an_entry_that_cannot_be_applied_is_refused_to_its_author(
    monkeypatch: pytest.MonkeyPatch, line: str, kind: type
) -> None:
    """Who asked for what fails is told so, once, and the rest of the round happens."""
    with run_chat(op_password="secret") as room:
        alice, bob = pair(room.port)
        alice.send("/op secret")
        alice.expect("-> you are an operator; /kick, /ban, /unban and /bans are yours")
        failed = fail_to_apply(monkeypatch, kind)
        alice.send(line)
        alice.expect(UNFORESEEN)
        alice.send("and on", "/names")
        alice.expect("alice: and on", "-> 2 here: alice, bob")
        bob.expect("alice: and on")
        assert len(failed) == 1


def test_each_line_that_fails_with_others_is_refused(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that came at once and fail at once have a refusal each, as an author counts them."""
    alice, bob = pair(room.port)
    fail_to_apply(monkeypatch, Said)
    alice.send("one", "two", "three")
    alice.expect(*[UNFORESEEN] * 3)
    bob.expect_nothing()


def test_a_claim_that_fails_can_be_made_again(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not let in through a fault is told so and asked for the name again."""
    fail_to_apply(monkeypatch, Claim)
    alice = Peer(room.port).introduce("alice")
    alice.expect("-> something went wrong here; try again")
    alice.join("alice")


def test_a_claim_that_fails_half_way_leaves_nothing(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is free again, and nobody has heard of who was nearly in."""
    bob = Peer(room.port).join("bob")
    announce = Room._announce

    def fail_once(draft: Room, line: str) -> None:
        monkeypatch.setattr(Room, "_announce", announce)
        raise RuntimeError("a fault")

    monkeypatch.setattr(Room, "_announce", fail_once)
    alice = Peer(room.port).introduce("alice")
    alice.expect("-> something went wrong here; try again")
    assert room.names == ["bob"]
    alice.join("alice")
    bob.expect("* alice joined the chat")


@pytest.mark.parametrize(("kind", "farewell"), [(Left, "/quit"), (Lost, "")])
@pytest.mark.parametrize("half", [False, True])
def test_who_leaves_is_gone_though_leaving_fails(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, kind: type, farewell: str, half: bool
) -> None:
    """A fault in somebody's leaving, or half-way through it, keeps neither name nor connection."""
    alice = Peer(room.port).join("alice")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    bob.expect_eventually("* bob joined the chat")
    alice.expect("* bob joined the chat")
    if half:
        monkeypatch.setattr(Room, "_remember", fail)
        monkeypatch.setattr(Room, "_set_deadline", fail)
    else:
        fail_to_apply(monkeypatch, kind)
    if farewell:
        bob.send(farewell)
    else:
        bob.end_input()
    assert bob.rest() == (["-> bye"] if farewell else [])
    alice.expect("* bob left the chat")
    wait_until(lambda: len(room.clients) == 1, "bob's connection to be closed")
    monkeypatch.undo()
    Peer(room.port).join("bob")
    alice.expect("* bob joined the chat")
    alice.send("/names")
    alice.expect("-> 2 here: alice, bob")


def fail(*_: object, **__: object) -> None:
    """Fail as nobody expected."""
    raise ValueError("a fault of the test")


def test_time_that_fails_to_pass_holds_up_nothing(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that cannot be given up in time is given up when it can."""
    monkeypatch.setattr(server_module, "HELD", 0.0)
    alice = Peer(room.port).join("alice")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    alice.expect("* bob joined the chat")
    failed = fail_to_apply(monkeypatch, Passed, times=3)
    bob.vanish()
    alice.expect("* bob left the chat")
    assert len(failed) == 3


def test_a_fault_in_beginning_to_follow_ends_one_client(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was let in and cannot be served is gone again; the others see it, and talk."""
    alice = Peer(room.port).join("alice")
    with monkeypatch.context() as broken:
        broken.setattr(protocol, "at", fail)
        bob = Peer(room.port).introduce("bob -0")
        assert bob.rest() in (
            [],
            ["-> Welcome, bob! /help lists the commands. Already here: alice"],
        )
        alice.expect("* bob joined the chat", "* bob left the chat")
        wait_until(lambda: len(room.clients) == 1, "bob's connection to be closed")
    alice.send("hello")
    alice.expect("alice: hello")


def test_what_no_round_comes_to_has_an_outcome(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the room stops in the middle of a long round, who waits for a name waits no more."""
    monkeypatch.setattr(server_module, "STOP_DELIVER", 0.0)
    alice = Peer(room.port).join("alice")
    disk = Disk(room, monkeypatch)
    disk.hold(alice)
    bob = Peer(room.port).introduce("bob")
    disk.wait_for(Claim)
    with stopping(room):
        wait_until(lambda: room.broadcaster.entries._closed, "the room to stop")
        disk.may_go_on.set()
        bob.rest()
    wait_until(lambda: not room.clients, "all threads to end")


# --- A disk that refuses a round ---------------------------------------------

NOT_STORED = "-> not sent: it could not be stored; try again later"
NOT_KEPT = "-> it could not be stored, and will be forgotten when the server ends"
NOT_TOLD = "-> the room was not told: it could not be stored"


def test_what_relied_on_a_refused_name_is_judged_without_it(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When /nick is not stored, the old name is as taken as before, and the new one free."""
    alice, bob = pair(room.port)
    disk = Disk(room, monkeypatch)
    disk.hold(bob)
    alice.send("/nick alicia")
    disk.wait_for(Renamed)
    carol = Peer(room.port).introduce("alice")
    disk.wait_for(Renamed, Claim)
    dave = Peer(room.port).introduce("alicia -0")
    disk.wait_for(Renamed, Claim, Claim)
    disk.refuse_what_waits()
    alice.expect("bob: hold", NOT_STORED)
    carol.expect("-> the name alice is taken; choose another")
    dave.expect_match("-> Welcome, alicia! .* Already here: alice, bob")
    alice.send("still alice", "/names")
    alice.expect("alice: still alice", "-> 3 here: alice, bob, alicia")
    bob.expect("bob: hold", "alice: still alice")


def test_what_a_refused_round_does_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """People come, go and are put out unannounced; what is said is refused, whispers arrive."""
    with run_chat(op_password="secret") as room:
        alice, bob = pair(room.port)
        carol, dave = (Peer(room.port).join(name) for name in ("carol", "dave"))
        alice.send("/op secret")
        alice.expect_eventually("-> you are an operator; /kick, /ban, /unban and /bans are yours")
        bob.expect("* carol joined the chat", "* dave joined the chat")
        carol.expect("* dave joined the chat")
        disk = Disk(room, monkeypatch)
        disk.hold(alice)
        expected: list[type] = []
        erin, operator = Peer(room.port), session_of(room, "alice")
        for peer, line, kind in (
            (bob, "lost", Said),
            (bob, "/me is lost", Said),
            (bob, "/msg alice psst", Whispered),
            (alice, "/kick carol enough", Kicked),
            (erin, "erin -0", Claim),
        ):
            peer.send(line)
            expected.append(kind)
            disk.wait_for(*expected)
        # Of one person's commands the next is read when the last was answered.
        hand_in(room, Banned(operator, "dave", 0.0, "", 0.0), Asked(operator, "names"))
        disk.refuse_what_waits()
        bob.expect("alice: hold", NOT_STORED, NOT_STORED, "-> to alice: psst")
        alice.expect("alice: hold", "[from bob] psst", "-> carol was put out", NOT_TOLD)
        alice.expect("-> dave may not come in until the server ends, which keeps no history")
        alice.expect(NOT_KEPT, "-> 3 here: alice, bob, erin")
        assert carol.rest() == ["alice: hold", "-> you were kicked by alice: enough"]
        assert dave.rest() == ["alice: hold", "-> you were kicked by alice: banned for good"]
        erin.expect("NICK")
        erin.expect_match("-> Welcome, erin! .* Already here: alice, bob, dave")
        erin.expect_match("-> at .*")
        bob.send("after")
        for peer in alice, bob, erin:
            peer.expect("bob: after")
        assert Peer(room.port).introduce("dave").rest() == ["-> you are banned by alice for good"]


@pytest.mark.parametrize("kind", [Left, Lost])
def test_who_leaves_in_a_refused_round_is_gone(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Leaving needs no disk: the name is free, and the connection ends."""
    alice, bob = pair(room.port)
    disk = Disk(room, monkeypatch)
    disk.hold(alice)
    if kind is Left:
        bob.send("/quit")
        disk.wait_for(Answered, Left)
    else:
        bob.end_input()
        disk.wait_for(Lost)
    disk.refuse_what_waits()
    assert bob.rest() == ["alice: hold"] + ["-> bye"] * (kind is Left)
    alice.expect("alice: hold")
    Peer(room.port).join("bob")
    alice.expect("* bob joined the chat")


@pytest.mark.parametrize("call", ["append", "fetch"])
def test_a_disk_that_does_not_answer_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """With a write or a read that does not come back, the server ends in time all the same."""
    with run_chat(history=str(tmp_path / "room.db")) as room:
        Peer(room.port).join("early").send(*(f"line {number}" for number in range(200)))
        wait_until(lambda: room.history.last(1)[0].line.endswith("199"), "the lines")
        room.history.retained = 10
        begun, may_go_on = threading.Event(), threading.Event()
        answer = getattr(room.history, call)

        def answer_later(*arguments: Any) -> Any:
            begun.set()
            may_go_on.wait(60)
            return answer(*arguments)

        monkeypatch.setattr(room.history, call, answer_later)
        hand_in(room, Said(session_of(room, "early"), [b"early: more"]))
        Peer(room.port).send("late -150")
        wait_until(begun.is_set, "the disk to be asked")
        stopping = threading.Thread(target=room.stop)
        stopping.start()
        stopping.join(STOP)
        ended = not stopping.is_alive()
        may_go_on.set()
        stopping.join()
        assert ended


# --- Clocks ------------------------------------------------------------------


def test_a_pause_that_fails_ends_nothing(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A clock with which the broadcaster cannot pause costs nobody a line."""
    peers = pair(room.port)
    with monkeypatch.context() as broken:
        broken.setattr(server_module, "time", Clock(sleep=fail))
        for number in range(100):
            peers[number % 2].send(str(number))
            for peer in peers:
                peer.expect_match(rf"(alice|bob): {number}")
        wait_until(lambda: "a fault of the test" in caplog.text, "a pause to fail")


def test_a_clock_that_fails_for_a_while_ends_nothing(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When no clock can be read the room waits, and goes on where it was afterwards."""
    alice, bob = pair(room.port)
    monotonic = time.monotonic

    def fail_for_the_room() -> float:
        if threading.current_thread().name == "broadcaster":
            fail()
        return monotonic()

    with monkeypatch.context() as broken:
        broken.setattr(server_module, "time", Clock(monotonic=fail_for_the_room))
        alice.send("hello")
        wait_until(lambda: caplog.text.count("a fault of the test") > 1, "the clock to fail")
    alice.send("hello again")
    bob.expect("alice: hello", "alice: hello again")


@pytest.mark.parametrize("years", [-5, 5])
def test_a_clock_that_is_set_holds_up_nobody(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    """However far the clock is set, people talk, and a kept place is kept as long as any."""
    monkeypatch.setattr(server_module, "HELD", 60.0)
    alice = Peer(room.port).join("alice")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    alice.expect("* bob joined the chat")
    if years < 0:
        lose(room, bob)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + years * 365 * 86400)
    if years > 0:
        lose(room, bob)
    for number in range(3):
        alice.send(f"hello {number}")
        alice.expect(f"alice: hello {number}")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    bob.expect("-> Welcome back, bob!")
    monkeypatch.setattr(server_module, "HELD", 0.1)
    bob.vanish()
    alice.expect("* bob left the chat")


def lose(room: ChatServer, bob: Peer) -> None:
    """Have bob lose the connection, and the room know of it."""
    bob.vanish()
    wait_until(lambda: is_away(room, "bob"), "bob's place to be kept")


# --- Wake-ups ----------------------------------------------------------------


def test_no_wake_up_is_lost() -> None:
    """A wake-up that comes while the last one is taken back is not swallowed with it."""
    with no_leaks():
        waker = protocol.Waker()
        try:
            take = waker._reader

            class Slow:
                """A reader during whose `recv` somebody else wakes."""

                def recv(self, size: int) -> bytes:
                    waker.wake()
                    return take.recv(size)

            waker.wake()
            waker._reader = Slow()  # type: ignore[assignment]
            waker.clear()
            waker._reader = take
            waker.wake()
            assert take.recv(1)
        finally:
            waker.close()


# --- Crowds ------------------------------------------------------------------


def test_everyone_sees_one_order(room: ChatServer) -> None:
    """What twenty say at once comes to all in one order, and that is the history's."""
    senders = crowd(room.port, 20)
    transcripts: dict[Peer, list[str]] = {}
    barrier = threading.Barrier(20)

    def talk(peer: Peer, number: int) -> None:
        barrier.wait()
        for line in range(50):
            peer.send(f"{number}-{line}")
        transcripts[peer] = peer.lines(1000)

    threads = [
        threading.Thread(target=talk, args=[peer, number], daemon=True)
        for number, peer in enumerate(senders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = [text for _, text in room.history.last(1000)]
    assert len(transcripts) == 20
    for transcript in transcripts.values():
        assert transcript == history
    for number in range(20):
        own = [line for line in history if line.startswith(f"peer{number}: ")]
        assert own == [f"peer{number}: {number}-{line}" for line in range(50)]


def test_those_who_come_amid_a_flood_miss_nothing(room: ChatServer) -> None:
    """A newcomer's history and what follows it join without a hole or a line twice."""
    alice = Peer(room.port).join("alice")
    start = room.history.first
    sender = threading.Thread(
        target=lambda: [alice.send(f"line {number}") for number in range(3000)], daemon=True
    )
    sender.start()
    newcomers = []
    for number in range(20):
        newcomers.append(Peer(room.port).introduce(f"peer{number} {start}"))
        alice.expect_eventually(f"* peer{number} joined the chat")
    sender.join()
    alice.send("end")
    for peer in newcomers:
        lines = room_lines(peer.lines_until("alice: end"))
        said = [line for line in lines if line.startswith("alice: line")]
        assert said == [f"alice: line {number}" for number in range(3000)]


def test_of_twenty_that_want_one_new_name_one_gets_it(room: ChatServer) -> None:
    """/nick is as exclusive as joining, and nobody loses the old name over it."""
    peers = crowd(room.port, 20)
    for peer in peers:
        peer.send("/nick star", "/names")
    answers = []
    for peer in peers:
        while not (line := peer.next_line()).startswith("-> 20 here: "):
            answers.append(line)
    assert answers.count("-> you are now star") == 1
    assert answers.count("-> not sent: the name star is taken; choose another") == 19
    assert room.names.count("star") == 1


def test_twenty_that_change_names_in_circles_stay_apart(room: ChatServer) -> None:
    """However names move about, each is held by one, and the room's lines tell by whom."""
    peers = [Peer(room.port).join(f"peer{number}") for number in range(20)]
    watcher = Peer(room.port).join("watcher")
    present = {f"peer{number}" for number in range(20)} | {"watcher"}
    for peer in peers:
        peer.send(*(f"/nick name{number % 7}" for number in range(30)), "/quit")
    while present != {"watcher"}:
        line = watcher.next_line()
        if " is now " in line:
            old, new = line.removeprefix("* ").split(" is now ")
            assert old in present
            assert new not in present - {old}
            present = present - {old} | {new}
        else:
            present.remove(line.removeprefix("* ").removesuffix(" left the chat"))


def test_the_log_is_quiet_about_ordinary_ends(
    room: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Who vanishes is no fault of the server, and no traceback is logged."""
    with caplog.at_level(logging.DEBUG, "chat"):
        for way in Peer.vanish, Peer.close:
            way(Peer(room.port).join("alice"))
            wait_until(lambda: not room.clients, "alice to be gone")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
