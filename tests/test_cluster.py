"""A room on several machines: real servers, real clients and a real PostgreSQL."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import postgres
import pytest
from chat import (
    DEADLINE,
    STOP,
    Peer,
    Server,
    no_leaks,
    run_chat,
    run_server,
    stopping,
    wait_until,
)
from clients import Shown, chatting, flush
from postgres import Postgres
from proxy import CLOSE, DOWN, STALL, Fault, How, Proxy

import client
from client import ChatClient
from server import (
    Asked,
    Away,
    ChatServer,
    Database,
    Entered,
    Handed,
    HistoryError,
    Keeper,
    Outcome,
    Room,
    SharedHistory,
    SharedLog,
    Turn,
    prepare,
)

KEY = "0123456789abcdef"
SHORT = {"ALIVE": 2.0, "EMPTY_ROUND": 0.5}  # so that a test need not wait for ten seconds

WHY_NOT = postgres.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "all is there"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    """A PostgreSQL for all tests of this file."""
    with postgres.folder() as folder, Postgres(postgres.owned(folder / "one")).create() as one:
        yield one


NUMBERS = itertools.count()


@pytest.fixture
def database(cluster: Postgres) -> Iterator[str]:
    """The address of an empty database."""
    name = f"test{next(NUMBERS)}"
    cluster.sql(f"CREATE DATABASE {name}")
    yield cluster.address(name)
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def servers(address: str, count: int, *options: str, **constants: float) -> Iterator[list[Server]]:
    """Run servers of one room."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                run_server("--history", address, "--rate-limit", "0", *options, **constants)
            )
            for _ in range(count)
        ]


@contextlib.contextmanager
def one_more(address: str, end: int = signal.SIGTERM, /, **constants: float) -> Iterator[Server]:
    """Run a server that ends before the others, and before its peers do, by a signal."""
    server = Server("--history", address, "--rate-limit", "0", **constants)
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        yield server
        server.stop(end)
        assert "Traceback" not in server.log(), server.log()
    finally:
        server.end()


def suspend(server: Server) -> None:
    """Suspend a server, and wait until it is."""
    server.ask_to_end(signal.SIGSTOP)
    tasks = Path(f"/proc/{server.pid}/task")
    stats = [task / "stat" for task in tasks.iterdir()]
    wait_until(lambda: all(_state(stat) in "T" for stat in stats), "it to be suspended")


def _state(stat: Path) -> str:
    """Return the state of a thread; T, also for one that has ended by now."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "T"


def wait_for_place(port: int, answer: str) -> Peer:
    """Return a peer who has come back to a place, when there is one who can give it."""
    peer = Peer(port).introduce(answer)
    peer.expect_match("-> Welcome back, .*")
    return peer


def expect_after_wait(peer: Peer, line: str) -> None:
    """Expect that a room that waited goes on, and a line that was kept meanwhile."""
    assert {peer.next_line(), peer.next_line()} == {"-> the room goes on", line}


def test_two_servers_are_one_room(database: str) -> None:
    """What is said at one is heard at both, in one order, and people of both are here."""
    with servers(database, 2) as (one, two):
        alice = Peer(one.port).introduce("alice -0")
        alice.expect_match("-> Welcome, alice! You are the first.*")
        alice.expect_match("-> at .*")
        alice.expect("* alice joined the chat")
        bob = Peer(two.port).introduce("bob")
        bob.expect_match("-> Welcome, bob! .* Already here: alice")
        bob.expect("* alice joined the chat", "* bob joined the chat")
        alice.expect("* bob joined the chat")
        alice.send("hello", "/me waves", "/msg bob psst", "/names", "over")
        alice.expect("alice: hello", "** alice waves", "-> to bob: psst", "-> 2 here: alice, bob")
        alice.expect("alice: over")
        bob.expect("alice: hello", "** alice waves", "[from alice] psst", "alice: over")
        bob.send("/nick rob", "/reply back")
        bob.expect("-> you are now rob", "* bob is now rob", "-> to alice: back")
        alice.expect("* bob is now rob", "[from rob] back")
        bob.send("/quit")
        bob.expect("-> bye")
        alice.expect("* rob left the chat")


def test_private_lines_stand_in_their_place_on_all_servers(database: str) -> None:
    """Private lines and the room's come in the order in which they were sent, across servers."""
    with servers(database, 2) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        sent, expected = [], []
        for number in range(200):
            sent += [f"/msg bob private {number}", f"public {number}"]
            expected += [f"[from alice] private {number}", f"alice: public {number}"]
        alice.send(*sent)
        bob.expect(*expected)


def test_all_hear_one_order(database: str) -> None:
    """Three who flood three servers at once are heard in the same order everywhere."""
    with servers(database, 3) as three:
        peers = [Peer(one.port).join(f"peer{number}") for number, one in enumerate(three)]
        for peer in peers[:2]:
            peer.expect_eventually("* peer2 joined the chat")
        for number, peer in enumerate(peers):
            peer.send(*(f"{number} {line}" for line in range(1000)))
        heard = [peer.lines(3000) for peer in peers]
        assert heard[0] == heard[1] == heard[2]
        for number in range(3):
            own = [line for line in heard[0] if line.startswith(f"peer{number}: ")]
            assert own == [f"peer{number}: {number} {line}" for line in range(1000)]


def test_of_fifty_that_claim_one_name_on_three_servers_one_gets_it(database: str) -> None:
    """A name is given once, whichever server is asked."""
    with servers(database, 3) as three:
        peers = [Peer(three[number % 3].port) for number in range(50)]
        for peer in peers:
            peer.expect("NICK")
        for peer in peers:
            peer.send("alice")
        answers = [peer.next_line() for peer in peers]
        assert sum(line.startswith("-> Welcome") for line in answers) == 1
        assert answers.count("-> the name alice is taken; choose another") == 49


def test_operators_rule_over_all_servers(database: str, tmp_path: Path) -> None:
    """A kick and a ban hold on every server, and who is an operator is one everywhere."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    with servers(database, 2, "--op-password-file", str(password)) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        alice.send("/op secret", "/kick bob enough")
        alice.expect("-> you are an operator; /kick, /ban, /unban and /bans are yours")
        alice.expect("* bob was kicked by alice: enough", "-> bob was put out")
        bob.expect("-> you were kicked by alice: enough", "* bob was kicked by alice: enough")
        bob.expect_closed()
        alice.send("/ban bob 5 still")
        alice.expect_match("-> bob may not come in until .*: still")
        for server in one, two:
            Peer(server.port).introduce("bob").expect_match("-> you are banned by alice until .*")


def test_a_place_is_taken_back_on_another_server(database: str) -> None:
    """Name and key take the place at once, with all that was missed, private lines too."""
    with servers(database, 2) as (one, two):
        carol = Peer(two.port).join("carol")
        ghost = Peer(one.port).introduce(f"alice -0+0 {KEY}")
        ghost.expect_match("-> Welcome, alice!.*")
        position = int(ghost.expect_match(r"-> at (\d+)\+0")[1])
        carol.expect("* alice joined the chat")
        ghost.expect("* alice joined the chat")
        carol.send("/msg alice one", "aloud", "/msg alice two")
        carol.expect("-> to alice: one", "carol: aloud", "-> to alice: two")
        ghost.expect("[from carol] one", "carol: aloud", "[from carol] two")
        alice = Peer(two.port).introduce(f"alice {position + 1}+1 {KEY}")
        alice.expect("-> Welcome back, alice!", f"-> at {position + 1}+1")
        alice.expect("carol: aloud", "[from carol] two")
        ghost.expect_closed()
        carol.expect_nothing()


def test_who_was_at_a_killed_server_leaves_after_their_time(database: str) -> None:
    """Some time after a server's end who has no key has left; who has one may come back."""
    with servers(database, 1, **SHORT) as (one,):
        alice = Peer(one.port).join("alice")
        with one_more(database, signal.SIGKILL, **SHORT) as two:
            Peer(two.port).join("bob")
            Peer(two.port).introduce(f"carol -0 {KEY}")
            alice.expect("* bob joined the chat", "* carol joined the chat")
        alice.send("/names")
        alice.expect("-> 3 here: alice, bob, carol", "* bob left the chat")
        carol = Peer(one.port).introduce(f"carol -0 {KEY}")
        carol.expect("-> Welcome back, carol!")
        alice.send("/names")
        alice.expect("-> 2 here: alice, carol")


