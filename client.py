"""The chat client: shows what the room says and sends what is typed.

    python client.py --host 127.0.0.1 --port 55555
    make 2>&1 | python client.py --name build

or, from Python, a bot::

    with ChatClient("clock") as chat:
        for line in chat:
            if line.text == "!time":
                chat.send(time.ctime())

Two threads: `ChatClient.receive` alone touches the connection, and `write` reads
what the user types and leaves it in `Outgoing` for `receive` to send.  Each line
stays there until the room has broadcast it, so a connection that breaks loses
nothing and says nothing twice.

Four things live for as long as their names say, and nothing in them is ever set
back: the lines that are `Outgoing`, our `Place` in the room, an `Absence` from it
and a `Session`, which is one connection.  `ChatClient` has one of each.
"""

from __future__ import annotations

import _thread
import abc
import argparse
import contextlib
import enum
import io
import os
import random
import re
import selectors
import signal
import socket
import ssl
import sys
import threading
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

try:
    import termios
except ImportError:  # Windows has its own kind of terminal
    termios = None  # type: ignore[assignment]

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
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.layout.processors import Processor

CONNECT_TIMEOUT = 10.0  # seconds for the connection, and again for being let in
RETRY_FIRST = 0.5  # seconds before the first try to come back
RETRY_MAX = 30.0  # seconds between tries at the most
LEAVE_TIMEOUT = 3.0  # seconds for the server to say goodbye
MAX_WAITING = 10_000  # lines not yet broadcast; with more, `send` waits
MAX_TEXT = protocol.MAX_LINE - protocol.MAX_NAME - 2  # bytes, so that any name fits before it
SEND_AHEAD = 16 * 1024  # bytes given to the socket at once
# By which `receive` tells the main thread that it is over; SIGTERM may be ignored.
ENDED = getattr(signal, "SIGUSR2", signal.SIGTERM)


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


def discreet(text: str) -> str:
    """Return what was typed without the password that may be in it."""
    verb, argument = protocol.command(text) or ("", "")
    return "/op ..." if verb == "op" and argument else text


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

    def take_new_name(self) -> str:
        """Return the name in a ``/nick`` that waits, which is done with then, or nothing."""
        with self._changed:
            for item in self._waiting:
                if item.verb == "nick":
                    self._waiting.remove(item)
                    return item.text.partition(" ")[2].strip()
        return ""

    def confirm(self, line: Line) -> None:
        """Take a line of the room as the receipt of a text, if it is one."""
        with self._changed:
            for item in self._sent:
                if (item.echo, item.name) == ((line.kind, line.text), line.name):
                    self._sent.remove(item)
                    self._changed.notify_all()
                    return

    def answer(self, text: str) -> Typed | None:
        """Return the line that an answer is to, which is done with, or None."""
        with self._changed:
            if not self._sent:
                return None
            oldest = self._sent[0]
            if not protocol.may_answer(text, "" if oldest.echo else oldest.verb):
                return None
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
            self._changed.notify_all()
        return doubtful

    def unsent(self) -> list[str]:
        """Return what waits as it was typed."""
        with self._changed:
            return [item.text for item in self._waiting]

    def _count(self) -> int:
        return len(self._waiting) + len(self._sent)


# --- Who and where we are ----------------------------------------------------


class Place:
    """Our place in the room; its connections come and go.

    Only the thread that runs `ChatClient.receive` changes it; others read.
    """

    def __init__(self, name: str) -> None:
        self.name = protocol.check_name(name)
        self.key = os.urandom(16).hex()  # takes our place back from a connection that is lost
        self.position: int | None = None  # of the next line of the room
        self.present: list[str] = []  # the names here, who spoke last first

    def introduction(self) -> str:
        """Return the answer to ``NICK``."""
        return str(Introduction(self.name, self.position, key=self.key))

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

    def see(self, names: list[str]) -> None:
        """Take these as the names here, in the order that we know."""
        known = [name for name in self.present if name in names]
        self.present = known + [name for name in names if name not in known]

    def _move(self, name: str, to: str) -> None:
        self.present = [to] * bool(to) + [other for other in self.present if other != name]


class Absence:
    """The time from the loss of a connection until we are settled again, by however many tries.

    Touched only by the thread that runs `ChatClient.receive`; `next_try` is read by others.
    """

    def __init__(self, since: float) -> None:
        self.since = since  # when we last heard the server, in `time.monotonic` seconds
        self.next_try = since
        self.lines: list[Line] = []  # what we missed, until it is complete
        self.skipped = 0  # lines of the room that are not among it, as the server said
        self.unbroken = True  # as far as we know, nothing else is lacking
        self.told = ""  # the last reason why we are not let in

    def __str__(self) -> str:
        missed = sum(line.in_room for line in self.lines) + self.skipped
        lines = f"{missed} line{'' if missed == 1 else 's'} missed"
        return f"back after {time.monotonic() - self.since:.0f} s, {lines}"


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
        self._due = count

    @property
    def is_complete(self) -> bool:
        """Whether all names have come, or the last line that tells how many others there are."""
        return self._due <= 0

    def take(self, text: str) -> None:
        """Take the names in one line of the answer."""
        names, is_last = protocol.listed(text)
        self.names += names
        self._due = 0 if is_last else self._due - len(names)


