"""The chat server: one room, a thread per client and one broadcaster.

    python server.py --port 55555

or, from Python::

    with ChatServer(port=0) as server:
        print("listening on port", server.port)

What comes first is built upon by what follows: history, clients, room, commands,
server.  The way of a message from socket to socket, and where to read on:

    ChatServer.receive      accepts a connection and starts its thread, which
    ChatServer.handle       lets the client in and reads its lines;
    ChatServer._hear        looks at them and puts what is said into the queue, by
    Room.broadcast          which wakes the broadcaster's thread;
    Room._round             takes the queue,
    History.append          gives the lines their positions, on disk if wanted, and
    Room._serve_slice       sends each client all that follows its cursor.

Nothing but the broadcaster writes to a client that has joined, so a client that
does not read delays nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import gc
import hashlib
import hmac
import ipaddress
import itertools
import logging
import logging.handlers
import math
import os
import pathlib
import queue
import re
import selectors
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    fcntl = resource = None  # type: ignore[assignment]

import protocol
from protocol import Connection, Framer, Introduction, Kind, Line, Refusal, TlsConnection, Waker

SLICE = 100  # clients served, in a millisecond or so, before a round takes in what came meanwhile
ROUND = 0.010  # seconds between the starts of two rounds in a busy room, at least
REST = 0.25  # of a round's length is rested after it, ROUND at most, so that others can run
RETAINED = 50_000  # lines that a slow reader may be behind: minutes of a busy room
ROWS = 199  # lines inserted by a statement, five values each; older SQLites take 999 in all
PAGE = 500  # lines read from the file at once for who is behind
CHUNK = 1024  # lines given to a client at once: 50 KB as people write, 1.2 MB at the most
MAX_QUEUED = 20_000  # lines waiting for a round; above, clients are not read from
OUTBOX_LINES = 1000  # private lines waiting for one client
OUTBOX_BYTES = 256 * 1024
BURST = 20  # lines that a client may send at once before the rate counts
STAMP = "%Y-%m-%d %H:%MZ"  # how times are shown
TRIES = 3  # at a name or a password
WRONG_DELAY = 1.0  # seconds after a wrong password
MAX_ANSWER = 200  # lines of /history and /search: what an outbox holds at full length
STOP_DELIVER = 2.0  # seconds at shutdown for what was accepted to go out
STOP_CLOSE = 1.0  # seconds after that for the clients to close, and then for the threads
LINGER = 1.0  # seconds for a client to close after our last line
BACKLOG = 1024  # connections that the system may keep waiting for accept()
MAX_RECORDS = 10_000  # of the log, waiting to be written; more are dropped
STACK = 128 * 1024  # bytes for a client's thread, whose calls are few and shallow
SPARE_DESCRIPTORS = 32  # kept free for the listener, the log and the broadcaster

log = logging.getLogger("chat")


# --- History -----------------------------------------------------------------


class HistoryError(Exception):
    """The file cannot be the history; the text says why and what to do."""


class NotStored(Exception):
    """The history's file takes no more; nothing of what was to be appended has a position."""


def _block(lines: list[bytes]) -> bytes:
    """Return lines as they are sent, each with its newline."""
    return b"\n".join([*lines, b""])


