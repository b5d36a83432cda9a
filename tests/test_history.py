"""A durable history: what anyone has seen is in the file, and the room goes on from there."""

from __future__ import annotations

import calendar
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat import (
    DEADLINE,
    Peer,
    hand_in,
    no_leaks,
    pair,
    run_briefly,
    run_chat,
    run_server,
    session_of,
    wait_until,
)
from trust import consecutive, integrity, position_of, stored

import protocol
from server import (
    CHUNK,
    PAGE,
    SEARCH_PAGE,
    Access,
    Ban,
    Banned,
    ChatServer,
    FileHistory,
    History,
    NotReadable,
    Promoted,
    Said,
    SearchedPage,
)

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\dZ"
WAL_SIDE_FILES = ("-wal", "-shm", "-journal")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is not there yet, in a folder that needs care in an address."""
    folder = tmp_path / "a room? 100% #1"
    folder.mkdir()
    return folder / "room.db"


@pytest.fixture
def room() -> Iterator[ChatServer]:
    """A room that keeps what is said in memory."""
    with run_chat() as room:
        yield room


def made(file: Path, *texts: str) -> Path:
    """Let alice say something in a room that keeps it, and return the file."""
    with run_chat(history=str(file)) as room:
        alice = Peer(room.port).join("alice")
        alice.send(*texts, "/quit")
        alice.rest()
    return file


def many(file: Path, count: int, text: str = "some hay number ") -> Path:
    """Put many lines of carol's behind those that a file has, and return the file."""
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute(
            "INSERT INTO lines WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
            " WHERE i < ?) SELECT (SELECT max(position) FROM lines) + i, i, 'said', 'carol',"
            " ? || i FROM n",
            (count, text),
        )
    return file


def say(peer: Peer, count: int, text: str = "line") -> list[str]:
    """Say many lines, a thousand at once, and return them as the room has them."""
    texts = [f"{text} {number}" for number in range(count)]
    for start in range(0, count, 1000):
        peer.send(*texts[start : start + 1000])
        peer.expect_eventually(f"alice: {texts[start : start + 1000][-1]}")
    return [f"alice: {text}" for text in texts]


# --- Restarts ----------------------------------------------------------------


def test_room_goes_on_after_a_restart(file: Path) -> None:
    """A server that starts again has the lines and goes on with their positions."""
    with run_server("--history", str(file)) as server:
        alice = Peer(server.port).introduce("alice 0")
        first = position_of(alice)
        alice.expect_eventually("* alice joined the chat")
        alice.send("one", "/me nods", "//three", "/quit")
        alice.expect_eventually("-> bye")
    said = ["alice: one", "** alice nods", "alice: /three"]
    kept = ["* alice joined the chat", *said, "* alice left the chat"]
    assert stored(file) == dict(enumerate(kept, first))
    with run_server("--history", str(file)) as server:
        bob = Peer(server.port).introduce(f"bob {first + 1}")
        bob.expect_match("-> Welcome, bob! .*")
        bob.expect(f"-> at {first + 1}", *kept[1:], "* bob joined the chat")
        carol = Peer(server.port).introduce("carol -2")
        assert position_of(carol) == first + len(kept) - 1
        carol.expect(kept[-1], "* bob joined the chat", "* carol joined the chat")


def test_newcomer_hears_the_last_lines_from_before_the_restart(file: Path) -> None:
    """Who gives a name alone gets the last twenty lines, also those of a server long gone."""
    made(file, *(str(number) for number in range(30)))
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).introduce("bob")
        bob.expect_match("-> Welcome, bob! .*")
        bob.expect(*(f"alice: {number}" for number in range(11, 30)), "* alice left the chat")
        bob.expect("* bob joined the chat")


def test_file_holds_each_line_with_its_time_kind_name_and_text(file: Path) -> None:
    """The file tells of each line of the room when it came, what it is, from whom, and its text."""
    before = time.time()
    with run_chat(history=str(file)) as room:
        alice = Peer(room.port).join("alice")
        alice.send("hello", "/me waves", "/msg alice psst", "/nick alicia", "bye", "/help", "/quit")
        alice.rest()
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT kind, name, text, time FROM lines ORDER BY position")
        lines = rows.fetchall()
    assert [line[:3] for line in lines] == [
        ("notice", "", "alice joined the chat"),
        ("said", "alice", "hello"),
        ("did", "alice", "waves"),
        ("notice", "", "alice is now alicia"),
        ("said", "alicia", "bye"),
        ("notice", "", "alicia left the chat"),
    ]
    times = [line[3] for line in lines]
    assert before - 1 <= times[0]
    assert sorted(times) == times
    assert times[-1] <= time.time() + 1


def test_positions_of_a_new_file_are_later_than_those_of_another(file: Path) -> None:
    """A room whose file was thrown away never gives a position again."""
    made(file, "one")
    last = max(stored(file))
    for side in ("", *WAL_SIDE_FILES):
        Path(f"{file}{side}").unlink(missing_ok=True)
    made(file, "two")
    assert min(stored(file)) > last


