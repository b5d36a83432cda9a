"""The wire of the chat: what both ends must agree on, and nothing else.

Bytes go in and lines come out; a line goes in and says what it is::

    >>> framer = Framer()
    >>> framer.feed(b"alice: hel")
    []
    >>> framer.feed(b"lo\\r\\n")
    [b'alice: hello']
    >>> parse("alice: hello")
    Line(kind=<Kind.SAID: 'said'>, name='alice', text='hello')
    >>> str(parse("alice: hello"))
    'alice: hello'

All that the server says is worded here, and what bytes may be text is decided here.
Nothing here touches a socket, a thread or a clock, but for what both programs read off
their command lines and for `Connection`, which stand last and apart.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import hashlib
import hmac
import os
import re
import select
import socket
import ssl
import struct
import sys
import textwrap
import threading
import time
import unicodedata
from typing import AnyStr, NamedTuple

__version__ = "1.0.0"

# --- Limits ------------------------------------------------------------------

FORMAT = "ascii"  # what every terminal, log and nc can carry
FORMATS = ("ascii", "utf-8")
HOST = "127.0.0.1"  # a program that nobody configured is not open to the network
PORT = 55555

MAX_LINE = 1024  # bytes of a client's line with its newline; twice IRC's 512
MAX_SERVER_LINE = 1152  # bytes: a client's longest line behind a name, a time and marks
MAX_UNFRAMED = 64 * 1024  # bytes without a newline: whoever sends them does not speak lines
MAX_NAME = 24  # letters, so that a name never pushes the text out of sight
MIN_KEY = 16  # hex digits: 64 bits cannot be guessed in the time a name is held
MAX_KEY = 128  # hex digits, as many as a SHA-512 has
MAX_POSITION_DIGITS = 18  # what fits a signed 64-bit integer, as in SQLite
MAX_MARKS = 6  # combining marks on one character; scripts stack four, 480 cover other lines
MAX_SUBNEGOTIATION = 1024  # bytes of telnet's; a terminal's name and size take under 100
MAX_TELNET_ANSWERS = 32  # a connection; a telnet asks for ten things at the most

REPLAY = 20  # lines of the history for a newcomer that asks for nothing else

# --- Errors ------------------------------------------------------------------


class Refusal(ValueError):
    """What was given cannot be taken; its text says why and how to mend it."""


# --- Framing -----------------------------------------------------------------


class Framer:
    """Cut a stream of bytes into lines, whatever chunks it comes in.

    A line comes out without its newline and the ``\\r`` before it.  One that is
    longer than `limit` bytes comes out too, cut short or not but too long for
    `decode`, so that it is refused in its place and memory stays bounded.
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self.limit = limit
        self.overrun = False  # MAX_UNFRAMED bytes came without a newline: no line follows
        self._partial = b""  # the start of the next line, at most `limit` + 1 bytes
        self._unframed = 0  # bytes since the last newline, kept or not

    @property
    def partial(self) -> bytes:
        """The beginning of the line that has no newline yet."""
        return self._partial

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes and return the lines that they complete."""
        if self.overrun:
            return []
        has_returns = b"\r" in data or self._partial.endswith(b"\r")
        pieces = data.split(b"\n")
        self._unframed += len(pieces[0])
        pieces[0] = self._partial + pieces[0]
        if self._unframed >= MAX_UNFRAMED or len(data) >= MAX_UNFRAMED:
            self._stop_at_overrun(pieces)
        if len(pieces) > 1:
            self._unframed = len(pieces[-1])
        self._partial = pieces.pop()[: self.limit + 1]
        return [piece.removesuffix(b"\r") for piece in pieces] if has_returns else pieces

    def _stop_at_overrun(self, pieces: list[bytes]) -> None:
        """Drop the first piece that is too long for any line, and all behind it."""
        lengths = [self._unframed, *map(len, pieces[1:])]
        for index, length in enumerate(lengths):
            if length >= MAX_UNFRAMED:
                self.overrun = True
                pieces[index:] = [b""]
                return


class Telnet:
    """Take telnet's own bytes out of a stream, whatever chunks it comes in (RFC 854).

    What stands behind an 0xFF and is nothing of telnet's stays where it is, and
    has its line refused.
    """

    IAC, DONT, WONT, SB = 0xFF, 0xFE, 0xFC, 0xFA
    _COMMAND = re.compile(
        rb"\xff(?:[\xf1-\xf9]|\xf0|([\xfb-\xfe])(.)"
        rb"|\xfa(?:[^\xff]|\xff[^\xf0]){0,%d}?\xff\xf0)" % MAX_SUBNEGOTIATION,
        re.DOTALL,
    )
    _BEGUN = re.compile(
        rb"\xff(?:[\xfb-\xfe]?|\xfa(?:[^\xff]|\xff[^\xf0]){0,%d}\xff?)" % MAX_SUBNEGOTIATION,
        re.DOTALL,
    )

    def __init__(self) -> None:
        self.answers = b""  # to be sent; whoever sends them empties it
        self._begun = b""  # a command of which the end has not come, at most
        self._answered = 0
        self._subnegotiates = True  # until one was too long: each look at one costs 0.1 ms

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes and return those that are text."""
        if not self._begun and b"\xff" not in data:  # as nearly always
            return data
        data = self._begun + data
        text, end = [], 0
        while (start := data.find(b"\xff", end)) >= 0:
            text.append(data[end:start])
            if not self._subnegotiates and data[start + 1 : start + 2] == b"\xfa":
                text.append(b"\xff")
                end = start + 1
            elif command := self._COMMAND.match(data, start):
                self._answer(command)
                end = command.end()
            elif self._BEGUN.fullmatch(data, start):
                self._begun = data[start:]
                return b"".join(text)
            else:
                if data[start + 1] == self.SB:
                    self._subnegotiates = False
                text.append(b"\xff")
                end = start + 1
        self._begun = b""
        return b"".join([*text, data[end:]])

    def _answer(self, command: re.Match[bytes]) -> None:
        """Refuse what the other end asks for or offers; the rest needs no answer."""
        refusal = {b"\xfd": self.WONT, b"\xfb": self.DONT}.get(command[1] or b"")
        if refusal and self._answered < MAX_TELNET_ANSWERS:
            self._answered += 1
            self.answers += bytes([self.IAC, refusal]) + command[2]