class History:
    """The room's lines in order, each at an absolute position.

    Positions only grow.  The last `retained` lines can be read again.  The
    broadcaster appends; any thread reads.  Lines have no newline here; what `read`
    returns is to be sent, and has.
    """

    durable = False  # `append` waits for the disk

    def __init__(self, fmt: str = protocol.FORMAT, retained: int = RETAINED) -> None:
        self.fmt = fmt
        self.retained = retained
        # A history that starts empty starts at the milliseconds of the clock, so
        # that no position is given twice, across restarts too.
        self.first = int(time.time() * 1000)
        self._lines: list[bytes] = []
        self._times: list[float] = []
        # Chunks as they are sent; what stands at a position never changes.
        self._joined = functools.lru_cache(retained // CHUNK + 2)(self._join)
        self._lock = threading.Lock()  # guards all of the above

    @property
    def end(self) -> int:
        """The position of the next line."""
        return self.first + len(self._lines)

    @property
    def oldest(self) -> int:
        """The first position that can be had, if not by `read` then by `fetch`."""
        return self.first

    def append(self, lines: list[bytes], bans: list[Ban] | None = None) -> None:
        """Give lines their positions, and keep a changed list of bans; raise `NotStored`."""
        now = time.time()
        with self._lock:
            self._lines += lines
            self._times += [now] * len(lines)
            excess = max(0, len(self._lines) - self.retained)
            del self._lines[:excess], self._times[:excess]
            self.first += excess

    def read(self, position: int, end: int) -> tuple[bytes, int]:
        """Return lines from `position` on, and the position behind them, at most `end`.

        Clients that stand at the same place get the same bytes object, and those
        that are behind meet again at each multiple of `CHUNK`.
        """
        end = min(end, position - position % CHUNK + CHUNK)
        return self._joined(position, end), end

    def _join(self, position: int, end: int) -> bytes:
        with self._lock:
            lines = self._lines[position - self.first : end - self.first]
        return _block(lines)

    def fetch(self, position: int, end: int) -> list[bytes]:
        """Return lines that are not in memory any more; it may take its time."""
        return []

    def last(self, count: int, word: str = "") -> list[tuple[float, str]]:
        """Return the last `count` lines that have `word` in them, in any case, with their times."""
        with self._lock:
            lines, times = self._lines[:], self._times[:]
        found: list[tuple[float, str]] = []
        word = word.lower()
        for when, line in zip(reversed(times), reversed(lines), strict=True):
            text = line.decode(self.fmt)
            # As in a file: in the name or in what was said, and not across both.
            if word in text.lower() and any(
                word in part.lower() for part in protocol.parts(text)[1:]
            ):
                found.append((when, text))
                if len(found) == count:
                    break
        return found[::-1]

    def bans(self) -> list[Ban]:
        """Return the bans that were kept."""
        return []

    def close(self) -> None:
        """End the history; nothing is appended any more."""
        return


class Ban(NamedTuple):
    """Who may not come in: a name, and the address that it came from if it was here."""

    name: str
    address: str
    by: str
    until: float  # seconds since the epoch; 0 is for good
    reason: str

    def concerns(self, name: str, address: str) -> bool:
        """Tell whether it keeps out who comes with this name from this address, today."""
        here = protocol.fold(self.name) == protocol.fold(name) or address == self.address != ""
        return here and not self.is_over()

    def is_over(self) -> bool:
        """Tell whether its time has passed."""
        return 0 < self.until <= time.time()

    def __str__(self) -> str:
        until = "for good"
        if self.until:
            until = f"until {time.strftime(STAMP, time.gmtime(self.until))}"
        return until + (f": {self.reason}" if self.reason else "")


class FileHistory(History):
    """A history that is in a file before anybody sees it, and goes on there after a restart.

    One connection writes, in the broadcaster's thread alone, one reads for who is
    behind, in the fetcher's, and one for questions; none holds up another.  Raise
    `HistoryError` when the file cannot be used.
    """

    durable = True
    APPLICATION = 0x43686174  # "Chat", in the file's header
    VERSION = 1
    SCHEMA = """
        CREATE TABLE lines (
            position INTEGER PRIMARY KEY,
            time REAL NOT NULL,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            text TEXT NOT NULL
        );
        CREATE TABLE bans (
            name TEXT NOT NULL, address TEXT NOT NULL, by TEXT NOT NULL,
            until REAL NOT NULL, reason TEXT NOT NULL
        );
        CREATE TABLE room (format TEXT NOT NULL);
    """

    def __init__(self, path: str, fmt: str = protocol.FORMAT, retained: int = RETAINED) -> None:
        super().__init__(fmt, retained)
        self.path = path
        self._held = _hold(path)  # until the end, so that no other server uses the file
        try:
            self._open()
        except sqlite3.Error as error:
            os.close(self._held)
            raise HistoryError(f"cannot use {path}: {error}; choose another --history") from None
        except HistoryError:
            os.close(self._held)
            raise

    @property
    def oldest(self) -> int:
        """The first position in the file."""
        return self._oldest

    def append(self, lines: list[bytes], bans: list[Ban] | None = None) -> None:
        """Commit lines to the file, then give them their positions."""
        if not lines and bans is None:
            return
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            self._insert(lines)
            if bans is not None:
                self._writer.execute("DELETE FROM bans")
                self._writer.executemany(
                    "INSERT INTO bans VALUES (?, ?, ?, ?, ?)",
                    [(ban.name, ban.address, ban.by, ban.until, ban.reason) for ban in bans],
                )
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._writer.rollback()
            raise NotStored(str(error)) from error
        super().append(lines)

    def fetch(self, position: int, end: int) -> list[bytes]:
        """Return at most `PAGE` lines from `position` up to `end` from the file."""
        rows = self._pager.execute(
            "SELECT kind, name, text FROM lines WHERE position >= ? AND position < ?"
            " ORDER BY position LIMIT ?",
            (position, end, PAGE),
        ).fetchall()
        return [_line(*row).encode(self.fmt) for row in rows]

    def last(self, count: int, word: str = "") -> list[tuple[float, str]]:
        """Return the last `count` lines that have `word` in them, of all that was ever said."""
        pattern = "%" + re.sub(r"([%_\\])", r"\\\1", word.lower()) + "%"
        said = "text" if word.isascii() else "lower_all(text)"  # LIKE knows ASCII's cases alone
        with self._reading:
            rows = self._reader.execute(
                "SELECT time, kind, name, text FROM lines WHERE :word = '%%'"
                rf" OR {said} LIKE :word ESCAPE '\' OR name LIKE :word ESCAPE '\'"
                " ORDER BY position DESC LIMIT :count",
                {"word": pattern, "count": count},
            ).fetchall()
        return [(when, _line(*row)) for when, *row in reversed(rows)]

    def bans(self) -> list[Ban]:
        """Return the bans that the file has."""
        with self._reading:
            return [Ban(*row) for row in self._reader.execute("SELECT * FROM bans")]

    def close(self) -> None:
        """Close the file and let another server have it."""
        for connection in (self._pager, self._reader, self._writer):
            connection.close()
        os.close(self._held)

    def _open(self) -> None:
        uri = pathlib.Path(self.path).absolute().as_uri()
        is_new = os.fstat(self._held).st_size == 0
        if not is_new:
            # Looked at without a right to write: what is not ours stays as it is.
            with contextlib.closing(sqlite3.connect(f"{uri}?mode=ro", uri=True)) as database:
                is_new = self._is_empty(database)
                if not is_new:
                    self._check(database)
        self._writer = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._writer.execute("PRAGMA journal_mode=WAL")
        self._writer.execute("PRAGMA synchronous=FULL")
        if is_new:
            self._create()
        self._writer.execute("UPDATE room SET format = ?", (self.fmt,))
        self._reader = sqlite3.connect(f"{uri}?mode=ro", uri=True, check_same_thread=False)
        self._reader.create_function("lower_all", 1, str.lower, deterministic=True)
        self._reading = threading.Lock()  # guards the reader: one question at a time
        self._pager = sqlite3.connect(f"{uri}?mode=ro", uri=True, check_same_thread=False)
        first, last = self._reader.execute(
            "SELECT min(position), max(position) FROM lines"
        ).fetchone()
        self.first = self.first if last is None else last + 1
        self._oldest = self.first if first is None else first

    def _is_empty(self, database: sqlite3.Connection) -> bool:
        """Tell whether a server ended here before it had made a history."""
        os.lseek(self._held, 0, os.SEEK_SET)
        if os.read(self._held, 16) != b"SQLite format 3\0":
            return False
        with contextlib.suppress(sqlite3.DatabaseError):
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            return not tables and not database.execute("PRAGMA application_id").fetchone()[0]
        return False

    def _check(self, database: sqlite3.Connection) -> None:
        """Raise `HistoryError` unless a file is whole and this version can go on with it."""
        try:
            application, version = (
                database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            )
            faults = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            faults = str(error)
            application = version = 0
        if faults != "ok":
            raise HistoryError(f"{self.path} is damaged or no history: {faults.splitlines()[0]}")
        if application != self.APPLICATION:
            raise HistoryError(f"{self.path} is the file of another program; choose another")
        if version > self.VERSION:
            raise HistoryError(f"{self.path} was written by a newer version; use that one")
        fmt = database.execute("SELECT format FROM room").fetchone()[0]
        if fmt != self.fmt and self.fmt == protocol.FORMAT:
            raise HistoryError(f"{self.path} is in {fmt}; start with --format {fmt}")

    def _create(self) -> None:
        self._writer.executescript(
            f"BEGIN; PRAGMA application_id={self.APPLICATION};"
            f" PRAGMA user_version={self.VERSION}; {self.SCHEMA}"
            f" INSERT INTO room VALUES ('{self.fmt}'); COMMIT;"
        )

    def _insert(self, lines: list[bytes]) -> None:
        """Insert lines many at a time: each statement releases the interpreter's lock once."""
        now = time.time()
        for first in range(0, len(lines), ROWS):
            some = lines[first : first + ROWS]
            values: list[int | float | str] = []
            for position, line in enumerate(some, self.end + first):
                values += (position, now, *protocol.parts(line.decode(self.fmt)))
            rows = ", ".join(["(?, ?, ?, ?, ?)"] * len(some))
            self._writer.execute(f"INSERT INTO lines VALUES {rows}", values)


def _line(kind: str, name: str, text: str) -> str:
    return str(Line(Kind(kind), name, text))


def _hold(path: str) -> int:
    """Open a file and keep other servers away from it; return the descriptor that does."""
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    except OSError as error:
        raise HistoryError(
            f"cannot write {path}: {error.strerror}; choose another --history"
        ) from None
    if fcntl is not None:  # without it, as on Windows, it is up to who starts the servers
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise HistoryError(f"{path} is in use by another server") from None
    return held


# --- Clients -----------------------------------------------------------------


class Bucket:
    """A client's right to send: `rate` lines a second after a burst; 0 is no limit."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._tokens = float(BURST)
        self._since = time.monotonic()

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` lines may pass now."""
        if not self.rate:
            return wanted
        now = time.monotonic()
        self._tokens = min(BURST, self._tokens + (now - self._since) * self.rate)
        self._since = now
        taken = min(wanted, int(self._tokens))
        self._tokens -= taken
        return taken

    def delay(self) -> float:
        """Return the seconds until a line may pass."""
        return max(0.0, (1 - self._tokens) / self.rate)


class Client:
    """One connection: its thread reads from it, the broadcaster writes to it."""

    def __init__(self, connection: Connection, host: str, port: int) -> None:
        self.connection = connection
        self.host = host
        self.port = port
        self.framer = Framer()
        self.unread: list[bytes] = []  # lines that came, not yet looked at
        self.name = ""
        self.prefix = b""  # of what it says
        self.key = ""
        self.operator = False
        self.wrong_passwords = 0  # given with /op
        # Set when nothing more of its input counts: replaced, failed or shut down.
        self.gone = threading.Event()
        # Guarded by the room's lock: private lines on their way to it.
        self.owed_lines = 0
        self.owed_bytes = 0
        # The broadcaster's own:
        self.position = 0  # the cursor: the next room line that it gets
        self.data = b""  # what it is being sent, behind which is the cursor
        self.sent = 0  # bytes of that which its socket has taken
        self.paying = 0  # private lines in it, owed until all of it is sent
        self.outbox: deque[tuple[int, bytes]] = deque()  # by position
        self.fetching = False  # what it gets next is being read from the file
        self.watched = False  # its socket is full; the selector tells when it is not
        self.until: int | None = None  # it leaves, and gets nothing from here on
        self.forgotten = False  # it has left; the broadcaster never touches it again

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({self.host}:{self.port})"

    def call(self, name: str) -> None:
        """Give it a name."""
        self.name, self.prefix = name, protocol.said(name, "").encode("ascii")

    def end_input(self) -> None:
        """Let its thread find the end of the input, whatever it waits for."""
        self.gone.set()
        self.connection.shutdown()


class Gone(Exception):
    """The client's input has ended by somebody else's doing."""


class Farewell(Exception):
    """The server ends a connection: the reason for the console and a last line for the client."""

    def __init__(self, reason: str, line: str = "") -> None:
        super().__init__(reason)
        self.line = line


class Password:
    """A password that is kept as a hash alone, and compared in a time that tells nothing."""

    def __init__(self, password: str) -> None:
        self._hash = hashlib.sha256(protocol.password_bytes(password)).digest()

    def is_it(self, given: bytes) -> bool:
        """Tell whether this is the password."""
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._hash)


