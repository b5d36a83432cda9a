"""The room: who is in it, what is said, what newcomers get, and the commands."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat import (
    Peer,
    hand_in,
    is_away,
    pair,
    run_chat,
    session_of,
    stopping,
    wait_until,
)
from proxy import STALL, Proxy

import protocol
import server as server_module
from server import ChatServer, LocalLog, Passed, Said

KEY = "0123456789abcdef"


@pytest.fixture
def room() -> Iterator[ChatServer]:
    """An empty room."""
    with run_chat() as server:
        yield server


def position_in(line: str) -> int:
    """Return the position that the server told."""
    position = protocol.position_in(line)
    assert position is not None, line
    return position


# --- Coming, talking and going -----------------------------------------------


def test_a_conversation(room: ChatServer) -> None:
    """What is said is broadcast to all, the author too; coming and going are shown."""
    alice = Peer(room.port)
    alice.introduce("alice")
    alice.expect(
        "-> Welcome, alice! You are the first one here; /help lists the commands",
        "* alice joined the chat",
    )
    alice.send("hello")
    alice.expect("alice: hello")
    bob = Peer(room.port)
    bob.introduce("bob")
    bob.expect(
        "-> Welcome, bob! /help lists the commands. Already here: alice",
        "* alice joined the chat",
        "alice: hello",
        "* bob joined the chat",
    )
    alice.expect("* bob joined the chat")
    bob.send("bob: hi alice")
    for peer in alice, bob:
        peer.expect("bob: hi alice")
    alice.send("/quit")
    alice.expect("-> bye")
    alice.expect_closed()
    bob.expect("* alice left the chat")
    bob.expect_nothing()


def test_the_welcome_of_the_first_comes_to_each_first(room: ChatServer) -> None:
    """Whoever comes into an empty room is welcomed as the first, also after others have left."""
    for name in "alice", "bob":
        peer = Peer(room.port).introduce(name)
        peer.expect(f"-> Welcome, {name}! You are the first one here; /help lists the commands")
        peer.end_input()
        peer.rest()


def test_a_newcomer_is_told_who_is_here(room: ChatServer) -> None:
    """Names are told in the order in which people came, and who has left is not among them."""
    peers = [Peer(room.port).join(name) for name in ("carol", "alice", "bob")]
    peers[1].send("/quit")
    peers[0].expect_eventually("* alice left the chat")
    dave = Peer(room.port).introduce("dave")
    dave.expect("-> Welcome, dave! /help lists the commands. Already here: carol, bob")


def test_who_leaves_by_ending_the_input_gets_what_was_said(room: ChatServer) -> None:
    """The end of the input is a way to leave, and all before it is answered first."""
    alice = Peer(room.port).join("alice")
    alice.send("one", "/me waves", "/me").end_input()
    alice.expect("alice: one", "** alice waves", "-> usage: /me ACTION, to say what you do")
    alice.expect_closed()


def test_an_unfinished_line_is_not_said(room: ChatServer) -> None:
    """What has no newline when the connection ends was never said."""
    alice, bob = Peer(room.port).join("alice"), Peer(room.port).join("bob")
    alice.send_raw(b"whole\npart").end_input()
    bob.expect("alice: whole", "* alice left the chat")
    alice.expect_eventually("alice: whole")
    alice.expect_closed()


def test_a_name_is_free_again_when_its_owner_has_left(room: ChatServer) -> None:
    """Who has been seen leaving has left the name too."""
    bob = Peer(room.port).join("bob")
    for _ in range(3):
        alice = Peer(room.port).join("alice")
        bob.expect("* alice joined the chat")
        alice.vanish()
        bob.expect("* alice left the chat")


def test_the_room_can_be_used_from_python() -> None:
    """`with ChatServer(port=0)` is a running room with a port; afterwards nobody listens there."""
    with run_chat() as server:
        assert server.host == "127.0.0.1"
        assert server.port
        Peer(server.port).join("alice")
        assert server.names == ["alice"]
    with pytest.raises(ConnectionRefusedError):
        Peer(server.port)


def test_a_server_can_be_stopped_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stopping what has stopped does nothing, and closes nothing that others have opened since."""
    caplog.set_level("INFO", "chat")
    with run_chat(history=str(tmp_path / "room.db")) as server:
        server.stop()
        with (tmp_path / "other").open("w") as other:  # it may have a descriptor of the history's
            server.stop()
            other.write("still open")
    assert caplog.messages.count("stopped") == 1