def foreign_protocol(start: bytes) -> str:
    """Name the other protocol that a connection's first bytes plainly belong to, or ''."""
    if start.startswith(b"\x16\x03"):  # a TLS handshake record, version 3.x
        return "TLS"
    first = start.partition(b"\n")[0]
    if re.fullmatch(rb"[A-Z]{3,7} \S+ HTTP/\d(\.\d)?\r?", first):
        return "HTTP"
    if re.match(rb"SSH-\d\.", first):
        return "SSH"
    return ""


# --- Text --------------------------------------------------------------------

_PLAIN = bytes(range(0x20, 0x7F)) + b"\n"  # what can be said in every format, and its newline
_JOINER = re.compile(r"(?<=[^\s\u200c\u200d])[\u200c\u200d](?=[^\s\u200c\u200d])")
_MARKS = ("Mn", "Me")  # categories of what is drawn on the character before
_FILLERS = "\u2800\u3164\u115f\u1160\uffa0\u200c\u200d\U0001d159"  # letters, but empty ones
_SPACE = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")


def is_printable(text: str) -> bool:
    """Tell whether a terminal shows every character as itself.

    No control, format or unassigned characters and so no bidirectional
    overrides; a joiner is allowed between two characters, as emoji have it.
    """
    if text.isascii():
        return text.isprintable()
    return _SPACE.sub(" ", _JOINER.sub("", text)).isprintable()


def decode(line: bytes, fmt: str = FORMAT, limit: int = MAX_LINE) -> str:
    """Turn a line as it came into text; raise `Refusal` for what is not text.

    A tab becomes a space.  `limit` counts the newline that `line` has lost.
    """
    if len(line) >= limit:
        raise Refusal(f"a line has at most {limit - 1} bytes; send it in parts")
    try:
        text = line.decode(fmt)
    except UnicodeDecodeError:
        raise Refusal(_not_in(fmt)) from None
    if text.isprintable():  # as nearly all are
        return text
    text = text.replace("\t", " ")
    if not is_printable(text):
        raise Refusal(_not_in(fmt))
    return text


def check_look(text: str) -> None:
    """Raise `Refusal` for a text that seems empty, or whose marks cover other lines."""
    if text.isascii():
        return
    if is_blank(text):
        raise Refusal("the line would look empty; write something that can be seen")
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in _MARKS else 0
        if marks > MAX_MARKS:
            raise Refusal(f"a character has at most {MAX_MARKS} marks; send it with fewer")


def is_blank(text: str) -> bool:
    """Tell whether nothing of a text can be seen: blanks, fillers and marks without a letter."""
    if text.isascii():
        return not text.strip()
    return all(c.isspace() or c in _FILLERS or unicodedata.category(c) in _MARKS for c in text)


def encode(text: str, fmt: str = FORMAT, limit: int = MAX_LINE) -> bytes:
    """Turn text into a line with its newline; raise `Refusal` for what no line can carry."""
    try:
        line = text.replace("\t", " ").encode(fmt)
    except UnicodeEncodeError as error:
        raise Refusal(f"{_not_in(fmt)}, and {text[error.start]!r} is not") from None
    decode(line, fmt, limit)
    return line + b"\n"


def _not_in(fmt: str) -> str:
    return f"only printable {fmt.upper()} characters can be sent here"


def escape(data: bytes | str, fmt: str = FORMAT) -> str:
    """Make bytes or text from anywhere safe to show: what is not printable as \\x.. or \\u...."""
    text = data.decode(fmt, "backslashreplace") if isinstance(data, bytes) else data
    if is_printable(text):
        return text
    return "".join(
        c if is_printable(c) else c.encode("unicode_escape").decode("ascii") for c in text
    )


# --- Names -------------------------------------------------------------------

_NAME = rf"[A-Za-z][A-Za-z0-9_-]{{0,{MAX_NAME - 1}}}"
_NAME_ALONE = re.compile(_NAME)
RESERVED = frozenset({"server"})


def check_name(name: str) -> str:
    """Return `name` if a person can have it, else raise `Refusal`."""
    if not name:
        raise Refusal("a name cannot be empty; choose one")
    if not _NAME_ALONE.fullmatch(name):
        raise Refusal(
            f"a name is one word of at most {MAX_NAME} letters, digits, - and _,"
            " and begins with a letter; choose another"
        )
    if fold(name) in RESERVED:
        raise Refusal(f'the name "{name}" is reserved; choose another')
    return name


def fold(name: str) -> str:
    """Return the form of a name under which it is unique."""
    return name.lower()


def look(name: str) -> str:
    """Return the form of a name that is the same for all that look like it on a screen."""
    return name.translate(_LOOKS).replace("rn", "m")


_LOOKS = str.maketrans({"I": "l", "1": "l", "O": "0"})


# --- What the client sends ---------------------------------------------------


class Introduction(NamedTuple):
    """The answer to ``NICK``: a name and where the conversation starts for it."""

    name: str
    position: int | None = None  # of the first room line wanted; None: the last ones
    last: int = REPLAY  # how many of them
    wants_position: bool = False  # FROM was given: answer with ``-> at N``
    key: str = ""  # with it, its owner takes its place back from a lost connection
    whispers: int | None = None  # private lines had under the key; None: it was not said

    def __str__(self) -> str:
        start = f"-{self.last}" if self.position is None else str(self.position)
        if self.whispers is not None:
            start += f"+{self.whispers}"
        return " ".join(filter(None, (self.name, start, self.key)))