def test_a_server_that_ends_in_good_order_is_gone_at_once(database: str) -> None:
    """Its people without a key have left when it has ended."""
    with servers(database, 1) as (one,):
        alice = Peer(one.port).join("alice")
        with one_more(database) as two:
            bob = Peer(two.port).join("bob")
            alice.expect("* bob joined the chat")
        bob.expect("-> the server is shutting down")
        bob.expect_closed()
        alice.expect("* bob left the chat")


def test_a_suspended_server_begins_anew(database: str) -> None:
    """A server that was silent for too long ends its connections; what it had counts no more."""
    with servers(database, 2, **SHORT) as (one, two):
        alice, dave = Peer(one.port).join("alice"), Peer(two.port).join("dave")
        bob = Peer(two.port).introduce(f"bob -0+0 {KEY}")
        bob.expect_match("-> Welcome, bob!.*")
        alice.expect("* dave joined the chat", "* bob joined the chat")
        suspend(two)
        bob.send("said to a server that is over")
        try:
            alice.expect("* dave left the chat")
            again = wait_for_place(one.port, f"bob -0+0 {KEY}")
            again.expect_match("-> at .*")
            again.send("here")
            alice.expect("bob: here")
        finally:
            two.ask_to_end(signal.SIGCONT)
        two.expect_log("silent for too long")
        assert "bob: here" not in bob.rest()
        dave.rest()
        alice.send("over")
        again.expect("bob: here", "alice: over")
        alice.expect("alice: over")
        Peer(two.port).join("carol").send("well")
        alice.expect("* carol joined the chat", "carol: well")


def test_a_server_that_starts_late_has_all(database: str) -> None:
    """It serves what was said before it started, also what only the table has."""
    quick = {"KEEP_LOOK": 0.1, "POINT_LINES": 500}
    with servers(database, 1, **quick) as (one,):
        alice = Peer(one.port).introduce("alice -0")
        alice.expect_match("-> Welcome, alice!.*")
        position = int(alice.expect_match(r"-> at (\d+)")[1])
        alice.send("needle", *(f"line {number}" for number in range(3000)))
        alice.expect_eventually("alice: line 2999")
        with servers(database, 1, RETAINED=1000) as (two,):
            bob = Peer(two.port).introduce(f"bob {position}")
            bob.expect_match("-> Welcome, bob!.*")
            bob.expect(f"-> at {position}", "* alice joined the chat", "alice: needle")
            bob.expect(*(f"alice: line {number}" for number in range(3000)))
            bob.send("/search needle", "/history 1")
            bob.expect("* bob joined the chat")
            bob.expect_match("-> .*Z alice: needle")
            bob.expect_match(r"-> .*Z \* bob joined the chat")


def test_points_are_written_and_the_log_is_trimmed(cluster: Postgres, database: str) -> None:
    """By two servers at once, and both go on; private text is in no table soon after."""
    quick = {"KEEP_LOOK": 0.05, "POINT_SECONDS": 0.2, "TRIM_SECONDS": 0, "CONFIRM": 0.1}
    with servers(database, 2, **quick) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        for number in range(20):
            alice.send(f"/msg bob xyzzy {number}", f"line {number}")
            bob.expect(f"[from alice] xyzzy {number}", f"alice: line {number}")
        name = database.rpartition("/")[2]
        secret = "SELECT (SELECT count(*) FROM chat.rounds WHERE entries LIKE '%xyzzy%')"
        secret += " + (SELECT count(*) FROM chat.points WHERE state LIKE '%xyzzy%')"
        wait_until(lambda: cluster.sql(secret, name) == "0", "private text to be gone")
        lines = "SELECT count(*), count(DISTINCT position), max(position) - min(position) + 1"
        wait_until(
            lambda: cluster.sql(f"{lines} FROM chat.lines", name).split("|") == ["22"] * 3,
            "all lines to be in the table",
        )
        bob.send("over")
        alice.expect_eventually("bob: over")


def test_the_database_is_away_for_a_while(cluster: Postgres, database: str) -> None:
    """People are told, what they say is kept, others cannot come in, and it goes on by itself."""
    with servers(database, 2) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        cluster.signal(signal.SIGSTOP)
        try:
            alice.send("kept")
            for peer in alice, bob:
                peer.expect("-> the room is waiting; what you say is kept")
            bob.send("/names", "/history 1")
            bob.expect("-> 2 here: alice, bob")
            bob.expect_match(r"-> .* \* bob joined the chat")
            Peer(two.port).introduce("carol").expect("-> the room is waiting; try again later")
        finally:
            cluster.signal(signal.SIGCONT)
        for peer in alice, bob:
            expect_after_wait(peer, "alice: kept")
        Peer(two.port).join("carol")


@pytest.mark.slow
def test_the_database_is_away_for_half_a_minute(cluster: Postgres, database: str) -> None:
    """However long it is away, nobody is gone for it, and all that was said comes, once."""
    with servers(database, 2) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        cluster.kill()
        alice.send(*(f"{number}" for number in range(100)))
        for peer in alice, bob:
            peer.expect("-> the room is waiting; what you say is kept")
        until = time.monotonic() + 30
        while time.monotonic() < until:  # it answers who has nothing waiting, all the time
            bob.send("/names")
            bob.expect("-> 2 here: alice, bob")
            assert not wait_for_line(bob, 0.5)
        cluster.start()
        said = [f"alice: {number}" for number in range(100)]
        for peer in alice, bob:
            lines = [peer.next_line() for _ in range(101)]
            assert sorted(lines) == sorted([*said, "-> the room goes on"])
            assert [line for line in lines if line in said] == said
        bob.send("/names")
        bob.expect("-> 2 here: alice, bob")


def wait_for_line(peer: Peer, seconds: float) -> bool:
    """Tell whether something comes within so many seconds."""
    return bool(select.select([peer.sock], [], [], seconds)[0])


