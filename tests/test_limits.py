"""The limits: who gets in, how fast one may speak, and what a slow reader costs the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat import (
    DEADLINE,
    SMALL,
    Clock,
    Peer,
    hand_in,
    pair,
    run_chat,
    session_of,
    stopping,
    wait_until,
)

import protocol
import server as server_module
from server import ChatServer, Client, Said, Secret

REFUSED = "refused in the last minute: "

# --- Who gets in -------------------------------------------------------------


def test_a_full_room_lets_nobody_in() -> None:
    """One too many is told that the room is full; a place that is left is free again."""
    with run_chat(max_clients=2) as server:
        alice, bob = pair(server.port)
        carol = Peer(server.port).introduce("carol")
        carol.expect(protocol.ROOM_FULL)
        carol.expect_closed()
        alice.expect_nothing()
        bob.send("/quit")
        alice.expect("* bob left the chat")
        Peer(server.port).join("carol")
        alice.expect("* carol joined the chat")


def test_an_address_has_so_many_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One too many from an address is told so, and counted; other addresses are let in."""
    caplog.set_level("INFO", "chat")
    monkeypatch.setattr(server_module, "_is_loopback", lambda host: False)
    with run_chat(max_per_address=2) as server:
        alice = Peer(server.port).join("alice")
        unnamed = Peer(server.port)
        unnamed.expect("NICK")
        third = Peer(server.port).introduce("third")
        third.expect(protocol.ADDRESS_FULL)
        third.expect_closed()
        Peer(server.port, source="127.0.0.2").join("bob")
        alice.expect("* bob joined the chat")
        for peer in unnamed, third:
            peer.close()
        wait_until(lambda: len(server.clients) == 2, "the others to be gone")
        Peer(server.port).join("carol")
        alice.expect("* carol joined the chat")
        server.refusals.tell()
    assert f"{REFUSED}too many connections from its address (1)" in caplog.messages


def test_loopback_has_no_limit_of_its_own() -> None:
    """The machine's own users may have as many connections as they like."""
    with run_chat(max_per_address=1) as server:
        for number in range(5):
            Peer(server.port).join(f"peer{number}")
        Peer(server.port, source="127.9.8.7").join("other")
        assert len(server.names) == 6


def silent(port: int) -> Peer:
    """Return a peer that was asked for its name, before it could be turned away."""
    peer = Peer(port)
    peer.expect("NICK")
    return peer


def test_the_oldest_without_a_name_makes_room() -> None:
    """With too many unnamed connections the oldest is closed; named ones do not count."""
    with run_chat(max_unnamed=3) as server:
        alice = Peer(server.port).join("alice")
        unnamed = [silent(server.port) for _ in range(5)]
        for peer in unnamed[:2]:
            peer.expect(protocol.TOO_MANY_UNNAMED)
            peer.expect_closed()
        for number, peer in enumerate(unnamed[2:]):
            peer.send(f"peer{number}")
            peer.expect_eventually(f"* peer{number} joined the chat")
            alice.expect(f"* peer{number} joined the chat")


# --- The deadline for the name -----------------------------------------------


def drip(peer: Peer, until: Callable[[], bool], byte: bytes = b"x") -> None:
    """Send a byte again and again until something is true."""

    def dripped() -> bool:
        try:
            peer.sock.send(byte)
        except OSError:
            return True
        return until()

    wait_until(dripped, "the drip to be stopped")


@pytest.mark.parametrize("start", [b"", b"1\nali"])
def test_silence_ends_at_the_deadline(start: bytes) -> None:
    """Who gives no name in time is told so and let go; who has given one stays."""
    with run_chat() as server:
        alice = Peer(server.port).join("alice")
        server.limits = server.limits._replace(name_deadline=0.5)
        late = Peer(server.port).send_raw(start)
        lines = late.rest()
        assert (lines[0], lines[-1]) == ("NICK", protocol.TOO_LATE)
        alice.send("still here")
        alice.expect("alice: still here")
        late.close()
        wait_until(lambda: len(server.clients) == 1, "the silent one to be gone")


