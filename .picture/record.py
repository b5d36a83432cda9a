"""Draw what a chat looks like: a server, two people and a build, on terminals of their own.

    python .picture/record.py > .picture/chat.svg

Everything in the picture was said in a room: the programs run as they are, on
pseudo-terminals, and what the screens show in the end is written down as text in SVG.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from terminal import Screen, Terminal  # noqa: E402 - found on the path from here on

from server import ChatServer  # noqa: E402

# --- The conversation --------------------------------------------------------

COLUMNS, ROWS = 51, 16  # of a person's terminal
BELOW, STRIP = 2 * COLUMNS + 6, 2  # of that of the build, as wide as two and what is between
# A shell in which `classic-chat` is the client of this tree, in the room of the picture.
SHELL = """
PS1='$ '
classic-chat() {{ "{python}" -S "{root}/client.py" --port {port} "$@"; }}
bind 'set enable-bracketed-paste off' 2> /dev/null
"""


@dataclass(frozen=True)
class Window:
    """A terminal as it stands in the end, and what is written above it."""

    title: str
    screen: Screen


@contextlib.contextmanager
def shell(port: int, rows: int, columns: int) -> Iterator[Terminal]:
    """Open a shell on a terminal."""
    with tempfile.NamedTemporaryFile("w", suffix=".bashrc") as start:
        start.write(SHELL.format(python=sys.executable, root=ROOT, port=port))
        start.flush()
        command = ["bash", "--noprofile", "--rcfile", start.name, "-i"]
        kept = {"PATH": os.environ["PATH"], "INPUTRC": os.devnull, "HISTFILE": os.devnull}
        with Terminal(command, rows, columns, {**kept, "LC_ALL": "C.UTF-8"}) as terminal:
            terminal.wait_for("$ ")
            yield terminal


def converse() -> list[Window]:
    """Have the conversation; return what each sees of it in the end."""
    with (
        ChatServer(port=0) as server,
        shell(server.port, ROWS, COLUMNS) as alice,
        shell(server.port, ROWS, COLUMNS) as mia,
        shell(server.port, STRIP, BELOW) as build,
    ):
        people = (alice, mia)

        def say(terminal: Terminal, text: str, shown: str) -> None:
            terminal.type(f"{text}\r")
            for one in people:
                one.wait_for(shown)

        alice.type("classic-chat --name alice\r")
        alice.wait_for("* alice joined the chat")
        alice.wait_for("alice> ")
        mia.type("classic-chat --name mia\r")
        mia.wait_for("mia> ")
        say(alice, "hi mia, is the build green?", "alice: hi mia")
        say(mia, "let me see", "mia: let me see")
        build.type("(echo compiling; echo 2 tests passed) | classic-chat --name ci > /dev/null\r")
        build.wait_for(lambda screen: screen.lines[:3].count("$") == 1)
        for one in people:
            one.wait_for("* ci left the chat")
        say(mia, "alice: it is", "mia: alice: it is")
        mia.type("/msg alice lunch?\r")
        mia.wait_for("-> to alice: lunch?")
        alice.wait_for("[from mia] lunch?")
        alice.type("in half an ho")
        alice.wait_for("alice> in half an ho")
        say(mia, "/me is hungry", "** mia is hungry")
        for terminal in (*people, build):
            terminal.settle()
        return [
            Window("alice", alice.screen),
            Window("mia", mia.screen),
            Window("a build", build.screen),
        ]


# --- The picture -------------------------------------------------------------

WIDTH, HEIGHT, ASCENT = 7.8, 18, 14  # pixels of a cell, and from its top down to the baseline
GAP, BAR = 2 * WIDTH, 26  # pixels around a terminal, and of the title above it
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
PAPER, INK, FRAME, FAINT = "#000000", "#e6e6e6", "#1c2128", "#adb5bd"
LEVELS = (0, 95, 135, 175, 215, 255)  # of each part of a colour in the cube of 256

TITLE = "Alice, Mia and a build in one room"
TOLD = (
    "Three terminals. Alice asks whether the build is green; a build that is piped into the"
    " room says that its tests passed; Mia tells Alice so, and asks her alone about lunch."
    " What comes while Alice types her answer stands above it."
)


def color(number: int) -> str:
    """Return a colour of the 256 that is no theme's, as SVG has it."""
    if number >= 232:
        parts = [8 + 10 * (number - 232)] * 3
    else:
        parts = [LEVELS[(number - 16) // step % 6] for step in (36, 6, 1)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def attributes(style: str) -> str:
    """Return what the codes of a style, such as "1;38;5;26", are in SVG."""
    fill, _, number = style.partition("38;5;")
    codes = fill.split(";")
    ink = color(int(number)) if number else PAPER if "7" in codes else INK
    return f'fill="{ink}"' + (' font-weight="bold"' if "1" in codes else "")


def draw_row(row: list[tuple[str, str]], left: float, base: float) -> Iterator[str]:
    """Yield the texts of a row, each in one style and as wide as its cells."""
    column = 0
    for style, cells in groupby(row, key=lambda cell: cell[1]):
        text = "".join(cell for cell, _ in cells)
        at, column = left + column * WIDTH, column + len(text)
        is_reversed = "7" in style.split(";")
        text = text if is_reversed else text.rstrip()
        if not text:
            continue
        wide = f"{len(text) * WIDTH:.1f}"
        if is_reversed:
            place = f'x="{at:.1f}" y="{base - ASCENT:.1f}"'
            yield f'<rect {place} width="{wide}" height="{HEIGHT}" fill="{INK}"/>'
        yield (
            f'<text x="{at:.1f}" y="{base:.1f}" textLength="{wide}" {attributes(style)}>'
            f"{escape(text)}</text>"
        )


def draw_window(window: Window, left: float, top: float) -> Iterator[str]:
    """Yield a terminal: its frame, its title, its text and its cursor."""
    screen = window.screen
    width, height = screen.columns * WIDTH + 2 * GAP, screen.rows * HEIGHT + GAP
    middle = f'x="{width / 2:.1f}" y="18" text-anchor="middle"'
    yield f'<g transform="translate({left:.1f} {top:.1f})">'
    yield f'<rect width="{width:.1f}" height="{BAR + height:.1f}" rx="6" fill="{FRAME}"/>'
    yield f'<rect y="{BAR}" width="{width:.1f}" height="{height:.1f}" rx="6" fill="{PAPER}"/>'
    yield f'<text {middle} fill="{FAINT}">{window.title}</text>'
    for number, cells in enumerate(screen.cells):
        yield from draw_row(cells, GAP, BAR + GAP / 2 + ASCENT + number * HEIGHT)
    row, column = screen.cursor
    place = f'x="{GAP + column * WIDTH:.1f}" y="{BAR + GAP / 2 + row * HEIGHT:.1f}"'
    yield f'<rect {place} width="{WIDTH}" height="{HEIGHT}" fill="{FAINT}"/>'
    yield "</g>"


def draw(windows: list[Window]) -> Iterator[str]:
    """Yield the picture: two terminals beside each other, and one below."""
    pane = COLUMNS * WIDTH + 2 * GAP
    below = BAR + ROWS * HEIGHT + 3 * GAP
    width = 2 * pane + 3 * GAP
    height = below + BAR + STRIP * HEIGHT + 2 * GAP
    places = [(GAP, GAP), (pane + 2 * GAP, GAP), (GAP, below)]
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' role="img" aria-labelledby="title told" font-family="{FONT}" font-size="13"'
        ' xml:space="preserve">'
    )
    yield f'<title id="title">{TITLE}</title>'
    yield f'<desc id="told">{TOLD}</desc>'
    yield f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#57606a"/>'
    for window, (left, top) in zip(windows, places, strict=True):
        yield from draw_window(window, left, top)
    yield "</svg>"


if __name__ == "__main__":
    print("\n".join(draw(converse())))