class Session:
    """One connection to the server, from being dialled to being closed.

    Only the thread that made it touches it, but for `shutdown`; others read `state`.
    """

    def __init__(self, connection: Connection, waker: Waker, fmt: str) -> None:
        self.state = State.AT_THE_DOOR
        self.introduced = False  # our name is given
        self.password_given = False
        self.reason = ""  # what the server last had to say at the door
        self.roll_call: RollCall | None = None  # as soon as its first line has come
        self.heard = time.monotonic()  # when bytes last came
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

    def exchange(self, deadline: float | None = None) -> list[Line]:
        """Send, wait for something to happen and return the lines that came.

        Raise `OSError` when the connection has ended, or the deadline has passed.
        """
        self._unsent = self._unsent[self._connection.send(self._unsent) :]
        writing = selectors.EVENT_WRITE if self._unsent else 0
        self._selector.modify(self._connection, selectors.EVENT_READ | writing)
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._selector.select(timeout) or timeout == 0.0:
            raise TimeoutError("no answer came")
        data = self._connection.receive_now()
        if data == b"":
            raise ConnectionError("the server closed the connection")
        if data:
            self.heard = time.monotonic()
        return [self._line(line) for line in self._framer.feed(data or b"")]

    def _line(self, line: bytes) -> Line:
        return protocol.parse(protocol.escape(line[: protocol.MAX_SERVER_LINE], self._fmt))

    def shutdown(self) -> None:
        """Break the connection off, from any thread."""
        self._connection.shutdown()

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        self._connection.close()


class Entrance(NamedTuple):
    """Where the room is entered, and what has to be shown there and by whom."""

    host: str
    port: int
    password: str | None
    tls: ssl.SSLContext | None
    fingerprint: str  # the certificate's, when no authority vouches for it

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def dial(self) -> Connection:
        """Connect to the server and, where it is wanted, make sure that it is the right one."""
        deadline = time.monotonic() + CONNECT_TIMEOUT
        sock = socket.create_connection((self.host, self.port), CONNECT_TIMEOUT)
        if self.tls is None:
            return Connection(sock)
        connection = TlsConnection(sock, self.tls, self.host)
        try:
            connection.shake_hands(deadline)
            seen = protocol.fingerprint(connection.certificate())
            if self.fingerprint and seen != self.fingerprint:
                raise Refused(f"the certificate's fingerprint is {seen}; it is not the one given")
        except BaseException:
            connection.close()
            raise
        return connection


# --- The conversation --------------------------------------------------------