def test_what_waits_for_the_database_is_bounded(cluster: Postgres, database: str) -> None:
    """Clients are read from no further when so many lines wait, and nothing of them is lost."""
    text = "x" * 100
    with servers(database, 1, MAX_QUEUED=500) as (one,):
        alice, bob = Peer(one.port).join("alice"), Peer(one.port).join("bob")
        cluster.signal(signal.SIGSTOP)
        try:
            lines = [f"{number:06}{text}" for number in range(200_000)]
            taken = alice.send_until_blocked("".join(f"{line}\n" for line in lines).encode())
            assert taken < 20_000_000
        finally:
            cluster.signal(signal.SIGCONT)
        whole = taken // (len(lines[0]) + 1)
        said = [f"alice: {line}" for line in lines[:whole]]
        heard = bob.lines_until(said[-1])
        assert [line for line in heard if line.startswith("alice: ")] == said


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """Give a folder on a disk of its own; skip the test where there can be none."""
    with postgres.folder() as folder:
        disk = folder / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(disk)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip("there can be no small disk here")
        try:
            yield disk
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_of_the_database_keeps_the_room_waiting() -> None:
    """Nothing is seen that is not kept, it is logged why, and all goes on when there is space."""
    with small_disk("120m") as disk, Postgres(postgres.owned(disk / "one")).create() as cluster:
        cluster.sql("CREATE DATABASE chat")
        filler = disk / "filler"
        with servers(cluster.address("chat"), 1) as (one,):
            alice, bob = Peer(one.port).join("alice"), Peer(one.port).join("bob")
            alice.expect("* bob joined the chat")
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(65536))
            said = [f"{number:05}{'x' * 900}" for number in range(30_000)]
            sent = alice.send_until_blocked("".join(f"{line}\n" for line in said).encode())
            heard = bob.lines_until("-> the room is waiting; what you say is kept")
            one.expect_log("No space left on device")
            filler.unlink()
            said = [f"alice: {line}" for line in said[: sent // (len(said[0]) + 1)]]
            heard += bob.lines_until(said[-1])
            assert [line for line in heard if line.startswith("alice: ")] == said
            one.expect_log("the database answers again")
            with servers(cluster.address("chat"), 1) as (other,):
                carol = Peer(other.port).introduce("carol -1")
                carol.expect_eventually(said[-1])


def test_a_killed_database_comes_back_with_all(database: str, cluster: Postgres) -> None:
    """After kill -9 of the database, all that anyone has seen is there, each line once."""
    with servers(database, 2) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        for number in range(3):
            alice.send(*(f"{number} {line}" for line in range(50)))
            bob.expect(*(f"alice: {number} {line}" for line in range(10)))
            cluster.kill()
            cluster.start()
            rest = [f"alice: {number} {line}" for line in range(10, 50)]
            heard = bob.lines_until(rest[-1])
            assert [line for line in heard if not line.startswith("-> the room")] == rest


def test_a_terminated_connection_is_made_anew(cluster: Postgres, database: str) -> None:
    """Servers whose connections an administrator ends go on with new ones."""
    name = database.rpartition("/")[2]
    with servers(database, 2) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        for number in range(20):
            alice.send(f"line {number}")
            cluster.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
            )
            bob.expect(f"alice: line {number}")


# --- Failover ----------------------------------------------------------------


@pytest.fixture
def primary() -> Iterator[tuple[Postgres, Postgres]]:
    """A primary and its synchronous standby."""
    with postgres.folder() as folder, contextlib.ExitStack() as stack:
        first = stack.enter_context(Postgres(postgres.owned(folder / "first")).create())
        second = first.standby(postgres.owned(folder / "second"))
        yield first, stack.enter_context(second)


def both(first: Postgres, second: Postgres) -> str:
    """Return the address of whichever of two is the primary."""
    return f"postgresql://chat@127.0.0.1:{first.port},127.0.0.1:{second.port}/postgres"


def said(lines: list[str]) -> list[str]:
    """Return what was said of what a peer got, without the server's own words."""
    return [line for line in lines if not line.startswith("-> ")]


@pytest.mark.parametrize("old_comes_back", [False, True])
def test_a_standby_goes_on_with_all_that_was_seen(
    primary: tuple[Postgres, Postgres], old_comes_back: bool
) -> None:
    """The primary is killed amid talk and its standby promoted: each line is there, once."""
    first, second = primary
    with servers(both(first, second), 2, UNANSWERED=1.0) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        lines = [f"alice: {number}" for number in range(400)]
        for number in range(0, 400, 4):
            alice.send(*(line.removeprefix("alice: ") for line in lines[number : number + 4]))
            if number == 200:
                heard = bob.lines_until("alice: 150")
                first.kill()
                if old_comes_back:
                    first.start()
                second.promote()
        heard += bob.lines_until(lines[-1])
        assert said(heard) == lines
        assert said(alice.lines_until(lines[-1])) == lines
        late = Peer(two.port).introduce("late -1000")
        late.expect_match("-> Welcome, late!.*")
        assert said(late.lines_until("* late joined the chat"))[2:-1] == lines


def test_nothing_is_shown_that_is_not_on_both(primary: tuple[Postgres, Postgres]) -> None:
    """While the standby is away nobody sees what is said; it comes when the standby does."""
    first, second = primary
    with servers(both(first, second), 2, UNANSWERED=1.0) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        second.stop()
        alice.send("not yet")
        for peer in alice, bob:
            peer.expect("-> the room is waiting; what you say is kept")
        bob.send("/names")
        bob.expect("-> 2 here: alice, bob")
        second.start()
        for peer in alice, bob:
            expect_after_wait(peer, "alice: not yet")


def test_a_wait_that_is_cancelled_is_no_answer(primary: tuple[Postgres, Postgres]) -> None:
    """A commit whose wait for the standby somebody cancels is shown when the standby has it."""
    first, second = primary
    with servers(both(first, second), 1) as (one,):
        alice = Peer(one.port).join("alice")
        second.stop()
        alice.send("not yet")
        alice.expect("-> the room is waiting; what you say is kept")
        first.sql(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        )
        one.expect_log("a wait for a standby was cancelled")
        assert b"not yet" not in alice.arrived()
        second.start()
        expect_after_wait(alice, "alice: not yet")


# --- A network that swallows -------------------------------------------------


@pytest.mark.parametrize("how", [CLOSE, STALL])
def test_an_answer_that_is_swallowed_says_nothing_twice(
    cluster: Postgres, database: str, how: How
) -> None:
    """Wherever the answers of a conversation with the database end, each line is said once."""
    offsets = range(0, 1400, 35) if how is CLOSE else range(450, 1400, 190)
    name = database.rpartition("/")[2]
    quick = {"UNANSWERED": 0.3, "CONNECT": 0.3, "AGAIN": 0.01, "KEEP_LOOK": 1000.0}
    with servers(database, 1) as (two,), Proxy(cluster.port) as proxy:
        through = f"postgresql://chat@127.0.0.1:{proxy.port}/{name}"
        with one_more(through, **quick) as one:
            alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
            alice.expect("* bob joined the chat")
            for offset in offsets:
                proxy.plan(Fault(DOWN, offset, how))
                proxy.end(CLOSE)
                line = f"alice: line {offset}"
                alice.send(line)
                for peer in alice, bob:
                    assert said(peer.lines_until(line)) == [line]
            bob.expect_nothing()
            alice.close()


# --- What cannot be ----------------------------------------------------------


def refused(address: str, *options: str) -> str:
    """Return what a server says that cannot start."""
    server = Server("--history", address, *options)
    try:
        assert server.wait(DEADLINE) == 1
        assert "Traceback" not in server.log()
        return server.log().strip()
    finally:
        server.end()


def test_what_cannot_be_the_history_is_refused_in_one_line(
    cluster: Postgres, database: str
) -> None:
    """No server, no database, no right, another program's tables, another version or format."""
    name = database.rpartition("/")[2]
    where = f"postgresql://127.0.0.1/{name}"
    with servers(database, 1):
        pass
    assert refused(database, "--format", "utf-8") == (
        f"server.py: {where} is in ascii; start with --format ascii"
    )
    cluster.sql("UPDATE chat.room SET rules = 99", name)
    assert refused(database) == (f"server.py: {where} is used by another version; use that one")
    cluster.sql("COMMENT ON SCHEMA chat IS 'mine'", name)
    assert refused(database) == (
        f"server.py: {where} has a chat of another program; choose another"
    )
    remedy = "see that PostgreSQL runs there and lets this program in"
    nowhere = cluster.address("nowhere")
    assert refused(nowhere) == (
        "server.py: cannot use postgresql://127.0.0.1/nowhere:"
        f' database "nowhere" does not exist; {remedy}'
    )
    closed = f"postgresql://chat@127.0.0.1:{postgres.free_port()}/chat"
    assert refused(closed).startswith("server.py: cannot use postgresql://127.0.0.1/chat: ")
    secret = refused("postgresql://chat:hunter2@127.0.0.1/chat")
    assert secret.startswith("server.py: leave the password out of --history")
    assert "hunter2" not in secret


def test_an_old_postgresql_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lacks what is needed is told from a fit one by its version."""
    monkeypatch.setattr(Database, "version", property(lambda _: 140_012))
    with pytest.raises(HistoryError) as refused:
        prepare(Database(database), "ascii")
    assert str(refused.value).endswith("is older than PostgreSQL 15; use a newer one")


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_is_refused_in_one_line(cluster: Postgres, database: str, mode: str) -> None:
    """What keeps no connection for us, and tells nobody when others append, is no database."""
    with postgres.pooler(cluster, mode) as port:
        through = database.replace(f":{cluster.port}/", f":{port}/")
        assert refused(through).endswith("is a pooler; name PostgreSQL's own address")


def test_a_wrong_password_is_refused_in_one_line(
    cluster: Postgres, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's own file of passwords is asked, and what it has is shown nowhere."""
    name = database.rpartition("/")[2]
    cluster.sql(f"CREATE ROLE guest LOGIN PASSWORD 'right'; GRANT ALL ON DATABASE {name} TO guest")
    rules = cluster.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host all guest 127.0.0.1/32 scram-sha-256\n{before}")
    cluster.sql("SELECT pg_reload_conf()")
    passwords = tmp_path / "passwords"
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    address = database.replace("chat@", "guest@")
    try:
        passwords.write_text("*:*:*:guest:wrong-one\n")
        passwords.chmod(0o600)
        log = refused(address)
        assert 'password authentication failed for user "guest"; see that' in log
        assert "wrong-one" not in log
        passwords.write_text("*:*:*:guest:right\n")
        with servers(address, 1) as (one,):
            Peer(one.port).join("alice")
    finally:
        rules.write_text(before)
        cluster.sql("SELECT pg_reload_conf()")
        cluster.sql("DROP OWNED BY guest CASCADE; DROP ROLE guest", name)


def test_another_version_ends_a_running_server(cluster: Postgres, database: str) -> None:
    """A server whose rules are not the log's any more ends with one clear line."""
    server = Server("--history", database)
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        alice = Peer(server.port).join("alice")
        cluster.sql("UPDATE chat.room SET rules = 99", database.rpartition("/")[2])
        server.expect_log("is used by another version; use that one")
        alice.rest()
        assert server.wait() == 1
        assert "Traceback" not in server.log()
    finally:
        server.end()


def test_a_database_of_before_ends_a_running_server(cluster: Postgres, database: str) -> None:
    """Where the log is not what was read there before, nothing goes on from it."""
    name = database.rpartition("/")[2]
    server = Server("--history", database)
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        alice = Peer(server.port).join("alice")
        cluster.sql("UPDATE chat.room SET number = 0; DELETE FROM chat.rounds", name)
        server.expect_log("the database is not the one that it was")
        alice.rest()
        assert server.wait() == 1
    finally:
        server.end()


def test_a_read_only_database_keeps_the_room_waiting(cluster: Postgres, database: str) -> None:
    """A database that takes nothing is as good as away: one line in the log, nothing is lost."""
    name = database.rpartition("/")[2]
    with servers(database, 1) as (one,):
        alice = Peer(one.port).join("alice")
        cluster.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        cluster.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
        )
        alice.send("kept")
        alice.expect("-> the room is waiting; what you say is kept")
        assert one.log().count("is away") == 1
        cluster.sql(
            f"SET default_transaction_read_only = off;"
            f" ALTER DATABASE {name} RESET default_transaction_read_only"
        )
        expect_after_wait(alice, "alice: kept")
        one.expect_log("the database answers again")


