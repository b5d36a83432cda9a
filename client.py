"""The chat client: shows what the room says and sends what is typed.

    python client.py --host 127.0.0.1 --port 55555
    make 2>&1 | python client.py --name build

or, from Python, a bot::

    with ChatClient("clock") as chat:
        for line in chat:
            if line.text == "!time":
                chat.send(time.ctime())

Two threads matter: `ChatClient.receive` has the connection to itself, but for the
first `connect` before it starts, the goodbye if it never does, and `leave`, which breaks
it off in the end; `write` reads what the user types and leaves it in `Outgoing` for
`receive` to send.  Each line stays there until the room has broadcast it, so a
connection that breaks loses nothing and says nothing twice.

Four things live for as long as their names say, and each new one begins anew: the
lines that are `Outgoing`, our `Place` in the room, an `Absence` from it and a
`Session`, which is one connection.  `ChatClient` has one of each.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is for who runs it with an older one
    needed = "client.py: this needs Python 3.11 or newer, and is run by {}.{}"
    sys.exit(needed.format(*sys.version_info))

import _thread
import abc
import argparse
import calendar
import contextlib
import enum
import errno
import io
import math
import os
import random
import re
import selectors
import signal
import socket
import ssl
import threading
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

try:
    import fcntl
    import termios
except ImportError:  # Windows has its own kind of terminal, and of locks
    fcntl = termios = None  # type: ignore[assignment]

import protocol
from protocol import (
    Connection,
    Event,
    Framer,
    Introduction,
    Kind,
    Line,
    Refusal,
    TlsConnection,
    Waker,
)

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import Application
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.layout.processors import Processor

CONNECT_TIMEOUT = 10.0  # seconds for the connection, and again for being let in
RETRY_FIRST = 0.5  # seconds before the first try to come back
RETRY_MAX = 30.0  # seconds between tries at the most
LEAVE_TIMEOUT = 3.0  # seconds for the server to say goodbye
PATIENCE = 10.0  # seconds until a server that is silent, or has us wait, is spoken of
CATCH_UP_TIMEOUT = 30.0  # seconds of silence in which a server that let us in tells nothing
MAX_WAITING = 10_000  # lines not yet broadcast; with more, `send` waits
MAX_WRITERS = 100  # names of who wrote to us alone
MAX_HELD = 1000  # lines of a replay that are kept until it is complete; it may have no end
MAX_POSITION = 10**protocol.MAX_POSITION_DIGITS - 1  # more than that no server takes
MAX_TEXT = protocol.MAX_LINE - protocol.MAX_NAME - 2  # bytes, so that any name fits before it
SEND_AHEAD = 16 * 1024  # bytes given to the socket at once
# By which `receive` tells the main thread that it is over; SIGTERM may be ignored.
ENDED = getattr(signal, "SIGUSR2", signal.SIGTERM)
# Left by an exception, these would keep their lock for ever: others would wait for it.
UNLEAVABLE = {
    function.__code__
    for function in (
        *(threading.Event.set, threading.Event.clear),
        *(threading.Condition.__enter__, threading.Condition.__exit__),
    )
}
# By which the main thread is told to look up, whatever it waits for.
KNOCK = getattr(signal, "SIGUSR1", signal.SIGTERM)
EXITS = ("exit", "quit", ":q")  # how other programs are left
INTERRUPT_AGAIN = 2.0  # seconds in which a second Ctrl-C leaves
MAX_STOPS = 1000  # in the background; without a shell to go on in, nothing stops
# To the left edge, and nothing from there on: prompt_toolkit has gone to the row where its
# prompt begins, but so many columns to the left as it believes that the text has.
CLEAR_ROW = "\r\x1b[J"
MAX_SETTINGS = 64 * 1024  # characters; all settings with a comment each are a twentieth of it
MAX_RECALL = 1000  # lines typed that are kept over sessions
UNATTENDED = 300.0  # seconds without a line typed in which the user has hardly read along
HOW_TO_LEAVE = "Ctrl-C again, Ctrl-D or /quit leaves"


# --- What happens ------------------------------------------------------------


class Refused(Exception):
    """The server does not let us in; the text is its reason."""


class NameRefused(Refused):
    """It would, under another name."""


class PasswordRefused(Refused):
    """It would, with the right password."""


class PutOut(Refused):
    """Somebody does not want us here."""


class OutputClosed(Exception):
    """Nobody reads what we show, as behind ``| head``."""


class Notice(NamedTuple):
    """What the client itself has to say, as ``-- text --``."""

    text: str
    unsent: str = ""  # a line that was refused, which can be mended and sent again

    def __str__(self) -> str:
        return f"-- {self.text} --"


def count_lines(count: int) -> str:
    """Return how many lines, in words."""
    return f"{count} line{'' if count == 1 else 's'}"


class Mark(Notice):
    """Stands between what was said earlier and what is said now."""


BEFORE = Mark("above: said before you came")
WHILE_AWAY = Mark("above: said while you were away")


class Heard(Line):
    """A line from the server."""

    earlier = False  # said before we came, or while we were away


class Earlier(Heard):
    """A line that was said before we came, or while we were away."""

    earlier = True


# --- What is on its way ------------------------------------------------------


class Typed(NamedTuple):
    """A line on its way to the room."""

    text: str  # as it was typed
    verb: str  # of a command, else empty
    echo: tuple[Kind, str] | None  # as the room says it, its receipt; None for a command
    name: str = ""  # under which it was sent


def typed(text: str) -> Typed:
    """Tell how the room will say what was typed."""
    text = text.replace("\t", " ")
    request = protocol.command(text)
    if request is None:
        return Typed(text, "", (Kind.SAID, protocol.unslash(text)))
    verb, argument = request
    if verb == "me" and argument:
        return Typed(text, verb, (Kind.DID, argument))
    return Typed(text, verb, None)


# Also with a slip before it, and on any line of several; a word alone may be a name.
SECRET = re.compile(r"\s*(?:/+op\s+\S.*|op\s+\S+\s*)", re.IGNORECASE)


def discreet(text: str) -> str:
    """Return what was typed without the password that may be in it."""
    lines = text.split("\n")
    return "\n".join("/op ..." if SECRET.fullmatch(line) else line for line in lines)


class Outgoing:
    """The lines on their way: nothing that was typed is lost, and nothing is said twice.

    A line waits, is sent, and is done with when it has its receipt: a text when
    the room says it, under the name that it was sent with; a command when it is
    answered; either when it is refused.  The server answers in the order in which
    it was asked, so an answer belongs to the oldest line that has none.

    After a loss we hear what the room has said meanwhile.  What is in there has
    its receipt.  Heard without a gap, a text that is not in there never will be,
    for the server takes nothing more from the old connection: it is sent again,
    before all that waits.  With a gap nobody can know: it is given up, and its
    author told.  A command is never sent again.

    Nothing is sent behind a ``/nick`` until its answer tells the name by which the
    next receipt is known.  Any thread may call, and `send` and `flush` wait here.
    """

    def __init__(self) -> None:
        # Guards all below; notified when a line is done with, and at the end.
        self._changed = threading.Condition()
        self._waiting: deque[Typed] = deque()  # not sent yet
        self._sent: deque[Typed] = deque()  # without a receipt
        self._ended = False  # nobody waits any more
        self._failed = 0  # lines that were refused or given up

    def add(self, item: Typed) -> None:
        """Let a line wait; the caller waits too while there are `MAX_WAITING`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._count() < MAX_WAITING)
            self._waiting.append(item)

    def wait_for_receipts(self) -> None:
        """Wait until every line has its receipt, or `end`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._count())

    def end(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self, name: str) -> Typed | None:
        """Return the next line to be sent, under this name, when there is one and it may."""
        with self._changed:
            if not self._waiting or (self._sent and self._sent[-1].verb == "nick"):
                return None
            self._sent.append(self._waiting.popleft()._replace(name=name))
            return self._sent[-1]

    def new_name(self) -> str:
        """Return the name in a ``/nick`` that was sent and not answered, or nothing."""
        with self._changed:
            last = self._sent[-1] if self._sent else None
            return _new_name(last.text) if last and last.verb == "nick" else ""

    def take_new_name(self) -> str:
        """Return the name in a ``/nick`` that waits, which is done with then, or nothing."""
        with self._changed:
            for item in self._waiting:
                if item.verb == "nick":
                    self._waiting.remove(item)
                    self._changed.notify_all()
                    return _new_name(item.text)
        return ""

    def confirm(self, line: Line) -> bool:
        """Take a line of the room as the receipt of a text; say whether it is one."""
        with self._changed:
            for item in self._sent:
                if (item.echo, item.name) == ((line.kind, line.text), line.name):
                    self._sent.remove(item)
                    self._changed.notify_all()
                    return True
        return False

    def answer(self, text: str) -> Typed | None:
        """Return the line that an answer is to, which is done with, or None."""
        with self._changed:
            if not self._sent:
                return None
            oldest = self._sent[0]
            if not protocol.may_answer(text, "" if oldest.echo else oldest.verb):
                return None
            if protocol.is_refusal(text) and oldest.verb != "quit":
                self._failed += 1
            self._changed.notify_all()
            return self._sent.popleft()

    def resume(self, *, unbroken: bool) -> list[Typed]:
        """Go on after a loss; return the commands that had no answer.

        `unbroken` says that all was heard that the room has said meanwhile.
        """
        with self._changed:
            commands = [item for item in self._sent if item.echo is None]
            self._sent = deque(item for item in self._sent if item.echo)
            if unbroken:
                self._waiting.extendleft(reversed(self._sent))
                self._sent.clear()
            self._changed.notify_all()
        return commands

    def give_up(self) -> list[Typed]:
        """Return the texts whose receipts are not to be had any more; they are done with."""
        with self._changed:
            doubtful = [item for item in self._sent if item.echo]
            self._sent = deque(item for item in self._sent if not item.echo)
            self._failed += len(doubtful)
            self._changed.notify_all()
        return doubtful

    def unsent(self) -> list[str]:
        """Return what waits as it was typed."""
        with self._changed:
            return [item.text for item in self._waiting]

    def count(self) -> int:
        """Return how many lines have no receipt."""
        with self._changed:
            return self._count()

    def failed(self) -> int:
        """Return how many lines were not broadcast, as far as we know."""
        with self._changed:
            return self._failed

    def is_quiet(self) -> bool:
        """Tell whether nothing that was sent is without its receipt."""
        with self._changed:
            return not self._sent

    def _count(self) -> int:
        return len(self._waiting) + len(self._sent)


def _new_name(text: str) -> str:
    """Return the name in a ``/nick NAME``."""
    return text.partition(" ")[2].strip()


# --- Who and where we are ----------------------------------------------------


class Place:
    """Our place in the room; its connections come and go.

    Changed by who calls `ChatClient.connect`, and then by `receive`; read by others.
    """

    def __init__(self, name: str) -> None:
        self.name = protocol.check_name(name)
        self.key = os.urandom(16).hex()  # takes our place back from a connection that is lost
        self.position: int | None = None  # of the next line of the room
        self.whispers = 0  # private lines that came, since the key was first shown
        self.counts = True  # the server counts them too, as far as we know
        self.present: list[str] = []  # the names here, who spoke last first
        self.writers: list[str] = []  # who wrote to us alone, the last first

    def introduction(self, name: str) -> Introduction:
        """Return the answer to ``NICK`` with which we come, or come back, under a name."""
        if self.position is None or self.position > MAX_POSITION:
            return Introduction(name, key=self.key)
        whispers = self.whispers if self.counts else None
        return Introduction(name, self.position, key=self.key, whispers=whispers)

    def follow(self, line: Line) -> None:
        """Go on behind a line of the room, and keep track of who is here."""
        self.skip(1)
        if line.name:
            self._move(line.name, line.name)
        elif news := protocol.announcement(str(line)):
            to = {Event.JOINED: news.name, Event.RENAMED: news.new}
            self._move(news.name, to.get(news.event, ""))

    def skip(self, count: int) -> None:
        """Go on behind so many lines of the room."""
        if self.position is not None:
            self.position += count

    def hear_whisper(self, name: str) -> None:
        """Count a private line, and remember who wrote it."""
        self.whispers += 1
        self.writers = [name, *(other for other in self.writers if other != name)][:MAX_WRITERS]

    def see(self, names: list[str]) -> None:
        """Take these as the names here, in the order that we know."""
        known = [name for name in self.present if name in names]
        self.present = known + [name for name in names if name not in known]

    def is_own(self, line: Line) -> bool:
        """Tell whether a line only says that we came or went."""
        return str(line) in (protocol.joined(self.name), protocol.left(self.name))

    def _move(self, name: str, to: str) -> None:
        self.present = [to] * bool(to) + [
            other for other in self.present if other not in (name, to)
        ]
        self.writers = [to if other == name else other for other in self.writers]


class Absence:
    """The time until we are settled, by however many tries: before we came, or after a loss.

    Touched by who calls `ChatClient.connect`, and then by `receive`; others read `next_try`.
    """

    def __init__(self, since: float, *, first: bool = False) -> None:
        self.since = since  # when we last heard the server, in `time.monotonic` seconds
        self.first = first  # we have not been here before
        self.next_try = since
        self.lines: deque[Heard] = deque()  # what came, until it is complete
        self.skipped = 0  # lines of the room that are not among it, as the server said
        self.unbroken = True  # as far as we know, nothing else is lacking
        self.overflowed = False  # so much came that it is shown without being complete
        self.entered = False  # all that comes is said since we came for the first time
        self.told = ""  # the last reason why we are not let in

    def heading(self, place: Place) -> Notice:
        """Tell how long it was and how much was missed."""
        missed = f", more than {len(self.lines)} lines missed"
        if not self.overflowed:
            count = self.skipped + sum(
                line.in_room and not place.is_own(line) for line in self.lines
            )
            missed = f", {count_lines(count)} missed" if count else ""
        return Notice(f"back after {time.monotonic() - self.since:.0f} s{missed}")

    def split(self, place: Place) -> tuple[list[Earlier], list[Heard]]:
        """Return what was said before we came, or came back, and what since."""
        lines = list(self.lines)
        entrance = protocol.joined(place.name)
        ours = [at for at, line in enumerate(lines) if str(line) == entrance]
        at = ours[-1] if ours else len(lines)
        return [Earlier(*line) for line in lines[:at]], lines[at:]


# --- One connection ----------------------------------------------------------


class State(enum.Enum):
    """How far a connection has come."""

    AT_THE_DOOR = enum.auto()  # being asked for name and password
    CATCHING_UP = enum.auto()  # hearing what was said before
    SETTLED = enum.auto()  # hearing and saying


class RollCall:
    """The answer to our own ``/names``, which may come in several lines."""

    def __init__(self, count: int) -> None:
        self.names: list[str] = []
        self._due = min(count, protocol.LISTED_NAMES)

    @property
    def is_complete(self) -> bool:
        """Whether all names have come, or the last line that tells how many others there are."""
        return self._due <= 0

    def take(self, text: str) -> bool:
        """Take the names in one line of the answer; say whether it is one."""
        names, is_last = protocol.listed(text)
        try:
            for name in names:
                protocol.check_name(name)
        except Refusal:
            self._due = 0  # the answer has ended, whatever its beginning said
            return False
        self.names += names
        self._due = 0 if is_last else self._due - max(1, len(names))
        return True


class Door:
    """What a connection has shown at the door of the room, and was told there.

    Touched as its `Session` is.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names  # to be given, the first of them now
        self.introduced = False  # it is given
        self.password_given = False
        self.reason = ""  # what the server last had to say