def test_who_does_not_close_is_closed_in_the_end(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the server has stopped no connection is left, whatever its peers do."""
    monkeypatch.setattr(server_module, "STOP_CLOSE", 0.3)
    alice, unnamed = Peer(room.port).join("alice"), Peer(room.port)
    unnamed.expect("NICK")
    room.stop()
    wait_until(lambda: not room.clients, "all connections to be closed")
    for peer in alice, unnamed:
        peer.expect(protocol.SHUTTING_DOWN)
        peer.expect_closed()


def test_who_is_there_at_the_end_is_told(room: ChatServer) -> None:
    """Everyone, named or not, hears that the server shuts down before the connection ends."""
    alice = Peer(room.port).join("alice")
    unnamed = Peer(room.port)
    unnamed.expect("NICK")
    with stopping(room):
        for peer in alice, unnamed:
            peer.expect(protocol.SHUTTING_DOWN)
            peer.expect_closed()


def test_what_is_said_while_the_door_closes_is_delivered(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that comes when the server begins to stop is said, and the last word follows it."""
    alice, bob = pair(room.port)
    join = room._receiver.join

    def join_late(timeout: float | None) -> None:
        join(timeout)
        alice.send("a late word")
        alice.expect("alice: a late word")

    monkeypatch.setattr(room._receiver, "join", join_late)
    with stopping(room):
        bob.expect("alice: a late word")
        bob.expect(protocol.SHUTTING_DOWN)
        bob.expect_closed()


def test_what_is_said_during_a_round_is_heard_by_those_still_to_be_served(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get it with what the round began with, those before them in the next, all in order."""
    monkeypatch.setattr(server_module, "SLICE", 1)
    alice, bob = pair(room.port)
    wait_until(lambda: is_idle(room), "the rounds in which bob came to end")
    first, last = (client.connection for client in room.clients)
    send_first, send_last, sent = first.send, last.send, []

    def interrupt(data: bytes) -> int:
        if data == b"alice: one\n":
            hand_in(room, Said(session_of(room, "bob"), [b"bob: two"]))
        return send_first(data)

    def watch(data: bytes) -> int:
        sent.append(data)
        return send_last(data)

    monkeypatch.setattr(first, "send", interrupt)
    monkeypatch.setattr(last, "send", watch)
    alice.send("one")
    for peer in alice, bob:
        peer.expect("alice: one", "bob: two")
    assert sent == [b"alice: one\nbob: two\n"]


def is_idle(room: ChatServer) -> bool:
    """Tell whether no round is due, not even for those who were served before others came."""
    broadcaster = room.broadcaster
    return not broadcaster.entries.lines and broadcaster._offered == room.history.end


# --- Names -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alice", "Alice", "ALICE", "aLiCe -20", f"alice -20 {KEY}"])
def test_a_name_that_somebody_has_is_taken(room: ChatServer, name: str) -> None:
    """A name is unique without regard to case; who is refused can choose another."""
    alice = Peer(room.port).join("alice")
    bob = Peer(room.port).introduce(name)
    bob.expect(f"-> the name {name.split()[0]} is taken; choose another")
    bob.introduce("bob")
    bob.expect_eventually("* bob joined the chat")
    alice.expect("* bob joined the chat")
    alice.expect_nothing()


def test_two_keyless_clients_cannot_replace_each_other(room: ChatServer) -> None:
    """Without a key nobody's place can be taken, not even with an empty one."""
    alice = Peer(room.port).join("alice")
    Peer(room.port).introduce("alice -20 ").expect("-> the name alice is taken; choose another")
    alice.expect_nothing()


def test_nick_changes_the_name(room: ChatServer) -> None:
    """A new name is confirmed, announced and used from then on; the old one is free."""
    alice, bob = pair(room.port)
    alice.send("/nick alicia", "hello", "alicia: hi", "alice: hey")
    alice.expect("-> you are now alicia")
    for peer in alice, bob:
        peer.expect("* alice is now alicia", "alicia: hello", "alicia: hi", "alicia: alice: hey")
    Peer(room.port).join("alice")
    bob.expect("* alice joined the chat")
    alice.expect("* alice joined the chat")
    alice.send("/quit")
    bob.expect("* alicia left the chat")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bob", "the name bob is taken; choose another"),
        ("BOB", "the name BOB is taken; choose another"),
        ("server", 'the name "server" is reserved; choose another'),
        ("1", "a name is one word of at most 24 letters, digits, - and _, and begins with"),
        ("two words", "a name is one word of at most 24 letters, digits, - and _, and begins"),
    ],
)
def test_nick_refuses_what_joining_refuses(room: ChatServer, name: str, reason: str) -> None:
    """A bad new name changes nothing."""
    alice, bob = pair(room.port)
    alice.send(f"/nick {name}", "still alice")
    alice.expect_match(f"-> not sent: {reason}.*")
    for peer in alice, bob:
        peer.expect("alice: still alice")


def test_nick_may_change_the_case_alone(room: ChatServer) -> None:
    """One's own name is not taken for oneself."""
    alice = Peer(room.port).join("alice")
    alice.send("/nick Alice", "hello")
    alice.expect("-> you are now Alice", "* alice is now Alice", "Alice: hello")
    Peer(room.port).introduce("alice").expect("-> the name alice is taken; choose another")


