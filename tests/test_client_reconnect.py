"""A client that loses its connection loses no line, says none twice and sees what it missed."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from chat import DEADLINE, Peer, no_leaks, room_lines, run_chat, wait_until
from clients import Shown, chatting, enter, flush, pretended, read_line, read_to_end
from proxy import CHUNK, CLOSE, DOWN, GHOST, RESET, STALL, UP, Direction, Fault, How, Proxy

import client
import protocol
import server
from client import ChatClient, Notice
from protocol import Connection, Line
from server import ChatServer

LINES = ["one", "/me nods", "//three", "one"]  # the same twice: a receipt is for one of them
SAID = ["alice: one", "** alice nods", "alice: /three", "alice: one"]
AT_ONCE = 8  # conversations


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long before trying again."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(client, "RETRY_MAX", 0.02)
    monkeypatch.setattr(server, "ROUND", 0.002)


def converse(faults: Iterable[Fault], *, step: int = CHUNK) -> list[dict[Direction, int]]:
    """Have alice say lines to bob through a proxy; both must see the same conversation."""
    with ChatServer(port=0, rate_limit=0) as room, Proxy(room.port, faults, step=step) as proxy:
        bob = Peer(room.port).join("bob")
        with chatting(proxy.port) as (chat, shown):
            for line in LINES:
                chat.send(line)
            flush(chat)
            bob.send("over")
            heard = room_lines(bob.lines_until("bob: over"))
            shown.wait_for("bob: over")
            assert chat.failed == 0
        bob.close()
    assert [line for line in heard if not line.startswith("* ")] == [*SAID, "bob: over"]
    assert shown.room[: len(heard) + 1] == ["* bob joined the chat", *heard]
    return [link.passed for link in proxy.links]


def failures(hold: Callable[[int], object], offsets: Iterable[int]) -> list[str]:
    """Hold a conversation for each offset; return those that went wrong."""

    def fails(offset: int) -> str:
        try:
            hold(offset)
        except Exception as error:
            return f"byte {offset}: {error}"
        return ""

    with no_leaks(), ThreadPoolExecutor(AT_ONCE) as pool:
        return [failure for failure in pool.map(fails, offsets) if failure]


@pytest.mark.parametrize("how", [CLOSE, RESET])
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_cut_at_every_byte(direction: Direction, how: How) -> None:
    """Wherever a connection ends, each line is said once and the conversation is complete."""
    with no_leaks():
        [passed] = converse([])
    every = range(passed[direction])
    assert not failures(lambda offset: converse([Fault(direction, offset, how)]), every)


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_ghost_at_bytes_all_over(direction: Direction) -> None:
    """A connection in which the server still believes is taken over and said nothing twice."""
    with no_leaks():
        [passed] = converse([])
    some = range(0, passed[direction], 3)
    assert not failures(lambda offset: converse([Fault(direction, offset, GHOST)]), some)


def test_cut_again_while_catching_up() -> None:
    """A second loss, in the midst of hearing what was missed, costs no line either."""
    with no_leaks():
        passed = converse([Fault(DOWN, 180, CLOSE)])[1]
    first, every = Fault(DOWN, 180, CLOSE), range(passed[DOWN])
    assert not failures(lambda offset: converse([first, Fault(DOWN, offset, CLOSE)]), every)


CROWD = ["alice", *(f"person{number:03}" for number in range(149))]


def cut_roll_call(offset: int) -> None:
    """Break off so far into the answer to a client's own /names; it must come back and speak."""
    answer = "".join(line + "\n" for line in protocol.here(CROWD, len(CROWD))).encode()
    cuts = [answer[:offset]]  # of the first connection

    def talk(sock: socket.socket) -> None:
        enter(sock)
        sock.sendall(cuts[0] if cuts else answer)
        if cuts:
            cuts.clear()
            return
        said = read_line(sock)
        sock.sendall(said + b"\n")
        read_to_end(sock)

    with pretended(talk) as port, chatting(port) as (chat, shown):
        shown.wait_for("connection lost")
        chat.send("hello")
        flush(chat)
        shown.wait_for("alice: hello")
        assert sorted(chat.present) == sorted(CROWD)
        assert shown.texts[-1] == "alice: hello"


