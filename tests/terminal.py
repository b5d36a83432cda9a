"""A terminal for tests: a screen that obeys escape sequences, and a program running on it.

    with Terminal([sys.executable, "client.py"], rows=24, columns=80) as terminal:
        terminal.wait_for("your name: ")
        terminal.type("alice\\r")
        terminal.wait_for("Welcome, alice!")

`Screen` alone takes bytes and keeps what an xterm would show: no process, no clock. `Terminal` runs
a program on a pseudo-terminal and reads it only while a test waits for something, so there is no
thread. Rows and columns are counted from 0.
"""

import codecs
import os
import pty
import re
import selectors
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

# A cell is its text ("" in the second half of a wide character) and the style it stands in.
Row = list[tuple[str, str]]

TOKEN = re.compile(
    r"\x1b\[(?P<numbers>[<=>?]?[0-9;]*)(?P<csi>[ -/]*[@-~])"
    r"|\x1b[]PX^_](?P<string>[^\x07\x1b]*)(?:\x07|\x1b\\)"  # a title and the like
    r"|\x1b(?P<charset>[(-/][0-~])"
    r"|(?P<plain>\x1b[ -/]*[0-OQ-WYZ`-~]|[\x00-\x1a\x1c-\x1f\x7f-\x9f])"
    r"|(?P<character>[^\x1b])"
)
UNFINISHED = re.compile(r"\x1b(?:\[[<=>?]?[0-9;]*[ -/]*|[]PX^_][^\x07\x1b]*\x1b?|[ -/]*)?")
MAX_NUMBER = 9999  # a count beyond any screen is as good as this

WRAP, CURSOR, ALTERNATE, PASTE = 7, 25, 1049, 2004
# Of no effect here: 1 application cursor keys, 12 a blinking cursor, 1034 an 8-bit meta key.
MODES = {WRAP, CURSOR, ALTERNATE, PASTE, 1, 12, 1034}

# Which slot of the style each SGR code sets or clears; a colour goes by the first of its range.
SGR_ON = {code: code for code in (1, 2, 3, 4, 5, 7, 8, 9)}
SGR_ON |= dict.fromkeys((*range(30, 38), *range(90, 98)), 30)
SGR_ON |= dict.fromkeys((*range(40, 48), *range(100, 108)), 40)
SGR_OFF = {22: {1, 2}, 23: {3}, 24: {4}, 25: {5}, 27: {7}, 28: {8}, 29: {9}, 39: {30}, 49: {40}}
SGR_OFF[0] = set(SGR_ON.values())


def width(text: str) -> int:
    """Return how many cells the first character of text takes: 0, 1 or 2."""
    if not text or unicodedata.category(text[0]) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(text[0]) in "WF" else 1


def text_of(row: Row) -> str:
    """Return a row as it reads, without the blanks at its end."""
    return "".join(text for text, _ in row).rstrip(" ")


def mend(row: Row) -> None:
    """Blank each half of a wide character that has lost its other half."""
    for at, (text, style) in enumerate(row):
        left = row[at - 1][0] if at else ""
        right = row[at + 1][0] if at + 1 < len(row) else " "
        if (width(text) == 2 and right) or (not text and width(left) != 2):
            row[at] = (" ", style)


def fit(rows: list[Row], height: int, columns: int) -> list[Row]:
    """Return rows cropped or padded to a size."""
    fitted = [[*row[:columns], *[(" ", "")] * (columns - len(row))] for row in rows[:height]]
    for row in fitted:
        mend(row)
    return fitted + [[(" ", "")] * columns for _ in range(height - len(fitted))]