class Inbox:
    """The lines for a program that iterates; any thread may call."""

    def __init__(self) -> None:
        # Guards all below; notified whenever any of it changes.
        self._changed = threading.Condition()
        self._lines: deque[Line] = deque()
        self._is_read = False  # somebody iterates
        self._ended = False  # no more lines come, and nobody waits

    def put(self, item: Line | Notice) -> None:
        """Keep a line: wait for a slow reader, forget the oldest if there is none."""
        if isinstance(item, Notice):
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or len(self._lines) < MAX_WAITING or not self._is_read
            )
            if len(self._lines) >= MAX_WAITING:
                self._lines.popleft()
            self._lines.append(item)
            self._changed.notify_all()

    def end(self) -> None:
        """Let the reader end when it has read all."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Line]:
        self._set_read(True)
        try:
            while (line := self._take()) is not None:
                yield line
        finally:
            self._set_read(False)

    def _take(self) -> Line | None:
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

    Iterating gives each `Line` that comes.  `show`, when given, is called with
    each `Line` and `Notice` instead, in the thread of `receive`.
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
        show: Callable[[Line | Notice], None] | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.entrance = Entrance(host, port, password, tls, fingerprint)
        self.fmt = fmt
        self.place = Place(name)
        self.outgoing = Outgoing()
        self._inbox = Inbox()
        self._show_to = show or self._inbox.put
        self._ended = ended
        self._leaving = threading.Event()  # we want to go, or cannot stay
        self._waker = Waker()  # of `receive`, when something waits to be sent
        self._receiver = threading.Thread(target=self.receive, name="receive", daemon=True)
        # From here on, what only the thread that runs `receive` changes; others read.
        self.live = False  # what comes is said now, and not from before our time
        self.failed = 0  # lines that were not broadcast, as far as we know
        self.reason = ""  # why the conversation ended, when nobody here wanted it to
        self._session: Session | None = None
        self._absence: Absence | None = None

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

    def __iter__(self) -> Iterator[Line]:
        return iter(self._inbox)

    def connect(self) -> None:
        """Connect and be let in.

        Raise `OSError` when nobody answers, `NameRefused` or `PasswordRefused` when
        another one would do and `Refused` when nothing would.
        """
        self._session = Session(self.entrance.dial(), self._waker, self.fmt)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        try:
            while self.away:
                self._exchange(deadline)
        except BaseException:
            self._disconnect()
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
                        self._exchange()
                except OSError:
                    self._disconnect()
                if not self._leaving.is_set():
                    self._come_back()
        except (Refused, OutputClosed) as error:
            self.reason = str(error)
        finally:
            self._disconnect()
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
            protocol.check_name(item.text.partition(" ")[2].strip())
        self.outgoing.add(item)
        self._waker.wake()

    def flush(self) -> None:
        """Wait until every line has its receipt, or the conversation has ended."""
        self.outgoing.wait_for_receipts()

    def leave(self) -> list[str]:
        """Say goodbye and end the conversation; return what was typed and never sent."""
        if not self._leaving.is_set():
            self.outgoing.end()
            self.outgoing.add(typed("/quit"))
            self._leaving.set()
            self._waker.wake()
        self._receiver.join(LEAVE_TIMEOUT)
        if self._receiver.is_alive():
            if session := self._session:
                session.shutdown()
            self._receiver.join(LEAVE_TIMEOUT)
        self.close()
        self._give_up_receipts()
        return [text for text in self.outgoing.unsent() if typed(text).verb != "quit"]

    @property
    def name(self) -> str:
        """Our name in the room."""
        return self.place.name

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
        absence = self._absence
        if absence is None or not self.away:
            return "connected"
        return f"next try in {max(0.0, absence.next_try - time.monotonic()):.0f} s"

    def wait(self) -> None:
        """Wait until the conversation has ended."""
        self._receiver.join()

    def close(self) -> None:
        """Give back what is held for connections; `leave` does it too."""
        self._waker.close()

    # What follows runs in the thread of `receive`, but for the first connect.

    def _exchange(self, deadline: float | None = None) -> None:
        """Wait for lines or for something to send, and deal with it."""
        session = self._session
        assert session is not None
        self._waker.clear()
        while session.state is State.SETTLED and session.takes_more:
            item = self.outgoing.take(self.name)
            if item is None:
                break
            session.say(self._encode(item.text))
        for line in session.exchange(deadline):
            if session.state is State.AT_THE_DOOR:
                self._hear_at_door(line, session)
            else:
                self._hear(line, session)

    def _encode(self, text: str) -> bytes:
        # With room for the longest name: it may have changed when the line goes out.
        protocol.encode(text, self.fmt, MAX_TEXT)
        return protocol.encode(protocol.said(self.name, text), self.fmt)

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.close()
        if self._absence is None and session.state is not State.AT_THE_DOOR:
            self._absence = Absence(session.heard)

    def _come_back(self) -> None:
        """Try until we are in the room again, or leave."""
        self._show(Notice("connection lost; trying again"))
        absence = self._absence
        assert absence is not None  # since we were in the room
        delay = RETRY_FIRST
        while True:
            pause = delay * random.uniform(0.5, 1.0)
            absence.next_try = time.monotonic() + pause
            if self._leaving.wait(pause):
                return
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
            except OSError:
                pass  # as long as it takes
            delay = min(RETRY_MAX, delay * 2)

    def _tell_once(self, absence: Absence, reason: str) -> None:
        if reason != absence.told:
            absence.told = reason
            self._show(Notice(reason))

    # What is heard.

    def _hear_at_door(self, line: Line, session: Session) -> None:
        """Answer the server's questions until it says welcome."""
        if line.kind is Kind.NICK:
            if session.introduced:
                raise NameRefused(session.reason)
            session.introduced = True
            session.say(protocol.encode(self.place.introduction()))
        elif line.kind is Kind.PASS:
            self._give_password(session)
        elif line.kind is not Kind.ANSWER:
            raise Refused("what answers there is not this chat; check --host and --port")
        elif protocol.is_welcome(str(line)):
            session.state = State.CATCHING_UP
            # Its answer comes behind the replay: only then do we know what was heard.
            session.say(protocol.encode("/names"))
            if self._absence is None:
                self._show(line)
        else:
            _raise_if_final(line)
            session.reason = line.text

    def _give_password(self, session: Session) -> None:
        if self.entrance.password is None:
            raise PasswordRefused("the room has a password; see --password-file")
        if session.password_given:
            raise PasswordRefused(session.reason)
        session.password_given = True
        session.say(protocol.password_bytes(self.entrance.password) + b"\n")

    def _hear(self, line: Line, session: Session) -> None:
        """Take in a line that comes when we are in the room."""
        if line.in_room:
            self.place.follow(line)
            if line.name:
                self.outgoing.confirm(line)
            self._bring(line)
        elif line.kind is not Kind.ANSWER:
            self._bring(line)
        elif not self._hear_news(str(line), session):
            self._bring(line)
            self._hear_own_answer(str(line))
            _raise_if_final(line)

    def _hear_news(self, text: str, session: Session) -> bool:
        """Take in what the server tells our program and not us; say whether it was that."""
        roll_call = session.roll_call
        if session.state is State.CATCHING_UP and (at := protocol.position_in(text)) is not None:
            self._go_to(at)
        elif roll_call and not roll_call.is_complete:
            self._call_roll(roll_call, text.removeprefix("-> "))
        elif session.state is State.CATCHING_UP and (found := protocol.names_in(text)):
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

    def _call_roll(self, roll_call: RollCall, text: str) -> None:
        roll_call.take(text)
        if roll_call.is_complete:
            self.place.see(roll_call.names)

    def _hear_own_answer(self, text: str) -> None:
        """Take an answer as the receipt of the oldest line, or as its refusal."""
        if (missed := protocol.missed_in(text)) is not None:
            self._skip(missed)
            return
        if (name := protocol.name_in(text)) is not None:
            self.place.name = name
        item = self.outgoing.answer(text)
        if item is None:
            return
        if item.verb == "quit":
            self._leaving.set()
        elif protocol.is_refusal(text):
            self.failed += 1
            if item.echo is not None:
                self._show(Notice("the last line was not sent", item.text))

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
        self.live = True
        absence, self._absence = self._absence, None
        if absence is None:
            return
        self._show(Notice(str(absence)))
        for line in absence.lines:
            self._show(line)
        for item in self.outgoing.resume(unbroken=absence.unbroken):
            self._show(Notice(f"no answer came to: {discreet(item.text)}"))
        self._give_up_receipts()

    def _give_up_receipts(self) -> None:
        """Say which lines may or may not have been seen: their receipts are not to be had."""
        for item in self.outgoing.give_up():
            self.failed += 1
            self._show(Notice(f"cannot know whether this was seen, not sent again: {item.text}"))

    # What is shown.

    def _bring(self, line: Line) -> None:
        """Show a line, or keep it until we know all that we missed."""
        if self._absence is None:
            self._show(line)
        else:
            self._absence.lines.append(line)

    def _show(self, item: Line | Notice) -> None:
        try:
            self._show_to(item)
        except OSError as error:  # of the screen, not of the connection
            raise OutputClosed from error


