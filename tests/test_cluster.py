"""A room on several machines: real servers, real clients and a real PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import postgres
import pytest
from chat import Peer, Server, run_server
from postgres import Postgres

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