def test_dripping_bytes_do_not_move_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends a byte now and then holds a place no longer, nor when it never stops."""
    monkeypatch.setattr(server_module, "LINGER", 0.3)
    with run_chat(name_deadline=0.5) as server:
        peer = Peer(server.port)
        peer.expect("NICK")
        drip(peer, lambda: not server.clients)
        wait_until(lambda: not server.clients, "the place to be free")


def test_refused_names_do_not_move_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one deadline for all tries together."""
    passed = [0.0]
    clock = Clock(monotonic=lambda: time.monotonic() + passed[0])
    monkeypatch.setattr(server_module, "time", clock)
    monkeypatch.setattr(protocol, "time", clock)
    with run_chat(name_deadline=100.0) as server:
        peer = Peer(server.port)
        peer.expect("NICK")
        passed[0] = 60.0
        peer.send("server").expect_match("-> the name .*")
        peer.expect("NICK")
        passed[0] = 120.0  # the server may see that it is late before it has read one name more
        peer.send("server").expect_eventually(protocol.TOO_LATE)
        peer.expect_closed()


def test_who_never_closes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on sending after the last word, and never closes, is closed all the same."""
    monkeypatch.setattr(server_module, "LINGER", 0.3)
    with run_chat() as server:
        alice, bob = pair(server.port)
        alice.send("/quit")
        alice.expect("-> bye")
        drip(alice, lambda: False)
        bob.expect("* alice left the chat")
        wait_until(lambda: len(server.clients) == 1, "the place to be free")


# --- The rate ----------------------------------------------------------------


def test_a_flood_is_slowed_down_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 200 lines sent at once are broadcast, in order, and others speak in between."""
    pause, has_spoken = server_module.Gate.pause, threading.Event()

    def pause_longer(gate: server_module.Gate, seconds: float) -> None:
        has_spoken.wait(DEADLINE)
        pause(gate, seconds)

    monkeypatch.setattr(server_module.Gate, "pause", pause_longer)
    with run_chat(rate_limit=300.0) as server:
        alice, bob = pair(server.port)
        alice.send(*(f"line {number}" for number in range(200)))
        bob.expect(*(f"alice: line {number}" for number in range(20)))
        bob.send("may I?")
        bob.expect("bob: may I?")
        has_spoken.set()
        bob.expect(*(f"alice: line {number}" for number in range(20, 200)))
        assert alice.lines(201)[-1] == "alice: line 199"
        alice.send("and on")
        bob.expect("alice: and on")


def test_a_burst_passes_at_once() -> None:
    """Twenty lines pass without a wait, the next ones do not."""
    with run_chat(rate_limit=0.001) as server:
        alice, bob = pair(server.port)
        alice.send(*(f"line {number}" for number in range(30)))
        bob.expect(*(f"alice: line {number}" for number in range(20)))
        bob.expect_nothing()


def test_commands_and_refusals_count() -> None:
    """Whatever is sent counts, so that nobody can keep the server busy with questions."""
    with run_chat(rate_limit=0.001) as server:
        alice, bob = pair(server.port)
        alice.send(*["/names", "\x07"] * 10, "said")
        alice.expect(*["-> 2 here: alice, bob", alice_refusal()] * 10)
        bob.send("here")
        alice.expect("bob: here")
        bob.expect("bob: here")
        bob.expect_nothing()


def alice_refusal() -> str:
    """Return what answers a line with a control character in it."""
    return "-> not sent: only printable ASCII characters can be sent here"


def test_who_is_slowed_down_can_still_be_stopped() -> None:
    """A server with a flood waiting stops at once, and so does the flood."""
    with run_chat(rate_limit=0.001) as server:
        alice = Peer(server.port).join("alice")
        alice.send(*(f"line {number}" for number in range(100)))
        alice.expect(*(f"alice: line {number}" for number in range(20)))
        with stopping(server):
            alice.expect(protocol.SHUTTING_DOWN)
            alice.expect_closed()


# --- Slow readers ------------------------------------------------------------

WIDE = "." * 200


def talk(speaker: Peer, others: list[Peer], numbers: range) -> None:
    """Have somebody say numbered lines, and see that who reads gets each of them."""
    for start in range(numbers.start, numbers.stop, 100):
        batch = range(start, min(start + 100, numbers.stop))
        speaker.send(*(f"{number} {WIDE}" for number in batch))
        for peer in (speaker, *others):
            peer.expect(*(f"bob: {number} {WIDE}" for number in batch))