@pytest.mark.long
def test_cut_at_every_byte_of_the_names() -> None:
    """Broken off in the several lines of who is here, a client hears and speaks when it is back."""
    lines = protocol.here(CROWD, len(CROWD))
    assert len(lines) > 1
    assert not failures(cut_roll_call, range(sum(map(len, lines)) + len(lines)))


def test_kicked_person_is_not_present() -> None:
    """Somebody who was kicked is gone from who is here, and so from what Tab completes."""
    with run_chat(op_password="secret") as room, chatting(room.port) as (chat, shown):
        bob, carol = Peer(room.port).join("bob"), Peer(room.port).join("carol")
        shown.wait_for("* carol joined the chat")
        carol.send("/op secret", "/kick bob enough")
        shown.wait_for("* bob was kicked by carol: enough")
        assert chat.present == ["carol", "alice"]
        bob.close()
        carol.close()


def test_single_bytes() -> None:
    """A conversation that trickles in byte by byte is the same one."""
    with no_leaks():
        assert len(converse([], step=1)) == 1, "the connection was not kept"


@contextmanager
def talking(name: str = "alice") -> Iterator[tuple[ChatServer, Proxy, Peer, ChatClient, Shown]]:
    """Have alice in the room through a proxy, and bob there without one."""
    with run_chat() as room, Proxy(room.port) as proxy:
        bob = Peer(room.port).join("bob")
        with chatting(proxy.port, name) as (chat, shown):
            bob.expect_eventually(f"* {name} joined the chat")
            wait_until(lambda: chat.settled)
            yield room, proxy, bob, chat, shown


def lose_what_comes(proxy: Proxy) -> None:
    """From now on, what is said to the client is lost and what it says still arrives."""
    [link] = proxy.links
    link.fault = Fault(DOWN, link.passed[DOWN], STALL)


def test_ghost_gives_its_name_back() -> None:
    """A client takes the place of its half-open connection without a word in the room."""
    with talking() as (_, proxy, bob, chat, shown):
        proxy.end(GHOST)
        shown.wait_for("back after")
        chat.send("still me")
        assert bob.next_line() == "alice: still me"
        assert shown.notices[0] == "connection lost; trying again"
        assert re.fullmatch(r"back after \d+ s", shown.notices[1])


def test_stalled_echo_is_no_second_line() -> None:
    """A line that the room has heard, while its echo was lost, is not said again."""
    with talking() as (_, proxy, bob, chat, shown):
        lose_what_comes(proxy)
        chat.send("heard")
        bob.expect("alice: heard")
        chat.send("not heard")
        proxy.end(GHOST)
        flush(chat)
        bob.expect("alice: not heard")
        chat.send("end")
        bob.expect("alice: end")
        shown.wait_for("alice: end")
        assert shown.room[-3:] == ["alice: heard", "alice: not heard", "alice: end"]


def test_lines_typed_while_away_are_said_when_back() -> None:
    """What is typed without a connection waits, and is said in order and once."""
    with talking() as (_, proxy, bob, chat, shown):
        proxy.go_away()
        shown.wait_for("connection lost")
        for number in range(50):
            chat.send(f"line {number}")
        proxy.come_back()
        flush(chat)
        bob.expect(*(f"alice: line {n}" for n in range(50)))