def test_utf8_room_comes_back_with_every_character(file: Path) -> None:
    """Text of a UTF-8 room is the same after a restart, and is found in it."""
    for name in ("alice", "bob"):
        with run_chat(history=str(file), fmt="utf-8") as room:
            peer = Peer(room.port).join(name)
            peer.send(f"{name} grüße \U0001f44b", "/search GRÜSSE", f"/search {name} grüße")
            peer.expect(f"{name}: {name} grüße \U0001f44b", "-> nobody said GRÜSSE")
            peer.expect_match(f"-> {STAMP} {name}: {name} grüße \U0001f44b")
            peer.send("/search alice grüße")
            peer.expect_match(f"-> {STAMP} alice: alice grüße \U0001f44b")


# --- Behind memory -----------------------------------------------------------


def test_from_older_than_memory_is_served_from_the_file(file: Path) -> None:
    """Who asks for a position that left memory long ago gets every line from there on."""
    made(file, *(f"old {number}" for number in range(1200)))
    first = min(stored(file))
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).introduce(f"bob {first}")
        assert position_of(bob) == first
        lines = bob.lines_until("* bob joined the chat")
        assert lines == list(stored(file).values())
        bob.send("and on")
        bob.expect("bob: and on")


def test_from_before_the_file_begins_starts_where_it_begins(file: Path) -> None:
    """A position from before all that is kept gives what there is, and tells where that begins."""
    made(file, "one")
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).introduce("bob 1")
        assert position_of(bob) == min(stored(file))
        bob.expect("* alice joined the chat", "alice: one", "* alice left the chat")


def test_reader_behind_memory_misses_nothing_with_a_file(file: Path) -> None:
    """A reader that stopped gets every line in order, though memory has let go of them."""
    with run_chat(shrunken=True, history=str(file)) as room:
        room.history.retained = 50
        alice = Peer(room.port).join("alice")
        bob = Peer(room.port, buffer=4096).join("bob")
        alice.expect("* bob joined the chat")
        said = say(alice, 5000, "x" * 100)
        assert bob.lines(len(said)) == said
        alice.send("over")
        bob.expect("alice: over")


def test_private_lines_keep_their_place_for_a_reader_served_from_the_file(file: Path) -> None:
    """What is said to one who is far behind stands where it was said among the room's lines."""
    with run_chat(shrunken=True, history=str(file)) as room:
        room.history.retained = 50
        alice = Peer(room.port).join("alice")
        bob = Peer(room.port, buffer=4096).join("bob")
        expected = []
        for part in range(4):
            expected += say(alice, 1000, f"part {part} " + "x" * 90)
            alice.send(f"/msg bob after {part}")
            alice.expect_eventually(f"-> to bob: after {part}")
            expected.append(f"[from alice] after {part}")
        assert bob.lines(len(expected)) == expected


def test_reader_behind_memory_is_told_what_it_missed_without_a_file() -> None:
    """A reader that stopped is told how many lines are gone, and the count is right."""
    with run_chat(shrunken=True) as room:
        room.history.retained = 50
        alice = Peer(room.port).join("alice")
        bob = Peer(room.port, buffer=4096).join("bob")
        said = say(alice, 5000, "x" * 100)
        alice.send("over")
        heard = bob.lines_until("alice: over")
    gaps = [index for index, line in enumerate(heard) if line.startswith("-> missed ")]
    assert gaps, "memory held all that was said"
    place = 0
    for line in heard[:-1]:
        if match := re.fullmatch(r"-> missed (\d+) lines?", line):
            place += int(match[1])
        else:
            assert line == said[place]
            place += 1
    assert place == len(said)


# --- /history and /search ----------------------------------------------------


def test_history_command_reaches_back_beyond_memory(file: Path) -> None:
    """/history N gives the last N lines with their times, from before a restart too."""
    made(file, *(f"old {number}" for number in range(100)))
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).join("bob")
        bob.send("new", "/history 150")
        bob.expect("bob: new")
        kept = list(stored(file).values())
        assert len(kept) == 104
        for line in kept:
            bob.expect_match(f"-> {STAMP} {re.escape(line)}")
        bob.expect_nothing()


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have this process live where clocks are far from UTC and an hour comes twice a year."""
    with monkeypatch.context() as there:
        there.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_away")
def test_times_are_those_at_which_it_was_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/history after a restart shows when a line was said, with its zone, wherever the server is.

    In the hour that comes twice, a time without a zone would tell nothing.
    """
    first = calendar.timegm((2021, 11, 7, 5, 30, 0))  # 01:30 in New York, and so an hour later
    for later in (0, 3600):
        with monkeypatch.context() as then:
            then.setattr(time, "time", lambda: first + later)  # noqa: B023 - called in the loop
            made(file, f"long ago {later}")
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).join("bob")
        bob.send("/search long ago")
        bob.expect("-> 2021-11-07 05:30Z alice: long ago 0")
        bob.expect("-> 2021-11-07 06:30Z alice: long ago 3600")


@pytest.mark.usefixtures("far_away")
def test_end_of_a_ban_is_told_with_its_zone() -> None:
    """A ban tells until when it holds in UTC."""
    until = calendar.timegm((2026, 11, 25, 16, 31, 0))
    assert protocol.ban_lasts(until, "noise") == "until 2026-11-25 16:31Z: noise"