class Session:
    """One connection to the server, from being dialled to being closed.

    Touched by who calls `ChatClient.connect` and then by the thread of `receive`, but
    for `shutdown`; others read `state` and `progress`.  Times are `time.monotonic` seconds.
    """

    def __init__(self, connection: Connection, waker: Waker, fmt: str, names: list[str]) -> None:
        self.state = State.AT_THE_DOOR
        self.door = Door(names)
        self.roll_call: RollCall | None = None  # as soon as its first line has come
        self.heard_at = time.monotonic()  # when bytes last came
        # When a receipt last came, or a line was sent and none was due.
        self.progress = self.heard_at
        self.silence_told = 0.0  # the `heard_at` of the last silence that we spoke of
        self.delay_told = 0.0  # the `progress` of the last delay that we spoke of
        self.waits_since: float | None = None  # the server said that the room is waiting
        self.is_foreign = False  # a line was of another format
        self.foreign_told = False  # we spoke of that
        self._fmt = fmt
        self._connection = connection
        self._framer = Framer(protocol.MAX_SERVER_LINE)
        self._unsent = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(waker, selectors.EVENT_READ)
        self._selector.register(connection, selectors.EVENT_READ)

    @property
    def takes_more(self) -> bool:
        """Whether more should be said now: not much has still to be sent."""
        return len(self._unsent) < SEND_AHEAD

    def say(self, line: bytes) -> None:
        """Let a line be sent by `exchange`."""
        self._unsent += line

    def exchange(self, deadline: float | None = None) -> list[Heard]:
        """Send, wait for something to happen, or for the deadline, and return what came.

        Raise `OSError` when the connection has ended.
        """
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except OSError:  # it broke, but what came before may say why
            data = self._connection.receive_now()
            if not data:
                raise
        else:
            data = self._wait(deadline)
        if data == b"":
            raise ConnectionError("the server closed the connection")
        if self._framer.overrun:
            raise ConnectionError("the server sends no lines")
        if data:
            self.heard_at = time.monotonic()
        return [self._line(line) for line in self._framer.feed(data or b"")]

    def _wait(self, deadline: float | None) -> bytes | None:
        """Wait for something to happen, and return what came, as `receive_now` does."""
        writing = selectors.EVENT_WRITE if self._unsent else 0
        self._selector.modify(self._connection, selectors.EVENT_READ | writing)
        self._selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self._connection.receive_now()

    def _line(self, line: bytes) -> Heard:
        if not self.is_foreign and self._fmt == "ascii" and not line.isascii():
            with contextlib.suppress(UnicodeDecodeError):
                self.is_foreign = bool(line.decode("utf-8"))
        text = protocol.escape(line[: protocol.MAX_SERVER_LINE], self._fmt)
        return Heard(*protocol.parse(text))

    def say_goodbye(self) -> None:
        """Send what is left and ``/quit``, as far as the socket takes it at once."""
        # Before we are settled, Ctrl-C may have come just when what is left had been sent.
        left = self._unsent if self.state is State.SETTLED else b""
        with contextlib.suppress(OSError):
            self._connection.send(left + protocol.encode("/quit"))

    def shutdown(self) -> None:
        """Have the server heard no more, from any thread; what is to be sent still goes out."""
        self._connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        self._connection.close()


# A host and a port, where the host is in brackets if it has colons of its own.
_ADDRESS = re.compile(r"(?:\[(?P<inside>[^]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[^:]*))?")


def addresses(text: str, port: int) -> list[tuple[str, int]]:
    """Return host and port of each server in ``a,b:1234,[::1]:1234``; raise `Refusal`."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _ADDRESS.fullmatch(part)
        host = match["inside"] or match["host"] if match else part
        given = match["port"] if match else None
        try:
            found.append((host, port if given is None else protocol.port(given)))
        except argparse.ArgumentTypeError as error:
            raise Refusal(str(error)) from None
    if not all(host for host, _ in found) or not found:
        raise Refusal(f"{text!r} names no host; give --host HOST, or HOST:PORT, or several: A,B")
    return found


class Entrance:
    """Where the room is entered, which may be at several servers, and what has to be shown there.

    Touched by who calls `ChatClient.connect`, and read by others.
    """

    def __init__(
        self,
        servers: list[tuple[str, int]],
        password: str | None,
        tls: ssl.SSLContext | None,
        fingerprint: str,
    ) -> None:
        self.servers = servers
        self.turn = 0  # which of them is tried next, or is the one that we are at
        self.password = password
        self.tls = tls
        self.fingerprint = fingerprint  # the certificate's, when no authority vouches for it
        self._last = 0  # where we last were, or hoped to be

    def __str__(self) -> str:
        host, port = self.servers[self.turn]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def turn_to_next(self) -> bool:
        """Go to the next server; say whether that is the first again."""
        self.turn = (self.turn + 1) % len(self.servers)
        return self.turn == 0

    def note_move(self) -> bool:
        """Take where we are as known; say whether it is elsewhere than before."""
        moved, self._last = self.turn != self._last, self.turn
        return moved

    def dial(self, waker: Waker, leaving: threading.Event) -> Connection:
        """Connect to the server and, where it is wanted, make sure that it is the right one.

        Raise `OSError` where that fails, also when we are to leave meanwhile.
        """
        host, port = self.servers[self.turn]
        sock = _reach(host, port, waker, leaving)
        if self.tls is None:
            return Connection(sock)
        connection = TlsConnection(sock, self.tls, host)
        try:
            connection.shake_hands(time.monotonic() + CONNECT_TIMEOUT)
            seen = protocol.fingerprint(connection.certificate())
            if self.fingerprint and seen != self.fingerprint:
                raise Refused(
                    f"the certificate's fingerprint is {seen}; it is not the one given,"
                    " so ask who runs the server before you trust it"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _reach(host: str, port: int, waker: Waker, leaving: threading.Event) -> socket.socket:
    """Return a socket that is connected to one of a host's addresses, the first that answers."""
    failure = OSError(f"{host} has no address")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # such as a..b
        raise socket.gaierror(socket.EAI_NONAME, f"{host} is no name of a host") from None
    for family, kind, number, _, address in found:
        try:
            sock = socket.socket(family, kind, number)
        except OSError as error:  # a family that the system does not have
            failure = error
            continue
        try:
            sock.setblocking(False)
            code = sock.connect_ex(address)
            if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                code = _result(sock, waker, leaving)
            if not code:
                return sock
            failure = OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise failure


def _result(sock: socket.socket, waker: Waker, leaving: threading.Event) -> int:
    """Wait for a connection to be made; return 0 or the number of the error."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        selector.register(waker, selectors.EVENT_READ)
        while not leaving.is_set():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return errno.ETIMEDOUT
            if any(key.fileobj is sock for key, _ in ready):
                return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            waker.clear()  # what was typed is looked at when we are in
    return errno.ECANCELED


# --- The conversation --------------------------------------------------------


class Inbox:
    """The lines for a program that iterates; any thread may call."""

    def __init__(self) -> None:
        # Guards all below; notified whenever any of it changes.
        self._changed = threading.Condition()
        self._lines: deque[Heard] = deque()
        self._is_read = False  # somebody iterates
        self._ended = False  # no more lines come, and nobody waits

    def put(self, item: Heard | Notice) -> None:
        """Keep a line: wait for a slow reader, forget the oldest if there is none."""
        if isinstance(item, Notice):
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or len(self._lines) < MAX_WAITING or not self._is_read
            )
            if len(self._lines) >= MAX_WAITING:
                if self._is_read:  # we leave, and what is read has no gap
                    return
                self._lines.popleft()
            self._lines.append(item)
            self._changed.notify_all()

    def end(self) -> None:
        """Let the reader end when it has read all."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Heard]:
        self._set_read(True)
        try:
            while (line := self._take()) is not None:
                yield line
        finally:
            self._set_read(False)

    def _take(self) -> Heard | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ended)
            self._changed.notify_all()
            return self._lines.popleft() if self._lines else None

    def _set_read(self, is_read: bool) -> None:
        with self._changed:
            self._is_read = is_read
            self._changed.notify_all()