def _raise_if_final(line: Line) -> None:
    """Raise `Refused` when an answer means that the server does not want us here now."""
    if protocol.is_put_out(str(line)):
        raise PutOut(line.text)
    if protocol.is_final(str(line)):
        raise Refused(line.text)


# --- How it looks ------------------------------------------------------------

# Of the 256 colours, twelve far apart whose contrast is at least 3.5 to 1 on
# black and on white; where there are only 16, the six that have a hue.
PALETTE = (26, 29, 64, 94, 97, 125, 130, 133, 161, 166, 66, 100)
BASIC_PALETTE = (31, 32, 33, 34, 35, 36)


class Look:
    """Turns what happens into the text that stands on the screen."""

    def __init__(self, *, color: bool = False, timestamps: bool = False, bell: bool = False):
        self.color = color
        self.timestamps = timestamps
        self.bell = bell
        many = "256color" in os.environ.get("TERM", "") or "COLORTERM" in os.environ
        self._codes = (
            [f"38;5;{number}" for number in PALETTE] if many else [str(c) for c in BASIC_PALETTE]
        )

    def render(self, item: Line | Notice, me: str, *, live: bool = True) -> str:
        """Return an item as it is shown to the one called `me`; `live` is not a replay."""
        if isinstance(item, Notice):
            text, mine = self._paint("2", str(item)), False
        else:
            text, mine = self._line(item, me)
        stamp = self._paint("2", time.strftime("%H:%M ")) if self.timestamps else ""
        return stamp + text + ("\a" if mine and live and self.bell else "")

    def _line(self, line: Line, me: str) -> tuple[str, bool]:
        """Return a line as it is shown, and whether it is meant for `me` above all."""
        if line.kind is Kind.PRIVATE:
            return self._paint("1;35", str(line)), True
        if line.kind is Kind.NOTICE:
            return self._paint("2", str(line)), False
        if line.kind not in (Kind.SAID, Kind.DID):
            return str(line), False
        if protocol.fold(line.name) == protocol.fold(me):
            return str(line).replace(line.name, self._paint("1", line.name), 1), False
        text, count = re.subn(
            rf"(?<![\w-]){re.escape(me)}(?![\w-])",
            lambda found: self._paint("1;7", found[0]),
            line.text,
            flags=re.IGNORECASE,
        )
        shown = Line(line.kind, self._paint(self._of_name(line.name), line.name), text)
        return str(shown), count > 0

    def _of_name(self, name: str) -> str:
        return self._codes[zlib.crc32(protocol.fold(name).encode()) % len(self._codes)]

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text


