"""The terminal that the tests look through shows what a real one would."""

import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest
from terminal import Screen, Terminal

ECHO = "while True: print(repr(input('> ')))"
READLINE = f"import readline\n{ECHO}"
PROMPT_TOOLKIT = """
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
words = WordCompleter(["/help", "/history", "/names"], sentence=True)
session = PromptSession(erase_when_done=True, completer=words, bottom_toolbar="connected")
while True:
    print(repr(session.prompt("> ")))
"""


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    before = threading.active_count(), os.listdir("/dev/fd")
    yield
    assert (threading.active_count(), os.listdir("/dev/fd")) == before


def screen_after(output: str, rows: int = 4, columns: int = 10) -> Screen:
    screen = Screen(rows, columns)
    screen.feed(output.encode())
    assert screen.unsupported == []
    return screen


def shown(output: str, rows: int = 4, columns: int = 10) -> list[str]:
    return screen_after(output, rows, columns).lines


def run(program: str, rows: int = 8, columns: int = 20) -> Terminal:
    """Start a Python program whose line editors follow no one's personal settings."""
    env = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull}
    return Terminal([sys.executable, "-c", program], rows, columns, env=env)


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        ("ab\r\ncd\ne", ["ab", "cd", "  e", ""]),
        ("abc\b\bX\tY", ["aXc     Y", "", "", ""]),
        ("abcdef\x1b[3D\x1b[2P\x1b[2@Y", ["abcY f", "", "", ""]),
        ("abcdef\x1b[3G\x1b[2X", ["ab  ef", "", "", ""]),
        ("abcdef\x1b[3G\x1b[K", ["ab", "", "", ""]),
        ("abcdef\x1b[3G\x1b[1K", ["   def", "", "", ""]),
        ("a\r\nb\r\nc\x1b[2;1H\x1b[J", ["a", "", "", ""]),
        ("a\r\nb\r\nc\x1b[2;1H\x1b[1J", ["", "", "c", ""]),
        ("a\r\nb\r\nc\x1b[2;2H\x1b[L", ["a", "", "b", "c"]),
        ("a\r\nb\r\nc\x1b[2;2H\x1b[M", ["a", "c", "", ""]),
        ("a\r\nb\r\nc\r\nd\x1b[2;3r\x1b[3;1H\nX", ["a", "c", "X", "d"]),
        ("a\r\nb\r\nc\r\nd\x1b[2;3r\x1b[2;1H\x1bMX", ["a", "X", "b", "d"]),
        ("a\r\nb\r\nc\r\nd\x1b[2;3r\x1b[2;1H\x1b[9BX", ["a", "b", "X", "d"]),
        ("a\r\nb\r\nc\r\nd\x1b[2;3r\x1b[3;1H\x1b[9AX", ["a", "X", "c", "d"]),
        ("a\r\nb\x1b[T", ["", "a", "b", ""]),
        ("\x1b[2;4Ha\x1b[Fb\x1b[3dc\x1b[9;99Hd", ["b", "   a", " c", "         d"]),
        ("ab\x1b7\x1b[4;4H\x1b[31m\x1b8c", ["abc", "", "", ""]),
        ("\x1b]0;a title\x07a\x1b]2;b\x1b\\b\x1b(B\x0fc", ["abc", "", "", ""]),
    ],
)
def test_sequences(output: str, lines: list[str]) -> None:
    """Each sequence changes the screen as its definition says."""
    assert shown(output) == lines


def test_wrap_waits_for_the_next_character() -> None:
    """A row that is just full keeps the cursor; carriage return and backspace stay on it."""
    assert screen_after("0123456789").cursor == (0, 9)
    assert shown("0123456789\rX")[:2] == ["X123456789", ""]
    assert shown("0123456789\bX")[:2] == ["01234567X9", ""]
    assert shown("0123456789\r\nX")[:2] == ["0123456789", "X"]
    assert shown("0123456789\x1b[1mX")[:2] == ["0123456789", "X"]
    assert shown("\x1b[?7l0123456789X")[:2] == ["012345678X", ""]


