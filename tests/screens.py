"""What the tests of the client on terminals share: how it is opened, and what its prompt is.

with opener("readline")(server.port) as terminal:
    terminal.wait_for(prompts(""))
"""

from __future__ import annotations

import importlib.util
import os
import sys
import termios
from typing import Protocol

import pytest
from chat import Peer
from clients import ROOT, environment
from terminal import Screen, Terminal

pytest.importorskip("readline")

UP, LEFT, CTRL_C, CTRL_D, CTRL_Z = "\x1b[A", "\x1b[D", "\x03", "\x04", "\x1a"
KINDS = ["prompt_toolkit", "readline"]


class Open(Protocol):
    """Opens a client on a terminal."""

    def __call__(
        self, port: int, *options: str, rows: int = ..., columns: int = ..., **env: str
    ) -> Terminal:
        """Open one; without options it is alice's."""


def opener(kind: str) -> Open:
    """Return what opens clients of a kind; skip the test if that is not installed."""
    if kind == "prompt_toolkit" and not importlib.util.find_spec(kind):
        pytest.skip("prompt_toolkit is not installed")

    def open_one(
        port: int, *options: str, rows: int = 14, columns: int = 60, **env: str
    ) -> Terminal:
        return Terminal(
            [*command(kind, port), *(options or ("--name", "alice"))],
            rows,
            columns,
            env=environment(**{"INPUTRC": os.devnull, **env}),
        )

    return open_one


def command(kind: str, port: int) -> list[str]:
    """Return the command that runs a client of a kind."""
    bare = ["-S"] if kind == "readline" else []  # without any package that is installed
    return [sys.executable, *bare, str(ROOT / "client.py"), "--port", str(port)]


def assert_sane(terminal: Terminal) -> None:
    """See that a shell could go on in the terminal."""
    wanted = termios.ECHO | termios.ICANON | termios.ISIG
    assert terminal.termios()[3] & wanted == wanted, "the terminal is left raw"
    assert terminal.screen.cursor_visible
    assert not terminal.screen.bracketed_paste


def prompts(typed: str, columns: int = 60, cursor: int | None = None) -> Prompts:
    """Return a condition: the prompt stands there with a half-typed text, and the cursor in it."""
    return Prompts("alice> " + typed, columns, cursor)


class Prompts:
    """The condition that a prompt stands on the screen, wrapped as it has to be, once."""

    def __init__(self, text: str, columns: int, cursor: int | None) -> None:
        self.rows = [text[at : at + columns] for at in range(0, len(text), columns)]
        place = len(text) if cursor is None else len("alice> ") + cursor
        self.cursor = divmod(place, columns)

    def __call__(self, screen: Screen) -> bool:
        """Tell whether it holds."""
        starts = [row for row, line in enumerate(screen.lines) if line.startswith("alice>")]
        if len(starts) != 1:
            return False
        [start] = starts
        found = screen.lines[start : start + len(self.rows)]
        place = (screen.cursor[0] - start, screen.cursor[1])
        return found == [row.rstrip() for row in self.rows] and place == self.cursor

    def __repr__(self) -> str:
        return f"a prompt {self.rows} with the cursor at {self.cursor}"


def enter(terminal: Terminal, peer: Peer) -> None:
    """Wait until alice is in the room and can type."""
    peer.expect_eventually("* alice joined the chat")
    terminal.wait_for("* alice joined the chat")
    terminal.wait_for(prompts("", terminal.screen.columns))
