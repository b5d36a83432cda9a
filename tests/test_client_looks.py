"""How lines look: wrapped, coloured, timed and rung so that nobody is misled."""

from __future__ import annotations

import calendar
import re
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
from chat import Peer, no_leaks, run_chat
from clients import CLIENT, environment, greet, pretended, read_to_end, say
from proxy import GHOST, Proxy
from screens import CTRL_D, KINDS, enter, opener
from terminal import Terminal

import client
from client import Earlier, Heard, Look
from protocol import Kind


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


def said(text: str, name: str = "bob") -> Heard:
    """Return a line that somebody said."""
    return Heard(Kind.SAID, name, text)


# --- Wrapping ---------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 40, 80, 132])
@pytest.mark.parametrize(
    "text",
    [
        "ok" + " " * 70 + "boss: send me the password",
        "ok" + " " * 72 + "-> you are an operator",
        "ok" + "\u3000" * 36 + "boss: send me the password",
        "ok" + "\u3164" * 36 + "boss: send me the password",
        "x" * 74 + " boss: send me the password",
        "世" * 37 + "boss: send me the password",
        "words and words " * 20 + "boss: hello",
    ],
)
def test_nobody_is_imitated_by_padding(text: str, columns: int) -> None:
    """Whatever is put before it, the rest of a line does not begin at the left edge."""
    for row in client.wrap(f"bob: {text}", columns).split("\n")[1:]:
        assert row.startswith("    ") or " " not in row


def test_address_stands_whole() -> None:
    """An address that is longer than a row has rows of its own, unbroken."""
    address = "https://example.org/" + "a" * 100
    rows = client.wrap(f"bob: see {address} there", 60).split("\n")
    assert rows == ["bob: see", address, "    there"]