def test_missed_lines_are_counted_and_shown_once() -> None:
    """What was missed is announced once, with how many lines it is, and then shown."""
    with talking() as (_, proxy, bob, _chat, shown):
        proxy.go_away(GHOST)
        said = [f"bob: news {number}" for number in range(7)]
        bob.send(*(line.removeprefix("bob: ") for line in said))
        bob.expect(*said)
        shown.wait_for("connection lost")
        proxy.come_back()
        shown.wait_for("bob: news 6")
        bob.send("live")
        shown.wait_for("bob: live")
        [notice] = [index for index, text in enumerate(shown.texts) if "back after" in text]
        assert re.fullmatch(r"-- back after \d+ s, 7 lines missed --", shown.texts[notice])
        assert shown.texts[notice + 1 :] == [*said, f"-- {client.WHILE_AWAY.text} --", "bob: live"]


def test_absence_begins_with_the_last_that_was_heard() -> None:
    """It is told how long nothing was heard, also when the loss was noticed late."""
    with talking() as (_, proxy, bob, chat, shown):
        lose_what_comes(proxy)
        bob.send("unheard")
        bob.expect("bob: unheard")
        assert chat._session
        chat._session.heard_at -= 151
        proxy.end(GHOST)
        shown.wait_for("bob: unheard")
        assert re.fullmatch(r"back after 1[5-9]\d s, 1 line missed", shown.notices[-1])


def test_own_leaving_and_joining_is_no_missed_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was given up by the room in the meantime and misses nothing is told of nothing."""
    monkeypatch.setattr(server, "HELD", 0.0)
    with talking() as (_, proxy, bob, _chat, shown):
        proxy.go_away()
        bob.expect("* alice left the chat")
        proxy.come_back()
        bob.expect("* alice joined the chat")
        shown.wait_for("back after")
        assert any(re.fullmatch(r"back after \d+ s", notice) for notice in shown.notices)


def test_one_missed_line_is_one_line() -> None:
    """A single line that was missed is no `1 lines`, and counts with the room's own words."""
    with talking() as (_, proxy, bob, _chat, shown):
        proxy.go_away(GHOST)
        bob.send("/me coughs")
        bob.expect("** bob coughs")
        proxy.come_back()
        shown.wait_for("** bob coughs")
        assert re.fullmatch(r"back after \d+ s, 1 line missed", shown.notices[-1])


def test_command_without_answer_is_shown_not_repeated() -> None:
    """A private line whose answer was lost is shown again to its author and not sent again."""
    with talking() as (_, proxy, bob, chat, shown):
        lose_what_comes(proxy)
        chat.send("/msg bob psst")
        bob.expect("[from alice] psst")
        proxy.end(GHOST)
        shown.wait_for("no answer came, give it again if need be: /msg bob psst")
        chat.send("and on")
        bob.expect("alice: and on")
        flush(chat)