# --- The room ----------------------------------------------------------------


class Said(NamedTuple):
    """Lines of the room, with their author, who is told when they cannot be stored."""

    lines: list[bytes]  # without their newlines
    author: Client | None = None


class Told(NamedTuple):
    """A line for one client alone."""

    client: Client
    line: bytes  # with its newline


class Private(NamedTuple):
    """A line from one client to another, who may have too many waiting already."""

    client: Client
    line: bytes
    sender: Client
    receipt: bytes
    refusal: bytes


class Joined(NamedTuple):
    """A client that begins to listen here."""

    client: Client
    asked: Introduction
    greeting: bytes


class Left(NamedTuple):
    """A client that listens up to here."""

    client: Client


class Fetched(NamedTuple):
    """Lines from the file for a client that is behind; they belong before `end`."""

    client: Client
    lines: list[bytes]
    end: int


Entry = Said | Told | Private | Joined | Left | Fetched


class Room:
    """Who is here and what is said.

    Everything that happens goes through one queue in the order in which it
    happened: lines for all, lines for one, joining and leaving.  The broadcaster
    takes the queue in rounds, so the order of the history is the order that
    everyone sees, and each private line stands where it belongs among the others.
    """

    def __init__(self, history: History, max_clients: int = 1000) -> None:
        self.fmt = history.fmt
        self.max_clients = max_clients
        self.op_password: Password | None = None  # nobody can become an operator
        self.history = history
        self.bans = history.bans()
        self.clients: list[Client] = []  # who listens; only the broadcaster touches it
        self.names: dict[str, Client] = {}  # who has which name, folded
        self.stopping = threading.Event()
        self._queue: list[Entry] = []
        self._queued = 0  # lines ever put into the queue, of all kinds
        self._taken = 0  # those of them that a round has taken out
        self._placed = 0  # those of them that a round has dealt with
        self._bans_changed = False
        # Guards names, bans, the queue and what clients are owed; never held over I/O.
        self._lock = threading.Lock()
        self._round_over = threading.Condition(self._lock)  # notified when a round has ended
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ, None)
        self._due: set[Client] = set()  # whom the next round serves in any case
        # All before this position was offered to every client; while it is under the
        # history's end, a round is due.
        self._heard = history.end
        self._has_forgotten = False  # somebody of `clients` is forgotten
        self._stop_at: float | None = None  # when the broadcaster gives up delivering
        self._ended = False  # no round follows
        self._storing = True  # the last round was
        self._wanted: queue.SimpleQueue[tuple[Client, int, int] | None] = queue.SimpleQueue()
        self._fetcher = threading.Thread(target=self._fetch, name="fetcher", daemon=True)
        self._broadcaster = threading.Thread(target=self._run, name="broadcaster", daemon=True)

    # Verbs for the clients' threads.

    def broadcast(self, entries: Iterable[Entry], author: Client | None = None) -> None:
        """Put what happened into the queue of the next round.

        Wait first while the room or the author has more waiting than is good for
        memory.  Raise `Gone` when the author's words no longer count.
        """
        with self._lock:
            if author is not None:
                while not author.gone.is_set() and not self._has_space(author):
                    self._round_over.wait()
                if author.gone.is_set():
                    raise Gone
            self._enqueue(entries)
        self._waker.wake()

    def settle(self) -> None:
        """Wait until all that is in the queue has its place in the history."""
        with self._lock:
            queued = self._queued
            self._round_over.wait_for(lambda: self._placed >= queued or self._ended)

    def line(self, text: str) -> bytes:
        """Return a line as it is sent, of text that was checked when it came in."""
        return f"{text}\n".encode(self.fmt)

    def said(self, text: str, author: Client | None = None) -> Said:
        """Return a line of the room for the queue."""
        return Said([text.encode(self.fmt)], author)

    def claim(self, client: Client, asked: Introduction) -> None:
        """Give a client its name and let it join; raise `Refusal` or `Farewell`."""
        with self._lock:
            holder = self.names.get(protocol.fold(asked.name))
            if self.stopping.is_set():
                raise Farewell("shutting down", protocol.SHUTTING_DOWN)
            self._check_bans(asked.name, client.host)
            if holder is None:
                if len(self.names) >= self.max_clients:
                    raise Farewell("the room is full", protocol.ROOM_FULL)
                greeting = protocol.welcome(asked.name, *self._listed(protocol.WELCOME_NAMES))
            elif _same_key(holder.key, asked.key):
                holder.gone.set()  # from now on nothing that it sent gets into the queue
                client.operator = holder.operator
                greeting = protocol.welcome_back(asked.name)
            else:
                raise Refusal(protocol.NAME_TAKEN.format(name=asked.name))
            self.names[protocol.fold(asked.name)] = client
            client.call(asked.name)
            client.key = asked.key
            self._enqueue([Joined(client, asked, self.line(greeting))])
            if holder is None:
                self._enqueue([self.said(protocol.joined(client.name))])
            self._round_over.notify_all()  # the holder may wait for its turn
        self._waker.wake()
        if holder is not None:
            holder.connection.shutdown()
        log.info("%s %s", client, "joined" if holder is None else "is back")

    def rename(self, client: Client, name: str) -> None:
        """Give a client another name; raise `Refusal` when somebody has it."""
        with self._lock:
            holder = self.names.get(protocol.fold(name))
            if holder not in (None, client):
                raise Refusal(protocol.NAME_TAKEN.format(name=name))
            if client.gone.is_set():
                raise Gone
            if any(ban.concerns(name, "") for ban in self.bans):
                raise Refusal(f"the name {name} is banned; choose another")
            old = client.name
            del self.names[protocol.fold(old)]
            self.names[protocol.fold(name)] = client
            client.call(name)
            # Here, so that nobody can join under the old name before this is said.
            self._enqueue([Told(client, self.line(protocol.now_named(name)))])
            self._enqueue([self.said(protocol.renamed(old, name), client)])
        self._waker.wake()
        log.info("%s was %s", client, old)

    def leave(self, client: Client, last_line: str = "") -> None:
        """Let a client go, and wait until the broadcaster has let go of it."""
        with self._lock:
            if last_line:
                self._enqueue([Told(client, self.line(last_line))])
            self._enqueue([Left(client)])
            if self.names.get(protocol.fold(client.name)) is client:
                del self.names[protocol.fold(client.name)]
                if not self.stopping.is_set():
                    self._enqueue([self.said(protocol.left(client.name))])
        self._waker.wake()
        with self._lock:
            self._round_over.wait_for(lambda: client.forgotten or self._ended)

    def put_out(self, client: Client, by: Client, reason: str) -> None:
        """End a client's stay, before everyone's eyes."""
        with self._lock:
            if self.names.get(protocol.fold(client.name)) is not client:
                raise Refusal(f"{client.name} has left already")
            del self.names[protocol.fold(client.name)]
            client.gone.set()
            text = protocol.kicked(client.name, by.name, reason)
            self._enqueue([Told(client, self.line(protocol.you_were_kicked(by.name, reason)))])
            self._enqueue([self.said(text)])
            self._round_over.notify_all()
        self._waker.wake()
        # Its thread finds the end of its input; the broadcaster can still tell it why.
        client.connection.shutdown(socket.SHUT_RD)
        log.info("%s was kicked by %s", client, by)

    def set_bans(self, change: Callable[[list[Ban]], list[Ban]]) -> None:
        """Change who is banned; what is over goes too."""
        with self._lock:
            self.bans = [ban for ban in change(self.bans) if not ban.is_over()]
            self._bans_changed = True
        self._waker.wake()

    def present(self) -> list[str]:
        """Return the names of all who are here."""
        with self._lock:
            return self._listed(len(self.names))[0]

    def first_present(self, most: int) -> tuple[list[str], int]:
        """Return at most so many of the names, and how many there are in all."""
        with self._lock:
            return self._listed(most)

    def find(self, name: str) -> Client:
        """Return who has a name; raise `Refusal` when nobody has."""
        with self._lock:
            client = self.names.get(protocol.fold(name))
        if client is None:
            raise Refusal(f"nobody here is called {name}; /names lists who is here")
        return client

    def _listed(self, most: int) -> tuple[list[str], int]:
        some = itertools.islice(self.names.values(), most)
        return [client.name for client in some], len(self.names)

    def _check_bans(self, name: str, host: str) -> None:
        for ban in self.bans:
            if ban.concerns(name, host):
                raise Farewell("banned", protocol.you_are_banned(ban.by, ban.until, ban.reason))

    def _has_space(self, author: Client) -> bool:
        return self._queued - self._placed < MAX_QUEUED and not _outbox_full(author)

    def _enqueue(self, entries: Iterable[Entry]) -> None:
        """Append to the queue, under the lock, and count what each client is owed."""
        for entry in entries:
            if isinstance(entry, Private):
                if _outbox_full(entry.client):
                    entry = Told(entry.sender, entry.refusal)
                else:
                    self._enqueue([Told(entry.sender, entry.receipt)])
            if isinstance(entry, (Told, Private)):
                entry.client.owed_lines += 1
                entry.client.owed_bytes += len(entry.line)
            self._queue.append(entry)
            self._queued += _size(entry)

    # The broadcaster.

    def start(self) -> None:
        """Start the broadcaster and who reads the file for it."""
        self._broadcaster.start()
        self._fetcher.start()

    def stop(self) -> None:
        """Deliver what was accepted, tell everyone, and end the broadcaster."""
        with self._lock:
            self.stopping.set()
            present = list(self.names.values())
            for client in present:
                client.gone.set()
            line = self.line(protocol.SHUTTING_DOWN)
            self._enqueue([Told(client, line) for client in present])
            self._stop_at = time.monotonic() + STOP_DELIVER
            self._round_over.notify_all()
        self._waker.wake()
        self._broadcaster.join()
        self._wanted.put(None)
        self._fetcher.join()

    def _run(self) -> None:
        next_round = 0.0
        while not self._all_delivered():
            try:
                writable = self._wait()
                # Lines that come during the pause share the round's one send per client.
                if (pause := next_round - time.monotonic()) > 0:
                    time.sleep(pause)
                start = time.monotonic()
                next_round = start + ROUND  # should the round fail
                self._round(writable)
                end = time.monotonic()
                rest = min((end - start) * REST, ROUND)
                next_round = max(start + ROUND, end + rest)
            except Exception:
                log.exception("a round failed; the room goes on")
                time.sleep(ROUND)
        with self._lock:
            self._ended = True
            self._round_over.notify_all()

    def _wait(self) -> list[Client]:
        """Wait until something happened; return the clients whose sockets have room again."""
        timeout = None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())
        if self._due or self._heard < self.history.end:
            timeout = 0.0
        return [key.data for key, _ in self._selector.select(timeout) if key.data is not None]

    def _all_delivered(self) -> bool:
        if self._stop_at is None:
            return False
        waiting = (
            self._queue
            or self._due
            or self._heard < self.history.end
            or any(client.watched or client.fetching for client in self.clients)
        )
        return not waiting or time.monotonic() > self._stop_at

    def _round(self, writable: list[Client]) -> None:
        """Give positions to what has come, then let everyone hear it.

        What comes while a large room is being served is taken in on the way, so that
        those who are still to be served hear it too.  Who joins on the way is due.
        """
        self._due.update(writable)
        start = self.history.end
        try:
            self._place_all()
            end = self.history.end
            if self._heard < end:
                for first in range(0, len(self.clients), SLICE):
                    # A commit for each slice would keep everyone waiting for the disk.
                    if self._queue and not self.history.durable:
                        self._place_all()
                    self._serve_slice(self.clients[first : first + SLICE])
                    self._serve_due()
                self._heard = end  # those served first have not had what came on the way
            self._serve_due()
            self._log_said(start)
        finally:
            if self._has_forgotten:
                self.clients = [client for client in self.clients if not client.forgotten]
                self._has_forgotten = False
            with self._lock:
                self._placed = self._taken
                self._round_over.notify_all()

    def _place_all(self) -> None:
        """Store the room's lines that have come, and put all else in its place among them."""
        self._waker.clear()
        with self._lock:
            entries, self._queue = self._queue, []
            bans = self.bans if self._bans_changed else None
            self._bans_changed = False
            self._taken = self._queued
        said = (entry.lines for entry in entries if isinstance(entry, Said))
        position = self.history.end
        stored = self._store(list(itertools.chain.from_iterable(said)), bans)
        for entry in entries:
            if not isinstance(entry, Said):
                self._place(entry, position)
            elif stored:
                position += len(entry.lines)
            elif entry.author is not None:
                self._refuse(entry.author, len(entry.lines), position)

    def _store(self, lines: list[bytes], bans: list[Ban] | None) -> bool:
        """Append to the history; tell whether it could, and log when that changes."""
        try:
            self.history.append(lines, bans)
        except Exception as error:
            if self._storing:
                unforeseen = not isinstance(error, NotStored)
                log.error("cannot store what is said: %s", error, exc_info=unforeseen)
            self._storing = False
            if bans is not None:
                self._bans_changed = True
            return False
        if lines and not self._storing:
            log.info("what is said is stored again")
            self._storing = True
        return True

    def _refuse(self, author: Client, count: int, position: int) -> None:
        """Tell an author that lines could not be stored, and so were not sent."""
        for _ in range(count):
            self._tell(author, position, self.line(protocol.NOT_STORED))
        self._due.add(author)

    def _tell(self, client: Client, position: int, line: bytes) -> None:
        """Put a line of the broadcaster's own into a client's outbox."""
        with self._lock:
            client.owed_lines += 1
            client.owed_bytes += len(line)
        client.outbox.append((position, line))

    def _place(self, entry: Told | Private | Joined | Left | Fetched, position: int) -> None:
        """Do what an entry says at its place among the room's lines."""
        client = entry.client
        if client.forgotten:
            return
        if isinstance(entry, Fetched):
            self._place_fetched(client, entry)
        elif client.until is not None:
            return  # it has left before this was said to it
        elif isinstance(entry, (Told, Private)):
            client.outbox.append((position, entry.line))
        elif isinstance(entry, Joined):
            asked = entry.asked
            start = position - asked.last if asked.position is None else asked.position
            client.position = min(max(start, self.history.oldest), position)
            self._tell(client, client.position, entry.greeting)
            if asked.wants_position:
                self._tell(client, client.position, self.line(protocol.at(client.position)))
            self.clients.append(client)
        else:
            client.until = position
        if not client.watched or client.until is not None:
            self._due.add(client)

    def _serve_slice(self, clients: list[Client]) -> None:
        """Send the room's lines to those of some clients who have everything before them.

        That is nearly everyone, so it is done in as few steps as possible: who stands
        where the one before stood gets the same bytes.  Whoever needs more is left to
        `_serve`.
        """
        room_end = self.history.end
        position, data, end = -1, b"", -1  # where the one before stood, and what it got
        for client in clients:
            if client.data or client.outbox or client.until is not None:
                if not client.watched and not client.forgotten:
                    self._due.add(client)
                continue
            if client.position != position:
                if client.position == room_end:
                    continue
                if client.position < self.history.first:
                    self._due.add(client)
                    continue
                position = client.position
                data, end = self.history.read(position, room_end)
            client.position = end
            try:
                sent = client.connection.send(data)
            except Exception as error:
                self._fail(client, error)
                continue
            if sent < len(data):
                client.data, client.sent = data, sent
            if sent < len(data) or end < room_end:
                self._due.add(client)

    def _serve_due(self) -> None:
        """Serve whoever is to be served in any case."""
        while self._due:
            self._serve(self._due.pop())

    def _serve(self, client: Client) -> None:
        """Give a client all that follows its cursor, as far as its socket takes it."""
        full = False
        try:
            while not full and (client.data or self._take_next(client)):
                unsent = memoryview(client.data)[client.sent :] if client.sent else client.data
                client.sent += client.connection.send(unsent)
                full = client.sent < len(client.data)
                if not full:
                    self._finish(client)
            self._watch(client, full and client.until is None)
        except Exception as error:
            self._watch(client, False)
            self._fail(client, error)
        client.forgotten = client.until is not None and (full or not client.fetching)
        self._has_forgotten = self._has_forgotten or client.forgotten

    def _fail(self, client: Client, error: Exception) -> None:
        """Let a client's thread find that it cannot be served any more."""
        if not isinstance(error, OSError):
            log.error("%s: a fault; the connection ends", client, exc_info=error)
        client.fetching = False
        client.end_input()

    def _finish(self, client: Client) -> None:
        """Be done with what a client was being sent."""
        if client.paying:
            with self._lock:
                client.owed_lines -= client.paying
                client.owed_bytes -= len(client.data)
        client.data, client.sent, client.paying = b"", 0, 0

    def _take_next(self, client: Client) -> bool:
        """Take what a client gets next; tell whether there is anything, for now."""
        position, outbox = client.position, client.outbox
        if client.fetching:
            return False
        if outbox and outbox[0][0] <= position:
            self._take_private(client)
            return True
        end = self.history.end if client.until is None else client.until
        if outbox:
            end = outbox[0][0]
        if position >= end:
            return False
        if position < self.history.first:
            return self._take_older(client, min(end, self.history.first))
        client.data, client.position = self.history.read(position, end)
        return True

    def _take_older(self, client: Client, end: int) -> bool:
        """Have lines fetched that are only in the file, or tell that they are nowhere."""
        if client.position >= self.history.oldest:
            client.fetching = True
            self._wanted.put((client, client.position, end))
            return False
        self._skip_to(client, self.history.oldest)
        return True

    def _skip_to(self, client: Client, position: int) -> None:
        client.data = self.line(protocol.missed(position - client.position))
        client.position = position

    def _place_fetched(self, client: Client, page: Fetched) -> None:
        client.fetching = False
        if page.lines:
            client.data = _block(page.lines)
            client.position += len(page.lines)
        else:  # it could not be read
            self._skip_to(client, page.end)

    def _fetch(self) -> None:
        """Read from the file for those who are behind; the main loop of the fetcher."""
        while (wanted := self._wanted.get()) is not None:
            client, position, end = wanted
            try:
                lines = self.history.fetch(position, end)
            except Exception as error:
                log.error("cannot read the history: %s", error)
                lines = []
            self.broadcast([Fetched(client, lines, end)])

    def _take_private(self, client: Client) -> None:
        lines = []
        while client.outbox and client.outbox[0][0] <= client.position:
            lines.append(client.outbox.popleft()[1])
        client.data, client.paying = b"".join(lines), len(lines)

    def _watch(self, client: Client, watched: bool) -> None:
        """Have the selector tell when a full socket has room, or not any more."""
        if watched and not client.watched:
            self._selector.register(client.connection, selectors.EVENT_WRITE, client)
        elif client.watched and not watched:
            self._selector.unregister(client.connection)
        client.watched = watched

    def _log_said(self, position: int) -> None:
        """Log the room's lines from a position on, when everyone has them."""
        if log.isEnabledFor(logging.DEBUG):
            position = max(position, self.history.first)
            while position < self.history.end:
                data, position = self.history.read(position, self.history.end)
                for line in data.split(b"\n")[:-1]:
                    log.debug("%s", protocol.escape(line, self.fmt))


