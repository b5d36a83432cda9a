"""What was typed in an earlier session comes back, for who has asked for it."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, no_leaks, run_chat, wait_until
from screens import CTRL_D, KINDS, UP, enter, opener, prompts
from terminal import Terminal

import client
from server import ChatServer

on_each_kind = pytest.mark.parametrize("kind", KINDS)
ALICE = ("--name", "alice", "--recall")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An empty room that can have operators."""
    with run_chat(op_password="tr0ub4dor") as chat_server:
        yield chat_server


@pytest.fixture
def bob(server: ChatServer) -> Peer:
    """Somebody in the room."""
    return Peer(server.port).join("bob")


def leave(terminal: Terminal, bob: Peer) -> None:
    """Leave, and wait until the room knows."""
    terminal.wait_for(prompts(""))  # between two prompts, Ctrl-D is nobody's
    terminal.type(CTRL_D)
    bob.expect_eventually("* alice left the chat")


@on_each_kind
def test_typed_lines_come_back(kind: str, server: ChatServer, bob: Peer, tmp_path: Path) -> None:
    """A line of the last session is recalled, a password is not, and nobody else reads them."""
    place = str(tmp_path)
    with opener(kind)(server.port, *ALICE, XDG_STATE_HOME=place) as terminal:
        enter(terminal, bob)
        terminal.type("first\r")
        bob.expect("alice: first")
        terminal.type("/op tr0ub4dor\r")
        terminal.wait_for("you are an operator")
        leave(terminal, bob)
    file = tmp_path / "classic-chat" / "recall"
    assert file.read_text() == "first\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with opener(kind)(server.port, *ALICE, XDG_STATE_HOME=place) as terminal:
        enter(terminal, bob)
        terminal.type(UP)
        terminal.wait_for(prompts("first"))


@on_each_kind
def test_nothing_is_kept_unasked(kind: str, server: ChatServer, bob: Peer, tmp_path: Path) -> None:
    """Without the setting no file is made."""
    with opener(kind)(server.port, XDG_STATE_HOME=str(tmp_path)) as terminal:
        enter(terminal, bob)
        terminal.type("first\r")
        bob.expect("alice: first")
        terminal.wait_for("alice: first")  # not the prompt from before it
        leave(terminal, bob)
    assert list(tmp_path.iterdir()) == []


@on_each_kind
def test_place_that_cannot_be_written(
    kind: str, server: ChatServer, bob: Peer, tmp_path: Path
) -> None:
    """One line tells of it, and the talk goes on."""
    (tmp_path / "classic-chat").write_text("in the way")
    with opener(kind)(server.port, *ALICE, rows=20, XDG_STATE_HOME=str(tmp_path)) as terminal:
        enter(terminal, bob)
        for text in ("one", "two"):
            terminal.type(f"{text}\r")
            bob.expect(f"alice: {text}")
            terminal.wait_for(f"alice: {text}")
        assert terminal.screen.text().count("-- cannot keep what is typed") == 1


@on_each_kind
def test_file_is_bounded_and_shared(
    kind: str, server: ChatServer, bob: Peer, tmp_path: Path
) -> None:
    """A long file is cut to its newest lines, and lines of two clients stand in it together."""
    file = tmp_path / "classic-chat" / "recall"
    file.parent.mkdir()
    file.write_text("".join(f"line {n}\n" for n in range(3 * client.MAX_RECALL)))
    place = str(tmp_path)
    with (
        opener(kind)(server.port, *ALICE, XDG_STATE_HOME=place) as one,
        opener(kind)(server.port, "--name", "carol", "--recall", XDG_STATE_HOME=place) as two,
    ):
        one.wait_for("* alice joined the chat")
        two.wait_for("* carol joined the chat")
        one.type("from alice\r")
        bob.expect_eventually("alice: from alice")
        two.type("from carol\r")
        bob.expect_eventually("carol: from carol")
        wait_until(lambda: file.read_text().endswith("from alice\nfrom carol\n"))
        assert len(file.read_text().splitlines()) == client.MAX_RECALL + 2


def test_no_line_is_lost_where_several_begin_at_once(tmp_path: Path) -> None:
    """Of clients that begin at the same time each keeps what it adds, whoever cuts the file."""
    file = tmp_path / "recall"
    for turn in range(10):
        file.write_text("".join(f"line {n}\n" for n in range(3 * client.MAX_RECALL)))
        ready = threading.Barrier(8)

        def begin(name: str, ready: threading.Barrier) -> None:
            recall = client.Recall(str(file))
            ready.wait(DEADLINE)
            recall.load()
            recall.add(name)

        names = [f"client {number} of {turn}" for number in range(8)]
        threads = [threading.Thread(target=begin, args=[name, ready]) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        kept = file.read_text().splitlines()
        assert sorted(kept[client.MAX_RECALL :]) == names
        assert kept[client.MAX_RECALL - 1] == f"line {3 * client.MAX_RECALL - 1}"
    assert list(tmp_path.iterdir()) == [file]
