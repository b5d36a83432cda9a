"""A client that is left alone marks where its user stopped reading."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from chat import Peer, no_leaks, run_chat
from clients import ROOT, environment
from screens import KINDS, opener, prompts
from terminal import Terminal

MARK = "what follows came meanwhile --"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


def impatient(kind: str, port: int, seconds: float, more: str = "") -> Terminal:
    """Open a client of alice's for which so many seconds count as a long time."""
    opener(kind)  # skips the test where there is no such terminal
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import client;"
        f" client.UNATTENDED = {seconds}{more}; sys.exit(client.main())"
    )
    bare = ["-S"] if kind == "readline" else []
    command = [sys.executable, *bare, "-c", program, "--port", str(port), "--name", "alice"]
    return Terminal(command, 20, 80, env=environment(INPUTRC=os.devnull))


@pytest.mark.parametrize("kind", KINDS)
def test_mark_stands_once_before_what_came(kind: str) -> None:
    """The first line that others say to an empty chair has a mark before it, the next has none."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with impatient(kind, server.port, 0.0) as terminal:
            bob.expect_eventually("* alice joined the chat")
            terminal.wait_for("* alice joined the chat")
            terminal.type("I am here\r")
            bob.expect("alice: I am here")
            terminal.wait_for("alice: I am here")
            terminal.wait_for(prompts("", 80))
            bob.send("one", "two")
            terminal.wait_for("bob: two")
            text = terminal.screen.text()
            said = text[text.index("alice: I am here") :]
            assert said.count(MARK) == 1
            assert said.index("-- no line typed since ") < said.index("bob: one")


@pytest.mark.parametrize("kind", KINDS)
def test_no_mark_while_somebody_types(kind: str) -> None:
    """Who has typed something of late gets no mark."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with impatient(kind, server.port, 300.0) as terminal:
            bob.expect_eventually("* alice joined the chat")
            bob.send("one")
            terminal.wait_for("bob: one")
            assert MARK not in terminal.screen.text()


@pytest.mark.parametrize("kind", KINDS)
def test_no_mark_before_anybody_is_in(kind: str) -> None:
    """Who takes long to give a name, and then comes, has missed nothing."""
    late = (
        "; ask = client._name; skipped = [0.0]; now = client.time.time"
        "; client.time.time = lambda: now() + skipped[0]"
        "; client._name = lambda *given: (ask(*given), skipped.__setitem__(0, 400.0))[0]"
    )
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        bob.send("before")
        with impatient(kind, server.port, 300.0, late) as terminal:
            terminal.wait_for("* alice joined the chat")
            bob.expect_eventually("* alice joined the chat")
            bob.send("one")
            terminal.wait_for("bob: one")
            assert MARK not in terminal.screen.text()