_DIGITS = rf"\d{{1,{MAX_POSITION_DIGITS}}}"
_FROM = re.compile(rf"(?P<last>-?)(?P<start>{_DIGITS})(?:\+(?P<whispers>{_DIGITS}))?", re.ASCII)
_KEY = re.compile(rf"[0-9a-fA-F]{{{MIN_KEY},{MAX_KEY}}}")


def introduction(text: str) -> Introduction:
    """Read the answer to ``NICK``: ``NAME [FROM [KEY]]``; raise `Refusal` for anything else."""
    name, *rest = text.split() or [""]
    if not rest:
        return Introduction(check_name(text.strip()))
    start = _FROM.fullmatch(rest[0])
    key = "".join(rest[1:])
    if not start or len(rest) > 2 or (key and not _KEY.fullmatch(key)):
        raise Refusal(HOW_TO_ANSWER)
    if start["whispers"] and not key:
        raise Refusal(HOW_TO_ANSWER)
    return Introduction(
        check_name(name),
        position=None if start["last"] else int(start["start"]),
        last=int(start["start"]) if start["last"] else 0,
        wants_position=True,
        key=key,
        whispers=int(start["whispers"]) if start["whispers"] else None,
    )


def are_plain(lines: list[bytes], prefix: bytes) -> bool:
    """Tell whether all lines came as the room shows them, as nearly all do.

    They are plain text behind ``alice: ``, the sender's name, and no commands.  A
    look at all of them at once costs a third of a look at each.
    """
    text = b"\n".join([b"", *lines, b""])
    start = b"\n" + prefix
    return (
        0 < text.count(start) == len(lines)
        and start + b"/" not in text
        and start + b" " not in text
        and start + b"\n" not in text
        and not text.translate(None, _PLAIN)
        and max(map(len, lines)) < MAX_LINE
    )


def without_name(line: bytes, prefix: bytes) -> bytes:
    """Take ``alice: `` off a line, the sender's own name, as the classic client sends it.

    In upper or lower case; nothing else is taken off: ``std`` can say ``std::move``.
    """
    name, begin = prefix.lower(), line[: len(prefix)].lower()
    return line[len(prefix) :] if begin in (name, name.rstrip()) else line


def check_line(line: bytes, prefix: bytes, fmt: str = FORMAT) -> bytes:
    """Return a client's line without its name if it may be said, else raise `Refusal`."""
    text = decode(line, fmt)
    rest = without_name(text.encode(fmt), prefix)
    if rest.strip():
        check_look(rest.decode(fmt))
    if is_slip(rest.decode(fmt)):
        raise Refusal(SLIP)
    return rest


def is_slip(text: str) -> bool:
    """Tell whether a command stands behind blanks, where it would be said to everyone."""
    verb = (command(text.lstrip()) or ("", ""))[0]
    return text[:1].isspace() and (verb in COMMANDS or verb in ALIASES)


def is_command(line: bytes) -> bool:
    """Tell whether a line is a command: it begins with one slash, not with two."""
    return line.startswith(b"/") and not line.startswith(b"//")


_VERB = re.compile(rb"/(\w*)(?: |$)")


def is_question(line: bytes, prefix: bytes) -> bool:
    """Tell whether a client's line has an answer as its only effect, whatever else it is."""
    match = _VERB.match(line if line.startswith(b"/") else without_name(line, prefix))
    verb = match[1].decode("ascii").lower() if match else "me"
    return verb in QUESTIONS or not (verb in COMMANDS or verb in ALIASES)


def command(text: str) -> tuple[str, str] | None:
    """Split ``/verb argument`` in two; None for what is no command."""
    if not text.startswith("/") or text.startswith("//"):
        return None
    verb, _, argument = text[1:].partition(" ")
    return verb.lower(), argument.strip()


def unslash(line: AnyStr) -> AnyStr:
    """Return a text as it is said: ``//`` at its start is one slash."""
    return line[1:] if line[:1] in ("/", b"/") else line


def slash(text: str) -> str:
    """Return a text as it has to be sent so that its slash is no command."""
    return "/" + text if text.startswith("/") else text


#: What clients can ask for: how it is written and what it does.
COMMANDS = {
    "help": ("/help", "list the commands"),
    "names": ("/names", "see who is here"),
    "me": ("/me ACTION", "say what you do"),
    "msg": ("/msg NAME TEXT", "say something to one person alone"),
    "reply": ("/reply TEXT", "answer who wrote to you alone; /r TEXT does it too"),
    "nick": ("/nick NAME", "change your name"),
    "history": ("/history [N]", "see the last N lines with their times"),
    "search": ("/search WORD", "see the last lines with WORD in them"),
    "quit": ("/quit", "leave"),
    "op": ("/op PASSWORD", "become an operator, who can do what follows"),
    "kick": ("/kick NAME [REASON]", "put somebody out"),
    "ban": ("/ban NAME [MINUTES] [REASON]", "put somebody out for good or for a while"),
    "unban": ("/unban NAME", "let somebody in again"),
    "bans": ("/bans", "see who is banned"),
}
ALIASES = {"r": "reply"}
QUESTIONS = frozenset({"help", "names", "history", "search", "bans"})  # for the answer alone


# --- What the server sends ---------------------------------------------------