def _size(entry: Entry) -> int:
    return len(entry.lines) if isinstance(entry, Said) else 1


def _outbox_full(client: Client) -> bool:
    return client.owed_lines >= OUTBOX_LINES or client.owed_bytes >= OUTBOX_BYTES


def _same_key(one: str, other: str) -> bool:
    """Compare two keys in a time that tells nothing; no key matches none."""
    return bool(one) and hmac.compare_digest(one.lower(), other.lower())


# --- Commands ----------------------------------------------------------------


class Usage(Exception):
    """A command was given what it does not take."""


Run = Callable[[Room, Client, str], Iterable[Entry]]  # gives what goes into the queue

COMMANDS: dict[str, Run] = {}


def command(verb: str) -> Callable[[Run], Run]:
    """Have a function run for ``/verb``, which `protocol.COMMANDS` explains."""

    def enter(run: Run) -> Run:
        COMMANDS[verb] = run
        return run

    return enter


def obey(room: Room, client: Client, line: bytes | Refusal) -> Iterable[Entry]:
    """Run a command; answer one that is unknown or misused with what would be right."""
    if isinstance(line, Refusal):
        return [Told(client, room.line(protocol.not_sent(line)))]
    verb, argument = protocol.command(line.decode(room.fmt)) or ("", "")
    run = COMMANDS.get(verb)
    if run is None:
        return told(room, client, f"there is no /{verb[:20]}; /help lists the commands")
    if verb in OPERATORS_ONLY and not client.operator:
        return told(room, client, "only operators can do that; /op PASSWORD makes you one")
    try:
        return run(room, client, argument)
    except Usage:
        usage, purpose = protocol.COMMANDS[verb]
        return told(room, client, f"usage: {usage}, to {purpose}")
    except Refusal as refusal:
        return [Told(client, room.line(protocol.not_sent(refusal)))]
    except sqlite3.Error as error:
        log.error("cannot read the history: %s", error)
        return told(room, client, "the history cannot be read; try again later")