def test_long_absence_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sees no status line is told, once, that a lost server is still tried."""
    monkeypatch.setattr(client, "PATIENCE", 0.0)
    with talking() as (_, proxy, _, chat, shown):
        tries: list[None] = []
        connect = chat.connect

        def count() -> None:
            tries.append(None)
            connect()

        monkeypatch.setattr(chat, "connect", count)
        proxy.go_away()
        shown.wait_for("not back yet; a try every 0 s or less")
        wait_until(lambda: len(tries) > 5)
        proxy.come_back()
        shown.wait_for("back after")
        wait_until(lambda: chat.settled)
        assert len([notice for notice in shown.notices if "not back yet" in notice]) == 1


def test_restarted_server_without_memory() -> None:
    """Where nobody can know what was heard, the client says so, shows it and does not repeat it."""
    with talking() as (_, proxy, bob, chat, shown), ChatServer(port=0) as reborn:
        lose_what_comes(proxy)
        chat.send("heard")
        bob.expect("alice: heard")
        chat.send("lost")
        wait_until(lambda: len(chat.outgoing._sent) == 2)  # not waiting any more, so sent
        wait_until(lambda: proxy.links[0].dead)
        proxy.server = reborn.port
        proxy.go_away()
        shown.wait_for("connection lost")
        chat.send("typed while away")
        proxy.come_back()
        shown.wait_for(
            "cannot know whether this was seen, /history may tell; not sent again: heard"
        )
        shown.wait_for("cannot know whether this was seen, /history may tell; not sent again: lost")
        flush(chat)
        bob = Peer(reborn.port).join("bob")
        chat.send("end")
        bob.expect("alice: end")
        shown.wait_for("alice: end")
        assert chat.failed == 2
        assert [line for line in shown.room if line.startswith("alice")] == [
            "alice: typed while away",
            "alice: end",
        ]


def test_restarted_server_and_another_loss() -> None:
    """That nobody can know is not forgotten when the connection to the new server breaks too."""
    for offset in range(40, 140, 5):
        with talking() as (_, proxy, bob, chat, shown), ChatServer(port=0) as reborn:
            lose_what_comes(proxy)
            chat.send("heard")
            bob.expect("alice: heard")
            proxy.server = reborn.port
            proxy.plan(Fault(DOWN, offset, CLOSE))
            proxy.end(CLOSE)
            shown.wait_for(
                "cannot know whether this was seen, /history may tell; not sent again: heard"
            )
            chat.send("end")
            shown.wait_for("alice: end")
            assert "alice: heard" not in shown.room


def test_more_was_missed_than_the_room_keeps() -> None:
    """When the history no longer reaches back, nothing that may have been heard is repeated."""
    with talking() as (room, proxy, bob, chat, shown):
        lose_what_comes(proxy)
        chat.send("heard")
        bob.expect("alice: heard")
        proxy.go_away(GHOST)
        room.history.retained = 5
        bob.send(*(f"news {number}" for number in range(10)))
        bob.lines_until("bob: news 9")
        proxy.come_back()
        shown.wait_for(
            "cannot know whether this was seen, /history may tell; not sent again: heard"
        )
        chat.send("end")
        bob.expect("alice: end")
        shown.wait_for("alice: end")
        assert shown.room[-6:] == [
            *(f"bob: news {number}" for number in range(5, 10)),
            "alice: end",
        ]


@pytest.mark.parametrize("how", [CLOSE, GHOST])
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_new_name_cut_at_every_byte(direction: Direction, how: How) -> None:
    """Whatever a cut leaves of a change of name, the lines around it are said once and in order."""

    def rename(fault: Fault | None) -> dict[Direction, int]:
        with ChatServer(port=0, rate_limit=0) as room, Proxy(room.port) as proxy:
            bob = Peer(room.port).join("bob")
            with chatting(proxy.port) as (chat, shown):
                wait_until(lambda: chat.settled)
                link = proxy.links[0]
                before = dict(link.passed)
                if fault:
                    link.fault = Fault(direction, before[direction] + fault.after, fault.how)
                for line in ("before", "/nick rob", "after"):
                    chat.send(line)
                flush(chat)
                passed = {way: link.passed[way] - before[way] for way in Direction}
                bob.send("over")
                heard = room_lines(bob.lines_until("bob: over"))
                shown.wait_for("bob: over")
                assert (
                    "rob" in chat.name
                    or "no answer came, give it again if need be: /nick rob" in shown.notices
                )
                assert chat.failed == 0
            bob.close()
        assert shown.room[: len(heard) + 1] == ["* bob joined the chat", *heard]
        said = [line.partition(": ") for line in heard if not line.startswith("*")]
        assert [text for _, _, text in said] == ["before", "after", "over"]
        assert {name for name, _, _ in said} <= {"alice", "rob", "bob"}
        return passed

    with no_leaks():
        passed = rename(None)
    every = range(passed[direction])
    assert not failures(lambda offset: rename(Fault(direction, offset, how)), every)


def test_name_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has the name: the client says so once, and comes in when it is free again."""
    monkeypatch.setattr("server.HELD", 0.0)
    with talking() as (room, proxy, bob, chat, shown):
        proxy.go_away()
        bob.expect("* alice left the chat")
        thief = Peer(room.port).join("alice")
        chat.send("mine")
        proxy.come_back()
        shown.wait_for("the name alice is taken; choose another with /nick")
        proxy.wait_for(lambda: len(proxy.links) > 3)  # it goes on trying
        thief.close()
        flush(chat)
        bob.expect("* alice joined the chat", "* alice left the chat")
        bob.expect("* alice joined the chat", "alice: mine")
        taken = [notice for notice in shown.notices if "taken" in notice]
        assert taken == ["the name alice is taken; choose another with /nick"]