class Shape:
    """How one kind of line is written: `build` makes it of its parts, `read` finds them in it."""

    _PARTS = (("count", _DIGITS), ("more", _DIGITS), ("text", ".*"))
    _NAMES = (("name", _NAME), ("new", _NAME), ("by", _NAME))

    def __init__(self, template: str) -> None:
        self.build = template.format
        pattern = re.escape(template)
        for part, form in self._NAMES + self._PARTS:
            pattern = pattern.replace(rf"\{{{part}\}}", f"(?P<{part}>{form})")
        self.pattern = pattern
        self.read = re.compile(pattern, re.DOTALL | re.ASCII).fullmatch


class Kind(enum.Enum):
    """What a line from the server is; its first word tells."""

    SAID = "said"
    DID = "did"
    NOTICE = "notice"  # the room announces
    PRIVATE = "private"
    ANSWER = "answer"  # to you alone
    NICK = "nick"  # tell me your name
    PASS = "pass"  # tell me the room's password
    UNKNOWN = "unknown"  # not of this wire


#: The lines of the wire, the most frequent first, and last what every line fits.
SHAPES = {
    Kind.SAID: Shape("{name}: {text}"),
    Kind.DID: Shape("** {name} {text}"),
    Kind.NOTICE: Shape("* {text}"),
    Kind.PRIVATE: Shape("[from {name}] {text}"),
    Kind.ANSWER: Shape("-> {text}"),
    Kind.NICK: Shape("NICK"),
    Kind.PASS: Shape("PASS"),
    Kind.UNKNOWN: Shape("{text}"),
}
_read_said = SHAPES[Kind.SAID].read
_find_said = re.compile(rf"^(?:{SHAPES[Kind.SAID].pattern}|(.*))$", re.MULTILINE | re.ASCII).findall
_IN_ROOM = frozenset({Kind.SAID, Kind.DID, Kind.NOTICE})


class Line(NamedTuple):
    """A line from the server: its kind, whose it is and what it says.

    `name` is empty for what the room or the server says; ``str(line)`` is the
    line as it stands on the wire, without its newline.
    """

    kind: Kind
    name: str
    text: str

    @property
    def in_room(self) -> bool:
        """Whether the line is of the room's history and has a position there."""
        return self.kind in _IN_ROOM

    def __str__(self) -> str:
        return SHAPES[self.kind].build(name=self.name, text=self.text)


def parse(line: str) -> Line:
    """Tell what a line from the server is; the inverse of ``str(line)``."""
    read = ((kind, shape.read(line)) for kind, shape in SHAPES.items())
    kind, parts = next((kind, match.groupdict("")) for kind, match in read if match)
    return Line(kind, parts.get("name", ""), parts.get("text", ""))


def parts(line: str) -> tuple[str, str, str]:
    """Return the value of a line's kind, its name and its text: what a history stores."""
    if match := _read_said(line):  # as nearly all are
        return "said", match[1], match[2]
    kind, name, text = parse(line)
    return kind.value, name, text


def parts_of_each(lines: str) -> list[tuple[str, str, str]]:
    """Return the `parts` of each of some lines, which stand one below the other."""
    return [
        ("said", name, text) if name else parts(other) for name, text, other in _find_said(lines)
    ]


def said(name: str, text: str) -> str:
    """``alice: text``."""
    return SHAPES[Kind.SAID].build(name=name, text=text)


def did(name: str, text: str) -> str:
    """``** alice text``."""
    return SHAPES[Kind.DID].build(name=name, text=text)


def notice(text: str) -> str:
    """``* text``."""
    return SHAPES[Kind.NOTICE].build(text=text)


def private(name: str, text: str) -> str:
    """``[from alice] text``."""
    return SHAPES[Kind.PRIVATE].build(name=name, text=text)


_PRIVATE_BEGINS = private("", "").partition("]")[0].encode("ascii")


def is_private(line: bytes) -> bool:
    """Tell whether a line that the server sends is a private one."""
    return line.startswith(_PRIVATE_BEGINS)


def answer(text: str) -> str:
    """``-> text``."""
    return SHAPES[Kind.ANSWER].build(text=text)


# --- What the room announces -------------------------------------------------


class Event(enum.Enum):
    """What a line of the room announces of somebody."""

    JOINED = Shape("* {name} joined the chat")
    LEFT = Shape("* {name} left the chat")
    RENAMED = Shape("* {name} is now {new}")
    KICKED = Shape("* {name} was kicked by {by}")
    KICKED_FOR = Shape("* {name} was kicked by {by}: {text}")


class Announcement(NamedTuple):
    """What a ``*`` line tells: somebody joined, left, was kicked, or has a new name."""

    event: Event
    name: str
    new: str = ""  # the new name, of `Event.RENAMED` alone


def announcement(line: str) -> Announcement | None:
    """Tell what a line of the room announces; None when it is somebody's words or unknown."""
    for event in Event:
        if match := event.value.read(line):
            kind = Event.KICKED if event is Event.KICKED_FOR else event
            return Announcement(kind, match["name"], match.groupdict().get("new", ""))
    return None


def joined(name: str) -> str:
    """``* alice joined the chat``."""
    return Event.JOINED.value.build(name=name)


def left(name: str) -> str:
    """``* alice left the chat``."""
    return Event.LEFT.value.build(name=name)


def renamed(old: str, new: str) -> str:
    """``* alice is now alicia``."""
    return Event.RENAMED.value.build(name=old, new=new)


def kicked(name: str, by: str, reason: str) -> str:
    """``* bob was kicked by alice: reason``."""
    event = Event.KICKED_FOR if reason else Event.KICKED
    return event.value.build(name=name, by=by, text=reason)


# --- What the server answers -------------------------------------------------

WELCOME_NAMES = 20  # in a greeting; /names lists the others
LISTED_NAMES = 500  # in the answer to /names: some ten lines, also in a stadium

