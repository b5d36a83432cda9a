"""The chat server: one room, a thread per client and one that applies what happens.

    python server.py --port 55555

or, from Python::

    with ChatServer(port=0) as server:
        print("listening on port", server.port)

The way of a message, in the order in which the functions stand below:

    ChatServer.receive          accepts a connection and starts its thread, which runs
    ChatServer.handle           from the first byte to the last:
    Client.admit                gets a name, and a place in the room for it,
    Client.read                 takes what comes, no faster than its allowance, and has
    Client.hear                 look at each line: said, or a command;
    Client.broadcast            hands it in as an entry, by
    EntryLog.hand_in            which wakes the broadcaster's thread.
    Room.apply                  says what becomes of an entry, and
    Store.keep                  has the History give its lines their positions, in rounds of
    Broadcaster._apply_waiting  behind which
    Broadcaster._send_slice     gives each client all that follows its cursor.

Commands stand behind, then the histories (in memory, in a file) and the command line.

Who touches what:

    thread              touches                                              under
    accept              the listener
    any                 the socket (Connection)                              its lock
                        who is connected, from where (Connections)           its lock
                        what is used up (Allowances), guessed (Secret)       its lock
                        who was refused, and why (Refusals)                  its lock
    a client's own      Client: what has come and is not said yet
    any                 entries on their way (EntryLog)                      its lock
                        the time (Stamps)                                    its lock
                        what waits for one client, and its end (Gate)        its lock
                        lines and times in memory (History)                  its lock
    the broadcaster     Room: names, keys, bans, who is here
                        Output: a client's cursor and bytes under way
    the pager           what only the file has, for who is far behind
    who asks, searches  the file (Access: a connection for each kind)        its lock
    scribe, keeper      on several machines: their parts of the shared log

No thread holds two of these locks, but for one that waits for the disk: it holds its
connection to the file, which nobody else waits for but its like.  (And whoever stops the
server, or searches, keeps the right to, for which only others that would do the same wait.)
What is written by one thread, or under its lock, may be read by others without it where it does
no harm to be a moment late, or between two of its writes: `Broadcaster.room` is the room as it
was published last, which does not change any more; a Client's name, whether and why its output
ended, how full a queue is.

A client's life, as its own thread sees it:

    accepted -> without a name -> claiming -> in the room -> parting -> draining -> closed

and as the broadcaster sees its output; behind or full, it follows later:

    begin -> following -> end: gets what came before it -> released
                 |            (put out: what its socket takes at once; replaced: nothing)
                 +-> broken: gets nothing; its thread reads on to the end, for a while,
                             and hands in its leaving -> released
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import enum
import errno
import functools
import gc
import hashlib
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, NamedTuple, TypeGuard

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    fcntl = resource = None  # type: ignore[assignment]

import protocol
from protocol import Connection, Framer, Introduction, Kind, Line, Refusal, TlsConnection, Waker

# At the door, and for a client's thread.
TRIES = 3  # at a name or a password
WRONG_DELAY = 1.0  # seconds after a wrong password
MAX_DELAY = 5.0  # seconds between two checks for an address that has given many wrong ones
FORGIVEN = 600.0  # seconds after which a wrong password, or a right one, counts no more
MAX_GUESSING = 50  # checks that wait for one address, of which each takes `MAX_DELAY` at most
BURST = 20  # lines that a client may send at once before the rate counts
JOINS = 20.0  # joins a second from one address, after
JOINS_BURST = 100  # of them: a class that comes in at once, through one router
BACKLOG = 1024  # connections that the system may keep waiting for accept()
LINGER = 1.0  # seconds for a client to close after our last line
STACK = 128 * 1024  # bytes for a client's thread, whose calls are few and shallow
# In the room.
HELD = 15.0  # seconds that a place is kept for its key: longer than a change of network takes
MAIL_KEPT = 600.0  # seconds that private lines outlive the stay of who has not confirmed them
MAIL_LINES = 1000  # private lines kept for a key
MAIL_BYTES = 256 * 1024
MAX_GONE = 1000  # who have left: addresses known should they be banned, private lines kept
ALIVE = 10.0  # seconds that a server counts without a round: three times what it has to be
MAX_STEP = 3.0  # seconds that a round moves the log's clock at most: an outage kills nobody
MAX_NUMBER = 2**63 - 1  # beyond every round
SERVER_BITS = 32  # of a session's number are its own; its server's name stands above them
# In the broadcaster.
SLICE = 100  # clients served, in a millisecond or so, before a round takes in what came meanwhile
ROUND = 0.010  # seconds between the starts of two rounds in a busy room, at least
REST = 0.25  # of a round's length is rested after it, ROUND at most, so that others can run
MAX_QUEUED = 20_000  # lines waiting for a round; above, clients are not read from
OUTBOX_LINES = 1000  # lines for one client alone that may wait
OUTBOX_BYTES = 256 * 1024
LONGEST_WAIT = 3600.0  # seconds; a selector takes no months, and a ban may end in years
PARTING = 10.0  # seconds without progress until what is left for somebody who leaves is given up
LOOK = 10.0  # seconds between two looks for peers that are dead
STOP_WAIT = 1.0  # seconds at shutdown for a file that another program keeps locked
STOP_DELIVER = 2.0  # seconds at shutdown for what was accepted to go out
STOP_GRACE = 0.5  # seconds after that for the last round, and for who reads the file
STOP_CLOSE = 0.6  # seconds after that for the clients to close, and for each thread of the log
# In the history.
RETAINED = 50_000  # lines that a slow reader may be behind: minutes of a busy room
ROWS = 199  # lines inserted by a statement, five values each; older SQLites take 999 in all
PAGE = 500  # lines read from the file at once for who is behind
SEARCH_PAGE = 2000  # lines of the file that a search looks at in one step, 100 KB as people write
SEARCH_REST = 0.0005  # seconds between two steps of a search, for all else
SEARCH_LIMIT = 5.0  # seconds that somebody waits for a search
LOCK_STEP = 0.020  # seconds between two looks whether a locked file is free
TELL_WAITING = 2.0  # seconds that a history may keep the room waiting before people are told
CLOSE_LIMIT = 1.0  # seconds for who is inside the file to come out at the end
CHUNK = 1024  # lines given to a client at once: 50 KB as people write, 1.2 MB at the most
MAX_ANSWER = 200  # lines of /history and /search: what an outbox holds at full length
# On several machines.
UNANSWERED = 5.0  # seconds until a database that does not answer is given up, for the next
CONNECT = 5.0  # seconds to connect to one
AGAIN = 0.25  # seconds until the next is tried
MAX_ROUND = 1000  # lines in a round, about: 1 MB, which a slow network takes before `UNANSWERED`
EMPTY_ROUND = 2.0  # seconds after which a round is due, with nothing in it if need be
CONFIRM = 1.0  # seconds between two looks at which private lines have come
POINT_ROUNDS = 5000  # rounds after which a point is due
POINT_LINES = 20_000  # lines after which it is: less than may be in memory alone
POINT_SECONDS = 60.0  # seconds after which it is, while private text may stand behind it
POINT_PAGE = 5000  # lines put into the table by one statement
MAX_UNKEPT = 4 * RETAINED  # lines in memory that no point has; above, clients are not read from
KEEP_LOOK = 0.2  # seconds between two looks whether a point is due
TRIM_SECONDS = 60  # that a round is kept at least
FORGET_SERVERS = 86_400  # seconds that the last batch of a server is remembered
READ_ALL = 60.0  # seconds that reading or writing very much may take
LOCK = 1_128_816_980  # "Chat", for what only one server does at a time
# On the console.
MAX_RECORDS = 10_000  # of the log, waiting to be written; more are dropped
SUMMARY = 60.0  # seconds, the minute in its line: soon enough to act, and 1440 lines a day at most
SPARE_DESCRIPTORS = 32  # kept free for the listener, the log and the broadcaster

log = logging.getLogger("chat")


class Gone(Exception):
    """The client's words do not count any more, by somebody else's doing."""


class Denied(Refusal):
    """What is refused is not a line, and the answer says no more than why."""


class Unforeseen(Refusal):
    """There was a fault in applying an entry; who waits for it is told by nobody else."""


class Farewell(Exception):
    """A connection ends: the reason for the console and a last line for the client.

    With `for_good` its client has said so, and no place is kept for it.
    """

    def __init__(self, reason: str, line: str = "", *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.line = line
        self.for_good = for_good

    @property
    def turns_away(self) -> bool:
        """Whether somebody is told why they have to go; who leaves of their own will is not."""
        return bool(self.line) and not self.for_good


# --- The server --------------------------------------------------------------


class Limits(NamedTuple):
    """What one client, one address and all together may take."""

    max_clients: int = 1000  # in the room
    max_per_address: int = 50  # connections; loopback is exempt
    max_unnamed: int = 64  # connections that are not in the room yet
    name_deadline: float = 30.0  # seconds for name, password and TLS handshake together
    rate_limit: float = 5.0  # lines a second for each client after `BURST` at once; 0: no limit

    def __str__(self) -> str:
        rate = f"{self.rate_limit:g} {'line' if self.rate_limit == 1 else 'lines'} a second"
        return (
            f"{self.max_clients} in the room,"
            f" {self.max_per_address} from one address but loopback,"
            f" {self.max_unnamed} without a name, {self.name_deadline:g} s to give one,"
            f" {rate if self.rate_limit else 'no limit of lines'}"
        )


class ChatServer:
    """The door of the room: listens, and gives each connection its thread.

    `port` 0 takes any free one; `server.port` tells which.  `history` is a file
    for a durable one, or the address of a PostgreSQL for one that several servers share;
    `tls` is a server's context; both passwords and `tls` may be replaced while it runs.
    Other options are those of `Limits`.  Raise `OSError` when the address cannot be
    listened on and `HistoryError` when the history cannot be used.
    """

    def __init__(
        self,
        host: str = protocol.HOST,
        port: int = protocol.PORT,
        fmt: str = protocol.FORMAT,
        *,
        history: str | None = None,
        tls: ssl.SSLContext | None = None,
        password: str | None = None,
        op_password: str | None = None,
        **limits: float,
    ) -> None:
        self.tls = tls
        self.password = Secret(password)
        self.op_password = Secret(op_password)
        self.limits = Limits(**limits)  # type: ignore[arg-type]
        with contextlib.ExitStack() as opened:  # closed again should something fail
            self._listener = opened.enter_context(_listen_on(host, port))
            self.host, self.port = self._listener.getsockname()[:2]
            self.history = open_history(history, fmt)
            opened.callback(self.history.close)
            self.broadcaster = Broadcaster(self.history)
            opened.callback(self.broadcaster.close)
            self._waker = Waker()
            opened.pop_all()
        self.refusals = Refusals()
        self.connections = Connections(self.limits)
        self.allowances = Allowances(self.limits.rate_limit)
        self.stopping = threading.Event()
        self._stopper = threading.Lock()  # held by the thread that starts or stops the server
        self.history.on_failure = self._stop_aside
        self._receiver = threading.Thread(target=self.receive, name="receive", daemon=True)

    def __enter__(self) -> ChatServer:
        try:
            self.start()
        except BaseException:  # such as a system that has no thread left
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def clients(self) -> list[Client]:
        """All connections, in the order in which they came."""
        return self.connections.all()

    @property
    def names(self) -> list[str]:
        """The names of all who are here, in the order in which they joined."""
        return self.broadcaster.room.present()

    def start(self) -> None:
        """Start the broadcaster and let people in."""
        with self._stopper:  # a history that fails at once stops what has been started
            self.broadcaster.start()
            self._receiver.start()
        host = f"[{self.host}]" if ":" in self.host else self.host
        log.info("listening on %s:%d", host, self.port)

    def receive(self) -> None:
        """Accept connections until the server stops, whatever goes wrong.

        The classic's name for it: what a server receives here is connections.
        """
        delay = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            while not self.stopping.is_set():
                selector.select()
                try:
                    self._accept()
                    delay = 0.0
                except (BlockingIOError, ConnectionError):
                    pass  # reset before we came, or the server stops
                except Exception as error:
                    if not delay:
                        log.error("cannot accept a connection: %s; trying again", error)
                    delay = min(1.0, delay * 2 or 0.010)
                    self.stopping.wait(delay)

    def _accept(self) -> None:
        """Accept one connection and start its thread."""
        sock, address = self._listener.accept()
        if address is None:  # macOS knows none of one that was reset
            return sock.close()
        host, port = protocol.escape(address[0].removeprefix("::ffff:")), address[1]
        try:
            connection = TlsConnection(sock, self.tls) if self.tls else Connection(sock)
            client = Client(
                self, self.broadcaster.entries.new_session(), connection, f"{host}:{port}"
            )
        except OSError as error:  # reset by now: its own affair
            log.info("unnamed (%s:%d) left: %s", host, port, error)
            return sock.close()
        self.connections.add(client)
        try:
            threading.Thread(target=self.handle, args=[client], daemon=True).start()
        except BaseException:
            self.refusals.add("the server is busy")
            with contextlib.suppress(OSError):
                client.connection.send(_encoded(protocol.BUSY))
            self.connections.remove(client)
            raise

    def handle(self, client: Client) -> None:
        """Serve one client from its first byte to its last; each thread's main function."""
        farewell = Farewell("the input ended")
        try:
            client.admit()
            client.read()
        except Farewell as error:
            farewell = error
        except Gone:
            why = "its connection broke" if client.gate.broken else "the server ended it"
            farewell = Farewell(why)
        except OSError as error:
            farewell = Farewell(str(error))
        except Exception:
            log.exception("%s: a fault; the connection ends", client)
            farewell = Farewell("a fault")
        finally:
            try:
                client.part(farewell)
            finally:
                self.connections.remove(client)

    def stop(self) -> None:
        """Deliver what was accepted, say goodbye and close.

        At most five seconds, the sum of the limits of this above: `STOP_DELIVER`,
        `STOP_GRACE`, and `STOP_CLOSE` twice for the clients and then `CLOSE_LIMIT` for the
        file, or twice more for the log on several machines.
        """
        with self._stopper:  # whoever comes second waits until it has stopped
            if not self.stopping.is_set():
                self.stopping.set()
                self._stop()

    def _stop(self) -> None:
        self._waker.wake()
        join(self._receiver)
        self._listener.close()
        self.broadcaster.stop()
        for client in self.clients:
            client.turn_away(protocol.SHUTTING_DOWN)
        self.connections.end_all(socket.SHUT_WR)
        self.connections.end_all(socket.SHUT_RDWR)  # whoever did not close
        for thing in (self._waker, self.broadcaster, self.history):
            thing.close()
        log.info("stopped")

    def _stop_aside(self) -> None:
        """Stop, in a thread of its own: for one of those that have to end."""
        threading.Thread(target=self.stop, name="stop", daemon=True).start()


def join(thread: threading.Thread, timeout: float | None = None) -> None:
    """Wait for the end of a thread, if it was ever started."""
    if thread.ident is not None:
        thread.join(timeout)


def _listen_on(host: str, port: int) -> socket.socket:
    """Return a listening socket; one on all addresses of IPv6 takes in IPv4 too."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, *_, address = found[0]  # with the interface of a link-local one
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    listener = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


# --- A client's thread -------------------------------------------------------


class Client:
    """One connection and its input; its own thread's, but for `cut`, `turn_away` and `str`.

    `session` is the connection's number, under which its entries are handed in.
    """

    def __init__(self, server: ChatServer, session: int, connection: Connection, peer: str) -> None:
        self.server = server
        self.session = session
        self.connection = connection
        self.peer = peer  # host:port
        self.address = network(peer.rpartition(":")[0], connection.own_host())  # what counts as one
        self.name = ""
        self.output = Output(session, connection)  # the broadcaster's own, once we are in the room
        self.gate = self.output.gate
        self.wrong_passwords = 0  # given with /op
        self._stay = 0  # the number of its stay
        self._allowance = Allowance(0)
        self._prefix = b""  # of what it says
        self._framer = Framer()
        self._telnet = protocol.Telnet()
        self._unread: list[bytes] = []  # lines that came, not yet looked at
        self._handed_in = 0  # the number of its last entry

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({self.peer})"

    # From any thread.

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """Let its thread find the end of the input, whatever it waits for."""
        self.output.cut(how)

    def turn_away(self, line: str) -> None:
        """End somebody at the door with a line; who is in the room hears it there."""
        if self.name or self.output.parting is not None:
            return
        self.output.reason = line.removeprefix("-> ")
        self._send(_encoded(line))
        self.cut()

    # At the door.

    def admit(self) -> None:
        """Ask for a name, and for the password, until the client is in the room."""
        deadline = time.monotonic() + self.server.limits.name_deadline
        self._shake_hands(deadline)
        is_trusted = self.server.password.text is None
        for _ in range(TRIES):
            self._send(b"NICK\n")
            line = self._next_line(deadline)
            if not is_trusted:
                deadline = self._ask_password(deadline, _hashed_key(line))
                is_trusted = True
            try:
                text = protocol.decode(line, self.server.history.fmt)
                return self._claim(protocol.introduction(text))
            except Refusal as refusal:
                self.server.refusals.add("a name refused")
                self._send(_encoded(protocol.answer(str(refusal))))
        raise Farewell("no name that it can have", protocol.NO_MORE_TRIES)

    def _shake_hands(self, deadline: float) -> None:
        try:
            self.connection.shake_hands(deadline)
        except ssl.SSLError as error:
            raise Farewell(f"no TLS: {error.reason or error}", protocol.WANTS_TLS) from None
        except TimeoutError:
            raise Farewell("no TLS in time", protocol.WANTS_TLS) from None

    def _ask_password(self, deadline: float, key: str) -> float:
        """Ask until it is right, and return the deadline: our own waiting is not theirs."""
        for left in reversed(range(TRIES)):
            self._send(b"PASS\n")
            given = self._next_line(deadline)
            with self.server.connections.aside(self, self.server.broadcaster.room):
                since = time.monotonic()
                is_right = self._check(self.server.password, given, key)
                if not is_right:
                    log.warning("%s gave a wrong password", self)
                    self.server.refusals.add("a wrong password")
                    self.gate.pause(WRONG_DELAY)
                deadline += time.monotonic() - since
            if is_right:
                return deadline
            if left:
                self._send(_encoded(protocol.WRONG_PASSWORD))
        raise Farewell("no right password", protocol.NO_MORE_PASSWORDS)

    def _check(self, secret: Secret, given: bytes, key: str) -> bool:
        return secret.check(given, self.address, key, self.gate.pause)

    def gives_op_password(self, given: str) -> bool:
        """Tell whether this is the operators' password, when it is the turn of this address."""
        try:
            return self._check(self.server.op_password, protocol.password_bytes(given), "")
        except Farewell as farewell:
            self.server.refusals.add(str(farewell))
            raise Refusal(protocol.TOO_MANY_GUESSES) from None

    def _send(self, data: bytes) -> None:
        """Send to one that is not in the room, who may be gone: what it said before counts."""
        with contextlib.suppress(OSError):
            self.connection.send(data)

    def _next_line(self, deadline: float) -> bytes:
        """Return the next line of one that has not joined yet."""
        while not self._unread:
            try:
                data = self.connection.receive(deadline)
            except TimeoutError:
                raise Farewell("no name in time", protocol.TOO_LATE) from None
            if not data:
                raise Farewell("the input ended before a name")
            self._unread = self._frame(data)
            foreign = protocol.foreign_protocol((self._unread or [self._framer.partial])[0])
            if foreign:
                raise Farewell(f"speaks {foreign}", protocol.FOREIGN[foreign])
            if self._framer.overrun and not self._unread:
                raise Farewell("speaks no lines", protocol.UNFRAMED)
        return self._unread.pop(0)

    def _frame(self, data: bytes) -> list[bytes]:
        """Return the lines that the next bytes complete, and answer what telnet asks in them."""
        lines = self._framer.feed(self._telnet.feed(data))
        if self._telnet.answers:
            # Nothing of ours is under way to somebody who is not in the room.
            if not self.name:
                self._send(self._telnet.answers)
            else:
                self.broadcast(Answered(self.session, [self._telnet.answers]))
            self._telnet.answers = b""
        return lines

    def _claim(self, asked: Introduction) -> None:
        """Claim a name and a place in the room; raise `Refusal` or `Farewell`."""
        server, key = self.server, _hashed(asked.key)
        with server.connections.place(self, server.broadcaster, key):
            if key not in server.broadcaster.room.keys:
                while delay := server.allowances.join(self.address):
                    self.gate.pause(delay)
            now = self.server.broadcaster.entries.now()
            claim = Claim(self.session, asked._replace(key=key), self.address, now)
            stay, is_back = self._ask(claim, output=self.output)
        self._allowance = server.allowances.begin(stay.number, self.address)
        self._stay = stay.number
        self._be_called(stay.name)
        log.info("%s %s", self, "is back" if is_back else "joined")

    def _be_called(self, name: str) -> None:
        self.name, self._prefix = name, protocol.said(name, "").encode("ascii")

    # In the room.

    def read(self) -> None:
        """Take what comes until the input ends, no faster than the client may speak."""
        while True:
            while self._unread:
                count = self._allowance.draw(len(self._unread))
                lines, self._unread = self._unread[:count], self._unread[count:]
                self.hear(lines)
                if self._unread:
                    self.gate.pause(self._allowance.delay())
            if self._framer.overrun:
                raise Farewell("speaks no lines", protocol.UNFRAMED)
            data = self.connection.receive()
            if not data:
                return
            self._unread = self._frame(data)

    def hear(self, lines: list[bytes]) -> None:
        """Hand in what a client says, and do what it asks for."""
        if protocol.are_plain(lines, self._prefix):
            # As they came they are what the room will show: no copy, no look at each.
            self.broadcast(Said(self.session, lines))
            return
        said: list[bytes] = []
        for line in lines:
            if self.gate.broken and protocol.is_question(line, self._prefix):
                continue  # thousands of them would keep it busy for nobody
            try:
                text = protocol.check_line(line, self._prefix, self.server.history.fmt)
            except Refusal as refusal:
                said = self._say(said)
                self.answer(protocol.not_sent(refusal))
                continue
            if protocol.is_command(text):
                said = self._say(said)
                obey(self, text)
            elif text.strip():
                said.append(self._prefix + protocol.unslash(text))
        self._say(said)

    def _say(self, lines: list[bytes]) -> list[bytes]:
        """Hand in lines, if any; return the beginning of the next ones."""
        if lines:
            self.broadcast(Said(self.session, lines))
        return []

    def broadcast(self, entry: Entry) -> None:
        """Hand in what happened; all hear of it in the next round.

        Wait first while the room or the client has more waiting than is good for
        memory.  Raise `Gone` when its words no longer count.  It touches no socket,
        so no client can delay another.
        """
        self._hand_in(Handed(entry))

    def _ask(self, entry: Entry, output: Output | None = None) -> Any:
        """Hand in an entry and return what became of it; raise what refused it."""
        outcome = Outcome()
        self._hand_in(Handed(entry, outcome, output))
        return outcome.wait()

    def _hand_in(self, handed: Handed) -> None:
        # A claim waits for no space: there are as many as connections without a name.
        gate = self.gate if self.name else None
        self._handed_in = self.server.broadcaster.entries.hand_in(handed, gate)

    def answer(self, *lines: str) -> None:
        """Have the client get lines that are for it alone, behind all that it asked before.

        At most `MAX_ANSWER`: what fills the gate alone would wait for itself.
        """
        if lines:
            entry = Answered(self.session, [_encoded(line) for line in lines])
            size = sum(map(len, entry.lines))
            self.gate.add(len(lines), size)
            self._hand_in(Handed(entry, reserved=self.gate, reserved_lines=len(lines), size=size))

    def whisper(self, stay: Stay, text: str) -> None:
        """Hand in a line for one person alone, unless they have too many waiting already."""
        output = self.server.broadcaster.outputs.get(stay.session or 0)
        size = len(text.encode()) + protocol.MAX_NAME + 16
        if output is None:
            self.broadcast(Whispered(self.session, stay.number, text))
        elif not output.gate.reserve(size):
            self.answer(protocol.not_sent(protocol.NOT_READING.format(name=stay.name)))
        else:
            entry = Whispered(self.session, stay.number, text)
            try:
                self._hand_in(Handed(entry, reserved=output.gate, size=size))
            except Gone:
                output.gate.remove(1, size)
                raise

    def rename(self, name: str) -> None:
        """Take another name, and go on when it is decided: what follows is said under it."""
        old = self.name
        if new_name := self.request(Renamed(self.session, name)):
            self._be_called(new_name)
            log.info("%s was %s", self, old)

    def promote(self) -> None:
        """Become an operator, and go on when it is so: what follows may rely on it."""
        self.request(Promoted(self.session))
        log.info("%s is an operator", self)

    def request(self, entry: Entry) -> Any:
        """Hand in what is answered where it is applied, and return what became of it, or None.

        It is waited for, so that nobody has more answers coming than a gate counts.
        """
        try:
            return self._ask(entry)
        except Unforeseen:
            raise
        except Refusal:
            return None  # it was answered where it was refused

    def is_operator(self) -> bool:
        """Tell whether it is an operator, as published."""
        stay = self.server.broadcaster.room.by_session(self.session)
        return stay is not None and stay.is_operator

    def wait_applied(self) -> None:
        """Wait until all that it handed in has its place in the history."""
        if not self.server.broadcaster.entries.is_applied(self._handed_in):
            self._ask(Answered(self.session, []))

    # The one way out.

    def part(self, farewell: Farewell) -> None:
        """Leave the room if in it, send the last line, and let the other end close first."""
        self._count(farewell)
        if self.name:
            self.server.allowances.end(self._stay, self.address, self._allowance)
            self._leave(farewell)
        elif farewell.line:
            self._send(_encoded(farewell.line))
        log.info("%s left: %s", self, self.output.reason or farewell)
        self.connection.drain(time.monotonic() + LINGER)

    def _count(self, farewell: Farewell) -> None:
        """Count somebody who was refused or turned away."""
        reason = "" if self.name else self.output.reason.partition(";")[0]
        if farewell.turns_away:
            reason = str(farewell).partition(":")[0]  # without what TLS has to say of itself
        if reason:
            self.server.refusals.add(reason)

    def _leave(self, farewell: Farewell) -> None:
        """Hand in the end, and wait until the broadcaster has let go of the socket.

        Closed under the broadcaster's hands, its number could be another client's at once.
        """
        broadcaster = self.server.broadcaster
        with contextlib.suppress(Gone):
            if farewell.line:
                last = Answered(self.session, [_encoded(farewell.line)])
                broadcaster.entries.hand_in(Handed(last))
            entry = (Left if farewell.for_good else Lost)(self.session, broadcaster.entries.now())
            broadcaster.entries.hand_in(Handed(entry))
        self.gate.wait_released()


