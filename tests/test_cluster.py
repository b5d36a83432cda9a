"""A room on several machines: real servers, real clients and a real PostgreSQL."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from chat import Peer, Server, run_server, wait_until
from postgres import Postgres

KEY = "0123456789abcdef"

pytestmark = [postgres.needed, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    """A PostgreSQL for all tests of this file."""
    with postgres.folder() as folder, Postgres(postgres.owned(folder / "one")).create() as one:
        yield one


@pytest.fixture
def database(cluster: Postgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty database."""
    name = f"test{abs(hash(request.node.name)) % 10**9}"
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
def one_more(address: str, end: int = signal.SIGTERM) -> Iterator[Server]:
    """Run a server that ends before the others, and before its peers do, by a signal."""
    server = Server("--history", address, "--rate-limit", "0")
    try:
        server.port = int(server.expect_log(r"listening on \S+:(\d+)\n")[1])
        yield server
        server.stop(end)
        assert "Traceback" not in server.log(), server.log()
    finally:
        server.end()


def wait_for_place(port: int, answer: str) -> Peer:
    """Return a peer who has come back to a place, when there is one who can give it."""
    peer = Peer(port).introduce(answer)
    peer.expect_match("-> Welcome back, .*")
    return peer


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
        alice = Peer(two.port).introduce(f"alice {position + 1}+1 {KEY}")
        alice.expect("-> Welcome back, alice!", f"-> at {position + 1}+1")
        alice.expect("carol: aloud", "[from carol] two")
        assert ghost.rest()[:3] == ["[from carol] one", "carol: aloud", "[from carol] two"]
        carol.expect_nothing()


def test_who_was_at_a_killed_server_leaves_after_their_time(database: str) -> None:
    """Ten seconds after a server's end who has no key has left; who has one may come back."""
    with servers(database, 1) as (one,):
        alice = Peer(one.port).join("alice")
        with one_more(database, signal.SIGKILL) as two:
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
    with servers(database, 2) as (one, two):
        alice = Peer(one.port).join("alice")
        bob = Peer(two.port).introduce(f"bob -0+0 {KEY}")
        bob.expect_match("-> Welcome, bob!.*")
        alice.expect("* bob joined the chat")
        two.ask_to_end(signal.SIGSTOP)
        bob.send("said to a server that is over")
        try:
            again = wait_for_place(one.port, f"bob -0+0 {KEY}")
            again.send("here")
            alice.expect("bob: here")
        finally:
            two.ask_to_end(signal.SIGCONT)
        two.expect_log("silent for too long")
        bob.rest()
        alice.send("over")
        again.expect_eventually("bob: here")
        again.expect("alice: over")
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
        alice.expect_eventually("alice: kept")
        bob.expect_eventually("alice: kept")
        wait_until(lambda: bob.has("-> the room goes on"), "bob to be told")
        Peer(two.port).join("carol")


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