_AT = Shape("-> at {count}")
_AT_BOTH = Shape("-> at {count}+{more}")
_MISSED = Shape("-> missed {count} lines")
_MISSED_ONE = Shape("-> missed {count} line")
_MISSED_PRIVATE = Shape("-> missed {count} private lines")
_MISSED_PRIVATE_ONE = Shape("-> missed {count} private line")
_HERE = Shape("-> {count} here: {text}")
_NOW_NAMED = Shape("-> you are now {new}")
_SENT_TO = Shape("-> to {name}: {text}")
_NOT_SENT = Shape("-> not sent: {text}")


def welcome(name: str, others: list[str], count: int) -> str:
    """Greet a newcomer, the first of an empty room in its own way.

    `others` are the first `WELCOME_NAMES` of the `count` who are here already.
    """
    if not others:
        return answer(f"Welcome, {name}! You are the first one here; /help lists the commands")
    present = ", ".join(others) + _more(count - len(others))
    return answer(f"Welcome, {name}! /help lists the commands. Already here: {present}")


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def is_welcome(line: str) -> bool:
    """Tell whether a line says that the handshake is over."""
    return line.startswith(answer("Welcome"))


def welcome_back(name: str) -> str:
    """Greet somebody who takes a place back with the key."""
    return answer(f"Welcome back, {name}!")


def here(names: list[str], count: int) -> list[str]:
    """Tell who is present, in as many lines as it takes; `names` are the first of `count`."""
    text = f"{count} here: " + ", ".join(names) + _more(count - len(names))
    return [answer(part) for part in textwrap.wrap(text, MAX_LINE, break_on_hyphens=False)]


def listed(text: str) -> tuple[list[str], bool]:
    """Return the names in one line of `here`, and whether it ends with how many are left out."""
    names = re.sub(r"( ?and )?\d+ more$", "", text)
    return [name for name in re.split(", ?| and$", names) if name], names != text


def names_in(line: str) -> tuple[int, str] | None:
    """Return N and the names of ``-> N here: alice, bob,``, the first of `here`; else None."""
    match = _HERE.read(line)
    return (int(match["count"]), match["text"]) if match else None


def at(position: int, whispers: int | None = None) -> str:
    """Tell the position of the next room line, and how many private lines came before."""
    if whispers is None:
        return _AT.build(count=position)
    return _AT_BOTH.build(count=position, more=whispers)


def position_in(line: str) -> int | None:
    """Return N of ``-> at N`` or ``-> at N+M``, else None."""
    match = _AT.read(line) or _AT_BOTH.read(line)
    return int(match["count"]) if match else None


def whispers_in(line: str) -> int | None:
    """Return M of ``-> at N+M``, else None."""
    match = _AT_BOTH.read(line)
    return int(match["more"]) if match else None


def missed(count: int) -> str:
    """Tell how many room lines were skipped."""
    return (_MISSED_ONE if count == 1 else _MISSED).build(count=count)


def missed_in(line: str) -> int | None:
    """Return N of ``-> missed N lines``, else None."""
    match = _MISSED.read(line) or _MISSED_ONE.read(line)
    return int(match["count"]) if match else None


def missed_private(count: int) -> str:
    """Tell how many private lines are not to be had any more."""
    return (_MISSED_PRIVATE_ONE if count == 1 else _MISSED_PRIVATE).build(count=count)


def missed_private_in(line: str) -> int | None:
    """Return N of ``-> missed N private lines``, else None."""
    match = _MISSED_PRIVATE.read(line) or _MISSED_PRIVATE_ONE.read(line)
    return int(match["count"]) if match else None


def not_sent(why: object) -> str:
    """Refuse a line that was to be said."""
    return _NOT_SENT.build(text=why)


def is_refusal(line: str) -> bool:
    """Tell whether a line is ``-> not sent: ...``."""
    return _NOT_SENT.read(line) is not None


def sent_to(name: str, text: str) -> str:
    """Confirm a private line."""
    return _SENT_TO.build(name=name, text=text)


def now_named(name: str) -> str:
    """Confirm a new name."""
    return _NOW_NAMED.build(new=name)


def name_in(line: str) -> str | None:
    """Return the name of ``-> you are now NAME``, else None."""
    match = _NOW_NAMED.read(line)
    return match["new"] if match else None


def may_answer(line: str, verb: str) -> bool:
    """Tell whether an answer may be the first one to ``/verb``, or to a text if that is empty.

    Other commands have answers of many lines, which must not be taken for these.
    """
    if is_refusal(line) or (verb and line == unknown_command(verb)):  # of an older server
        return True
    if verb == "nick":
        return name_in(line) is not None or line.startswith(answer("usage: /nick"))
    if verb in ("msg", "reply", "r"):
        usages = answer("usage: /msg"), answer("usage: /reply")
        return _SENT_TO.read(line) is not None or line.startswith(usages)
    return bool(verb)


def usage(verb: str) -> str:
    """Tell how a command is written and what it does."""
    form, purpose = COMMANDS[verb]
    return answer(f"usage: {form}, to {purpose}")


def help_lines() -> list[str]:
    """Tell of all commands, a line each."""
    width = max(len(form) for form, _ in COMMANDS.values())
    return [answer(f"{form:{width}}  {purpose}") for form, purpose in COMMANDS.values()]


def unknown_command(verb: str) -> str:
    """Answer a command that there is not."""
    return answer(f"there is no /{verb[:20]}; /help lists the commands")


def recalled(when: float, line: str) -> str:
    """Tell a line of the history with its time (seconds since the epoch)."""
    return answer(f"{stamp(when)} {line}")


def stamp(when: float) -> str:
    """Return a time (seconds since the epoch) as it stands on the wire: ``2026-11-25 16:31Z``."""
    return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(when))


def searched_back_to(since: float | None) -> str:
    """Tell how far back a search came in its time; None when it did not begin."""
    if since is None:
        return "too many are searching; try again later"
    return f"looked back to {stamp(since)} only; further would take too long"