def test_scrollback_holds_what_left_the_top() -> None:
    """Rows that leave the main screen at its top are kept, in order."""
    screen = screen_after("a\r\nb\r\nc\r\nd\r\ne\r\n")
    assert (screen.scrollback, screen.lines) == (["a", "b"], ["c", "d", "e", ""])
    assert screen.text() == "a\nb\nc\nd\ne"
    assert screen_after("a\r\nb\x1b[2;4r\x1b[4;1H\n\n").scrollback == []
    assert screen.shows("a")
    assert not screen.shows("f")


def test_alternate_screen_leaves_the_main_one_as_it_was() -> None:
    """What a full-screen program draws is gone when it leaves, and never scrolls back."""
    screen = screen_after("ab\x1b[?1049h\x1b[Hx\n\n\n\n\n\x1b7")
    assert screen.text() == ""
    screen.feed(b"\x1b[?1049l")
    assert (screen.text(), screen.cursor) == ("ab", (0, 2))


def test_wide_characters_take_two_cells() -> None:
    """A wide character never splits: it wraps whole and half of it is never left."""
    assert screen_after("a\u4f60").cursor == (0, 3)
    assert shown("012345678\u4f60")[:2] == ["012345678", "\u4f60"]
    assert shown("a\u4f60b\x1b[3GX")[0] == "a Xb"
    assert shown("a\u4f60b\x1b[2GX")[0] == "aX b"
    assert screen_after("e\u0301x").cursor == (0, 2)
    assert shown("\u4f60\u0301x")[0] == "\u4f60\u0301x"
    assert shown("\u4f60\u0301\rx")[0] == "x"
    assert shown("012345678e\u0301x")[:2] == ["012345678e\u0301", "x"]


def test_styles_are_normalised() -> None:
    """A style is the codes in force, in order of number, whatever way they were set."""
    screen = screen_after(
        "\x1b[31;1mred\x1b[22;7mrev\x1b[0;38;5;196;48;2;1;2;3mxyz\x1b[39;49mw"
        "\r\n\x1b[m\u4f60plain \x1b[94mblue\x1b[91mred",
        columns=20,
    )
    styles = [screen.style_of(text) for text in ("red", "ev", "yz", "w", "plain", "blue")]
    assert styles == ["1;31", "7;31", "38;5;196;48;2;1;2;3", "", "", "94"]
    with pytest.raises(AssertionError, match="not on the screen"):
        screen.style_of("green")


def test_modes_bells_and_answers() -> None:
    """The screen keeps the modes, counts the bells and answers questions."""
    screen = Screen(4, 10)
    assert (screen.cursor_visible, screen.bracketed_paste, screen.bells) == (True, False, 0)
    assert screen.feed(b"ab\r\nc\a\x1b[?25l\x1b[?2004h\x1b[6n\x1b[c") == b"\x1b[2;2R\x1b[?62;22c"
    assert (screen.cursor_visible, screen.bracketed_paste, screen.bells) == (False, True, 1)
    screen.feed(b"\x1b[?u\x1b[>q\x1b[2 q")
    assert screen.unsupported == []


@pytest.mark.parametrize("sequence", ["\x1b[?1000h", "\x1b[5i", "\x1b#8", "\x9b2J", "\x1b[3\x1b[m"])
def test_unknown_sequences_are_told(sequence: str) -> None:
    """What the screen does not know is neither shown nor passed over in silence."""
    screen = Screen(4, 10)
    screen.feed(f"a{sequence}b".encode())
    assert len(screen.unsupported) == 1
    assert screen.lines[0].startswith("a")


def test_any_chunking_shows_the_same() -> None:
    """Characters and sequences may come in pieces cut anywhere."""
    output = (
        "a\u4f60\x1b[1;31mb\x1b]0;title\x1b\\c\x1b(Bd\x1b[2;5He\x1b[6n\x1b[?2004h\x1b7".encode()
    )
    whole, pieces = Screen(4, 10), Screen(4, 10)
    answer = whole.feed(output)
    assert b"".join(pieces.feed(output[at : at + 1]) for at in range(len(output))) == answer
    assert (pieces.lines, pieces.cursor) == (whole.lines, whole.cursor)
    assert pieces.unsupported == whole.unsupported == []