class ChatClient:
    """A conversation that survives its connections.

    Iterating gives each `Heard` line that is said from joining on; with `earlier` also
    those before, which say so of themselves.  Lines that were said while the connection
    was lost are given, and say so too.  `show`, when given, is called with all lines and
    with each `Notice` instead, in the thread of `receive` and, at the end, of `leave`.
    `host` may name several servers of one room, as ``a,b:1234,[::1]:1234``.  When none of
    them has let us back in for `give_up` seconds, the conversation ends.
    """

    def __init__(
        self,
        name: str,
        host: str = protocol.HOST,
        port: int = protocol.PORT,
        fmt: str = protocol.FORMAT,
        *,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        fingerprint: str = "",
        show: Callable[[Heard | Notice], None] | None = None,
        ended: Callable[[], None] = lambda: None,
        earlier: bool = False,
        give_up: float = math.inf,
    ) -> None:
        self.entrance = Entrance(addresses(host, port), password, tls, fingerprint)
        self.fmt = fmt
        self.place = Place(name)
        self.outgoing = Outgoing()
        self._inbox = Inbox()
        self._show_to = show or self._inbox.put
        self._wants_earlier = earlier or show is not None
        self._give_up_after = give_up
        self._ended = ended
        self._leaving = threading.Event()  # we want to go, or cannot stay
        self._waker = Waker()  # of `receive`, when something waits to be sent
        self._receiver = threading.Thread(target=self.receive, name="receive", daemon=True)
        # What follows is changed in the thread of `receive`, before it starts by who calls
        # `connect`, and by who calls `leave` or `close` when it has ended; others read.
        self.reason = ""  # why the conversation ended, when nobody here wanted it to
        self._session: Session | None = None
        self._absence: Absence | None = Absence(time.monotonic(), first=True)

    # Verbs.

    def __enter__(self) -> ChatClient:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
        self.leave()

    def __iter__(self) -> Iterator[Heard]:
        return iter(self._inbox)

    def connect(self) -> None:
        """Connect to the server whose turn it is, and be let in.

        Raise `OSError` when nobody answers, `NameRefused` or `PasswordRefused` when
        another one would do and `Refused` when nothing would.
        """
        connection = self.entrance.dial(self._waker, self._leaving)
        # The answer to a /nick may be lost: then a ghost of ours may have that name.
        names = [*filter(None, [self.outgoing.new_name()]), self.name]
        self._session = Session(connection, self._waker, self.fmt, names)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        try:
            while self.away:
                if self._leaving.is_set():
                    raise ConnectionAbortedError("we leave")
                if time.monotonic() >= deadline:
                    raise TimeoutError("no answer came")
                self._exchange(deadline)
        except Refused:  # a goodbye would be taken for another name or password
            was_in = not self.away
            self._disconnect()
            if was_in:  # put out as soon as that
                self._show_held(self._absence)
            raise
        except BaseException:
            self._say_goodbye()
            raise

    def start(self) -> None:
        """Start the thread that hears and sends."""
        self._receiver.start()

    def receive(self) -> None:
        """Hear the server until we leave; come back whenever the connection is lost."""
        try:
            while not self._leaving.is_set():
                try:
                    while True:
                        self._exchange(self._next_look())
                        self._look_at_server()
                except OSError:
                    if self._leaving.is_set():
                        break  # with a goodbye: `leave` may have broken it off
                    self._disconnect()
                if not self._leaving.is_set():
                    self._come_back()
        except (Refused, OutputClosed) as error:
            self.reason = str(error)
        finally:
            self._say_goodbye()
            with contextlib.suppress(OutputClosed):
                self._show_held(self._absence)
            left_of_itself = not self._leaving.is_set()
            self._leaving.set()
            self.outgoing.end()
            self._inbox.end()
            if left_of_itself:
                self._ended()

    def send(self, text: str) -> None:
        """Say a line, or give a command; raise `Refusal` when the room cannot carry it.

        Return before it is sent, but wait while `MAX_WAITING` lines are.
        """
        item = typed(text)
        if not item.text.strip():
            return
        self._encode(item.text)
        if item.verb == "nick":
            protocol.check_name(_new_name(item.text))
        self.outgoing.add(item)
        self._waker.wake()

    def flush(self) -> None:
        """Wait until every line has its receipt, or the conversation has ended."""
        self.outgoing.wait_for_receipts()

    def leave(self) -> list[str]:
        """Say goodbye and end the conversation; return what was typed and never sent."""
        if not self._leaving.is_set():
            self.outgoing.end()
            self._inbox.end()
            self.outgoing.add(typed("/quit"))
            self._leaving.set()
            self._waker.wake()
        if self._receiver.ident is None:  # a signal came before it could start
            self._say_goodbye()
        else:
            self._receiver.join(LEAVE_TIMEOUT)
        if session := self._session:
            session.shutdown()
            self._receiver.join(LEAVE_TIMEOUT)
        self.close()
        self._give_up_receipts()  # also when it still runs: nobody waits for it any more
        return [text for text in self.outgoing.unsent() if typed(text).verb != "quit"]

    @property
    def name(self) -> str:
        """Our name in the room."""
        return self.place.name

    @property
    def failed(self) -> int:
        """How many lines were not broadcast, as far as we know."""
        return self.outgoing.failed()

    @property
    def present(self) -> list[str]:
        """The names here, who spoke last first."""
        return self.place.present

    @property
    def settled(self) -> bool:
        """Whether what was said before is heard, and what is typed goes out."""
        session = self._session
        return session is not None and session.state is State.SETTLED

    @property
    def away(self) -> bool:
        """Whether we are not in the room: there is no connection, or it is still at the door."""
        session = self._session
        return session is None or session.state is State.AT_THE_DOOR

    @property
    def status(self) -> str:
        """The state of the connection in a few words."""
        absence, session = self._absence, self._session
        if session is not None and session.state is not State.AT_THE_DOOR:
            waiting = self.outgoing.count()
            if not waiting or time.monotonic() - session.progress < 1.0:
                return "connected"
            return f"connected, {count_lines(waiting)} waiting"
        wait = absence.next_try - time.monotonic() if absence else 0.0
        return f"next try in {max(0.0, wait):.0f} s"

    def close(self) -> None:
        """Give back what is held for connections; `leave` does it too."""
        if not self._receiver.is_alive():  # else it asks for an address, and ends with the program
            self._say_goodbye()
            self._waker.close()

    # Any thread may call these.

    def _encode(self, text: str) -> bytes:
        # With room for the longest name: it may have changed when the line goes out.
        protocol.encode(text, self.fmt, MAX_TEXT)
        return protocol.encode(protocol.said(self.name, text), self.fmt)

    def _give_up_receipts(self) -> None:
        """Say which lines may or may not have been seen: their receipts are not to be had."""
        for item in self.outgoing.give_up():
            why = "cannot know whether this was seen, /history may tell; not sent again"
            self._show(Notice(f"{why}: {item.text}"))

    def _show(self, item: Heard | Notice) -> None:
        try:
            self._show_to(item)
        except OSError as error:  # of the screen, not of the connection
            raise OutputClosed from error

    # What follows runs in the thread of `receive`, but for what the first `connect` calls
    # before it starts, and `leave` and `close` when it has ended.

    def _exchange(self, deadline: float | None) -> None:
        """Wait for lines, or for something to send, or for the deadline, and deal with it."""
        session = self._session
        assert session is not None
        self._waker.clear()
        while session.state is State.SETTLED and session.takes_more:
            if self.outgoing.is_quiet():
                session.progress = time.monotonic()
            item = self.outgoing.take(self.name)
            if item is None:
                break
            session.say(self._encode(item.text))
        for line in session.exchange(deadline):
            if session.state is State.AT_THE_DOOR:
                self._hear_at_door(line, session)
            else:
                self._hear(line, session)
        if session.is_foreign and not session.foreign_told:
            session.foreign_told = True
            self._show(Notice("the room has letters that ASCII has not; --format utf-8 shows them"))

    def _next_look(self) -> float | None:
        """Return when to look at the server even if nothing happens: soon, if something is due."""
        session = self._session
        if self._absence or self.outgoing.count() or (session and session.waits_since):
            return time.monotonic() + PATIENCE / 10
        return None

    def _look_at_server(self) -> None:
        """Say so when it is silent though something is due, and turn from one that has us wait."""
        session, now = self._session, time.monotonic()
        assert session is not None
        silent = now - max(session.heard_at, session.progress)
        if self._absence and silent > CATCH_UP_TIMEOUT:
            raise TimeoutError("the server let us in and tells us nothing")
        self._tell_of_delay(session, silent, now - session.progress)
        if (
            session.waits_since
            and now - session.waits_since > PATIENCE
            and len(self.entrance.servers) > 1
        ):
            session.waits_since = now
            self._move_on(session)

    def _tell_of_delay(self, session: Session, silent: float, delay: float) -> None:
        """Say, once each time, for how many seconds nothing came, or no line was taken."""
        waiting = self.outgoing.count()
        told = f"{count_lines(waiting)} waiting"
        if (
            (waiting or self._absence)
            and silent > PATIENCE
            and session.silence_told != session.heard_at
        ):
            session.silence_told, session.delay_told = session.heard_at, session.progress
            kept = f"; {told}" if waiting else ""
            self._show(Notice(f"no answer from the server for {silent:.0f} s{kept}"))
        elif (
            waiting
            and delay > PATIENCE
            and session.delay_told != session.progress
            and not session.waits_since  # which the server has told
        ):
            session.delay_told = session.progress
            self._show(Notice(f"{told}; the server has taken none for {delay:.0f} s"))

    def _move_on(self, old: Session) -> None:
        """Enter at the next server, and let go of the old one when we are in."""
        absence, turn = self._absence, self.entrance.turn
        self._session = None
        self._absence = absence if absence and not absence.entered else Absence(old.heard_at)
        try:
            while True:
                self.entrance.turn_to_next()
                if self.entrance.turn == turn:
                    self._session, self._absence = old, absence
                    return
                with contextlib.suppress(OSError, Refused):
                    self.connect()
                    break
        except BaseException:
            old.close()
            raise
        old.close()

    def _say_goodbye(self) -> None:
        """End the connection; our place is given up at once, also when we are not quite in."""
        if self._session is not None and self._session.door.introduced:
            self._session.say_goodbye()
        self._disconnect()

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.close()
        had_come = self._absence is None or self._absence.entered
        if had_come and session.state is not State.AT_THE_DOOR:
            self._absence = Absence(session.heard_at)

    def _come_back(self) -> None:
        """Try until we are in the room again, or leave."""
        self._show(Notice("connection lost; trying again"))
        absence = self._absence
        assert absence is not None
        ends = absence.since + self._give_up_after
        delay = RETRY_FIRST
        while True:
            if self.entrance.turn_to_next() and absence.next_try > absence.since:
                delay = min(RETRY_MAX, delay * 2)
            now = time.monotonic()
            absence.next_try = min(now + delay * random.uniform(0.5, 1.0), ends)
            if self._leaving.wait(max(0.0, absence.next_try - now)):
                return
            if absence.next_try == ends:
                raise Refused(
                    f"the server did not come back in {self._give_up_after:.0f} s;"
                    " try later, or wait longer with --give-up"
                )
            try:
                self.connect()
                return
            except (PutOut, PasswordRefused):
                raise  # trying again would not help
            except NameRefused as refused:
                if name := self.outgoing.take_new_name():
                    self.place.name = name
                    delay = RETRY_FIRST / 2
                else:
                    self._tell_once(absence, f"{refused} with /nick")
            except Refused as refused:
                self._tell_once(absence, str(refused))
            except OSError:  # again, as long as it takes
                if not absence.told and time.monotonic() - absence.since > PATIENCE:
                    self._tell_once(absence, f"not back yet; a try every {RETRY_MAX:.0f} s or less")

    def _tell_once(self, absence: Absence, reason: str) -> None:
        if reason != absence.told:
            absence.told = reason
            self._show(Notice(reason))

    # What is heard.

    def _hear_at_door(self, line: Heard, session: Session) -> None:
        """Answer the server's questions until it says welcome."""
        if line.kind is Kind.NICK:
            self._introduce(session)
        elif line.kind is Kind.PASS:
            self._give_password(session)
        elif line.kind is not Kind.ANSWER:
            raise Refused("what answers there is not this chat; check --host and --port")
        elif protocol.is_welcome(str(line)):
            session.state = State.CATCHING_UP
            self.place.name = session.door.names[0]
            # Its answer comes behind the replay: only then do we know what was heard.
            session.say(protocol.encode("/names"))
            if self._absence is None or self._absence.first:
                self._show(line)
            if self.entrance.note_move():
                self._show(Notice(f"now at {self.entrance}"))
        else:
            _raise_if_final(line)
            session.door.reason = line.text

    def _introduce(self, session: Session) -> None:
        """Give our name; when it was refused, in a simpler way, or else the next one."""
        if session.door.introduced:
            if self.place.counts and protocol.HOW_TO_ANSWER in session.door.reason:
                self.place.counts = False  # an old server
            elif len(session.door.names) > 1:
                session.door.names.pop(0)
            else:
                raise NameRefused(session.door.reason)
        session.door.introduced = True
        session.say(protocol.encode(str(self.place.introduction(session.door.names[0]))))

    def _give_password(self, session: Session) -> None:
        if self.entrance.password is None:
            raise PasswordRefused("the room has a password; see --password-file")
        if session.door.password_given:
            raise PasswordRefused(session.door.reason)
        session.door.password_given = True
        session.say(protocol.password_bytes(self.entrance.password) + b"\n")

    def _hear(self, line: Heard, session: Session) -> None:
        """Take in a line that comes when we are in the room."""
        if line.in_room:
            self.place.follow(line)
            if line.name and self.outgoing.confirm(line):
                session.progress = time.monotonic()
        elif line.kind is Kind.PRIVATE:
            self.place.hear_whisper(line.name)
        elif line.kind is Kind.ANSWER and self._hear_news(str(line), session):
            return
        self._bring(line)
        if line.kind is Kind.ANSWER:
            self._hear_own_answer(str(line), session)
            _raise_if_final(line)

    def _hear_news(self, text: str, session: Session) -> bool:
        """Take in what the server tells our program and not us; say whether it was that."""
        roll_call = session.roll_call
        if roll_call and not roll_call.is_complete:
            return self._call_roll(roll_call, text.removeprefix("-> "))
        if session.state is not State.CATCHING_UP:
            return False
        if (position := protocol.position_in(text)) is not None:
            self._go_to(position)
            whispers = protocol.whispers_in(text)
            if whispers is not None:
                self.place.whispers = whispers
        elif found := protocol.names_in(text):
            session.state = State.SETTLED
            session.roll_call = RollCall(found[0])
            self._call_roll(session.roll_call, found[1])
            self._settle()
        else:
            return False
        return True

    def _go_to(self, position: int) -> None:
        """Go on at the position that the server says; another than ours leaves a gap."""
        if self._absence and self.place.position != position:
            self._absence.unbroken = False
        self.place.position = position

    def _call_roll(self, roll_call: RollCall, text: str) -> bool:
        belongs = roll_call.take(text)
        if roll_call.is_complete:
            self.place.see(roll_call.names)
        return belongs

    def _hear_own_answer(self, text: str, session: Session) -> None:
        """Take an answer as the receipt of the oldest line, or as its refusal."""
        if (missed := protocol.missed_in(text)) is not None:
            self._skip(missed)
        elif (missed := protocol.missed_private_in(text)) is not None:
            self.place.whispers += missed
        elif text == protocol.WAITING:
            session.waits_since = session.waits_since or time.monotonic()
        elif text == protocol.GOES_ON:
            session.waits_since = None
        else:
            if (name := protocol.name_in(text)) is not None:
                self.place.name = name
            item = self.outgoing.answer(text) if self.settled else None
            if item is not None:
                session.progress = time.monotonic()
                self._hear_answer_to(item, text)

    def _hear_answer_to(self, item: Typed, text: str) -> None:
        if item.verb == "quit":
            self._leaving.set()
        elif protocol.is_refusal(text):
            unsent = item.text if discreet(item.text) == item.text else ""
            self._show(Notice("the last line was not sent", unsent))

    def _skip(self, count: int) -> None:
        """Go on behind lines of the room that we do not get."""
        self.place.skip(count)
        if self._absence is None:
            self._give_up_receipts()
        else:
            self._absence.unbroken = False
            self._absence.skipped += count

    def _settle(self) -> None:
        """The replay is over: show it, and send again what is not in it."""
        absence, self._absence = self._absence, None
        if absence is None:
            return
        self._show_held(absence)
        for item in self.outgoing.resume(unbroken=absence.unbroken):
            if not (item.verb == "nick" and _new_name(item.text) == self.name):
                self._show(
                    Notice(f"no answer came, give it again if need be: {discreet(item.text)}")
                )
        self._give_up_receipts()

    def _show_held(self, absence: Absence | None) -> None:
        """Show what came in an absence that has ended, or will not end any more."""
        if absence is None or (self._session is None and not absence.lines):
            return
        if not absence.first and not absence.overflowed:
            self._show(absence.heading(self.place))
        earlier, since = absence.split(self.place)
        self._show_earlier(absence, earlier)
        for line in since:
            self._show(line)
        absence.lines.clear()

    def _show_earlier(self, absence: Absence, lines: list[Earlier]) -> None:
        """Show what was said before, and that it was."""
        if absence.first and not self._wants_earlier:
            return
        for line in lines:
            self._show(line)
        if absence.overflowed or any(line.in_room for line in lines):
            self._show(BEFORE if absence.first else WHILE_AWAY)

    # What is shown.

    def _enter(self, absence: Absence) -> bool:
        """Say whether our entrance is among what came, and then go on from there.

        A room that is busy when we come says more than can be held before it answers us.
        """
        earlier, since = absence.split(self.place)
        if not absence.first or not since:
            return False
        self._show_earlier(absence, earlier)
        for line in since:
            self._show(line)
        absence.lines.clear()
        absence.entered = True
        return True

    def _bring(self, line: Heard) -> None:
        """Show a line, or keep it until we know all that was said before."""
        absence = self._absence
        if absence is None or absence.entered:
            self._show(line)
            return
        absence.lines.append(line)
        # Looked for once: a replay that has no end must not cost a look at all of it a line.
        if len(absence.lines) > MAX_HELD and (absence.overflowed or not self._enter(absence)):
            if not absence.overflowed:
                absence.overflowed = True
                if not absence.first:
                    self._show(absence.heading(self.place))
            oldest = Earlier(*absence.lines.popleft())
            if self._wants_earlier or not absence.first:
                self._show(oldest)