def told(room: Room, client: Client, *texts: str) -> list[Entry]:
    """Answer a client."""
    return [Told(client, room.line(protocol.answer(text))) for text in texts]


@command("help")
def _help(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    width = max(len(usage) for usage, _ in protocol.COMMANDS.values())
    lines = (f"{usage:{width}}  {purpose}" for usage, purpose in protocol.COMMANDS.values())
    return told(room, client, *lines)


@command("names")
def _names(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    some = room.first_present(protocol.LISTED_NAMES)
    return [Told(client, room.line(line)) for line in protocol.here(*some)]


@command("me")
def _me(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    if not argument:
        raise Usage
    return [room.said(protocol.did(client.name, argument), client)]


@command("msg")
def _msg(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    name, _, text = argument.partition(" ")
    if not text.strip():
        raise Usage
    other = room.find(name)
    return [
        Private(
            other,
            room.line(protocol.private(client.name, text)),
            client,
            room.line(protocol.sent_to(other.name, text)),
            room.line(protocol.not_sent(f"{other.name} is not reading; try again later")),
        )
    ]


@command("nick")
def _nick(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    if not argument:
        raise Usage
    room.rename(client, protocol.check_name(argument))
    return ()


@command("history")
def _history(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    count = argument or str(protocol.REPLAY)
    if not re.fullmatch(r"\d{1,4}", count, re.ASCII) or not 1 <= int(count) <= MAX_ANSWER:
        return told(room, client, f"usage: /history [N], N from 1 to {MAX_ANSWER}")
    room.settle()
    found = room.history.last(int(count))
    return recalled(room, client, found) or [Told(client, room.line(protocol.NOTHING_SAID))]


@command("search")
def _search(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    if not argument:
        raise Usage
    room.settle()
    found = room.history.last(protocol.REPLAY, argument)
    return recalled(room, client, found) or told(room, client, f"nobody said {argument}")


@command("quit")
def _quit(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    raise Farewell("/quit", protocol.BYE)


def recalled(room: Room, client: Client, lines: list[tuple[float, str]]) -> list[Entry]:
    """Answer with lines of the history; as answers, for they have no position here."""
    return told(
        room, client, *(f"{time.strftime(STAMP, time.gmtime(t))} {line}" for t, line in lines)
    )


OPERATORS_ONLY = frozenset({"kick", "ban", "unban", "bans"})


@command("op")
def _op(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    if not argument:
        raise Usage
    if room.op_password is None:
        return told(room, client, "this room has no operators")
    if client.wrong_passwords >= TRIES:
        return told(room, client, "that was the third wrong password; there are no more tries here")
    if not room.op_password.is_it(protocol.password_bytes(argument)):
        client.wrong_passwords += 1
        log.warning("%s gave a wrong operator password", client)
        client.gone.wait(WRONG_DELAY)
        return [Told(client, room.line(protocol.WRONG_PASSWORD))]
    client.operator = True
    log.info("%s is an operator", client)
    return told(room, client, "you are an operator; /kick, /ban, /unban and /bans are yours")


@command("kick")
def _kick(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    name, _, reason = argument.partition(" ")
    if not name:
        raise Usage
    other = room.find(name)
    room.put_out(other, client, reason.strip())
    return told(room, client, f"{other.name} was put out")


@command("ban")
def _ban(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    name, _, rest = argument.partition(" ")
    minutes, _, reason = rest.strip().partition(" ")
    if not re.fullmatch(r"[1-9]\d{0,6}", minutes, re.ASCII):
        if not name or re.match(r"-?\d", minutes):
            raise Usage
        minutes, reason = "", rest
    until = time.time() + 60 * int(minutes) if minutes else 0.0
    try:
        target: Client | None = room.find(name)
    except Refusal:
        target = None  # who has left can be banned too, by name
    address = target.host if target and not _is_loopback(target.host) else ""
    ban = Ban(protocol.check_name(name), address, client.name, until, reason.strip())
    room.set_bans(lambda bans: [*_without(bans, name), ban])
    log.info("%s was banned by %s %s", ban.name, client, ban)
    if target:
        with contextlib.suppress(Refusal):  # it may leave by itself meanwhile
            room.put_out(target, client, f"banned {ban}")
    whom = " and ".join(filter(None, (ban.name, ban.address)))
    return told(room, client, f"{whom} may not come in {ban}")


@command("unban")
def _unban(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    if not argument:
        raise Usage
    if len(_without(room.bans, argument)) == len(room.bans):
        raise Refusal(f"nobody called {argument} is banned; /bans lists who is")
    room.set_bans(lambda bans: _without(bans, argument))
    log.info("%s was let in again by %s", argument, client)
    return told(room, client, f"{argument} may come in again")


@command("bans")
def _bans(room: Room, client: Client, argument: str) -> Iterable[Entry]:
    bans = [ban for ban in room.bans if not ban.is_over()]
    return told(
        room, client, *(f"{ban.name} {ban.address or '-'} by {ban.by} {ban}" for ban in bans)
    ) or told(room, client, "nobody is banned")


def _without(bans: list[Ban], name: str) -> list[Ban]:
    return [ban for ban in bans if protocol.fold(ban.name) != protocol.fold(name)]


# --- The server --------------------------------------------------------------


class ChatServer(Room):
    """The room with its door: listens, lets people in and hears what they say.

    `port` 0 takes any free one; `server.port` tells which.  `history` is a file
    for a durable one, `tls` a server's context.  Raise `OSError` when the address
    cannot be listened on and `HistoryError` when the file cannot be used.
    """

    def __init__(
        self,
        host: str = protocol.HOST,
        port: int = protocol.PORT,
        fmt: str = protocol.FORMAT,
        *,
        max_clients: int = 1000,
        max_per_address: int = 50,
        max_unnamed: int = 64,
        name_deadline: float = 30.0,
        rate_limit: float = 5.0,
        history: str | None = None,
        tls: ssl.SSLContext | None = None,
        password: str | None = None,
        op_password: str | None = None,
    ) -> None:
        listener = _listen_on(host, port)
        try:
            super().__init__(
                History(fmt) if history is None else FileHistory(history, fmt), max_clients
            )
        except BaseException:
            listener.close()
            raise
        self.password = Password(password) if password else None
        self.op_password = Password(op_password) if op_password else None
        self.tls = tls
        self.max_per_address = max_per_address
        self.max_unnamed = max_unnamed
        self.name_deadline = name_deadline
        self.rate_limit = rate_limit
        self._connected: dict[Client, None] = {}  # all connections, in the order they came
        self._unnamed: dict[Client, None] = {}  # those of them that have not joined
        self._addresses: Counter[str] = Counter()
        # Guards the three above; notified when a connection has ended.
        self._door = threading.Condition()
        self._door_waker = Waker()
        self._listener = listener
        self.host, self.port = self._listener.getsockname()[:2]
        self._receiver = threading.Thread(target=self.receive, name="receive", daemon=True)

    def __enter__(self) -> ChatServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the broadcaster and let people in."""
        super().start()
        self._receiver.start()
        log.info("listening on %s:%d", self.host, self.port)

    def receive(self) -> None:
        """Accept connections until the server stops, whatever goes wrong."""
        delay = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._door_waker, selectors.EVENT_READ)
            while not self.stopping.is_set():
                selector.select()
                try:
                    self._accept()
                    delay = 0.0
                except BlockingIOError:
                    pass  # reset before we came, or the server stops
                except (OSError, RuntimeError, MemoryError) as error:
                    if not delay:
                        log.error("cannot accept a connection: %s; trying again", error)
                    delay = min(1.0, delay * 2 or 0.010)
                    self.stopping.wait(delay)

    def handle(self, client: Client) -> None:
        """Serve one client from its first byte to its last."""
        reason, last_line = "the input ended", ""
        try:
            self._admit(client)
            self._listen(client)
        except Farewell as farewell:
            reason, last_line = str(farewell), farewell.line
        except Gone:
            reason = "the server ended it"
        except OSError as error:
            reason = str(error)
        except Exception:
            log.exception("%s: a fault; the connection ends", client)
            reason = "a fault"
        finally:
            self._part(client, reason, last_line)

    def stop(self) -> None:
        """Deliver what was accepted, say goodbye and close; at most five seconds."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._door_waker.wake()
        self._receiver.join()
        self._listener.close()
        super().stop()
        self._end_connections(socket.SHUT_WR)
        self._end_connections(socket.SHUT_RDWR)  # whoever did not close
        for thing in (self._door_waker, self._waker, self._selector, self.history):
            thing.close()
        log.info("stopped")

    # The steps of `receive`.

    def _accept(self) -> None:
        """Accept one connection and start its thread."""
        sock, (host, port, *_) = self._listener.accept()
        try:
            connection = TlsConnection(sock, self.tls) if self.tls else Connection(sock)
            client = Client(connection, protocol.escape(host), port)
        except BaseException:
            sock.close()
            raise
        self._register(client)
        try:
            threading.Thread(target=self.handle, args=[client], daemon=True).start()
        except BaseException:
            with contextlib.suppress(OSError):
                client.connection.send(self.line(protocol.BUSY))
            self._unregister(client)
            raise

    def _register(self, client: Client) -> None:
        """Count a connection, and close the oldest that has no name if there are too many."""
        with self._door:
            self._connected[client] = None
            self._unnamed[client] = None
            self._addresses[client.host] += 1
            if len(self._unnamed) <= self.max_unnamed:
                return
            oldest = next(iter(self._unnamed))
            del self._unnamed[oldest]
        log.info("%s closed: too many connections without a name", oldest)
        oldest.end_input()

    def _unregister(self, client: Client) -> None:
        """Close a connection; the last thing that happens to it."""
        client.connection.close()
        with self._door:
            del self._connected[client]
            self._unnamed.pop(client, None)
            self._addresses[client.host] -= 1
            if not self._addresses[client.host]:
                del self._addresses[client.host]
            self._door.notify_all()

    # The steps of `handle`.

    def _admit(self, client: Client) -> None:
        """Ask for a name, and for the password, until the client can be let in."""
        deadline = time.monotonic() + self.name_deadline
        self._shake_hands(client, deadline)
        if self._addresses[client.host] > self.max_per_address and not _is_loopback(client.host):
            raise Farewell("too many connections from its address", protocol.ADDRESS_FULL)
        trusted = self.password is None
        for _ in range(TRIES):
            client.connection.send(b"NICK\n")
            line = self._next_line(client, deadline)
            if not trusted:
                self._check_password(client, deadline)
                trusted = True
            with self._door:
                self._unnamed.pop(client, None)  # not the oldest without a name while it gets one
            try:
                return self.claim(client, protocol.introduction(protocol.decode(line, self.fmt)))
            except Refusal as refusal:
                client.connection.send(self.line(protocol.answer(str(refusal))))
            with self._door:
                self._unnamed[client] = None
        raise Farewell("no name that it can have", protocol.NO_MORE_TRIES)

    def _shake_hands(self, client: Client, deadline: float) -> None:
        try:
            client.connection.shake_hands(deadline)
        except ssl.SSLError as error:
            raise Farewell(f"no TLS: {error.reason}", protocol.WANTS_TLS) from None
        except TimeoutError:
            raise Farewell("no TLS in time", protocol.WANTS_TLS) from None

    def _check_password(self, client: Client, deadline: float) -> None:
        assert self.password is not None
        for left in reversed(range(TRIES)):
            client.connection.send(b"PASS\n")
            if self.password.is_it(self._next_line(client, deadline)):
                return
            log.warning("%s gave a wrong password", client)
            if client.gone.wait(WRONG_DELAY):
                raise Gone
            if left:
                client.connection.send(self.line(protocol.WRONG_PASSWORD))
        raise Farewell("no right password", protocol.NO_MORE_PASSWORDS)

    def _next_line(self, client: Client, deadline: float) -> bytes:
        """Return the next line of one that has not joined yet."""
        while not client.unread:
            try:
                data = client.connection.receive(deadline)
            except TimeoutError:
                raise Farewell("no name in time", protocol.TOO_LATE) from None
            if not data:
                raise Farewell("left without a name")
            client.unread = client.framer.feed(data)
            foreign = protocol.foreign_protocol((client.unread or [client.framer.partial])[0])
            if foreign:
                raise Farewell(f"speaks {foreign}", protocol.FOREIGN[foreign])
            if client.framer.overrun and not client.unread:
                raise Farewell("speaks no lines", protocol.UNFRAMED)
        return client.unread.pop(0)

    def _listen(self, client: Client) -> None:
        """Hear a client until its input ends, no faster than it may speak."""
        bucket = Bucket(self.rate_limit)
        while True:
            while client.unread:
                count = bucket.take(len(client.unread))
                lines, client.unread = client.unread[:count], client.unread[count:]
                self._hear(client, lines)
                if client.unread and client.gone.wait(bucket.delay()):
                    raise Gone
            if client.framer.overrun:
                raise Farewell("speaks no lines", protocol.UNFRAMED)
            data = client.connection.receive()
            if not data:
                return
            client.unread = client.framer.feed(data)

    def _hear(self, client: Client, lines: list[bytes]) -> None:
        """Put what a client says into the room's queue and do what it asks for."""
        if protocol.are_plain(lines, client.prefix):
            self.broadcast([Said(lines, client)], client)
            return
        said: list[bytes] = []
        for line in lines:
            text = self._checked(line, client.prefix)
            if isinstance(text, Refusal) or protocol.is_command(text):
                if said:
                    self.broadcast([Said(said, client)], client)
                    said = []
                self.broadcast(obey(self, client, text), client)
            elif text.strip():
                said.append(client.prefix + protocol.unslash(text))
        if said:
            self.broadcast([Said(said, client)], client)

    def _checked(self, line: bytes, prefix: bytes) -> bytes | Refusal:
        try:
            return protocol.readable(line, prefix, self.fmt)
        except Refusal as refusal:
            return refusal

    def _part(self, client: Client, reason: str, last_line: str) -> None:
        """The one way out, whatever ended a client."""
        if client.name:
            self.leave(client, last_line)
        elif last_line:
            with contextlib.suppress(OSError):
                client.connection.send(self.line(last_line))
        log.info("%s left: %s", client, reason)
        client.connection.drain(time.monotonic() + LINGER)
        self._unregister(client)

    # The steps of `stop`.

    def _end_connections(self, how: int) -> None:
        """Shut all connections down and wait a while for their threads to end."""
        with self._door:
            connected = list(self._connected)
        for client in connected:
            if not client.name and how == socket.SHUT_WR:
                with contextlib.suppress(OSError):
                    client.connection.send(self.line(protocol.SHUTTING_DOWN))
            client.gone.set()
            client.connection.shutdown(how)
        with self._door:
            self._door.wait_for(lambda: not self._connected, STOP_CLOSE)


def _listen_on(host: str, port: int) -> socket.socket:
    """Return a listening socket, for IPv6 too."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listener = socket.create_server((host, port), family=found[0][0], backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


# --- The command line --------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the server until a signal ends it; return the exit status."""
    options = _parser().parse_args(arguments)
    with _signals() as signals:
        return _run_until(signals, options)


def _run_until(signals: socket.socket, options: argparse.Namespace) -> int:
    """Run the server until a byte for a signal comes; return the exit status."""
    threading.stack_size(STACK)
    try:
        console = Console(options.log_file, options.verbose)
    except OSError as error:
        return _fail(error, options)
    console.start()
    try:
        server = _server(options)
    except (OSError, UnicodeError, Refusal, HistoryError) as error:
        console.finish()
        return _fail(error, options)
    gc.freeze()  # what is loaded by now stays; looking through it held up a round for 9 ms
    with server:
        signals.recv(1)
    if not console.finish():
        os._exit(0)  # its thread is stuck in a write, and would hold up the exit
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Give a socket that gets a byte for each signal that asks the server to end.

    One that comes just before the main thread waits would be lost on a lock or queue.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
                signal.signal(getattr(signal, name), lambda number, frame: None)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(-1)


def _server(options: argparse.Namespace) -> ChatServer:
    """Make the server that the options describe."""
    return ChatServer(
        options.host,
        options.port,
        options.format,
        max_clients=_affordable(options.max_clients, options.max_unnamed),
        max_per_address=options.max_per_address,
        max_unnamed=options.max_unnamed,
        name_deadline=options.name_deadline,
        rate_limit=options.rate_limit,
        history=options.history,
        tls=_tls_context(options),
        password=protocol.password(options.password_file, "CHAT_PASSWORD"),
        op_password=protocol.password(options.op_password_file, "CHAT_OP_PASSWORD"),
    )


def _fail(error: Exception, options: argparse.Namespace) -> int:
    print(f"server.py: {_explain(error, options)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="server.py",
        description="Run a chat room that client.py, nc and telnet can join.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--host", default=protocol.HOST, help="address to listen on; 0.0.0.0 is all of them")
    option("--port", type=protocol.port, default=protocol.PORT, help="0 takes any free one")
    option("--format", choices=protocol.FORMATS, default=protocol.FORMAT, help="of the text")
    option("--max-clients", type=_number(int, 1), default=1000, metavar="N", help="in the room")
    option("--max-per-address", type=_number(int, 1), default=50, metavar="N", help="but loopback")
    option("--max-unnamed", type=_number(int, 1), default=64, metavar="N", help="not in it yet")
    option(
        "--name-deadline",
        type=_number(float, 0.1),
        default=30.0,
        metavar="SECONDS",
        help="to give a name",
    )
    option(
        "--rate-limit",
        type=_number(float, 0),
        default=5.0,
        metavar="LINES",
        help=f"a second for each client, after {BURST} at once; 0 is no limit",
    )
    option("--history", metavar="FILE", help="keep what is said, also over a restart")
    option("--tls-cert", metavar="FILE", help="speak TLS with this certificate")
    option("--tls-key", metavar="FILE", help="its key, if it is in a file of its own")
    option("--password-file", metavar="FILE", help="the room's; or the variable CHAT_PASSWORD")
    option("--op-password-file", metavar="FILE", help="operators'; or CHAT_OP_PASSWORD")
    option("--log-file", metavar="FILE", help="log there too")
    option("-v", "--verbose", action="store_true", help="log what is said too")
    option("--version", action="version", version=f"%(prog)s {protocol.__version__}")
    return parser


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """Return what reads a number of `kind` that is not under `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} on")
        return value

    return read


def _affordable(clients: int, unnamed: int) -> int:
    """Return how many clients the limit of file descriptors allows, raised if need be."""
    if resource is None:
        return clients
    wanted = clients + unnamed + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            clients = max(1, soft - unnamed - SPARE_DESCRIPTORS)
            log.warning("room for %d clients only: %d file descriptors allowed", clients, soft)
    return clients


class Console(logging.handlers.QueueListener):
    """Writes the log in a thread of its own: one that nobody reads must not stop the room."""

    def __init__(self, file: str | None, verbose: bool) -> None:
        handlers: list[logging.Handler] = [logging.StreamHandler()]
        if file is not None:
            handlers.append(logging.FileHandler(file))
        records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_RECORDS)
        super().__init__(records, *handlers)
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(message)s",
            level=logging.DEBUG if verbose else logging.INFO,
            handlers=[logging.handlers.QueueHandler(records)],
        )
        logging.raiseExceptions = False  # a closed terminal or a full disk ends no server

    def finish(self) -> bool:
        """Write what is left; tell whether somebody took it."""
        writer = self._thread
        if writer is None:
            return True
        try:
            self.enqueue_sentinel()
        except queue.Full:
            return False
        writer.join(STOP_CLOSE)
        if writer.is_alive():
            return False
        for handler in self.handlers:
            handler.close()
        return True


def _tls_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what the options say of TLS, and log the certificate's fingerprint."""
    if options.tls_cert is None:
        if options.tls_key:
            raise Refusal("--tls-key needs --tls-cert")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for file in filter(None, (options.tls_cert, options.tls_key)):
        with open(file, "rb"):
            pass  # so that an error names the file
    try:
        # A key that wants a passphrase is refused, not asked for: nobody may be there.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
    except ssl.SSLError as error:
        raise Refusal(
            f"cannot use {options.tls_cert} with its key: {error.reason or 'not a certificate'};"
            " give a PEM certificate and its key without a passphrase"
        ) from None
    log.info("certificate SHA256 fingerprint %s", protocol.fingerprint(_der(options.tls_cert)))
    return context


def _der(file: str) -> bytes:
    """Return the first certificate of a PEM file as its fingerprint is taken of."""
    text = pathlib.Path(file).read_text("ascii", "replace")
    begin = text.index("-----BEGIN CERTIFICATE-----")
    end = text.index("-----END CERTIFICATE-----", begin)
    return ssl.PEM_cert_to_DER_cert(text[begin:end] + "-----END CERTIFICATE-----")


def _explain(error: Exception, options: argparse.Namespace) -> str:
    """Say what keeps the server from starting and what to do about it."""
    where = f"cannot listen on {options.host} port {options.port}"
    if isinstance(error, Refusal):
        return str(error)
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"{where}: unknown host; choose an address of this machine with --host"
    if not isinstance(error, OSError):
        return str(error)
    if error.filename:
        verb = "write" if error.filename == os.path.abspath(options.log_file or "") else "read"
        return f"cannot {verb} {error.filename}: {error.strerror}; name another file"
    remedy = {
        errno.EADDRINUSE: "the port is in use; choose another with --port",
        errno.EADDRNOTAVAIL: "not an address of this machine; choose one with --host",
        errno.EACCES: "not permitted; choose a port over 1023 with --port",
    }
    return f"{where}: {remedy.get(error.errno or 0, error.strerror)}"


if __name__ == "__main__":
    sys.exit(main())