# --- Where it is typed and shown ---------------------------------------------


class Leave(KeyboardInterrupt):
    """A signal, or the end of the conversation, tells the main thread to leave."""


class Screen(abc.ABC):
    """Where the user types and reads: a pipe or one of two kinds of terminal.

    `read` and `ask` belong to the main thread, `show` is called from any.
    """

    interactive = True

    def __init__(self, look: Look) -> None:
        self.look = look
        self.chat: ChatClient | None = None  # as soon as there is one
        self.leaving = threading.Event()  # a signal, or the end of the conversation, said so
        on_terminal = termios is not None and sys.stdin.isatty()
        self._settings = termios.tcgetattr(sys.stdin) if on_terminal else None
        self._given_back = ""

    @abc.abstractmethod
    def read(self) -> str:
        """Return what is typed next; raise `EOFError` at the end, `KeyboardInterrupt` to leave."""

    @abc.abstractmethod
    def show(self, item: Line | Notice) -> None:
        """Show an item without disturbing what is half typed."""

    @abc.abstractmethod
    def ask(self, question: str, *, secret: bool = False) -> str:
        """Return the answer to a question, not shown while it is typed if it is secret."""

    def give_back(self, line: str) -> None:
        """Let the next `read` begin with what was refused."""
        self._given_back = "\n".join(filter(None, (self._given_back, line)))

    def leave(self) -> None:
        """Make `read` raise `Leave`; called by a signal's handler, in the main thread."""
        raise Leave

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._settings is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._settings)

    def _render(self, item: Line | Notice) -> str:
        if isinstance(item, Notice) and item.unsent:
            self.give_back(item.unsent)
        chat = self.chat
        return self.look.render(item, chat.name if chat else "", live=not chat or chat.live)

    def _prompt(self) -> str:
        return f"{self.chat.name}> " if self.chat else "> "