def test_a_server_ends_in_time_without_its_database(cluster: Postgres, database: str) -> None:
    """SIGTERM ends a server within five seconds though the database does not answer."""
    server = Server("--history", database)
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        alice = Peer(server.port).join("alice")
        cluster.signal(signal.SIGSTOP)
        try:
            alice.send("never said")
            alice.expect("-> the room is waiting; what you say is kept")
            assert server.stop() == 0
        finally:
            cluster.signal(signal.SIGCONT)
        assert "alice: never said" not in alice.rest()
        assert "Traceback" not in server.log()
    finally:
        server.end()


# --- Clients that come back --------------------------------------------------


class Talkers:
    """Clients who talk through proxies, so that they can be led to any server."""

    def __init__(self, stack: contextlib.ExitStack, ports: list[int], count: int) -> None:
        self.proxies = [stack.enter_context(Proxy(ports[n % len(ports)])) for n in range(count)]
        self.chats = [
            stack.enter_context(chatting(proxy.port, f"talker{number}"))
            for number, proxy in enumerate(self.proxies)
        ]
        self.said: list[list[str]] = [[] for _ in self.chats]

    def talk(self, chance: random.Random) -> None:
        """Have somebody say something."""
        number = chance.randrange(len(self.chats))
        self.said[number].append(f"talker{number}: {len(self.said[number])}")
        self.chats[number][0].send(str(len(self.said[number]) - 1))

    def lead(self, former: int, port: int) -> None:
        """Have all who are at one server come to another."""
        for proxy in self.proxies:
            if proxy.server == former:
                proxy.server = port
                proxy.end(CLOSE)

    def check(self) -> None:
        """See that all that was said was heard by all, once and in one order."""
        for chat, _ in self.chats:
            flush(chat)
        for _, shown in self.chats:
            for own in self.said:
                shown.wait_for(own[-1])
        heard = [[line for line in shown.room if line[0] != "*"] for _, shown in self.chats]
        for number, own in enumerate(self.said):
            assert [line for line in heard[0] if line.startswith(f"talker{number}: ")] == own
        shortest = min(heard, key=len)
        assert all(one[-len(shortest) :] == shortest for one in heard)
        assert all(chat.failed == 0 for chat, _ in self.chats)


@pytest.fixture
def chance(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Clients that try again soon, and a source of chance whose seed a failing test prints."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.02)
    monkeypatch.setattr(client, "RETRY_MAX", 0.1)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_talk_goes_on_while_servers_are_killed(database: str, chance: random.Random) -> None:
    """Twelve who talk at three servers lose nothing and say nothing twice, whichever is killed."""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(one_more(database, **SHORT)) for _ in range(3)]
        talkers = Talkers(stack, [server.port for server in running], 12)
        for _ in range(8):
            for _ in range(60):
                talkers.talk(chance)
            victim = running.pop(chance.randrange(3))
            victim.stop(signal.SIGKILL)
            talkers.lead(victim.port, chance.choice(running).port)
            running.append(stack.enter_context(one_more(database, **SHORT)))
        talkers.check()