def test_another_name_to_come_back_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `/nick` while away is the name to come back with; nothing was said twice for it."""
    monkeypatch.setattr("server.HELD", 0.0)
    with talking() as (room, proxy, bob, chat, shown):
        lose_what_comes(proxy)
        chat.send("heard")
        bob.expect("alice: heard")
        wait_until(lambda: proxy.links[0].dead)
        proxy.go_away()
        bob.expect("* alice left the chat")
        Peer(room.port).join("alice")
        shown.wait_for("connection lost")
        chat.send("/nick rob")
        chat.send("after")
        proxy.come_back()
        flush(chat)
        bob.expect("* alice joined the chat", "* rob joined the chat", "rob: after")
        assert chat.name == "rob"


def test_name_taken_from_a_line_that_waits_is_waited_for_no_more() -> None:
    """Who waits for all receipts goes on when a waiting `/nick` has given its name and is done."""
    outgoing = client.Outgoing()
    outgoing.add(client.typed("/nick rob"))
    flushing = threading.Thread(target=outgoing.wait_for_receipts)
    flushing.start()
    try:
        wait_until(lambda: vars(outgoing._changed)["_waiters"], "somebody waits")
        assert outgoing.take_new_name() == "rob"
        flushing.join(DEADLINE)
        assert not flushing.is_alive()
    finally:
        outgoing.end()


def test_long_answer_is_the_answer_to_one_command() -> None:
    """The many lines that answer `/help` are no answer to the commands behind it."""
    with run_chat() as room, Proxy(room.port, step=1) as proxy:
        bob = Peer(room.port).join("bob")
        with chatting(proxy.port) as (chat, _):
            for line in ("/help", "/nick rob", "hello"):
                chat.send(line)
            flush(chat)
            bob.expect("* alice joined the chat", "* alice is now rob", "rob: hello")


def test_leaving_while_the_screen_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A goodbye that could not be sent in time is sent when it can be: no place is kept."""
    monkeypatch.setattr(client, "LEAVE_TIMEOUT", 0.05)
    may_go_on, given_up = threading.Event(), threading.Event()
    shutdown = Connection.shutdown

    def show(item: Line | Notice) -> None:
        if str(item) == "bob: hello":
            assert may_go_on.wait(DEADLINE)

    def give_up(connection: Connection, how: int = socket.SHUT_RDWR) -> None:
        shutdown(connection, how)
        given_up.set()

    with run_chat() as room:
        bob = Peer(room.port).join("bob")
        chat = ChatClient("alice", port=room.port, show=show)
        chat.connect()
        chat.start()
        bob.expect("* alice joined the chat")
        bob.send("hello")
        bob.expect("bob: hello")
        monkeypatch.setattr(Connection, "shutdown", give_up)
        leaving = threading.Thread(target=chat.leave)
        leaving.start()
        assert given_up.wait(DEADLINE)
        may_go_on.set()
        leaving.join()
        wait_until(lambda: not chat._receiver.is_alive(), "the receiver to end")
        wait_until(lambda: len(room.clients) == 1, "the connection to be gone")
        assert room.names == ["bob"]
        chat.close()


def test_leaving_while_away() -> None:
    """Who leaves without a connection leaves at once, and is told what was not said."""
    with talking() as (_, proxy, _bob, chat, shown):
        proxy.go_away()
        shown.wait_for("connection lost")
        chat.send("unsaid")
        assert chat.leave() == ["unsaid"]