@contextmanager
def a_room_with_a_sloth(retained: int) -> Iterator[tuple[ChatServer, Peer, Peer, Peer]]:
    """Give a room with two who read and one whose buffers are soon full."""
    with run_chat(shrunken=True) as server:
        server.history.retained = retained
        bob, carol = Peer(server.port).join("bob"), Peer(server.port).join("carol")
        bob.expect("* carol joined the chat")
        sloth = Peer(server.port, buffer=SMALL).join("sloth")
        for peer in bob, carol:
            peer.expect("* sloth joined the chat")
        yield server, bob, carol, sloth


def accounted(lines: list[str], start: int) -> tuple[int, int]:
    """Check that lines and gaps follow each other without a hole; return the end and the gaps."""
    gaps = 0
    for line in lines:
        if (count := protocol.missed_in(line)) is not None:
            start, gaps = start + count, gaps + count
        else:
            assert line == f"bob: {start} {WIDE}"
            start += 1
    return start, gaps


def test_who_stops_reading_delays_nobody_and_gets_everything() -> None:
    """The others talk on; who reads again gets every line that is retained, whole."""
    with a_room_with_a_sloth(retained=50_000) as (_, bob, carol, sloth):
        talk(bob, [carol], range(2000))
        lines = sloth.lines(2000)
        assert accounted(lines, 0) == (2000, 0)
        sloth.send("here I am")
        for peer in bob, carol, sloth:
            peer.expect("sloth: here I am")


def test_who_falls_behind_is_told_how_many_lines_it_missed() -> None:
    """Lines that are no longer retained are counted, and the count fills the gap exactly."""
    with a_room_with_a_sloth(retained=300) as (_, bob, carol, sloth):
        talk(bob, [carol], range(2000))
        lines = sloth.lines_until(f"bob: 1999 {WIDE}")
        end, gaps = accounted(lines, 0)
        assert end == 2000
        assert gaps >= 1000
        talk(bob, [carol, sloth], range(2000, 2100))
        sloth.send("here I am")
        for peer in bob, carol, sloth:
            peer.expect("sloth: here I am")


def test_a_reader_may_fall_behind_again_and_again() -> None:
    """Each gap is told where it is."""
    with a_room_with_a_sloth(retained=200) as (_, bob, carol, sloth):
        reached = total = 0
        for start in range(0, 2100, 700):
            talk(bob, [carol], range(start, start + 700))
            lines = sloth.lines_until(f"bob: {start + 699} {WIDE}")
            reached, gaps = accounted(lines, reached)
            total += gaps
            assert gaps
        assert reached == 2100
        assert total < 2100


def test_positions_hold_across_a_gap() -> None:
    """Who counts the lines and adds what it missed knows the position of the next one."""
    with a_room_with_a_sloth(retained=300) as (server, bob, carol, sloth):
        start = server.history.end
        talk(bob, [carol], range(2000))
        lines = sloth.lines_until(f"bob: 1999 {WIDE}")
        position = start + accounted(lines, 0)[0]
        sloth.send("/quit")
        sloth.expect("-> bye")
        bob.expect("* sloth left the chat")
        back = Peer(server.port).introduce(f"sloth {position}")
        back.expect_match("-> Welcome, .*")
        back.expect(f"-> at {position}", "* sloth left the chat", "* sloth joined the chat")


def test_private_lines_survive_a_gap() -> None:
    """What was said to somebody alone comes even when the room's lines around it are gone."""
    with a_room_with_a_sloth(retained=300) as (_, bob, carol, sloth):
        talk(bob, [carol], range(1000))
        bob.send("/msg sloth psst")
        bob.expect("-> to sloth: psst")
        talk(bob, [carol], range(1000, 2000))
        lines = sloth.lines_until(f"bob: 1999 {WIDE}")
        assert lines.count("[from bob] psst") == 1
        lines.remove("[from bob] psst")
        end, gaps = accounted(lines, 0)
        assert end == 2000
        assert gaps