# --- At the door: who may, and how much --------------------------------------


class Connections:
    """Who is connected and from where, named or not; any thread, under its lock."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._all: dict[Client, None] = {}  # in the order in which they came
        # Those of them that are at the door and owe us an answer, in the order since when.
        self._unnamed: dict[Client, None] = {}
        self._addresses: Counter[str] = Counter()
        self._claiming: set[Client] = set()  # those of them that ask for a place in the room
        # Guards all of the above; notified when a connection has ended.
        self._changed = threading.Condition()

    def all(self) -> list[Client]:
        """Return all clients, in the order in which they came."""
        with self._changed:
            return list(self._all)

    def add(self, client: Client) -> None:
        """Count a connection, and turn one without a name away if there are too many.

        It is the oldest from where most of them are: whoever comes in a crowd gives way
        to the others, and not they to the crowd.
        """
        with self._changed:
            self._all[client] = self._unnamed[client] = None
            self._addresses[client.address] += 1
            if len(self._unnamed) <= self.limits.max_unnamed:
                return
            crowd = Counter(unnamed.address for unnamed in self._unnamed).most_common(1)[0][0]
            oldest = next(one for one in self._unnamed if one.address == crowd)
            del self._unnamed[oldest]
        oldest.turn_away(protocol.TOO_MANY_UNNAMED)

    def remove(self, client: Client) -> None:
        """Close a connection; the last thing that happens to it."""
        client.connection.close()
        with self._changed:
            del self._all[client]
            self._unnamed.pop(client, None)
            self._addresses[client.address] -= 1
            if not self._addresses[client.address]:
                del self._addresses[client.address]
            self._changed.notify_all()

    @contextlib.contextmanager
    def aside(self, client: Client, room: Room) -> Iterator[None]:
        """Count a client as none without a name while it waits for something of ours."""
        with self._changed:
            self._check_address(client, room)
            self._take_out(client)
        yield  # if it ends here, it is none without a name for ever
        with self._changed:
            self._unnamed[client] = None

    def _take_out(self, client: Client) -> None:
        """Take a client out of those without a name; raise `Gone` if it was turned away."""
        assert self._is_locked()
        if client not in self._unnamed:
            raise Gone
        del self._unnamed[client]

    @contextlib.contextmanager
    def place(self, client: Client, broadcaster: Broadcaster, key: str) -> Iterator[None]:
        """Reserve a place in the room while a client claims a name; raise `Farewell`.

        Who comes with the key of a place needs no other.  Meanwhile the client is not
        the oldest without a name.
        """
        with self._changed:
            room = broadcaster.room  # here: who was decided on meanwhile counts there
            if key not in room.keys:
                self._check_space(client, room)
            self._take_out(client)
            self._claiming.add(client)
        try:
            yield
        except Refusal:  # it can try another name
            with self._changed:
                self._unnamed[client] = None
            raise
        finally:
            with self._changed:
                self._claiming.discard(client)

    def _check_space(self, client: Client, room: Room) -> None:
        assert self._is_locked()
        most = self.limits.max_clients
        if len(room.stays) + len(self._claiming) >= most:  # counting exactly takes time
            undecided = sum(other.session not in room.sessions for other in self._claiming)
            if room.count(client.session >> SERVER_BITS) + undecided >= most:
                raise Farewell("the room is full", protocol.ROOM_FULL)
        self._check_address(client, room)

    def _check_address(self, client: Client, room: Room) -> None:
        assert self._is_locked()
        if _is_loopback(client.address):
            return
        from_there = self._addresses[client.address]
        if len(room.stays) > len(room.sessions):  # some places are kept for who is away
            away = (stay for stay in room.stays.values() if stay.session is None)
            from_there += sum(stay.address == client.address for stay in away)
        if from_there > self.limits.max_per_address:
            raise Farewell("too many connections from its address", protocol.ADDRESS_FULL)

    def end_all(self, how: int) -> None:
        """Shut all connections down and wait a while for their threads to end."""
        for client in self.all():
            client.cut(how)
        with self._changed:
            self._changed.wait_for(lambda: not self._all, STOP_CLOSE)

    def _is_locked(self) -> bool:
        return self._changed._is_owned()  # type: ignore[attr-defined, no-any-return]


class Allowance:
    """A right to so many things a second after a burst of them at once; rate 0 is no limit.

    One thread at a time uses it up; how much is left any may read, and go on with a
    `successor` of its own.
    """

    def __init__(self, rate: float, burst: int = BURST) -> None:
        self.rate = rate
        self.burst = burst
        self._state = (float(burst), time.monotonic())  # how many were left, and when

    def draw(self, wanted: int) -> int:
        """Return how many of what is wanted may pass now."""
        if not self.rate:
            return wanted
        left = self.left()
        drawn = min(wanted, int(left))
        self._state = (left - drawn, time.monotonic())
        return drawn

    def delay(self) -> float:
        """Return the seconds from the last draw until one more may pass."""
        return max(0.0, (1 - self._state[0]) / self.rate) if self.rate else 0.0

    def is_full(self) -> bool:
        """Tell whether it is as good as a new one."""
        return not self.rate or self.left() >= self.burst

    def successor(self) -> Allowance:
        """Return one that goes on where this one is."""
        other = Allowance(self.rate, self.burst)
        other._state = (self.left(), time.monotonic())
        return other

    def left(self) -> float:
        """Return how many may pass now, and a part of the next."""
        left, since = self._state
        return min(float(self.burst), left + (time.monotonic() - since) * self.rate)


class Allowances:
    """What people and addresses have used up, over all their connections; under its lock.

    Otherwise whoever comes anew would have a new allowance each time.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._of_stays: dict[int, Allowance] = {}
        self._of_gone: dict[str, list[Allowance]] = {}  # by address, of who is gone
        self._joins: dict[str, Allowance] = {}  # by address
        self._lock = threading.Lock()  # guards all of the above

    def join(self, address: str) -> float:
        """Count a join from an address; return the seconds until it may be."""
        with self._lock:
            self._joins = {a: joins for a, joins in self._joins.items() if not joins.is_full()}
            joins = self._joins.setdefault(address, Allowance(JOINS * bool(self.rate), JOINS_BURST))
            return 0.0 if joins.draw(1) else joins.delay()

    def begin(self, stay: int, address: str) -> Allowance:
        """Return the allowance of a stay: its own, or else the emptiest left at the address."""
        with self._lock:
            known = self._of_stays.get(stay)
            if known is None:
                left = self._of_gone.get(address)
                known = min(left, key=Allowance.left) if left else Allowance(self.rate)
                if left:
                    left.remove(known)
            self._of_stays[stay] = known.successor()
            return self._of_stays[stay]

    def end(self, stay: int, address: str, allowance: Allowance) -> None:
        """Keep an allowance whose connection ends, for the stay and for who comes from there."""
        with self._lock:
            if self._of_stays.setdefault(stay, allowance) is not allowance:
                return  # somebody goes on with it already
            self._of_gone.setdefault(address, []).append(allowance)
            self._forget_full()

    def _forget_full(self) -> None:
        """Forget allowances that are as good as new ones, in use or not."""
        assert self._lock.locked()
        self._of_stays = {n: one for n, one in self._of_stays.items() if not one.is_full()}
        kept = {a: [one for one in left if not one.is_full()] for a, left in self._of_gone.items()}
        self._of_gone = {address: left for address, left in kept.items() if left}