def _raise_if_final(line: Line) -> None:
    """Raise `Refused` when an answer means that the server does not want us here now."""
    if protocol.is_put_out(str(line)):
        raise PutOut(line.text)
    if protocol.is_final(str(line)):
        raise Refused(line.text)


# --- Who is not shown here ---------------------------------------------------

#: What is asked of this client and not of the server: how it is written and what it does.
OWN_COMMANDS = {
    "ignore": ("/ignore [NAME]", "hide what NAME says, or see whom you hide"),
    "unignore": ("/unignore NAME", "show it again"),
}
OWN_HELP = "and of this client: " + "; ".join(
    f"{form}, to {purpose}" for form, purpose in OWN_COMMANDS.values()
)


def own_command(text: str) -> tuple[str, str] | None:
    """Split a command of this client in verb and argument; None for any other line."""
    request = protocol.command(text)
    return request if request and request[0] in OWN_COMMANDS else None


class Ignored:
    """Whose lines are not shown here, until the program ends; the room knows nothing of it.

    They count as lines of the room all the same.  Any thread may call.
    """

    def __init__(self) -> None:
        # Guards the names: who types adds and removes, who hears follows a new name.
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}  # as they were written, by how they are compared

    def obey(self, verb: str, argument: str, me: str) -> str:
        """Do what a command asks for and return the answer; raise `Refusal`."""
        if verb == "ignore" and not argument:
            return self._list()
        if not argument:
            raise Refusal("usage: /unignore NAME; /ignore lists whom you ignore")
        name = protocol.check_name(argument)
        if protocol.fold(name) == protocol.fold(me):
            raise Refusal("you cannot ignore yourself; name somebody else")
        return self._add(name) if verb == "ignore" else self._remove(name)

    def follow(self, item: Line | Notice) -> None:
        """Know somebody again who takes another name."""
        news = None
        if isinstance(item, Line) and item.in_room and not item.name:
            news = protocol.announcement(str(item))
        if news and news.event is Event.RENAMED:
            with self._lock:
                if self._names.pop(protocol.fold(news.name), None):
                    self._names[protocol.fold(news.new)] = news.new

    def hides(self, item: Line | Notice, me: str) -> bool:
        """Tell whether an item is not for the one called `me`, whose own lines always are."""
        if isinstance(item, Notice) or item.kind not in (Kind.SAID, Kind.DID, Kind.PRIVATE):
            return False
        return item.name in self and protocol.fold(item.name) != protocol.fold(me)

    def check_reply(self, text: str, writers: list[str]) -> None:
        """Raise `Refusal` for a ``/reply`` that would go to somebody whose line was hidden."""
        verb = (protocol.command(text.replace("\t", " ")) or ("",))[0]
        if protocol.ALIASES.get(verb, verb) == "reply" and writers and writers[0] in self:
            why = f"{writers[0]}, whom you ignore, wrote to you last"
            raise Refusal(f"{why}; write /msg NAME TEXT to who is meant")

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return protocol.fold(name) in self._names

    def _list(self) -> str:
        with self._lock:
            names = ", ".join(self._names.values())
        if not names:
            return "you ignore nobody; /ignore NAME hides what somebody says"
        return f"you ignore {names}; /unignore NAME ends it"

    def _add(self, name: str) -> str:
        with self._lock:
            self._names[protocol.fold(name)] = name
        return f"what {name} says is not shown here; /unignore {name} ends it"

    def _remove(self, name: str) -> str:
        with self._lock:
            if not self._names.pop(protocol.fold(name), None):
                raise Refusal(f"you do not ignore {name}; /ignore lists whom you ignore")
        return f"what {name} says is shown again"


# --- How it looks ------------------------------------------------------------

# Of the 256 colours that are the same everywhere, twelve far apart and a grey whose
# contrast is at least 3.5 to 1 on black and on white.  The first 16 are anybody's guess:
# where there are no others, what stands out is bold or underlined.
PALETTE = (26, 29, 64, 94, 97, 128, 130, 133, 161, 166, 66, 100)
GREY = 243
BOLD, UNDERLINED, REVERSED = "1", "4", "1;7"
INDENT = "    "  # before the rows of a line behind its first
INVISIBLE = re.compile(r"\x1b\[[0-9;]*m|\a")  # what paints and rings
# A run of these looks like nothing; ideographs without a blank can be broken anywhere.
BLANKS = re.compile(r"([\s\u2800\u3164\u115f\u1160\uffa0]+)")
# Alphabets that have one column in every terminal, unless it is one for East Asia.
NARROW = re.compile(r"[\x20-\x7e\xa1-\u024f\u0370-\u0482\u048a-\u052f]")
# What a name is a part of without being meant: an address, a path, another name.
ADDRESS = re.compile(r"://|\w@\w|^www\.|\w\.\w+/")
UTC = re.compile(r"\b(\d{4}-\d\d-\d\d \d\d:\d\d)Z")


class Look:
    """Turns what happens into the text that stands on the screen; it keeps nothing."""

    def __init__(self, *, colors: int = 0, timestamps: bool = False, bell: bool = False):
        self.colors = colors  # how many the terminal has: 0, 16 or 256
        self.timestamps = timestamps
        self.bell = bell

    def render(self, item: Line | Notice, me: str) -> str:
        """Return an item as it is shown to the one called `me`."""
        stamp = self._grey(time.strftime("%H:%M ")) if self.timestamps else ""
        if isinstance(item, Notice):
            return stamp + self._grey(str(item))
        if isinstance(item, Earlier):  # nobody knows when it was said
            return self._line(item, me)
        return stamp + self._line(item, me) + ("\a" if self.calls(item, me) else "")

    def calls(self, item: Line | Notice, me: str) -> bool:
        """Tell whether a line is meant for `me` above all, and is to ring."""
        if not self.bell or isinstance(item, Notice):
            return False
        if item.kind is Kind.PRIVATE:
            return True
        is_said = item.kind in (Kind.SAID, Kind.DID) and protocol.fold(item.name) != protocol.fold(
            me
        )
        return is_said and any(mentions(item.text, me))

    def _line(self, line: Line, me: str) -> str:
        if line.kind is Kind.PRIVATE:
            return self._paint(f"1;38;5;{PALETTE[7]}" if self.colors > 16 else BOLD, str(line))
        if line.kind is Kind.NOTICE:
            return self._grey(str(line))
        if line.kind is Kind.ANSWER:
            return str(line) if line.text.startswith("to ") else local_time(str(line))
        if line.kind not in (Kind.SAID, Kind.DID):
            return str(line)
        if protocol.fold(line.name) == protocol.fold(me):
            return str(line).replace(line.name, self._paint(BOLD, line.name), 1)
        text, end = "", 0
        for start, stop in mentions(line.text, me):
            text += line.text[end:start] + self._paint(REVERSED, line.text[start:stop])
            end = stop
        return str(Line(line.kind, self._name(line.name), text + line.text[end:]))

    def _name(self, name: str) -> str:
        number = zlib.crc32(protocol.fold(name).encode())
        color = f"38;5;{PALETTE[number % len(PALETTE)]}"
        return self._paint(color if self.colors > 16 else UNDERLINED, name)

    def _grey(self, text: str) -> str:
        return self._paint(f"38;5;{GREY}", text) if self.colors > 16 else text

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colors else text