def test_who_leaves_without_reading_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither /quit nor the end of the input waits for a reader that does not read."""
    monkeypatch.setattr(server_module, "LINGER", 0.3)
    monkeypatch.setattr(server_module, "PARTING", 0.3)
    with a_room_with_a_sloth(retained=50_000) as (server, bob, carol, sloth):
        talk(bob, [carol], range(1000))
        sloth.send("/quit")
        for peer in bob, carol:
            peer.expect("* sloth left the chat")
        wait_until(lambda: len(server.clients) == 2, "the place to be free")
        assert accounted(sloth.lines(10), 0) == (10, 0)


@contextmanager
def a_room_with_a_past(tmp_path: Path | None) -> Iterator[tuple[ChatServer, Peer, list[str]]]:
    """Give a room, alice who is in it and what was said; with a path most of it is in a file."""
    history = str(tmp_path / "room.db") if tmp_path else None
    with run_chat(shrunken=True, history=history) as server:
        if history:
            server.history.retained = 1000
        alice = Peer(server.port).join("alice")
        lines = [f"alice: {number} {'x' * 30}" for number in range(15_000)]
        for start in range(0, len(lines), 1000):
            some = [line.encode() for line in lines[start : start + 1000]]
            hand_in(server, Said(session_of(server, "alice"), some))
        alice.expect(*lines)
        yield server, alice, lines


@pytest.mark.parametrize("durable", [False, True])
def test_a_long_replay_is_sent_whole_to_who_has_ended_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """However slowly it is read, while it is, what was asked for comes up to its last line."""
    passed = [0.0]
    clock = Clock(monotonic=lambda: time.monotonic() + passed[0])
    with a_room_with_a_past(tmp_path if durable else None) as (server, alice, said):
        monkeypatch.setattr(server_module, "time", clock)
        bob = Peer(server.port, buffer=SMALL).send("bob -15000").end_input()
        alice.expect("* bob joined the chat", "* bob left the chat")
        output = next(iter(server.broadcaster._parting))
        parting, lines = output.parting, list[str]()
        assert parting is not None
        for _ in range(6):  # so many times it is most of a patience late
            due = parting.ends_at
            passed[0] += server_module.PARTING * 0.8
            while parting.ends_at < due + server_module.PARTING / 2:
                lines.append(bob.next_line())
        alice.send("and on")
        alice.expect("alice: and on")
        lines += bob.rest()
        assert lines[0] == "NICK"
        assert lines[3:] == [*said, "* bob joined the chat"]


def test_who_has_ended_the_input_and_never_reads_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay that nobody takes ends after a while, and holds up nobody until then."""
    monkeypatch.setattr(server_module, "LINGER", 0.3)
    with a_room_with_a_past(None) as (server, alice, _):
        bob = Peer(server.port, buffer=SMALL).send("bob -15000").end_input()
        alice.expect("* bob joined the chat", "* bob left the chat")
        assert server.broadcaster._parting
        for number in range(10):
            alice.send(str(number))
            alice.expect(f"alice: {number}")
        (output,) = server.broadcaster._parting
        assert output.parting is not None
        output.parting.ends_at = 0.0  # its patience is at an end
        alice.send("and on")
        alice.expect("alice: and on")
        wait_until(lambda: len(server.clients) == 1, "the place to be free")
        bob.expect("NICK")


SUSPENDED = """
import socket, sys
with socket.socket() as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, int(sys.argv[2]))
    sock.connect(("127.0.0.1", int(sys.argv[1])))
    sock.sendall(b"sleeper\\n")
    while data := sock.recv(65536):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
"""


def test_a_suspended_client_delays_nobody_and_is_not_kicked(tmp_path: Path) -> None:
    """A process that is stopped and goes on finds its place, the lines and what it missed."""
    output = tmp_path / "output"
    with run_chat(shrunken=True) as server, output.open("wb") as file:
        server.history.retained = 300
        bob, carol = Peer(server.port).join("bob"), Peer(server.port).join("carol")
        bob.expect("* carol joined the chat")
        command = [sys.executable, "-c", SUSPENDED, str(server.port), str(SMALL)]
        with subprocess.Popen(command, stdout=file) as sleeper:
            try:
                for peer in bob, carol:
                    peer.expect("* sleeper joined the chat")
                wait_until(lambda: b"sleeper joined" in output.read_bytes(), "it to have joined")
                sleeper.send_signal(signal.SIGSTOP)
                talk(bob, [carol], range(2000))
                sleeper.send_signal(signal.SIGCONT)
                wait_until(lambda: b"bob: 1999 " in output.read_bytes(), "it to catch up")
                talk(bob, [carol], range(2000, 2001))
                wait_until(lambda: b"bob: 2000 " in output.read_bytes(), "it to go on")
                bob.send("/names")
                bob.expect("-> 3 here: bob, carol, sleeper")
            finally:
                sleeper.kill()
        for peer in bob, carol:
            peer.expect("* sleeper left the chat")
        text = output.read_text().partition("* sleeper joined the chat\n")[2]
        end, gaps = accounted(text.splitlines(), 0)
        assert end == 2001
        assert gaps