def test_talk_goes_on_while_servers_are_suspended(database: str, chance: random.Random) -> None:
    """The same holds for servers that are suspended past their time, and then go on."""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(one_more(database, **SHORT)) for _ in range(3)]
        talkers = Talkers(stack, [server.port for server in running], 12)
        witness = Peer(running[0].port).join("witness")
        for number in range(3):
            victim = running[1 + number % 2]
            ghost = Peer(victim.port).join("ghost")
            for _ in range(60):
                talkers.talk(chance)
            suspend(victim)
            talkers.lead(victim.port, running[0].port)
            for _ in range(60):
                talkers.talk(chance)
            witness.expect_eventually("* ghost left the chat")
            victim.ask_to_end(signal.SIGCONT)
            ghost.rest()
            victim.expect_log("silent for too long")
            talkers.lead(running[0].port, victim.port)
        talkers.check()


def test_talk_goes_on_while_a_server_is_cut_off(
    cluster: Postgres, database: str, chance: random.Random
) -> None:
    """A server that cannot reach the database is left by its clients, and comes back."""
    name = database.rpartition("/")[2]
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Proxy(cluster.port))
        cut = f"postgresql://chat@127.0.0.1:{link.port}/{name}"
        two = stack.enter_context(one_more(database, **SHORT))
        one = stack.enter_context(one_more(cut, **SHORT))
        talkers = Talkers(stack, [one.port, two.port], 12)
        ghost, witness = Peer(one.port).join("ghost"), Peer(two.port).join("witness")
        for _ in range(100):
            talkers.talk(chance)
        link.go_away()
        for _ in range(100):
            talkers.talk(chance)
        witness.expect_eventually("* ghost left the chat")
        talkers.lead(one.port, two.port)
        for _ in range(100):
            talkers.talk(chance)
        link.come_back()
        ghost.rest()
        talkers.lead(two.port, one.port)
        talkers.check()


def test_a_client_goes_to_the_next_server_by_itself(database: str, chance: random.Random) -> None:
    """A client that names two servers loses nothing when the one that it is at is killed."""
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(one_more(database, signal.SIGKILL))
        two = stack.enter_context(one_more(database))
        bob = Peer(two.port).join("bob")
        shown = Shown()
        where = f"127.0.0.1:{one.port},127.0.0.1:{two.port}"
        chat = ChatClient("alice", host=where, show=shown)
        chat.connect()
        chat.start()
        stack.callback(chat.leave)
        bob.expect("* alice joined the chat")
        for number in range(100):
            chat.send(f"line {number}")
            if number == 50:
                shown.wait_for("alice: line 20")
                one.stop(signal.SIGKILL)
        lines = [f"alice: line {number}" for number in range(100)]
        bob.expect(*lines)
        flush(chat)
        assert [line for line in shown.room if line[0] != "*"] == lines
        bob.send("/names")
        bob.expect("-> 2 here: bob, alice")


def test_a_client_leaves_a_server_that_has_it_wait(
    cluster: Postgres, database: str, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server cut off from the database keeps no client that knows another one."""
    monkeypatch.setattr(client, "PATIENCE", 1.0)
    name = database.rpartition("/")[2]
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Proxy(cluster.port))
        cut = f"postgresql://chat@127.0.0.1:{link.port}/{name}"
        two = stack.enter_context(one_more(database))
        one = stack.enter_context(one_more(cut))
        bob = Peer(two.port).join("bob")
        where = f"127.0.0.1:{one.port},127.0.0.1:{two.port}"
        chat = ChatClient("alice", host=where, show=Shown())
        chat.connect()
        chat.start()
        stack.callback(chat.leave)
        bob.expect("* alice joined the chat")
        link.go_away()
        chat.send("from where I was")
        bob.expect("alice: from where I was")
        chat.send("from here")
        bob.expect("alice: from here")
        link.come_back()
        chat.send("still once")
        bob.expect("alice: still once")


def test_talk_goes_on_through_a_failover(
    primary: tuple[Postgres, Postgres], chance: random.Random
) -> None:
    """Twelve who talk at three servers lose nothing when the database's primary is killed."""
    first, second = primary
    with contextlib.ExitStack() as stack:
        address = both(first, second)
        running = [stack.enter_context(one_more(address, UNANSWERED=1.0)) for _ in range(3)]
        talkers = Talkers(stack, [server.port for server in running], 12)
        for _ in range(150):
            talkers.talk(chance)
        talkers.chats[0][1].wait_for(talkers.said[0][0])
        first.kill()
        second.promote()
        for _ in range(150):
            talkers.talk(chance)
        talkers.check()


# --- What somebody may do to it ---------------------------------------------------


@contextlib.contextmanager
def failing(address: str) -> Iterator[Server]:
    """Run a server that will not go on, and see that it ends with one line and status 1."""
    server = Server("--history", address, "--rate-limit", "0")
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        yield server
        assert server.wait() == 1
        assert "Traceback" not in server.log()
    finally:
        server.end()


@pytest.mark.parametrize("entries", ["garbage", "[[99,1]]", '[[10,1,2,3,"new"]]', "{}"])
def test_a_row_that_cannot_be_read_ends_a_running_server(
    cluster: Postgres, database: str, entries: str
) -> None:
    """A row that is none of ours is told in one line, and what is behind it is not shown."""
    with failing(database) as server:
        alice = Peer(server.port).join("alice")
        cluster.sql(f"SELECT chat.append(1, 77, 1, '{entries}', 9999)", database.rpartition("/")[2])
        server.expect_log("of the history cannot be read")
        alice.rest()


@pytest.mark.parametrize("emptied", ["room", "points"])
def test_an_emptied_table_is_told_in_one_line(
    cluster: Postgres, database: str, emptied: str
) -> None:
    """Tables that lack what they must have are refused at the start."""
    with one_more(database):
        pass
    cluster.sql(f"DELETE FROM chat.{emptied}", database.rpartition("/")[2])
    assert "lacks a part of its tables; restore it" in refused(database)


def test_letters_that_the_database_lacks_are_not_promised(cluster: Postgres) -> None:
    """A room for all letters is not begun in a database that has only some."""
    cluster.sql(
        "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    )
    try:
        assert "is in LATIN1; make one WITH ENCODING" in refused(
            cluster.address("latin"), "--format", "utf-8"
        )
    finally:
        cluster.sql("DROP DATABASE latin WITH (FORCE)")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://a,b,c/chat?port=1,2",
        "postgresql://127.0.0.1/ch%c3%28at",
        "postgresql://chat:hunter%zz@127.0.0.1/chat",
        "postgresql://chat:hun/ter@127.0.0.1/chat",
        "postgresql://127.0.0.1/chat?sslpassword=hunter",
    ],
)
def test_a_mistyped_address_is_refused_and_not_shown(address: str) -> None:
    """What cannot be an address is refused, with nothing of it that may be a password."""
    with pytest.raises(HistoryError) as refusal:
        Database(address)
    told = str(refusal.value)
    assert "hun" not in told
    assert "ter@" not in told