def test_a_name_given_up_is_announced_before_it_is_taken(room: ChatServer) -> None:
    """Who takes a name the moment it is free stands in the history behind its being given up."""
    alice, bob = Peer(room.port).join("alice"), Peer(room.port).join("bob")
    taken: list[Peer] = []

    class Quick(logging.Handler):
        """Takes the old name as soon as the server's console shows the new one."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().endswith(" was alice"):
                newcomer = Peer(room.port).introduce("alice")
                newcomer.expect_match("-> Welcome, alice! .*")
                taken.append(newcomer)

    handler = Quick()
    level = server_module.log.level
    server_module.log.setLevel(logging.INFO)
    server_module.log.addHandler(handler)
    try:
        alice.send("/nick alicia")
        bob.expect("* alice is now alicia", "* alice joined the chat")
        wait_until(lambda: taken, "the newcomer to be welcome")
    finally:
        server_module.log.removeHandler(handler)
        server_module.log.setLevel(level)


@pytest.mark.parametrize(
    ("name", "other"),
    [("alice", "aIice"), ("alice", "a1ice"), ("Bill", "BiIl"), ("mark", "rnark"), ("xOz", "x0z")],
)
def test_a_name_that_looks_like_one_here_is_refused(
    room: ChatServer, name: str, other: str
) -> None:
    """Who is taken for whom is told, at the door and for /nick, and another name is welcome."""
    alice = Peer(room.port).join(name)
    reason = f"the name {other} looks like {name}, who is here; choose another"
    bob = Peer(room.port).introduce(other)
    bob.expect(f"-> {reason}")
    bob.join("bob")
    bob.send(f"/nick {other}", "still bob")
    bob.expect(f"-> not sent: {reason}", "bob: still bob")
    alice.send("/nick somebody-else")
    bob.expect(f"* {name} is now somebody-else")
    bob.send(f"/nick {other}")
    bob.expect(f"-> you are now {other}")
    Peer(room.port).introduce(name).expect(
        f"-> the name {name} looks like {other}, who is here; choose another"
    )


def test_names_that_only_sound_alike_are_two(room: ChatServer) -> None:
    """Looks are compared with their case: Lan may come in beside Ian."""
    Peer(room.port).join("Ian")
    Peer(room.port).join("Lan")
    assert room.names == ["Ian", "Lan"]


def test_one_may_take_a_name_that_looks_like_ones_own(room: ChatServer) -> None:
    """Nobody is in the own way, and the old name stays as taken as the new one."""
    alice = Peer(room.port).join("alice")
    alice.send("/nick aIice", "/nick alice")
    alice.expect("-> you are now aIice", "* alice is now aIice")
    alice.expect("-> you are now alice", "* aIice is now alice")
    Peer(room.port).introduce("aIice").expect_match("-> the name aIice looks like alice, .*")


def test_three_refusals_of_any_kind_are_all(room: ChatServer) -> None:
    """A name that is badly formed, taken or alike costs a try each, the third the connection."""
    alice = Peer(room.port).join("alice")
    bob = Peer(room.port)
    for name, reason in (
        ("two words", protocol.HOW_TO_ANSWER),
        ("ALICE", protocol.NAME_TAKEN.format(name="ALICE")),
        ("aIice", protocol.NAME_LOOKS_TAKEN.format(name="aIice", other="alice")),
    ):
        bob.introduce(name)
        bob.expect(f"-> {reason}")
    bob.expect(protocol.NO_MORE_TRIES)
    bob.expect_closed()
    alice.expect_nothing()


# --- Where the conversation starts -------------------------------------------


def talk(room: ChatServer, count: int) -> Peer:
    """Have somebody say `count` lines, and return who it was."""
    alice = Peer(room.port).join("alice")
    alice.send(*(f"line {number}" for number in range(count)))
    alice.expect(*(f"alice: line {number}" for number in range(count)))
    return alice


def test_a_newcomer_gets_the_last_twenty_lines(room: ChatServer) -> None:
    """Who asks for nothing else gets twenty lines of the history and no position."""
    talk(room, 50)
    bob = Peer(room.port).introduce("bob")
    bob.expect_match("-> Welcome, bob! .*")
    bob.expect(*(f"alice: line {number}" for number in range(30, 50)), "* bob joined the chat")
    bob.expect_nothing()


@pytest.mark.parametrize("count", [0, 1, 7, 50, 51, 52, 10_000])
def test_a_newcomer_may_ask_for_the_last_lines(room: ChatServer, count: int) -> None:
    """With -N the last N lines come, or as many as there are, and their position."""
    talk(room, 50)
    bob = Peer(room.port).introduce(f"bob -{count}")
    bob.expect_match("-> Welcome, bob! .*")
    lines = ["* alice joined the chat", *(f"alice: line {number}" for number in range(50))]
    shown = lines[max(0, len(lines) - count) :]
    assert position_in(bob.next_line()) == room.history.end - 1 - len(shown)
    bob.expect(*shown, "* bob joined the chat")


def test_a_newcomer_may_ask_for_a_position(room: ChatServer) -> None:
    """With a position the conversation goes on from exactly there."""
    talk(room, 50)
    first = room.history.first
    bob = Peer(room.port).introduce(f"bob {first + 41}")
    bob.expect_match("-> Welcome, bob! .*")
    bob.expect(f"-> at {first + 41}", *(f"alice: line {number}" for number in range(40, 50)))
    bob.expect("* bob joined the chat")


def test_positions_outside_of_the_history_are_set_right(room: ChatServer) -> None:
    """Who asks for what is gone or has not come yet is told where it starts instead."""
    talk(room, 5)
    first = room.history.first
    bob = Peer(room.port).introduce("bob 0")
    bob.expect_match("-> Welcome, bob! .*")
    bob.expect(f"-> at {first}", "* alice joined the chat", "alice: line 0")
    carol = Peer(room.port)
    bob.expect_eventually("* bob joined the chat")
    carol.introduce("carol 999999999999999999")
    carol.expect_match("-> Welcome, carol! .*")
    carol.expect(f"-> at {first}", "* alice joined the chat", "alice: line 0")
    carol.expect_eventually("* carol joined the chat")


def test_counting_room_lines_is_knowing_the_position(room: ChatServer) -> None:
    """A client that counts the room's lines from `-> at N` on comes back to the very next one."""
    alice = talk(room, 3)
    bob = Peer(room.port).introduce("bob -2")
    lines = bob.lines_until("* bob joined the chat")
    position = position_in(lines[1])
    alice.send("one", "/msg bob psst", "/nick al", "/me waves", "two")
    lines += bob.lines_until("al: two")
    position += sum(protocol.parse(line).in_room for line in lines)
    bob.send("/help")
    bob.expect_match("-> /help .*")
    bob.vanish()
    alice.expect_eventually("* bob left the chat")
    alice.send("three")
    alice.expect("al: three")
    bob = Peer(room.port).introduce(f"bob {position}")
    bob.expect_match("-> Welcome, bob! .*")
    bob.expect(f"-> at {position}", "* bob left the chat", "al: three", "* bob joined the chat")


def test_a_history_starts_at_the_clock() -> None:
    """A new room's positions are beyond all that an older one has given."""
    with run_chat() as older:
        Peer(older.port).join("alice")
        end = older.history.end
    with run_chat() as newer:
        bob = Peer(newer.port).introduce("bob -20")
        bob.expect_match("-> Welcome, bob! .*")
        assert position_in(bob.next_line()) >= end


def test_a_newcomer_is_told_nothing_of_the_lines_that_are_no_more(room: ChatServer) -> None:
    """Only what is retained is replayed, and none of it is called missed."""
    alice = talk(room, 50)
    room.history.retained = 10
    alice.send("last")
    alice.expect("alice: last")
    bob = Peer(room.port).introduce("bob -40")
    bob.expect_match("-> Welcome, bob! .*")
    lines = bob.lines_until("* bob joined the chat")
    assert position_in(lines[0]) == room.history.end - 10
    assert lines[1:-1] == [*(f"alice: line {number}" for number in range(42, 50)), "alice: last"]