def nobody_said(word: str) -> str:
    """Answer a search that found nothing."""
    return answer(f"nobody said {word}")


def because(text: str, reason: str) -> str:
    """Return a text with its reason, if there is one."""
    return f"{text}: {reason}" if reason else text


def you_were_kicked(by: str, reason: str) -> str:
    """Tell somebody to be put out, and why."""
    return answer(because(f"you were kicked by {by}", reason))


def ban_lasts(until: float, reason: str) -> str:
    """Tell how long a ban holds, in seconds since the epoch (0 is for good), and why."""
    return because(f"until {stamp(until)}" if until else "for good", reason)


def you_are_banned(by: str, until: float, reason: str) -> str:
    """Tell somebody who may not come in, by whom and until when."""
    return answer(f"you are banned by {by} {ban_lasts(until, reason)}")


def banned(whom: str, until: float, reason: str, *, durable: bool) -> str:
    """Confirm a ban, and say so if it ends with the server, which keeps no history."""
    lasts = ban_lasts(until, reason)
    if not until and not durable:
        lasts = because("until the server ends, which keeps no history", reason)
    return answer(f"{whom} may not come in {lasts}")


def ban_listed(name: str, address: str, by: str, until: float, reason: str) -> str:
    """Tell of one ban."""
    return answer(f"{name} {address or '-'} by {by} {ban_lasts(until, reason)}")


def because_banned(until: float, reason: str) -> str:
    """Tell why somebody is put out: a ban, until when and why."""
    return f"banned {ban_lasts(until, reason)}"


def was_put_out(name: str) -> str:
    """Confirm a kick."""
    return answer(f"{name} was put out")


def unbanned(name: str) -> str:
    """Confirm the end of a ban."""
    return answer(f"{name} may come in again")


# Reasons, of a refusal or behind ``-> not sent: ``.
HOW_TO_ANSWER = "answer with NAME, NAME FROM or NAME FROM KEY; a name is one word"
SLIP = "begin the line with the slash, or with // to say it"
NAME_TAKEN = "the name {name} is taken; choose another"
NAME_LOOKS_TAKEN = "the name {name} looks like {other}, who is here; choose another"
NAME_BANNED = "the name {name} is banned; choose another"
NOBODY_CALLED = "nobody here is called {name}; /names lists who is here"
HAS_LEFT = "they have left already"
NOT_READING = "{name} is not reading; try again later"
NOBODY_WROTE = "nobody has written to you alone yet; /msg NAME TEXT writes first"
CORRESPONDENT_LEFT = "who wrote to you last has left; /msg NAME TEXT writes to others"
TOO_MANY_GUESSES = "too many passwords are tried from your address; try again later"
NOT_BANNED = "nobody called {name} is banned; /bans lists who is"
ONLY_OPERATORS = "only operators can do that; /op PASSWORD makes you one"
OWN_BAN = "that would put you out too; choose somebody else"
NOT_STORED = "it could not be stored; try again later"
UNFORESEEN = "something went wrong here; try again"

# Answers.
NOTHING_SAID = answer("nothing has been said yet")
NOT_ANNOUNCED = answer("the room was not told: it could not be stored")
NOT_KEPT = answer("it could not be stored, and will be forgotten when the server ends")
UNREADABLE = answer("the history cannot be read; try again later")
HISTORY_USAGE = answer("usage: /history [N], N from 1 to {most}")
NO_OPERATORS = answer("this room has no operators")
NO_MORE_OP_TRIES = answer("that was the third wrong password; there are no more tries here")
OPERATOR = answer("you are an operator; /kick, /ban, /unban and /bans are yours")
NOBODY_BANNED = answer("nobody is banned")
BYE = answer("bye")
WAITING = answer("the room is waiting; what you say is kept")
WAITING_AT_THE_DOOR = answer("the room is waiting; try again later")
GOES_ON = answer("the room goes on")
ROOM_FULL = answer("the room is full; try again later")
ADDRESS_FULL = answer("too many connections from your address; close one and try again")
TOO_MANY_UNNAMED = answer("too many connections without a name; connect again")
NO_MORE_TRIES = answer("that was the third try; connect again when you have another name")
BUSY = answer("the server is busy; try again later")
WRONG_PASSWORD = answer("wrong password")
NO_MORE_PASSWORDS = answer("wrong password; that was the third try")
WANTS_TLS = answer("this chat speaks TLS; connect with --tls")
TOO_LATE = answer("no name came in time; connect again")
UNFRAMED = answer(f"{MAX_UNFRAMED // 1024} KiB came without a newline; this chat speaks lines")
SHUTTING_DOWN = answer("the server is shutting down")
FOREIGN = {
    "TLS": answer("this is a chat without TLS; connect without it"),
    "HTTP": answer("this is a chat, not a web server; connect with client.py or nc"),
    "SSH": answer("this is a chat, not an SSH server; connect with client.py or nc"),
}

_FINAL = tuple(
    line.partition(";")[0]
    for line in (
        ROOM_FULL,
        ADDRESS_FULL,
        NO_MORE_TRIES,
        TOO_LATE,
        BUSY,
        WANTS_TLS,
    )
)


def is_put_out(line: str) -> bool:
    """Tell whether an answer means that somebody does not want us here."""
    return line.startswith((answer("you were kicked"), answer("you are banned")))


def is_final(line: str) -> bool:
    """Tell whether an answer means that the server closes and does not want us back now."""
    return line.startswith(_FINAL) or is_put_out(line)


# --- Off the command line, and secrets ---------------------------------------