def mentions(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Give start and end of each place where a text speaks to or of somebody."""
    alone = rf"(?<![\w-])(?<!\w\.){re.escape(name)}(?![\w-])(?!\.\w)"
    for found in re.finditer(alone, text, re.IGNORECASE):
        before = text[: found.start()].rpartition(" ")[2]
        word = before + text[found.start() :].partition(" ")[0]
        if not ADDRESS.search(word):
            yield found.span()


def local_time(text: str) -> str:
    """Put the first time in a server's answer, which is UTC, into the user's zone."""

    def shown(found: re.Match[str]) -> str:
        try:
            when = calendar.timegm(time.strptime(found[1], "%Y-%m-%d %H:%M"))
            return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
        except (OverflowError, ValueError):
            return found[0]

    return UTC.sub(shown, text, count=1)


def columns_of(text: str) -> Iterator[tuple[str, int, int]]:
    """Give each character of a text with the least and the most columns it may take."""
    for at, character in enumerate(text):
        category = unicodedata.category(character)
        if category in ("Mn", "Me", "Mc", "Cf"):
            yield character, 0, 1
        elif category == "Cc":  # readline shows it as ^X
            yield character, 2, 2
        elif unicodedata.category(text[at + 1 : at + 2] or " ") in ("Mn", "Me", "Mc", "Cf"):
            yield character, 0, 2  # a sequence may be drawn as one character, of any width
        elif NARROW.match(character):
            yield character, 1, 2 if unicodedata.east_asian_width(character) == "A" else 1
        elif category == "Lo" and unicodedata.east_asian_width(character) == "W":
            yield character, 2, 2
        else:
            yield character, 0, 2


def wrap(text: str, columns: int) -> str:
    """Break a line, painted or not, so that only its first row begins at the left edge.

    Nobody can pad a text until its rest looks like another's line.  An address that is
    longer than a row stands whole on rows of its own, where terminals know it as one.
    """
    rows: list[str] = []
    row = ""
    for piece in BLANKS.split(text):
        if BLANKS.fullmatch(piece) and row == INDENT:
            continue
        if BLANKS.fullmatch(piece) and not fits(row + piece, columns):
            rows, row = [*rows, row], INDENT  # the blanks go with the break
        elif fits(row + piece, columns):
            row += piece
        elif fits(INDENT + piece, columns):
            rows, row = [*rows, row.rstrip()], INDENT + piece
        elif piece.isascii():
            rows, row = [*rows, row.rstrip(), piece], INDENT
        else:
            *full, row = _slices(row, piece, columns)
            rows += full
    return "\n".join(filter(str.strip, [*rows, row])) or text


def fits(text: str, columns: int) -> bool:
    """Tell whether a text, painted or not, has room in one row of any terminal."""
    return sum(most for _, _, most in columns_of(INVISIBLE.sub("", text))) <= columns


def _slices(row: str, text: str, columns: int) -> list[str]:
    """Break a text without blanks behind the beginning of a row; return the rows."""
    rows = [row]
    for part in re.findall(rf"{INVISIBLE.pattern}|.", text, re.DOTALL):
        if not fits(rows[-1] + part, columns):
            rows.append(INDENT)
        rows[-1] += part
    return rows


def rows_of(text: str, columns: int, behind: int = 0) -> tuple[int, int]:
    """Return the least and the most rows that a prompt with what is typed may take.

    `behind` is 1 to count the row that the cursor stands in, behind the text.
    """
    cells = list(columns_of(text)) + [("", behind, behind)] * behind
    return _rows([few for _, few, _ in cells], columns), _rows(
        [many for _, _, many in cells], columns
    )


def _rows(widths: list[int], columns: int) -> int:
    rows, column = 1, 0
    for width in widths:
        if column + width > columns:
            rows, column = rows + 1, 0
        column += width
    return rows


# --- Where it is typed and shown ---------------------------------------------


class Leave(KeyboardInterrupt):
    """A signal, or the end of the conversation, tells the main thread to leave."""


def _is_inside(frame: FrameType | None, codes: set[CodeType]) -> bool:
    """Tell whether a frame is one of these functions', or called by them."""
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


class Screen(abc.ABC):
    """Where the user types and reads: a pipe or one of three kinds of terminal.

    `read` and `ask` belong to the main thread, `show` is called from any.
    """

    interactive = True

    def __init__(self, look: Look) -> None:
        self.look = look
        self.chat: ChatClient | None = None  # as soon as there is one
        self.leaving = threading.Event()  # a signal, or the end of the conversation, said so
        # Set when the main thread has run what a signal asks for.
        self.signals_run = threading.Event()

    @abc.abstractmethod
    def read(self) -> str:
        """Return what is typed next; raise `EOFError` at the end, `KeyboardInterrupt` to leave."""

    @abc.abstractmethod
    def show(self, item: Line | Notice) -> None:
        """Show an item without disturbing what is half typed."""

    def recall(self, lines: list[str]) -> None:  # noqa: B027 - not all can recall
        """Have the keys that bring back what was typed bring back these lines too."""

    @abc.abstractmethod
    def ask(self, question: str, *, secret: bool = False) -> str:
        """Return the answer to a question, not shown while it is typed if it is secret."""

    def can_leave(self, frame: FrameType | None) -> bool:
        """Tell whether an exception raised over this frame gets through to `read`, unharmed."""
        return not _is_inside(frame, UNLEAVABLE)

    def leave(self) -> None:
        """Make `read` raise `Leave`; called by a signal's handler, in the main thread."""
        raise Leave

    def on_knock(self, number: int, frame: FrameType | None) -> None:
        """Look up; the handlers of all signals that came before run together with this one."""
        self.signals_run.set()

    def hush(self, *, quiet: bool = True) -> None:  # noqa: B027 - a pipe shows nothing typed
        """Have nothing that is typed appear, or have it appear again."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave everything as it was."""

    @property
    def me(self) -> str:
        """The user's name, or nothing before there is one."""
        return self.chat.name if self.chat else ""


class Pipe(Screen):
    """Lines from standard input, lines to standard output, the client's own words to stderr."""

    interactive = False

    def __init__(self, look: Look, fmt: str, *, verbatim: bool = False) -> None:
        super().__init__(look)
        self.failure = ""  # why what came could not be written, unless its reader has gone
        self.closed = threading.Event()  # nothing more is written
        self._fmt = fmt
        self._verbatim = verbatim  # no line is a command
        self._count = 0  # lines read
        if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may be narrower than the room's
            sys.stdout.reconfigure(errors="backslashreplace")

    def read(self) -> str:
        """Return the next line; raise `Refusal` for one that the room cannot carry."""
        line = sys.stdin.buffer.readline(protocol.MAX_UNFRAMED)
        if not line:
            raise EOFError
        rest = line
        while rest and not rest.endswith(b"\n"):  # it is far too long; the next begins behind it
            rest = sys.stdin.buffer.readline(protocol.MAX_UNFRAMED)
        self._count += 1
        try:
            text = protocol.decode(line.rstrip(b"\r\n"), self._fmt, MAX_TEXT)
        except Refusal as refusal:
            reason = explain_refusal(refusal, line, self._fmt)
            raise Refusal(f"line {self._count} was not sent: {reason}") from None
        # What a program prints may begin with a slash and be no command of ours.
        request = protocol.command(text)
        commands = (*protocol.COMMANDS, *protocol.ALIASES, *OWN_COMMANDS)
        known = request is None or request[0] in commands
        return text if known and not self._verbatim else protocol.slash(text)

    def has_more(self) -> bool:
        """Tell whether more input is there already, other than blank lines."""
        if not hasattr(os, "set_blocking"):
            return False
        os.set_blocking(sys.stdin.fileno(), False)  # it may not have ended
        try:
            return bool((sys.stdin.buffer.read(protocol.MAX_UNFRAMED) or b"").strip())
        except OSError:
            return False
        finally:
            os.set_blocking(sys.stdin.fileno(), True)

    def show(self, item: Line | Notice) -> None:
        """Print a line at once; go on without printing when that cannot be done."""
        if isinstance(item, Mark):
            return
        if isinstance(item, Notice):
            complain(item.text)
        elif not self.closed.is_set():
            try:
                print(self.look.render(item, self.me), flush=True)
            except OSError as error:
                self._close_output(error)

    def _close_output(self, error: OSError) -> None:
        # What is still in the buffer must not be tried again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # a reader who has gone has what it wanted
            self.failure = f"cannot write to standard output: {error.strerror}; write elsewhere"
        self.closed.set()

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Take the first line as the answer; a password is not among the lines."""
        if secret:
            raise PasswordRefused("the room has a password; see --password-file")
        return self.read()

    def close(self) -> None:
        """Leave everything as it was."""


class Terminal(Screen):
    """What all kinds of terminal have in common."""

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        self._settings: list[Any] | None = None  # of the terminal, when we first had it
        self._given_back: deque[str] = deque()  # refused lines; any thread adds, the main one takes
        self._called = False  # something earlier was meant for the user; of the thread that shows
        self._interrupted = -math.inf  # when Ctrl-C last came; of the main thread

    def _take_terminal(self) -> None:
        """Stop, as who reads in the background is stopped, until the terminal is ours.

        Before that it may be set as some other program wants it.
        """
        for _ in range(MAX_STOPS):
            if in_foreground():
                break
            os.kill(os.getpid(), signal.SIGTTIN)
            # What came while we were stopped, such as SIGTERM, is heard in here; another
            # thread may have taken it, and has Python tell this one.
            time.sleep(0.1)
        if self._settings is None and termios:
            self._settings = termios.tcgetattr(sys.stdin)

    def give_back(self, line: str) -> None:
        """Let what was refused stand in the prompt again, at once or in the next one."""
        self._given_back.append(line)

    def hush(self, *, quiet: bool = True) -> None:
        """Have nothing that is typed appear, or have it appear again."""
        if self._settings is None or not in_foreground():
            return
        settings = termios.tcgetattr(sys.stdin)
        echo = 0 if quiet else self._settings[3] & termios.ECHO
        settings[3] = settings[3] & ~termios.ECHO | echo
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    def close(self) -> None:
        """Leave the terminal as it was, unless another program has it."""
        if self._settings is not None and in_foreground():
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._settings)

    def note_interrupt(self) -> bool:
        """Take note of a Ctrl-C on an empty prompt; say whether it leaves.

        While all is well, only a second one soon after does.
        """
        is_second = time.monotonic() - self._interrupted < INTERRUPT_AGAIN
        self._interrupted = time.monotonic()
        return is_second or self.chat is None or not self.chat.settled

    def _take_back(self) -> str:
        """Return what was refused, line by line."""
        lines = [self._given_back.popleft() for _ in range(len(self._given_back))]
        return "\n".join(lines)

    def _render(self, item: Line | Notice) -> str:
        if isinstance(item, Notice) and item.unsent:
            self.give_back(item.unsent)
        text = self.look.render(item, self.me)
        if isinstance(item, Earlier):
            self._called |= self.look.calls(item, self.me)
        elif isinstance(item, Mark):
            text += "\a" * (self._called and item is WHILE_AWAY)
            self._called = False
        return wrap(text, os.get_terminal_size(sys.stdout.fileno()).columns or 80)

    def _prompt(self) -> str:
        return f"{self.me}> "

    def _ask_secretly(self, question: str) -> str:
        """Return a line that is typed unseen; what was typed before the question counts too."""
        if not termios:
            import getpass  # which knows the terminal of Windows

            return getpass.getpass(question)
        self.hush()
        try:
            self._write(question)
            answer = os.read(sys.stdin.fileno(), protocol.MAX_UNFRAMED)
            if not answer:
                raise EOFError
            return answer.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
        finally:  # it stays so quiet until it is sure that it is not asked for again
            self._write("\n")

    def _write(self, text: str) -> None:
        """Write past Python's buffer, which a signal handler must not enter twice."""
        data = text.encode(sys.stdout.encoding, "backslashreplace")
        while data:
            data = data[os.write(sys.stdout.fileno(), data) :]


def in_foreground() -> bool:
    """Tell whether the terminal is ours: in the background, who changes it is stopped."""
    if not hasattr(os, "tcgetpgrp"):
        return True
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # the window is closed
        return False


class DumbTerminal(Terminal):
    """A terminal that knows no escape sequences, as the shell inside Emacs: lines, no prompt."""

    def read(self) -> str:
        """Return the line that is typed next."""
        self._take_terminal()
        line, self._interrupted = self._take_back(), -math.inf
        if line:
            self._write(f"-- to be mended: {line} --\n")
        return input()

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Ask, and read the answer from the next line."""
        self._take_terminal()
        return self._ask_secretly(question) if secret else input(question)

    def show(self, item: Line | Notice) -> None:
        """Print an item as it comes."""
        self._write(self._render(item) + "\n")


class _Input:
    """A line, or an answer, from before it is asked for to after it is off the screen."""

    def __init__(self, question: str = "") -> None:
        self.question = question  # what comes must wait until it is answered; empty for a line
        self.drawn = False  # readline has drawn the prompt
        self.cleared = False  # Ctrl-C did not mean to leave


class ReadlineTerminal(Terminal):
    """A terminal with the standard library alone: `input`, with GNU readline where there is one.

    What comes while readline waits for a key is printed above the half-typed
    line by the main thread, in a signal handler: readline's own functions take
    the line off the screen and put it back, cursor and all.  Without them (libedit,
    Windows) it is printed by the thread that brings it, and the line written again.
    All below is set by the main thread, but for `_waiting`, `_shown` and, without those
    functions, `_showing`, which is then of who has `_printing`; who shows reads it.
    """

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        self._readline = _import_readline()
        self._library = _readline_library(self._readline)
        self._waiting: deque[str] = deque()  # rendered, not yet on the screen; any thread adds
        self._shown = threading.Event()  # set when they are
        # Without readline's functions, lets one thread at a time print and take from `_waiting`.
        self._printing = threading.RLock()
        self._showing = False  # a signal's handler leaves it to what it interrupts
        self._was_stopped = False  # in the middle of showing
        self._input: _Input | None = None  # what is asked for now
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._hear_signals()

    def read(self) -> str:
        """Return the line that is typed next, and take it off the screen."""
        while True:
            self._take_terminal()
            self.hush(quiet=False)
            asked = self._input = _Input()
            try:
                self._hear_signals()
                self._begin()
                text = input(self._prompt())
                self._interrupted = -math.inf
                if not self._library:
                    self._erase(self._prompt() + text)
                self._forget_secret(text)
                return text
            except Leave:
                if in_foreground():
                    self._write("\n")
                raise
            except KeyboardInterrupt:
                if not asked.cleared:
                    raise
            except EOFError:
                # GNU readline has gone to the next row; others stay behind the prompt.
                self._write("\x1b[A\r\x1b[J" if self._library else "\r\x1b[K")
                raise
            finally:
                self._input = None
                self.hush()  # what is typed now is shown with the next prompt
                self._hear_signals()
                self._show_waiting()

    def recall(self, lines: list[str]) -> None:
        """Put lines before those that are typed from now on."""
        if self._readline:
            for line in lines:
                self._readline.add_history(line)

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Ask on a line of its own, and keep the answer out of the recall."""
        self._take_terminal()
        self._input = _Input(question)
        try:
            if secret:
                return self._ask_secretly(question)
            self.hush(quiet=False)
            if self._library:
                self._readline.set_startup_hook(self._library.echo)
                self._readline.set_pre_input_hook(self._on_prompt)
            kept = self._readline.get_current_history_length() if self._readline else 0
            answer = input(question)
            if self._readline and self._readline.get_current_history_length() > kept:
                self._forget_last()
            return answer
        finally:
            self._input = None
            self._show_waiting()

    def show(self, item: Line | Notice) -> None:
        """Print an item above the half-typed line."""
        self._waiting.append(self._render(item))
        if not self._library or threading.current_thread() is threading.main_thread():
            self._show_waiting()
        while self._waiting and not (self._question() and len(self._waiting) < MAX_HELD):
            self._shown.clear()
            if self._library:
                # Again and again: a signal that comes just before readline waits is lost on it.
                signal.pthread_kill(threading.main_thread().ident or 0, KNOCK)
            else:  # Ctrl-C kept the main thread from it
                self._show_plainly()
            self._shown.wait(0.05)

    def hush(self, *, quiet: bool = True) -> None:
        """Have nothing appear that readline does not show itself."""
        super().hush(quiet=quiet or self._library is not None)

    def can_leave(self, frame: FrameType | None) -> bool:
        """Tell whether no function that readline called runs: from there no exception gets out."""
        ours = [self._library.echo, *self._library.commands()] if self._library else []
        called = {self._on_prompt, self._complete, self._on_start, *ours}
        codes = {function.__func__.__code__ for function in called}  # type: ignore[attr-defined]
        return super().can_leave(frame) and not _is_inside(frame, codes)

    def leave(self) -> None:
        """Make `read` raise `Leave`."""
        self._ignore_signals()
        # A signal that is ignored only now may be pending, which Python would complain of.
        sys.unraisablehook = lambda _: None
        if self._library and not in_foreground():
            self._library.let_go()
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # or readline's end would stop us
        raise Leave

    def _hear_signals(self) -> None:
        if self._library:
            signal.signal(KNOCK, self.on_knock)
            signal.signal(signal.SIGTSTP, self._on_stop)
            signal.signal(signal.SIGCONT, self._on_continue)
            for number in (KNOCK, signal.SIGTSTP, signal.SIGCONT, signal.SIGINT):
                # What readline writes at that moment would be lost, and it goes by what it wrote.
                signal.siginterrupt(number, self._input is None or bool(self._input.question))
            sys.unraisablehook = sys.__unraisablehook__

    def _ignore_signals(self) -> None:
        # When a handler has raised, `input` runs those of other signals with the
        # exception still set, and whatever they do fails.
        if self._library and self._input and not self._input.question:
            # Python would complain of one that has come already, and is ignored only now.
            sys.unraisablehook = lambda _: None
            for number in (KNOCK, signal.SIGTSTP, signal.SIGCONT):
                signal.signal(number, signal.SIG_IGN)

    def _begin(self) -> None:
        """Have Tab complete, and put a line that was refused back into the prompt."""
        if self._readline is None:
            return
        self._readline.set_startup_hook(self._on_start)
        self._readline.set_pre_input_hook(self._on_prompt)
        self._readline.set_completer(self._complete)
        self._readline.set_completer_delims(" ")
        libedit = "libedit" in (self._readline.__doc__ or "")
        self._readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: menu-complete")
        if self._library:
            self._readline.parse_and_bind("set enable-bracketed-paste on")
            self._library.bind(self._prompt())
        elif not libedit:  # a paste whose end does not come could not be left
            self._readline.parse_and_bind("set enable-bracketed-paste off")

    def _prompt(self) -> str:
        return self._question() or super()._prompt()

    def _question(self) -> str:
        """Return what is asked and must be answered before anything is shown, or nothing."""
        asked = self._input
        return asked.question if asked else ""

    def _on_start(self) -> None:
        if self._library:
            self._library.echo()
        self._readline.insert_text(self._take_back())

    def _on_prompt(self) -> None:
        if self._input:
            self._input.drawn = True

    def _is_active(self) -> bool:
        """Tell whether readline waits for a key, with prompt and line on the screen."""
        is_drawn = self._input is not None and self._input.drawn
        return is_drawn and self._library is not None and self._library.is_reading()

    def _complete(self, word: str, state: int) -> str | None:
        assert self._readline is not None
        before = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        found = completions(before, self.chat)
        return found[state] if state < len(found) else None

    def _forget_secret(self, text: str) -> None:
        if self._readline and discreet(text) != text:
            self._forget_last()

    def _forget_last(self) -> None:
        """Take what was typed last out of the recall."""
        self._readline.remove_history_item(self._readline.get_current_history_length() - 1)

    def _show_waiting(self) -> None:
        """Print what waits; in the main thread, where readline runs too."""
        if not self._library:
            self._show_plainly()
            return
        library = self._library if self._is_active() else None
        if self._question() or self._showing or (self._input and not library):
            return  # it is being done, or cannot be done now
        self._showing = True
        try:
            if library:
                library.hide()
            while self._waiting:
                self._write(self._waiting[0] + "\n")
                self._waiting.popleft()
            if library:
                if self._given_back and not self._readline.get_line_buffer():
                    self._readline.insert_text(self._take_back())
                library.unhide(self._prompt())
        finally:  # Ctrl-C can come in between
            self._showing = False
            self._shown.set()
        if library and self._was_stopped:  # perhaps just when the line had been put back
            self._was_stopped = False
            library.hide()
            library.unhide(self._prompt())

    def _show_plainly(self) -> None:
        """Print what waits without readline's functions; in any thread."""
        with self._printing:
            if self._showing:
                return  # by what the signal interrupted
            self._showing = True
            try:
                while self._waiting and not self._question():
                    self._write(self._above_line(self._waiting[0] + "\n"))
                    self._waiting.popleft()
            finally:  # Ctrl-C can come in between
                self._showing = False

    def _above_line(self, text: str) -> str:
        """Return what puts a text above the line that is typed, if one is."""
        if not self._input:
            return text
        line = self._readline.get_line_buffer() if self._readline else ""
        return f"\r\x1b[K{text}{self._prompt()}{line}"

    def _erase(self, typed: str) -> None:
        """Take a line off the screen that was just entered, if it is sure how many rows it has."""
        least, most = rows_of(typed, os.get_terminal_size(sys.stdout.fileno()).columns or 80)
        if least == most:
            self._write(f"\x1b[{least}A\r\x1b[J")

    def on_knock(self, number: int, frame: FrameType | None) -> None:
        """Show what waits."""
        self.signals_run.set()
        if self.can_leave(frame):  # else readline is busy; it will be signalled again
            self._show_waiting()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.can_leave(frame):
            return _signal_again(number)
        asked = self._input
        if asked:
            asked.cleared = False
        if asked and not asked.question and self._library and self._is_active():
            line = self._readline.get_line_buffer()
            asked.cleared = bool(line) or not self.note_interrupt()
            self._library.hide()
            if asked.cleared and not line:
                self._waiting.append(self._render(Notice(HOW_TO_LEAVE)))
        self._ignore_signals()
        raise KeyboardInterrupt

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        """Stop as any program does, with the terminal as the shell wants it."""
        with self._alone():
            if self._library and self._is_active():
                self._library.hide()
                self._library.give_terminal_back()
            super().hush(quiet=False)
            for stop in (signal.SIGTSTP, signal.SIGCONT):
                signal.signal(stop, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)
            self._hear_signals()
        self._on_continue(number, frame)

    def _on_continue(self, number: int, frame: FrameType | None) -> None:
        """Take the terminal again, once we have it."""
        with self._alone() as is_between:
            self.hush()
            if self._library and self._input and self._input.drawn and in_foreground():
                self._library.give_terminal_back()
                self.hush()
                self._library.take_terminal()
                self._was_stopped = is_between
                if not is_between:
                    self._write("\r\x1b[K")
                    self._library.unhide(self._prompt())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Show nothing meanwhile; tell whether what is shown now was interrupted for it.

        Then whether the half-typed line is on the screen is for the interrupted to say.
        """
        before, self._showing = self._showing, True
        try:
            yield before
        finally:  # Ctrl-C can come in between
            self._showing = before


class _Readline:
    """The functions of GNU readline that Python's module does not offer; of the main thread.

    Enter is ours: only there is it known how many rows the line has on the screen.
    So are the marks of a paste, for readline's own command for it waits for the second
    mark and hears nothing else, not even Ctrl-C, if that never comes.
    """

    TERMPREPPED = 0x4  # in rl_readline_state: the terminal is set up for reading a line
    DONE = 0x2000000  # the line is complete

    def __init__(self, path: str) -> None:
        import ctypes  # here, as what only a terminal needs, so that a pipe starts fast

        self._library = library = ctypes.PyDLL(path)
        library.rl_variable_value.restype = ctypes.c_char_p
        self._state = ctypes.c_ulong.in_dll(library, "rl_readline_state")
        self._done = ctypes.c_int.in_dll(library, "rl_done")
        self._buffer = ctypes.c_char_p.in_dll(library, "rl_line_buffer")
        self._deprep = ctypes.c_void_p.in_dll(library, "rl_deprep_term_function")
        ctypes.c_int.in_dll(library, "rl_sort_completion_matches").value = 0
        self._clear = library.rl_clear_visible_line
        self._echo = library.rl_tty_set_echoing  # looked for now: an old readline has none
        self._flush = ctypes.PyDLL(None).fflush
        self._pasting = False
        self._drawn = ""  # the prompt on the screen
        command = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)
        self._keys = {  # kept here, or their memory is given back while readline calls them
            b"\\C-m": command(self._on_enter),
            b"\\C-j": command(self._on_enter),
            b"\\C-i": command(self._on_tab),
            b"\x1b[200~": command(self._on_paste),
            b"\x1b[201~": command(self._on_paste_end),
        }

    def commands(self) -> list[Callable[[int, int], int]]:
        """Return the functions that readline calls."""
        return [self._on_enter, self._on_tab, self._on_paste, self._on_paste_end]

    def bind(self, prompt: str) -> None:
        """Make the keys ours, in the keymap that the user has chosen."""
        self._pasting, self._drawn = False, prompt
        for key, command in self._keys.items():
            self._library.rl_bind_keyseq(key, command)

    def is_reading(self) -> bool:
        """Tell whether readline holds the terminal."""
        return bool(self._state.value & self.TERMPREPPED)

    def hide(self) -> None:
        """Take the prompt and the half-typed line off the screen, or go below them."""
        if self._is_sure():
            self._clear()
            self._flush(None)
            self._write(b"\r")
        else:  # going up by readline's count could take somebody's line off
            self._flush(None)
            self._write(b"\r\n\x1b[J")

    def unhide(self, prompt: str) -> None:
        """Put them back below what was printed, with the name that is the user's now."""
        self._drawn = prompt
        self._library.rl_set_prompt(prompt.encode())
        self._library.rl_on_new_line()
        self._library.rl_redisplay()

    def give_terminal_back(self) -> None:
        """Set the terminal as it was before readline took it."""
        self._library.rl_deprep_terminal()
        self._flush(None)

    def take_terminal(self) -> None:
        """Set the terminal up for reading a line."""
        self._library.rl_prep_terminal(1)
        self.echo()

    def echo(self) -> None:
        """Have readline show what is typed, though the terminal itself does not."""
        self._echo(1)

    def let_go(self) -> None:
        """Have readline leave the terminal alone when it ends: another program has it."""
        self._deprep.value = None

    def _is_sure(self) -> bool:
        """Tell whether all terminals give the line as many rows as readline believes."""
        if self._library.rl_variable_value(b"horizontal-scroll-mode") == b"on":
            return True
        text = self._drawn + (self._buffer.value or b"").decode("utf-8", "replace")
        if all(few == many for _, few, many in columns_of(text)):
            return True
        least, most = rows_of(text, os.get_terminal_size(sys.stdout.fileno()).columns or 80, 1)
        return least == most

    def _on_enter(self, count: int, key: int) -> int:
        if self._pasting:
            self._library.rl_insert_text(b"\n")
        elif self._is_sure():
            self._clear()
            self._flush(None)
            self._write(b"\r")
            self._done.value = 1
            self._state.value |= self.DONE
        else:
            self._library.rl_newline(count, key)
        return 0

    def _on_tab(self, count: int, key: int) -> int:
        if self._pasting:
            self._library.rl_insert_text(b"\t")
            return 0
        return int(self._library.rl_menu_complete(count, key))

    def _on_paste(self, count: int, key: int) -> int:
        self._pasting = True
        return 0

    def _on_paste_end(self, count: int, key: int) -> int:
        self._pasting = False
        return 0

    def _write(self, data: bytes) -> None:
        os.write(sys.stdout.fileno(), data)


def _import_readline() -> Any:
    try:
        import readline
    except ImportError:  # as on Windows: input() edits as well as the console does
        return None
    return readline


def _readline_library(readline: Any) -> _Readline | None:
    try:
        return _Readline(readline.__file__)
    except (AttributeError, OSError, TypeError, ValueError):
        return None  # no GNU readline, or built into the interpreter


def completions(before: str, chat: ChatClient | None) -> list[str]:
    """Return what the last word before the cursor may become."""
    if before.startswith("/") and " " not in before:
        verbs = (*protocol.COMMANDS, *OWN_COMMANDS)
        return [f"/{verb} " for verb in verbs if f"/{verb}".startswith(before)]
    start, _, word = before.rpartition(" ")
    names = [name for name in (chat.present if chat else []) if chat and name != chat.name]
    if chat and start.lower() == "/msg":  # who wrote to us comes first
        names = [name for name in chat.place.writers if name in names] + names
    suffix = " " if start else ": "
    found = [name + suffix for name in names if protocol.fold(name).startswith(protocol.fold(word))]
    return list(dict.fromkeys(found))


class ToolkitTerminal(Terminal):
    """A terminal with prompt_toolkit, which does the editing and redraws around what comes.

    While a prompt stands, its event loop, which runs in the main thread, prints what
    waits; at any other time whoever brings it does.
    """

    def __init__(self, look: Look, *, has_status: bool = True) -> None:
        super().__init__(look)
        from prompt_toolkit import PromptSession
        from prompt_toolkit.styles import Style

        plain = Style.from_dict({"bottom-toolbar": "noreverse"})
        self._session: PromptSession[str] = PromptSession(
            history=_toolkit_history(),
            input_processors=[_toolkit_mask()],
            completer=_toolkit_completer(self),
            key_bindings=_toolkit_keys(self),
            bottom_toolbar=self._status if has_status else None,
            complete_while_typing=False,
            erase_when_done=True,
            refresh_interval=1.0,
            style=None if look.colors else plain,
        )
        # Printing above the prompt takes no time; in cooked mode the keys that are
        # typed in that time would be echoed into what is printed.
        self._cooked_mode = self._session.app.input.cooked_mode
        self._session.app.input.cooked_mode = contextlib.nullcontext  # type: ignore[method-assign]
        _toolkit_paste(self._session.app.input)
        self._session.app.before_render += self._repaint
        self._strays = False  # the line on the screen may stand in other columns than believed
        # Guards what follows, and the terminal while no prompt stands; notified when all is shown.
        self._printed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._prompting: PromptSession[str] | None = None  # from before its prompt stands to behind
        self._scheduled = False  # its event loop is about to print

    def read(self) -> str:
        """Return the text that is typed next; a paste may have several lines."""
        text = self._run(self._session, self._prompt, default=self._take_back())
        self._interrupted = -math.inf
        return text

    def recall(self, lines: list[str]) -> None:
        """Put lines before those that are typed from now on."""
        for line in lines:
            self._session.history.append_string(line)

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Ask on a line of its own."""
        from prompt_toolkit import PromptSession

        asking: PromptSession[str] = PromptSession(key_bindings=_toolkit_stop(self))
        return self._run(asking, question, is_password=secret)

    def _run(self, session: PromptSession[str], prompt: Any, **options: Any) -> str:
        self._take_terminal()
        self.hush()
        with self._printed:
            self._prompting, self._scheduled = session, True  # by what runs before the prompt
        try:
            return session.prompt(prompt, pre_run=self._print, **options)
        finally:
            with self._printed:
                self._prompting = None
                self._write(CLEAR_ROW)
                self._print()

    def show(self, item: Line | Notice) -> None:
        """Print an item above the half-typed line."""
        text = self._render(item)
        with self._printed:
            self._waiting.append(text)
            if self._prompting is None:
                self._print()
            else:
                self._schedule()
            if threading.current_thread() is not threading.main_thread():
                self._printed.wait_for(lambda: len(self._waiting) < MAX_HELD)

    def _schedule(self) -> None:
        """Have the event loop of the prompt print what waits, once."""
        loop = self._prompting.app.loop if self._prompting else None
        if loop and not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):  # it has just ended; `_run` prints
                loop.call_soon_threadsafe(self._print_above)

    def _repaint(self, app: Application[str]) -> None:
        """Have a line painted whole if terminals disagree on its columns: parts would stray."""
        strayed = self._strays
        self._strays = any(few != many for _, few, many in columns_of(app.current_buffer.text))
        if self._strays or strayed:
            # Steps are counted from where the cursor is believed to be.
            app.output.write_raw("\r")
            app.output.cursor_forward(app.renderer._cursor_pos.x)
            app.renderer._last_screen = None

    def _print_above(self) -> None:
        from prompt_toolkit.application import run_in_terminal

        session = self._prompting
        if session and session.app.is_running:
            run_in_terminal(self._print)

    def _print(self) -> None:
        """Print what waits; in the main thread, or where no prompt stands."""
        with self._printed:
            if self._waiting and self._prompting is not None:
                self._write(CLEAR_ROW)
            while self._waiting:
                self._write((self._waiting.popleft() + "\n").replace("\n", "\r\n"))
            self._scheduled = False
            self._printed.notify_all()
            if self._given_back and self._prompting is self._session:
                buffer = self._session.default_buffer
                if self._session.app.is_running and not buffer.text:
                    buffer.insert_text(self._take_back())

    def hush(self, *, quiet: bool = True) -> None:
        """Have nothing that is typed appear between the prompts, which show it themselves."""
        super().hush()

    def suspend(self) -> None:
        """Stop as Ctrl-Z does in any program, with the terminal as the shell wants it."""
        with self._cooked_mode():
            os.kill(0, signal.SIGTSTP)

    def leave(self) -> None:
        """Have the prompt end in its own good order, and raise `Leave` then."""
        app = self._prompting.app if self._prompting else None
        if termios and app and not in_foreground():  # the end of the prompt must not touch it
            termios.tcsetattr = lambda *_: None
            app.output.flush = lambda: None  # type: ignore[method-assign]
        if app and app.is_running and app.loop:
            app.loop.call_soon_threadsafe(self._exit)
        else:
            raise Leave

    def _exit(self) -> None:
        app = self._prompting.app if self._prompting else None
        if app and app.future and not app.future.done():
            app.exit(exception=Leave())

    def interrupt(self, app: Application[str]) -> None:
        """Clear what is typed, or leave, as Ctrl-C means."""
        if app.current_buffer.text:
            app.current_buffer.reset()
        elif self.note_interrupt():
            app.exit(exception=KeyboardInterrupt)
        else:
            with self._printed:
                self._waiting.append(self._render(Notice(HOW_TO_LEAVE)))
                self._schedule()

    def _status(self) -> str:
        chat = self.chat
        return f" {chat.name} on {chat.entrance}, {chat.status}" if chat else ""


def _toolkit_completer(screen: Screen) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class NameCompleter(Completer):
        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterator[Completion]:
            before = document.text_before_cursor
            word = before.rpartition(" ")[2]
            for text in completions(before, screen.chat):
                yield Completion(text, start_position=-len(word))

    return NameCompleter()


def _toolkit_history() -> InMemoryHistory:
    from prompt_toolkit.history import InMemoryHistory

    class DiscreetHistory(InMemoryHistory):
        def append_string(self, string: str) -> None:
            if discreet(string) == string:
                super().append_string(string)

    return DiscreetHistory()


def _toolkit_mask() -> Processor:
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.layout.processors import ConditionalProcessor, PasswordProcessor

    @Condition
    def is_secret() -> bool:
        text = get_app().current_buffer.text
        return discreet(text) != text

    return ConditionalProcessor(PasswordProcessor(), is_secret)


def _toolkit_keys(screen: ToolkitTerminal) -> KeyBindings:
    """Return the keys that mean something else here, while a line is typed."""
    from prompt_toolkit.key_binding import KeyPressEvent

    bindings = _toolkit_stop(screen)

    @bindings.add("c-c")
    def interrupt(event: KeyPressEvent) -> None:
        screen.interrupt(event.app)

    return bindings


def _toolkit_paste(keys: Any) -> None:
    """Have a paste whose end does not come end before Ctrl-C or Ctrl-D, which no paste needs."""
    parser = getattr(keys, "vt100_parser", None)
    if parser is None:  # as on Windows
        return
    feed = parser.feed

    def feed_keys(data: str) -> None:
        feed(data)
        pasted = parser._paste_buffer if parser._in_bracketed_paste else ""
        if found := re.search("[\x03\x04]", pasted):
            parser.reset()
            feed(f"\x1b[200~{pasted[: found.start()]}\x1b[201~{pasted[found.start() :]}")

    parser.feed = feed_keys


def _toolkit_stop(screen: ToolkitTerminal) -> KeyBindings:
    """Return the key that stops the program."""
    from prompt_toolkit.application import run_in_terminal
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()
    if hasattr(signal, "SIGTSTP"):

        @bindings.add("c-z")
        def suspend(event: KeyPressEvent) -> None:
            run_in_terminal(screen.suspend)

    return bindings


class Recall:
    """The lines typed in earlier sessions, in a file, for who asks for it; of the main thread.

    Each line is added when it is typed, so several clients at once share the file, and each
    has it for itself for as long as it reads, adds or cuts.  It is cut when a client starts.
    A place that cannot be written is told once, and nothing is kept from then on.
    """

    def __init__(self, file: str) -> None:
        self.failure = ""  # why nothing is kept
        self._file = file  # empty when nothing is kept

    def load(self) -> list[str]:
        """Return the lines, the oldest first, and cut the file when it has far too many."""
        if not self._file:
            return []
        try:
            os.makedirs(os.path.dirname(self._file), mode=0o700, exist_ok=True)
            with self._open() as kept:
                kept.seek(0)
                lines = kept.read().split("\n")[:-1]
                if len(lines) > 2 * MAX_RECALL:
                    kept.truncate(0)
                    kept.write("".join(f"{line}\n" for line in lines[-MAX_RECALL:]))
        except OSError as error:
            self._fail(error)
            return []
        return [line for line in lines[-MAX_RECALL:] if _is_recalled(line)]

    def add(self, text: str) -> None:
        """Keep a line that was typed, unless a password may be in it."""
        if not (self._file and _is_recalled(text)):
            return
        try:
            with self._open() as kept:
                kept.write(text + "\n")
        except OSError as error:
            self._fail(error)

    def _open(self) -> TextIO:
        """Open the file, for ourselves alone until it is closed."""
        number = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        # Windows has no such lock, and not every file system knows it: what is cut there just
        # when another client adds a line may lose it.
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(number, fcntl.LOCK_EX)
        return open(number, "a+", encoding="utf-8", errors="replace", newline="\n")

    def _fail(self, error: OSError) -> None:
        why = f"cannot keep what is typed in {self._file}: {error.strerror}"
        self.failure = f"{why}; make it writable, or take recall out of the settings"
        self._file = ""


def _is_recalled(text: str) -> bool:
    """Tell whether a line may be kept: it is one, and has no secret."""
    return bool(text.strip()) and text.isprintable() and discreet(text) == text


class Unattended:
    """The time since a line was last typed; what comes in a long one has a mark before it, once.

    Wall clock, because a machine that sleeps is left alone too.  Any thread may call.
    """

    def __init__(self) -> None:
        # Guards both: who types begins a new time, who hears marks it.
        self._lock = threading.Lock()
        self._since = time.time()
        self._marked = False

    def end(self) -> None:
        """Begin anew: a line is typed."""
        with self._lock:
            self._since, self._marked = time.time(), False

    def mark(self) -> Notice | None:
        """Return what is to stand before a line that comes now, if anything."""
        with self._lock:
            if self._marked or time.time() - self._since < UNATTENDED:
                return None
            self._marked = True
            since = time.strftime("%H:%M", time.localtime(self._since))
        return Notice(f"no line typed since {since}; what follows came meanwhile")


class View:
    """What one user gets to see of all that comes, and what the client puts beside it."""

    def __init__(self, screen: Screen, recall: Recall) -> None:
        self.ignored = Ignored()
        self.unattended = Unattended()
        self.recall = recall
        self._screen = screen

    def typed(self, text: str) -> None:
        """Take note of what was typed."""
        self.unattended.end()
        self.recall.add(text)
        self.tell_of_recall()

    def tell_of_recall(self) -> None:
        """Say, once, why what is typed is not kept."""
        if self.recall.failure:
            self._screen.show(Notice(self.recall.failure))
            self.recall.failure = ""

    def show(self, item: Heard | Notice) -> None:
        """Show what comes from the room, unless it is hidden."""
        screen = self._screen
        self.ignored.follow(item)
        if self.ignored.hides(item, screen.me):
            return
        if screen.interactive and _is_news(item, screen.me) and (mark := self.unattended.mark()):
            screen.show(mark)
        screen.show(item)
        if screen.interactive and str(item) == protocol.help_lines()[-1]:  # it knows not ours
            screen.show(Notice(OWN_HELP))


def _is_news(item: Heard | Notice, me: str) -> bool:
    """Tell whether an item is from others, and no answer."""
    if isinstance(item, Notice) or item.kind is Kind.ANSWER:
        return False
    return protocol.fold(item.name) != protocol.fold(me)


# --- The command line --------------------------------------------------------


def write(chat: ChatClient, screen: Screen, view: View) -> int:
    """Send what is typed until there is no more; return how many lines were refused.

    The classic's name for it: what is written to the room is what is read here.
    """
    refused, doubted = 0, ""
    while True:
        try:
            text = screen.read()
            view.typed(text)
            lines = text.split("\n")
        except EOFError:
            return refused
        except Refusal as refusal:
            refused += 1
            screen.show(Notice(str(refusal)))
            continue
        for line in lines:
            if (protocol.command(line) or ("",))[0] == "quit":
                return refused + _warn_of_rest(screen)
            if screen.interactive and len(lines) == 1 and line != doubted and line in EXITS:
                screen.show(Notice(f"/quit leaves; Enter says {line} to everyone", line))
                doubted = line
                continue
            doubted = ""
            if request := own_command(line.replace("\t", " ")):
                refused += not _do(screen, view.ignored, *request)
            else:
                refused += not _say(chat, screen, view.ignored, line)


def _do(screen: Screen, ignored: Ignored, verb: str, argument: str) -> bool:
    """Obey a command of this client's own and answer it; return False if it cannot be done."""
    try:
        screen.show(Notice(ignored.obey(verb, argument, screen.me)))
        return True
    except Refusal as refusal:
        screen.show(Notice(str(refusal)))
        return False


def _warn_of_rest(screen: Screen) -> bool:
    """Say so when there is more input behind a ``/quit`` than will be said."""
    if isinstance(screen, Pipe) and screen.has_more():
        screen.show(Notice("what stands behind /quit was not said; --verbatim says it as well"))
        return True
    return False


def _say(chat: ChatClient, screen: Screen, ignored: Ignored, line: str) -> bool:
    """Send a line; return False, and have it mended, if the room cannot carry it."""
    try:
        ignored.check_reply(line, chat.place.writers)
        if screen.interactive:
            if line[:1].isspace() and own_command(line.strip()):
                raise Refusal(protocol.SLIP)
            line = _guarded(screen, line.replace("\t", " "))
        chat.send(line)
        if screen.interactive and chat.away and line.strip():
            screen.show(Notice(f"to be sent when we are back: {discreet(line)}"))
        return True
    except Refusal as refusal:
        reason = explain_refusal(refusal, line.encode("utf-8", "replace"), chat.fmt)
        screen.show(Notice(f"not sent: {reason}", line if discreet(line) == line else ""))
        return False


def _guarded(screen: Screen, line: str) -> str:
    """Return what may be sent of a line: a password only as one, unless its author insists."""
    if line.strip() == "/op":
        return _with_password(screen)
    if discreet(line) == line or (protocol.command(line) or ("",))[0] == "op":
        return line
    try:
        answer = screen.ask("That looks like a password; say it to everyone? (yes/no) ")
    except Leave:
        raise
    except (KeyboardInterrupt, EOFError):
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return line
    screen.show(Notice("not said; /op alone asks for the password"))
    return ""


def _with_password(screen: Screen) -> str:
    """Return ``/op`` with the password, or nothing if Ctrl-C or Ctrl-D takes it back."""
    try:
        return f"/op {screen.ask('Operator password: ', secret=True)}"
    except Leave:
        raise
    except (KeyboardInterrupt, EOFError):
        screen.show(Notice("no password was given"))
        return ""
    finally:
        screen.hush(quiet=False)


def explain_refusal(refusal: Refusal, line: bytes, fmt: str) -> str:
    """Return why a line was refused, with the remedy where that is another format."""
    remedy = (
        "" if line.isascii() or fmt != "ascii" else "; --format utf-8 is for rooms that have it"
    )
    return f"{refusal}{remedy}"


def main(arguments: list[str] | None = None) -> int:
    """Chat until the user leaves; return the exit status."""
    if sys.stderr is None:  # or what is said there would go to standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the program
    try:
        options = _options(sys.argv[1:] if arguments is None else arguments)
    except Refusal as refusal:
        complain(str(refusal))
        return 2
    if sys.stdin is None or sys.stdout is None:
        return _fail("standard input or output is closed; leave both open")
    screen = _screen(options)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), lambda number, frame: _leave(screen, frame))
    signal.signal(ENDED, lambda number, frame: _leave(screen, frame))
    if hasattr(signal, "pthread_kill") and not isinstance(screen, ToolkitTerminal):
        _have_signals_heard(screen)
    try:
        return _converse(screen, options)
    except (KeyboardInterrupt, OutputClosed):
        return 0
    except EOFError:
        return _fail("there is no name; give one with --name or as the first line")
    except (Refusal, Refused) as refused:
        return _fail(str(refused))
    except (OSError, UnicodeError) as error:
        return _fail(_explain(error, options))
    finally:
        signal.signal(KNOCK, signal.SIG_IGN)
        screen.close()