def test_a_ban_lasts_as_long_as_was_said(database: str, tmp_path: Path) -> None:
    """Five minutes are five minutes, by the database's clock."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    with servers(database, 2, "--op-password-file", str(password)) as (one, two):
        alice, bob = Peer(one.port).join("alice"), Peer(two.port).join("bob")
        alice.expect("* bob joined the chat")
        alice.send("/op secret", "/ban bob 5")
        while not (found := re.search(r"until (\S+ \S+)Z", alice.next_line())):
            pass
        until = datetime.strptime(found[1], "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
        assert abs((until - datetime.now(UTC)).total_seconds() - 300) < 120
        bob.rest()


def test_a_ghost_goes_though_the_clock_was_set_back(cluster: Postgres, database: str) -> None:
    """The log's clock goes on from row to row when the database's is set back an hour."""
    name = database.rpartition("/")[2]
    with servers(database, 1, **SHORT) as (one,):
        alice = Peer(one.port).join("alice")
        with one_more(database, signal.SIGKILL, **SHORT) as two:
            Peer(two.port).join("bob")
            alice.expect("* bob joined the chat")
            body = cluster.sql("SELECT pg_get_functiondef('chat.append'::regproc)", name)
            now = "extract(epoch FROM clock_timestamp())"
            assert now in body
            cluster.sql(body.replace(now, f"{now} - 3600"), name)
            alice.send("an hour ago")
            alice.expect("alice: an hour ago")
        alice.expect("* bob left the chat")


def test_a_cancelled_wait_is_no_answer_though_nobody_warns(
    primary: tuple[Postgres, Postgres],
) -> None:
    """Nothing is shown that is not on both, whatever warnings the address asks for."""
    first, second = primary
    address = both(first, second) + "?options=-cclient_min_messages%3Derror"
    with servers(address, 1) as (one,):
        alice, bob = Peer(one.port).join("alice"), Peer(one.port).join("bob")
        alice.expect("* bob joined the chat")
        second.stop()
        alice.send("not yet")
        for peer in alice, bob:
            peer.expect("-> the room is waiting; what you say is kept")
        waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        first.sql(f"SELECT pg_cancel_backend(pid) {waiting}")
        one.expect_log("a wait for a standby was cancelled there")
        bob.send("/names")
        bob.expect("-> 2 here: alice, bob")
        second.start()
        expect_after_wait(alice, "alice: not yet")


def test_points_that_cannot_be_written_are_told(cluster: Postgres, database: str) -> None:
    """A database that takes rounds but no points is told of in the log, once, and its end too."""
    name = database.rpartition("/")[2]
    with servers(database, 1, KEEP_LOOK=0.1, POINT_LINES=50) as (one,):
        alice = Peer(one.port).join("alice")
        cluster.sql(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END$$;"
            " CREATE TRIGGER no BEFORE INSERT ON chat.lines FOR EACH ROW EXECUTE FUNCTION no()",
            name,
        )
        alice.send(*(f"line {number}" for number in range(100)))
        one.expect_log("cannot keep what is said for who starts late: full")
        cluster.sql("DROP TRIGGER no ON chat.lines", name)
        one.expect_log("what is said is kept again for who starts late")
        assert one.log().count("cannot keep") == 1


def test_a_server_has_three_connections(cluster: Postgres, database: str) -> None:
    """One follows the log, one keeps points, and one is for all who ask: they are few there."""
    name = database.rpartition("/")[2]
    with servers(database, 1, KEEP_LOOK=0.1, POINT_LINES=100, RETAINED=50) as (one,):
        alice = Peer(one.port).join("alice")
        alice.send(*(f"line {number}" for number in range(500)))
        alice.expect_eventually("alice: line 499")
        kept = "SELECT count(*) > 450 FROM chat.lines"
        wait_until(lambda: cluster.sql(kept, name) == "t", "the lines to be in the table")
        alice.send("/search line 7", "/history 200")
        alice.expect_match("-> .* alice: line 7")
        bob = Peer(one.port).send("bob -400")
        bob.expect_eventually("alice: line 150")
        bob.expect_eventually("alice: line 499")
        there = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
        assert cluster.sql(there, "postgres") == "3"


def test_a_server_ends_in_time_while_somebody_searches(cluster: Postgres, database: str) -> None:
    """SIGTERM ends a server in time though a search waits for the database."""
    name = database.rpartition("/")[2]
    with one_more(database, KEEP_LOOK=0.1, POINT_LINES=100) as one:
        alice = Peer(one.port).join("alice")
        alice.send(*(f"line {number}" for number in range(500)))
        alice.expect_eventually("alice: line 499")
        kept = "SELECT count(*) > 450 FROM chat.lines"
        wait_until(lambda: cluster.sql(kept, name) == "t", "the lines to be in the table")
    server = Server("--history", database, "--rate-limit", "0", RETAINED=50)
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        bob = Peer(server.port).join("bob")
        bob.send("/search line 7")
        bob.expect_match("-> .* alice: line 7.*")
        cluster.signal(signal.SIGSTOP)
        try:
            bob.send("/search needle", "said")
            assert server.stop() == 0
        finally:
            cluster.signal(signal.SIGCONT)
    finally:
        server.end()


def test_lines_keep_the_time_at_which_they_were_said(cluster: Postgres, database: str) -> None:
    """Whoever starts later and reads many rounds at once gives each line the time of its own."""
    name = database.rpartition("/")[2]
    with one_more(database, KEEP_LOOK=1000.0) as one:
        alice = Peer(one.port).join("alice")
        for line in "an hour ago", "just now":
            alice.send(line)
            alice.expect(f"alice: {line}")
        alice.close()
    cluster.sql(
        "UPDATE chat.rounds SET time = time - 3600 WHERE number <="
        " (SELECT number FROM chat.rounds WHERE entries LIKE '%an hour ago%')",
        name,
    )
    with servers(database, 1) as (two,):
        bob = Peer(two.port).join("bob")
        bob.send("/search an hour ago", "/search just now")
        found = [bob.expect_match(r"-> (\S+ \S+)Z alice: .*")[1] for _ in range(2)]
        first, second = (datetime.strptime(time, "%Y-%m-%d %H:%M") for time in found)
        assert 3500 < (second - first).total_seconds() < 3700


def test_a_server_used_from_python_ends_when_it_cannot_go_on(
    cluster: Postgres, database: str
) -> None:
    """Its people are told and let go, though nobody handles a signal there."""
    with ChatServer(port=0, history=database) as server:
        alice = Peer(server.port).join("alice")
        cluster.sql("UPDATE chat.room SET rules = 99", database.rpartition("/")[2])
        assert alice.rest()[-1] == "-> the server is shutting down"
        assert "another version" in server.history.failure


def test_a_newcomer_whose_claim_is_under_way_is_told(cluster: Postgres, database: str) -> None:
    """Who was about to come in when the database goes is told, and comes in when it is back."""
    with servers(database, 1) as (one,):
        alice = Peer(one.port).join("alice")
        cluster.signal(signal.SIGSTOP)
        try:
            carol = Peer(one.port).introduce("carol")
            alice.expect("-> the room is waiting; what you say is kept")
            carol.expect("-> the room is waiting; try again later")
        finally:
            cluster.signal(signal.SIGCONT)
        carol.expect_match("-> Welcome, carol!.*")
        assert {alice.next_line(), alice.next_line()} == {
            "-> the room goes on",
            "* carol joined the chat",
        }


def test_at_the_door_of_a_server_that_begins_anew(database: str) -> None:
    """Who has not given a name yet when their server begins anew is asked to come again."""
    with servers(database, 2, **SHORT) as (one, two):
        alice, dave = Peer(one.port).join("alice"), Peer(two.port).join("dave")
        alice.expect("* dave joined the chat")
        late = Peer(two.port)
        late.expect("NICK")
        suspend(two)
        alice.expect("* dave left the chat")
        two.ask_to_end(signal.SIGCONT)
        two.expect_log("silent for too long")
        dave.rest()
        late.send("late")
        late.expect("-> the room is waiting; try again later")
        late.expect_closed()
        wait_for_admission(two.port, "late")


def wait_for_admission(port: int, name: str) -> None:
    """Come in as soon as the server lets somebody."""

    def is_let_in() -> bool:
        line = Peer(port).introduce(name).next_line()
        return line.startswith("-> Welcome")

    wait_until(is_let_in, "the server to let somebody in")


def test_what_no_point_has_is_bounded(cluster: Postgres, database: str) -> None:
    """Where points cannot be written for long people are told, and talk is kept, not lost."""
    name = database.rpartition("/")[2]
    with servers(database, 1, KEEP_LOOK=0.05, POINT_LINES=20, MAX_UNKEPT=50) as (one,):
        alice, bob = Peer(one.port).join("alice"), Peer(one.port).join("bob")
        alice.expect("* bob joined the chat")
        cluster.sql(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END$$;"
            " CREATE TRIGGER no BEFORE INSERT ON chat.lines FOR EACH ROW EXECUTE FUNCTION no()",
            name,
        )
        waiting, said, line = "-> the room is waiting; what you say is kept", 0, ""
        while line != waiting:
            alice.send(f"line {said}")
            line = alice.next_line()
            assert line in (f"alice: line {said}", waiting)
            said += 1
        bob.expect(*(f"alice: line {number}" for number in range(said - 1)), waiting)
        bob.send("/names")  # which is answered, while what alice said last is not shown
        bob.expect("-> 2 here: alice, bob")
        Peer(one.port).introduce("carol").expect("-> the room is waiting; try again later")
        cluster.sql("DROP TRIGGER no ON chat.lines", name)
        expect_after_wait(alice, f"alice: line {said - 1}")
        expect_after_wait(bob, f"alice: line {said - 1}")


def test_who_waits_for_a_point_goes_on_when_it_is_written(database: str) -> None:
    """Who said more than memory may have alone is read from again at once, not a round later."""
    limits = {"KEEP_LOOK": 0.05, "POINT_LINES": 10, "MAX_UNKEPT": 10, "EMPTY_ROUND": 1000.0}
    with servers(database, 1, **limits) as (one,):
        alice = Peer(one.port).join("alice")
        for number in range(300):
            alice.send(f"line {number}").expect(f"alice: line {number}")


@pytest.fixture
def keeper(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """What writes points, which finds one due after any round."""
    monkeypatch.setattr("server.POINT_ROUNDS", 1)
    history = SharedHistory(database)
    shared = SimpleNamespace(kept_to=history.kept_to)
    keeper = Keeper(shared, SimpleNamespace(), history)  # type: ignore[arg-type]
    yield keeper
    keeper._database.close()
    history.close()


def follow_first_round(cluster: Postgres, name: str, late: float = 0.0) -> Room:
    """Return a room that has followed the log to its first round, or took it for a later one."""
    time = float(cluster.sql("SELECT time FROM chat.rounds", name))
    room = Room(durable=True).draft()
    room.apply(Turn(77, time + late, 1))
    room.apply(Entered(77))
    return room


def test_a_point_of_another_log_is_not_written(
    cluster: Postgres, database: str, keeper: Keeper
) -> None:
    """Where the database has another round than the one followed, no point hides that."""
    name = database.rpartition("/")[2]
    cluster.sql("SELECT chat.append(1, 77, 1, '[]', 9999)", name)
    with pytest.raises(Away):
        keeper._keep(follow_first_round(cluster, name, late=0.001))
    keeper._database.close()
    assert cluster.sql("SELECT number FROM chat.points", name) == "0"
    keeper._keep(follow_first_round(cluster, name))
    assert cluster.sql("SELECT max(number) FROM chat.points", name) == "1"


def test_a_server_that_is_here_is_not_forgotten(
    cluster: Postgres, database: str, keeper: Keeper
) -> None:
    """A clock that is put forward a day does not have its last round taken for a new one."""
    name = database.rpartition("/")[2]
    cluster.sql("SELECT chat.append(1, 77, 1, '[]', 9999)", name)
    cluster.sql("INSERT INTO chat.servers VALUES (5, 1, 0)", name)
    room = follow_first_round(cluster, name)
    cluster.sql("UPDATE chat.servers SET time = time - 90000", name)
    keeper._keep(room)
    assert cluster.sql("SELECT server FROM chat.servers", name) == "77"


def test_many_who_ask_while_the_database_is_away(cluster: Postgres, database: str) -> None:
    """They are all answered together, and not one behind the other."""
    name = database.rpartition("/")[2]
    with one_more(database, KEEP_LOOK=0.1, POINT_LINES=100) as one:
        alice = Peer(one.port).join("alice")
        alice.send(*(f"line {number}" for number in range(500)))
        alice.expect_eventually("alice: line 499")
        kept = "SELECT count(*) > 450 FROM chat.lines"
        wait_until(lambda: cluster.sql(kept, name) == "t", "the lines to be in the table")
    with servers(database, 1, RETAINED=50, CONNECT=0.5) as (two,):
        peers = [Peer(two.port).join(f"peer-{number}") for number in range(100)]
        for peer in peers[:-1]:
            peer.expect_eventually("* peer-99 joined the chat")
        cluster.signal(signal.SIGSTOP)
        try:
            for peer in peers:
                peer.send("/history 200")
            for peer in peers:
                peer.expect_eventually("-> the history cannot be read; try again later")
        finally:
            cluster.signal(signal.SIGCONT)


def test_a_name_that_no_name_server_knows_holds_nothing_up(
    cluster: Postgres, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a host's name is looked for the next one is tried, people talk, and the end comes."""
    answer, asked, real = threading.Event(), threading.Event(), socket.getaddrinfo

    def look_up(host: Any, *options: Any, **more: Any) -> Any:
        if host != "db.example":
            return real(host, *options, **more)
        asked.set()
        answer.wait()
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("server.CONNECT", 0.5)
    name = database.rpartition("/")[2]
    address = f"postgresql://chat@db.example,127.0.0.1:{cluster.port}/{name}"
    try:
        with run_chat(history=address) as server:
            assert asked.is_set()
            alice = Peer(server.port).join("alice")
            end_connections(cluster, name)
            alice.send("still here")
            alice.expect_eventually("alice: still here")
            began = time.monotonic()
            with stopping(server):
                alice.expect_eventually("-> the server is shutting down")
            assert time.monotonic() - began < STOP
            answer.set()
    finally:
        answer.set()