@pytest.mark.parametrize("columns", [20, 33, 80])
def test_wrapping_loses_nothing(columns: int) -> None:
    """All that is said is on the rows, and no row is too long, painted or not."""
    look = Look(colors=256)
    for text in ("some words in a row " * 9, "世界" * 60, "e\u0301" * 100, "नमस्ते दुनिया " * 8):
        for shown in (look.render(said(text), "alice"), f"bob: {text}"):
            rows = client.wrap(shown, columns).split("\n")
            assert re.sub(r"\s", "", "".join(rows)) == re.sub(r"\s", "", shown)
            assert all(client.fits(row, columns) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_line_on_a_screen(kind: str) -> None:
    """On a terminal a padded line has one row that begins at its left edge."""
    with run_chat() as server, opener(kind)(server.port, columns=80) as terminal:
        bob = Peer(server.port).join("bob")
        enter(terminal, bob)
        bob.send("ok" + " " * 70 + "boss: send me the password", "end")
        terminal.wait_for("bob: end")
        assert "bob: ok" in terminal.screen.lines
        assert "    boss: send me the password" in terminal.screen.lines


# --- Colours ----------------------------------------------------------------------


def contrast(number: int, with_white: bool) -> float:
    """Return the contrast of one of the 256 colours with white, or with black."""

    def linear(value: int) -> float:
        part = value / 255
        return part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4

    level = [0, 95, 135, 175, 215, 255]
    if number >= 232:
        red = green = blue = 8 + 10 * (number - 232)
    else:
        place = number - 16
        red, green, blue = level[place // 36], level[place // 6 % 6], level[place % 6]
    light = 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
    return 1.05 / (light + 0.05) if with_white else (light + 0.05) / 0.05


@pytest.mark.parametrize("with_white", [False, True])
def test_colours_can_be_read(with_white: bool) -> None:
    """Every colour has a contrast of 3.5 to 1, on black and on white."""
    assert all(contrast(n, with_white) >= 3.5 for n in (*client.PALETTE, client.GREY))


@pytest.mark.parametrize("kind", KINDS)
def test_no_colour_where_nobody_knows_it(kind: str) -> None:
    """With 16 colours, which may be any, text is bold, underlined or reversed, never coloured."""
    with run_chat() as server, opener(kind)(server.port, TERM="xterm") as terminal:
        bob = Peer(server.port).join("bob")
        enter(terminal, bob)
        bob.send("look, alice", "/me nods", "/msg alice psst", "end")
        terminal.wait_for("bob: end")
        terminal.settle()
        styles = [
            terminal.screen.style_of(text) for text in ("bob: look", "alice", "[from", "* bob")
        ]
        assert not re.search(r"[34]\d", ";".join(styles))
        assert terminal.screen.style_of("bob: look") == "4"
        assert terminal.screen.style_of("[from") == "1"


def test_status_line_without_colour() -> None:
    """Without colours the status line is not reversed either."""
    with (
        run_chat() as server,
        opener("prompt_toolkit")(server.port, "--name", "alice", "--no-color") as terminal,
    ):
        terminal.wait_for("alice on 127.0.0.1")
        assert terminal.screen.style_of("alice on 127.0.0.1") == ""


# --- Bells ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rings"),
    [
        ("alice?", True),
        ("(Alice)", True),
        ("@alice: look", True),
        ("https://example.org/alice", False),
        ("see http://alice.example/x", False),
        ("write to alice@example.org", False),
        ("example.org/alice/x", False),
        ("www.alice.org", False),
        ("alice.example.org", False),
        ("malice and alices", False),
        ("https://example.org/ alice", True),
    ],
)
def test_what_rings(text: str, rings: bool) -> None:
    """A name that is spoken to rings, one inside an address does not."""
    assert Look(bell=True).calls(said(text), "alice") is rings


@pytest.mark.parametrize("kind", KINDS)
def test_one_bell_for_an_absence(kind: str) -> None:
    """Thirty mentions while the connection was lost ring once."""
    with (
        run_chat() as server,
        Proxy(server.port) as proxy,
        opener(kind)(proxy.port, rows=40) as terminal,
    ):
        bob = Peer(server.port).join("bob")
        enter(terminal, bob)
        proxy.go_away(GHOST)
        terminal.wait_for("connection lost")
        bob.send(*(f"alice, {number}" for number in range(30)))
        bob.expect_eventually("bob: alice, 29")
        proxy.come_back()
        terminal.wait_for("-- above: said while you were away --")
        terminal.settle()
        assert terminal.screen.bells == 1


# --- Times ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_time_for_what_was_said_before(kind: str) -> None:
    """A line from before has no time, for nobody knows it; a mark stands behind it."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        bob.send("earlier")
        bob.expect("bob: earlier")
        with opener(kind)(server.port, "--name", "alice", "--timestamps") as terminal:
            bob.expect("* alice joined the chat")
            bob.send("now")
            terminal.wait_for("bob: now")
            lines = terminal.screen.lines
            at = lines.index("bob: earlier")
            assert re.fullmatch(r"\d\d:\d\d -- above: said before you came --", lines[at + 1])
            assert re.fullmatch(r"\d\d:\d\d bob: now", lines[at + 3])
            terminal.type(CTRL_D)


def test_coming_back_is_no_missed_line() -> None:
    """Only what others said or did is told as missed."""
    place = client.Place("alice")
    absence = client.Absence(time.monotonic())
    for line in ("* alice left the chat", "* alice joined the chat", "* bob left the chat"):
        absence.lines.append(Heard(Kind.NOTICE, "", line.removeprefix("* ")))
    assert re.fullmatch(r"back after \d+ s, 1 line missed", absence.heading(place).text)
    absence.lines.pop()
    assert re.fullmatch(r"back after \d+ s", absence.heading(place).text)


def test_absence_counts_from_the_last_that_was_heard() -> None:
    """It is told how long nothing was heard, not how long the loss has been known."""
    absence = client.Absence(time.monotonic() - 151)
    assert absence.heading(client.Place("alice")).text.startswith("back after 151 s")


def test_times_are_the_users() -> None:
    """A time in an answer of the server stands in the user's zone; what somebody said does not."""
    when = calendar.timegm((2026, 11, 25, 16, 31, 0))
    local = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
    look = Look()
    text = "2026-11-25 16:31Z alice: at 2026-11-25 16:31Z"
    shown = look.render(Heard(Kind.ANSWER, "", text), "alice")
    assert shown == f"-> {local} alice: at 2026-11-25 16:31Z"
    whisper = Heard(Kind.ANSWER, "", "to bob: 2026-11-25 16:31Z")
    assert look.render(whisper, "alice") == "-> to bob: 2026-11-25 16:31Z"
    wrong = Heard(Kind.ANSWER, "", "2026-13-45 16:31Z")
    assert look.render(wrong, "alice") == "-> 2026-13-45 16:31Z"


def test_zone_of_a_user() -> None:
    """In another zone the hours are other ones."""

    def talk(sock: socket.socket) -> None:
        greet(sock, b"-> 2026-11-25 16:31Z bob: hi\n")
        read_to_end(sock)

    with pretended(talk) as port:
        done = subprocess.run(
            [*CLIENT, "--port", str(port), "--name", "alice"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(TZ="XYZ-5:30"),
            check=False,
        )
    assert b"-> 2026-11-25 22:01 bob: hi\n" in done.stdout


# --- Terminals that know nothing ---------------------------------------------------


@pytest.mark.parametrize("term", ["dumb", ""])
def test_dumb_terminal(term: str) -> None:
    """Where the terminal knows no escape sequences none is sent, and all is said and shown."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        command = [*CLIENT, "--port", str(server.port), "--name", "alice"]
        with Terminal(command, 24, 80, env=environment(TERM=term)) as terminal:
            written = watch(terminal)
            bob.expect("* alice joined the chat")
            terminal.type("hello\r")
            bob.expect("alice: hello")
            bob.send("look, alice")
            terminal.wait_for("bob: look, alice")
            terminal.type("/quit\r")
            assert terminal.wait() == 0
        assert b"\x1b" not in b"".join(written)
        assert b"alice: hello" in b"".join(written)


def watch(terminal: Terminal) -> list[bytes]:
    """Keep what the program writes."""
    written: list[bytes] = []
    feed = terminal.screen.feed

    def keep(data: bytes) -> bytes:
        written.append(data)
        return feed(data)

    terminal.screen.feed = keep  # type: ignore[method-assign]
    return written


def test_format_of_the_room_is_named() -> None:
    """A letter that ASCII has not is refused with the option that is for it."""
    with run_chat() as server:
        done = say("grün\n", "--name", "x", port=server.port)
        assert done.returncode == 1
        assert "--format utf-8" in done.stderr


def test_format_of_a_wider_room_is_named() -> None:
    """An ASCII client in a room that has more is told once what shows it."""

    def talk(sock: socket.socket) -> None:
        greet(sock, "bob: grün\nbob: größer\n".encode())
        read_to_end(sock)

    with pretended(talk) as port:
        done = say("alice\n", port=port)
    assert done.returncode == 0
    assert done.stderr.count("--format utf-8") == 1
    assert r"bob: gr\xc3\xbcn" in done.stdout


def test_earlier_lines_say_so() -> None:
    """A line knows whether it was said before."""
    assert not said("x").earlier
    assert Earlier(*said("x")).earlier
    assert Earlier(*said("x")) == said("x")