class Screen:
    """What an xterm of so many rows and columns shows after the bytes that were fed to it.

    `bells` counts BEL, `scrollback` holds the rows that left the main screen at its top, and
    `unsupported` the sequences that were not understood: a test asserts that it is empty.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.bells = 0
        self.scrollback: list[str] = []
        self.unsupported: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unread = ""
        self._wrapping = False
        self._answers = ""
        self._reset()

    def _reset(self) -> None:
        self._modes = {WRAP, CURSOR}
        self._pen: dict[int, str] = {}
        self._grid = fit([], self.rows, self.columns)
        self._main: list[Row] | None = None  # what the alternate screen hides
        self._top, self._end = 0, self.rows  # the scrolling region: its first row, and past it
        self._move(0, 0)
        self._save()

    @property
    def lines(self) -> list[str]:
        """Every row of the screen, without the blanks at its end."""
        return [text_of(row) for row in self._grid]

    @property
    def cells(self) -> list[Row]:
        """Every cell of the screen with its style, row by row."""
        return [list(row) for row in self._grid]

    @property
    def cursor(self) -> tuple[int, int]:
        """The cursor's row and column."""
        return self._row, self._column

    @property
    def cursor_visible(self) -> bool:
        """Whether the program shows the cursor."""
        return CURSOR in self._modes

    @property
    def bracketed_paste(self) -> bool:
        """Whether the program asked for pasted text to be marked as such."""
        return PASTE in self._modes

    def text(self) -> str:
        """Return the scrollback and the screen, without the blank rows at the end."""
        return "\n".join([*self.scrollback, *self.lines]).rstrip("\n")

    def shows(self, text: str) -> bool:
        """Whether a row, on the screen or scrolled off, holds a text; it may end in blanks."""
        return any(text in row.ljust(self.columns) for row in self.scrollback + self.lines)

    def style_of(self, text: str) -> str:
        """Return the SGR codes that the first character of text stands in, such as "1;31"."""
        for row in self._grid:
            start = "".join(cell for cell, _ in row).find(text)
            for cell, style in row:
                if 0 <= start < len(cell):
                    return style
                start -= len(cell)
        raise AssertionError(f"{text!r} is not on the screen:\n{self}")

    def __str__(self) -> str:
        shown = [f"{number:3}|{line}" for number, line in enumerate(self.lines)]
        size = f"{self.rows} rows, {self.columns} columns, {len(self.scrollback)} scrolled off"
        return "\n".join([*shown, f"({size}; cursor: row {self._row}, column {self._column})"])

    def feed(self, data: bytes) -> bytes:
        """Take output in any chunking; return what the terminal answers to it."""
        text, at = self._unread + self._decoder.decode(data), 0
        while at < len(text) and not UNFINISHED.fullmatch(text, at):
            if token := TOKEN.match(text, at):
                self._obey(token)
            else:
                self.unsupported.append(text[at])
            at = token.end() if token else at + 1
        self._unread = text[at:]
        answers, self._answers = self._answers, ""
        return answers.encode()

    def resize(self, rows: int, columns: int) -> None:
        """Crop or pad the rows; the top ones scroll off if the cursor would be below the last."""
        excess = max(0, self._row - rows + 1)
        if self._main is None:
            self.scrollback += map(text_of, self._grid[:excess])
        else:
            self._main = fit(self._main, rows, columns)
        self._grid = fit(self._grid[excess:], rows, columns)
        self.rows, self.columns = rows, columns
        self._top, self._end = 0, rows
        self._move(self._row - excess, self._column)

    def _obey(self, token: re.Match[str]) -> None:
        try:
            if character := token["character"]:
                self._print(character) if width(character) else self._combine(character)
            elif token["plain"]:
                self.PLAIN[token["plain"]](self)
            elif token["csi"]:
                self._obey_csi(token["csi"], token["numbers"])
        except KeyError:
            self.unsupported.append(token[0])

    def _obey_csi(self, name: str, text: str) -> None:
        private = text[:1] if text[:1] in "<=>?" else ""
        values = text.removeprefix(private).split(";")
        numbers = [min(int(value or 0), MAX_NUMBER) for value in values]
        if private + name in self.COUNTED:
            self.COUNTED[private + name](self, *[number or 1 for number in numbers[:2]])
        else:
            self.LISTED[private + name](self, numbers)

    def _print(self, character: str) -> None:
        cells = width(character)
        if WRAP in self._modes and (self._wrapping or self._column + cells > self.columns):
            self._next_line()
        start = min(self._column, self.columns - cells)
        end, row = start + cells, self._grid[self._row]
        torn = not row[start][0] or (end < self.columns and not row[end][0])
        row[start:end] = [(character, self._style()), ("", self._style())][:cells]
        if torn:
            mend(row)
        self._move(self._row, end)
        # The cursor stands on the last column until the next character makes the line wrap.
        self._wrapping = end == self.columns

    def _combine(self, mark: str) -> None:
        row, at = self._grid[self._row], self._column - (not self._wrapping)
        at -= at > 0 and not row[at][0]
        if at >= 0:
            row[at] = (row[at][0] + mark, row[at][1])

    def _style(self) -> str:
        return ";".join(self._pen[slot] for slot in sorted(self._pen))

    def _blanks(self, count: int) -> Row:
        return [(" ", self._pen.get(40, ""))] * count  # xterm erases with the background colour

    def _move(self, row: int, column: int) -> None:
        self._row = min(max(row, 0), self.rows - 1)
        self._column = min(max(column, 0), self.columns - 1)
        self._wrapping = False

    def _step(self, rows: int, column: int) -> None:
        """Move by rows, not out of the scrolling region when in it."""
        first = self._top if self._row >= self._top else 0
        last = self._end - 1 if self._row < self._end else self.rows - 1
        self._move(min(max(self._row + rows, first), last), column)

    def _save(self) -> None:
        self._saved = (self._row, self._column, self._wrapping, dict(self._pen))

    def _restore(self) -> None:
        row, column, wrapping, pen = self._saved
        self._move(row, column)
        self._wrapping, self._pen = wrapping, dict(pen)

    def _bell(self) -> None:
        self.bells += 1

    def _line_feed(self) -> None:
        if self._row == self._end - 1:
            self._scroll(1)
        else:
            self._move(self._row + 1, self._column)

    def _next_line(self) -> None:
        self._move(self._row, 0)
        self._line_feed()

    def _reverse_feed(self) -> None:
        if self._row == self._top:
            self._shift_rows(self._top, 0, 1)
        else:
            self._move(self._row - 1, self._column)

    def _scroll(self, count: int) -> None:
        if self._top == 0 and self._main is None:
            self.scrollback += map(text_of, self._grid[: min(count, self._end)])
        self._shift_rows(self._top, count, 0)

    def _shift_rows(self, at: int, cut: int, add: int) -> None:
        """Cut rows and add blank ones, in the scrolling region from a row on."""
        blank = [self._blanks(self.columns) for _ in range(self._end - at)]
        rows = blank[:add] + self._grid[at + cut : self._end] + blank[add:]
        self._grid[at : self._end] = rows[: self._end - at]

    def _edit_rows(self, cut: int, add: int) -> None:
        if self._top <= self._row < self._end:
            self._shift_rows(self._row, cut, add)
            self._move(self._row, 0)

    def _edit(self, cut: int, add: int) -> None:
        """Cut cells at the cursor and add blank ones; the rest of the line moves."""
        self._splice(self._row, self._column, cut, add)
        self._wrapping = False

    def _splice(self, row: int, at: int, cut: int, add: int) -> None:
        cells = self._grid[row]
        cells[at : at + cut] = self._blanks(add)
        cells[:] = (cells + self._blanks(cut))[: self.columns]
        mend(cells)

    def _erase_line(self, numbers: list[int]) -> None:
        column, size = self._column, self.columns
        start, count = {0: (column, size - column), 1: (0, column + 1), 2: (0, size)}[numbers[0]]
        self._splice(self._row, start, count, count)
        self._wrapping = False

    def _erase_display(self, numbers: list[int]) -> None:
        above, below = [*range(self._row)], [*range(self._row + 1, self.rows)]
        for row in {0: below, 1: above, 2: above + below, 3: []}[numbers[0]]:
            self._splice(row, 0, self.columns, self.columns)
        if numbers[0] == 3:
            self.scrollback.clear()
        else:
            self._erase_line(numbers)

    def _set_region(self, numbers: list[int]) -> None:
        top, end = [*numbers, 0][:2]
        top, end = max(top - 1, 0), min(end or self.rows, self.rows)
        if top + 1 < end:
            self._top, self._end = top, end
            self._move(0, 0)

    def _set_modes(self, numbers: list[int]) -> None:
        self._check(MODES, numbers)
        if ALTERNATE in numbers and self._main is None:
            self._save()
            self._before = self._saved
            self._main, self._grid = self._grid, fit([], self.rows, self.columns)
        self._modes |= set(numbers)

    def _unset_modes(self, numbers: list[int]) -> None:
        self._check(MODES, numbers)
        if ALTERNATE in numbers and self._main is not None:
            self._grid, self._main = self._main, None
            self._saved = self._before
            self._restore()
        self._modes -= set(numbers)

    def _check(self, known: set[int], numbers: list[int]) -> None:
        if not known.issuperset(numbers):
            raise KeyError(numbers)

    def _set_style(self, numbers: list[int]) -> None:
        codes = iter(numbers)
        for code in codes:
            if code in (38, 48):
                kind = next(codes, 0)
                colour = islice(codes, {5: 1, 2: 3}[kind])
                self._pen[code - 8] = ";".join(map(str, (code, kind, *colour)))
            elif code in SGR_ON:
                self._pen[SGR_ON[code]] = str(code)
            else:
                for slot in SGR_OFF[code]:
                    self._pen.pop(slot, None)

    def _report(self, numbers: list[int]) -> None:
        position = f"\x1b[{self._row + 1};{self._column + 1}R"
        self._answers += {5: "\x1b[0n", 6: position}[numbers[0]]

    def _identify(self, _: list[int]) -> None:
        self._answers += "\x1b[?62;22c"  # a VT220 with colours

    def _ignore(self, *_: object) -> None:
        pass

    # Controls and escapes of one letter.
    PLAIN: ClassVar[dict[str, Callable[["Screen"], None]]] = {
        "\a": _bell,
        "\b": lambda self: self._move(self._row, self._column - 1),
        "\t": lambda self: self._move(self._row, self._column // 8 * 8 + 8),
        "\r": lambda self: self._move(self._row, 0),
        **dict.fromkeys(("\n", "\v", "\f", "\x1bD"), _line_feed),
        "\x1bE": _next_line,
        "\x1bM": _reverse_feed,
        "\x1b7": _save,
        "\x1b8": _restore,
        "\x1bc": _reset,
        **dict.fromkeys(("\0", "\x0e", "\x0f", "\x7f", "\x1b=", "\x1b>"), _ignore),
    }
    # CSI sequences whose numbers are counts or places: 0 or nothing stands for 1.
    COUNTED: ClassVar[dict[str, Callable[..., None]]] = {
        "A": lambda self, n=1, *_: self._step(-n, self._column),
        "B": lambda self, n=1, *_: self._step(n, self._column),
        "C": lambda self, n=1, *_: self._move(self._row, self._column + n),
        "D": lambda self, n=1, *_: self._move(self._row, self._column - n),
        "E": lambda self, n=1, *_: self._step(n, 0),
        "F": lambda self, n=1, *_: self._step(-n, 0),
        "G": lambda self, n=1, *_: self._move(self._row, n - 1),
        "d": lambda self, n=1, *_: self._move(n - 1, self._column),
        **dict.fromkeys("Hf", lambda self, n=1, m=1: self._move(n - 1, m - 1)),
        "X": lambda self, n=1, *_: self._edit(n, n),
        "@": lambda self, n=1, *_: self._edit(0, n),
        "P": lambda self, n=1, *_: self._edit(n, 0),
        "L": lambda self, n=1, *_: self._edit_rows(0, n),
        "M": lambda self, n=1, *_: self._edit_rows(n, 0),
        "S": lambda self, n=1, *_: self._scroll(n),
        "T": lambda self, n=1, *_: self._shift_rows(self._top, 0, n),
    }
    LISTED: ClassVar[dict[str, Callable[["Screen", list[int]], None]]] = {
        "J": _erase_display,
        "K": _erase_line,
        "m": _set_style,
        "r": _set_region,
        "?h": _set_modes,
        "?l": _unset_modes,
        "s": lambda self, _: self._save(),
        "u": lambda self, _: self._restore(),
        "n": _report,
        "c": _identify,
        # Window operations, the cursor's shape, and questions that an old xterm leaves unanswered.
        **dict.fromkeys(("t", " q", "?u", ">q", ">c", ">m"), _ignore),
    }


# Makes the terminal on its standard input its own, then becomes the program. A function run between
# fork and exec would do the same, but forking is not safe in a process that has threads.
LAUNCH = """
import os, signal, sys
os.login_tty(0)
for number in (signal.SIGINT, signal.SIGPIPE):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
OWN = ("TERM", "LINES", "COLUMNS")  # what the environment may say of another terminal
TICK = 0.02  # seconds; nothing portable wakes a wait when a process ends, so it is looked at
QUIET = 0.15  # seconds


class Terminal:
    """A program on a terminal of its own: type, wait for what the screen then shows.

    `status` is the exit status (negative: the signal) once the program has ended and all its output
    is on the `screen`. The environment is this process's own unless given. The program leads its
    session: with no shell to go back to, Ctrl-Z does nothing.
    """

    def __init__(
        self,
        command: Sequence[str],
        rows: int = 24,
        columns: int = 80,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.screen = Screen(rows, columns)
        self.status: int | None = None
        self._keys = b""
        self._heard = 0.0
        # The program's end stays open here too: to look at its modes, after the program as well.
        self._master, self._slave = pty.openpty()
        os.set_blocking(self._master, False)
        termios.tcsetwinsize(self._slave, (rows, columns))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._master, selectors.EVENT_READ)
        if env is None:
            env = {key: value for key, value in os.environ.items() if key not in OWN}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCH, *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={"TERM": "xterm-256color", **env},
            cwd=cwd,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.hang_up()
        self._selector.close()
        os.close(self._slave)

    def type(self, text: str) -> None:
        """Press the keys of text: Enter is "\\r", Backspace "\\x7f", Left "\\x1b[D"."""
        self._keys += text.encode()
        if not self._pump(lambda: not self._keys, 10.0):
            self._fail("the program does not read what is typed")

    def paste(self, text: str) -> None:
        """Paste text, marked as pasted if the program has asked for that by now."""
        self._step(0)
        text = text.replace("\n", "\r")  # as terminals do
        self.type(f"\x1b[200~{text}\x1b[201~" if self.screen.bracketed_paste else text)

    def wait_for(self, wanted: str | Callable[[Screen], bool], timeout: float = 10.0) -> None:
        """Wait until the screen shows a text or a condition of it holds."""
        holds = wanted if callable(wanted) else lambda screen: screen.shows(wanted)
        self._pump(lambda: holds(self.screen) or self.status is not None, timeout)
        if not holds(self.screen):
            self._fail(f"waited for {wanted!r}")

    def settle(self, quiet: float = QUIET, timeout: float = 10.0) -> None:
        """Wait until no output has come for a while, as for a test that nothing is shown."""
        self._heard = time.monotonic()
        if not self._pump(lambda: time.monotonic() - self._heard >= quiet, timeout):
            self._fail("the output does not end")

    def wait(self, timeout: float = 10.0) -> int:
        """Wait for the end of the program; return its exit status."""
        self._pump(lambda: self.status is not None, timeout)
        if self.status is None:
            self._fail("the program has not ended")
        return self.status

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the window; the kernel tells the program with SIGWINCH."""
        self._step(0)
        self.screen.resize(rows, columns)
        termios.tcsetwinsize(self._master, (rows, columns))

    def hold(self, *, held: bool = True) -> None:
        """Have what the program writes wait, as Ctrl-S does, or go on."""
        termios.tcflow(self._slave, termios.TCOOFF if held else termios.TCOON)

    def signal(self, number: int) -> None:
        """Send a signal to the program."""
        self._process.send_signal(number)

    def caught(self) -> bool:
        """Tell, on Linux, whether no signal sent to the program still waits for it."""
        fields = Path(f"/proc/{self._process.pid}/status").read_text().split()
        return not any(int(fields[fields.index(name) + 1], 16) for name in ("SigPnd:", "ShdPnd:"))

    def termios(self) -> list[Any]:
        """Return the terminal's modes, as `termios.tcgetattr` does."""
        return termios.tcgetattr(self._slave)

    def hang_up(self) -> None:
        """Close the window: the kernel sends SIGHUP, and reads and writes of the program fail."""
        if self._master >= 0:
            self._selector.unregister(self._master)
            os.close(self._master)
            self._master = -1

    def _pump(self, done: Callable[[], bool], timeout: float) -> bool:
        """Keep bytes moving both ways until done, which is returned."""
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() >= deadline:
                return False
            self._step(TICK)
        return True

    def _step(self, timeout: float) -> None:
        ended = self._process.poll()
        self._selector.select(timeout)
        if data := self._transfer():
            self._heard = time.monotonic()
            self._keys += self.screen.feed(data)
        elif ended is not None:
            self.status = ended

    def _transfer(self) -> bytes:
        """Write what is typed, as much as fits; return the output that is there."""
        if self._master < 0:
            return b""
        with suppress(BlockingIOError):
            if self._keys:
                self._keys = self._keys[os.write(self._master, self._keys) :]
        with suppress(BlockingIOError):
            return os.read(self._master, 65536)
        return b""

    def _fail(self, complaint: str) -> NoReturn:
        state = "runs" if self.status is None else f"has ended with status {self.status}"
        raise AssertionError(f"{complaint}; the program {state}\n{self.screen}")