def _converse(screen: Screen, options: argparse.Namespace) -> int:
    """Join the room, talk, and leave; return the exit status."""
    view = View(screen, Recall(_recall_file() if options.recall and screen.interactive else ""))
    screen.recall(view.recall.load())
    view.tell_of_recall()
    chat = screen.chat = ChatClient(
        _name(screen, options.name),
        options.host,
        options.port,
        options.format,
        password=protocol.password(options.password_file, "CHAT_PASSWORD"),
        tls=_tls_context(options),
        fingerprint=options.tls_fingerprint or "",
        show=view.show,
        ended=lambda: _interrupt_main(screen),
        give_up=options.give_up,
    )
    try:
        _join(chat, screen)
    except BaseException:
        chat.close()
        raise
    refused = 0
    try:
        view.unattended.end()  # who was asked for a name may have been away before that
        chat.start()
        refused = write(chat, screen, view)
        if isinstance(screen, Pipe) and options.listen:
            screen.closed.wait()  # or the end of the conversation, which interrupts
        elif not screen.interactive:
            chat.flush()
    except KeyboardInterrupt:
        pass  # Ctrl-C, a signal, or the end of the conversation: leave
    except BaseException:  # such as a window that is closed: not without a goodbye
        with contextlib.suppress(OutputClosed):
            chat.leave()
        raise
    return _take_leave(chat, screen, refused)