def test_resize_crops_pads_and_scrolls() -> None:
    """Fewer rows than the cursor needs scroll the top ones off; nothing is wrapped anew."""
    screen = screen_after("one\r\ntwo\r\nthree\r\nfour")
    screen.resize(2, 3)
    assert (screen.scrollback, screen.lines) == (["one", "two"], ["thr", "fou"])
    assert screen.cursor == (1, 2)
    screen.resize(3, 6)
    assert screen.lines == ["thr", "fou", ""]


def test_readline_edits_over_the_wrap() -> None:
    """Typing, moving and erasing over the edge of a row leave the line right."""
    pytest.importorskip("readline")
    with run(READLINE) as terminal:
        terminal.wait_for("> ")
        terminal.type("one two three four five")
        terminal.wait_for(lambda screen: screen.lines[:2] == ["> one two three four", " five"])
        terminal.type("\x1b[D" * 9 + "\x7f" * 6)
        edited = ["> one two four five", ""]
        # The cursor comes behind the text, maybe in a piece of its own.
        terminal.wait_for(lambda screen: (screen.lines[:2], screen.cursor) == (edited, (0, 10)))
        terminal.type("X\r")
        terminal.wait_for("'one two Xfour five'")
        assert terminal.screen.unsupported == []


def test_readline_follows_the_size() -> None:
    """A program on a terminal learns its size at the start and at every change."""
    pytest.importorskip("readline")
    with run(READLINE) as terminal:
        terminal.wait_for("> ")
        terminal.resize(5, 12)
        terminal.type("0123456789abc" + "\x01" + "x")
        terminal.wait_for(lambda screen: screen.lines[:2] == ["> x012345678", "9abc"])
        terminal.type("\x7f\x05")
        terminal.wait_for(lambda screen: screen.cursor == (1, 3))
        terminal.type("\x7f" * 4 + "X\r")
        terminal.wait_for("'012345678X'")
        assert terminal.screen.unsupported == []


def test_size_is_told_to_the_program() -> None:
    """A program hears of a new size by a signal and reads it from the terminal."""
    program = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
while True: print(os.get_terminal_size(), flush=True), signal.sigwait([signal.SIGWINCH])
"""
    with run(program, rows=8, columns=50) as terminal:
        terminal.wait_for("columns=50, lines=8")
        assert not terminal.screen.shows("columns=60")
        terminal.resize(9, 60)
        terminal.wait_for("columns=60, lines=9")


def test_program_starts_with_the_usual_signals() -> None:
    """A program that is not Python's own is neither deaf to Ctrl-C nor to a closed pipe."""
    command = ["sh", "-c", "kill -PIPE $$; echo survived"]
    with Terminal(command, env={"PATH": os.environ["PATH"]}) as terminal:
        assert terminal.wait() == -signal.SIGPIPE
        assert terminal.screen.text() == ""


def test_prompt_toolkit_menu_is_shown_and_erased() -> None:
    """The completion menu and the status line are there while typing, and gone at the end."""
    pytest.importorskip("prompt_toolkit")
    with run(PROMPT_TOOLKIT, rows=16, columns=40) as terminal:
        terminal.wait_for("connected")
        assert terminal.screen.style_of("connected") == "7"
        terminal.type("/h")
        terminal.wait_for("/history")
        terminal.type("\t")
        terminal.wait_for("> /help")
        terminal.type("\r")
        terminal.wait_for(lambda screen: screen.lines[:2] == ["'/help'", ">"])
        terminal.wait_for("connected")
        assert "/history" not in terminal.screen.text()
        assert terminal.screen.unsupported == []