class Secret:
    """A password, and how often it was guessed wrong from where; any thread, under its lock.

    Once an address has given a wrong one its checks come one at a time, and the more there
    were the longer after each other; whoever has the key of somebody that passed is not slowed.
    `text` may be replaced at any time; None is none.
    """

    def __init__(self, text: str | None) -> None:
        self.text = text
        self._wrong: dict[str, tuple[int, float]] = {}  # how many, and when the last was
        self._free_at: dict[str, float] = {}  # when the next check may begin
        self._waiting: Counter[str] = Counter()
        self._passed: dict[str, float] = {}  # when somebody with this key last passed
        self._lock = threading.Lock()  # guards all of the above but the text

    def check(self, given: bytes, address: str, key: str, pause: Callable[[float], None]) -> bool:
        """Compare a password when it is the turn of this address; tell whether it is right."""
        is_right = None
        seconds = self._begin(address, key)
        try:
            pause(seconds)
            is_right = protocol.is_password(given, protocol.password_bytes(self.text or ""))
            return is_right
        finally:
            self._end(address, key, is_right=is_right)

    def _begin(self, address: str, key: str) -> float:
        """Return the seconds until a check may be; raise `Farewell` when too many wait."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            if key in self._passed or address not in self._wrong:
                self._waiting[address] += 1
                return 0.0
            if self._waiting[address] >= MAX_GUESSING:
                raise Farewell("too many passwords from its address", protocol.ADDRESS_FULL)
            self._waiting[address] += 1
            start = max(now, self._free_at.get(address, now))
            self._free_at[address] = start + self._pace(address)
            return start - now

    def _end(self, address: str, key: str, *, is_right: bool | None) -> None:
        """Count a check as done: right, wrong, or (None) given up."""
        now = time.monotonic()
        with self._lock:
            self._waiting[address] -= 1
            if is_right and key:
                self._passed[key] = now
            elif is_right is False:
                self._wrong[address] = (self._wrong.get(address, (0, now))[0] + 1, now)
                free_at = self._free_at.get(address, now)
                self._free_at[address] = max(free_at, now + self._pace(address))

    def _pace(self, address: str) -> float:
        assert self._lock.locked()
        return min(MAX_DELAY, WRONG_DELAY * self._wrong[address][0])

    def _forget(self, now: float) -> None:
        assert self._lock.locked()
        for kept in (self._passed, self._free_at):
            for old in [one for one, when in kept.items() if when + FORGIVEN <= now]:
                del kept[old]
        for old in [one for one, (_, when) in self._wrong.items() if when + FORGIVEN <= now]:
            del self._wrong[old]
        self._waiting = +self._waiting


class Refusals:
    """How many were refused since it was last told, and why; any thread, under its lock."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()  # by reason, in words of ours: they are few
        self._lock = threading.Lock()  # guards it

    def add(self, reason: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[reason] += 1

    def tell(self) -> None:
        """Log what was counted, if anything was, the most frequent first, and begin anew."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if counts:
            told = [f"{reason} ({count})" for reason, count in counts.most_common()]
            log.info("refused in the last minute: %s", ", ".join(told))


def network(host: str, own: str) -> str:
    """Return what counts as one address: an IPv6 /64 is, unless it is link-local or our `own`."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    around = ipaddress.IPv6Network((address, 64), strict=False)
    ours = own.partition("%")[0]
    if address.is_link_local or (":" in ours and ipaddress.IPv6Address(ours) in around):
        return str(address)
    return str(around)


def _is_loopback(address: str) -> bool:
    return "/" not in address and ipaddress.ip_address(address).is_loopback


def _hashed(key: str) -> str:
    """Return what stands for a key in the room: nothing that opens a place; '' for none."""
    return hashlib.sha256(key.lower().encode()).hexdigest() if key else ""


def _hashed_key(line: bytes) -> str:
    """Return the hash of the key in an introduction, if it is one and has a key."""
    try:
        return _hashed(protocol.introduction(protocol.decode(line)).key)
    except Refusal:
        return ""


def _encoded(line: str) -> bytes:
    """Return a line as it is sent, of text that was checked when it came in.

    What is ASCII is the same in UTF-8.
    """
    return f"{line}\n".encode()


# --- Entries on their way ----------------------------------------------------


class Verdict(NamedTuple):
    """What became of an entry: what it gave, or what refused it."""

    value: Any = None
    error: Exception | None = None


class Outcome:
    """Where somebody waits for the verdict on an entry; the broadcaster settles it, always."""

    __slots__ = ("_settled", "verdict")

    def __init__(self) -> None:
        self.verdict = Verdict(error=Unforeseen(protocol.UNFORESEEN))  # should the round fail
        self._settled = threading.Event()

    def settle(self) -> None:
        """Let the waiting thread have the verdict."""
        self._settled.set()

    def wait(self) -> Any:
        """Return what the entry gave when it is settled, or raise what refused it."""
        self._settled.wait()
        value, error = self.verdict
        if error is not None:
            raise error
        return value


class Handed(NamedTuple):
    """An entry on its way, and what depends on it."""

    entry: Entry
    outcome: Outcome | None = None
    output: Output | None = None  # of who claims a place: to follow the room if it is given
    reserved: Gate | None = None  # where lines for one client are counted until they are there
    reserved_lines: int = 1
    size: int = 0  # of those lines, in bytes
    is_ours: bool = False  # on several machines: it comes back from the log

    @property
    def lines(self) -> int:
        """How many lines it counts in the queue."""
        return len(self.entry.lines) if type(self.entry) is Said else 1


class Stamps:
    """What entries are stamped with: a time that never goes back, and numbers of connections."""

    def __init__(self) -> None:
        self._ahead = -math.inf  # of the monotonic clock, the time: as far as it ever was
        self._sessions = itertools.count(1)
        self._lock = threading.Lock()  # guards `_ahead`

    def now(self) -> float:
        """Return the time, in seconds since the epoch.

        A clock that is set back would have what is kept for seconds kept for hours.
        """
        with self._lock:
            wall = time.time()  # first: a wait between the two must not put it ahead
            self._ahead = max(self._ahead, wall - time.monotonic())
            return time.monotonic() + self._ahead

    def new_session(self) -> int:
        """Return the number of a connection that is new."""
        return next(self._sessions)


class EntryLog:
    """Entries in the order in which they were handed in; any thread, under its lock."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._stamps = Stamps()
        self._lock = threading.Lock()  # guards what follows, and what heirs say
        self._handed: list[Handed] = []  # not taken by a round yet
        self._lines = 0  # in entries whose round has not ended
        self._crowd: list[Gate] = []  # whose threads wait for space
        self._closed = False  # nothing is handed in any more

    def __len__(self) -> int:
        """Return how many entries wait to be applied."""
        return len(self._handed)

    @property
    def lines(self) -> int:
        """How many lines stand in entries whose round has not ended."""
        return self._lines

    def now(self) -> float:
        """Return the time for an entry, in seconds since the epoch: it never goes back."""
        return self._stamps.now()

    def new_session(self) -> int:
        """Return the number of a connection that is new."""
        return self._stamps.new_session()

    def hand_in(self, handed: Handed, gate: Gate | None = None) -> int:
        """Append an entry and return its number; raise `Gone` when nothing counts any more.

        With the gate of its author, wait first while too much waits here or there.
        """
        while (number := self._append(handed, gate)) is None:
            assert gate is not None
            gate.wait()
        self._waker.wake()
        return number

    def _append(self, handed: Handed, gate: Gate | None) -> int | None:
        """Append an entry and return its number; without space, have the gate rung later."""
        if gate is not None and not gate.is_open():
            return None
        with self._lock:
            if self._closed:
                raise Gone
            if gate is not None and self._is_crowded(handed.entry):
                self._crowd.append(gate)
                return None
            return self._put(handed)

    def _is_crowded(self, entry: Entry) -> bool:
        """Tell whether an entry has to wait for space."""
        assert self._lock.locked()
        return self._lines >= MAX_QUEUED

    def _put(self, handed: Handed) -> int:
        """Append an entry and return its number."""
        assert self._lock.locked()
        self._handed.append(handed)
        self._lines += handed.lines
        return 0

    def is_applied(self, number: int) -> bool:
        """Tell whether the round of an entry is known to have ended."""
        return False

    def take(self) -> list[Handed]:
        """Return what is to be applied next; the broadcaster's."""
        raise NotImplementedError

    def end_round(self) -> None:
        """Count what was taken as done, and let those go on who wait for space."""
        raise NotImplementedError

    def until(self, moment: float) -> float:
        """Return the seconds until the room's clock comes to a moment of its own accord."""
        return math.inf

    def start(self) -> None:
        """Be ready for entries."""
        return

    def stop(self) -> None:
        """Be done; nothing is taken any more."""
        return

    def close(self) -> None:
        """Take no more entries."""
        with self._lock:
            self._closed = True
        self._ring_crowd()

    def _ring_crowd(self) -> None:
        """Have those look again who wait for space."""
        with self._lock:
            crowd, self._crowd = self._crowd, []
        for gate in crowd:
            gate.ring()


class LocalLog(EntryLog):
    """The log of a room that one server has: what is handed in is what is applied."""

    def __init__(self, waker: Waker) -> None:
        super().__init__(waker)
        # Guarded by the lock.
        self._lines_taken = 0  # in entries that rounds have taken, and not ended
        self._count = 0  # entries ever handed in
        self._taken = 0  # entries that rounds have taken
        self._applied = 0  # entries whose round has ended

    def _put(self, handed: Handed) -> int:
        super()._put(handed)
        self._count += 1
        return self._count

    def is_applied(self, number: int) -> bool:
        """Tell whether the round of an entry has ended."""
        return number <= self._applied

    def take(self) -> list[Handed]:
        """Return what was handed in since the last round."""
        with self._lock:
            handed, self._handed = self._handed, []
            self._taken, self._lines_taken = self._count, self._lines
        return handed

    def end_round(self) -> None:
        """Count what was taken as done, and let those go on who wait for space."""
        with self._lock:
            self._applied = self._taken
            self._lines -= self._lines_taken
            self._lines_taken = 0
        self._ring_crowd()

    def until(self, moment: float) -> float:
        """Return the seconds until then: time passes by itself."""
        return moment - self.now() if moment < math.inf else moment


class Gate:
    """Whether a client's thread may go on, and what waits for it alone; under its own lock.

    It is open while the lines for this client alone are not too many, and closed for good
    when nothing more of its input counts: replaced, put out, a fault or shut down.  It is
    broken when its connection is: nothing is kept for it, and what came before counts as
    far as the allowance goes in the time for which a place is kept.
    """

    __slots__ = (
        "_bytes", "_changed", "_ends_at", "_lines", "_rung", "broken", "closed", "released",
    )  # fmt: skip

    def __init__(self) -> None:
        self.closed = False  # for good
        self.broken = False  # for good, too
        self._ends_at = math.inf  # when it is too late for what came before it broke
        self._rung = False  # it may be worth looking again
        self.released = False  # the broadcaster never touches the client again
        self._lines = 0  # on their way to the client, or reserved for such
        self._bytes = 0
        # Guards all changes; notified when rung, closed or released.
        self._changed = threading.Condition(threading.Lock())

    def is_open(self) -> bool:
        """Tell whether there is space for more; raise `Gone` when closed for good."""
        if self.closed:
            raise Gone
        return not self._is_full()

    def reserve(self, size: int) -> bool:
        """Count a line of `size` bytes, if it can be had and not too much waits; tell whether."""
        with self._changed:
            if self.broken or self._is_full():
                return False
            self._lines += 1
            self._bytes += size
            return True

    def add(self, lines: int, size: int) -> None:
        """Count lines of `size` bytes together, come what may."""
        with self._changed:
            self._lines += lines
            self._bytes += size

    def remove(self, lines: int, size: int) -> None:
        """Count lines as sent."""
        with self._changed:
            was_full = self._is_full()
            self._lines -= lines
            self._bytes -= size
        if was_full:
            self.ring()

    def wait(self) -> None:
        """Wait until it may be worth looking again; raise `Gone` when closed for good."""
        with self._changed:
            self._changed.wait_for(lambda: self._rung or self.closed)
            self._rung = False
        if self.closed:
            raise Gone

    def pause(self, seconds: float) -> None:
        """Wait so long; raise `Gone` when closed meanwhile, or when it will be too late."""
        end = time.monotonic() + seconds
        with self._changed:
            if self._changed.wait_for(lambda: self.closed or end > self._ends_at, seconds):
                raise Gone

    def wait_released(self) -> None:
        """Wait until the broadcaster has let go of the client."""
        with self._changed:
            self._changed.wait_for(lambda: self.released)

    def break_off(self) -> None:
        """Have nobody send anything any more; who asked more than it read is heard no further."""
        with self._changed:
            self.broken = True
            self.closed |= self._is_full()
            self._ends_at = time.monotonic() + HELD
            self._changed.notify_all()

    def release(self) -> None:
        """Let go of the client."""
        with self._changed:
            self.released = True
            self._changed.notify_all()

    def ring(self) -> None:
        """Have the client's thread look again."""
        with self._changed:
            self._rung = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let nothing pass any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _is_full(self) -> bool:
        return self._lines >= OUTBOX_LINES or self._bytes >= OUTBOX_BYTES


# --- The room ----------------------------------------------------------------

# What happens.  `session` is the connection that hands it in, `time` (seconds since the
# epoch) when it did.  What one does depends on the room and the entry alone.  A new kind of
# entry is a class here, its name in `Entry`, a verb of Room and a line in its `_VERBS`; a
# command hands it in.  One that changes the room also has the last place in `_SHARED_KINDS`,
# its part in `Room.state` and `Room.restored`, and a higher number in `RULES`.


class Claim(NamedTuple):
    """Somebody asks to join, or comes back with the key of a place."""

    session: int
    introduction: Introduction  # with the key's hash for the key
    address: str
    time: float


class Said(NamedTuple):
    """Somebody said or did something."""

    session: int
    lines: list[bytes]  # as the room shows them, without their newlines


class Whispered(NamedTuple):
    """Somebody wrote to one person alone."""

    session: int
    to: int  # the stay that was meant
    text: str


class Renamed(NamedTuple):
    """Somebody asks for another name."""

    session: int
    name: str


class Left(NamedTuple):
    """Somebody left, for good."""

    session: int
    time: float


class Lost(NamedTuple):
    """A connection ended; who has a key may come back to its place."""

    session: int
    time: float


class Promoted(NamedTuple):
    """Somebody gave the operators' password."""

    session: int


class Kicked(NamedTuple):
    """An operator asks for somebody to be put out."""

    session: int
    who: int  # the stay that was meant
    reason: str


class Banned(NamedTuple):
    """An operator asks for somebody to be kept out."""

    session: int
    name: str
    until: float  # seconds since the epoch; 0 is for good
    reason: str
    time: float


class Unbanned(NamedTuple):
    """An operator asks for a ban to end."""

    session: int
    name: str


class Passed(NamedTuple):
    """Time has passed: bans and the keeping of places may have ended."""

    time: float


class Turn(NamedTuple):
    """A round of one of several servers begins; the time is the log's."""

    server: int
    time: float
    number: int = 0


class Entered(NamedTuple):
    """A server is in the room from now on, maybe instead of what it was before."""

    server: int
    former: int = 0


class Ended(NamedTuple):
    """A server is in the room no more, in good order."""

    server: int


class Got(NamedTuple):
    """Private lines have come to their reader, so many under its key by now."""

    session: int
    whispers: int


class Restored(NamedTuple):
    """A server goes on from what another has written down of the room."""

    state: dict[str, Any]


class Noted(NamedTuple):
    """The server has something to say to all of its clients, outside of the room."""

    line: str


class Asked(NamedTuple):
    """Somebody asks what only the room can tell: "names" or "bans"."""

    session: int
    what: str


class Answered(NamedTuple):
    """The server has something to say to one client alone."""

    session: int
    lines: list[bytes]  # as they are sent, each with its newline


_OF_SERVERS = (Turn, Entered, Ended, Restored, Noted)  # of no session

Entry = (
    Claim | Said | Whispered | Renamed | Left | Lost | Promoted | Kicked | Banned | Unbanned
    | Passed | Turn | Entered | Ended | Got | Restored | Noted | Asked | Answered
)  # fmt: skip


def is_leaving(entry: Entry) -> TypeGuard[Left | Lost]:
    """Tell whether a connection that counted is over with an entry."""
    return isinstance(entry, (Left, Lost))


# What the broadcaster does for single clients, once the round's lines are stored.


class Begin(NamedTuple):
    """A session begins to follow the room."""

    session: int
    position: int  # of the next line when it came
    introduction: Introduction
    greeting: list[str]
    missed_private: int  # private lines that are not to be had any more
    whispers: int  # those that there ever were, but for the ones that follow
    mail: tuple[tuple[int, bytes], ...]  # those that are to be had, by position


class ToOne(NamedTuple):
    """A session gets a line for it alone, behind all before a position."""

    session: int
    position: int
    line: bytes  # with its newline


class Ending(enum.Enum):
    """How a session stops following the room."""

    LEFT = "left"  # gets what came before, as long as it takes it
    PUT_OUT = "put out"  # gets its last words, as far as its socket takes them at once
    REPLACED = "replaced"  # nobody reads there any more


class End(NamedTuple):
    """A session gets nothing from a position on."""

    session: int
    position: int
    how: Ending
    reason: str = ""  # for the console; empty where the client's thread knows better


Effect = Begin | ToOne | End


class Stay(NamedTuple):
    """Somebody's time in the room, from joining to leaving, over all their connections."""

    number: int
    name: str
    key: str  # hashed; empty for who cannot come back
    address: str
    session: int | None  # of the connection; None while the place is kept for the key
    is_operator: bool = False
    kept_until: float = math.inf
    correspondent: int = 0  # the stay that wrote to it alone last


class Mail(NamedTuple):
    """The private lines for a key: how many there ever were, and the last of them."""

    total: int = 0
    lines: tuple[tuple[int, bytes], ...] = ()  # by position
    size: int = 0  # of them, in bytes
    kept_until: float = math.inf  # its owner has left
    offered: int = 0  # of all that there ever were, those sent to a connection

    def plus(self, position: int, line: bytes, *, is_offered: bool) -> Mail:
        """Return it with one line more, and without the oldest where that is too much."""
        lines, size = (*self.lines, (position, line)), self.size + len(line)
        while len(lines) > MAIL_LINES or size > MAIL_BYTES:
            size -= len(lines[0][1])
            lines = lines[1:]
        total = self.total + 1
        return Mail(total, lines, size, offered=total if is_offered else self.offered)

    def without(self, had: int) -> Mail:
        """Return it for who comes back and has had so many of all that there ever were."""
        if had > self.total:  # they were counted before this room knew the key
            return Mail(had, offered=had)
        lines = self.lines[max(0, len(self.lines) - (self.total - had)) :]
        size = sum(len(line) for _, line in lines)
        return Mail(self.total, lines, size, offered=self.total)

    def is_full(self) -> bool:
        """Tell whether one line more would push out another."""
        return len(self.lines) >= MAIL_LINES or self.size >= MAIL_BYTES


class Ban(NamedTuple):
    """Who may not come in: a name, and the address that it came from if that is known."""

    name: str
    address: str  # empty when it is not known, or is not to be banned
    by: str
    until: float  # seconds since the epoch; 0 is for good
    reason: str

    def concerns(self, name: str, address: str, now: float) -> bool:
        """Tell whether it keeps out who comes with this name from this address."""
        return not self.is_over(now) and (
            self.is_of(name)
            or protocol.look(self.name) == protocol.look(name)
            or address == self.address != ""
        )

    def is_of(self, name: str) -> bool:
        """Tell whether it is the ban of this name."""
        return protocol.fold(self.name) == protocol.fold(name)

    def is_over(self, now: float) -> bool:
        """Tell whether its time has passed."""
        return 0 < self.until <= now


class Progress(NamedTuple):
    """How far a room has followed its log; times are in seconds since the epoch."""

    time: float = 0.0  # the latest that an entry has brought
    clock: float = 0.0  # the same, or on several machines the log's own: an outage is no time
    number: int = 0  # of the last round of several servers
    servers: Mapping[int, float] = MappingProxyType({})  # their last rounds, the oldest first
    last: float = 0.0  # the time of that round, which a clock that was set may have gone back to


class Result:
    """What a round makes of its entries; with `keeps` false, its lines cannot be stored."""

    __slots__ = ("effects", "keeps", "lines", "turns")

    def __init__(self, *, keeps: bool = True) -> None:
        self.lines: list[bytes] = []
        self.effects: list[Effect] = []  # for single clients
        self.turns: list[tuple[int, float]] = []  # where in the lines a server's begin, and when
        self.keeps = keeps


class Room:
    """Who is here, who is kept out, and what an entry does; no socket, thread or clock.

    The same entries give the same room, the same lines and the same effects, wherever
    they are applied and however they are cut into rounds.  A round applies its entries to
    a `draft` of the room, which becomes the room when its lines are stored; whoever has a
    room can read it without a lock, since from then on it does not change.
    """

    _SHARED = ("stays", "names", "looks", "keys", "sessions", "mail", "departed")

    def __init__(self, end: int = 0, bans: Iterable[Ban] = (), *, durable: bool) -> None:
        self.durable = durable  # what is stored outlives the server
        self.end = end  # the position of the next line
        self.progress = Progress()
        self.bans = tuple(bans)
        self.stays: dict[int, Stay] = {}  # by number, as they joined
        self.names: dict[str, int] = {}  # which stay has a name, folded
        self.looks: dict[str, int] = {}  # and which one a name that looks like this
        self.keys: dict[str, int] = {}
        self.sessions: dict[int, int] = {}
        self.mail: dict[str, Mail] = {}  # by key
        self.departed: dict[str, str] = {}  # addresses of who had a name last, by folded name
        self._set_deadline()
        # Of a draft alone.
        self.result = Result()
        self.is_shared = False  # nothing but the result is the draft's own yet

    @property
    def time(self) -> float:
        """The latest time that an entry has brought, in seconds since the epoch."""
        return self.progress.time

    @property
    def clock(self) -> float:
        """The time by which places and private lines are kept."""
        return self.progress.clock

    @property
    def servers(self) -> Mapping[int, float]:
        """Which of several servers are in the room, and when each had its last round."""
        return self.progress.servers

    def draft(self, *, keeps: bool = True) -> Room:
        """Return a room to apply entries to; this one stays as it is.

        With `keeps` false the round's lines cannot be stored: what is said is refused to
        its authors, and nothing is announced.
        """
        draft = object.__new__(type(self))
        vars(draft).update(vars(self))
        draft.result, draft.is_shared = Result(keeps=keeps), True
        return draft

    def apply(self, entry: Any) -> Any:
        """Do what an entry says, and return what its author waits for.

        Raise `Refusal`, which was answered unless it is a claim's, or `Farewell` for what
        cannot be, and `Gone` when the session does not count any more; the room is as it was
        then, but for the time that has passed.
        """
        if type(entry) not in self._COPIES_NOTHING:
            self._unshare()
        try:
            return self._VERBS[type(entry)](self, entry)
        except Denied as denied:
            self._answer(entry.session, protocol.answer(str(denied)))
            raise
        except Refusal as refusal:
            self._answer(entry.session, protocol.not_sent(refusal))
            raise

    def do_without(self, entry: Any, before: Room, *, is_awaited: bool) -> None:
        """Go on after a fault in an entry, `before` the round: who leaves is gone, others are told.

        Who waits for what becomes of it is told by the thread that waits.
        """
        if is_leaving(entry):
            self.result.effects.append(End(entry.session, self.end, Ending.LEFT))
            if stay := self.by_session(entry.session) or before.by_session(entry.session):
                self._strike(stay, before)
        elif isinstance(entry, Claim):  # it can be made again
            self.result.effects = [e for e in self.result.effects if e.session != entry.session]
            if stay := self.by_session(entry.session):
                self._strike(stay, before)
        elif not is_awaited and not isinstance(entry, (Passed, *_OF_SERVERS)):
            for _ in entry.lines if isinstance(entry, Said) else [entry]:
                self._answer(entry.session, protocol.not_sent(protocol.UNFORESEEN))

    def _strike(self, stay: Stay, before: Room) -> None:
        """End a stay, wherever it may still stand after a fault, and say so if it was known."""
        self._unshare()
        self.stays.pop(stay.number, None)
        for index in (self.names, self.looks, self.keys, self.sessions):
            for key in [key for key, number in index.items() if number == stay.number]:
                del index[key]  # type: ignore[arg-type]
        if stay.number in before.stays or protocol.joined(stay.name).encode() in self.result.lines:
            self._announce(protocol.left(stay.name))

    def _unshare(self) -> None:
        """Have what entries change for the draft alone."""
        if self.is_shared:
            for name in self._SHARED:
                setattr(self, name, getattr(self, name).copy())
            self.is_shared = False

    # What others read.

    def present(self, most: int | None = None) -> list[str]:
        """Return the names of who is here, all or the first, in the order in which they joined."""
        return [stay.name for stay in itertools.islice(self.stays.values(), most)]

    def count(self, server: int) -> int:
        """Return how many are here at one of several servers, or of whom it was the last."""
        if not self.servers:
            return len(self.stays)
        return sum((s.session or s.number) >> SERVER_BITS == server for s in self.stays.values())

    def by_session(self, session: int) -> Stay | None:
        """Return the stay of a connection, if it counts."""
        return self.stays.get(self.sessions.get(session, 0))

    def by_name(self, name: str) -> Stay | None:
        """Return who has a name, in upper or lower case."""
        return self.stays.get(self.names.get(protocol.fold(name), 0))

    def state(self) -> dict[str, Any]:
        """Return all that a room is made of again by `restored`, as JSON has it."""
        mail = {
            key: [one.total, one.offered, one.kept_until, self._decoded(one.lines)]
            for key, one in self.mail.items()
        }
        return {
            "end": self.end, "time": self.time, "clock": self.clock, "mail": mail,
            "bans": [[*ban] for ban in self.bans], "stays": [[*one] for one in self.stays.values()],
            "departed": self.departed, "servers": [[*one] for one in self.servers.items()],
            "number": self.progress.number, "last": self.progress.last,
        }  # fmt: skip

    def _decoded(self, lines: Iterable[tuple[int, bytes]]) -> list[list[Any]]:
        return [[position, line.decode("utf-8")] for position, line in lines]

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Room:
        """Return the room of which this is the state."""
        room = cls(state["end"], [Ban(*ban) for ban in state["bans"]], durable=True)
        servers = dict(state["servers"])
        room.progress = Progress(
            state["time"], state["clock"], state["number"], servers, state["last"]
        )
        room.departed = dict(state["departed"])
        for stay in state["stays"]:
            room._enter(Stay(*stay))
        for key, (total, offered, kept, lines) in state["mail"].items():
            mail = tuple((position, line.encode("utf-8")) for position, line in lines)
            size = sum(len(line) for _, line in mail)
            room.mail[key] = Mail(total, mail, size, kept_until=kept, offered=offered)
        room._set_deadline()
        return room

    # Joining and leaving.

    def _claim(self, claim: Claim) -> tuple[Stay, bool]:
        self._pass(claim.time)
        server = claim.session >> SERVER_BITS
        if server and server not in self.servers:  # it is over, and will have to know
            raise _no_admission()
        if (number := self.keys.get(claim.introduction.key)) is not None:
            return self._take_over(self.stays[number], claim), True
        name = claim.introduction.name
        self._check_bans(name, claim.address)
        self._check_name(name)
        shown = self.present(protocol.WELCOME_NAMES)
        greeting = [protocol.welcome(name, shown, len(self.stays))]
        stay = Stay(claim.session, name, claim.introduction.key, claim.address, claim.session)
        self._enter(stay)
        self._begin(claim, stay, greeting)
        self._announce(protocol.joined(name))
        return stay, False

    def _take_over(self, stay: Stay, claim: Claim) -> Stay:
        """Give a place to who comes with its key, with no word to the room."""
        if not stay.is_operator:
            self._check_bans(stay.name, claim.address)
        if stay.session is not None:
            self.result.effects.append(End(stay.session, self.end, Ending.REPLACED, "replaced"))
            del self.sessions[stay.session]
        stay = stay._replace(session=claim.session, address=claim.address, kept_until=math.inf)
        self._enter(stay)
        greeting = [protocol.welcome_back(stay.name)]
        if claim.introduction.name != stay.name:
            greeting.append(protocol.now_named(stay.name))
        self._begin(claim, stay, greeting)
        return stay

    def _check_bans(self, name: str, address: str) -> None:
        """Raise `Farewell` for who is kept out."""
        for ban in self.bans:
            if ban.concerns(name, address, self.time):
                line = protocol.you_are_banned(ban.by, ban.until, ban.reason)
                raise Farewell("banned", line)

    def _check_name(self, name: str, own: Stay | None = None) -> None:
        """Raise `Refusal` for a name that somebody else has, or that looks like one."""
        taken = self.names.get(protocol.fold(name))
        if taken is not None and (own is None or taken != own.number):
            raise Refusal(protocol.NAME_TAKEN.format(name=name))
        alike = self.looks.get(protocol.look(name))
        if alike is not None and (own is None or alike != own.number):
            other = self.stays[alike].name
            raise Refusal(protocol.NAME_LOOKS_TAKEN.format(name=name, other=other))

    def _begin(self, claim: Claim, stay: Stay, greeting: list[str]) -> None:
        """Have a session follow the room, from where it asked for."""
        mail, had = self.mail.get(stay.key, Mail()), claim.introduction.whispers
        if had is None:  # it does not count: what came while it was away is new to it
            had = mail.offered
        mail = mail.without(had)
        if mail.total:
            self.mail[stay.key] = mail  # while it is here, without an end
        missed = mail.total - had - len(mail.lines)
        number = mail.total - len(mail.lines)
        begin = Begin(
            claim.session, self.end, claim.introduction, greeting, missed, number, mail.lines
        )
        self.result.effects.append(begin)

    def _enter(self, stay: Stay) -> None:
        """Put a stay, new or changed, wherever it is looked for."""
        self.stays[stay.number] = stay
        self.names[protocol.fold(stay.name)] = self.looks[protocol.look(stay.name)] = stay.number
        if stay.key:
            self.keys[stay.key] = stay.number
        if stay.session is not None:
            self.sessions[stay.session] = stay.number

    def _left(self, left: Left) -> None:
        stay = self._of(left)
        self._pass(left.time)
        self.result.effects.append(End(left.session, self.end, Ending.LEFT))
        self._leave(stay, protocol.left(stay.name))

    def _lost(self, lost: Lost) -> None:
        stay = self._of(lost)
        if not stay.key:
            return self._left(Left(*lost))
        self._pass(lost.time)
        self.result.effects.append(End(lost.session, self.end, Ending.LEFT))
        self._hold(stay)
        return None

    def _hold(self, stay: Stay) -> None:
        """Keep the place of somebody whose connection has ended, for the key."""
        del self.sessions[stay.session or 0]
        self._enter(stay._replace(session=None, kept_until=self.clock + HELD))
        self._set_deadline()

    def _leave(self, stay: Stay, line: str) -> None:
        """End a stay, with a line for the room."""
        del self.stays[stay.number], self.names[protocol.fold(stay.name)]
        del self.looks[protocol.look(stay.name)]
        self.keys.pop(stay.key, None)
        self.sessions.pop(stay.session or 0, None)
        self._remember(stay)
        self.mail.pop(_unkeyed(stay), None)
        if mail := self.mail.pop(stay.key, None):
            self._keep(stay.key, mail)
        self._announce(line)

    def _keep(self, key: str, mail: Mail) -> None:
        """Keep the private lines for who has left, for a while, and not for too many."""
        self.mail[key] = mail._replace(kept_until=self.clock + MAIL_KEPT)
        gone = [one for one, mail in self.mail.items() if mail.kept_until < math.inf]
        if len(gone) > MAX_GONE:
            del self.mail[gone[0]]
        self._set_deadline()

    def _remember(self, stay: Stay) -> None:
        """Know from where somebody was who has the name no more, should it be banned."""
        name = protocol.fold(stay.name)
        self.departed.pop(name, None)  # so that the oldest stands first
        self.departed[name] = stay.address
        if len(self.departed) > MAX_GONE:
            del self.departed[next(iter(self.departed))]

    # Time.

    def _passed(self, passed: Passed) -> None:
        self._pass(passed.time)

    def _pass(self, now: float) -> None:
        """Let the room's time come to `now`, if that is later, and end what it ends."""
        if now > self.time:
            self.progress = self.progress._replace(time=now, clock=now)
        self._end_kept()

    def _end_kept(self) -> None:
        """End what is kept no more."""
        if self.clock < self.deadline:
            return
        for stay in [*self.stays.values()]:
            if stay.kept_until <= self.clock:
                self._leave(stay, protocol.left(stay.name))
        self.mail = {k: mail for k, mail in self.mail.items() if mail.kept_until > self.clock}
        self._set_deadline()

    def _set_deadline(self) -> None:
        """Set when something ends of itself: a place or mail that is kept, or a ban."""
        kept: list[Stay | Mail] = [*self.stays.values(), *self.mail.values()]
        ends = [ban.until for ban in self.bans if ban.until > self.time]
        self.deadline = min([one.kept_until for one in kept] + ends, default=math.inf)

    # Several servers.

    def _turned(self, turn: Turn) -> None:
        """Let the log's clock move, and end what it ends before the round counts."""
        clock = self.clock + min(max(0.0, turn.time - self.progress.last), MAX_STEP)
        now = max(self.time, turn.time)
        self.result.turns.append((len(self.result.lines), turn.time))
        self.progress = Progress(now, clock, turn.number, self.servers, turn.time)
        over = []
        for name, last in self.servers.items():  # whose last round is the oldest first
            if self.clock - last <= ALIVE:
                break
            over.append(name)
        if over or self.clock >= self.deadline:
            self._unshare()
        for name in over:
            self._end_server(name)
        self._end_kept()
        if turn.server in self.servers:
            self._note_round(turn.server)

    def _note_round(self, name: int) -> None:
        servers = dict(self.servers)
        servers.pop(name, None)  # so that it becomes the last
        servers[name] = self.clock
        self.progress = self.progress._replace(servers=servers)

    def _entered(self, entered: Entered) -> None:
        self._end_server(entered.former)
        self._note_round(entered.server)

    def _ended(self, ended: Ended) -> None:
        self._end_server(ended.server)

    def _end_server(self, name: int) -> None:
        """End the connections of a server that is over; nobody waits for what it does then."""
        if name not in self.servers:
            return
        others = {other: last for other, last in self.servers.items() if other != name}
        self.progress = self.progress._replace(servers=others)
        for stay in [*self.stays.values()]:
            if stay.session is None or stay.session >> SERVER_BITS != name:
                continue
            self.result.effects.append(
                End(stay.session, self.end, Ending.REPLACED, "the server is over")
            )
            if stay.key:
                self._hold(stay)
            else:
                self._leave(stay, protocol.left(stay.name))

    def _restored(self, restored: Restored) -> None:
        """Become another room; who is connected here has to come again."""
        for session in self.sessions:
            self.result.effects.append(
                End(session, self.end, Ending.REPLACED, "the server begins anew")
            )
        kept = {"result": self.result, "is_shared": self.is_shared}
        vars(self).update(vars(Room.restored(restored.state)), **kept)

    def _noted(self, noted: Noted) -> None:
        for session in self.sessions:
            self._answer(session, noted.line)

    def _got(self, got: Got) -> None:
        stay = self._of(got)
        box = stay.key or _unkeyed(stay)
        if mail := self.mail.get(box):
            self.mail[box] = mail.without(got.whispers)

    # Talking.

    def _said(self, said: Said) -> None:
        if said.session not in self.sessions:
            raise Gone
        if self.result.keeps:
            self.result.lines += said.lines
            self.end += len(said.lines)
        else:
            for _ in said.lines:
                self._answer(said.session, protocol.not_sent(protocol.NOT_STORED))

    def _whispered(self, whispered: Whispered) -> None:
        stay, other = self._of(whispered), self.stays.get(whispered.to)
        if other is None:
            raise Refusal(protocol.HAS_LEFT)
        box = other.key or _unkeyed(other)
        mail = self.mail.get(box, Mail())
        if self.servers and mail.is_full():
            raise Refusal(protocol.NOT_READING.format(name=other.name))
        line = protocol.private(stay.name, whispered.text)
        position, data = self.end, _encoded(line)
        self._answer(stay.session, protocol.sent_to(other.name, whispered.text))
        if other.session is not None:
            self.result.effects.append(ToOne(other.session, position, data))
        if box:
            is_offered = other.session is not None
            self.mail[box] = mail.plus(position, data, is_offered=is_offered)
        self.stays[other.number] = other._replace(correspondent=stay.number)

    def _renamed(self, renamed: Renamed) -> str:
        stay, name = self._of(renamed), renamed.name
        self._check_name(name, stay)
        if any(ban.concerns(name, "", self.time) for ban in self.bans):
            raise Refusal(protocol.NAME_BANNED.format(name=name))
        if not self.result.keeps:
            raise Refusal(protocol.NOT_STORED)
        del self.names[protocol.fold(stay.name)], self.looks[protocol.look(stay.name)]
        self._enter(stay._replace(name=name))
        self._remember(stay)
        self._answer(stay.session, protocol.now_named(name))
        self._announce(protocol.renamed(stay.name, name))
        return name

    # What operators do.

    def _promoted(self, promoted: Promoted) -> None:
        stay = self._of(promoted)
        self._enter(stay._replace(is_operator=True))
        self._answer(stay.session, protocol.OPERATOR)

    def _kicked(self, kicked: Kicked) -> None:
        by, other = self._operator(kicked), self.stays.get(kicked.who)
        if other is None:
            raise Refusal(protocol.HAS_LEFT)
        self._put_out(other, by, kicked.reason)
        self._answer(by.session, protocol.was_put_out(other.name))
        if not self.result.keeps:
            self._answer(by.session, protocol.NOT_ANNOUNCED)

    def _put_out(self, stay: Stay, by: Stay, reason: str) -> None:
        """End a stay, before everyone's eyes."""
        if stay.session is not None:
            self._answer(stay.session, protocol.you_were_kicked(by.name, reason))
        self._leave(stay, protocol.kicked(stay.name, by.name, reason))
        if stay.session is not None:
            self.result.effects.append(
                End(stay.session, self.end, Ending.PUT_OUT, f"kicked by {by.name}")
            )

    def _banned(self, banned: Banned) -> None:
        by = self._operator(banned)
        self._pass(banned.time)
        ban = self._ban(banned, by)
        if ban.concerns(by.name, "", self.time):
            raise Refusal(protocol.OWN_BAN)
        kept = (old for old in self.bans if not old.is_over(self.time) and not old.is_of(ban.name))
        self.bans = (*kept, ban)
        self._set_deadline()
        why = protocol.because_banned(ban.until, ban.reason)
        for stay in [*self.stays.values()]:
            if stay.number != by.number and ban.concerns(stay.name, stay.address, self.time):
                self._put_out(stay, by, why)
        whom = " and ".join(filter(None, (ban.name, ban.address)))
        line = protocol.banned(whom, ban.until, ban.reason, durable=self.durable)
        self._answer(by.session, line)
        if not self.result.keeps:
            self._answer(by.session, protocol.NOT_KEPT)

    def _ban(self, banned: Banned, by: Stay) -> Ban:
        """Return a ban with the address that it holds for: theirs now, as it was, or last."""
        # Told by the clock of where it was given, and to hold by the room's.
        until = banned.until and banned.until + (self.time - banned.time)
        ban = Ban(banned.name, "", by.name, until, banned.reason)
        present = self.stays.values()
        known = [stay.address for stay in present if ban.concerns(stay.name, "", self.time)]
        known += [old.address for old in self.bans if old.is_of(ban.name)]
        known.append(self.departed.get(protocol.fold(ban.name), ""))
        address = next(filter(None, known), "")
        if address == by.address or (address and _is_loopback(address)):
            address = ""
        return ban._replace(address=address)

    def _unbanned(self, unbanned: Unbanned) -> None:
        by = self._operator(unbanned)
        left = tuple(ban for ban in self.bans if not ban.is_of(unbanned.name))
        if len(left) == len(self.bans):
            raise Refusal(protocol.NOT_BANNED.format(name=unbanned.name))
        self.bans = left
        self._answer(by.session, protocol.unbanned(unbanned.name))
        if not self.result.keeps:
            self._answer(by.session, protocol.NOT_KEPT)

    def _operator(self, entry: Kicked | Banned | Unbanned | Asked) -> Stay:
        """Return whose entry it is; raise `Denied` when they are no operator."""
        stay = self._of(entry)
        if not stay.is_operator:
            raise Denied(protocol.ONLY_OPERATORS)
        return stay

    # What is for one client alone.

    def _asked(self, asked: Asked) -> None:
        for line in self._names(asked) if asked.what == "names" else self._bans(asked):
            self._answer(asked.session, line)

    def _names(self, asked: Asked) -> list[str]:
        self._of(asked)
        return protocol.here(self.present(protocol.LISTED_NAMES), len(self.stays))

    def _bans(self, asked: Asked) -> list[str]:
        self._operator(asked)
        bans = [protocol.ban_listed(*ban) for ban in self.bans if not ban.is_over(self.time)]
        return bans or [protocol.NOBODY_BANNED]

    def _answered(self, answered: Answered) -> None:
        self._of(answered)
        for line in answered.lines:
            self.result.effects.append(ToOne(answered.session, self.end, line))

    def _answer(self, session: int | None, line: str) -> None:
        if session in self.sessions:
            self.result.effects.append(ToOne(session, self.end, _encoded(line)))

    def _announce(self, line: str) -> None:
        if self.result.keeps:
            self.result.lines.append(line.encode())
            self.end += 1

    def _of(self, entry: Any) -> Stay:
        """Return whose entry it is; raise `Gone` when their session does not count any more."""
        number = self.sessions.get(entry.session)
        if number is None:
            raise Gone
        return self.stays[number]

    # They change no table of the room, or unshare it themselves: most rounds copy nothing.
    _COPIES_NOTHING = (Said, Answered, Asked, Turn, Noted)
    _VERBS: ClassVar[dict[type, Callable[[Room, Any], Any]]] = {
        Said: _said, Whispered: _whispered, Answered: _answered, Asked: _asked,
        Claim: _claim, Renamed: _renamed, Left: _left, Lost: _lost, Passed: _passed,
        Promoted: _promoted, Kicked: _kicked, Banned: _banned, Unbanned: _unbanned,
        Turn: _turned, Entered: _entered, Ended: _ended, Got: _got, Restored: _restored,
        Noted: _noted,
    }  # fmt: skip


def _no_admission() -> Farewell:
    """Return what ends the claim of somebody who had better try again."""
    return Farewell("the room is waiting", protocol.WAITING_AT_THE_DOOR)


def _unkeyed(stay: Stay) -> str:
    """Return under what private lines stand for who has no key, on several machines; or ''."""
    return "" if stay.key or not stay.number >> SERVER_BITS else f"#{stay.number}"


# --- The broadcaster ---------------------------------------------------------


class Store:
    """Keeps rounds in the history, and logs when that fails and when it works again."""

    def __init__(self, history: History, bans: tuple[Ban, ...]) -> None:
        self.history = history
        self._bans = bans  # as the history has them
        self._works = True  # the last round was kept

    def keep(self, room: Room) -> bool:
        """Give a round's lines their positions, and keep changed bans; tell if it was possible."""
        result, bans = room.result, None if room.bans == self._bans else list(room.bans)
        try:
            if result.lines or bans is not None:
                self.history.append(result.lines, bans, result.turns)
                self._bans = room.bans
        except Exception as error:
            if self._works:
                unforeseen = not isinstance(error, NotStored)
                log.error("cannot store what is said: %s", error, exc_info=unforeseen)
            self._works = False
            return False
        if result.lines and not self._works:
            log.info("what is said is stored again")
            self._works = True
        return True


class Parting:
    """How somebody leaves: up to where it still gets the room, and how long that is waited for."""

    __slots__ = ("ends_at", "patience", "until")

    def __init__(self, until: int, patience: float = 0.0) -> None:
        self.until = until  # it gets nothing from this position on
        self.patience = patience  # seconds without progress until what is left is given up
        self.ends_at = 0.0  # when that will be
        self.renew()

    def renew(self) -> None:
        """Wait from now on, since something has just been taken."""
        self.ends_at = time.monotonic() + self.patience


class Output:
    """What one client gets of the room: its cursor and what is under way to it.

    The broadcaster's own from the client's `Begin` until its gate is `released`.  The gate is
    for others too, and before `Begin` a client that is turned away has its reason here.
    """

    __slots__ = (
        "connection", "data", "fetching", "gate", "in_flight", "outbox", "parting", "position",
        "reason", "sent", "session", "watched", "whispers",
    )  # fmt: skip

    def __init__(self, session: int, connection: Connection) -> None:
        self.session = session
        self.connection = connection
        self.gate = Gate()
        self.position = 0  # the cursor: the next line of the room that it gets
        self.data = b""  # what is under way, behind which is the cursor
        self.sent = 0  # bytes of that which its socket has taken
        self.in_flight = 0  # lines in it that are for this client alone
        self.outbox: list[tuple[int, bytes]] = []  # such lines, by position
        self.whispers = 0  # private lines that it was ever given, under its key
        self.fetching = False  # what it gets next is being read from the file
        self.watched = False  # its socket is full; the selector tells when it is not
        self.parting: Parting | None = None  # it leaves
        self.reason = ""  # why the room ended it, for the console

    def enqueue(self, position: int, line: bytes) -> None:
        """Put a line for this client alone behind the room's lines before a position."""
        if self.gate.broken:
            return
        self.gate.add(1, len(line))
        self.outbox.append((position, line))

    def finish(self) -> None:
        """Be done with what was under way."""
        if self.in_flight:
            self.gate.remove(self.in_flight, len(self.data))
        self.data, self.sent, self.in_flight = b"", 0, 0

    def take_private(self) -> bool:
        """Put under way what is for this client alone and belongs here; tell if there is any."""
        count = sum(1 for position, _ in self.outbox if position <= self.position)
        if count:
            lines = [line for _, line in self.outbox[:count]]
            self.data, self.in_flight = b"".join(lines), count
            self.whispers += sum(map(protocol.is_private, lines))
            del self.outbox[:count]
        return count > 0

    def has_ended(self) -> bool:
        """Tell whether it has all that it is to get."""
        return self.parting is not None and not (self.data or self.outbox or self.fetching)

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """Let the client's thread find the end of its input."""
        self.gate.close()
        self.connection.shutdown(how)

    def drop(self) -> None:
        """Have nothing under way and nothing waiting any more."""
        self.finish()
        self.gate.remove(len(self.outbox), sum(len(line) for _, line in self.outbox))
        self.outbox.clear()
        self.fetching = False


class Broadcaster:
    """One thread that applies entries to the room and sends everyone what follows.

    All of it is this thread's own but for what others hand in: `entries`, and what the
    pager has read; and for what they read: `room`, published after each store, and
    `outputs`, in which they look for one.  `stop` closes the entries and then sets
    `_stop_at`, once; `close` comes after the thread's end.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.room = Room(history.end, history.bans(), durable=history.durable)
        self.outputs: dict[int, Output] = {}  # by session, who is in the room
        self._sockets = Sockets()
        self._store = Store(history, self.room.bans)
        self.entries = open_log(self, self._sockets.waker)
        self._pager = Pager(history, self._sockets.waker)
        history.on_waiting = self._say_waiting
        self._following: list[Output] = []  # whom rounds serve: in the room, or parting
        self._due: set[Output] = set()  # whom the next round serves, new lines or not
        self._parting: set[Output] = set()  # who gets what was said before they left, and no more
        self._claims: dict[int, Output] = {}  # by session, who asks for a place in this round
        # All before this position was offered to every client; while it is under the
        # history's end, a round is due.
        self._offered = history.end
        self._stop_at = math.inf  # when delivering is given up
        self._look_at = math.inf  # when to look for dead peers next
        self._thread = threading.Thread(target=self._run, name="broadcaster", daemon=True)

    def start(self) -> None:
        """Start the thread, and who reads the file for it."""
        self._thread.start()
        self._pager.start()
        self.entries.start()

    def stop(self) -> None:
        """Deliver what was handed in, tell everyone, and end the thread."""
        self.entries.close()
        self._stop_at = time.monotonic() + STOP_DELIVER
        self._sockets.waker.wake()
        join(self._thread, STOP_WAIT)
        self.history.give_up()
        self._pager.end()
        # A disk that does not answer must not hold up the end; its threads end with the process.
        for thread in self._thread, self._pager.thread:
            join(thread, self._stop_at + STOP_GRACE - time.monotonic())
        self.entries.stop()

    def close(self) -> None:
        """Give the descriptors back, unless the thread still has them."""
        if not self._thread.is_alive():
            self._sockets.close()

    # Rounds.

    def _run(self) -> None:
        """Go round until the room ends; nothing that fails in a round ends it."""
        next_round = 0.0
        while True:
            try:
                if self._is_over():
                    break
                writable = self._wait()
                # Lines that come during the pause share the round's one send per client.
                if (pause := next_round - time.monotonic()) > 0:
                    time.sleep(pause)
                start = time.monotonic()
                next_round = start + ROUND  # should the round fail
                self._round(writable)
                end = time.monotonic()
                next_round = max(start + ROUND, end + min((end - start) * REST, ROUND))
            except Exception:
                with contextlib.suppress(Exception):
                    log.exception("a round failed; the room goes on")
                with contextlib.suppress(Exception):
                    time.sleep(ROUND)
        with contextlib.suppress(Exception):  # who was to hear something first that never came
            self._say_goodbye()
            self._serve_due()
        for output in self._following:
            output.gate.release()
        for handed in self.entries.take():  # no round will come to it
            if handed.outcome is not None:
                handed.outcome.verdict = Verdict(error=Gone())
                handed.outcome.settle()
        self._sockets.close()

    def _wait(self) -> list[Output]:
        """Wait until something happened; return those whose sockets have room again."""
        timeout: float | None = None
        if self._due or self._offered < self.history.end or self._pager.pages:
            timeout = 0.0
        else:
            now = time.monotonic()
            ends = [self._stop_at, self._look_at, now + self.entries.until(self.room.deadline)]
            ends += (output.parting.ends_at for output in self._parting if output.parting)
            if (first := min(ends)) < math.inf:
                timeout = max(0.0, min(first - now, LONGEST_WAIT))
        return self._sockets.wait(timeout)

    def _is_over(self) -> bool:
        """Tell whether the room has ended: all is delivered, or time is up."""
        if self._stop_at == math.inf:
            return False
        return not (self.entries or self._following) or time.monotonic() > self._stop_at

    def _round(self, writable: list[Output]) -> None:
        """Apply what was handed in, then let everyone have it.

        What comes while a large room is being served is taken in on the way, so that
        those who are still to be served get it too.  Who joins on the way is due.
        """
        self._due.update(writable)
        start = self.history.end
        try:
            self._apply_waiting()
            # As it is now: those served first have not had what comes on the way.
            end = self.history.end
            if self._offered < end:
                for first in range(0, len(self._following), SLICE):
                    # A commit for each slice would keep everyone waiting for the disk.
                    if self.entries and not self.history.durable:
                        self._apply_waiting()
                    self._send_slice(self._following[first : first + SLICE])
                    self._serve_due()
                self._offered = end
            self._serve_due()
            if self._parting:
                self._end_stuck()
            if self._look_at <= time.monotonic():
                self._end_dead()
            self._log_said(start or self.history.end)  # 0: a shared history had not begun
        finally:
            self._following = [o for o in self._following if not o.gate.released]
            # Last: what counts against the flood's brake is what was served.
            self.entries.end_round()

    # Applying.

    def _apply_waiting(self) -> None:
        """Apply what was handed in, store its lines, and carry out what it means for each."""
        self._sockets.waker.clear()  # before taking, or what comes in between wakes nobody
        if self._pager.pages:
            self._take_pages()
        batch = self.entries.take()
        outcomes = [handed.outcome for handed in batch if handed.outcome]
        self._claims = {handed.output.session: handed.output for handed in batch if handed.output}
        if self.entries.until(self.room.deadline) <= 0:
            batch.append(Handed(Passed(self.entries.now())))
        if batch:
            try:
                self._apply(batch)
            finally:
                self._count_out(batch)
                for outcome in outcomes:
                    outcome.settle()
        if self._stop_at < math.inf and not self.entries:
            self._say_goodbye()

    def _apply(self, batch: list[Handed]) -> None:
        """Apply a batch to the room, store its lines, publish it, and carry out its effects."""
        room, verdicts = self._judged(batch, keeps=True)
        if not self._store.keep(room):
            room, verdicts = self._judged(batch, keeps=False)
        self.room = room  # from here on others read it
        for handed, verdict in zip(batch, verdicts, strict=True):
            if handed.outcome is not None:
                handed.outcome.verdict = verdict
        for effect in room.result.effects:
            self._carry_out(effect)

    def _count_out(self, batch: list[Handed]) -> None:
        """Count a batch as carried out; nobody who leaves in one that failed waits for ever."""
        for handed in batch:
            if handed.reserved:
                handed.reserved.remove(handed.reserved_lines, handed.size)
            if is_leaving(handed.entry):
                output = self.outputs.get(handed.entry.session)
                if output is not None:
                    self._end(output, End(output.session, self.room.end, Ending.LEFT))
                    self._due.add(output)

    def _judged(self, batch: list[Handed], *, keeps: bool) -> tuple[Room, list[Verdict]]:
        """Return a draft to which a batch is applied, one by one, and the verdict on each entry."""
        room = self.room.draft(keeps=keeps)
        return room, [self._verdict(room, handed) for handed in batch]

    def _verdict(self, room: Room, handed: Handed) -> Verdict:
        """Apply an entry to a draft of the room, and return what became of it."""
        # On several machines all have it, and all have to judge it alike.
        if handed.output is not None and handed.output.gate.closed and not handed.is_ours:
            return Verdict(error=Gone())  # turned away while its claim was on the way
        try:
            return Verdict(room.apply(handed.entry))
        except (Refusal, Farewell, Gone) as refusal:
            return Verdict(error=refusal)
        except Exception:
            log.exception("a fault in %s; the room goes on", type(handed.entry).__name__)
            room.do_without(handed.entry, self.room, is_awaited=handed.outcome is not None)
            return Verdict(error=Unforeseen(protocol.UNFORESEEN))

    def _carry_out(self, effect: Effect) -> None:
        """Do for one client what the room has decided; a fault in it ends that client alone."""
        known = self._claims if isinstance(effect, Begin) else self.outputs
        output = known.get(effect.session)
        if output is None:
            return
        try:
            if isinstance(effect, Begin):
                self._begin(output, effect)
            elif isinstance(effect, ToOne):
                output.enqueue(effect.position, effect.line)
            else:
                self._end(output, effect)
        except Exception as error:
            self._fail(output, error)
        if not output.watched or output.parting is not None:
            self._due.add(output)

    def _begin(self, output: Output, begin: Begin) -> None:
        """Have an output follow the room from where it was asked for."""
        self.outputs[output.session] = output
        self._following.append(output)
        asked, end = begin.introduction, begin.position
        wanted = end - asked.last if asked.position is None else asked.position
        output.position = start = self.history.start_for(wanted, end)
        lines = list(begin.greeting)
        if asked.wants_position:
            lines.append(protocol.at(start, asked.whispers))
        if begin.missed_private:
            lines.append(protocol.missed_private(begin.missed_private))
        for line in lines:
            output.enqueue(start, _encoded(line))
        output.whispers = begin.whispers
        for position, data in begin.mail:
            output.enqueue(min(position, end), data)
        if self._look_at == math.inf:
            self._look_at = time.monotonic() + LOOK

    def _end(self, output: Output, end: End) -> None:
        """Have an output get nothing from a position on."""
        del self.outputs[output.session]
        output.reason = end.reason or output.reason
        if output.gate.broken:
            if end.how is not Ending.LEFT:  # its thread may still read
                output.cut()
            self._release(output)
            return
        if end.how is Ending.REPLACED:
            output.parting = Parting(min(output.position, end.position))
            output.drop()
            output.cut()
        elif end.how is Ending.PUT_OUT:
            output.parting = Parting(end.position)
            output.gate.close()
        else:
            output.parting = Parting(end.position, PARTING)
        self._parting.add(output)

    def _take_pages(self) -> None:
        """Give those who are behind what the pager has read for them."""
        while self._pager.pages:
            output, start, lines = self._pager.pages.popleft()
            if not output.fetching:
                continue  # it has failed or was replaced meanwhile
            output.fetching = False
            if start > output.position:  # what is before it is not to be had
                self._skip_to(output, start)
            elif lines:
                output.data = _block(lines)
                output.position += len(lines)
            self._due.add(output)

    def _say_waiting(self, waiting: bool) -> None:
        """Tell people that the room waits for the disk, or goes on; from within a store."""
        if self._stop_at < math.inf:
            return
        log.warning("the history's file is %s", "locked; the room waits" if waiting else "free")
        line = _encoded(protocol.WAITING if waiting else protocol.GOES_ON)
        for output in self.outputs.values():
            output.enqueue(self.room.end, line)
            self._due.add(output)
        if waiting:
            for output in self._claims.values():
                with contextlib.suppress(OSError):  # nothing else is under way to them
                    output.connection.send(_encoded(protocol.WAITING_AT_THE_DOOR))
        self._serve_due()

    def _say_goodbye(self) -> None:
        """Tell everyone that the server ends, and end them behind it."""
        line = _encoded(protocol.SHUTTING_DOWN)
        for output in list(self.outputs.values()):
            output.enqueue(self.room.end, line)
            self._end(output, End(output.session, self.room.end, Ending.LEFT))
            output.gate.close()
            self._due.add(output)

    # Sending.

    def _send_slice(self, outputs: list[Output]) -> None:
        """Send the room's lines to those of some clients who have everything before them.

        That is nearly everyone, so it is done in as few steps as possible: who stands
        where the one before stood gets the same bytes.  Whoever needs more is left to
        `_serve`.
        """
        room_end = self.history.end
        position, data, end = -1, b"", -1  # where the one before stood, and what it got
        for output in outputs:
            if output.data or output.outbox or output.parting or output.gate.broken:
                if not output.watched and not output.gate.released:
                    self._due.add(output)
                continue
            if output.position != position:
                if output.position == room_end:
                    continue
                if output.position < self.history.first:
                    self._due.add(output)
                    continue
                position = output.position
                data, end = self.history.read(position, room_end)
            # Before the send: if it fails, the client ends and its cursor with it.
            output.position = end
            try:
                sent = output.connection.send(data)
            except Exception as error:
                self._fail(output, error)
                continue
            if sent < len(data):
                output.data, output.sent = data, sent
            if sent < len(data) or end < room_end:
                self._due.add(output)

    def _serve_due(self) -> None:
        while self._due:
            self._serve(self._due.pop())

    def _serve(self, output: Output) -> None:
        """Give a client all that follows its cursor, as far as its socket takes it."""
        if output.gate.released or output.gate.broken:
            return
        full = False
        try:
            while not full and (output.data or self._take_next(output)):
                unsent = memoryview(output.data)[output.sent :] if output.sent else output.data
                sent = output.connection.send(unsent)
                output.sent += sent
                full = output.sent < len(output.data)
                if sent and output.parting is not None:
                    output.parting.renew()
                if not full:
                    output.finish()
            self._sockets.watch(output, full)
        except Exception as error:
            self._fail(output, error)
            return
        parting = output.parting
        if output.has_ended() or (parting is not None and full and not parting.patience):
            self._release(output)

    def _end_stuck(self) -> None:
        """Let go of those who leave and have not taken anything for long."""
        now = time.monotonic()
        for output in list(self._parting):
            if output.parting is not None and output.parting.ends_at <= now:
                self._release(output)

    def _end_dead(self) -> None:
        """End those whose peers acknowledge nothing any more; a suspended reader's does."""
        for output in self._following:
            if output.connection.is_dead():
                output.reason = output.reason or "no acknowledgement came"
                self._fail(output, TimeoutError())
        self._look_at = time.monotonic() + LOOK if self._following else math.inf

    def _release(self, output: Output) -> None:
        """Let go of an output for good: its socket is its thread's to close."""
        with contextlib.suppress(Exception):
            self._sockets.watch(output, False)
        if output.parting is not None and output.gate.closed:
            # The client's last word is in its socket; now its thread may find the end.
            output.connection.shutdown(socket.SHUT_RD)
        self._due.discard(output)
        self._parting.discard(output)
        output.gate.release()

    def _fail(self, output: Output, error: Exception) -> None:
        """Be done with an output that cannot be served any more.

        Whoever says something and closes at once breaks the connection for us before it is
        read.  It counts all the same: the client's thread goes on to the end of the input, but
        no longer than a place is kept for somebody, or a ghost would talk for hours.
        """
        if not isinstance(error, OSError):
            log.error("session %d: a fault; it ends", output.session, exc_info=error)
            output.gate.close()
        with contextlib.suppress(Exception):
            self._sockets.watch(output, False)
        output.gate.break_off()
        output.drop()
        if not isinstance(error, ConnectionError):  # which its thread finds by itself
            output.connection.abort()
        if output.session not in self.outputs:  # it has left already
            self._release(output)

    def _take_next(self, output: Output) -> bool:
        """Put under way what a client gets next; tell whether there is anything, for now."""
        if output.fetching:
            return False
        if output.take_private():
            return True
        end = self.history.end if output.parting is None else output.parting.until
        if output.outbox:
            end = output.outbox[0][0]
        if output.position >= end:
            return False
        if output.position < self.history.first:
            return self._take_older(output, min(end, self.history.first))
        output.data, output.position = self.history.read(output.position, end)
        return True

    def _take_older(self, output: Output, end: int) -> bool:
        """Have lines read that are only in the file, or tell that they are nowhere."""
        if output.position >= self.history.oldest:
            output.fetching = True
            self._pager.ask(output, output.position, end)
            return False
        self._skip_to(output, self.history.oldest)
        return True

    def _skip_to(self, output: Output, position: int) -> None:
        output.data = _encoded(protocol.missed(position - output.position))
        output.position = position

    def _log_said(self, position: int) -> None:
        """Log the room's lines from a position on, when everyone has them."""
        if log.isEnabledFor(logging.DEBUG):
            position = max(position, self.history.first)
            while position < self.history.end:
                data, position = self.history.read(position, self.history.end)
                for line in data.split(b"\n")[:-1]:
                    log.debug("%s", protocol.escape(line, self.history.fmt))


class Sockets:
    """What the broadcaster waits for: its waker, and sockets that were full."""

    def __init__(self) -> None:
        self.waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.waker, selectors.EVENT_READ, None)

    def wait(self, timeout: float | None) -> list[Output]:
        """Wait until something happened; return those whose sockets have room again."""
        return [key.data for key, _ in self._selector.select(timeout) if key.data is not None]

    def watch(self, output: Output, watched: bool) -> None:
        """Have it told when a full socket has room, or not any more."""
        if watched and not output.watched:
            self._selector.register(output.connection, selectors.EVENT_WRITE, output)
        elif output.watched and not watched:
            self._selector.unregister(output.connection)
        output.watched = watched

    def close(self) -> None:
        """Give the descriptors back."""
        self.waker.close()
        self._selector.close()