def port(text: str) -> int:
    """Read a port number off the command line."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number; use 0 to 65535")
    return int(text)


def file(text: str) -> str:
    """Read the name of a file off the command line: an empty one is a slip, and none is none."""
    if not text:
        raise argparse.ArgumentTypeError("no file is named; name one, or leave it out")
    return text


def password(file: str | None, variable: str) -> str | None:
    """Return the password in the first line of a file, else in a variable of the environment.

    Raise `OSError` when the file cannot be read and `Refusal` when nothing is in it.
    """
    if file is None:
        found = os.environ.get(variable)
        if found == "":
            raise Refusal(f"the variable {variable} is empty; put a password in it, or unset it")
        return found
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        found = lines.readline(MAX_LINE + 1).rstrip("\r\n")  # there are files without an end
    if not 0 < len(found) < MAX_LINE:
        raise Refusal(f"{file} has no password in its first line; write one there")
    return found


def password_bytes(text: str) -> bytes:
    """Return a password as it is sent and compared, in any room and from any file."""
    return text.encode("utf-8", "surrogateescape")


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 fingerprint of a DER-encoded certificate, as AB:CD:..."""
    return hashlib.sha256(certificate).digest().hex(":").upper()


def is_password(given: bytes, right: bytes) -> bool:
    """Compare two passwords in a time that tells nothing of either."""
    hashes = (hashlib.sha256(one).digest() for one in (given, right))
    return hmac.compare_digest(*hashes)


# --- Carrying the bytes ------------------------------------------------------


RECEIVE = 32 * 1024  # bytes taken from a socket at once


class Connection:
    """A connected socket that one thread reads, another writes and its owner closes.

    The socket never blocks.  Waiting is done outside the lock, so that a reader
    waiting for hours keeps no writer from sending.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        # Telnet's Ctrl-C sends a byte as urgent, which would be missing where it stood.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        keep_alive(sock)
        self._sock = sock
        # Guards the descriptor: no other thread can be inside a call on it while
        # the owner closes it and the system gives its number to a new connection.
        self._lock = threading.Lock()

    def own_host(self) -> str:
        """Return the address of this end."""
        return str(self._sock.getsockname()[0])

    def fileno(self) -> int:
        """Return the descriptor, -1 when closed (for selectors)."""
        return self._sock.fileno()

    def receive(self, deadline: float | None = None) -> bytes:
        """Wait for bytes and return them; ``b""`` is the end.

        Raise `TimeoutError` when `deadline` (`time.monotonic` seconds) passes
        first, `OSError` when the connection broke.
        """
        while True:
            if not self._has_bytes():
                _wait(self._sock, deadline)
            data = self.receive_now()
            if data is not None:
                return data

    def receive_now(self) -> bytes | None:
        """Return the bytes that are there, ``b""`` at the end, None when none are there yet."""
        with self._lock:
            try:
                return self._sock.recv(RECEIVE)
            except (BlockingIOError, InterruptedError):
                return None

    def send(self, data: bytes | memoryview) -> int:
        """Send what the socket takes without waiting and return how many bytes that were.

        What it did not take must be offered again as it was, with more behind it or not.
        """
        with self._lock:
            try:
                return self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                return 0

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """End the connection, or a direction, from any thread.

        Who waits in `receive` finds the end at once, but for an end of the output alone.
        """
        with self._lock, contextlib.suppress(OSError):  # it may have ended already
            if how != socket.SHUT_RD:
                self._say_goodbye()
            # An SSLSocket's own shutdown would take its TLS away from the other thread.
            socket.socket.shutdown(self._sock, how)

    def abort(self) -> None:
        """End a connection to which nothing can be sent; on Linux what has come can be read."""
        with self._lock, contextlib.suppress(OSError):  # it has ended already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def drain(self, deadline: float) -> None:
        """End our direction and read the other to its end, or to the deadline.

        Without it, closing on unread bytes sends a reset, and the reset can
        destroy the last line that we sent before the peer has read it.
        """
        self.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # reset, or out of time: nobody to be polite to
            while self.receive(deadline):
                pass

    def close(self) -> None:
        """Close the socket; only its owner does."""
        with self._lock:
            self._say_goodbye()
            self._sock.close()

    def is_dead(self) -> bool:
        """Tell whether a peer that is owed bytes has acknowledged nothing for too long.

        A reader that is suspended is not dead: its system answers.  A peer that is owed
        nothing is not dead either: `keep_alive` finds out, and its connection breaks.
        False where the platform does not tell, and the system's own patience decides.
        """
        with self._lock, contextlib.suppress(OSError):  # closed already
            return _has_lost_its_peer(self._sock)
        return False

    def is_acknowledged(self) -> bool:
        """Tell whether the peer's system has all that was sent.

        Where the platform does not tell, what our own system has taken counts.
        """
        with self._lock:
            try:
                return not _unacknowledged(self._sock)
            except OSError:  # it broke, or is closed
                return False

    def shake_hands(self, deadline: float) -> None:
        """Do what has to be done before the first byte: nothing, without TLS."""
        return

    def _has_bytes(self) -> bool:
        """Tell whether there are bytes that waiting for the socket would not see."""
        return False

    def _say_goodbye(self) -> None:
        """Tell the peer, under the lock, that nothing follows: nothing to say without TLS."""
        return


class TlsConnection(Connection):
    """A connection inside TLS.

    An SSLSocket must not be used by two threads at once: the lock that guards the
    descriptor guards it too.  Which end we are is the context's to say.  It is said
    to the peer where we end (``close_notify``), or it could not tell it from a cut;
    a peer that ends without a word has ended all the same.
    """

    RECORD = 16 * 1024  # bytes; OpenSSL takes a record whole or not at all

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str = "") -> None:
        is_server = context.protocol == ssl.PROTOCOL_TLS_SERVER
        super().__init__(sock)
        # Without this, OpenSSL 3 refuses to send anything more when the input was cut.
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        context.sslsocket_class = _TlsSocket
        self._tls: ssl.SSLSocket = context.wrap_socket(
            sock,
            server_side=is_server,
            do_handshake_on_connect=False,
            server_hostname=None if is_server else host,
        )
        self._sock = self._tls
        # TLS was not agreed on, which the peer is told without, or is over by our
        # goodbye; what still comes is thrown away.
        self._outside = False

    def shake_hands(self, deadline: float) -> None:
        """Agree on keys; raise `ssl.SSLError`, or `TimeoutError` at the deadline."""
        writable = False
        while True:
            with self._lock:
                try:
                    return self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    writable = False
                except ssl.SSLWantWriteError:
                    writable = True
                except OSError:  # it speaks no TLS, or its connection broke
                    self._outside = True
                    raise
            try:
                _wait(self._sock, deadline, writable=writable)
            except TimeoutError:
                with self._lock:
                    self._outside = True
                raise

    def receive_now(self) -> bytes | None:
        """Return the bytes that are there, ``b""`` at the end, None when none are there yet."""
        with self._lock:
            try:
                if self._outside:
                    return None if socket.socket.recv(self._sock, RECEIVE) else b""
                return self._tls.recv(RECEIVE)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                return None

    def send(self, data: bytes | memoryview) -> int:
        """Send what the socket takes without waiting and return how many bytes that were."""
        sent = 0
        with self._lock:
            try:
                if self._outside:
                    return socket.socket.send(self._sock, data)
                while sent < len(data):
                    sent += self._tls.send(data[sent : sent + self.RECORD])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                pass
        return sent

    def certificate(self) -> bytes:
        """Return the peer's certificate, DER-encoded."""
        return self._tls.getpeercert(binary_form=True) or b""

    def _has_bytes(self) -> bool:
        with self._lock:
            return not self._outside and self._tls.pending() > 0

    def _say_goodbye(self) -> None:
        if not self._outside:
            self._outside = True
            # ValueError without TLS around it; else the peer has not said goodbye yet, or
            # the socket is full, or has ended.  In each case there is nothing to wait for.
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()