class Pipe(Screen):
    """Lines from standard input, lines to standard output, the client's own words to stderr."""

    interactive = False

    def __init__(self, look: Look, fmt: str) -> None:
        super().__init__(look)
        self._fmt = fmt
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
            raise Refusal(f"line {self._count} was not sent: {refusal}") from None
        # What a program prints may begin with a slash and be no command of ours.
        request = protocol.command(text)
        known = request is None or request[0] in protocol.COMMANDS
        return text if known else protocol.slash(text)

    def show(self, item: Line | Notice) -> None:
        """Print a line at once."""
        if isinstance(item, Notice):
            print(f"client.py: {item.text}", file=sys.stderr, flush=True)
            return
        try:
            print(self._render(item), flush=True)
        except OSError as error:
            # What is still in the buffer must not be tried again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise OutputClosed from error

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Take the first line as the answer; a password is not among the lines."""
        if secret:
            raise PasswordRefused("the room has a password; see --password-file")
        return self.read()


class ReadlineTerminal(Screen):
    """A terminal with the standard library alone: `input`, with GNU readline where there is one.

    What comes while readline waits for a key is printed above the half-typed
    line by the main thread, in a signal handler: readline's own functions take
    the line off the screen and put it back, cursor and all.  Without them (libedit,
    Windows) it is printed by the thread that brings it, and the line written again.
    """

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        self._readline = _import_readline()
        self._library = _readline_library(self._readline)
        self._waiting: deque[str] = deque()  # rendered, not yet on the screen
        self._shown = threading.Event()  # set when they are
        self._reading = False  # from before `input` to after its line is off the screen
        self._prompted = False  # readline has drawn the prompt
        self._showing = False
        self._cleared = False  # Ctrl-C cleared a half-typed line, and did not mean to leave
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._hear_signals()

    def read(self) -> str:
        """Return the line that is typed next, and take it off the screen."""
        while True:
            self._reading = True
            try:
                self._begin()
                text = input(self._prompt())
                self._erase(self._prompt() + text)
                if discreet(text) != text and self._readline:
                    last = self._readline.get_current_history_length() - 1
                    self._readline.remove_history_item(last)
                return text
            except Leave:
                self._write("\n")
                raise
            except KeyboardInterrupt:
                if not self._cleared:
                    raise
            except EOFError:
                # GNU readline has gone to the next row; others stay behind the prompt.
                self._write("\x1b[A\r\x1b[J" if self._library else "\r\x1b[K")
                raise
            finally:
                self._reading = self._prompted = self._cleared = False
                self._hear_signals()
                self._show_waiting()

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Ask on a line of its own, and keep the answer out of the recall."""
        if secret:
            import getpass

            try:
                return getpass.getpass(question)
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                raise
        answer = input(question)
        if self._readline and self._readline.get_current_history_length():
            self._readline.remove_history_item(self._readline.get_current_history_length() - 1)
        return answer

    def show(self, item: Line | Notice) -> None:
        """Print an item above the half-typed line."""
        self._waiting.append(self._render(item))
        if not self._library:
            self._show_plainly()
        elif threading.current_thread() is threading.main_thread():
            self._show_waiting()
        while self._waiting:
            self._shown.clear()
            # Again and again: a signal that comes just before readline waits is lost on it.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            self._shown.wait(0.05)

    def close(self) -> None:
        """Take no more signals, and leave the terminal as it was."""
        if self._library:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        super().close()

    def leave(self) -> None:
        """Make `read` raise `Leave`."""
        self._ignore_signals()
        raise Leave

    def _hear_signals(self) -> None:
        if self._library:
            signal.signal(signal.SIGUSR1, lambda number, frame: self._show_waiting())

    def _ignore_signals(self) -> None:
        # When a handler has raised, `input` runs those of other signals with the
        # exception still set, and whatever they do fails.
        if self._library and self._reading:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _begin(self) -> None:
        """Have Tab complete, and put a line that was refused back into the prompt."""
        if self._readline is None:
            return
        line, self._given_back = self._given_back, ""
        self._readline.set_startup_hook(lambda: self._readline.insert_text(line))
        self._readline.set_pre_input_hook(self._on_prompt)
        self._readline.set_completer(self._complete)
        self._readline.set_completer_delims(" ")
        libedit = "libedit" in (self._readline.__doc__ or "")
        self._readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: menu-complete")
        self._readline.parse_and_bind("set enable-bracketed-paste on")

    def _on_prompt(self) -> None:
        self._prompted = True

    def _is_active(self) -> bool:
        """Tell whether readline waits for a key, with prompt and line on the screen."""
        return self._prompted and self._library is not None and self._library.is_reading()

    def _complete(self, word: str, state: int) -> str | None:
        assert self._readline is not None
        before = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        found = completions(before, self.chat)
        return found[state] if state < len(found) else None

    def _show_waiting(self) -> None:
        """Print what waits; in the main thread, where readline runs too."""
        library = self._library if self._is_active() else None
        if self._showing or (self._reading and not library):
            return  # it is being done, or readline is just beginning or ending
        self._showing = True
        try:
            if library:
                library.hide()
                self._write("\r")
            while self._waiting:
                self._write(self._waiting[0] + "\n")
                self._waiting.popleft()
            if library:
                library.unhide()
        finally:  # Ctrl-C can come in between
            self._showing = False
            self._shown.set()

    def _show_plainly(self) -> None:
        line = self._prompt() + (self._readline.get_line_buffer() if self._readline else "")
        while self._waiting:
            text = self._waiting.popleft() + "\n"
            self._write(f"\r\x1b[K{text}{line}" if self._reading else text)

    def _erase(self, typed: str) -> None:
        """Take a line off the screen that was just entered, over all its rows."""
        columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
        rows = sum(max(1, -(-_width(part) // columns)) for part in typed.split("\n"))
        self._write(f"\x1b[{rows}A\r\x1b[J")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self._cleared = False
        if self._reading and self._library and self._is_active():
            self._cleared = bool(self._readline.get_line_buffer())
            self._library.hide()
            self._write("\r")
        self._ignore_signals()
        raise KeyboardInterrupt

    def _write(self, text: str) -> None:
        """Write past Python's buffer, which a signal handler must not enter twice."""
        data = text.encode(sys.stdout.encoding, "backslashreplace")
        while data:
            data = data[os.write(sys.stdout.fileno(), data) :]


class _Readline:
    """The functions of GNU readline that Python's module does not offer."""

    TERMPREPPED = 0x4  # in rl_readline_state: the terminal is set up for reading a line

    def __init__(self, path: str) -> None:
        import ctypes  # here, as what only a terminal needs, so that a pipe starts fast

        self._library = library = ctypes.PyDLL(path)
        self._state = ctypes.c_ulong.in_dll(library, "rl_readline_state")
        ctypes.c_int.in_dll(library, "rl_sort_completion_matches").value = 0
        self._clear = library.rl_clear_visible_line
        self._flush = ctypes.PyDLL(None).fflush

    def is_reading(self) -> bool:
        """Tell whether readline holds the terminal."""
        return bool(self._state.value & self.TERMPREPPED)

    def hide(self) -> None:
        """Take the prompt and the half-typed line off the screen, over all their rows."""
        self._clear()
        self._flush(None)

    def unhide(self) -> None:
        """Put them back below what was printed."""
        self._library.rl_on_new_line()
        self._library.rl_redisplay()


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


def _width(text: str) -> int:
    """Return how many columns a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def completions(before: str, chat: ChatClient | None) -> list[str]:
    """Return what the last word before the cursor may become."""
    if before.startswith("/") and " " not in before:
        return [f"/{verb} " for verb in protocol.COMMANDS if f"/{verb}".startswith(before)]
    start, _, word = before.rpartition(" ")
    names = [name for name in (chat.present if chat else []) if chat and name != chat.name]
    suffix = " " if start else ": "
    return [name + suffix for name in names if protocol.fold(name).startswith(protocol.fold(word))]


class ToolkitTerminal(Screen):
    """A terminal with prompt_toolkit, which does the editing and redraws around what comes."""

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        from prompt_toolkit import PromptSession
        from prompt_toolkit.patch_stdout import StdoutProxy

        self._session: PromptSession[str] = PromptSession(
            history=_toolkit_history(),
            input_processors=[_toolkit_mask()],
            completer=_toolkit_completer(self),
            key_bindings=_toolkit_keys(self),
            bottom_toolbar=self._status,
            complete_while_typing=False,
            erase_when_done=True,
            refresh_interval=1.0,
        )
        self._output = StdoutProxy(raw=True, sleep_between_writes=0.02)
        # Printing above the prompt takes no time; in cooked mode the keys that are
        # typed in that time would be echoed into what is printed.
        self._cooked_mode = self._session.app.input.cooked_mode
        self._session.app.input.cooked_mode = contextlib.nullcontext  # type: ignore[method-assign]

    def read(self) -> str:
        """Return the text that is typed next; a paste may have several lines."""
        line, self._given_back = self._given_back, ""
        return self._session.prompt(self._prompt, default=line)

    def ask(self, question: str, *, secret: bool = False) -> str:
        """Ask on a line of its own."""
        from prompt_toolkit import prompt

        return prompt(question, is_password=secret)

    def show(self, item: Line | Notice) -> None:
        """Print an item above the half-typed line."""
        self._output.write(self._render(item) + "\n")
        self._output.flush()

    def suspend(self) -> None:
        """Stop as Ctrl-Z does in any program, with the terminal as the shell wants it."""
        with self._cooked_mode():
            os.kill(0, signal.SIGTSTP)

    def leave(self) -> None:
        """Have the prompt end in its own good order, and raise `Leave` then."""
        app = self._session.app
        if app.is_running and app.loop:
            app.loop.call_soon_threadsafe(self._exit)
        else:
            raise Leave

    def _exit(self) -> None:
        app = self._session.app
        if app.future and not app.future.done():
            app.exit(exception=Leave())

    def close(self) -> None:
        """Print what has not been printed yet."""
        self._output.close()
        super().close()

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
    from prompt_toolkit.application import run_in_terminal
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("c-c")
    def clear_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    if hasattr(signal, "SIGTSTP"):

        @bindings.add("c-z")
        def suspend(event: KeyPressEvent) -> None:
            run_in_terminal(screen.suspend)

    return bindings


# --- The command line --------------------------------------------------------


def write(chat: ChatClient, screen: Screen) -> int:
    """Send what is typed until there is no more; return how many lines were refused."""
    refused = 0
    while True:
        try:
            lines = screen.read().split("\n")
        except EOFError:
            return refused
        except Refusal as refusal:
            refused += 1
            screen.show(Notice(str(refusal)))
            continue
        for line in lines:
            if (protocol.command(line) or ("",))[0] == "quit":
                return refused
            try:
                if screen.interactive and line.strip() == "/op":
                    line = _with_password(screen)
                chat.send(line)
                if screen.interactive and chat.away and line.strip():
                    screen.show(Notice(f"to be sent when we are back: {discreet(line)}"))
            except Refusal as refusal:
                refused += 1
                screen.show(Notice(f"not sent: {refusal}", line if discreet(line) == line else ""))


def _with_password(screen: Screen) -> str:
    """Return ``/op`` with the password, or nothing if Ctrl-C or Ctrl-D takes it back."""
    try:
        return f"/op {screen.ask('Operator password: ', secret=True)}"
    except Leave:
        raise
    except (KeyboardInterrupt, EOFError):
        screen.show(Notice("no password was given"))
        return ""


def main(arguments: list[str] | None = None) -> int:
    """Chat until the user leaves; return the exit status."""
    options = _parser().parse_args(arguments)
    if sys.stdin is None or sys.stdout is None:
        return _fail("standard input and output are closed; leave them open")
    screen = _screen(options)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), lambda number, frame: _leave(screen))
    signal.signal(ENDED, lambda number, frame: _leave(screen))
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
        screen.close()


def _converse(screen: Screen, options: argparse.Namespace) -> int:
    """Join the room, talk, and leave; return the exit status."""
    chat = screen.chat = ChatClient(
        _name(screen, options.name),
        options.host,
        options.port,
        options.format,
        password=protocol.password(options.password_file, "CHAT_PASSWORD"),
        tls=_tls_context(options),
        fingerprint=options.tls_fingerprint or "",
        show=screen.show,
        ended=lambda: _interrupt_main(screen),
    )
    try:
        _join(chat, screen)
    except BaseException:
        chat.close()
        raise
    chat.start()
    refused = 0
    try:
        refused = write(chat, screen)
        if options.listen and not screen.interactive:
            chat.wait()
        elif not screen.interactive:
            chat.flush()
    except KeyboardInterrupt:
        pass  # Ctrl-C, a signal, or the end of the conversation: leave
    try:
        unsent = chat.leave()
    except KeyboardInterrupt:  # once more: without a goodbye
        return 0 if screen.interactive else 1
    for text in unsent:
        screen.show(Notice(f"not sent: {discreet(text)}"))
    if chat.reason:
        raise Refused(chat.reason)
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
    """Get into the room, with another name or password if the first will not do."""
    was_asked = chat.entrance.password is None
    while True:
        try:
            chat.connect()
            return
        except NameRefused as refused:
            if not screen.interactive:
                raise
            screen.show(Notice(str(refused)))
            chat.place.name = _name(screen)
        except PasswordRefused as refused:
            if not was_asked:
                raise
            if chat.entrance.password is not None:
                screen.show(Notice(str(refused)))
            try:
                password = screen.ask("Password of the room: ", secret=True)
                chat.entrance = chat.entrance._replace(password=password)
            except EOFError:
                raise Refused("no password was given") from None


def _screen(options: argparse.Namespace) -> Screen:
    """Return the best screen for where standard input and output lead."""
    look = Look(timestamps=options.timestamps)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Pipe(look, options.format)
    dumb = os.environ.get("TERM", "") in ("", "dumb")
    look.color = not (options.no_color or os.environ.get("NO_COLOR") or dumb)
    look.bell = not options.no_bell
    if not dumb:
        with contextlib.suppress(ImportError):
            return ToolkitTerminal(look)
    return ReadlineTerminal(look)


def _fingerprint(text: str) -> str:
    digits = text.replace(":", "").upper()
    if not re.fullmatch("[0-9A-F]{64}", digits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fingerprint of 64 hex digits")
    return ":".join(re.findall("..", digits))


def _tls_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what the options say of TLS: who vouches for the server."""
    if not (options.tls or options.tls_ca or options.tls_fingerprint):
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


def _leave(screen: Screen) -> None:
    """Have the main thread leave, the first time that a signal says so."""
    if not screen.leaving.is_set():
        screen.leaving.set()
        screen.leave()


def _interrupt_main(screen: Screen) -> None:
    """Make the main thread stop reading, whatever it waits for."""
    while not screen.leaving.is_set():
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, ENDED)
        else:
            _thread.interrupt_main(ENDED)
        screen.leaving.wait(0.05)  # and again: readline can miss a signal


def _fail(text: str) -> int:
    print(f"client.py: {text}", file=sys.stderr)
    return 1


def _explain(error: Exception, options: argparse.Namespace) -> str:
    """Say why there is no connection and what to do about it."""
    where = f"{options.host} port {options.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {where} is not trusted: {error.verify_message};"
            " name its authority with --tls-ca or itself with --tls-fingerprint"
        )
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
    return f"cannot talk to {where}: {error}; check --host and --port"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="client.py",
        description="Join a chat room. On a terminal, /help lists the commands.",
    )
    option = parser.add_argument
    option("--name", default="", help="yours in the room; asked for without it")
    option("--host", default=protocol.HOST, help="the server's (default: %(default)s)")
    option("--port", type=protocol.port, default=protocol.PORT, help="(default: %(default)s)")
    option("--format", choices=protocol.FORMATS, default=protocol.FORMAT, help="the server's too")
    option("--password-file", metavar="FILE", help="the room's; or the variable CHAT_PASSWORD")
    option("--tls", action="store_true", help="speak TLS; the system's authorities vouch")
    option("--tls-ca", metavar="FILE", help="speak TLS; the authorities in FILE vouch")
    option(
        "--tls-fingerprint",
        type=_fingerprint,
        metavar="SHA256",
        help="speak TLS with the certificate that the server logs at its start",
    )
    option("--listen", action="store_true", help="in a pipe, stay after the end of input")
    option("--timestamps", action="store_true", help="show when each line came")
    option("--no-color", action="store_true", help="as the variable NO_COLOR does")
    option("--no-bell", action="store_true", help="for your name and private lines")
    option("--version", action="version", version=f"%(prog)s {protocol.__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