# --- What waits for one client and for the room ------------------------------


@pytest.mark.parametrize("size", [1, 900])
def test_private_lines_wait_in_a_bounded_number(size: int) -> None:
    """Who does not read has so many lines kept; further ones are refused to who sends them."""
    with run_chat(shrunken=True) as server:
        bob = Peer(server.port).join("bob")
        sloth = Peer(server.port, buffer=SMALL).join("sloth")
        bob.expect("* sloth joined the chat")
        # First fill its buffers, or a thousand short lines are in them and not kept.
        talk(bob, [], range(1000))
        taken, refused = [], 0
        for number in range(1500):
            text = f"{number} {'x' * size}"
            bob.send(f"/msg sloth {text}")
            if number % 50 == 49:
                for line, sent in zip(bob.lines(50), range(number - 49, number + 1), strict=True):
                    if line == f"-> to sloth: {sent} {'x' * size}":
                        taken.append(f"[from bob] {sent} {'x' * size}")
                    else:
                        assert line == "-> not sent: sloth is not reading; try again later"
                        refused += 1
        assert refused
        kept = min(server_module.OUTBOX_LINES, server_module.OUTBOX_BYTES // len(taken[0]) + 2)
        assert len(taken) <= kept
        assert len(taken) >= kept - 30
        sloth.expect(*(f"bob: {number} {WIDE}" for number in range(1000)), *taken)
        gate = server.broadcaster.outputs[session_of(server, "sloth")].gate
        wait_until(gate.is_open, "the last line to be counted as sent")
        bob.send("/msg sloth again")
        bob.expect("-> to sloth: again")
        sloth.expect("[from bob] again")


def test_who_asks_without_reading_is_not_read_from() -> None:
    """Questions whose answers nobody takes wait with the asker, and are answered in the end."""
    with run_chat(shrunken=True) as server:
        bob = Peer(server.port).join("bob")
        sloth = Peer(server.port, buffer=SMALL).join("sloth")
        bob.expect("* sloth joined the chat")
        questions = b"/help\n" * 100_000
        sent = sloth.send_until_blocked(questions)
        assert sent < len(questions)
        bob.send("hello")
        bob.expect("bob: hello")
        answers = [line for line in sloth.lines(3_000) if line != "bob: hello"]
        assert len(set(answers)) == len(server_module.COMMANDS)


def test_who_is_not_read_from_can_vanish() -> None:
    """Somebody who waits for its own answers and then is gone has left."""
    with run_chat(shrunken=True) as server:
        bob = Peer(server.port).join("bob")
        sloth = Peer(server.port, buffer=SMALL).join("sloth")
        bob.expect("* sloth joined the chat")
        sloth.send_until_blocked(b"/help\n" * 100_000)
        sloth.vanish()
        bob.expect("* sloth left the chat")


def test_a_crowded_queue_holds_its_authors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no round goes out, authors are not read from; later every line comes, in order."""
    monkeypatch.setattr(server_module, "MAX_QUEUED", 50)
    with run_chat(shrunken=True) as server:
        alice = Peer(server.port, buffer=SMALL).join("alice")
        append, may_go_on = server.history.append, threading.Event()

        def append_later(lines: list[bytes], *others: object) -> None:
            may_go_on.wait(30)
            append(lines)

        monkeypatch.setattr(server.history, "append", append_later)
        texts = [f"{number} {'x' * 500}" for number in range(600)]
        data = "".join(text + "\n" for text in texts).encode()
        try:
            sent = alice.send_until_blocked(data)
            assert sent < len(data)
        finally:
            may_go_on.set()
        sender = threading.Thread(target=alice.send_raw, args=[data[sent:]])
        sender.start()
        alice.expect(*(f"alice: {text}" for text in texts))
        sender.join()


@pytest.fixture
def room_slow() -> Iterator[ChatServer]:
    """A room whose sockets hold little."""
    with run_chat(shrunken=True) as server:
        yield server


# --- What is used up stays used up -------------------------------------------


def test_coming_anew_is_no_new_allowance() -> None:
    """Who leaves and comes again, under whatever name, may say no more than who stays."""
    with run_chat(rate_limit=0.001) as server:
        witness = Peer(server.port, source="127.0.0.9").join("witness")
        for name in ("peer0", "peer1"):
            peer = Peer(server.port).introduce(name)
            peer.expect_match("-> Welcome.*")
            peer.send(*(f"line {line}" for line in range(10))).end_input().rest()
            witness.expect_eventually(f"* {name} left the chat")
            wait_until(lambda: len(server.clients) == 1, "the place to be free")
        peer = Peer(server.port).join("peer2").send("may I?")
        witness.send("you may not").expect_eventually("witness: you may not")
        assert [line for _, line in server.history.last(100) if line.startswith("peer")] == [
            f"peer{number}: line {line}" for number in range(2) for line in range(10)
        ]
        assert not server.broadcaster.entries


def test_a_newcomer_goes_on_with_what_is_left_at_the_address() -> None:
    """After one that said 15 of 20 and left, the next from there has 5, and from elsewhere 20."""
    with run_chat(rate_limit=0.001) as server:
        witness = Peer(server.port, source="127.0.0.9").join("witness")
        alice = Peer(server.port).join("alice")
        alice.send(*(f"line {number}" for number in range(14)), "/quit").rest()
        witness.expect_eventually("* alice left the chat")
        wait_until(lambda: len(server.clients) == 1, "alice to be gone")
        bob = Peer(server.port).join("bob")
        bob.send(*(f"line {number}" for number in range(10)))
        carol = Peer(server.port, source="127.0.0.8").join("carol")
        carol.send(*(f"line {number}" for number in range(20)))
        carol.expect_eventually("carol: line 19")
        lines = witness.lines_until("carol: line 19")
        assert [line for line in lines if line.startswith("bob: ")] == [
            f"bob: line {number}" for number in range(5)
        ]


def test_others_who_leave_give_nobody_a_new_allowance() -> None:
    """What somebody has used up is known when they go, whoever came and went meanwhile."""
    with run_chat(rate_limit=0.001) as server:
        witness = Peer(server.port, source="127.0.0.9").join("witness")
        alice = Peer(server.port).join("alice")
        bob = Peer(server.port, source="127.0.0.8").join("bob")
        bob.send("/quit").rest()
        wait_until(lambda: len(server.clients) == 2, "bob to be gone")
        alice.send(*(f"line {number}" for number in range(19)), "/quit").rest()
        wait_until(lambda: len(server.clients) == 1, "alice to be gone")
        carol = Peer(server.port).join("carol")
        carol.send("may I?")
        witness.send("you may not").expect_eventually("witness: you may not")
        assert server.history.last(1)[0].line == "witness: you may not"
        assert not carol.has("carol: may I?")


def test_places_that_are_kept_count_for_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who joins and drops the line again and again holds no more places than who stays."""
    monkeypatch.setattr(server_module, "_is_loopback", lambda host: False)
    with run_chat(max_per_address=2) as server:
        for number in range(2):
            peer = Peer(server.port).introduce(f"peer{number} -0 {number:016x}")
            peer.expect_match("-> Welcome.*")
            peer.vanish()
            wait_until(lambda: not server.clients, "the connection to be gone")
        third = Peer(server.port).introduce("third")
        third.expect(protocol.ADDRESS_FULL)
        assert server.names == ["peer0", "peer1"]
        Peer(server.port).introduce(f"peer0 -0 {0:016x}").expect("-> Welcome back, peer0!")
        Peer(server.port, source="127.0.0.2").join("bob")


def test_answers_that_wait_are_counted_before_they_are_there(room_slow: ChatServer) -> None:
    """Questions by the thousand in one piece are answered as they are read, and no faster."""
    alice = Peer(room_slow.port, buffer=SMALL).join("alice")
    alice.send_until_blocked(b"/names\n/help\n/unknown\n" * 5000)
    bob = Peer(room_slow.port).join("bob")
    bob.send("hello")
    bob.expect_eventually("bob: hello")
    output = room_slow.broadcaster.outputs[session_of(room_slow, "alice")]
    wait_until(output.gate._is_full, "so much to wait as may")
    assert len(output.outbox) <= server_module.OUTBOX_LINES + len(server_module.COMMANDS)


def test_coming_back_by_key_is_no_new_allowance() -> None:
    """The allowance belongs to who speaks, not to the connection; coming back itself is free."""
    with run_chat(rate_limit=0.001) as server:
        witness = Peer(server.port, source="127.0.0.9").join("witness")
        key = "0123456789abcdef"
        for number in range(5):
            # From elsewhere each time, or what is left at the address would do.
            alice = Peer(server.port, source=f"127.0.0.{20 + number}")
            alice.introduce(f"alice -0 {key}").expect_match("-> Welcome.*")
            alice.expect_match("-> at .*")
            alice.send(*(f"turn {number} line {line}" for line in range(12)))
            if number == 0:
                alice.expect("* alice joined the chat")
            allowed = (12, 8, 0, 0, 0)[number]  # of 20; who comes back has what was not read lost
            alice.expect(*(f"alice: turn {number} line {line}" for line in range(allowed)))
        witness.send("done")
        witness.expect_eventually("alice: turn 1 line 7")
        witness.expect("witness: done")
        assert server.names == ["witness", "alice"]


def test_joining_has_a_rate_at_each_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many at once from one address the next wait; others, and owners of keys, do not."""
    monkeypatch.setattr(server_module, "JOINS_BURST", 3)
    monkeypatch.setattr(server_module, "JOINS", 0.001)
    key = "0123456789abcdef"
    with run_chat(rate_limit=5.0) as server:
        Peer(server.port).introduce(f"alice -0 {key}").expect_match("-> Welcome.*")
        for name in ("bob", "carol"):
            Peer(server.port).join(name)
        waiting = Peer(server.port).introduce("dave")
        wait_until(lambda: server.connections._claiming, "dave to want a place")
        Peer(server.port, source="127.0.0.8").join("erin")
        back = Peer(server.port).introduce(f"alice -0 {key}")
        back.expect("-> Welcome back, alice!")
        assert waiting.arrived() == b""
        assert server.names == ["alice", "bob", "carol", "erin"]


def test_without_a_limit_there_is_none_for_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--rate-limit 0` lifts both."""
    monkeypatch.setattr(server_module, "JOINS_BURST", 1)
    with run_chat(rate_limit=0.0) as server:
        for number in range(5):
            Peer(server.port).join(f"peer{number}")
        assert len(server.names) == 5


def test_a_crowd_of_silent_ones_gives_way_to_others() -> None:
    """However many come from one address without a name, who comes from another gets in."""
    with run_chat(max_unnamed=4) as server:
        slow = Peer(server.port, source="127.0.0.7")
        slow.expect("NICK")
        crowd = [silent(server.port) for _ in range(20)]
        for peer in crowd[:17]:
            peer.expect(protocol.TOO_MANY_UNNAMED)
            peer.expect_closed()
        slow.send("carol")
        slow.expect_eventually("* carol joined the chat")


def test_wrong_passwords_slow_each_other_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses from one address wait for each other, the more the longer; other addresses do not."""
    delays: list[float] = []
    monkeypatch.setattr(server_module, "WRONG_DELAY", 1000.0)
    monkeypatch.setattr(server_module, "MAX_DELAY", 5000.0)

    def watch(gate: server_module.Gate, seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr(server_module.Gate, "pause", watch)
    with run_chat(password="right") as server:
        guesser = Peer(server.port).introduce("guesser")
        for _ in range(2):
            guesser.expect("PASS")
            guesser.send("wrong")
            guesser.expect(protocol.WRONG_PASSWORD)
        guesser.expect("PASS")
        guesser.send("wrong")
        guesser.expect(protocol.NO_MORE_PASSWORDS)
        waits = [delay for delay in delays if delay != 1000.0]
        assert waits[0] == 0.0
        assert 900 < waits[1] < 1000 < waits[2]
        delays.clear()
        other = Peer(server.port, source="127.0.0.8").introduce("other")
        other.expect("PASS")
        other.send("right")
        other.expect_eventually("* other joined the chat")
        assert delays == [0.0]


def test_waiting_for_ones_turn_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of somebody whose password is looked at late is later by as much."""
    monkeypatch.setattr(server_module, "WRONG_DELAY", 0.0)
    deadlines: list[float] = []
    next_line, check = Client._next_line, Client._check

    def watch(client: Client, deadline: float) -> bytes:
        deadlines.append(deadline)
        return next_line(client, deadline)

    def check_late(client: Client, secret: Secret, given: bytes, key: str) -> bool:
        client.gate.pause(0.05)
        return check(client, secret, given, key)

    monkeypatch.setattr(Client, "_next_line", watch)
    monkeypatch.setattr(Client, "_check", check_late)
    with run_chat(password="right") as server:
        guesser = Peer(server.port).introduce("12")
        guesser.expect("PASS")
        guesser.send("wrong", "right").expect(protocol.WRONG_PASSWORD, "PASS")
        guesser.expect_match("-> .*")
        guesser.introduce("guesser").expect_eventually("* guesser joined the chat")
    name, first, second, again = deadlines
    assert name == first
    assert second >= first + 0.05
    assert again >= second + 0.05


def test_guesses_that_come_at_once_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten guesses on as many connections each waits for those before it."""
    delays: list[float] = []
    all_wait = threading.Barrier(10)

    def watch(gate: server_module.Gate, seconds: float) -> None:
        if seconds != 1000.0:  # the answer to a wrong one is late, too
            delays.append(seconds)
            if len(delays) > 1:
                all_wait.wait(DEADLINE)

    monkeypatch.setattr(server_module, "WRONG_DELAY", 1000.0)
    monkeypatch.setattr(server_module, "MAX_DELAY", 5000.0)
    monkeypatch.setattr(server_module.Gate, "pause", watch)
    with run_chat(password="right") as server:
        Peer(server.port).introduce("first").send("wrong").expect("PASS", protocol.WRONG_PASSWORD)
        for number in range(10):
            Peer(server.port).introduce(f"peer{number}").send("wrong")
        wait_until(lambda: len(delays) == 11, "all to have been told to wait")
        assert [round(wait, -2) for wait in sorted(delays[1:])] == [
            1000.0 * turn for turn in range(1, 11)
        ]


def test_so_many_guesses_wait_for_an_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One guess too many is refused, at the door and in the room, and counted."""
    caplog.set_level("INFO", "chat")
    monkeypatch.setattr(server_module, "WRONG_DELAY", 0.0)
    monkeypatch.setattr(server_module, "MAX_GUESSING", 0)
    with run_chat(password="right", op_password="right") as server:
        alice = Peer(server.port).introduce("alice").send("right")
        alice.expect_eventually("* alice joined the chat")
        alice.send("/op wrong", "/op wrong")
        alice.expect(protocol.WRONG_PASSWORD, protocol.not_sent(protocol.TOO_MANY_GUESSES))
        guesser = Peer(server.port).introduce("guesser").send("wrong", "wrong")
        assert guesser.rest()[-1] == protocol.ADDRESS_FULL
        server.refusals.tell()
    assert (
        f"{REFUSED}too many passwords from its address (2),"
        " a wrong operator password (1), a wrong password (1)"
    ) in caplog.messages


def test_who_has_passed_is_not_slowed_by_others_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of a key that gave the right password comes back at once, amid wrong guesses."""
    monkeypatch.setattr(server_module, "WRONG_DELAY", 3600.0)
    monkeypatch.setattr(server_module, "MAX_DELAY", 3600.0)
    key = "0123456789abcdef"
    with run_chat(password="right") as server:
        for welcome in ("Welcome, alice! .*", "Welcome back, alice!"):
            alice = Peer(server.port).introduce(f"alice -0 {key}")
            alice.expect("PASS")
            alice.send("right")
            alice.expect_match(f"-> {welcome}")
            guesser = Peer(server.port).introduce("guesser")
            guesser.expect("PASS")
            guesser.send("wrong")
            wait_until(lambda: server.password._wrong, "the guess to be counted")
        late = Peer(server.port).introduce("late")
        late.expect("PASS")
        late.send("right")
        wait_until(lambda: server.password._waiting["127.0.0.1"] == 2, "two to wait their turn")
        assert late.arrived() == b""
        assert server.names == ["alice"]