class _TlsSocket(ssl.SSLSocket):
    """One that takes its peer to be there: a reset is for the handshake to find.

    It may come at any moment, and wrap_socket() would raise and leave the descriptor open.
    """

    def getpeername(self) -> None:
        """Return nothing, at all times."""


def _wait(sock: socket.socket, deadline: float | None, *, writable: bool = False) -> None:
    """Wait until a socket can be read or written; raise `TimeoutError` at the deadline."""
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds <= 0:  # also for a peer that drips without a pause
        raise TimeoutError("the deadline has passed")
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(sock, select.POLLOUT if writable else select.POLLIN)
        ready = bool(poller.poll(None if seconds is None else seconds * 1000))
    else:  # Windows, where select() takes any descriptor; elsewhere none over 1023
        wanted = ([], [sock], [sock]) if writable else ([sock], [], [])
        ready = any(select.select(*wanted, seconds))
    if not ready:
        raise TimeoutError("the deadline has passed")


class Waker:
    """Wakes a thread that waits in a selector.

    `wake` is for any thread; `clear` and `close` are for the one that waits, or for its
    owner when nobody waits.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._awake = False

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make the descriptor readable until `clear`."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full, so readable already; or closed
                self._writer.send(b"\0")

    def clear(self) -> None:
        """Take back what `wake` did; what it was called for must be looked at afterwards."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        # Last: a `wake` before this has its byte taken, and must not count as one to come.
        self._awake = False

    def close(self) -> None:
        """Give the descriptors back."""
        self._reader.close()
        self._writer.close()


KEEPALIVE_IDLE = 60  # seconds of silence before the first probe
KEEPALIVE_INTERVAL = 15  # seconds between probes
KEEPALIVE_PROBES = 4  # unanswered ones until the peer counts as dead
# Seconds without an acknowledgement until a peer that is owed bytes counts as dead: as
# long as keepalive takes; with a closed window so long that two probes may be lost, which
# Linux sends every 120 s at the rarest.  TCP_USER_TIMEOUT would not tell the two apart.
UNACKNOWLEDGED = 120.0
UNACKNOWLEDGED_CLOSED = 300.0

# What Linux tells in struct tcp_info of a connection: segments that are unacknowledged,
# milliseconds since the last acknowledgement, bytes that are unsent, and the peer's window.
TCP_INFO = struct.Struct("=24x I 28x I 84x I 80x I")


def keep_alive(sock: socket.socket) -> None:
    """Send small lines at once and notice a dead peer, as far as the platform can."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPALIVE", KEEPALIVE_IDLE),  # its name on macOS
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _tcp_info(sock: socket.socket) -> tuple[int, ...]:
    """Return what Linux tells of a connection, as `TCP_INFO` has it; raise `OSError`."""
    assert sys.platform == "linux"
    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    # A kernel before 5.4 does not tell the window, which then counts as closed.
    return TCP_INFO.unpack(told.ljust(TCP_INFO.size, b"\0"))


def _unacknowledged(sock: socket.socket) -> bool:
    """Tell whether bytes are under way that the peer's system has not confirmed."""
    if sys.platform != "linux":
        return False
    unacknowledged, _, unsent, _ = _tcp_info(sock)
    return bool(unacknowledged or unsent)


def _has_lost_its_peer(sock: socket.socket) -> bool:
    """Tell whether bytes wait for a peer that has been silent too long; raise `OSError`."""
    if sys.platform != "linux":  # FreeBSD's TCP_INFO is laid out in another way
        return False
    unacknowledged, silence, unsent, window = _tcp_info(sock)
    if not unacknowledged and not unsent:
        return False
    seconds = UNACKNOWLEDGED if unacknowledged and window else UNACKNOWLEDGED_CLOSED
    return bool(silence > 1000 * seconds)