def _take_leave(chat: ChatClient, screen: Screen, refused: int) -> int:
    """Leave, tell what was not sent, and return the exit status."""
    try:
        unsent = chat.leave()
    except KeyboardInterrupt:  # once more: without a goodbye
        return 0 if screen.interactive else 1
    for text in unsent:
        screen.show(Notice(f"not sent: {discreet(text)}"))
    if chat.reason:
        raise Refused(chat.reason)
    if isinstance(screen, Pipe) and screen.failure:
        return _fail(screen.failure)
    return 1 if not screen.interactive and (refused or unsent or chat.failed) else 0


def _name(screen: Screen, name: str = "") -> str:
    """Return a name that a person can have, asking for it if need be."""
    while True:
        try:
            return protocol.check_name((name or screen.ask("Your name: ")).strip())
        except Refusal as refusal:
            if not screen.interactive:
                raise
            screen.show(Notice(str(refusal)))
            name = ""


def _join(chat: ChatClient, screen: Screen) -> None:
    """Get into the room at one of its servers, with another name or password if need be."""
    was_asked = chat.entrance.password is None
    try:
        while True:
            try:
                return chat.connect()
            except NameRefused as refused:
                if not screen.interactive:
                    raise
                screen.show(Notice(str(refused)))
                chat.place.name = _name(screen)
            except PasswordRefused as refused:
                if not was_asked:
                    why = f"{refused}; see --password-file, or the variable CHAT_PASSWORD"
                    raise PasswordRefused(why) from None
                if chat.entrance.password is not None:
                    screen.show(Notice(str(refused)))
                try:
                    chat.entrance.password = screen.ask("Password of the room: ", secret=True)
                except EOFError:
                    raise Refused("no password was given; start again and type it") from None
            except PutOut:
                raise
            except (OSError, UnicodeError, Refused):
                if chat.entrance.turn_to_next():
                    raise
    finally:
        screen.hush(quiet=False)