@pytest.mark.parametrize("word", ["50%", "a_b", "back\\slash", "it's", '"', "%", "_", "\\"])
def test_search_takes_every_character_as_itself(file: Path, word: str) -> None:
    """A word with signs that mean something to a database finds exactly the lines with it."""
    texts = ["50% off", "500 off", "a_b", "axb", "back\\slash", "it's", 'a "quote"', "plain"]
    with run_chat(history=str(file)) as room:
        alice = Peer(room.port).join("alice")
        alice.send(*texts, f"/search {word}")
        alice.expect(*(f"alice: {text}" for text in texts))
        for text in texts:
            if word in text:
                alice.expect_match(f"-> {STAMP} {re.escape(f'alice: {text}')}")
        alice.expect_nothing()


@pytest.mark.parametrize("durable", [False, True])
def test_search_finds_in_any_case_by_text_and_by_name(file: Path, durable: bool) -> None:
    """/search tells of the last lines with a word in their text or from that name."""
    with run_chat(history=str(file) if durable else None) as room:
        alice, bob = pair(room.port)
        bob.send("the Treaty")
        alice.expect("bob: the Treaty")
        alice.send("/search TREATY", "/search BOB", "/search nothing")
        alice.expect_match(f"-> {STAMP} bob: the Treaty")
        alice.expect_match(rf"-> {STAMP} \* bob joined the chat")
        alice.expect_match(f"-> {STAMP} bob: the Treaty")
        alice.expect("-> nobody said nothing")