def test_prompt_toolkit_takes_a_paste_as_one() -> None:
    """A paste is marked when the program asked for it, and bare keys when not."""
    pytest.importorskip("prompt_toolkit")
    with run(PROMPT_TOOLKIT, rows=16, columns=40) as terminal:
        terminal.wait_for("connected")
        terminal.paste("one\ntwo")
        terminal.wait_for("two")
        assert terminal.screen.lines[:2] == ["> one", "two"]
        terminal.type("\r")
        terminal.wait_for(r"'one\ntwo'")
    with run(ECHO) as terminal:
        terminal.wait_for("> ")
        terminal.paste("one\ntwo\n")
        terminal.wait_for("'one'")
        terminal.wait_for("'two'")


def test_much_is_typed_while_much_is_written() -> None:
    """Neither side waits for the other for ever, and keys arrive as a terminal sends them."""
    program = """
import sys, tty
tty.setraw(0)
print("ready", flush=True)
for _ in range(400): print("x" * 99, end="\\r\\n", flush=True)
keys = sys.stdin.buffer.raw.read(9)
left = 60000 - 9
while left: left -= len(sys.stdin.buffer.raw.read(left))
print("all", keys)
"""
    with run(program, columns=40) as terminal:
        terminal.wait_for("ready")
        terminal.paste("one\ntwo\n\n" + "x" * 59991)
        terminal.wait_for(r"all b'one\rtwo\r\r'")
        assert terminal.wait() == 0


def test_ctrl_c_reaches_the_program() -> None:
    """The terminal is the program's own: Ctrl-C is a signal to it."""
    with run(ECHO) as terminal:
        terminal.wait_for("> ")
        terminal.type("\x03")
        assert terminal.wait() == -signal.SIGINT
        assert terminal.screen.shows("KeyboardInterrupt")


def test_signal_and_hang_up() -> None:
    """A signal and a closed window end the program, with its exit status."""
    for end in (lambda terminal: terminal.signal(signal.SIGTERM), Terminal.hang_up):
        with run(ECHO) as terminal:
            terminal.wait_for("> ")
            end(terminal)
            assert terminal.wait() in (-signal.SIGTERM, -signal.SIGHUP)


def test_all_output_is_read_before_the_status() -> None:
    """A program never waits for its reader, and its last words are on the screen."""
    with run("print('x\\n' * 20000, 'the end'); raise SystemExit(3)") as terminal:
        assert terminal.wait() == 3
        assert terminal.screen.lines[-2] == " the end"
        assert len(terminal.screen.scrollback) == 20002 - 8


def test_modes_of_the_terminal_outlive_the_program() -> None:
    """A test can tell a program that leaves the terminal raw from one that does not."""
    for program, sane in (("pass", True), ("import tty; tty.setraw(0)", False)):
        with run(program) as terminal:
            assert terminal.wait() == 0
            flags = terminal.termios()[3]
            assert [bool(flags & flag) for flag in (termios.ECHO, termios.ICANON)] == [sane, sane]


def test_failure_shows_the_screen() -> None:
    """What was waited for in vain is reported with what stood there; a dead program at once."""
    start = time.monotonic()
    with run("print('hello')") as terminal, pytest.raises(AssertionError) as failure:
        terminal.wait_for("goodbye", timeout=30)
    assert time.monotonic() - start < 20
    assert "goodbye" in str(failure.value)
    assert "0|hello" in str(failure.value)
    assert "status 0" in str(failure.value)
    with run(ECHO) as terminal, pytest.raises(AssertionError, match="the program runs"):
        terminal.wait_for("goodbye", timeout=0.1)


def test_settle_waits_for_silence() -> None:
    """Settling returns when output has paused, and fails when it never does."""
    with run("print('one', flush=True); input()") as terminal:
        terminal.wait_for("one")
        terminal.settle()
        assert terminal.screen.text() == "one"
    endless = "import time\nwhile True: print('x', flush=True); time.sleep(0.01)"
    with run(endless) as terminal:
        terminal.wait_for("x")
        with pytest.raises(AssertionError, match="does not end"):
            terminal.settle(timeout=0.5)
