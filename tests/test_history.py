"""A durable history: what anyone has seen is in the file, and the room goes on from there."""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import resource
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from chat import (
    Peer,
    hand_in,
    pair,
    run_briefly,
    run_chat,
    run_server,
    session_of,
    wait_until,
)
from trust import consecutive, integrity, position_of, stored

from server import Ban, Banned, ChatServer, Promoted

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\dZ"
WAL_SIDE_FILES = ("-wal", "-shm", "-journal")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is not there yet, in a folder that needs care in an address."""
    folder = tmp_path / "a room? 100% #1"
    folder.mkdir()
    return folder / "room.db"


def made(file: Path, *texts: str) -> Path:
    """Let alice say something in a room that keeps it, and return the file."""
    with run_chat(history=str(file)) as room:
        alice = Peer(room.port).join("alice")
        alice.send(*texts, "/quit")
        alice.rest()
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


def test_times_are_those_at_which_it_was_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/history after a restart shows when a line was said, not when the server started."""
    day = calendar.timegm((2021, 3, 4, 5, 6, 7, 0, 0, 0))
    with monkeypatch.context() as then:
        then.setattr(time, "time", lambda: day)
        made(file, "long ago")
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).join("bob")
        bob.send("/search long ago")
        bob.expect("-> 2021-03-04 05:06Z alice: long ago")


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


def test_million_lines_are_searched(file: Path) -> None:
    """A word in a file of a million lines is found, first line or last, and nothing else."""
    made(file, "the first needle")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute(
            "INSERT INTO lines WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
            " WHERE i < 1000000) SELECT (SELECT max(position) FROM lines) + i, i, 'said', 'carol',"
            " 'some hay number ' || i FROM n"
        )
    with run_chat(history=str(file)) as room:
        bob = Peer(room.port).join("bob")
        bob.send("/search needle", "/search number 777777", "/search nothing", "on")
        bob.expect_match(f"-> {STAMP} alice: the first needle")
        bob.expect_match(f"-> {STAMP} carol: some hay number 777777")
        bob.expect("-> nobody said nothing", "bob: on")


def test_rounds_go_on_while_a_search_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that takes its time holds up nobody but who asked."""
    with run_chat(history=str(file)) as room:
        alice, bob = pair(room.port)
        search, begun, may_end = room.history.last, threading.Event(), threading.Event()

        def search_long(count: int, word: str = "") -> list[tuple[float, str]]:
            begun.set()
            assert may_end.wait(15)
            return search(count, word)

        monkeypatch.setattr(room.history, "last", search_long)
        alice.send("/search hello")
        assert begun.wait(15)
        for number in range(20):
            bob.send(f"hello {number}")
            bob.expect(f"bob: hello {number}")
            alice.expect(f"bob: hello {number}")
        may_end.set()
        for number in range(20):
            alice.expect_match(f"-> {STAMP} bob: hello {number}")


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


def test_flipped_page_is_found(file: Path) -> None:
    """A history with one page overwritten is refused and left as it is."""
    made(file, *("x" * 500 for _ in range(200)))
    data = bytearray(file.read_bytes())
    half = len(data) // 2 // 4096 * 4096
    data[half : half + 4096] = bytes(byte ^ 0xFF for byte in data[half : half + 4096])
    file.write_bytes(data)
    assert "damaged" in untouched(file)


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

        def ban_meanwhile(lines: list[bytes], bans: list[Ban] | None = None) -> None:
            append(lines, bans)
            commits.append(len(bans or ()))
            if commits == [1]:
                hand_in(room, Banned(alice, "carol", 0.0, "", 0.0))

        monkeypatch.setattr(room.history, "append", ban_meanwhile)
        hand_in(room, Promoted(alice), Banned(alice, "bob", 0.0, "", 0.0))
        wait_until(lambda: len(commits) == 2, "both commits")
    with ChatServer(port=0, history=str(file)) as room:
        assert [ban.name for ban in room.broadcaster.room.bans] == ["bob", "carol"]