# --- Coming back with a key --------------------------------------------------


def test_a_key_takes_the_place_back_without_a_word(room: ChatServer) -> None:
    """Name and key take the connection's place at once; the room notices nothing."""
    bob = Peer(room.port).join("bob")
    ghost = Peer(room.port).introduce(f"alice -0 {KEY}")
    ghost.expect_match("-> Welcome, alice! .*")
    position = position_in(ghost.next_line())
    ghost.expect("* alice joined the chat")
    bob.expect("* alice joined the chat")
    bob.send("while she was away")
    bob.expect("bob: while she was away")
    alice = Peer(room.port).introduce(f"alice {position + 1} {KEY.upper()}")
    alice.expect("-> Welcome back, alice!", f"-> at {position + 1}", "bob: while she was away")
    assert ghost.rest() in ([], ["bob: while she was away"])
    alice.send("back")
    alice.expect("alice: back")
    bob.expect("alice: back")
    bob.expect_nothing()
    alice.send("/names")
    alice.expect("-> 2 here: bob, alice")
    alice.send("/quit")
    bob.expect("* alice left the chat")


@pytest.mark.parametrize("key", ["", "fedcba9876543210", KEY + "0", KEY[:-1] + "0"])
def test_another_key_takes_nothing(room: ChatServer, key: str) -> None:
    """Who has no key, or another one, does not get the place."""
    alice = Peer(room.port).introduce(f"alice -0 {KEY}")
    alice.expect_eventually("* alice joined the chat")
    thief = Peer(room.port).introduce(f"alice -0 {key}".strip())
    thief.expect("-> the name alice is taken; choose another")
    alice.expect_nothing()


def test_a_key_follows_a_new_name(room: ChatServer) -> None:
    """After /nick the place is taken back under the new name."""
    ghost = Peer(room.port).introduce(f"alice -0 {KEY}")
    ghost.expect_eventually("* alice joined the chat")
    ghost.send("/nick alicia")
    ghost.expect("-> you are now alicia", "* alice is now alicia")
    alicia = Peer(room.port).introduce(f"alicia -1 {KEY}")
    alicia.expect("-> Welcome back, alicia!")
    ghost.expect_closed()


def test_a_full_room_lets_its_own_back_in() -> None:
    """Taking a place back needs no new one."""
    with run_chat(max_clients=1) as server:
        ghost = Peer(server.port).introduce(f"alice -0 {KEY}")
        ghost.expect_eventually("* alice joined the chat")
        alice = Peer(server.port).introduce(f"alice -0 {KEY}")
        alice.expect("-> Welcome back, alice!")


def test_the_old_connection_says_nothing_after_it_was_replaced() -> None:
    """What the old connection had not said when it was replaced is never said."""
    with run_chat(rate_limit=2.0) as server:  # so that most of it waits
        ghost = Peer(server.port).introduce(f"alice -0 {KEY}")
        ghost.expect_eventually("* alice joined the chat")
        ghost.send(*(f"line {number}" for number in range(100)))
        ghost.expect(*(f"alice: line {number}" for number in range(20)))
        alice = Peer(server.port).introduce(f"alice -1 {KEY}")
        alice.expect("-> Welcome back, alice!")
        alice.expect_match("-> at .*")
        alice.expect_match(r"alice: line \d+")
        alice.send("mine")
        alice.expect("alice: mine")
        alice.expect_nothing()