class Pager:
    """Reads from the file for who is behind, in a thread of its own."""

    def __init__(self, history: History, waker: Waker) -> None:
        self.history = history
        self.pages: deque[tuple[Output, int, list[bytes]]] = deque()  # read, for the broadcaster
        self._waker = waker
        self._wanted: queue.SimpleQueue[tuple[Output, int, int] | None] = queue.SimpleQueue()
        self._ends = False
        self.thread = threading.Thread(target=self._run, name="pager", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def end(self) -> None:
        """Have the thread end; what is still wanted is read for nobody."""
        self._ends = True
        self._wanted.put(None)

    def ask(self, output: Output, position: int, end: int) -> None:
        """Have lines from a position up to `end` read, as many as fit a page."""
        self._wanted.put((output, position, end))

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None and not self._ends:
            output, position, end = wanted
            try:
                start, lines = self.history.fetch(position, end)
            except Exception as error:
                log.error("cannot read the history: %s", error)
                start, lines = end, []
            self.pages.append((output, start, lines))
            self._waker.wake()


# --- Commands ----------------------------------------------------------------


class Usage(Exception):
    """A command was given what it does not take."""


#: A command: hands in what it means, or returns the lines that answer it.
Command = Callable[[Client, str], "list[str] | None"]

COMMANDS: dict[str, Command] = {}


def command(verb: str) -> Callable[[Command], Command]:
    """Have a function run for ``/verb``, which `protocol.COMMANDS` explains."""

    def enter(run: Command) -> Command:
        COMMANDS[verb] = run
        return run

    return enter


def obey(client: Client, line: bytes) -> None:
    """Run a command; answer one that is unknown or misused with what would be right."""
    verb, argument = protocol.command(line.decode(client.server.history.fmt)) or ("", "")
    verb = protocol.ALIASES.get(verb, verb)
    try:
        client.answer(*_run(client, verb, argument) or ())
    except Usage:
        client.answer(protocol.usage(verb))
    except Refusal as refusal:
        client.answer(protocol.not_sent(refusal))
    except NotReadable as error:
        log.error("cannot read the history: %s", error)
        client.answer(protocol.UNREADABLE)


def _run(client: Client, verb: str, argument: str) -> list[str] | None:
    run = COMMANDS.get(verb)
    if run is None:
        return [protocol.unknown_command(verb)]
    if verb in OPERATORS_ONLY and not client.is_operator():
        return [protocol.answer(protocol.ONLY_OPERATORS)]
    return run(client, argument)


def _first(argument: str) -> tuple[str, str]:
    """Return the first word of an argument and what follows it; raise `Usage` without one."""
    word, _, rest = argument.partition(" ")
    if not word:
        raise Usage
    return word, rest.strip()


def _find(client: Client, name: str) -> Stay:
    """Return who has a name; raise `Refusal` when nobody has."""
    stay = client.server.broadcaster.room.by_name(name)
    if stay is None:
        raise Refusal(protocol.NOBODY_CALLED.format(name=name))
    return stay


@command("help")
def _help(client: Client, argument: str) -> list[str]:
    return protocol.help_lines()


@command("names")
def _names(client: Client, argument: str) -> None:
    client.request(Asked(client.session, "names"))


@command("me")
def _me(client: Client, argument: str) -> None:
    if protocol.is_blank(argument):
        raise Usage
    line = protocol.did(client.name, argument).encode(client.server.history.fmt)
    client.broadcast(Said(client.session, [line]))


@command("msg")
def _msg(client: Client, argument: str) -> None:
    name, _, text = argument.partition(" ")
    if protocol.is_blank(text):
        raise Usage
    client.whisper(_find(client, name), text)


@command("reply")
def _reply(client: Client, argument: str) -> None:
    if protocol.is_blank(argument):
        raise Usage
    room = client.server.broadcaster.room
    own = room.by_session(client.session)
    if own is None or not own.correspondent:
        raise Refusal(protocol.NOBODY_WROTE)
    other = room.stays.get(own.correspondent)
    if other is None:
        raise Refusal(protocol.CORRESPONDENT_LEFT)
    client.whisper(other, argument)


@command("nick")
def _nick(client: Client, argument: str) -> None:
    if not argument:
        raise Usage
    client.rename(protocol.check_name(argument))


@command("history")
def _history(client: Client, argument: str) -> list[str]:
    count = argument or str(protocol.REPLAY)
    if not re.fullmatch(r"\d{1,4}", count, re.ASCII) or not 1 <= int(count) <= MAX_ANSWER:
        return [protocol.HISTORY_USAGE.format(most=MAX_ANSWER)]
    client.wait_applied()
    found = client.server.history.last(int(count))
    return [protocol.recalled(*line) for line in found] or [protocol.NOTHING_SAID]


@command("search")
def _search(client: Client, argument: str) -> list[str]:
    if not argument:
        raise Usage
    client.wait_applied()
    try:
        found, limit = client.server.history.search(argument, protocol.REPLAY), ""
    except TookTooLong as error:
        found, limit = error.found, protocol.answer(str(error))
    lines = [protocol.recalled(*line) for line in found]
    if limit:
        lines.append(limit)
    return lines or [protocol.nobody_said(argument)]


@command("quit")
def _quit(client: Client, argument: str) -> None:
    raise Farewell("/quit", protocol.BYE, for_good=True)


# What operators do.  Whether somebody is one is looked at here so that they are told before
# any slip of theirs, and again by the room when it comes to it.

OPERATORS_ONLY = frozenset({"kick", "ban", "unban", "bans"})


@command("op")
def _op(client: Client, argument: str) -> list[str] | None:
    if not argument:
        raise Usage
    if client.server.op_password.text is None:
        return [protocol.NO_OPERATORS]
    if client.wrong_passwords >= TRIES:
        client.server.refusals.add("too many operator passwords")
        return [protocol.NO_MORE_OP_TRIES]
    if not client.gives_op_password(argument):
        client.wrong_passwords += 1
        log.warning("%s gave a wrong operator password", client)
        client.server.refusals.add("a wrong operator password")
        client.gate.pause(WRONG_DELAY)
        return [protocol.WRONG_PASSWORD]
    client.promote()
    return None


@command("kick")
def _kick(client: Client, argument: str) -> None:
    name, reason = _first(argument)
    client.request(Kicked(client.session, _find(client, name).number, reason))


@command("ban")
def _ban(client: Client, argument: str) -> None:
    name, rest = _first(argument)
    minutes, _, reason = rest.partition(" ")
    if not re.fullmatch(r"[1-9]\d{0,6}", minutes, re.ASCII):
        if re.match(r"-?\d", minutes):
            raise Usage
        minutes, reason = "", rest
    now = client.server.broadcaster.entries.now()
    until = now + 60 * int(minutes) if minutes else 0.0
    name = protocol.check_name(name)
    client.request(Banned(client.session, name, until, reason.strip(), now))


@command("unban")
def _unban(client: Client, argument: str) -> None:
    if not argument:
        raise Usage
    client.request(Unbanned(client.session, argument))


@command("bans")
def _bans(client: Client, argument: str) -> None:
    client.request(Asked(client.session, "bans"))


# --- Histories: memory, then file ---------------------------------------------


class HistoryError(Exception):
    """The file cannot be the history; the text says why and what to do."""


class NotStored(Exception):
    """The history's file takes no more; nothing of what was to be appended has a position."""


class NotReadable(Exception):
    """The history cannot be read, or not any more."""


class TookTooLong(Exception):
    """A search has reached its limit of time.

    `found` is what it has found by then, as `search` returns it, and the text tells
    how far back it has looked.
    """

    def __init__(self, found: list[Recalled], since: float | None) -> None:
        super().__init__(protocol.searched_back_to(since))
        self.found = found


class Recalled(NamedTuple):
    """A line of the history as /history and /search tell of it."""

    time: float  # seconds since the epoch
    line: str


class SearchedPage(NamedTuple):
    """What a search found in a few lines that stand together."""

    start: int  # the position of the first of them
    since: float  # when that was said
    found: list[Recalled]  # the newest first


def _block(lines: list[bytes]) -> bytes:
    """Return lines as they are sent, each with its newline."""
    return b"\n".join([*lines, b""])


class History:
    """The room's lines in order, each at an absolute position.

    Positions only grow.  The last `retained` lines can be read again.  The
    broadcaster appends; any thread reads.  Lines have no newline here; what `read`
    returns is to be sent, and has.

    `on_waiting` is called in the broadcaster's thread, inside `append`: with True when
    another program has kept a file locked for `TELL_WAITING` seconds, with False when
    that wait is over.  `on_failure` is called once if the room cannot go on.
    """

    durable = False  # `append` waits for the disk
    failure = ""  # why the room cannot go on; set once, before the server ends for it

    def __init__(self, fmt: str = protocol.FORMAT, retained: int = RETAINED) -> None:
        self.fmt = fmt
        self.retained = retained
        self._lock = threading.Lock()  # guards the next three, which the broadcaster changes
        # A history that starts empty starts at the milliseconds of the clock, so
        # that no position is given twice, across restarts too.
        self.first = int(time.time() * 1000)
        self._lines: list[bytes] = []
        self._times: list[float] = []
        # Chunks as they are sent; what stands at a position never changes.
        self._joined = functools.lru_cache(retained // CHUNK + 2)(self._join)
        self.on_waiting: Callable[[bool], None] = lambda waiting: None
        self.on_failure: Callable[[], None] = lambda: None
        self._searching = threading.Lock()  # held by the one search that runs
        self._ending = threading.Event()  # nothing waits here any more

    @property
    def end(self) -> int:
        """The position of the next line."""
        return self.first + len(self._lines)

    @property
    def oldest(self) -> int:
        """The first position that can be had, if not by `read` then by `fetch`."""
        return self.first

    def start_for(self, position: int, end: int) -> int:
        """Return where a reader starts that asks for all from `position` on, before `end`.

        A position beyond the end was given by another history, such as that of a room
        whose clock was ahead: what this one holds is all new to such a reader.
        """
        if position > end:
            position = end - self.retained
        return min(end, max(self.oldest, position))

    def append(
        self,
        lines: list[bytes],
        bans: Sequence[Ban] | None = None,
        turns: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Give lines their positions, and keep a changed list of bans; raise `NotStored`.

        On several machines the lines from each of `turns` on have the time that stands there.
        """
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

    def fetch(self, position: int, end: int) -> tuple[int, list[bytes]]:
        """Return lines that are not in memory any more; it may take its time.

        They begin at the position that is returned, at `position` if that line is still
        there, and none is missing between them.  Without any, it is `end`.  Raise
        `NotReadable`.
        """
        return end, []

    def last(self, count: int) -> list[Recalled]:
        """Return the last `count` lines, the newest last; raise `NotReadable`."""
        with self._lock:
            lines, times = self._lines[-count:], self._times[-count:]
        return [Recalled(*row) for row in zip(times, self._decoded(lines), strict=True)]

    def search(self, word: str, count: int) -> list[Recalled]:
        """Return the last `count` lines that have `word` in them, in any case, the newest last.

        It counts in a name or in what was said, not across both.  One search runs at a
        time, and only searches wait for it; after `SEARCH_LIMIT` seconds, the wait
        included, raise `TookTooLong`.  Raise `NotReadable` when the history ends.
        """
        deadline = time.monotonic() + SEARCH_LIMIT
        if not self._searching.acquire(timeout=SEARCH_LIMIT):
            raise TookTooLong([], None)
        try:
            return self._search_until(deadline, word.lower(), count)
        finally:
            self._searching.release()

    def _search_until(self, deadline: float, word: str, count: int) -> list[Recalled]:
        """Look for a lower-case word, page by page, from the newest line back."""
        found: list[Recalled] = []
        end, since = self.end, None  # so far back it has looked
        while end > self.oldest and len(found) < count:
            # Meanwhile whoever else wants the interpreter has it.
            if self._ending.wait(SEARCH_REST):
                raise NotReadable("the history ends")
            if since is not None and time.monotonic() >= deadline:
                raise TookTooLong(found[::-1], since)
            page = self._search_before(end, word)
            found += page.found[: count - len(found)]
            end, since = page.start, page.since
        return found[::-1]

    def _search_before(self, end: int, word: str) -> SearchedPage:
        """Look for a lower-case word in the lines of one chunk before `end`, all at once."""
        with self._lock:
            start = max(self.first, (end - 1) // CHUNK * CHUNK)
            lines = self._lines[start - self.first : max(0, end - self.first)]
            times = self._times[start - self.first : max(0, end - self.first)]
        since = times[0] if times else 0.0
        if word not in _block(lines).decode(self.fmt).lower():
            return SearchedPage(start, since, [])
        rows = zip(reversed(times), self._decoded(reversed(lines)), strict=True)
        return SearchedPage(start, since, [Recalled(*row) for row in rows if _has(row[1], word)])

    def _decoded(self, lines: Iterable[bytes]) -> Iterator[str]:
        return (line.decode(self.fmt) for line in lines)

    def bans(self) -> list[Ban]:
        """Return the bans that were kept."""
        return []

    def give_up(self) -> None:
        """Have nothing wait here any more: end all searches, and an `append` that waits.

        For any thread, at any time.
        """
        self._ending.set()

    def close(self) -> None:
        """End the history, within about a second; nothing is appended any more."""
        self.give_up()


def _has(line: str, word: str) -> bool:
    """Tell whether a lower-case word is in the name or in the text of a line."""
    return word in line.lower() and any(word in part.lower() for part in protocol.parts(line)[1:])


def open_history(where: str | None, fmt: str) -> History:
    """Return the history that an option names; raise `HistoryError`."""
    if where is None:
        return History(fmt)
    shared = where.startswith(("postgresql://", "postgres://"))
    return SharedHistory(where, fmt, RETAINED) if shared else FileHistory(where, fmt)


class FileHistory(History):
    """A history that is in a file before anybody sees it, and goes on there after a restart.

    The broadcaster's thread writes; who is behind, who asks for the last lines and who
    searches each have a connection of their own, so none holds up another.  Raise
    `HistoryError` when the file cannot be used.
    """

    durable = True

    def __init__(self, path: str, fmt: str = protocol.FORMAT, retained: int = RETAINED) -> None:
        super().__init__(fmt, retained)
        self._place = HeldFile(path)
        with contextlib.ExitStack() as opened:  # closed again should something fail
            opened.callback(self._place.leave)
            try:
                self._open(opened)
                self.bans()
            except (sqlite3.Error, OSError, NotReadable) as error:
                remedy = "choose another --history"
                raise HistoryError(f"cannot use {self._place.path}: {error}; {remedy}") from None
            opened.pop_all()

    def _open(self, opened: contextlib.ExitStack) -> None:
        """Look at the file, then open it once for each kind of work."""
        first, last = _check_file(self._place, self.fmt)
        self._writer = Writer(
            self._place, self.fmt, self._ending, lambda waiting: self.on_waiting(waiting)
        )
        opened.callback(self._writer.close, 0.0)
        self._readers = Readers(*(Access(_read_only(self._place.path)) for _ in range(3)))
        for reader in self._readers:
            opened.callback(reader.close, 0.0)
        self._place.hold_log()
        if last is not None:
            self.first = last + 1
        self._oldest = self.first if first is None else first

    @property
    def oldest(self) -> int:
        """The first position in the file."""
        return self._oldest

    def append(
        self,
        lines: list[bytes],
        bans: Sequence[Ban] | None = None,
        turns: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Commit lines to the file, then give them their positions."""
        if lines or bans is not None:
            self._writer.store(self.end, lines, bans)
            super().append(lines)

    def fetch(self, position: int, end: int) -> tuple[int, list[bytes]]:
        """Return at most `PAGE` lines from the file, up to one that is missing there."""
        rows = self._readers.pages.rows(
            "SELECT position, time, kind, name, text FROM lines"
            " WHERE position >= ? AND position < ? ORDER BY position LIMIT ?",
            (position, end, PAGE),
        )
        kept = {place: line.line.encode(self.fmt) for place, line in self._sound(rows)}
        if not kept:
            return (rows[-1][0] + 1 if rows else end), []
        start = min(kept)
        whole = itertools.takewhile(kept.__contains__, itertools.count(start))
        return start, [kept[place] for place in whole]

    def last(self, count: int) -> list[Recalled]:
        """Return the last `count` lines of all that was ever said."""
        rows = self._readers.questions.rows(
            "SELECT position, time, kind, name, text FROM lines ORDER BY position DESC LIMIT ?",
            (count,),
        )
        return [line for _, line in self._sound(reversed(rows))]

    def _search_before(self, end: int, word: str) -> SearchedPage:
        """Look for a lower-case word in one page of the file before `end`, all at once.

        A LIKE of SQLite takes minutes for some words, and any statement over the whole
        file keeps its log from being taken over.
        """
        [[start, since, block]] = self._readers.searches.rows(
            "SELECT min(position), min(time), group_concat(name || char(10) || text, char(10))"
            " FROM (SELECT position, time, name, text FROM lines"
            " WHERE position < ? ORDER BY position DESC LIMIT ?)",
            (end, SEARCH_PAGE),
        )
        if start is None:
            return SearchedPage(self.oldest, 0.0, [])
        if word not in block.lower():
            return SearchedPage(start, since, [])
        rows = self._readers.searches.rows(
            "SELECT position, time, kind, name, text FROM lines"
            " WHERE position >= ? AND position < ? ORDER BY position DESC",
            (start, end),
        )
        rows = [row for row in rows if word in f"{row[3]}\n{row[4]}".lower()]
        return SearchedPage(start, since, [line for _, line in self._sound(rows)])

    def _sound(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Recalled]]:
        """Give the positions and the lines of those rows that a server wrote: not the damaged."""
        for position, when, kind, name, text in rows:
            with contextlib.suppress(ValueError, TypeError):
                line = str(Line(Kind(kind), name, text))
                line.encode(self.fmt)
                if 0 <= when < MAX_TIME and not CONTROL.search(line):
                    yield position, Recalled(when, line)

    def bans(self) -> list[Ban]:
        """Return the bans that the file has."""
        rows = self._readers.questions.rows("SELECT name, address, by, until, reason FROM bans")
        return [Ban(*row) for row in rows]

    def close(self) -> None:
        """Close the file, whole in itself, and let another server have it."""
        super().close()
        deadline = time.monotonic() + CLOSE_LIMIT
        # Readers first: the last to close removes the log, and a reader cannot.  SQLite sees
        # itself whether the file was moved, and then leaves alone what has the log's name.
        for access in (*self._readers, self._writer):
            access.close(deadline)
        self._place.leave()


class HeldFile:
    """The history's file and the log beside it: ours alone, and still where they were.

    SQLite writes on into a file that was moved or removed, and nobody will find there
    what was said; a lock alone stays with the file, so it would let a second server
    begin on a copy.  Made and left by who owns the history; the broadcaster looks.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        real = os.path.realpath(path)  # where SQLite puts what belongs to the file
        self._wal, self._index = f"{real}-wal", f"{real}-shm"
        self._held = [_lock_file(self.path)]
        self._files: dict[str, tuple[int, int]] = {}  # device and inode of each by its name
        try:
            if os.path.exists(self._wal):  # a server runs, if on another file, or was killed
                os.close(_lock_file(self._wal))
        except BaseException:
            self.leave()
            raise

    def head(self) -> bytes:
        """Return the first bytes of the file, by which it is known."""
        os.lseek(self._held[0], 0, os.SEEK_SET)
        return os.read(self._held[0], len(MAGIC))

    def hold_log(self) -> None:
        """Hold the log too, now that SQLite has made it, and remember which files they are."""
        self._held.append(_lock_file(self._wal))
        for path, held in zip((self.path, self._wal), self._held, strict=True):
            self._files[path] = _identity(os.fstat(held))
        self._files[self._index] = _identity(os.stat(self._index))
        try:
            self.check()
        except NotStored as error:
            raise HistoryError(str(error)) from None

    def check(self) -> None:
        """Raise `NotStored` when one of the files is not in its place."""
        for path, identity in self._files.items():
            try:
                found = _identity(os.stat(path))
            except FileNotFoundError:
                raise NotStored(f"{path} was moved or removed; put it back") from None
            except OSError as error:
                raise NotStored(f"{path} is out of reach: {error.strerror}") from None
            if found != identity:
                raise NotStored(f"{path} was replaced by another; put it back")

    def leave(self) -> None:
        """Let another server have the file; the last that happens to it.

        Closing a descriptor of a file lets go of SQLite's own locks on it.
        """
        for held in self._held:
            os.close(held)


def _lock_file(path: str) -> int:
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


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


class Access:
    """A connection to the file, for one thread at a time.

    Closing one while a thread is inside crashes the interpreter, so `close` interrupts
    who is inside and waits; it rather leaves a connection open.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._lock = threading.Lock()  # held by who is inside

    @contextlib.contextmanager
    def inside(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread; a closed one raises `sqlite3.Error`."""
        with self._lock:
            yield self._database

    def rows(self, statement: str, values: Sequence[int] = ()) -> list[tuple[Any, ...]]:
        """Return all rows that a statement gives; raise `NotReadable`."""
        try:
            with self.inside() as database:
                return database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise NotReadable(str(error)) from error

    def close(self, deadline: float, last: str = "") -> None:
        """End what runs, execute a last statement and close; nobody gets inside any more."""
        while not self._lock.acquire(timeout=LOCK_STEP):
            self._database.interrupt()
            if time.monotonic() >= deadline:
                log.error("the history's disk does not answer; its file is left open")
                return
        try:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute(last)
            self._database.close()
        finally:
            self._lock.release()


class Readers(NamedTuple):
    """The connections of those who only read the file, so that none holds up another."""

    pages: Access
    questions: Access
    searches: Access


class Writer:
    """Puts the room's lines into the file; the broadcaster's thread alone stores."""

    def __init__(
        self, place: HeldFile, fmt: str, ending: threading.Event, on_waiting: Callable[[bool], None]
    ) -> None:
        database = sqlite3.connect(
            place.path, timeout=1, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(database, fmt)
        except BaseException:
            database.close()
            raise
        self._access = Access(database)
        self._place = place
        self._fmt = fmt
        self._ending = ending  # no wait for other programs any more
        self._on_waiting = on_waiting
        self._refused: int | None = None  # from here on, lines that must not stay in the file

    def store(self, position: int, lines: list[bytes], bans: Sequence[Ban] | None) -> None:
        """Commit lines from `position` on, and a changed list of bans; raise `NotStored`."""
        self._place.check()
        try:
            with self._access.inside() as database:
                try:
                    self._begin(database)
                    self._take_back(database)
                    self._insert(database, position, lines)
                    if bans is not None:
                        database.execute("DELETE FROM bans")
                        database.executemany("INSERT INTO bans VALUES (?, ?, ?, ?, ?)", bans)
                    database.execute("COMMIT")
                    self._refused = None
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        database.rollback()
                    raise
                self._confirm(database, position)
        except sqlite3.Error as error:
            raise NotStored(str(error)) from error

    def _begin(self, database: sqlite3.Connection) -> None:
        """Begin to write, however long another program keeps the file locked.

        SQLite's own wait could neither be told of nor ended.
        """
        since, told = time.monotonic(), False
        try:
            while not _try_to_begin(database):
                if self._ending.wait(LOCK_STEP):
                    raise NotStored("another program keeps the file locked")
                self._place.check()
                if not told and time.monotonic() - since >= TELL_WAITING:
                    told = True
                    self._on_waiting(True)
        finally:
            if told:
                self._on_waiting(False)

    def _insert(self, database: sqlite3.Connection, position: int, lines: list[bytes]) -> None:
        """Insert lines many at a time: each statement releases the interpreter's lock once."""
        now = time.time()
        for first in range(0, len(lines), ROWS):
            some = lines[first : first + ROWS]
            values: list[int | float | str] = []
            text = b"\n".join(some).decode(self._fmt)
            for place, parts in enumerate(protocol.parts_of_each(text), position + first):
                values += (place, now, *parts)
            rows = ", ".join(["(?, ?, ?, ?, ?)"] * len(some))
            database.execute(f"INSERT INTO lines VALUES {rows}", values)

    def _confirm(self, database: sqlite3.Connection, position: int) -> None:
        """See that the file was in its place until the commit, or take the lines out again.

        Refused to their authors, they must not be there when the file is put back.
        """
        try:
            self._place.check()
        except NotStored:
            self._refused = position
            with contextlib.suppress(sqlite3.Error):  # then with the next lines
                self._take_back(database)
            raise

    def _take_back(self, database: sqlite3.Connection) -> None:
        """Take out the lines that were refused to their authors after they were committed."""
        if self._refused is not None:
            database.execute("DELETE FROM lines WHERE position >= ?", (self._refused,))
            if not database.in_transaction:
                self._refused = None

    def close(self, deadline: float) -> None:
        """Take the log over into the file, also if another program has it open, and close."""
        self._access.close(deadline, "PRAGMA wal_checkpoint(TRUNCATE)")


def _try_to_begin(database: sqlite3.Connection) -> bool:
    """Begin to write, or tell that another program does."""
    try:
        database.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False
    return True


# What stands in the file.

MAGIC = b"SQLite format 3\0"
APPLICATION = 0x43686174  # "Chat", in the file's header
VERSION = 1
MAX_TIME = 2**35  # seconds, some thousand years: what a clock may say and `gmtime` takes
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # stands in no line of a room
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


def _read_only(path: str) -> sqlite3.Connection:
    uri = pathlib.Path(path).as_uri()
    return sqlite3.connect(f"{uri}?mode=ro", timeout=1, uri=True, check_same_thread=False)


def _check_file(place: HeldFile, fmt: str) -> tuple[int | None, int | None]:
    """Return the first and the last position in a file, if it has any.

    Raise `HistoryError` unless this version can go on with it.  It is looked at without
    a right to write, so that what is not ours stays as it is, and at its ends alone, so
    that a large file takes no longer than a small one.
    """
    head = place.head()
    if not head:
        return None, None
    with contextlib.closing(_read_only(place.path)) as database:
        try:
            if head == MAGIC and _is_unfinished(database):
                return None, None
            _check_header(place.path, database, fmt)
            for table in ("lines", "bans"):
                database.execute(f"SELECT * FROM {table} ORDER BY rowid DESC LIMIT 100").fetchall()
            # Both in one SELECT would look at every line.
            ends = "SELECT (SELECT min(position) FROM lines), (SELECT max(position) FROM lines)"
            first, last = database.execute(ends).fetchone()
        except sqlite3.OperationalError:
            raise  # locked, or out of reach
        except sqlite3.DatabaseError as error:
            why = f"{place.path} is damaged or no history: {error}"
            raise HistoryError(f"{why}; choose another") from None
    return first, last


def _is_unfinished(database: sqlite3.Connection) -> bool:
    """Tell whether a server ended here before it had made a history."""
    tables, application = database.execute(
        "SELECT (SELECT count(*) FROM sqlite_master), application_id FROM pragma_application_id"
    ).fetchone()
    return not tables and not application


def _check_header(path: str, database: sqlite3.Connection, fmt: str) -> None:
    application, version = database.execute(
        "SELECT application_id, user_version FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if application != APPLICATION:
        raise HistoryError(f"{path} is the file of another program; choose another")
    if version > VERSION:
        raise HistoryError(f"{path} was written by a newer version; use that one")
    formats = [row[0] for row in database.execute("SELECT format FROM room")]
    if len(formats) != 1 or formats[0] not in protocol.FORMATS:
        raise HistoryError(f"{path} is damaged: it does not tell its format")
    if formats[0] != fmt and fmt == protocol.FORMAT:
        raise HistoryError(f"{path} is in {formats[0]}; start with --format {formats[0]}")


def _prepare(database: sqlite3.Connection, fmt: str) -> None:
    """Make a file that was checked ready to be written to."""
    if database.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
        raise sqlite3.OperationalError("its disk cannot keep a log beside it")
    database.execute("PRAGMA synchronous=FULL")
    if not database.execute("PRAGMA application_id").fetchone()[0]:
        database.executescript(
            f"BEGIN; PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION};"
            f" {SCHEMA} INSERT INTO room VALUES ('{fmt}'); COMMIT;"
        )
    if database.execute("SELECT format FROM room").fetchone() != (fmt,):
        database.execute("UPDATE room SET format = ?", (fmt,))
    database.execute("PRAGMA busy_timeout=0")  # the waiting is ours from here on


# --- Several machines --------------------------------------------------------

# Servers with one history are one room: what is handed in to any of them stands in one
# log, in rounds, and each applies what it has read back from there, in that order.  A
# simulation of this (tests/test_simulation.py) fails with any of its rules left out.
# Whoever runs one server alone does not come here, and imports nothing for it.


class Over(Exception):
    """This server's part in the log is over; it enters anew, from the newest point."""


class Forked(Exception):
    """What the database has is not what was read there before; nothing goes on from here."""


class Row(NamedTuple):
    """A round as the log has it."""

    number: int
    time: float  # the database's, in seconds since the epoch
    server: int
    batch: int  # the server's own count of its rounds
    entries: str


class Append(NamedTuple):
    """What a server asks of the log: to have a round of its own, once, and all before it."""

    server: int
    batch: int
    entries: str
    after: int  # the rows behind this number are wanted


_SHARED_KINDS: tuple[type[Any], ...] = (
    Said, Claim, Whispered, Renamed, Left, Lost, Promoted, Kicked, Banned, Unbanned,
    Entered, Ended, Got,
)  # fmt: skip
_TAGS = {kind: tag for tag, kind in enumerate(_SHARED_KINDS)}  # as they stand in the log
# One that is in neither would be applied on one server alone.
assert {*_SHARED_KINDS, Passed, Turn, Restored, Noted, Asked, Answered} == {*Room._VERBS}


def is_shared(entry: Entry) -> bool:
    """Tell whether an entry concerns all servers, and not just one client of one."""
    return type(entry) in _TAGS


def _session(entry: Entry) -> int:
    return getattr(entry, "session", 0)


def undated(entry: Any) -> Any:
    """Return an entry without a time of this machine's: it will be the log's."""
    if isinstance(entry, Banned) and entry.until:
        entry = entry._replace(until=entry.until - entry.time)  # from the time that it will have
    return entry._replace(time=0.0) if hasattr(entry, "time") else entry


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _parsed(text: str) -> Any:
    import json

    return json.loads(text)


def encode_entries(entries: Iterable[Any]) -> str:
    """Return entries as a row has them."""
    rows: list[list[Any]] = []
    for entry in entries:
        fields = [_TAGS[type(entry)], *entry]
        if type(entry) is Said:  # as nearly all are
            fields[2] = b"\n".join(entry.lines).decode("utf-8")
        rows.append(fields)
    return _json(rows)


def decode_entries(text: str) -> list[Any]:
    """Return the entries of a row."""
    entries: list[Any] = []
    rows = _parsed(text)
    if not isinstance(rows, list):
        raise ValueError("not a list")
    for tag, *fields in rows:
        kind = _SHARED_KINDS[tag]
        if kind is Said:
            fields[1] = fields[1].encode("utf-8").split(b"\n")
        elif kind is Claim:
            fields[1] = Introduction(*fields[1])
        entries.append(kind(*fields))
    return entries


def _entries(row: Row) -> list[Any]:
    """Return the entries of a row; raise `HistoryError` if it cannot be read."""
    try:
        return decode_entries(row.entries)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise HistoryError(
            f"round {row.number} of the history cannot be read; use the version that wrote it,"
            " or restore the database from a backup"
        ) from None


class Follower:
    """One server's part in the log: what to append, and what of it to apply next.

    No connection, thread or clock.  The way of a part: `begin` its first round, which
    says that the server enters; when that is in the log, `start` from the newest point;
    then apply what `answered` and `heard` give, and begin the next round when
    `is_free`.  Each name is used for one part only.
    """

    def __init__(self, server: int, former: int = 0) -> None:
        self.server = server
        self.number: int | None = None  # of the last row that was given to be applied
        self._last: tuple[int, int] | None = None  # its server and batch
        self._batch = 0
        self._under_way: list[Handed] | None = None  # our round, until it is read back
        self._text = ""  # of that
        self._is_current = False  # a round of ours is committed on this connection
        self.begin([Handed(Entered(server, former))])

    @property
    def is_free(self) -> bool:
        """Whether the last round was read back, so that another may begin."""
        return self._under_way is None

    @property
    def under_way(self) -> list[Handed]:
        """What stands in the last round, until that is read back."""
        return self._under_way or []

    @property
    def request(self) -> Append:
        """What to ask of the log, again and again until it answers: always the very same.

        On a new connection an empty round will do.  The last row that was applied is
        wanted there once more.
        """
        if self.number is None:
            after = MAX_NUMBER  # what is before it comes with the point
        else:
            after = self.number if self._is_current else self.number - 1
        return Append(self.server, self._batch, self._text, after)

    def begin(self, handed: list[Handed]) -> None:
        """Have a next round; what concerns clients of ours alone stands in it, not in the log."""
        assert self.is_free
        self._batch += 1
        self._under_way = [one._replace(entry=undated(one.entry)) for one in handed]
        shared = (one.entry for one in self._under_way if is_shared(one.entry))
        self._text = encode_entries(shared)

    def connected(self) -> None:
        """Know that what comes next comes on a new connection, maybe from another database.

        Nothing read there counts before a round of ours is committed there: it is not,
        where nobody follows any more.
        """
        self._is_current = False
        if self.is_free:
            self.begin([])

    def start(self, number: int, rows: list[Row]) -> list[Handed]:
        """Follow from a point on, with the rows behind it, read together after `Entered` was in."""
        self.number, self._is_current = number, True
        handed = self._next(rows)
        self._under_way = None  # the point may have it already
        return handed

    def answered(self, rows: list[Row]) -> list[Handed]:
        """Return what to apply of the rows that came with the end of our round.

        Raise `Over` or `Forked`.
        """
        assert self.number is not None
        if not rows or max(row.number for row in rows) <= self.number:
            raise Forked  # our own stands before what was read already
        if not self._is_current and rows[0].number == self.number:
            if self._last not in (None, rows[0][2:4]):
                raise Forked
            rows = rows[1:]
        self._is_current = True
        return self._next(rows)

    def heard(self, rows: list[Row]) -> list[Handed]:
        """Return what to apply of rows that others have appended; raise `Over`."""
        return self._next(rows) if self._is_current and self.number is not None else []

    def abandoned(self) -> list[Handed]:
        """Return what was under way, now that this part is over."""
        handed, self._under_way = self._under_way or [], None
        return [one for one in handed if one.is_ours]

    def _next(self, rows: list[Row]) -> list[Handed]:
        """Return what the rows that were not given yet say, in their order."""
        assert self.number is not None
        handed: list[Handed] = []
        rows = [row for row in rows if row.number > self.number]
        ours = (self.server, self._batch)
        # All of them first: what is missing or cannot be read must not take a round of ours along.
        if any(row.number != number for number, row in enumerate(rows, self.number + 1)):
            raise Over  # it was trimmed away
        read = [[] if row[2:4] == ours else _entries(row) for row in rows]
        for row, entries in zip(rows, read, strict=True):
            handed.append(Handed(Turn(row.server, row.time, row.number)))
            if row[2:4] == ours:
                handed += self._under_way or ()
                self._under_way = None
            handed += map(Handed, entries)
            self.number, self._last = row.number, (row.server, row.batch)
        return handed


class Away(Exception):
    """The database gives no answer that counts; what was asked may be done or not."""


class Database:
    """A connection to whichever of a database's hosts answers; for one thread at a time.

    It waits for no answer longer than it is told to, which the driver's own calls cannot
    promise: what waits for a standby is ended by nothing but the end of the connection.
    """

    def __init__(self, address: str) -> None:
        try:
            import psycopg.conninfo  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise HistoryError(
                "a history in PostgreSQL needs psycopg: pip install 'psycopg[binary]'"
            ) from None
        self._pq: Any = psycopg.pq
        self._error: type[Exception] = psycopg.Error
        conninfo: Any = psycopg.conninfo
        try:
            options = conninfo.conninfo_to_dict(address)
            hosts = _hosts(_completed(self._pq, options, conninfo.make_conninfo))
        except (self._error, ValueError):  # of which nothing is shown: it may be a password
            raise HistoryError(
                "--history is not an address; write it as postgresql://HOST,HOST:PORT/DATABASE,"
                " without a password and with % and its like as %25"
            ) from None
        if options.get("password") or options.get("sslpassword"):
            raise HistoryError(
                "leave the password out of --history, where all can see it on this machine;"
                " PostgreSQL takes it from a file, PGPASSFILE or ~/.pgpass"
            )
        self._link: Any = None
        self._is_cancelled = False  # the server has warned that a wait for a standby was ended
        self._conninfo = conninfo.make_conninfo
        self._hosts = hosts
        self._lookups: dict[str, Lookup] = {}  # the last of each name
        self._tried = 0  # hosts, ever
        where = ",".join(host["host"] or host["hostaddr"] or "localhost" for host in hosts)
        self.shown = f"postgresql://{where}/{options.get('dbname', '')}"

    @property
    def hosts(self) -> int:
        """How many there are to try."""
        return len(self._hosts)

    def connect(self, seconds: float, tick: Callable[[], None] = lambda: None) -> None:
        """Connect to the next host; raise `Away`."""
        self.close()
        deadline = time.monotonic() + seconds
        tried, number = divmod(self._tried, len(self._hosts))
        self._tried += 1
        host = self._located(self._hosts[number], tried, deadline, tick)
        with self._failing():
            self._link = link = self._pq.PGconn.connect_start(self._conninfo(**host).encode())
            polling = self._pq.PollingStatus
            state = polling.WRITING
            while state != polling.OK:
                if state == polling.FAILED:
                    raise Away(self._failure())
                self._wait(deadline, tick, writable=state == polling.WRITING)
                state = link.connect_poll()
            link.nonblocking = 1
            link.notice_handler = self._note
        self.execute("SET synchronous_commit = on", seconds=seconds)
        self.execute("SET client_min_messages = warning", seconds=seconds)  # for `_note`
        # What was given up must not go on waiting there: a standby that is away for an hour
        # would have used up all connections by then.
        self.execute(f"SET lock_timeout = {int(UNANSWERED * 1000)}", seconds=seconds)
        self.execute("SET default_transaction_isolation = 'read committed'", seconds=seconds)

    def reach(self, seconds: float, tick: Callable[[], None] = lambda: None) -> None:
        """Connect to the next host that answers, each tried once; raise `Away`."""
        for left in reversed(range(self.hosts)):
            try:
                self.connect(seconds, tick)
                break
            except Away:
                tick()
                if not left:
                    raise

    def execute(
        self,
        statement: str,
        *values: object,
        seconds: float = UNANSWERED,
        tick: Callable[[], None] = lambda: None,
    ) -> list[tuple[str, ...]]:
        """Have one statement done and return its rows; raise `Away`.

        `tick` is called now and then while it waits.
        """
        deadline = time.monotonic() + seconds
        self._is_cancelled = False
        link = self._link
        if link is None:
            raise Away("there is no connection")
        with self._failing():
            link.send_query_params(statement.encode(), [str(value).encode() for value in values])
            while unsent := link.flush():
                self._wait(deadline, tick, writable=bool(unsent))
                link.consume_input()
            results = []
            while True:
                while link.is_busy():
                    self._wait(deadline, tick)
                    link.consume_input()
                if (result := link.get_result()) is None:
                    break
                results.append(result)
        return self._rows(results)

    def take_notices(self) -> bool:
        """Tell whether somebody has appended since the last time; raise `Away`."""
        count = 0
        with self._failing():
            self._link.consume_input()
            while self._link.notifies():
                count += 1
        return count > 0

    def wait(self, waker: Waker, seconds: float) -> None:
        """Wait until the database or the waker has something to tell."""
        with self._failing(), selectors.DefaultSelector() as selector:
            selector.register(self._link.socket, selectors.EVENT_READ)
            selector.register(waker, selectors.EVENT_READ)
            selector.select(max(0.0, seconds))

    @property
    def process(self) -> str:
        """The number of the server's process, as it was told when connecting."""
        return str(self._link.backend_pid)

    @property
    def version(self) -> int:
        """The server's version, 150004 for 15.4."""
        return int(self._link.server_version)

    def close(self) -> None:
        """End the connection, whatever it waits for."""
        link, self._link = self._link, None
        if link is not None:
            link.finish()

    def _located(
        self, host: dict[str, Any], tried: int, deadline: float, tick: Callable[[], None]
    ) -> dict[str, Any]:
        """Return a host with its addresses, of which each is the first in turn; raise `Away`.

        The driver would keep the interpreter's lock for as long as no name server answers.
        """
        name = str(host.get("host", ""))
        if host.get("hostaddr") or not _is_looked_up(name):
            return host
        lookup = self._lookups.get(name)
        if lookup is None or lookup.is_done.is_set():
            self._lookups[name] = lookup = Lookup(name)
        while not lookup.is_done.wait(min(0.25, max(0.0, deadline - time.monotonic()))):
            tick()
            if time.monotonic() > deadline:
                raise Away(f"no name server says where {name} is")
        if not lookup.addresses:
            raise Away(f"nobody knows where {name} is")
        first = tried % len(lookup.addresses)
        addresses = lookup.addresses[first:] + lookup.addresses[:first]
        lists = {"host": name, "port": str(host["port"])}
        several = {key: ",".join([value] * len(addresses)) for key, value in lists.items()}
        return {**host, **several, "hostaddr": ",".join(addresses)}

    def _wait(self, deadline: float, tick: Callable[[], None], writable: bool = False) -> None:
        """Wait for the socket; raise `Away` at the deadline."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        with selectors.DefaultSelector() as selector:
            selector.register(self._link.socket, events)
            while not selector.select(min(0.25, max(0.0, deadline - time.monotonic()))):
                tick()
                if time.monotonic() > deadline:
                    raise Away("it does not answer")

    def _rows(self, results: list[Any]) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for result in results:
            if result.status not in (self._pq.ExecStatus.TUPLES_OK, self._pq.ExecStatus.COMMAND_OK):
                if result.error_field(self._pq.DiagnosticField.SQLSTATE) == OTHER_RULES.encode():
                    raise HistoryError(f"{self.shown} is used by another version; use that one")
                raise Away(_last_line(result.error_message.decode("utf-8", "replace")))
            for row in range(result.ntuples):
                values = (result.get_value(row, column) for column in range(result.nfields))
                rows.append(tuple((value or b"").decode() for value in values))
        if self._is_cancelled:
            raise Away("a wait for a standby was cancelled there")
        return rows

    def _note(self, notice: Any) -> None:
        """Know a cancelled wait, of whose commit a standby may know nothing, by who warns."""
        if notice.error_field(self._pq.DiagnosticField.SOURCE_FUNCTION) == b"SyncRepWaitForLSN":
            self._is_cancelled = True

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Raise `Away` for whatever the driver or the system says of a broken connection."""
        try:
            yield
        except (self._error, OSError, ValueError, KeyError):
            raise Away(self._failure()) from None

    def _failure(self) -> str:
        """Say what went wrong, in one line that has nothing secret in it."""
        if self._link is None:
            return "it cannot be reached"
        return _last_line(self._link.error_message.decode("utf-8", "replace"))


class Lookup:
    """The search for the addresses of a name, in a thread that the system ends when it will."""

    def __init__(self, name: str) -> None:
        self.addresses: list[str] = []  # found, when it is done
        self.is_done = threading.Event()
        try:
            threading.Thread(target=self._run, args=[name], name="lookup", daemon=True).start()
        except RuntimeError as error:
            raise Away(str(error)) from None

    def _run(self, name: str) -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            self.addresses = [*dict.fromkeys(str(address[0]) for *_, address in found)]
        except (OSError, UnicodeError):
            pass  # there are none
        finally:
            self.is_done.set()


def _is_looked_up(name: str) -> bool:
    """Tell whether a host is neither an address nor a socket's folder."""
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name[:1] not in ("", "/", "@")
    return False


def _hosts(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the options for each host of several; they are tried in turn, by us.

    Raise `ValueError` for what cannot be.
    """
    common = {
        "target_session_attrs": "read-write", "client_encoding": "UTF8", "connect_timeout": "5",
        "application_name": "chat",
    }  # fmt: skip
    keys = ("host", "hostaddr", "port")
    lists = {key: str(options.get(key) or "").split(",") for key in keys}
    if not all(port.isdecimal() for port in lists["port"] if port):
        raise ValueError("a port is a number")
    count = max(len(lists["host"]), len(lists["hostaddr"]))
    several = [values * count if len(values) == 1 else values for values in lists.values()]
    return [
        {**options, **common, "host": host, "hostaddr": address, "port": port or "5432"}
        for host, address, port in zip(*several, strict=True)
    ]


def _completed(pq: Any, options: dict[str, Any], conninfo: Callable[..., str]) -> dict[str, Any]:
    """Return options with the hosts that a service's file or the environment adds to them.

    The driver tells of those only with a connection, so one is begun that gets no further.
    """
    link = pq.PGconn.connect_start(conninfo(**{**options, "target_session_attrs": "?"}).encode())
    known = {option.keyword.decode(): option.val for option in link.info}
    link.finish()
    found = {key: (known[key] or b"").decode() for key in ("host", "hostaddr", "port")}
    return {**options, **found}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason was given"]
    return protocol.escape(lines[0].rpartition("FATAL:  ")[2].removeprefix("ERROR:  "), "utf-8")


MARK = "classic-chat"  # the comment on the tables' schema
RULES = 1  # the version of the tables, and of what a round does to a room
OTHER_RULES = "CH001"
NOT_WHOLE = "{} lacks a part of its tables; restore it from a backup"
TABLES = """
    CREATE SCHEMA chat;
    COMMENT ON SCHEMA chat IS 'classic-chat';
    CREATE TABLE chat.room (
        number bigint NOT NULL, touched bigint NOT NULL, rules int NOT NULL, format text NOT NULL
    ) WITH (fillfactor = 10);
    CREATE TABLE chat.servers (
        server bigint PRIMARY KEY, batch bigint NOT NULL, time double precision NOT NULL
    );
    CREATE TABLE chat.rounds (
        number bigint PRIMARY KEY, time double precision NOT NULL, server bigint NOT NULL,
        batch bigint NOT NULL, entries text NOT NULL
    );
    CREATE TABLE chat.points (
        number bigint PRIMARY KEY, time double precision NOT NULL, position bigint NOT NULL,
        state text NOT NULL
    );
    CREATE TABLE chat.lines (
        position bigint PRIMARY KEY, time double precision NOT NULL,
        kind text NOT NULL, name text NOT NULL, text text NOT NULL
    );
    CREATE FUNCTION chat.append(
        rules_ int, server_ bigint, batch_ bigint, entries_ text, after_ bigint
    ) RETURNS SETOF chat.rounds LANGUAGE plpgsql AS $$
    DECLARE
        last bigint;
        now_ double precision;
        added int := 0;
    BEGIN
        -- Whoever holds this row is alone, to the end of the commit: numbers have no gaps.
        SELECT number INTO last FROM chat.room WHERE rules = rules_ FOR UPDATE;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'another version of the rules' USING ERRCODE = 'CH001';
        END IF;
        now_ := extract(epoch FROM clock_timestamp());
        INSERT INTO chat.servers AS known VALUES (server_, batch_, now_)
            ON CONFLICT (server) DO UPDATE SET batch = batch_, time = now_
            WHERE known.batch < batch_;
        IF FOUND THEN
            added := 1;
            INSERT INTO chat.rounds VALUES (last + 1, now_, server_, batch_, entries_);
            PERFORM pg_notify('chat', '');
        END IF;
        -- Also what was there already is written for, so that its answer waits for the standby.
        UPDATE chat.room SET number = last + added, touched = touched + 1;
        RETURN QUERY SELECT * FROM chat.rounds WHERE rounds.number > after_ ORDER BY 1;
    END $$;
"""
READ_LINES = "SELECT position, time, kind, name, text FROM chat.lines"
READ_ROWS = "SELECT number, time, server, batch, entries FROM"


def prepare(database: Database, fmt: str) -> None:
    """Make the tables if they are not there; raise `HistoryError` if they are not ours."""
    try:
        database.reach(CONNECT)
        if database.version < 150_000:
            raise HistoryError(f"{database.shown} is older than PostgreSQL 15; use a newer one")
        if database.execute("SELECT pg_backend_pid()") != [(database.process,)]:
            raise HistoryError(f"{database.shown} is a pooler; name PostgreSQL's own address")
        database.execute("BEGIN")
        database.execute(f"SELECT pg_advisory_xact_lock({LOCK})")
        found = database.execute(
            "SELECT coalesce(obj_description(oid, 'pg_namespace'), '') FROM pg_namespace"
            " WHERE nspname = 'chat'"
        )
        if not found:
            _make_tables(database, fmt)
        elif found != [(MARK,)]:
            raise HistoryError(f"{database.shown} has a chat of another program; choose another")
        rooms = database.execute("SELECT rules, format FROM chat.room")
        if len(rooms) != 1 or not database.execute("SELECT 1 FROM chat.points LIMIT 1"):
            raise HistoryError(NOT_WHOLE.format(database.shown))
        [(rules, its_format)] = rooms
        [(encoding,)] = database.execute("SHOW server_encoding")
        database.execute("COMMIT")
    except Away as error:
        remedy = "see that PostgreSQL runs there and lets this program in"
        raise HistoryError(f"cannot use {database.shown}: {error}; {remedy}") from None
    finally:
        database.close()
    if encoding != "UTF8" and fmt != "ascii":
        raise HistoryError(f"{database.shown} is in {encoding}; make one WITH ENCODING 'UTF8'")
    if rules != str(RULES):
        raise HistoryError(f"{database.shown} is used by another version; use that one")
    if its_format != fmt:
        raise HistoryError(f"{database.shown} is in {its_format}; start with --format {its_format}")


def _make_tables(database: Database, fmt: str) -> None:
    # One statement at a time, as the protocol has it; the function is the last, and one.
    tables, create, function = TABLES.partition("CREATE FUNCTION")
    for statement in [*filter(str.strip, tables.split(";")), create + function]:
        database.execute(statement)
    database.execute("INSERT INTO chat.room VALUES (0, 0, $1, $2)", RULES, fmt)
    now = time.time()
    state = Room(int(now * 1000), durable=True).state()
    database.execute(
        "INSERT INTO chat.points VALUES (0, $1, $2, $3)", now, state["end"], _json(state)
    )


class Beginning(NamedTuple):
    """What a server goes on from: a point, what stands behind it, and the last lines."""

    server: int  # under which name
    number: int
    state: dict[str, Any]
    rows: list[Row]
    oldest: int
    lines: list[bytes]
    times: list[float]


class SharedHistory(History):
    """A history in a database that several servers have: the room is all of them.

    The broadcaster appends what is in the log already; a point puts it into a table, and
    only then may it leave memory.  Who is far behind and who searches is served from
    there.  Raise `HistoryError` when the database cannot be used.
    """

    def __init__(self, address: str, fmt: str = protocol.FORMAT, retained: int = RETAINED) -> None:
        super().__init__(fmt, retained)
        self.address = address
        # Under the lock, as all that was read from the log; 0 until it begins.
        self.first = self._oldest = 0
        self._kept = 0  # all before this position is in the table
        self._time = 0.0  # of the last round that has brought lines
        self._reader = Reader(address, lambda: self._kept, self._ending)
        prepare(Database(address), fmt)

    @property
    def oldest(self) -> int:
        """The first position in the table."""
        return self._oldest

    def begin(self, beginning: Beginning) -> None:
        """Go on from somewhere else; the broadcaster's."""
        with self._lock:
            end = beginning.state["end"]
            self.first, self._lines = end - len(beginning.lines), beginning.lines
            self._times, self._oldest, self._kept = beginning.times, beginning.oldest, end

    def append(
        self,
        lines: list[bytes],
        bans: Sequence[Ban] | None = None,
        turns: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Give lines their positions; where they are kept is the log."""
        with self._lock:
            self._lines += lines
            starts = [(0, self._time), *turns, (len(lines), 0.0)]
            for (start, when), (end, _) in itertools.pairwise(starts):
                self._times += [when] * (end - start)
                self._time = when
            excess = max(0, min(len(self._lines) - self.retained, self._kept - self.first))
            del self._lines[:excess], self._times[:excess]
            self.first += excess

    def is_full(self) -> bool:
        """Tell whether memory has more lines than it should that no point has."""
        return self.end - self._kept >= MAX_UNKEPT

    def kept_to(self, position: int) -> None:
        """Know that all before a position is in the table."""
        with self._lock:
            self._kept = max(self._kept, position)

    def between(self, position: int, end: int) -> list[list[Any]]:
        """Return lines as the table has them."""
        with self._lock:
            start = max(position, self.first)
            some = slice(start - self.first, end - self.first)
            rows = zip(self._times[some], self._lines[some], strict=True)
        return [
            [number, when, *protocol.parts(line.decode(self.fmt))]
            for number, (when, line) in enumerate(rows, start)
        ]

    def fetch(self, position: int, end: int) -> tuple[int, list[bytes]]:
        """Return at most `PAGE` lines from the table, as soon as the database answers."""
        while not self._ending.is_set():
            with contextlib.suppress(NotReadable):
                rows = self._reader.ask(
                    f"{READ_LINES} WHERE position >= $1 AND position < $2"
                    f" ORDER BY position LIMIT {PAGE}",
                    position,
                    end,
                )
                lines = [line.line.encode(self.fmt) for _, line in map(_recalled, rows)]
                return (int(rows[0][0]) if rows else end), lines
            self._ending.wait(AGAIN)
        raise NotReadable("the history ends")

    def last(self, count: int) -> list[Recalled]:
        """Return the last `count` lines of all that was ever said."""
        first = self.first
        found = super().last(count)
        if len(found) < count and first > self._oldest:
            rows = self._reader.ask(
                f"{READ_LINES} WHERE position < $1 ORDER BY position DESC LIMIT $2",
                first,
                count - len(found),
            )
            found = [line for _, line in map(_recalled, reversed(rows))] + found
        return found

    def _search_before(self, end: int, word: str) -> SearchedPage:
        """Look for a lower-case word in memory first, then page by page in the table."""
        if end > self.first:
            return super()._search_before(end, word)
        rows = self._reader.ask(
            f"{READ_LINES} WHERE position < $1 ORDER BY position DESC LIMIT {SEARCH_PAGE}", end
        )
        if not rows:
            return SearchedPage(self.oldest, 0.0, [])
        found = [line for _, line in map(_recalled, rows) if _has(line.line, word)]
        start, last = _recalled(rows[-1])
        return SearchedPage(start, last.time, found)

    def close(self) -> None:
        """Close the connection."""
        super().close()
        self._reader.close()


class Reader:
    """A connection for questions, kept between them; any thread, under its lock."""

    def __init__(self, address: str, kept: Callable[[], int], ending: threading.Event) -> None:
        self._database = Database(address)
        self._kept = kept  # up to which position the table has all lines
        self._ending = ending  # nobody waits any more
        self._lock = threading.Lock()  # guards the connection: one question at a time

    def ask(self, statement: str, *values: object) -> list[tuple[str, ...]]:
        """Return the rows that answer a question; raise `NotReadable`."""
        if not self._lock.acquire(timeout=UNANSWERED):
            raise NotReadable("it does not answer those who asked before")
        try:
            return _ask(self._database, statement, *values, tick=self._tick, check=self._check)
        except Away as error:
            raise NotReadable(str(error)) from None
        finally:
            self._lock.release()

    def _tick(self) -> None:
        if self._ending.is_set():
            raise Away("the server ends")

    def _check(self) -> None:
        """Raise `Away` for a former primary, which has not all that is in the table."""
        [(position,)] = self._database.execute(
            "SELECT max(position) FROM chat.points", seconds=UNANSWERED, tick=self._tick
        )
        if int(position or 0) < self._kept():
            raise Away("it is not the one that is followed here")

    def close(self) -> None:
        """Close the connection, when nobody asks."""
        with self._lock:
            self._database.close()


def _recalled(row: tuple[str, ...]) -> tuple[int, Recalled]:
    position, when, kind, name, text = row
    return int(position), Recalled(float(when), str(Line(Kind(kind), name, text)))


def _ask(
    database: Database,
    statement: str,
    *values: object,
    tick: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> list[tuple[str, ...]]:
    """Ask on a connection that is kept, or else on a new one to each host; raise `Away`.

    `check` raises it for a host that is not to be asked.
    """
    for left in reversed(range(database.hosts + 1)):
        try:
            if left < database.hosts:
                tick()
                database.connect(CONNECT, tick)
            check()
            return database.execute(statement, *values, seconds=UNANSWERED, tick=tick)
        except Away:
            if not left:
                database.close()
                raise
    raise AssertionError("there is a host")


class Arrival(NamedTuple):
    """Something for the broadcaster to apply, in its order."""

    handed: list[Handed]
    beginning: Beginning | None = None  # it goes on from there


class Confirmations:
    """Has the room know which private lines have come, as far as the network tells.

    All of it is the broadcaster's own.
    """

    def __init__(self, hand_in: Callable[[Handed], int]) -> None:
        self._hand_in = hand_in
        self._look_at = 0.0  # of the monotonic clock, when to look next
        self._confirmed: dict[int, int] = {}  # private lines under its key, by session

    def look_at(self, outputs: Iterable[Output]) -> None:
        """Hand in what is new, now and then."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + CONFIRM
        known, self._confirmed = self._confirmed, {}
        for output in [one for one in outputs if one.whispers]:
            confirmed = known.get(output.session, 0)
            has_more = output.whispers > confirmed and not output.data
            if has_more and output.connection.is_acknowledged():
                confirmed = output.whispers
                with contextlib.suppress(Gone):
                    self._hand_in(Handed(Got(output.session, confirmed)))
            self._confirmed[output.session] = confirmed


class Membership:
    """This server in the room that several have, and what is to do about it after a round.

    All of it is the broadcaster's own.
    """

    def __init__(self, broadcaster: Broadcaster, hand_in: Callable[[Handed], int]) -> None:
        self.name = 0  # under which this server is in the room; 0: it is not
        self.busy = 0  # the number of the last round in which anything happened
        self.served: list[Handed] = []  # of ours, in the round that is being applied
        self._broadcaster = broadcaster
        self._confirmations = Confirmations(hand_in)

    def end_round(self) -> list[Handed]:
        """Return what of ours was applied, and hand in which private lines have come."""
        self._confirmations.look_at(self._broadcaster.outputs.values())
        served, self.served = self.served, []
        return served

    def lost_name(self) -> int:
        """Return the name under which this server was in the room until just now, or 0."""
        if self.name in self._broadcaster.room.servers:
            return 0
        lost, self.name = self.name, 0
        return lost


class SharedLog(EntryLog):
    """The log of a room that several servers have: rounds in a database.

    What was handed in here goes there and comes back by the `Follower`'s thread.  What
    concerns only one client waits for what that client handed in before, and is applied
    at once if there is nothing.  Entries do not come back in the order of all, so their
    numbers say nothing.
    """

    def __init__(self, broadcaster: Broadcaster, history: SharedHistory, waker: Waker) -> None:
        super().__init__(Waker())  # wakes the thread that follows the log
        # Guarded by the lock.
        self._pending: Counter[int] = Counter()  # entries that wait or are under way, by session
        self._arrived: deque[Arrival] = deque()
        # What the room waits for, for longer than people can be left without a word.
        self._awaited: set[str] = set()
        self._is_over = False  # nobody applies anything any more
        # Set once.
        self._history = history
        self._room_waker = waker
        self._membership = Membership(broadcaster, self.hand_in)  # the broadcaster's own
        self._scribe = Scribe(self, self._waker, history)
        self._keeper = Keeper(self, broadcaster, history)

    # For any thread.

    def __len__(self) -> int:
        """Return how many entries wait to be applied."""
        with self._lock:
            return self._pending.total() + len(self._arrived)

    def hand_in(self, handed: Handed, gate: Gate | None = None) -> int:
        """Append an entry, as `EntryLog` does.

        Raise `Farewell` for who asks to come in while the database is away.
        """
        number = super().hand_in(handed, gate)
        if not is_shared(handed.entry):
            self._room_waker.wake()
        return number

    def _is_crowded(self, entry: Entry) -> bool:
        if self._is_turned_away(entry) or self._goes_at_once(entry):
            return False
        return super()._is_crowded(entry) or self._history.is_full()

    def _put(self, handed: Handed) -> int:
        entry = handed.entry
        if self._is_turned_away(entry):
            raise _no_admission()
        if self._goes_at_once(entry):
            self._arrived.append(Arrival([handed]))
            return 0
        self._pending[_session(entry)] += 1
        return super()._put(handed._replace(is_ours=True))

    def _is_turned_away(self, entry: Entry) -> bool:
        assert self._lock.locked()
        return type(entry) is Claim and bool(self._awaited)

    def _goes_at_once(self, entry: Entry) -> bool:
        assert self._lock.locked()
        return not is_shared(entry) and not self._pending[_session(entry)]

    def new_session(self) -> int:
        """Return the number of a connection that is new, here and on all servers."""
        return self._scribe.server << SERVER_BITS | super().new_session()

    def start(self) -> None:
        """Start following."""
        self._scribe.start()
        self._keeper.start()

    def stop(self) -> None:
        """Say that this server ends, if the database is there, and end the threads."""
        if self._scribe.stop():
            self._waker.close()
        with self._lock:
            self._is_over = True
            arrived, self._arrived = self._arrived, deque()
        self.drop([one for arrival in arrived for one in arrival.handed])
        self.drop(self.gather(is_due=True, most=math.inf) or [])
        self._keeper.stop()

    # For the broadcaster.

    def take(self) -> list[Handed]:
        """Return what has come, up to where the room goes on from somewhere else."""
        batch: list[Handed] = []
        first: Beginning | None = None
        with self._lock:
            while self._arrived and not (batch and self._arrived[0].beginning):
                handed, beginning = self._arrived.popleft()
                first = first or beginning
                batch += handed
        if first is not None:
            self._history.begin(first)
            self._membership.name = first.server
        number = 0
        for one in batch:
            if isinstance(one.entry, Turn):
                number = one.entry.number
            elif is_shared(one.entry):
                self._membership.busy = number
        self._membership.served += (one for one in batch if one.is_ours)
        return batch

    def end_round(self) -> None:
        """Count what was taken as done, and let those go on who wait for space."""
        self.forget(self._membership.end_round())
        if name := self._membership.lost_name():
            self._scribe.end_part(name)

    # For the threads that follow and keep, and at the end.

    @property
    def busy(self) -> int:
        """The number of the last round in which anything happened."""
        return self._membership.busy

    def gather(self, *, is_due: bool, most: float = MAX_ROUND) -> list[Handed] | None:
        """Return what is to be the next round; None if there need not be one.

        Of what has waited for long it is a part: the same round is asked for again and
        again, so it must not be one that is too large to be answered in time.
        """
        with self._lock:
            if not (self._handed or is_due):
                return None
            lines = count = 0
            while count < len(self._handed) and lines < most:
                lines += self._handed[count].lines
                count += 1
            handed, self._handed = self._handed[:count], self._handed[count:]
        return handed

    def deliver(self, *handed: Handed, beginning: Beginning | None = None) -> None:
        """Have the broadcaster apply what has come."""
        with self._lock:
            is_over = self._is_over
            if handed and not is_over:
                self._arrived.append(Arrival([*handed], beginning))
        if is_over:
            self.drop([*handed])
        elif handed:
            self._room_waker.wake()

    def forget(self, handed: list[Handed]) -> None:
        """Count entries of ours as done with, and let those go on who wait for space."""
        with self._lock:
            for one in handed:
                session = _session(one.entry)
                self._lines -= one.lines
                self._pending[session] -= 1
                if self._pending[session] <= 0:
                    del self._pending[session]
        self._ring_crowd()

    def kept_to(self, position: int) -> None:
        """Know that all before a position is in the table; let those go on who wait for that."""
        self._history.kept_to(position)
        self.forget([])

    def drop(self, handed: list[Handed]) -> None:
        """Let all know who wait for entries that are not applied any more."""
        self.forget(handed)
        for one in handed:
            if one.reserved is not None:
                one.reserved.remove(one.reserved_lines, one.size)
            if one.outcome is not None:
                is_claim = type(one.entry) is Claim
                one.outcome.verdict = Verdict(error=_no_admission() if is_claim else Gone())
                one.outcome.settle()

    def hold_up(self, what: str, claims: Iterable[Handed] = ()) -> None:
        """Tell people that the room waits for something; nobody comes in meanwhile.

        Of the `claims` that are under way nobody knows yet: who made them waits on.
        """
        with self._lock:
            is_new = not self._awaited
            self._awaited.add(what)
            turned_away = [one for one in self._handed if type(one.entry) is Claim]
            self._handed = [one for one in self._handed if type(one.entry) is not Claim]
        self.drop(turned_away)
        for output in filter(None, (claim.output for claim in claims)):
            with contextlib.suppress(OSError):  # nothing else is under way to them
                output.connection.send(_encoded(protocol.WAITING_AT_THE_DOOR))
        if is_new:
            self.deliver(Handed(Noted(protocol.WAITING)))

    def go_on(self, what: str) -> None:
        """Tell people that the room waits no more, unless for something else."""
        with self._lock:
            is_last = self._awaited == {what}
            self._awaited.discard(what)
        if is_last:
            self.deliver(Handed(Noted(protocol.GOES_ON)))


class Scribe:
    """The thread that appends what was handed in here, a round at a time, and reads what there is.

    All of it is that thread's own, but for `server`, which others read, and what `end_part`
    and `stop` set.
    """

    def __init__(self, shared: SharedLog, waker: Waker, history: SharedHistory) -> None:
        self._shared = shared
        self._waker = waker
        self._history = history
        self._database = Database(history.address)
        self._follower = Follower(_fresh_name())
        self._begun_at = 0.0  # when the last round was
        self._silent_since: float | None = None  # when the database was last well
        self._is_lost = False  # that it is not was logged
        self._has_told = False  # people know that the room waits
        self._ended_part = 0  # the name of the part that is over, as the room has it; any thread's
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scribe", daemon=True)

    # For other threads.

    @property
    def server(self) -> int:
        """The name of this server for now."""
        return self._follower.server

    def end_part(self, name: int) -> None:
        """Have it begin anew, if that is still its name."""
        self._ended_part = name
        self._waker.wake()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> bool:
        """Say that this server ends, if the database is there, and tell whether the thread did."""
        self._ending.set()
        self._waker.wake()
        join(self._thread, STOP_CLOSE)
        return not self._thread.is_alive()

    # The thread.

    def _run(self) -> None:
        try:
            self._go_on()
        finally:  # no round will come to what is left
            self._drop_all(self._follower)

    def _go_on(self) -> None:
        while not self._ending.is_set():
            try:
                self._follow()
            except Away as error:
                self._lose(str(error))
            except Over:
                self._begin_anew("this server was silent for too long; it begins anew")
            except (Forked, HistoryError) as error:
                self._give_up(error)
                break
            except Exception:
                log.exception("a fault in the log")
                self._begin_anew("this server begins anew")
                self._ending.wait(AGAIN)

    def _follow(self) -> None:
        """Append and read on one connection, as long as it lasts."""
        try:
            self._database.connect(CONNECT, self._tick)
            self._database.execute("LISTEN chat", seconds=UNANSWERED, tick=self._tick)
            self._follower.connected()
            while not self._ending.is_set():
                self._step()
            if self._follower.is_free:
                self._follower.begin([Handed(Ended(self.server))])
                self._append(STOP_CLOSE / 2, lambda: None)
        finally:
            self._database.close()

    def _step(self) -> None:
        """Append a round if there is one, else wait for others to."""
        if self._ended_part == self.server:
            raise Over
        if not self._follower.is_free or self._begin_round():
            rows = self._append(UNANSWERED, self._tick)
            if self._follower.number is None:
                self._start()
            else:
                self._shared.deliver(*self._follower.answered(rows))
            self._be_well()
        elif self._database.take_notices() or self._wait_for_others():
            found = self._database.execute(
                f"{READ_ROWS} chat.rounds WHERE number > $1 ORDER BY 1",
                self._follower.number,
                seconds=UNANSWERED,
                tick=self._tick,
            )
            self._shared.deliver(*self._follower.heard(_rows(found)))

    def _begin_round(self) -> bool:
        """Make a round of what was handed in, or an empty one if it is time; tell whether."""
        is_due = time.monotonic() - self._begun_at >= EMPTY_ROUND
        handed = self._shared.gather(is_due=is_due)
        if handed is not None:
            self._follower.begin(handed)
        return handed is not None

    def _wait_for_others(self) -> bool:
        """Wait until there is something to do; tell whether others have appended."""
        self._database.wait(self._waker, self._begun_at + EMPTY_ROUND - time.monotonic())
        self._waker.clear()
        return self._database.take_notices()

    def _append(self, seconds: float, tick: Callable[[], None]) -> list[Row]:
        """Have our round in the log, and return what is new there."""
        self._begun_at = time.monotonic()
        if self._silent_since is None:
            self._silent_since = self._begun_at
        found = self._database.execute(
            f"{READ_ROWS} chat.append($1, $2, $3, $4, $5)",
            RULES,
            *self._follower.request,
            seconds=seconds,
            tick=tick,
        )
        return _rows(found)

    def _start(self) -> None:
        """Go on from the newest point."""
        history = self._history
        beginning = _read_beginning(self._database, self.server, history.retained, history.fmt)
        behind = self._follower.start(beginning.number, beginning.rows)
        self._shared.deliver(Handed(Restored(beginning.state)), *behind, beginning=beginning)

    # When the database is away.

    def _tick(self) -> None:
        """Tell people when it takes too long; end the wait if the room ends meanwhile."""
        if self._ending.is_set():
            raise Away("the server ends")
        since = self._silent_since
        if since is not None and not self._has_told and time.monotonic() - since >= TELL_WAITING:
            self._has_told = True
            self._shared.hold_up("the database", self._follower.under_way)

    def _be_well(self) -> None:
        """Know that the database has answered."""
        self._silent_since = None
        if self._is_lost:
            self._is_lost = False
            log.info("the database answers again")
        if self._has_told:
            self._has_told = False
            self._shared.go_on("the database")

    def _lose(self, why: str) -> None:
        """Wait a little before the next host is tried, and log that it has to be."""
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        if self._ending.is_set():
            return
        if not self._is_lost:
            log.error("%s is away: %s; the room waits", self._database.shown, why)
            self._is_lost = True
        self._ending.wait(AGAIN)
        with contextlib.suppress(Away):
            self._tick()

    def _begin_anew(self, why: str) -> None:
        """Be another server from now on: nothing that was handed in before counts."""
        log.warning("%s", why)
        former = self._follower
        self._follower = Follower(_fresh_name(), former.server)
        self._drop_all(former)

    def _drop_all(self, former: Follower) -> None:
        waiting = self._shared.gather(is_due=True, most=math.inf) or []
        self._shared.drop([*former.abandoned(), *waiting])

    def _give_up(self, error: Exception) -> None:
        """End the server: it cannot go on from what the database has."""
        why = error if str(error) else "the database is not the one that it was; start again"
        log.critical("%s", why)
        self._history.failure = str(why)
        self._shared.close()
        self._drop_all(self._follower)
        self._history.on_failure()


def _fresh_name() -> int:
    return int.from_bytes(os.urandom(6), "big") >> 2 or 1


def _rows(found: list[tuple[str, ...]]) -> list[Row]:
    return [
        Row(int(number), float(when), int(server), int(batch), entries)
        for number, when, server, batch, entries in found
    ]


def _read_beginning(database: Database, server: int, count: int, fmt: str) -> Beginning:
    """Read the newest point, what stands behind it and the last lines, all of one moment."""
    database.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    points = database.execute("SELECT number, state FROM chat.points ORDER BY number DESC LIMIT 1")
    if not points:
        raise HistoryError(NOT_WHOLE.format(database.shown))
    [(number, text)] = points
    rows = database.execute(
        f"{READ_ROWS} chat.rounds WHERE number > $1 ORDER BY 1", number, seconds=READ_ALL
    )
    lines = database.execute(
        f"{READ_LINES} ORDER BY position DESC LIMIT $1", count, seconds=READ_ALL
    )[::-1]
    [(oldest,)] = database.execute("SELECT min(position) FROM chat.lines")
    database.execute("COMMIT")
    try:
        state = _parsed(text)
        Room.restored(state)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise HistoryError(
            f"point {number} of the history cannot be read; use the version that wrote it,"
            " or restore the database from a backup"
        ) from None
    last = [line for _, line in map(_recalled, lines)]
    return Beginning(
        server,
        int(number),
        state,
        _rows(rows),
        int(oldest or state["end"]),
        [line.line.encode(fmt) for line in last],
        [line.time for line in last],
    )


class Keeper:
    """Writes points now and then, in a thread of its own; any server may.

    A point is what the room is behind a round, and all lines up to there; what is before
    the last but one is not needed to begin.
    """

    def __init__(self, shared: SharedLog, broadcaster: Broadcaster, history: SharedHistory) -> None:
        self._shared = shared
        self._broadcaster = broadcaster
        self._history = history
        self._database = Database(history.address)
        self._last = self._last_but_one = 0  # the numbers of the points that are known
        self._position = 0  # up to which the last one reaches
        self._known_at = time.monotonic()
        self._is_failing = False  # that no point can be written was logged
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, or leave it to its end."""
        self._ending.set()
        join(self._thread, STOP_CLOSE)

    def _learn(self, number: int, position: int) -> None:
        """Know of a point."""
        if number > self._last:
            self._last_but_one, self._last, self._position = self._last, number, position
            self._known_at = time.monotonic()

    def _run(self) -> None:
        while not self._ending.wait(KEEP_LOOK):
            room = self._broadcaster.room
            if self._is_due(room, time.monotonic() - self._known_at):
                self._try(room)
        self._database.close()

    def _try(self, room: Room) -> None:
        """Write a point; where that cannot be for long, the room waits for it."""
        try:
            self._keep(room)
        except Away as error:
            if not (self._is_failing or self._ending.is_set()):
                log.error("cannot keep what is said for who starts late: %s", error)
            self._is_failing = True
        except Exception:
            log.exception("a fault in keeping a point")
            self._is_failing = True
        else:
            if self._is_failing:
                log.info("what is said is kept again for who starts late")
            self._is_failing = False
            self._shared.go_on("a point")
        if self._is_failing:
            self._database.close()
            if self._history.is_full():
                self._shared.hold_up("a point")

    def _is_due(self, room: Room, age: float) -> bool:
        rounds, lines = room.progress.number - self._last, room.end - self._position
        is_long = rounds >= POINT_ROUNDS or lines >= POINT_LINES
        # Less than none: the database's clock was set back, or is another one's now.
        is_old = not 0 <= age < POINT_SECONDS and self._shared.busy > self._last_but_one
        return room.progress.number > self._last and (is_long or is_old)

    def _keep(self, room: Room) -> None:
        """Write a point of the room, unless somebody else has or does."""
        _ask(self._database, "BEGIN", tick=self._tick)
        [(is_alone,)] = self._ask(f"SELECT pg_try_advisory_xact_lock({LOCK} + 1)::int")
        [(last, position, age)] = self._ask(
            "SELECT number, position, extract(epoch FROM clock_timestamp()) - time"
            " FROM chat.points ORDER BY number DESC LIMIT 1"
        )
        self._learn(int(last), int(position))
        self._shared.kept_to(int(position))
        if is_alone == "0" or not self._is_due(room, float(age)):
            self._ask("ROLLBACK")
            return
        self._check_followed(room.progress)
        for first in range(int(position), room.end, POINT_PAGE):
            end = min(first + POINT_PAGE, room.end)
            lines = self._history.between(first, end)
            if len(lines) < end - first:  # this server has begun anew just now
                raise Away("lines are read from there at this moment")
            self._ask(
                "INSERT INTO chat.lines SELECT (r->>0)::bigint, (r->>1)::float8, r->>2, r->>3,"
                " r->>4 FROM jsonb_array_elements($1::jsonb) r ON CONFLICT DO NOTHING",
                _json(lines),
            )
        self._ask(
            "INSERT INTO chat.points VALUES ($1, extract(epoch FROM clock_timestamp()), $2, $3)",
            room.progress.number,
            room.end,
            _json(room.state()),
        )
        self._ask("DELETE FROM chat.points WHERE number < $1", last)
        before = "extract(epoch FROM clock_timestamp()) -"
        self._ask(
            f"DELETE FROM chat.rounds WHERE number <= $1"
            f" AND NOT time BETWEEN {before} {TRIM_SECONDS} AND {before} 0",
            last,
        )
        # Not one that is in the room: a clock that is put forward must not have it said twice.
        here = ",".join(map(str, room.servers))
        self._ask(
            f"DELETE FROM chat.servers WHERE time < {before} {FORGET_SERVERS}"
            f" AND server <> ALL ('{{{here}}}')"
        )
        self._ask("COMMIT")
        self._learn(room.progress.number, room.end)
        self._shared.kept_to(room.end)

    def _check_followed(self, progress: Progress) -> None:
        """Raise `Away` for a database whose log is not the one that was followed."""
        found = self._ask("SELECT time FROM chat.rounds WHERE number = $1", progress.number)
        if [float(when) for (when,) in found] != [progress.last]:
            raise Away("its log is not the one that is followed here")

    def _ask(self, statement: str, *values: object) -> list[tuple[str, ...]]:
        return self._database.execute(statement, *values, seconds=READ_ALL, tick=self._tick)

    def _tick(self) -> None:
        if self._ending.is_set():
            raise Away("the server ends")


def open_log(broadcaster: Broadcaster, waker: Waker) -> EntryLog:
    """Return where entries stand: in memory, or where the history is shared."""
    if isinstance(broadcaster.history, SharedHistory):
        return SharedLog(broadcaster, broadcaster.history, waker)
    return LocalLog(waker)


# --- The command line --------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the server until a signal ends it; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tls_key and options.tls_cert is None:
        parser.error("--tls-key is the key of a certificate; give that too with --tls-cert")
    # Looked for before SIGHUP is heard: until then, a terminal that goes ends the process.
    had_terminal = _has_terminal()
    threading.stack_size(STACK)
    with contextlib.ExitStack() as running:
        try:
            signals = running.enter_context(_signals())
            console = running.enter_context(Console(options.log_file, options.verbose))
            server = running.enter_context(_server(options))
        except (OSError, UnicodeError, RuntimeError, Refusal, HistoryError) as error:
            running.close()  # what is logged comes before the reason
            return _fail(error, options)
        gc.freeze()  # what is loaded by now stays; looking through it held up a round for 9 ms
        _announce(server)
        server.history.on_failure = functools.partial(_thread.interrupt_main, signal.SIGTERM)
        if not server.history.failure:
            _wait_for_end(signals, server, options, had_terminal)
    status = 1 if server.history.failure else 0
    if console.is_stuck():
        os._exit(status)  # a thread that does not come back from a write would hold up the exit
    return status


# Signals.


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Give a socket that gets a byte, its number, for each signal that the server hears.

    One that comes just before the main thread waits would be lost on a lock or queue.
    What was ignored at the start, as SIGHUP under nohup, stays ignored.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # it is awake then
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
                signal.signal(getattr(signal, name), lambda number, frame: None)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(-1)


def _wait_for_end(
    signals: socket.socket, server: ChatServer, options: argparse.Namespace, had_terminal: bool
) -> None:
    """Wait for a signal that ends the server; with SIGHUP it takes its files anew."""
    while _next_signal(signals, server.refusals) == getattr(signal, "SIGHUP", None):
        if had_terminal and not _has_terminal():
            log.info("the terminal is gone")
            return
        try:  # in a thread of its own: a file on a dead disk must not keep the next signal waiting
            threading.Thread(target=_renew, args=[server, options], daemon=True).start()
        except RuntimeError as error:
            log.error("cannot take the files anew: %s; send SIGHUP again", error)


def _next_signal(signals: socket.socket, refusals: Refusals) -> int:
    """Return the number of the next signal; meanwhile tell each minute who was refused.

    That is told before the signal is obeyed too: whom the end of the server sends away
    was not refused.
    """
    signals.settimeout(SUMMARY)
    while True:
        try:
            return signals.recv(1)[0]
        except TimeoutError:
            pass  # time for a summary
        finally:
            refusals.tell()


def _has_terminal() -> bool:
    """Tell whether there is a controlling terminal, whose end SIGHUP may be."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError as error:
        # Without a free descriptor it cannot be told: a room is not ended on a guess.
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return True


def _renew(server: ChatServer, options: argparse.Namespace) -> None:
    """Take the files that the options name anew; go on with the old where one cannot be used."""

    def certificate() -> None:
        server.tls = _tls_context(options)

    def password() -> None:
        server.password.text = protocol.password(options.password_file, "")

    def op_password() -> None:
        server.op_password.text = protocol.password(options.op_password_file, "")

    def log_file() -> None:
        LogFile.check(options.log_file)  # it is its writer that opens it, with the next line

    for file, take in (
        (options.log_file, log_file),
        (options.tls_cert, certificate),
        (options.password_file, password),
        (options.op_password_file, op_password),
    ):
        if file is not None:
            try:
                take()
            except (OSError, Refusal) as error:
                log.error("%s; going on with what was there", _trouble(error, options))
            else:
                log.info("took %s anew", file)


# Starting.


def _server(options: argparse.Namespace) -> ChatServer:
    """Make the server that the options describe."""
    max_clients, max_unnamed = _affordable(options.max_clients, options.max_unnamed)
    return ChatServer(
        options.host,
        options.port,
        options.format,
        max_clients=max_clients,
        max_per_address=options.max_per_address,
        max_unnamed=max_unnamed,
        name_deadline=options.name_deadline,
        rate_limit=options.rate_limit,
        history=options.history,
        tls=_tls_context(options),
        password=protocol.password(options.password_file, "CHAT_PASSWORD"),
        op_password=protocol.password(options.op_password_file, "CHAT_OP_PASSWORD"),
    )


EXAMPLES = """\
examples:
  a room for everybody on this network
      python server.py --host ::
  one with TLS and a password, which remembers what was said
      python server.py --host :: --tls-cert cert.pem --tls-key key.pem \\
          --password-file password --history history.db
  the same room on several machines: this on each
      python server.py --host :: --history postgresql://db1,db2/chat

SIGTERM and Ctrl-C end the room in order; SIGHUP takes certificate, passwords and log file anew.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a chat room that client.py, nc and telnet can join.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not parser.prog.endswith(".py"):  # it is installed
        parser.epilog = EXAMPLES.replace("python server.py", parser.prog)
    parser.add_argument("--version", action="version", version=f"%(prog)s {protocol.__version__}")
    option = parser.add_argument_group("where").add_argument
    option(
        "--host",
        default=protocol.HOST,
        help="address to listen on; :: is all, 0.0.0.0 all of IPv4 (default: %(default)s)",
    )
    option(
        "--port",
        type=protocol.port,
        default=protocol.PORT,
        help="0 takes any free one (default: %(default)s)",
    )
    option(
        "--format",
        choices=protocol.FORMATS,
        default=protocol.FORMAT,
        help="of the text (default: %(default)s)",
    )
    file = _taking_a_file(parser.add_argument_group("who may come in"))
    file("--password-file", help="the room's; or the variable CHAT_PASSWORD")
    file("--op-password-file", help="operators'; or CHAT_OP_PASSWORD")
    file("--tls-cert", help="speak TLS with this certificate")
    file("--tls-key", help="its key, if it is in a file of its own")
    group = parser.add_argument_group("history and log")
    file, option = _taking_a_file(group), group.add_argument
    file("--history", help="keep what is said; postgresql://... shares the room")
    file("--log-file", help="log there too")
    option("-v", "--verbose", action="store_true", help="log what is said too")
    _add_limits(parser.add_argument_group("limits"))
    return parser


def _taking_a_file(group: argparse._ArgumentGroup) -> Callable[..., argparse.Action]:
    """Return what adds an option that takes the name of a file."""
    return functools.partial(group.add_argument, metavar="FILE", type=protocol.file)


def _add_limits(group: argparse._ArgumentGroup) -> None:
    option, count, defaults = group.add_argument, _number(int, 1), Limits()
    option(
        "--max-clients",
        type=count,
        default=defaults.max_clients,
        metavar="N",
        help="in the room (default: %(default)s)",
    )
    option(
        "--max-per-address",
        type=count,
        default=defaults.max_per_address,
        metavar="N",
        help="but loopback (default: %(default)s)",
    )
    option(
        "--max-unnamed",
        type=count,
        default=defaults.max_unnamed,
        metavar="N",
        help="not in it yet (default: %(default)s)",
    )
    option(
        "--name-deadline",
        type=_number(float, 0.1),
        default=defaults.name_deadline,
        metavar="SECONDS",
        help="to give a name (default: %(default)g)",
    )
    option(
        "--rate-limit",
        type=_number(float, 0),
        default=defaults.rate_limit,
        metavar="LINES",
        help=f"a second for each client, after {BURST} at once; 0: no limit (default: %(default)g)",
    )


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


def _affordable(clients: int, unnamed: int) -> tuple[int, int]:
    """Return how many clients, and how many without a name, file descriptors allow.

    The limit is raised if need be.  Where it is too low for all, those without a name
    get a quarter, so that people can still come in; raise `Refusal` where it is too low
    for anybody.
    """
    allowed = _descriptors(clients + unnamed + SPARE_DESCRIPTORS)
    left = allowed - SPARE_DESCRIPTORS
    if left < 2:
        raise Refusal(
            f"cannot start: {allowed} open files are allowed; allow more of them with ulimit -n"
        )
    if left < clients + unnamed:
        unnamed = min(unnamed, max(1, left // 4))
        clients = min(clients, left - unnamed)
        log.warning(
            "room for %d clients and %d without a name only: %d open files are allowed;"
            " allow more of them with ulimit -n",
            *(clients, unnamed, allowed),
        )
    return clients, unnamed


def _descriptors(wanted: int) -> int:
    """Return how many file descriptors may be open, raised to those wanted where it can be."""
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    except (ValueError, OSError):  # macOS has a limit that it does not tell
        return soft
    return more


def _announce(server: ChatServer) -> None:
    """Log the limits in force, and where friends can reach an open room and what it lacks."""
    log.info("limits: %s", server.limits)
    host = ipaddress.ip_address(server.host.partition("%")[0].removeprefix("::ffff:"))
    if host.is_loopback:
        return
    if host.is_unspecified and (addresses := list(_own_addresses(host.version))):
        log.info("friends can reach it at %s, port %d", " or ".join(addresses), server.port)
    lacks = {"TLS": server.tls, "a password": server.password.text}
    if missing := [f"without {what}" for what, given in lacks.items() if given is None]:
        log.warning(
            "the room is open to the network %s; see --tls-cert and --password-file",
            " and ".join(missing),
        )


def _own_addresses(version: int) -> Iterator[str]:
    """Yield the addresses that others reach us at: those that we would send to them from."""
    others = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")]  # nobody's
    for family, other in others if version == 6 else others[:1]:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # sends nothing, and chooses the address for it
            yield probe.getsockname()[0]


# The console.


class Console:
    """The log, on standard error and in a file, written by a thread for each.

    A terminal that nobody reads or a disk that takes nothing holds up neither the room
    nor the other.  Raise `OSError` when the file cannot be written.
    """

    PATIENCE = 0.5  # seconds in the end for what is still to be written

    def __init__(self, file: str | None, verbose: bool) -> None:
        places: list[logging.Handler] = [logging.StreamHandler()]
        if file is not None:
            places.append(LogFile(file, encoding="utf-8", errors="backslashreplace"))
        self._writers = [LogWriter(place) for place in places]
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(message)s",
            level=logging.DEBUG if verbose else logging.INFO,
            handlers=[logging.handlers.QueueHandler(writer.records) for writer in self._writers],
        )
        logging.raiseExceptions = False  # a closed terminal or a full disk ends no server

    def __enter__(self) -> Console:
        for writer in self._writers:
            writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + self.PATIENCE
        for writer in self._writers:
            writer.finish()
        for writer in filter(threading.Thread.is_alive, self._writers):
            writer.join(max(0.0, deadline - time.monotonic()))

    def is_stuck(self) -> bool:
        """Tell whether something is still being written."""
        return any(writer.is_alive() for writer in self._writers)


class LogWriter(threading.Thread):
    """Writes the log to one place."""

    def __init__(self, place: logging.Handler) -> None:
        super().__init__(name="console", daemon=True)
        self.records: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_RECORDS)
        self._place = place

    def run(self) -> None:
        """Write what comes until `finish`."""
        while (record := self.records.get()) is not None:
            self._place.handle(record)
        with contextlib.suppress(OSError):  # a full disk; nobody is left to tell
            self._place.close()

    def finish(self) -> None:
        """Have the thread end behind what is waiting; of a full queue, the oldest line goes."""
        while True:
            try:
                return self.records.put_nowait(None)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self.records.get_nowait()


class LogFile(logging.handlers.WatchedFileHandler):
    """The log in a file that only its owner can read, made anew when it was moved away."""

    @staticmethod
    def check(file: str) -> None:
        """Raise `OSError` when a file cannot be logged to."""
        with open(file, "a", opener=_private):
            pass

    def reopenIfNeeded(self) -> None:  # noqa: N802
        """Open the file anew if it was moved away; go on with the old where that fails."""
        with contextlib.suppress(OSError):
            if self._was_moved():
                old, self.stream = self.stream, self._open()
                self._statstream()
                if old is not None:
                    old.close()

    def _was_moved(self) -> bool:
        try:
            found = os.stat(self.baseFilename)
        except FileNotFoundError:
            return True
        return (found.st_dev, found.st_ino) != (self.dev, self.ino)

    def _open(self) -> TextIOWrapper:
        return open(
            self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=_private
        )


def _private(file: str, flags: int) -> int:
    """Open a file, and make one that is not there readable by its owner alone."""
    return os.open(file, flags, 0o600)


# TLS.


def _tls_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what the options say of TLS, and log the certificate's fingerprint."""
    if options.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for file in filter(None, (options.tls_cert, options.tls_key)):
        with open(file, "rb"):
            pass  # so that an error names the file
    certificate = pathlib.Path(options.tls_cert).read_text("ascii", "replace")
    fingerprint = protocol.fingerprint(_der(options.tls_cert, certificate))
    if options.tls_key is None and "PRIVATE KEY-----" not in certificate:
        raise Refusal(f"{options.tls_cert} has no key in it; give the key's file with --tls-key")
    try:
        # A key that wants a passphrase is refused, not asked for: nobody may be there.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
    except ssl.SSLError as error:
        raise Refusal(
            f"cannot use {options.tls_cert} with its key: {error.reason or 'no key that opens'};"
            " give a PEM certificate and its key without a passphrase"
        ) from None
    log.info("certificate SHA256 fingerprint %s", fingerprint)
    return context


def _der(file: str, text: str) -> bytes:
    """Return the first certificate of a PEM file as its fingerprint is taken of."""
    form = r"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----"
    found = re.search(form, text)
    try:
        return ssl.PEM_cert_to_DER_cert(found[0] if found else "")
    except ValueError:
        raise Refusal(f"{file} has no certificate in it; give one in PEM form") from None


# What went wrong.


def _fail(error: Exception, options: argparse.Namespace) -> int:
    print(f"{os.path.basename(sys.argv[0])}: {_explain(error, options)}", file=sys.stderr)
    return 1


def _explain(error: Exception, options: argparse.Namespace) -> str:
    """Say what keeps the server from starting and what to do about it."""
    where = f"cannot listen on {options.host} port {options.port}"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"{where}: unknown host; choose an address of this machine with --host"
    if not isinstance(error, OSError):
        return str(error)
    if error.filename:
        return f"{_trouble(error, options)}; name another file"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"cannot start: {error.strerror}; allow more of them with ulimit -n"
    remedy = {
        errno.EADDRINUSE: "the port is in use; choose another with --port",
        errno.EADDRNOTAVAIL: "not an address of this machine; choose one with --host",
        errno.EAFNOSUPPORT: "this machine has no IPv6; choose another with --host",
        errno.EINVAL: "not whole; say the interface of a link-local one, as in fe80::1%eth0",
        errno.EACCES: "not permitted; choose a port over 1023 with --port",
    }
    return f"{where}: {remedy.get(error.errno or 0, error.strerror)}"


def _trouble(error: Exception, options: argparse.Namespace) -> str:
    """Say what is wrong with a file."""
    if not isinstance(error, OSError):
        return str(error)
    file = error.filename or "a file"
    is_log = options.log_file and os.path.abspath(file) == os.path.abspath(options.log_file)
    return f"cannot {'write' if is_log else 'read'} {file}: {error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