def _screen(options: argparse.Namespace) -> Screen:
    """Return the best screen for where standard input and output lead."""
    if not _is_interactive():
        look = Look(timestamps=options.timestamps)
        return Pipe(look, options.format, verbatim=options.verbatim)
    is_dumb = os.environ.get("TERM", "") in ("", "dumb") and os.name != "nt"
    look = Look(
        colors=0 if is_dumb or options.no_color else _colors(),
        timestamps=options.timestamps,
        bell=not options.no_bell,
    )
    if is_dumb:
        return DumbTerminal(look)
    _widen_locale()
    with contextlib.suppress(ImportError):
        return ToolkitTerminal(look, has_status=not options.no_status)
    return ReadlineTerminal(look)


def _colors() -> int:
    """Return how many colours the terminal has, as far as the environment tells."""
    if os.environ.get("NO_COLOR"):
        return 0
    has_many = "256color" in os.environ.get("TERM", "") or "COLORTERM" in os.environ
    return 256 if has_many else 16


def _is_interactive() -> bool:
    """Tell whether somebody types and reads here, and no program does."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _widen_locale() -> None:
    """Have readline know characters of several bytes, as Python does, where the locale is C."""
    import locale

    given = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "C")
    if given not in ("C", "POSIX"):
        return
    for name in ("C.UTF-8", "UTF-8"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            os.environ["LC_ALL"] = name
            return


def _hosts(text: str) -> str:
    try:
        addresses(text, protocol.PORT)
    except Refusal as refusal:
        raise argparse.ArgumentTypeError(str(refusal)) from None
    return text


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; use 0 or more")
    return float(text)


def _fingerprint(text: str) -> str:
    digits = text.replace(":", "").upper()
    if not re.fullmatch("[0-9A-F]{64}", digits):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a fingerprint of 64 hex digits; the server logs its own"
        )
    return ":".join(re.findall("..", digits))


def _tls_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what the options say of TLS: who vouches for the server."""
    if options.tls is False or not (options.tls or options.tls_ca or options.tls_fingerprint):
        return None
    if options.tls_ca:
        with open(options.tls_ca, "rb"):
            pass  # so that an error names the file
    try:
        context = ssl.create_default_context(cafile=options.tls_ca)
    except ssl.SSLError:
        raise Refused(f"{options.tls_ca} has no certificate; name a PEM file") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.tls_fingerprint:  # compared when the certificate is seen
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _leave(screen: Screen, frame: FrameType | None) -> None:
    """Have the main thread leave, the first time that a signal says so."""
    if screen.leaving.is_set():
        return None
    if not screen.can_leave(frame):
        return _signal_again(ENDED)
    screen.leaving.set()
    return screen.leave()


def _signal_again(number: int) -> None:
    """Have a signal come once more, in a moment."""
    main = threading.main_thread().ident or 0
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, number))
    timer.daemon = True
    timer.start()


def _have_signals_heard(screen: Screen) -> None:
    """Have a thread knock after each signal until the main thread has heard it.

    Whoever waits in `input` hears of a signal that came just before the waiting began
    only when another one, or a key, ends the waiting.
    """
    signals, written = socket.socketpair()
    written.setblocking(False)
    signal.signal(KNOCK, screen.on_knock)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    main = threading.main_thread().ident or 0

    def knock() -> None:
        while written and (numbers := signals.recv(64)):  # they come however busy Python is
            screen.signals_run.clear()
            while set(numbers) != {KNOCK} and not screen.signals_run.wait(0.05):
                signal.pthread_kill(main, KNOCK)

    threading.Thread(target=knock, name="knock", daemon=True).start()


def _interrupt_main(screen: Screen) -> None:
    """Make the main thread stop reading, whatever it waits for."""
    while not screen.leaving.is_set():
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, ENDED)
        else:
            _thread.interrupt_main(ENDED)
        screen.leaving.wait(0.05)  # and again: readline can miss a signal


def complain(text: str) -> None:
    """Say something on standard error, if anybody listens there."""
    try:
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
    except OSError:  # what is still in the buffer must not be tried again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _fail(text: str) -> int:
    complain(text)
    return 1


NAME_AUTHORITY = "name its authority with --tls-ca or itself with --tls-fingerprint"
IN_CERTIFICATE = "give --host a name that is in it, or name it itself with --tls-fingerprint"
#: What to do about a certificate, by OpenSSL's number for what is wrong with it.
REMEDIES = {10: "its server needs a new one", 62: IN_CERTIFICATE, 64: IN_CERTIFICATE}


def _explain(error: Exception, options: argparse.Namespace) -> str:
    """Say why there is no connection and what to do about it."""
    servers = addresses(options.host, options.port)
    where = " or ".join(f"{host} port {port}" for host, port in servers)
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message.removesuffix(".")
        remedy = REMEDIES.get(error.verify_code, NAME_AUTHORITY)
        return f"the certificate of {where} is not trusted: {why}; {remedy}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS on {where}; try without --tls"
    if isinstance(error, OSError) and error.filename:
        return f"cannot open {error.filename}: {error.strerror}; name another file"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"unknown host {options.host}; check --host"
    if isinstance(error, ConnectionRefusedError):
        return f"no server on {where}; start one with server.py, or check --host and --port"
    if isinstance(error, TimeoutError):
        return f"no answer from {where}; check --host and --port, and --tls if it speaks TLS"
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return f"{where} is not whole; say the interface of a link-local one, as in fe80::1%eth0"
    reason = getattr(error, "strerror", None) or str(error)  # without the number before it
    return f"cannot talk to {where}: {reason}; check --host and --port"


# What may stand in the settings, under the names of the options, and as what.
SETTINGS: dict[str, type] = {
    **dict.fromkeys(("host", "name", "tls-ca", "tls-fingerprint", "format", "password-file"), str),
    **dict.fromkeys(("tls", "timestamps", "no-color", "no-bell", "no-status", "recall"), bool),
    "port": int,
}
# What a pipe takes from no settings but those that its own command names: a first line that
# was the name would be said to everyone, and what reads the lines would find times in them.
CHANGE_LINES = ("name", "timestamps")
IN_WORDS = {str: "a text in quotes", bool: "true or false", int: "a whole number"}


def settings_file() -> str:
    """Return where the user's settings stand, by the custom of the platform."""
    home, variables = os.path.expanduser("~"), os.environ
    if os.name == "nt":
        place = variables.get("APPDATA") or os.path.join(home, "AppData", "Roaming")
    elif sys.platform == "darwin":
        place = os.path.join(home, "Library", "Application Support")
    else:
        given = variables.get("XDG_CONFIG_HOME", "")
        place = given if os.path.isabs(given) else os.path.join(home, ".config")
    return os.path.join(place, "classic-chat", "client.toml")


def _recall_file() -> str:
    """Return where what was typed is kept: with the settings, but where state has its own place."""
    home, given = os.path.expanduser("~"), os.environ.get("XDG_STATE_HOME", "")
    place = os.path.dirname(settings_file())
    if os.name != "nt" and sys.platform != "darwin":
        state = given if os.path.isabs(given) else os.path.join(home, ".local", "state")
        place = os.path.join(state, "classic-chat")
    return os.path.join(place, "recall")


def _options(arguments: list[str]) -> argparse.Namespace:
    """Return what the command line says and, where it says nothing, the settings.

    Raise `Refusal` for settings that cannot be used.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tls is False and (options.tls_ca or options.tls_fingerprint):
        parser.error("--no-tls goes with no --tls-ca and no --tls-fingerprint; leave one out")
    file = settings_file() if options.settings is None else options.settings
    if not file:
        return options
    given = _settings(file, must_be=options.settings is not None)
    found = {name: _option(file, name, value) for name, value in given.items()}
    if options.settings is None and not _is_interactive():
        for name in CHANGE_LINES:
            found.pop(name, None)
    return parser.parse_args([*filter(None, found.values()), *arguments])


def _settings(file: str, *, must_be: bool) -> dict[str, Any]:
    """Return what stands in a file of settings: nothing if there is none, unless it must be."""
    try:
        with open(file, encoding="utf-8-sig") as settings:  # some editors put a mark before it
            text = settings.read(MAX_SETTINGS + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if must_be:
            raise Refusal(f"cannot read {file}: {error.strerror}; name another file") from None
        return {}
    except OSError as error:
        why = f"cannot read {file}: {error.strerror}"
        raise Refusal(f"{why}; make it readable, or name another with --settings") from None
    except UnicodeDecodeError:
        raise Refusal(f"{file} is not UTF-8; save it as that") from None
    if len(text) > MAX_SETTINGS:
        raise Refusal(f"{file} has over {MAX_SETTINGS} characters; name a file of settings")
    import tomllib  # here, as what only settings need

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number, or a nesting, beyond reason
        why = f"{file} is not TOML: {error}"
        raise Refusal(f'{why}; write lines such as name = "alice"') from None


def _option(file: str, name: str, value: Any) -> str:
    """Return a setting as an option, nothing for what is so anyway; raise `Refusal` if it is none.

    What is false is left out: ``tls = false`` must not undo a --tls-ca of the command line.
    """
    if name == "password":
        raise Refusal(f"{file}: a password does not belong here; name its file in password-file")
    if name not in SETTINGS:
        raise Refusal(f"{file}: there is no setting {name!r}; take one of {', '.join(SETTINGS)}")
    if type(value) is not SETTINGS[name]:
        raise Refusal(f"{file}: {name} must be {IN_WORDS[SETTINGS[name]]}; it is {value!r}")
    if isinstance(value, bool):
        return f"--{name}" if value else ""
    if isinstance(value, str) and not value.isprintable():
        raise Refusal(f"{file}: {name} has a character that cannot be seen; write it without")
    if name in ("tls-ca", "password-file") and value:
        value = os.path.join(os.path.dirname(file), os.path.expanduser(str(value)))
    option = f"--{name}={value}"
    try:
        if name == "name":
            protocol.check_name(value)
        _parser(exit_on_error=False).parse_args([option])
    except argparse.ArgumentError as error:
        raise Refusal(f"{file}: {name}: {error.message}") from None
    except Refusal as refusal:
        raise Refusal(f"{file}: {name}: {refusal}") from None
    return option


EXAMPLES = """\
examples:
  join a friend's room
      python client.py --host chat.example.org --name alice
  with TLS, sure by the fingerprint that the friend's server logs at its start
      python client.py --host chat.example.org --tls-fingerprint AB:CD:...
  say what a build prints, slashes and all
      make 2>&1 | python client.py --name build --verbatim
  write down what is said, saying nothing
      python client.py --name log --listen < /dev/null >> room.log
  a room on several servers: the next one is tried when one is lost
      python client.py --host a.example.org,b.example.org:1234
"""


def _parser(*, exit_on_error: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Join a chat room. On a terminal, /help lists the commands.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=exit_on_error,
    )
    if not parser.prog.endswith(".py"):  # it is installed
        parser.epilog = EXAMPLES.replace("python client.py", parser.prog)
    option = parser.add_argument
    option("--version", action="version", version=f"%(prog)s {protocol.__version__}")
    option(
        "--settings",
        metavar="FILE",
        help="where options may stand, as name = value, all but --give-up, --listen and --verbatim;"
        " those given here win; an empty name for none; a pipe takes no name and no timestamps"
        " from it unless it is named here"
        f" (default: {settings_file().replace('%', '%%')})",
    )
    _add_where(parser.add_argument_group("where"))
    _add_who(parser.add_argument_group("who"))
    _add_safety(parser.add_argument_group("safety"))
    _add_display(parser.add_argument_group("display"))
    _add_pipes(parser.add_argument_group("pipes"))
    return parser


def _add_where(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        default=protocol.HOST,
        type=_hosts,
        help="the server's, or HOST:PORT, or several of a room, A,B:PORT (default: %(default)s)",
    )
    group.add_argument(
        "--port",
        type=protocol.port,
        default=protocol.PORT,
        help="of each host that has none of its own (default: %(default)s)",
    )
    group.add_argument(
        "--format",
        choices=protocol.FORMATS,
        default=protocol.FORMAT,
        help="what the server is run with too (default: %(default)s)",
    )
    group.add_argument(
        "--give-up",
        type=_seconds,
        default=math.inf,
        metavar="SECONDS",
        help="leave when a lost server is not back by then (default: go on trying)",
    )


def _add_who(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--name",
        default="",
        help="yours in the room; without it you are asked, in a pipe the first line is it",
    )
    group.add_argument(
        "--password-file",
        type=protocol.file,
        metavar="FILE",
        help="the room's, in the first line; or the variable CHAT_PASSWORD",
    )


def _add_safety(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        help="speak TLS, for which the system's authorities vouch, or none at all",
    )
    group.add_argument(
        "--tls-ca",
        type=protocol.file,
        metavar="FILE",
        help="speak TLS; the authorities in FILE vouch",
    )
    group.add_argument(
        "--tls-fingerprint",
        type=_fingerprint,
        metavar="SHA256",
        help="speak TLS with the certificate that the server logs at its start",
    )


def _add_display(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timestamps",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="show when each line came, in a pipe too",
    )
    group.add_argument(
        "--recall",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="on a terminal, keep what is typed for the next time, but no passwords",
    )
    for name, help_text in (
        ("color", "on a terminal, no colors; as the variable NO_COLOR does"),
        ("bell", "on a terminal, do not ring for your name and private lines"),
        ("status", "no line below the prompt, which only prompt_toolkit has"),
    ):
        group.add_argument(f"--no-{name}", action="store_true", help=help_text)
        # Against the settings.
        group.add_argument(
            f"--{name}", dest=f"no_{name}", action="store_false", help=argparse.SUPPRESS
        )


def _add_pipes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--listen", action="store_true", help="stay after the end of input")
    group.add_argument("--verbatim", action="store_true", help="no line is a command")


if __name__ == "__main__":
    sys.exit(main())