def test_who_waits_for_space_in_the_queue_can_be_replaced(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that wait for their turn when their connection is replaced are never said."""
    monkeypatch.setattr(server_module, "MAX_QUEUED", 50)
    ghost = Peer(room.port).introduce(f"alice -0 {KEY}")
    ghost.expect_eventually("* alice joined the chat")
    append, may_go_on = room.history.append, threading.Event()

    def append_later(lines: list[bytes], *others: object) -> None:
        may_go_on.wait(30)
        append(lines)

    monkeypatch.setattr(room.history, "append", append_later)
    try:
        ghost.send(*(f"{number} {'x' * 900}" for number in range(1000)))
        log = room.broadcaster.entries
        assert isinstance(log, LocalLog)
        wait_until(lambda: log.lines >= 50, "the queue to be crowded")
        before = log._count
        alice = Peer(room.port).introduce(f"alice -0 {KEY}")
        wait_until(lambda: log._count > before, "the claim")
    finally:
        may_go_on.set()
    alice.expect("-> Welcome back, alice!")
    position = position_in(alice.next_line())
    wait_until(lambda: len(room.clients) == 1, "the ghost to be gone")
    alice.expect_nothing()
    assert room.history.end == position


def test_a_place_can_be_taken_back_many_times(room: ChatServer) -> None:
    """Twenty returns in a row leave one alice, and each gets the place."""
    bob = Peer(room.port).join("bob")
    for number in range(20):
        alice = Peer(room.port).introduce(f"alice -0 {KEY}")
        alice.expect_match("-> Welcome.*")
        alice.send(f"line {number}")
        alice.expect_eventually(f"alice: line {number}")
    bob.expect("* alice joined the chat", *(f"alice: line {number}" for number in range(20)))
    bob.send("/names")
    bob.expect("-> 2 here: bob, alice")


# --- A place that is kept ----------------------------------------------------


def join_with_key(room: ChatServer, name: str, start: str = "-0") -> Peer:
    """Return somebody new who can come back."""
    peer = Peer(room.port).introduce(f"{name} {start} {KEY}")
    peer.expect_eventually(f"* {name} joined the chat")
    return peer


def lose(room: ChatServer, name: str, peer: Peer) -> None:
    """Have somebody lose the connection, and the room know of it."""
    peer.vanish()
    wait_until(lambda: is_away(room, name), f"{name}'s place to be kept")


def come_back(room: ChatServer, introduction: str) -> tuple[Peer, list[str]]:
    """Come back with the key; return the peer and what it is greeted with, up to `-> at N`."""
    peer = Peer(room.port).introduce(f"{introduction} {KEY}")
    lines = [peer.next_line()]
    while protocol.position_in(lines[-1]) is None:
        lines.append(peer.next_line())
    return peer, lines


def test_who_loses_the_line_is_still_here(room: ChatServer) -> None:
    """A place with a key is kept without a word: the name is taken, listed and found."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.expect("* bob joined the chat")
    lose(room, "bob", bob)
    alice.send("/names", "/nick bob")
    alice.expect("-> 2 here: alice, bob")
    alice.expect("-> not sent: the name bob is taken; choose another")
    Peer(room.port).introduce("bob").expect("-> the name bob is taken; choose another")
    Peer(room.port).introduce("b0b -0").expect_match("-> Welcome, b0b! .* alice, bob")
    bob, lines = come_back(room, "bob -0")
    assert lines[0] == "-> Welcome back, bob!"
    bob.send("here I am")
    bob.expect_eventually("bob: here I am")
    alice.expect("* b0b joined the chat", "bob: here I am")


def test_a_place_is_kept_so_long(room: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time the place is given up with a line for the room, and the name is free."""
    monkeypatch.setattr(server_module, "HELD", 0.2)
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    bob.vanish()
    alice.expect("* bob joined the chat", "* bob left the chat")
    alice.send("/msg bob hi")
    alice.expect("-> not sent: nobody here is called bob; /names lists who is here")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    bob.expect("-> Welcome, bob! /help lists the commands. Already here: alice")


@pytest.mark.parametrize("introduction", ["bob", "bob -0"])
def test_a_place_without_a_key_is_not_kept(room: ChatServer, introduction: str) -> None:
    """Who could not come back to it leaves at once."""
    alice = Peer(room.port).join("alice")
    bob = Peer(room.port).introduce(introduction)
    bob.expect_eventually("* bob joined the chat")
    bob.vanish()
    alice.expect("* bob joined the chat", "* bob left the chat")


def test_who_says_goodbye_is_not_kept(room: ChatServer) -> None:
    """With /quit somebody leaves at once, with a key too."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    bob.send("/quit")
    alice.expect("* bob joined the chat", "* bob left the chat")


def test_a_flapping_connection_fills_the_room_with_nothing(room: ChatServer) -> None:
    """However often somebody is lost and comes back, the others see what is said and no more."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    for number in range(20):
        bob.send(str(number))
        bob.expect_eventually(f"bob: {number}")
        lose(room, "bob", bob)
        bob, _ = come_back(room, "bob -0")
    alice.expect("* bob joined the chat", *(f"bob: {number}" for number in range(20)))
    alice.expect_nothing()


def test_a_private_line_to_who_is_away_arrives(room: ChatServer) -> None:
    """What was confirmed while somebody was away comes with the return, once, in its place."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send("/msg bob heard")
    bob.expect("[from alice] heard")
    position = room.history.end
    lose(room, "bob", bob)
    alice.send("one", "/msg bob psst", "two", "/me waves", "/msg bob psst again")
    alice.expect_eventually("-> to bob: psst again")
    bob, _ = come_back(room, f"bob {position}")
    bob.expect(
        *("alice: one", "[from alice] psst", "alice: two", "** alice waves"),
        "[from alice] psst again",
    )
    bob.expect_nothing()
    lose(room, "bob", bob)
    bob, _ = come_back(room, "bob -0")
    bob.expect_nothing()


def test_who_is_away_can_be_answered(room: ChatServer) -> None:
    """/reply finds who wrote last, though the line was lost since, on either side."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send("/msg bob hi")
    bob.expect("[from alice] hi")
    bob.send("/reply hello")
    alice.expect_eventually("[from bob] hello")
    lose(room, "bob", bob)
    alice.send("/r are you there?")
    alice.expect("-> to bob: are you there?")
    bob, _ = come_back(room, "bob -0")
    bob.expect("[from alice] are you there?")
    bob.send("/r yes")
    bob.expect("-> to alice: yes")
    alice.expect("[from bob] yes")


def test_a_key_comes_back_under_the_name_that_the_place_has_now(room: ChatServer) -> None:
    """Who did not hear that /nick was granted is told so behind the welcome."""
    bob = join_with_key(room, "bob")
    bob.send("/nick rob")
    bob.expect_eventually("* bob is now rob")
    lose(room, "rob", bob)
    rob, lines = come_back(room, "bob -0")
    assert lines[:2] == ["-> Welcome back, rob!", "-> you are now rob"]
    rob.send("bob: hello", "rob: hello")
    rob.expect("rob: bob: hello", "rob: hello")


# --- Private lines, counted --------------------------------------------------


def test_private_lines_are_counted_for_who_counts(room: ChatServer) -> None:
    """Who says how many it has had is answered alike, and gets those behind them, once."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send(*(f"/msg bob {number}" for number in range(5)))
    bob.expect(*(f"[from alice] {number}" for number in range(5)))
    end = room.history.end
    for had in 0, 2, 4:
        bob, lines = come_back(room, f"bob {end}+{had}")
        assert lines == ["-> Welcome back, bob!", f"-> at {end}+{had}"]
        bob.expect(*(f"[from alice] {number}" for number in range(had, 5)))
        bob.expect_nothing()
    alice.send("/msg bob 5")
    bob.expect("[from alice] 5")
    bob, lines = come_back(room, f"bob {end}+6")
    assert lines[-1] == f"-> at {end}+6"
    bob.expect_nothing()


@pytest.mark.parametrize("introduction", ["bob -0", "bob 0", "bob -20"])
def test_who_does_not_count_is_answered_without(room: ChatServer, introduction: str) -> None:
    """A plus stands in the answer when it stood in the question."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send("/msg bob hi")
    bob.expect("[from alice] hi")
    _, lines = come_back(room, introduction)
    assert lines[0] == "-> Welcome back, bob!"
    assert re.fullmatch(r"-> at \d+", lines[1])
    _, lines = come_back(room, "bob -0+1")
    assert re.fullmatch(r"-> at \d+\+1", lines[1])


def test_a_line_confirmed_while_the_connection_was_dead_arrives_once(room: ChatServer) -> None:
    """A line that the server sent to a connection that was no more comes with the return."""
    alice = Peer(room.port).join("alice")
    with Proxy(room.port) as proxy:
        bob = Peer(proxy.port).introduce(f"bob -0 {KEY}")
        bob.expect_eventually("* bob joined the chat")
        alice.expect("* bob joined the chat")
        alice.send("/msg bob heard")
        bob.expect("[from alice] heard")
        proxy.end(STALL)
        position = room.history.end
        alice.send("/msg bob one", "aloud", "/msg bob two")
        alice.expect("-> to bob: heard", "-> to bob: one", "alice: aloud", "-> to bob: two")
        assert not is_away(room, "bob")
        bob, _ = come_back(room, f"bob {position}+1")
        bob.expect("[from alice] one", "alice: aloud", "[from alice] two")
        alice.send("/msg bob three")
        bob.expect("[from alice] three")
        bob.expect_nothing()
        bob, _ = come_back(room, f"bob {position + 1}+4")
        bob.expect_nothing()


def test_private_lines_that_are_no_more_are_told(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than are kept the last ones come, and how many are missing before them."""
    monkeypatch.setattr(server_module, "MAIL_LINES", 5)
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    lose(room, "bob", bob)
    alice.send(*(f"/msg bob {number}" for number in range(8)))
    alice.expect_eventually("-> to bob: 7")
    for introduction in "bob -0", "bob -0+0":
        bob, _ = come_back(room, introduction)
        bob.expect("-> missed 3 private lines", *(f"[from alice] {n}" for n in range(3, 8)))
        bob.expect_nothing()
    bob, _ = come_back(room, "bob -0+2")
    bob.expect("-> missed 1 private line", *(f"[from alice] {n}" for n in range(3, 8)))
    bob, _ = come_back(room, "bob -0+8")
    bob.expect_nothing()


def test_private_lines_are_kept_up_to_so_many_bytes(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of what waits for who is away are bounded too."""
    monkeypatch.setattr(server_module, "MAIL_BYTES", 3000)
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    lose(room, "bob", bob)
    alice.send(*(f"/msg bob {number}{'x' * 900}" for number in range(8)))
    alice.expect_eventually(f"-> to bob: 7{'x' * 900}")
    bob, _ = come_back(room, "bob -0+0")
    bob.expect("-> missed 5 private lines", *(f"[from alice] {n}{'x' * 900}" for n in (5, 6, 7)))


def test_the_count_goes_on_through_a_new_name(room: ChatServer) -> None:
    """Private lines are the key's: a new name neither loses nor repeats one."""
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send("/msg bob one")
    bob.expect("[from alice] one")
    bob.send("/nick rob")
    alice.expect_eventually("* bob is now rob")
    alice.send("/msg rob two", "/msg rob three")
    alice.expect_eventually("-> to rob: three")
    rob, lines = come_back(room, "rob -0+2")
    assert lines[1].endswith("+2")
    rob.expect("[from alice] three")
    rob.expect_nothing()


def test_an_unknown_key_brings_its_own_count() -> None:
    """A server that was restarted takes the client's count and goes on from there."""
    for _ in range(2):
        with run_chat() as room:
            bob = Peer(room.port).introduce(f"bob -0+7 {KEY}")
            bob.expect_match("-> Welcome, bob! .*")
            bob.expect_match(r"-> at \d+\+7")
            bob.expect("* bob joined the chat")
            alice = Peer(room.port).join("alice")
            alice.send("/msg bob eight", "/msg bob nine")
            bob.expect("* alice joined the chat", "[from alice] eight", "[from alice] nine")
            bob, _ = come_back(room, "bob -0+8")
            bob.expect("[from alice] nine")
            bob.expect_nothing()


def test_a_restart_with_a_history_takes_the_clients_count(tmp_path: Path) -> None:
    """Private lines are in no file; the count goes on with the room all the same."""
    file = str(tmp_path / "room.db")
    with run_chat(history=file) as room:
        alice = Peer(room.port).join("alice")
        bob = join_with_key(room, "bob")
        alice.send("/msg bob one", "/msg bob two")
        bob.expect("[from alice] one", "[from alice] two")
        position = room.history.end
    with run_chat(history=file) as room:
        bob = Peer(room.port).introduce(f"bob {position}+2 {KEY}")
        bob.expect_match("-> Welcome, bob! .*")
        bob.expect(f"-> at {position}+2")
        bob.expect_eventually("* bob joined the chat")
        alice = Peer(room.port).join("alice")
        alice.send("/msg bob three")
        bob.expect("* alice joined the chat", "[from alice] three")
        bob, _ = come_back(room, "bob -0+2")
        bob.expect("[from alice] three")


@pytest.mark.parametrize(("kept", "expected"), [(60.0, ["[from alice] psst"]), (0.0, [])])
def test_private_lines_outlive_the_stay_for_a_while(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch, kept: float, expected: list[str]
) -> None:
    """Who was given up and comes back gets what was confirmed; later there is nothing to tell."""
    monkeypatch.setattr(server_module, "HELD", 0.0)
    monkeypatch.setattr(server_module, "MAIL_KEPT", kept)
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send("/msg bob psst")
    alice.expect("* bob joined the chat", "-> to bob: psst")
    bob.vanish()
    alice.expect("* bob left the chat")
    wait_until(lambda: kept or not room.broadcaster.room.mail, "the line to be given up")
    bob = Peer(room.port).introduce(f"bob -0+0 {KEY}")
    bob.expect_match("-> Welcome, bob! .*")
    bob.expect_match(r"-> at \d+\+0")
    bob.expect(*expected, "* bob joined the chat")


def test_private_lines_are_kept_for_so_many_who_left(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where too many have left, those of who left first go first; those of who is here stay."""
    monkeypatch.setattr(server_module, "MAX_GONE", 2)
    alice = Peer(room.port).join("alice")
    staying = join_with_key(room, "staying")
    alice.send("/msg staying psst")
    staying.expect("[from alice] psst")
    for number in range(4):
        guest = Peer(room.port).introduce(f"guest-{number} -0 {number:016x}")
        guest.expect_eventually(f"* guest-{number} joined the chat")
        alice.send(f"/msg guest-{number} psst")
        guest.expect("[from alice] psst")
        guest.send("/quit")
        alice.expect_eventually(f"* guest-{number} left the chat")
    for number, expected in (0, []), (3, ["[from alice] psst"]):
        guest = Peer(room.port).introduce(f"guest-{number} -0+0 {number:016x}")
        guest.expect_match("-> Welcome, .*")
        guest.expect_match("-> at .*")
        guest.expect(*expected, f"* guest-{number} joined the chat")
    staying, _ = come_back(room, "staying -0+0")
    staying.expect("[from alice] psst")


def test_mail_is_kept_while_its_owner_is_here(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has come back, counting or not, loses nothing to the time since the last stay."""
    monkeypatch.setattr(server_module, "MAIL_KEPT", 0.3)
    alice = Peer(room.port).join("alice")
    bob = join_with_key(room, "bob")
    alice.send("/msg bob one")
    bob.expect("[from alice] one")
    bob.send("/quit")
    alice.expect_eventually("* bob left the chat")
    bob = join_with_key(room, "bob")
    passed = room.broadcaster.room.time + 1.0
    hand_in(room, Passed(passed))
    alice.send("/msg bob two")
    bob.expect_eventually("[from alice] two")
    bob, _ = come_back(room, "bob -0+1")
    bob.expect("[from alice] two")
    bob.expect_nothing()


# --- Answering who wrote -----------------------------------------------------


@pytest.mark.parametrize("verb", ["/reply", "/r", "/R"])
def test_reply_goes_to_who_wrote_last(room: ChatServer, verb: str) -> None:
    """It is sent and confirmed as /msg is, to the last of those who wrote, by any name."""
    alice, bob = pair(room.port)
    carol = Peer(room.port).join("carol")
    alice.expect("* carol joined the chat")
    bob.send("/msg alice from bob")
    alice.expect("[from bob] from bob")
    alice.send(f"{verb} one")
    alice.expect("-> to bob: one")
    bob.expect_eventually("[from alice] one")
    carol.send("/msg alice from carol", "/nick caro")
    alice.expect("[from carol] from carol", "* carol is now caro")
    alice.send(f"{verb}  two  words")
    alice.expect("-> to caro: two  words")
    carol.expect_eventually("[from alice] two  words")
    bob.send("/r three")
    alice.expect("[from bob] three")


def test_reply_needs_somebody_and_something(room: ChatServer) -> None:
    """Nobody to answer, nobody any more and nothing to say are each told."""
    alice, bob = pair(room.port)
    alice.send("/reply hi", "/r", "/reply  ")
    alice.expect(f"-> not sent: {protocol.NOBODY_WROTE}")
    for _ in range(2):
        alice.expect_match("-> usage: /reply TEXT, to .*; /r TEXT does it too")
    bob.send("/msg alice hi", "/quit")
    alice.expect("[from bob] hi", "* bob left the chat")
    bob = Peer(room.port).introduce("bob -0")  # another stay: it may be another person
    bob.expect_eventually("* bob joined the chat")
    alice.expect("* bob joined the chat")
    alice.send("/r hi")
    alice.expect(f"-> not sent: {protocol.CORRESPONDENT_LEFT}")
    bob.expect_nothing()


def test_reply_to_who_does_not_exist_any_more_is_not_said(room: ChatServer) -> None:
    """A refused answer is for its author alone."""
    alice, bob = pair(room.port)
    alice.send("/r secret")
    alice.expect(f"-> not sent: {protocol.NOBODY_WROTE}")
    bob.expect_nothing()


# --- Commands ----------------------------------------------------------------


def test_help_shows_each_command_aligned(room: ChatServer) -> None:
    """There is one line a command, with its arguments, all summaries in one column."""
    alice = Peer(room.port).join("alice")
    alice.send("/help")
    lines = alice.lines(len(server_module.COMMANDS))
    alice.expect_nothing()
    usages = [re.split(r"  +", line)[0] for line in lines]
    assert usages[:9] == [
        "-> /help",
        "-> /names",
        "-> /me ACTION",
        "-> /msg NAME TEXT",
        "-> /reply TEXT",
        "-> /nick NAME",
        "-> /history [N]",
        "-> /search WORD",
        "-> /quit",
    ]
    columns = {len(line) - len(re.split(r"  +", line)[1]) for line in lines}
    assert len(columns) == 1


def test_names_shows_who_is_here(room: ChatServer) -> None:
    """Everyone is named, the asker too, in the order in which they came."""
    peers = [Peer(room.port).join(name) for name in ("bob", "alice", "carol")]
    peers[2].send("/names")
    peers[2].expect("-> 3 here: bob, alice, carol")


def test_me_says_what_one_does(room: ChatServer) -> None:
    """An action is broadcast to all and stands in the history."""
    alice, bob = pair(room.port)
    alice.send("/me waves  twice ", "/ME bows")
    for peer in alice, bob:
        peer.expect("** alice waves  twice", "** alice bows")
    Peer(room.port).join("carol")
    assert room.history.end - room.history.first == 5


def test_msg_is_for_two_alone(room: ChatServer) -> None:
    """A private line goes to one and is confirmed to the other; nobody else gets it."""
    alice, bob = Peer(room.port).join("alice"), Peer(room.port).join("bob")
    carol = Peer(room.port).join("carol")
    alice.expect("* bob joined the chat", "* carol joined the chat")
    bob.expect("* carol joined the chat")
    alice.send("/msg BOB psst, over here", "out loud")
    alice.expect("-> to bob: psst, over here", "alice: out loud")
    bob.expect("[from alice] psst, over here", "alice: out loud")
    carol.expect("alice: out loud")
    carol.send("/history 10")
    assert not [line for line in carol.lines(4) if "psst" in line]
    carol.expect_nothing()


def test_msg_to_oneself_works(room: ChatServer) -> None:
    """A note to oneself comes back both ways."""
    alice = Peer(room.port).join("alice")
    alice.send("/msg alice note")
    alice.expect("-> to alice: note", "[from alice] note")


def test_msg_follows_a_new_name(room: ChatServer) -> None:
    """A private line goes to who has the name now."""
    alice, bob = pair(room.port)
    bob.send("/nick rob")
    alice.expect("* bob is now rob")
    alice.send("/msg bob hi", "/msg rob hi")
    alice.expect("-> not sent: nobody here is called bob; /names lists who is here")
    alice.expect("-> to rob: hi")
    bob.expect("-> you are now rob", "* bob is now rob", "[from alice] hi")


def test_private_lines_stand_where_they_belong(room: ChatServer) -> None:
    """Private lines and the room's come in the order in which they were sent."""
    alice, bob = pair(room.port)
    sent, expected = [], []
    for number in range(300):
        sent += [f"/msg bob private {number}", f"public {number}"]
        expected += [f"[from alice] private {number}", f"alice: public {number}"]
    alice.send(*sent)
    bob.expect(*expected)


def test_answers_stand_where_they_belong(room: ChatServer) -> None:
    """The answer to a command comes before what was said after it."""
    alice = Peer(room.port).join("alice")
    for number in range(50):
        alice.send(f"before {number}", "/names", f"after {number}", "/no")
    for number in range(50):
        alice.expect(f"alice: before {number}", "-> 1 here: alice", f"alice: after {number}")
        alice.expect("-> there is no /no; /help lists the commands")


STAMP = r"-> \d{4}-\d\d-\d\d \d\d:\d\dZ "


def test_history_shows_the_last_lines_with_their_times(room: ChatServer) -> None:
    """The history comes as answers, with a time each, with what was said just before it."""
    alice = talk(room, 30)
    alice.send("last", "/history 3", "/history", "/history 200")
    alice.expect("alice: last")
    for text in ("alice: line 28", "alice: line 29", "alice: last"):
        alice.expect_match(STAMP + text)
    for number in range(11, 30):
        alice.expect_match(f"{STAMP}alice: line {number}")
    alice.expect_match(STAMP + "alice: last")
    alice.expect_match(STAMP + r"\* alice joined the chat")
    for line in alice.lines(31):
        assert re.match(STAMP, line)
    alice.expect_nothing()


def test_search_shows_the_last_lines_with_a_word(room: ChatServer) -> None:
    """A search finds the last twenty lines in any case, and says when there are none."""
    alice = talk(room, 50)
    alice.send("Needle one", "a needle two", "/search NEEDLE", "/search e 4", "/search haystack")
    alice.expect("alice: Needle one", "alice: a needle two")
    alice.expect_match(STAMP + "alice: Needle one")
    alice.expect_match(STAMP + "alice: a needle two")
    for number in (4, *range(40, 50)):
        alice.expect_match(f"{STAMP}alice: line {number}")
    alice.expect("-> nobody said haystack")
    alice.expect_nothing()


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/", "-> there is no /; /help lists the commands"),
        ("/dance", "-> there is no /dance; /help lists the commands"),
        ("/me", "-> usage: /me ACTION, to .*"),
        ("/me  ", "-> usage: /me ACTION, to .*"),
        ("/msg", "-> usage: /msg NAME TEXT, to .*"),
        ("/msg bob", "-> usage: /msg NAME TEXT, to .*"),
        ("/msg nobody hi", "-> not sent: nobody here is called nobody; /names lists who is here"),
        ("/nick", "-> usage: /nick NAME, to .*"),
        ("/history x", r"-> usage: /history \[N\], N from 1 to 200"),
        ("/history 0", r"-> usage: /history \[N\], N from 1 to 200"),
        ("/history -1", r"-> usage: /history \[N\], N from 1 to 200"),
        ("/history 201", r"-> usage: /history \[N\], N from 1 to 200"),
        ("/history 1 2", r"-> usage: /history \[N\], N from 1 to 200"),
        ("/search", "-> usage: /search WORD, to .*"),
        ("alice: /dance", "-> there is no /dance; /help lists the commands"),
    ],
)
def test_a_wrong_command_is_answered_with_what_is_right(
    room: ChatServer, line: str, answer: str
) -> None:
    """Nothing typed with a slash goes unanswered, and none of it reaches the room."""
    alice, bob = pair(room.port)
    alice.send(line)
    alice.expect_match(answer)
    alice.expect_nothing()
    bob.expect_nothing()


def test_two_slashes_are_a_text(room: ChatServer) -> None:
    """A text that begins with a slash is said with two."""
    alice = Peer(room.port).join("alice")
    alice.send("//help", "//", "///", "alice: //me")
    alice.expect("alice: /help", "alice: /", "alice: //", "alice: /me")


def test_quit_ends_the_input(room: ChatServer) -> None:
    """What is sent behind /quit is not said, what was before it is."""
    alice, bob = pair(room.port)
    alice.send("before", "/quit", "after")
    alice.expect("alice: before", "-> bye")
    alice.expect_closed()
    bob.expect("alice: before", "* alice left the chat")
    bob.expect_nothing()