@pytest.mark.long
def test_million_lines_are_searched(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word in a file of a million lines is found, first line or last, and nothing else."""
    monkeypatch.setattr("server.SEARCH_LIMIT", DEADLINE)
    many(made(file, "the first needle"), 1_000_000)
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).join("bob")
        bob.send("/search needle", "/search number 777777", "/search nothing", "on")
        bob.expect_match(f"-> {STAMP} alice: the first needle")
        bob.expect_match(f"-> {STAMP} carol: some hay number 777777")
        bob.expect("-> nobody said nothing", "bob: on")


@pytest.mark.parametrize("durable", [False, True])
def test_only_searches_wait_for_a_search(
    file: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a search takes its time people talk, recall, come in and read what is long ago."""
    if durable:
        made(file, *(f"old {number}" for number in range(30)))
    with run_chat(history=str(file) if durable else None) as room:
        alice, bob = pair(room.port)
        look, begun, may_go_on = room.history._search_before, threading.Event(), threading.Event()

        def look_long(end: int, word: str) -> SearchedPage:
            begun.set()
            assert may_go_on.wait(DEADLINE)
            return look(end, word)

        monkeypatch.setattr(room.history, "_search_before", look_long)
        alice.send("/search alice")
        assert begun.wait(DEADLINE)
        for number in range(20):
            bob.send(f"hello {number}")
            bob.expect(f"bob: hello {number}")
            alice.expect(f"bob: hello {number}")
        bob.send("/history 1")
        bob.expect_match(f"-> {STAMP} bob: hello 19")
        carol = Peer(room.port).introduce("carol 0")
        carol.expect_eventually("* alice joined the chat")
        carol.expect_eventually("* carol joined the chat")
        bob.expect("* carol joined the chat")
        may_go_on.set()
        alice.expect("* carol joined the chat")
        alice.expect_match(f"-> {STAMP} .*alice.*")


def test_search_that_waits_too_long_for_others_is_told_so(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who searches while too many others do is answered in the time that a search may take."""
    monkeypatch.setattr("server.SEARCH_LIMIT", 0.05)
    alice = Peer(room.port).join("alice")
    with room.history._searching:
        alice.send("/search hello")
        alice.expect("-> too many are searching; try again later")
    alice.send("/search alice")
    alice.expect_match(rf"-> {STAMP} \* alice joined the chat")


def test_search_over_its_limit_tells_what_it_has_found(file: Path) -> None:
    """A search that takes too long gives what it found by then, and tells how far back it is."""
    many(made(file, "an early needle"), 400_000)
    with run_server("--history", str(file), SEARCH_LIMIT=0.02) as server:
        bob = Peer(server.port).join("bob")
        bob.send("a late needle", "/search needle", "/search nothing")
        bob.expect("bob: a late needle")
        bob.expect_match(f"-> {STAMP} bob: a late needle")
        for _ in range(2):
            bob.expect_match(f"-> looked back to {STAMP} only; further would take too long")
        bob.expect_nothing()


@pytest.mark.parametrize("durable", [False, True])
def test_word_that_repeats_itself_is_found_as_fast_as_any(
    file: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of one letter, and a word on which a naive search goes over each of them 500 times."""
    monkeypatch.setattr("server.SEARCH_LIMIT", DEADLINE)
    word = "a" * 499 + "b"
    if durable:
        many(made(file), 60_000, "a" * 1000)
    with run_chat(history=str(file) if durable else None) as room:
        alice = Peer(room.port).join("alice")
        if not durable:
            for _ in range(20):
                hand_in(room, Said(session_of(room, "alice"), [b"carol: " + b"a" * 1000] * 1000))
            alice.lines(20_000)
        alice.send(f"/search {word}")
        alice.expect(f"-> nobody said {word}")
        alice.send(f"x{word}x", f"/search {word}")
        alice.expect(f"alice: x{word}x")
        alice.expect_match(f"-> {STAMP} alice: x{word}x")


WORDS = ("alice", "e: h", "HAY", "ü", "GRÜSSE", "ß", "Σ", "ς", "İ", "i", "joined", "chat", "%")


@pytest.mark.parametrize("fmt", ["ascii", "utf-8"])
def test_search_finds_what_a_look_at_each_line_finds(file: Path, fmt: str) -> None:
    """In memory and in a file a search finds the lines that have the word, across all steps."""
    choose = random.Random(4).choice
    texts = ["some hay", "HAY", "joined the CHAT", "e: h", "50%", "ΟΔΟΣ", "Grüße", "İi", "über"]
    names = ["alice", "hay", "bob"]
    lines = [
        choose(["{}: {}", "** {} {}", "* {} {}"]).format(choose(names), choose(texts))
        for _ in range(2 * CHUNK + SEARCH_PAGE)
    ]
    lines[5], lines[CHUNK + 7] = "alice: only here", "bob: and here"
    if fmt == "ascii":
        lines = [line.encode("ascii", "ignore").decode() for line in lines]
    durable = FileHistory(str(file), fmt)
    for history in (History(fmt), durable):
        history.append([line.encode(fmt) for line in lines])
        for word in (*WORDS, "only here", "AND HERE"):
            expected = [
                line
                for line in lines
                if any(word.lower() in part.lower() for part in protocol.parts(line)[1:])
            ]
            for count in (1, 20, len(lines)):
                found = [line for _, line in history.search(word, count)]
                assert found == expected[-count:], (word, count, history)
    durable.close()


@pytest.mark.parametrize("durable", [False, True])
def test_server_ends_in_time_while_somebody_searches(file: Path, durable: bool) -> None:
    """A search that would go on for minutes ends when the server does."""
    options = ("--history", str(many(made(file, "one"), 20_000))) if durable else ()
    with run_server(*options, SEARCH_REST=60.0, SEARCH_LIMIT=600.0) as server:
        alice, bob = pair(server.port)
        alice.send("on", "/search nothing")
        bob.expect("alice: on")
        bob.send("/search nothing")
        alice.expect("alice: on")
        assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_server_ends_in_time_while_many_search_a_large_file(file: Path) -> None:
    """Twenty people who search a million and a half lines keep no server from its end."""
    many(made(file, "one"), 1_500_000)
    for _ in range(5):
        with run_server("--history", str(file), "--rate-limit", "0") as server:
            peers = [Peer(server.port).join(f"peer{number}") for number in range(20)]
            for peer in peers:
                peer.send(*(f"/search nothing {number}" for number in range(50)))
            while not peers[0].next_line().startswith("-> "):
                pass
            assert server.stop() == 0
    assert integrity(file) == "ok"


def test_connection_is_closed_when_nobody_is_inside(file: Path) -> None:
    """Closing interrupts a statement that would run for ever, and waits for its thread."""
    access = Access(sqlite3.connect(file, check_same_thread=False))
    ended = threading.Event()

    def run_for_ever() -> None:
        with pytest.raises(NotReadable, match="interrupted"):
            access.rows(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
                " SELECT count(*) FROM n"
            )
        ended.set()

    with no_leaks():
        threading.Thread(target=run_for_ever, daemon=True).start()
        wait_until(access._lock.locked, "the statement to run")
        access.close(time.monotonic() + DEADLINE)
        assert ended.wait(DEADLINE)
    with pytest.raises(NotReadable, match="closed"):
        access.rows("SELECT 1")


def test_connection_is_left_open_under_a_thread_that_does_not_come_out(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that does not answer keeps nobody from ending, and nothing is closed under it."""
    access = Access(sqlite3.connect(file, check_same_thread=False))
    with access.inside() as database:
        access.close(time.monotonic())
        assert database.execute("SELECT 1").fetchall() == [(1,)]
    assert "does not answer" in caplog.text
    access.close(time.monotonic())


# --- Files that cannot be used -----------------------------------------------


def refused(file: Path | str, *options: str) -> str:
    """Start a server that must refuse a file; return the one line with which it ends."""
    done = run_briefly("--port", "0", "--history", str(file), *options)
    assert done.returncode == 1
    complaint = done.stderr.splitlines()
    assert len(complaint) == 1, done.stderr
    assert complaint[0].startswith("server.py: ")
    assert str(file) in complaint[0]
    return complaint[0]


def untouched(file: Path, *options: str) -> str:
    """Start a server that must refuse a file and leave every byte of it; return the line."""
    before = file.read_bytes()
    line = refused(file, *options)
    assert file.read_bytes() == before
    return line


def test_file_in_use_by_another_server(file: Path) -> None:
    """A second server on the same file says that it is in use; the first goes on."""
    with run_server("--history", str(file)) as server:
        alice = Peer(server.port).join("alice")
        alice.send("one")
        alice.expect("alice: one")
        assert "is in use by another server" in refused(file)
        alice.send("two")
        alice.expect("alice: two")
    assert list(stored(file).values())[1:3] == ["alice: one", "alice: two"]


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_garbage_is_no_history(file: Path, length: int) -> None:
    """A file that is no database is refused and left as it is."""
    file.write_bytes((b"Dear diary, \xff\x00" * length)[:length])
    assert re.search("damaged or no history|another program", untouched(file))


def test_truncated_file_is_refused(file: Path) -> None:
    """A history of which the end is missing is refused and left as it is."""
    made(file, *("x" * 500 for _ in range(200)))
    whole = file.read_bytes()
    assert len(whole) > 40000
    file.write_bytes(whole[: len(whole) // 2 - 100])
    assert "damaged" in untouched(file)


def flip(file: Path, start: int) -> None:
    """Turn over every bit of the page of a file in which a byte stands."""
    data = bytearray(file.read_bytes())
    start = start // 4096 * 4096
    data[start : start + 4096] = bytes(byte ^ 0xFF for byte in data[start : start + 4096])
    file.write_bytes(data)


@pytest.mark.parametrize("text", ["the first", "the last", "CREATE TABLE lines"])
def test_damage_at_the_ends_is_found_at_the_start(file: Path, text: str) -> None:
    """A history with damage where every start looks is refused and left as it is."""
    made(file, "the first", *("x" * 500 for _ in range(200)), "the last")
    flip(file, file.read_bytes().rindex(text.encode()))
    assert "damaged" in untouched(file)


def test_damage_within_a_file_harms_nothing_else(file: Path) -> None:
    """A start does not look at the whole file; what is damaged is told when it is asked for."""
    made(file, *("x" * 500 for _ in range(200)))
    flip(file, file.stat().st_size // 2)
    with run_server("--history", str(file)) as server:
        bob = Peer(server.port).introduce("bob 0")
        bob.expect_match("-> Welcome, bob! .*")
        bob.expect_match(r"-> at \d+")
        bob.expect_match(r"-> missed \d+ lines")
        bob.expect("* bob joined the chat")
        bob.send("hello", "/search hay", "/history 2")
        bob.expect("bob: hello", "-> the history cannot be read; try again later")
        bob.expect_match(rf"-> {STAMP} \* bob joined the chat")
        bob.expect_match(f"-> {STAMP} bob: hello")
        server.expect_log("cannot read the history: database disk image is malformed")


@pytest.mark.parametrize(
    "damage", ["kind = 'nonsense'", "text = 't' || char(10) || 't'", "time = 'noon'", "time = 1e99"]
)
def test_line_that_no_server_wrote_is_not_shown(file: Path, damage: str) -> None:
    """A damaged line of the file reaches nobody's terminal, and costs nobody anything else."""
    made(file, "one", "two", "three")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute(f"UPDATE lines SET {damage} WHERE text IN ('one', 'three')")
    with run_server("--history", str(file)) as server:
        bob = Peer(server.port).introduce("bob 0")
        position_of(bob)
        bob.expect("* alice joined the chat", "-> missed 1 line", "alice: two")
        bob.expect("-> missed 1 line", "* alice left the chat", "* bob joined the chat")
        bob.send("/search T", "/history")
        kept = ["* alice joined the chat", "alice: two", "* alice left the chat"]
        for line in [*kept, "* bob joined the chat"] * 2:
            bob.expect_match(f"-> {STAMP} {re.escape(line)}")


def test_line_taken_out_of_the_file_is_told_as_missed(file: Path) -> None:
    """Who reads over a gap in the file is told of it, and its positions stay right."""
    made(file, *(str(number) for number in range(PAGE + 10)))
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM lines WHERE text IN ('3', '4', '7')")
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).introduce("bob 0")
        bob.expect_match("-> Welcome, bob! .*")
        bob.expect_match(r"-> at \d+")
        bob.expect("* alice joined the chat", "alice: 0", "alice: 1", "alice: 2")
        bob.expect("-> missed 2 lines", "alice: 5", "alice: 6", "-> missed 1 line")
        bob.expect(*(f"alice: {number}" for number in range(8, PAGE + 10)))
        bob.expect("* alice left the chat", "* bob joined the chat")


def test_history_without_its_format_is_refused(file: Path) -> None:
    """A file that does not tell what its text is in is refused in one line."""
    made(file, "one")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM room")
    assert "damaged" in refused(file)


def test_database_of_another_program_is_refused(file: Path) -> None:
    """Somebody else's database is refused and left as it is."""
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE bookmarks (address TEXT)")
    assert "another program" in untouched(file)


def test_history_of_a_newer_version_is_refused(file: Path) -> None:
    """A file from a later version of the program is refused and left as it is."""
    made(file, "one")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("PRAGMA user_version = 99")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert "newer version" in untouched(file)


def test_utf8_history_is_refused_by_an_ascii_room(file: Path) -> None:
    """A room of ASCII does not open a file of UTF-8; it says with what to start."""
    with run_chat(history=str(file), fmt="utf-8") as room:
        Peer(room.port).join("alice").send("grüße", "/quit").rest()
    assert "--format utf-8" in untouched(file)


def test_ascii_history_goes_on_as_utf8(file: Path) -> None:
    """A room that changes from ASCII to UTF-8 keeps its file, and stays UTF-8."""
    made(file, "plain")
    with run_chat(history=str(file), fmt="utf-8") as room:
        bob = Peer(room.port).introduce("bob")
        bob.expect_eventually("alice: plain")
    assert "--format utf-8" in untouched(file)


def test_directory_is_no_history(tmp_path: Path) -> None:
    """A folder given as the file is refused in one line."""
    assert "cannot write" in refused(tmp_path)


@pytest.mark.parametrize("place", ["/proc/room.db", "/nowhere/at/all/room.db"])
def test_place_that_cannot_be_written_is_refused(place: str) -> None:
    """A file where none can be made is refused in one line that names it."""
    assert "cannot write" in refused(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_read_only_file_is_refused(file: Path) -> None:
    """A history without permission to write is refused and left as it is."""
    made(file, "one").chmod(0o400)
    assert "cannot write" in untouched(file)


def test_start_that_was_cut_short_leaves_a_file_that_can_be_used(file: Path) -> None:
    """A server killed while it made its file can be started again on it."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode=WAL")  # as far as it came
    made(file, "one")
    assert "alice: one" in stored(file).values()


# --- A disk that fails -------------------------------------------------------


NOT_STORED = "-> not sent: it could not be stored; try again later"


def expect_refusals(alice: Peer, bob: Peer) -> None:
    """See that nothing said is seen, that its author is told, and that the room answers."""
    alice.send("lost" * 200, f"/me is {'lost' * 200}", "/msg bob still private", "/names")
    expected = [NOT_STORED, NOT_STORED, "-> to bob: still private", "-> 2 here: alice, bob"]
    assert sorted(alice.lines(4)) == sorted(expected)
    bob.expect("[from alice] still private")
    bob.expect_nothing()


def test_disk_that_refuses_and_recovers(file: Path) -> None:
    """Nobody sees a line that the disk refuses, its author is told, and later all is well again."""
    with run_server("--history", str(file)) as server:
        alice, bob = pair(server.port)
        alice.send("before")
        bob.expect("alice: before")
        alice.expect("alice: before")
        hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard))
        expect_refusals(alice, bob)
        expect_refusals(alice, bob)
        server.expect_log("cannot store what is said")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        alice.send("after")
        bob.expect("alice: after")
        alice.expect("alice: after")
        server.expect_log("stored again")
        assert server.log().count("cannot store") == 1
    kept = stored(file)
    assert list(kept.values())[2:4] == ["alice: before", "alice: after"]
    assert consecutive(kept)
    assert integrity(file) == "ok"


def test_full_database_and_room_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not grow refuses lines; with room again the same people go on."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def remember(*args: object, **options: object) -> sqlite3.Connection:
        opened.append(connect(*args, **options))  # type: ignore[call-overload]
        return opened[-1]

    def allow(pages: int) -> None:
        for database in opened:
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed
                database.execute(f"PRAGMA max_page_count = {pages}")

    monkeypatch.setattr(sqlite3, "connect", remember)
    with run_chat(history=str(file)) as room:
        alice, bob = pair(room.port)
        allow(1)  # which SQLite takes as: not one page more than there are
        said = refusals = 0
        while not refusals:
            alice.send("x" * 1000)
            line = alice.next_line()
            refusals += line == NOT_STORED
            said += line == f"alice: {'x' * 1000}"
            assert refusals + said <= 100
        assert bob.lines(said) == [f"alice: {'x' * 1000}"] * said
        expect_refusals(alice, bob)
        allow(1_000_000)
        alice.send("after")
        bob.expect("alice: after")
    assert integrity(file) == "ok"
    assert consecutive(stored(file))


def test_who_joins_while_the_disk_refuses_hears_the_room_again(file: Path) -> None:
    """A newcomer to a room that cannot store gets in, is counted, and hears what is said later."""
    with run_server("--history", str(file)) as server:
        alice = Peer(server.port).join("alice")
        hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard))
        bob = Peer(server.port).introduce("bob 0")
        position = position_of(bob)
        bob.expect("* alice joined the chat")
        bob.send("/names")
        bob.expect("-> 2 here: alice, bob")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        alice.send("after")
        bob.expect("alice: after")
        alice.expect("alice: after")
    assert stored(file)[position + 1] == "alice: after"


# --- A file that is taken away -----------------------------------------------


def take_away(file: Path) -> Path:
    """Move a file, and return where it is."""
    return file.rename(file.with_name("elsewhere.db"))


def replace_by_copy(file: Path) -> None:
    """Put a copy in the place of a file."""
    copy = file.with_name("copy.db")
    shutil.copy(file, copy)
    copy.rename(file)


@pytest.mark.parametrize("part", ["", "-wal", "-shm"])
def test_file_that_is_moved_refuses_lines_until_it_is_back(file: Path, part: str) -> None:
    """Nobody sees a line that nobody would find in the file, and its author is told."""
    moved = Path(f"{file}{part}")
    with run_server("--history", str(file)) as server:
        alice, bob = pair(server.port)
        alice.send("before")
        alice.expect("alice: before")
        bob.expect("alice: before")
        away = take_away(moved)
        expect_refusals(alice, bob)
        server.expect_log(f"cannot store what is said: {re.escape(str(moved))} was moved")
        away.rename(moved)
        alice.send("after")
        bob.expect("alice: after")
    kept = stored(file)
    assert list(kept.values())[2:4] == ["alice: before", "alice: after"]
    assert consecutive(kept)
    assert integrity(file) == "ok"


@pytest.mark.parametrize("harm", [Path.unlink, replace_by_copy])
def test_file_that_is_gone_for_good_refuses_lines(file: Path, harm: Callable[[Path], None]) -> None:
    """A file that was removed, or has a copy in its place, is a disk that refuses."""
    with run_server("--history", str(file)) as server:
        alice, bob = pair(server.port)
        harm(file)
        expect_refusals(alice, bob)
        server.expect_log(r"cannot store what is said: .* was (moved or removed|replaced)")
        assert server.stop() == 0


def test_link_that_is_turned_elsewhere_refuses_lines(file: Path) -> None:
    """A name that leads to another file now is no place to find what was said."""
    target = file.with_name("target.db")
    file.symlink_to(target)
    with run_server("--history", str(file)) as server:
        alice, bob = pair(server.port)
        file.unlink()
        file.symlink_to(file.with_name("other.db"))
        expect_refusals(alice, bob)
        file.unlink()
        file.symlink_to(target)
        alice.send("after")
        bob.expect("alice: after")


def test_file_that_goes_while_lines_are_stored_has_none_of_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines refused because the file went just before their commit are not in it when it is back.

    Whoever said them says them again, or they would stand there twice.
    """
    with run_chat(history=str(file)) as room:
        assert isinstance(room.history, FileHistory)
        alice, bob = pair(room.port)
        confirm = room.history._writer._confirm
        away: list[Path] = []

        def take_away_and_confirm(database: sqlite3.Connection, position: int) -> None:
            if not away:
                away.append(take_away(file))
            confirm(database, position)

        monkeypatch.setattr(room.history._writer, "_confirm", take_away_and_confirm)
        alice.send("once")
        alice.expect(NOT_STORED)
        away[0].rename(file)
        alice.send("once")
        alice.expect("alice: once")
        bob.expect("alice: once")
    assert list(stored(file).values()).count("alice: once") == 1
    assert consecutive(stored(file))


def test_second_server_does_not_begin_on_a_copy(file: Path) -> None:
    """A copy in the place of a running server's file is in use like the file itself."""
    with run_server("--history", str(file)) as server:
        alice, bob = pair(server.port)
        replace_by_copy(file)
        assert "is in use by another server" in refused(file)
        expect_refusals(alice, bob)


def test_server_whose_file_was_moved_leaves_that_of_another_alone(file: Path) -> None:
    """A server that ends takes nothing from the one that has begun at the place of its file."""
    parts = [Path(f"{file}{part}") for part in ("", *WAL_SIDE_FILES)]
    with run_server("--history", str(file)) as older:
        Peer(older.port).join("alice").send("old")
        older.expect_log("alice .* joined")
        for part in filter(Path.exists, parts):
            part.rename(part.with_name(f"old {part.name}"))
        with run_server("--history", str(file)) as newer:
            bob = Peer(newer.port).join("bob")
            assert older.stop() == 0
            bob.send("new")
            bob.expect("bob: new")
            newer.ask_to_end(signal.SIGKILL)
            assert newer.wait() == -signal.SIGKILL
    assert list(stored(file).values()) == ["* bob joined the chat", "bob: new"]
    assert integrity(file) == "ok"


def test_file_is_whole_after_the_end_though_another_program_has_it_open(file: Path) -> None:
    """What stands in the file alone, without its log, is all that was said."""
    with run_server("--history", str(file)) as server:
        alice = Peer(server.port).join("alice")
        with contextlib.closing(sqlite3.connect(file)) as other:
            assert other.execute("SELECT count(*) FROM lines").fetchone() == (1,)
            alice.send("one", "/quit")
            alice.expect_eventually("-> bye")
            assert server.stop() == 0
            copy = Path(shutil.copy(file, file.with_name("copy.db")))
    assert list(stored(copy).values())[1:] == ["alice: one", "* alice left the chat"]


def test_end_leaves_one_file_that_its_owner_alone_can_read(file: Path) -> None:
    """The log beside the file is gone at the end, and nobody else can read either of them."""
    before = os.umask(0)
    try:
        with run_server("--history", str(file)) as server:
            Peer(server.port).join("alice")
            modes = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("room.db", "room.db-wal", "room.db-shm"), 0o600)
    assert list(file.parent.iterdir()) == [file]


# --- A file that another program has locked ----------------------------------


@contextlib.contextmanager
def locked(file: Path) -> Iterator[sqlite3.Connection]:
    """Have another program write to a file for a while."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other


def test_room_waits_for_a_locked_file_and_says_so(file: Path) -> None:
    """People are told that the room waits; what is said meanwhile is seen when it goes on."""
    with run_server("--history", str(file), TELL_WAITING=0.2) as server:
        alice, bob = pair(server.port)
        with locked(file) as other:
            alice.send("patience")
            for peer in (alice, bob):
                peer.expect("-> the room is waiting; what you say is kept")
            server.expect_log("is locked")
            other.execute("COMMIT")
            for peer in (alice, bob):
                peer.expect("-> the room goes on", "alice: patience")
    assert "alice: patience" in stored(file).values()


def test_nobody_is_told_of_a_short_wait(file: Path) -> None:
    """A file that is locked for a moment holds up what is said for that moment."""
    with run_chat(history=str(file)) as room:
        assert isinstance(room.history, FileHistory)
        writer = room.history._writer
        alice, bob = pair(room.port)
        with locked(file) as other:
            alice.send("patience")
            wait_until(writer._access._lock.locked, "the wait")
            other.execute("COMMIT")
            alice.expect("alice: patience")
            bob.expect("alice: patience")


def test_locked_file_is_read_while_the_room_waits(file: Path) -> None:
    """Another program that writes to the file keeps nobody from what is in it."""
    made(file, "needle")
    with run_chat(history=str(file)) as room:
        history = room.history
        with locked(file):
            assert [line for _, line in history.search("needle", 20)] == ["alice: needle"]
            assert history.last(1)[0].line == "* alice left the chat"
            assert history.fetch(history.oldest, history.end)[1][1] == b"alice: needle"


def test_server_ends_in_time_though_its_file_is_locked(file: Path) -> None:
    """What cannot be stored before the end is refused, and the end comes in time."""
    with run_server("--history", str(file), TELL_WAITING=0.2) as server:
        alice, bob = pair(server.port)
        with locked(file):
            alice.send("patience")
            alice.expect("-> the room is waiting; what you say is kept")
            server.ask_to_end()
            assert NOT_STORED in alice.rest()
            assert "alice: patience" not in bob.rest()
            assert server.wait() == 0
    assert "alice: patience" not in stored(file).values()


def test_locked_file_that_is_moved_too_is_not_waited_for(file: Path) -> None:
    """Who waits for a locked file that is taken away is refused at once."""
    with run_chat(history=str(file)) as room:
        assert isinstance(room.history, FileHistory)
        writer = room.history._writer
        alice = Peer(room.port).join("alice")
        with locked(file):
            alice.send("patience")
            wait_until(writer._access._lock.locked, "the wait")
            away = take_away(file)
            alice.expect(NOT_STORED)
            away.rename(file)
        alice.send("on")
        alice.expect("alice: on")


def test_server_starts_while_its_file_is_locked(file: Path) -> None:
    """A start writes nothing to a file that is in order, so it waits for nobody."""
    made(file, "one")
    with locked(file) as other, run_server("--history", str(file)) as server:
        bob = Peer(server.port).introduce("bob")
        other.execute("COMMIT")
        bob.expect_eventually("* bob joined the chat")


# --- Positions of another history --------------------------------------------


def test_position_of_a_room_whose_clock_was_ahead_gives_all_that_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who comes back to a room that restarted with its clock set back misses nothing of it."""
    with run_chat() as room:
        alice = Peer(room.port).join("alice")
        alice.send("one")
        alice.expect("alice: one")
        end = room.history.end
    with monkeypatch.context() as earlier:
        now = time.time() - 3600
        earlier.setattr(time, "time", lambda: now)
        room = ChatServer(port=0, rate_limit=0.0)
    with room:
        bob = Peer(room.port).join("bob")
        bob.send("two")
        bob.expect("bob: two")
        alice = Peer(room.port).introduce(f"alice {end}")
        assert position_of(alice) == room.history.first < end
        alice.expect("* bob joined the chat", "bob: two", "* alice joined the chat")
        bob.send("/quit")
        bob.rest()
        alice.expect("* bob left the chat")
        alice.send("/quit")
        alice.rest()


def test_position_beyond_a_file_gives_what_memory_would_hold(file: Path) -> None:
    """Who brings a position of another file gets the newest lines, not all of the years before."""
    many(made(file, "one"), 1000)
    history = FileHistory(str(file), retained=100)
    assert history.start_for(history.end + 1, history.end) == history.end - 100
    assert history.start_for(history.end, history.end) == history.end
    assert history.start_for(0, history.end) == history.oldest
    history.close()


# --- Bans in the file --------------------------------------------------------


def test_ban_made_while_another_is_being_stored_is_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two bans made at the same time, both are there after a restart."""
    with run_chat(history=str(file)) as room:
        Peer(room.port).join("alice")
        alice = session_of(room, "alice")
        append = room.history.append
        commits: list[int] = []

        def ban_meanwhile(
            lines: list[bytes], bans: list[Ban] | None = None, *others: object
        ) -> None:
            append(lines, bans)
            commits.append(len(bans or ()))
            if commits == [1]:
                hand_in(room, Banned(alice, "carol", 0.0, "", 0.0))

        monkeypatch.setattr(room.history, "append", ban_meanwhile)
        hand_in(room, Promoted(alice), Banned(alice, "bob", 0.0, "", 0.0))
        wait_until(lambda: len(commits) == 2, "both commits")
    with ChatServer(port=0, history=str(file)) as room:
        assert [ban.name for ban in room.broadcaster.room.bans] == ["bob", "carol"]