def end_connections(cluster: Postgres, name: str) -> None:
    """End all connections to a database, as an administrator may."""
    cluster.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )


def test_hosts_that_a_service_names_are_tried_in_turn(
    cluster: Postgres, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts from a service's file are as good as those in the address: one may be dead."""
    with socket.create_server(("127.0.0.1", 0)) as dead:  # takes connections, and says nothing
        services = tmp_path / "services"
        ports = f"{dead.getsockname()[1]},{cluster.port}"
        services.write_text(f"[chat]\nhost=127.0.0.1,127.0.0.1\nport={ports}\nuser=chat\n")
        monkeypatch.setenv("PGSERVICEFILE", str(services))
        address = f"postgresql:///{database.rpartition('/')[2]}?service=chat"
        with servers(address, 1, CONNECT=0.5) as (one,):
            alice = Peer(one.port).join("alice")
            alice.send("hello")
            alice.expect("alice: hello")
            with dead.accept()[0] as tried:
                assert tried.recv(1)


def test_a_standby_that_is_away_for_long_costs_few_connections(
    primary: tuple[Postgres, Postgres],
) -> None:
    """What servers have given up waits in the database no longer than they do."""
    first, second = primary
    with servers(both(first, second), 3, UNANSWERED=0.5, AGAIN=0.05) as three:
        peers = [Peer(one.port).join(f"peer{number}") for number, one in enumerate(three)]
        second.stop()
        peers[0].send("not yet")
        many = "SELECT count(*) > 20 FROM pg_stat_activity WHERE application_name = 'chat'"
        until = time.monotonic() + 6
        while time.monotonic() < until:
            assert first.sql(many) == "f"
            assert not wait_for_line(peers[2], 0.25) or peers[2].next_line()
        second.start()
        peers[2].expect_eventually("peer0: not yet")


def test_a_warning_of_something_else_keeps_nobody_waiting(cluster: Postgres, database: str) -> None:
    """A database that has a warning for each round is no database that is away."""
    name = database.rpartition("/")[2]
    with servers(database, 1) as (one,):
        alice = Peer(one.port).join("alice")
        cluster.sql(
            "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE WARNING 'must be vacuumed'; RETURN NEW; END$$;"
            " CREATE TRIGGER warn BEFORE UPDATE ON chat.room FOR EACH ROW EXECUTE FUNCTION warn()",
            name,
        )
        alice.send("said")
        alice.expect("alice: said")


def test_a_point_has_all_lines_or_is_not_written(
    cluster: Postgres, database: str, keeper: Keeper
) -> None:
    """A server that begins anew, and has not all lines in memory, leaves no hole in the table."""
    name = database.rpartition("/")[2]
    cluster.sql("SELECT chat.append(1, 77, 1, '[]', 9999)", name)
    room = follow_first_round(cluster, name)
    room.end = int(cluster.sql("SELECT position FROM chat.points", name)) + 10
    with pytest.raises(Away):
        keeper._keep(room)
    keeper._database.close()
    assert cluster.sql("SELECT number FROM chat.points", name) == "0"


def test_private_text_goes_though_the_clock_was_set_back(cluster: Postgres, database: str) -> None:
    """Points are written and rounds go also while the last ones are of a later time."""
    name = database.rpartition("/")[2]
    quick = {"KEEP_LOOK": 0.05, "POINT_SECONDS": 0.2, "TRIM_SECONDS": 0, "CONFIRM": 0.1}
    secret = "SELECT count(*) FROM chat.rounds WHERE entries LIKE '%xyzzy%'"
    with one_more(database, KEEP_LOOK=1000.0) as one:
        alice = Peer(one.port).join("alice")
        alice.send("/msg alice xyzzy")
        alice.expect("-> to alice: xyzzy", "[from alice] xyzzy")
    cluster.sql(
        "UPDATE chat.rounds SET time = time + 3600; UPDATE chat.points SET time = time + 3600", name
    )
    assert cluster.sql(secret, name) == "1"
    with servers(database, 1, **quick):
        wait_until(lambda: cluster.sql(secret, name) == "0", "private text to be gone")


def test_a_former_primary_is_not_asked_for_what_was_said(
    primary: tuple[Postgres, Postgres],
) -> None:
    """Who was away gets all lines from the table of the database that is followed, none missed."""
    first, second = primary
    quick = {"KEEP_LOOK": 0.1, "POINT_LINES": 50, "UNANSWERED": 1.0, "RETAINED": 20}
    with servers(both(first, second), 1, **quick) as (one,):
        alice = Peer(one.port).introduce("alice -0")
        alice.expect_match("-> Welcome, alice!.*")
        position = int(alice.expect_match(r"-> at (\d+)")[1])
        lines = [f"alice: line {number}" for number in range(300)]
        for start in 0, 150:
            for line in lines[start : start + 150]:
                alice.send(line)
                alice.expect_eventually(line)
            if not start:
                first.kill()
                second.promote()
        kept = f"SELECT count(*) > 250 FROM chat.lines WHERE position >= {position}"
        wait_until(lambda: second.sql(kept) == "t", "the lines to be in the table")
        first.start()
        bob = Peer(one.port).introduce(f"bob {position + 1}")
        bob.expect_match("-> Welcome, bob!.*")
        bob.expect(f"-> at {position + 1}", *lines)
        bob.send("/search line 1", "/history 100")
        found = bob.lines(1 + 20 + 100)
        assert found[-2].endswith(lines[-1])


def test_nobody_waits_on_when_a_server_has_ended(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for what comes from the log when no round will come to it any more is told."""
    with run_chat(history=database) as server:
        log = server.broadcaster.entries
        assert isinstance(log, SharedLog)
        stop, outcomes = log.stop, [Outcome(), Outcome()]
        entry = Asked(1, "names")

        def stop_later() -> None:
            log.deliver(Handed(entry, outcomes[0]))
            stop()
            log.deliver(Handed(entry, outcomes[1]))

        monkeypatch.setattr(log, "stop", stop_later)
    for outcome in outcomes:
        assert outcome._settled.is_set()


@pytest.mark.parametrize("state", ["garbage", "{}", "[]"])
def test_a_point_that_cannot_be_read_is_told_in_one_line(
    cluster: Postgres, database: str, state: str
) -> None:
    """A server that cannot begin with it ends, and does not try for ever."""
    with one_more(database):
        pass
    cluster.sql(f"UPDATE chat.points SET state = '{state}'", database.rpartition("/")[2])
    server = Server("--history", database)
    try:
        assert server.wait(DEADLINE) == 1
        assert "of the history cannot be read" in server.log()
        assert "Traceback" not in server.log()
    finally:
        server.end()


def test_people_are_told_of_the_end_though_the_database_is_away(
    cluster: Postgres, database: str
) -> None:
    """A server that ends while something waits says so, as any does."""
    server = Server("--history", database)
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        alice = Peer(server.port).join("alice")
        cluster.signal(signal.SIGSTOP)
        try:
            alice.send("never said")
            alice.expect("-> the room is waiting; what you say is kept")
            assert server.stop() == 0
        finally:
            cluster.signal(signal.SIGCONT)
        assert alice.rest() == ["-> the server is shutting down"]
    finally:
        server.end()


def test_what_a_point_waits_for_is_given_up_at_the_end(keeper: Keeper) -> None:
    """A database that does not come to an end with a point keeps no thread of a server's."""
    keeper._database.connect(DEADLINE)
    keeper._ending.set()
    began = time.monotonic()
    with pytest.raises(Away):
        keeper._ask("SELECT pg_sleep(30)")
    assert time.monotonic() - began < STOP


def test_what_has_waited_for_long_goes_into_several_rounds(
    cluster: Postgres, database: str
) -> None:
    """What a slow network could not take in time at once is said a part after the other."""
    with servers(database, 1) as (one,):
        alice, bob = Peer(one.port).join("alice"), Peer(one.port).join("bob")
        cluster.signal(signal.SIGSTOP)
        try:
            lines = [f"{number:05}{'x' * 900}" for number in range(10_000)]
            sent = alice.send_until_blocked("".join(f"{line}\n" for line in lines).encode())
        finally:
            cluster.signal(signal.SIGCONT)
        said = [f"alice: {line}" for line in lines[: sent // (len(lines[0]) + 1)]]
        heard = bob.lines_until(said[-1])
        assert [line for line in heard if line.startswith("alice: ")] == said
    name = database.rpartition("/")[2]
    assert int(cluster.sql("SELECT max(length(entries)) FROM chat.rounds", name)) < 1_200_000


def test_a_history_that_fails_at_once_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails while the server starts waits until all is there that is to be stopped."""
    with no_leaks():
        server = ChatServer(port=0)
        start = server.broadcaster.start

        def start_and_fail() -> None:
            start()
            server.history.on_failure()
            for thread in threading.enumerate():
                if thread.name == "stop":  # which must not come to its end now
                    thread.join(0.2)

        monkeypatch.setattr(server.broadcaster, "start", start_and_fail)
        server.start()
        wait_until(server.stopping.is_set, "the server to stop")
