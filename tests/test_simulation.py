"""A room on several machines, simulated: the real rules on a log in memory.

Servers, clients and the database are played here, with a clock and a network of their
own; what a round does to the room (`Room`) and what a server makes of the log
(`Follower`) is the program's.  Servers die, are suspended and cut off, answers are
lost, requests come late and twice, the database goes away and fails over, its former
primary goes on answering readers, rows are trimmed.  Every run is told by its seed.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from chat import DEADLINE

import protocol
import server as program
from protocol import Introduction
from server import (
    ALIVE,
    HELD,
    MAIL_LINES,
    SERVER_BITS,
    Append,
    Banned,
    Begin,
    Claim,
    End,
    Ended,
    Ending,
    Entered,
    Follower,
    Gone,
    Got,
    Handed,
    HistoryError,
    Kicked,
    Left,
    Lost,
    Outcome,
    Over,
    Promoted,
    Renamed,
    Room,
    Row,
    Said,
    ToOne,
    Turn,
    Unbanned,
    Verdict,
    Whispered,
    decode_entries,
    encode_entries,
    is_shared,
)

UNANSWERED = 5.0  # seconds until a server gives a connection up
EMPTY_ROUND = 3.0  # seconds until a server appends a round with nothing in it
TRIM_AGE = 8.0  # seconds that a row is kept; short, so that much is trimmed
SETTLE = 90.0  # seconds without faults at the end, in which all comes right

#: What each rule of the design says, and what the simulation does without it.
RULES = {
    1: "a retry finds that its round is there: without it, it is there twice",
    2: "the next round waits for the last: without it, one without an answer is forgotten",
    3: "a new connection proves itself: without it, a former primary is believed",
    4: "a gap ends a server's part: without it, what was trimmed is passed over",
    5: "an unanswered round is asked for again: without it, its entries go into another",
    6: "who is not in does not count: without it, a claim that comes too late does",
    7: "a silent server dies: without it, it is there for ever",
    8: "a private line is for a stay: without it, for who has the name then",
    9: "private lines are kept by key: without it, they go to who is there then",
    10: "a point is of one moment: without it, its number is another's",
    11: "a start is of one moment: without it, the rows are read later than the point",
}


class Broken(AssertionError):
    """What the room promises does not hold."""


# --- The database ------------------------------------------------------------


class Log:
    """What the database has: rows, each server's last batch, points and the lines up to them."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self.number = 0
        self.batches: dict[int, int] = {}
        self.points: list[tuple[int, str]] = [(0, json.dumps(state))]
        self.lines: dict[int, bytes] = {}
        self.is_followed = True  # a standby confirms what is committed

    def append(self, call: Append, now: float, *, twice: bool = False) -> None:
        """Have a round in the log, once."""
        if twice or self.batches.get(call.server, 0) < call.batch:
            self.batches[call.server] = call.batch
            self.number += 1
            self.rows.append(Row(self.number, now, call.server, call.batch, call.entries))

    def behind(self, number: int) -> list[Row]:
        """Return the rows behind a number."""
        if not self.rows:
            return []
        return self.rows[max(0, number + 1 - self.rows[0].number) :]

    def keep(self, number: int, state: str, lines: dict[int, bytes], now: float) -> None:
        """Write a point, and trim what the last but one makes unnecessary."""
        if self.points[-1][0] < number <= self.number:
            self.points = [self.points[-1], (number, state)]
            self.lines.update(lines)
            behind = self.points[0][0]
            self.rows = [r for r in self.rows if r.number > behind or now - r.time < TRIM_AGE]

    def former(self) -> Log:
        """Return what a primary is that nobody follows any more."""
        other = Log({})
        other.rows, other.number, other.batches = self.rows[:], self.number, dict(self.batches)
        other.points, other.lines, other.is_followed = self.points[:], dict(self.lines), False
        return other


# --- The servers -------------------------------------------------------------


class LenientRoom(Room):
    """A room without rule 6: who claims on a server that is not in comes in."""

    def _claim_anyhow(self, claim: Claim) -> Any:
        known = self.servers
        anyhow = {**known, claim.session >> SERVER_BITS: self.clock}
        self.progress = self.progress._replace(servers=anyhow)
        try:
            return Room._claim(self, claim)
        finally:
            self.progress = self.progress._replace(servers=known)

    _VERBS: ClassVar[dict[type, Any]] = {**Room._VERBS, Claim: _claim_anyhow}


class NameRoom(Room):
    """A room without rule 8: a private line is for who has the name by then."""

    def _whispered_by_name(self, whispered: Whispered) -> None:
        name = whispered.text.split()[-1]
        stay = self.by_name(name)
        Room._whispered(self, whispered._replace(to=stay.number if stay else 0))

    _VERBS: ClassVar[dict[type, Any]] = {**Room._VERBS, Whispered: _whispered_by_name}


class CredulousFollower(Follower):
    """A part without rule 3: each connection is as good as the last."""

    def connected(self) -> None:
        return


class HeedlessFollower(Follower):
    """A part without rule 4: a row is as good as the next."""

    def _next(self, rows: list[Row]) -> list[Handed]:
        handed: list[Handed] = []
        for row in rows:
            assert self.number is not None
            self.number = max(self.number, row.number - 1)
            handed += super()._next([row])
        return handed


class Server:
    """One server: what clients asked of it, its part in the log, its room."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_dead = False
        self.suspended_until = 0.0
        self.sessions: dict[int, Connection] = {}
        self.queue: list[Handed] = []
        self.room = Room(durable=True)
        self.lines: dict[int, bytes] = {}
        self.log: Log | None = None  # that it is connected to
        self.connections = 0  # ever made to the database
        self.asked_at: float | None = None  # when, for what has no answer yet
        self.last_round = 0.0
        self.follower = self._enter()

    def _enter(self, former: int = 0) -> Follower:
        """Begin a part under a fresh name."""
        kinds = {3: CredulousFollower, 4: HeedlessFollower}
        kind = kinds.get(self.world.without, Follower)
        return kind(self.world.chance.getrandbits(40) + 1, former)

    # Its thread that follows the log.

    def run(self) -> None:
        """Do what is to be done now, and go on a little later."""
        world = self.world
        if self.is_dead:
            return
        if self.suspended_until > world.now:
            world.at(self.suspended_until, self.run)
            return
        if self.log is None:
            self.connect()
        elif self.asked_at is not None:
            if world.now - self.asked_at > UNANSWERED:
                self.disconnect()
        elif self.follower.is_free:
            self.go_on()
        world.later(world.chance.uniform(0.05, 0.25), self.run)

    def connect(self) -> None:
        """Connect to some database, and ask there for what has no answer yet."""
        self.log = self.world.database()
        if self.log is not None:
            self.connections += 1
            if self.world.without == 2 and self.follower.number is not None:
                self.follower._under_way = None
            self.follower.connected()
            if not self.follower.is_free:
                self.ask()

    def disconnect(self) -> None:
        """Give a connection up."""
        self.log, self.asked_at = None, None
        if self.world.without == 5 and self.follower.number is not None:
            unanswered, self.follower._under_way = self.follower._under_way, None
            self.follower.begin(unanswered or [])

    def go_on(self) -> None:
        """Begin the next round if it is time for one, else read what others have appended."""
        self.confirm_private()
        if self.queue or self.world.now - self.last_round > EMPTY_ROUND:
            handed, self.queue = self.queue, []
            self.follower.begin(handed)
            self.ask()
        else:
            self.world.send(self.hear, self.log, self.connections)
            self.keep_point()

    def ask(self) -> None:
        """Have the log asked to append; requests and answers come late, twice or never."""
        world, call = self.world, self.follower.request
        self.asked_at = self.last_round = world.now
        stuck = world.chance.uniform(0.0, 25.0)  # in a network that comes back
        kind = world.chance.random() if world.is_talking else 1.0
        if kind < 0.05:
            world.later(stuck, self.append, call, self.log, self.connections)
            return
        world.send(self.append, call, self.log, self.connections)
        if kind < 0.1:
            world.later(stuck, self.append, call, self.log, 0)

    def append(self, call: Append, log: Log, connection: int) -> None:
        """Have the database append; its answer goes to the connection that asked."""
        if self.world.is_away or (connection == 0 and log is not self.world.log):
            return
        log.append(call, self.world.now, twice=self.world.without == 1)
        is_lost = self.world.is_talking and self.world.chance.random() < 0.03
        if log.is_followed and not is_lost:
            rows = log.behind(min(call.after, log.number))
            self.world.send(self.answer, rows, call, log, connection)

    def answer(self, rows: list[Row], call: Append, log: Log, connection: int) -> None:
        """Take the answer to our round."""
        if not self.is_current(connection):
            self.world.put_off(self, self.answer, rows, call, log, connection)
            return
        self.asked_at = None
        if self.follower.number is None:
            self.start(log)
        else:
            self.apply(lambda: self.follower.answered(rows))

    def hear(self, log: Log, connection: int) -> None:
        """Read what others have appended."""
        if not self.is_current(connection) or self.asked_at is not None or self.world.is_away:
            return
        assert self.follower.number is not None
        rows = log.behind(self.follower.number)
        if self.world.chance.random() < 0.1:
            rows = rows[: self.world.chance.randrange(len(rows) + 1)]
        self.apply(lambda: self.follower.heard(rows))

    def is_current(self, connection: int) -> bool:
        """Tell whether it runs, and still has the connection."""
        running = not self.is_dead and self.suspended_until <= self.world.now
        return running and self.log is not None and connection == self.connections

    def start(self, log: Log) -> None:
        """Take the newest point and what stands behind it, read together."""
        number, state = log.points[-1]
        lines, rows = dict(log.lines), log.behind(number)
        if self.world.without == 11:
            self.asked_at = self.world.now
            self.world.later(
                self.world.chance.uniform(0.0, 4.0),
                lambda: self.start_from(number, state, lines, log.behind(number)),
            )
        else:
            self.start_from(number, state, lines, rows)

    def start_from(self, number: int, state: str, lines: dict[int, bytes], rows: list[Row]) -> None:
        """Begin with the state of a point."""
        self.asked_at = None
        if self.world.without == 11 and rows:
            number = rows[0].number - 1
        kinds: dict[int, type[Room]] = {6: LenientRoom, 8: NameRoom}
        kind = kinds.get(self.world.without, Room)
        self.room, self.lines = kind.restored(json.loads(state)), lines
        self.apply(lambda: self.follower.start(number, rows))

    def apply(self, read: Callable[[], list[Handed]]) -> None:
        """Apply what was read, and give the clients what it means for them."""
        try:
            handed = read()
        except Over:
            self.end_part()
            return
        draft = self.room.draft()
        claims: list[Outcome] = []
        for one in handed:
            try:
                verdict = Verdict(draft.apply(one.entry))
            except (protocol.Refusal, program.Farewell, Gone) as refusal:
                verdict = Verdict(error=refusal)
            if one.outcome is not None:
                one.outcome.verdict = verdict
                claims.append(one.outcome)
        for position, line in enumerate(draft.result.lines, self.room.end):
            self.lines[position] = line
            self.world.note(position, line)
        self.room = draft
        for effect in draft.result.effects:
            if connection := self.sessions.get(effect.session):
                connection.carry_out(effect)
        for connection in [*self.sessions.values()]:
            connection.give(draft.end)
        for outcome in claims:
            outcome.settle()
        for connection in [*self.sessions.values()]:
            connection.look_at_claim()
        if self.follower.is_free and self.follower.server not in self.room.servers:
            self.end_part()

    def catch_up(self) -> None:
        """Read all that there is."""
        self.follower._is_current = True
        self.apply(lambda: self.follower.heard(self.world.log.behind(self.follower.number or 0)))

    def end_part(self) -> None:
        """End all connections, and enter as a new server."""
        for connection in [*self.sessions.values()]:
            connection.close()
        self.queue.clear()
        self.log, self.asked_at = None, None
        self.world.ends_of_parts += 1
        self.follower = self._enter(self.follower.server)

    def keep_point(self) -> None:
        """Write a point now and then."""
        log, world = self.log, self.world
        if log is None or world.is_away or world.chance.random() > 0.03:
            return
        number = self.room.progress.number
        if world.without == 10:
            number = log.number
        log.keep(number, json.dumps(self.room.state()), self.lines, world.now)

    def confirm_private(self) -> None:
        """Say how far private lines have come, where the network has confirmed them."""
        for session, connection in self.sessions.items():
            if connection.is_settled and connection.client.whispers > connection.confirmed:
                connection.confirmed = connection.client.whispers
                self.queue.append(Handed(Got(session, connection.confirmed)))

    def end(self) -> None:
        """End in good order."""
        self.queue.append(Handed(Ended(self.follower.server)))


class Connection:
    """A client's connection to one server, with what is under way in it."""

    def __init__(self, client: Client, server: Server) -> None:
        self.client = client
        self.server = server
        self.session = server.follower.server << SERVER_BITS | next(client.world.count)
        self.is_open = True
        self.is_settled = False  # the client has all from before it came
        self.claim: Outcome | None = Outcome()
        self.cursor: int | None = None
        self.confirmed = 0
        server.sessions[self.session] = self
        count = None if client.world.without == 9 else client.whispers
        key = Introduction(client.name, client.position or None, 0, True, client.key, count)
        entry = Claim(self.session, key, "192.0.2.1", 0.0)
        server.queue.append(Handed(entry, self.claim))

    def to_client(self, take: Callable[..., None], *what: Any) -> None:
        """Send something that the client gets a little later, in order, if it is still there."""
        world = self.client.world
        self.client.arrival = max(world.now + world.chance.uniform(0.0, 0.05), self.client.arrival)
        world.at(self.client.arrival, self._arrive, take, *what)

    def _arrive(self, take: Callable[..., None], *what: Any) -> None:
        if self.client.connection is self:
            take(*what)

    def look_at_claim(self) -> None:
        """Have the client know if it was not let in."""
        if self.claim is not None and self.claim._settled.is_set():
            if self.claim.verdict.error is not None:
                self.to_client(self.client.refused, isinstance(self.claim.verdict.error, Gone))
                self.close()
            self.claim = None

    def carry_out(self, effect: Begin | ToOne | End) -> None:
        """Do what the room has decided for this connection."""
        if isinstance(effect, Begin):
            start = min(self.client.position or effect.position, effect.position)
            self.cursor = start
            self.to_client(self.client.begin, start)
            for position, line in effect.mail:
                self.give(min(position, effect.position))
                self.to_client(self.client.see_private, line)
            self.give(effect.position)
            self.to_client(self.client.settle, self)
        elif isinstance(effect, ToOne):
            self.give(effect.position)
            self.to_client(self.client.see_private, effect.line)
        else:
            self.give(effect.position)
            if effect.how is Ending.PUT_OUT:
                self.to_client(self.client.put_out)
            self.close()

    def give(self, end: int) -> None:
        """Give the client all lines before a position."""
        if self.cursor is None or not self.is_open:
            return
        for position in range(self.cursor, end):
            if position not in self.server.lines:
                raise Broken(f"there is no line at {position}")
            self.to_client(self.client.see, position, self.server.lines[position])
        self.cursor = max(self.cursor, end)

    def close(self) -> None:
        """End it at the server's side."""
        self.is_open = False
        self.server.sessions.pop(self.session, None)
        self.to_client(self.client.lost)

    def hand_in(self, entry: Any) -> None:
        """Have the server take something from the client."""
        running = not self.server.is_dead and self.is_open
        if running:
            self.server.queue.append(Handed(entry))


# --- The clients -------------------------------------------------------------


class Client:
    """Somebody who talks, says again what has no receipt, and comes back."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.lives = 0
        self.said = itertools.count()
        self.arrival = 0.0  # when the last thing under way comes
        self.connection: Connection | None = None
        self.tried_at = 0.0
        self.be_born()

    def be_born(self) -> None:
        """Begin as somebody who was never here."""
        self.lives += 1
        self.who = f"{self.number}.{self.lives}"
        self.key = f"key{self.who}"
        self.name = self.world.some_name()
        self.position = 0
        self.whispers = 0
        self.waiting: deque[str] = deque()  # said, without a receipt
        self.private: list[str] = []  # seen

    def run(self) -> None:
        """Do something, and go on a little later."""
        world = self.world
        connection = self.connection
        if connection is None:
            if world.now >= self.tried_at:
                self.connect()
        elif not connection.is_settled:
            if world.now - self.tried_at > 12.0:  # nothing comes: another server may answer
                self.hang_up()
        elif world.is_talking:
            self.act(connection)
        world.later(world.chance.uniform(0.1, 1.0), self.run)

    def connect(self) -> None:
        """Come in at some server."""
        self.tried_at = self.world.now
        servers = [one for one in self.world.servers if one.follower.number is not None]
        if servers:
            self.connection = Connection(self, self.world.chance.choice(servers))

    def act(self, connection: Connection) -> None:
        """Say something, mostly."""
        chance = self.world.chance
        kind = chance.random()
        if kind < 0.6:
            self.waiting.append(f"{self.who}-{next(self.said)}")
            self.say(connection, self.waiting[-1])
        elif kind < 0.9:
            self.whisper(connection)
        elif kind < 0.92:
            connection.hand_in(Left(connection.session, 0.0))
            self.world.leave(self)
            self.connection = None
            self.be_born()
        elif kind < 0.93:
            others = [*connection.server.room.stays.values()]
            connection.hand_in(Promoted(connection.session))
            who = chance.choice(others).number if others else 0
            connection.hand_in(Kicked(connection.session, who, ""))
        elif kind < 0.96:
            self.hang_up()

    def say(self, connection: Connection, text: str) -> None:
        """Hand in a line."""
        line = protocol.said(self.name, text).encode()
        connection.hand_in(Said(connection.session, [line]))

    def whisper(self, connection: Connection) -> None:
        """Write to somebody who is here, as far as the server knows."""
        others = [*connection.server.room.stays.values()]
        if others:
            other = self.world.chance.choice(others)
            text = f"{self.who}-{next(self.said)} to {other.name}"
            self.world.meant[text] = other.key
            connection.hand_in(Whispered(connection.session, other.number, text))

    def hang_up(self) -> None:
        """Lose the connection; the server hears of it."""
        if self.connection is not None:
            self.connection.hand_in(Lost(self.connection.session, 0.0))
            self.connection.is_open = False
        self.lost()

    # What comes from the server.

    def refused(self, again: bool) -> None:
        """Choose another name, unless it was the server that could not go on."""
        if not again:
            self.name = self.world.some_name()
        self.lost()

    def lost(self) -> None:
        """Have no connection any more."""
        self.connection = None
        self.tried_at = self.world.now + self.world.chance.uniform(0.5, 2.0)

    def put_out(self) -> None:
        """Begin as somebody else: this one is not wanted."""
        self.world.leave(self)
        self.be_born()

    def begin(self, position: int) -> None:
        """Know where the room's lines begin."""
        if self.position and position != self.position:
            raise Broken(f"{self.who} is at {self.position} and gets {position}")
        self.position = position

    def see(self, position: int, line: bytes) -> None:
        """Get a line of the room, maybe a receipt."""
        if position != self.position or self.world.lines[position] != line:
            raise Broken(f"{self.who} sees {line!r} at {position}, behind {self.position}")
        self.position += 1
        text = protocol.parse(line.decode()).text
        if text in self.waiting:
            if text != self.waiting[0]:
                raise Broken(f"{text} overtook {self.waiting[0]}")
            self.waiting.popleft()

    def see_private(self, line: bytes) -> None:
        """Get a private line, or the receipt of one."""
        kind, _, text = protocol.parse(line.decode().removesuffix("\n"))
        if kind is protocol.Kind.PRIVATE:
            if text in self.private:
                raise Broken(f"{self.who} sees {text} again")
            if self.world.meant[text] != self.key:
                raise Broken(f"{self.who} sees {text}, meant for {self.world.meant[text]}")
            self.whispers += 1
            self.private.append(text)
        elif text.startswith("to "):
            self.world.confirmed.append(text.partition(": ")[2])

    def settle(self, connection: Connection) -> None:
        """Know all from before; say again what was not there."""
        connection.is_settled = True
        stay = connection.server.room.by_session(connection.session)
        self.name = stay.name if stay else self.name
        for text in self.waiting:
            self.say(connection, text)


# --- The world ---------------------------------------------------------------


class World:
    """Time, chance, all who take part, and what must hold."""

    def __init__(self, seed: int, servers: int, clients: int, without: int = 0) -> None:
        self.chance = random.Random(seed)
        self.without = without
        self.now = 1000.0
        self.count = itertools.count(1)
        self.is_away = False  # the database
        self.is_talking = True
        self.log = Log(Room(5000, durable=True).state())
        self.former: list[Log] = []
        self.lines: dict[int, bytes] = {}  # as the first server had them
        names = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida"]
        self.names = names if clients < len(names) else [f"n-{n}" for n in range(clients + 20)]
        self.meant: dict[str, str] = {}  # for which key a private line is
        self.confirmed: list[str] = []  # private lines whose author has the receipt
        self.gone: dict[str, list[str]] = {}  # what those saw who left
        self.ends_of_parts = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.servers = [Server(self) for _ in range(servers)]
        self.clients = [Client(self, number) for number in range(clients)]
        for run in [one.run for one in self.servers] + [one.run for one in self.clients]:
            self.later(self.chance.random(), run)

    def at(self, when: float, do: Callable[..., None], *what: Any) -> None:
        """Have something happen at a time."""
        heapq.heappush(self._events, (when, next(self.count), do, what))

    def later(self, seconds: float, do: Callable[..., None], *what: Any) -> None:
        """Have something happen after a while."""
        self.at(self.now + seconds, do, *what)

    def send(self, do: Callable[..., None], *what: Any) -> None:
        """Have something happen at the other end of the network."""
        slow = self.is_talking and self.chance.random() < 0.02
        seconds = self.chance.uniform(0.0, 8.0 if slow else 0.05)
        self.later(seconds, do, *what)

    def put_off(self, server: Server, do: Callable[..., None], *what: Any) -> None:
        """Have something wait for a server that is suspended."""
        if not server.is_dead and server.suspended_until > self.now:
            self.at(server.suspended_until, do, *what)

    def run(self, seconds: float) -> int:
        """Let time pass; return how many things happened."""
        end, count = self.now + seconds, 0
        while self._events and self._events[0][0] <= end:
            self.now, _, do, what = heapq.heappop(self._events)
            do(*what)
            count += 1
        self.now = end
        return count

    def database(self) -> Log | None:
        """Return what answers at the database's addresses: the primary, or a former one."""
        if self.is_away:
            return None
        if self.former and self.chance.random() < 0.4:
            return self.former[-1]
        return self.log

    def some_name(self) -> str:
        """Return one of few names."""
        return self.chance.choice(self.names)

    def leave(self, client: Client) -> None:
        """Remember what somebody saw who is here no more."""
        self.gone[client.key] = client.private

    def note(self, position: int, line: bytes) -> None:
        """See that all have the same line at a position."""
        if self.lines.setdefault(position, line) != line:
            raise Broken(f"{line!r} and {self.lines[position]!r} stand at {position}")

    # What goes wrong.

    def disturb(self) -> None:
        """Have something go wrong, and go on a little later."""
        if not self.is_talking:
            return
        server = self.chance.choice(self.servers)
        kind = self.chance.random()
        if kind < 0.10:
            self.replace(server)
        elif kind < 0.35:
            server.suspended_until = self.now + self.chance.choice([1.0, 5.0, 15.0, 30.0])
        elif kind < 0.60:
            server.disconnect()
        elif kind < 0.67:
            self.is_away = True
            self.later(self.chance.choice([1.0, 8.0, 40.0]), self.come_back)
        elif kind < 0.75:
            self.fail_over()
        self.later(self.chance.uniform(0.5, 4.0), self.disturb)

    def replace(self, server: Server) -> None:
        """Kill a server and start another."""
        server.is_dead = True
        for client in self.clients:
            if client.connection and client.connection.server is server:
                client.lost()
        self.servers[self.servers.index(server)] = new = Server(self)
        self.later(self.chance.uniform(0.0, 5.0), new.run)

    def come_back(self) -> None:
        """End an outage."""
        self.is_away = False

    def fail_over(self) -> None:
        """Have the standby go on; the former primary has rounds that nobody else has."""
        former = self.log.former()
        self.former.append(former)
        for server in self.servers:
            if server.log is self.log:
                call = server.follower.request
                if server.asked_at is not None and self.chance.random() < 0.7:
                    former.append(call, self.now)
                server.disconnect()
        self.later(20.0, self.forget, former)

    def forget(self, former: Log) -> None:
        """Have a former primary answer no more."""
        self.former = [one for one in self.former if one is not former]

    # What must hold.

    def check(self) -> None:
        """See that all came right."""
        rooms = [json.dumps(server.room.state()) for server in self.servers]
        numbers = {server.follower.number for server in self.servers}
        if len(set(rooms)) != 1 or len(numbers) != 1:
            raise Broken(f"the rooms differ: {numbers}")
        self._check_presence(self.servers[0].room)
        texts = [protocol.parse(line.decode()) for line in self.lines.values()]
        said = [line.text for line in texts if line.kind is protocol.Kind.SAID]
        if len(said) != len(set(said)):
            raise Broken(f"said twice: {sorted(t for t in said if said.count(t) > 1)}")
        for client in self.clients:
            if client.waiting:
                raise Broken(f"{client.who} has no receipt of {[*client.waiting]}")
        self._check_private()

    def _check_presence(self, room: Room) -> None:
        here = {client.connection.session for client in self.clients if client.connection}
        ghosts = {*room.sessions} - here
        if ghosts or len(room.stays) != len(here):
            raise Broken(f"{[*room.stays.values()]} are here, and {here} are connected")
        known = {server.follower.server for server in self.servers}
        if {*room.servers} != known:
            raise Broken(f"{room.servers} are in, and {known} run")

    def _check_private(self) -> None:
        seen = {client.key: client.private for client in self.clients}
        for text in self.confirmed:
            key = self.meant[text]
            if key in seen and text not in seen[key]:
                raise Broken(f"{text} for {key} was confirmed and never seen")


def simulate(
    seed: int,
    *,
    servers: int = 4,
    clients: int = 8,
    seconds: float = 150.0,
    settle: float = SETTLE,
    without: int = 0,
) -> World:
    """Run a room on several machines through its faults, and then until all comes right."""
    world = World(seed, servers, clients, without)
    world.later(5.0, world.disturb)
    happened = world.run(seconds)
    world.is_talking = world.is_away = False
    world.former.clear()
    for server in world.servers:
        server.suspended_until = 0.0
    happened += world.run(settle)
    for server in world.servers:
        server.catch_up()
    world.check()
    assert happened > 5000
    return world


@pytest.mark.parametrize("seed", range(20))
def test_all_servers_have_one_room_whatever_goes_wrong(seed: int) -> None:
    """All rooms are equal, each line is there once, and nothing with a receipt is lost."""
    world = simulate(seed)
    assert len(world.lines) > 150
    assert len(world.confirmed) > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 200))
def test_all_servers_have_one_room_many_times(seed: int) -> None:
    """The same holds for many more runs."""
    simulate(seed)


@pytest.mark.long
@pytest.mark.timeout(300)  # it computes, beside whatever else the machine does
def test_hundreds_of_servers_have_one_room() -> None:
    """Two hundred servers with as many people agree too."""
    simulate(1, servers=200, clients=40, seconds=8.0, settle=45.0)


def in_log(room: Room, name: int, now: float, *entries: Any) -> None:
    """Have a room apply a server's round."""
    room.apply(Turn(name, now, room.progress.number + 1))
    for entry in entries:
        room.apply(entry)


def test_an_outage_of_any_length_ends_nobody() -> None:
    """A day without the database moves the log's clock by three seconds: all are still here."""
    room = Room(durable=True)
    in_log(room, 1, 100.0, Entered(1))
    in_log(room, 2, 101.0, Entered(2))
    for number, name in enumerate(("alice", "bob"), 1):
        key = Introduction(name, key="k" * number)
        room.apply(Claim(number << SERVER_BITS | 1, key, "192.0.2.1", 0.0))
    room.apply(Lost(2 << SERVER_BITS | 1, 0.0))
    in_log(room, 2, 90_000.0)
    in_log(room, 1, 90_000.1)
    assert room.present() == ["alice", "bob"]
    assert {*room.servers} == {1, 2}


@pytest.mark.parametrize("key", ["", "k1"])
def test_a_server_that_is_silent_takes_its_people_along(key: str) -> None:
    """Ten seconds after a server's last round its people leave; who has a key is held."""
    room = Room(durable=True)
    in_log(room, 1, 100.0, Entered(1))
    in_log(room, 2, 100.0, Entered(2))
    room.apply(Claim(2 << SERVER_BITS | 1, Introduction("bob", key=key), "192.0.2.1", 0.0))
    gone_at = ALIVE + HELD if key else ALIVE
    for second in range(1, 40):
        in_log(room, 1, 100.0 + second)
        assert (room.present() == ["bob"]) == (second <= gone_at)
    assert room.result.lines == [b"* bob joined the chat", b"* bob left the chat"]


def test_a_private_line_waits_for_its_reader_until_it_is_confirmed() -> None:
    """What was confirmed is kept no more, what was not comes with the next connection."""
    room = Room(durable=True)
    in_log(room, 1, 100.0, Entered(1))
    first, second, other = (1 << SERVER_BITS | number for number in (1, 2, 3))
    room.apply(Claim(first, Introduction("bob", whispers=0, key="k1"), "192.0.2.1", 0.0))
    room.apply(Claim(other, Introduction("ann"), "192.0.2.1", 0.0))
    for text in ("one", "two", "three"):
        room.apply(Whispered(other, first, text))
    room.apply(Got(first, 1))
    room.apply(Claim(second, Introduction("bob", whispers=2, key="k1"), "192.0.2.1", 0.0))
    begin = next(e for e in room.result.effects if isinstance(e, Begin) and e.session == second)
    assert [line for _, line in begin.mail] == [b"[from ann] three\n"]
    assert (begin.whispers, begin.missed_private) == (2, 0)
    room.apply(Got(second, 3))
    assert not room.mail["k1"].lines


def test_who_does_not_read_gets_no_more_than_is_kept() -> None:
    """Private lines are refused, to who has a key or not, when a thousand are unconfirmed."""
    room = Room(durable=True)
    in_log(room, 1, 100.0, Entered(1))
    ann, bob = (1 << SERVER_BITS | number for number in (1, 2))
    room.apply(Claim(ann, Introduction("ann"), "192.0.2.1", 0.0))
    room.apply(Claim(bob, Introduction("bob"), "192.0.2.1", 0.0))
    for number in range(MAIL_LINES):
        room.apply(Whispered(ann, bob, str(number)))
    with pytest.raises(protocol.Refusal, match="bob is not reading"):
        room.apply(Whispered(ann, bob, "one more"))
    room.apply(Got(bob, 1))
    room.apply(Whispered(ann, bob, "one more"))


def test_a_room_comes_back_from_its_state() -> None:
    """A room made of another's state, as JSON, goes on as the other does."""
    room = Room(77, durable=True)
    in_log(room, 1, 100.0, Entered(1))
    names = ["ann", "bob", "cid"]
    ann, bob, cid = (1 << SERVER_BITS | number for number in range(3))
    for session, name in zip((ann, bob, cid), names, strict=True):
        asked = Introduction(name, whispers=0, key=f"k{name}")
        room.apply(Claim(session, asked, "192.0.2.1", 0.0))
    room.apply(Whispered(ann, bob, "psst é"))
    room.apply(Promoted(ann))
    room.apply(Banned(ann, "eve", 0.0, "", 0.0))
    room.apply(Lost(bob, 0.0))
    room.apply(Left(cid, 0.0))
    other = Room.restored(json.loads(json.dumps(room.state())))
    for one in (room, other):
        in_log(one, 1, 101.0, Renamed(ann, "anna"))
        in_log(one, 1, 120.0)
    assert other.state() == room.state()
    assert other.result.lines == room.result.lines[-len(other.result.lines) :]
    assert (other.names, other.looks, other.keys) == (room.names, room.looks, room.keys)


def test_entries_stand_in_the_log_as_they_are() -> None:
    """What is read back from the log is what was written, for each kind of entry."""
    entries: list[Any] = [
        Claim(1, Introduction("ann", 5, 0, True, "k", 3), "192.0.2.1", 0.0),
        Said(1, ["ann: é".encode(), b"** ann waves"]),
        Whispered(1, 2, 'a "quoted" \\ text'),
        Renamed(1, "anna"), Left(1, 0.0), Lost(1, 0.0), Promoted(1), Kicked(1, 2, "why"),
        Banned(1, "bob", 5.0, "why", 0.0), Unbanned(1, "bob"), Entered(7, 6), Ended(7), Got(1, 2),
    ]  # fmt: skip
    assert decode_entries(encode_entries(entries)) == entries
    assert all(map(is_shared, entries))


ALONE = """
import sys, threading
sys.path.insert(0, {folder!r})
import server
with server.ChatServer(port=0):
    print(sorted(thread.name for thread in threading.enumerate()))
    print([name for name in ("json", "psycopg", "secrets") if name in sys.modules])
"""


WITHOUT_DRIVER = """
import sys
sys.argv[0] = "server.py"
sys.path.insert(0, {folder!r})
sys.modules["psycopg"] = None
import server
sys.exit(server.main(["--port", "0", "--history", "postgresql://127.0.0.1/chat"]))
"""


def test_a_driver_that_is_not_installed_is_named() -> None:
    """A shared history without its driver is refused in one line that says what to do."""
    folder = str(Path(program.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER.format(folder=folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    remedy = "pip install 'psycopg[binary]'"
    assert done.stderr == f"server.py: a history in PostgreSQL needs psycopg: {remedy}\n"
    assert done.returncode == 1


def test_a_server_alone_has_no_more_than_it_needs() -> None:
    """Without a shared history there is no thread and no import for it."""
    folder = str(Path(program.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(folder=folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    assert done.stdout == "['MainThread', 'broadcaster', 'pager', 'receive']\n[]\n"


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_can_be_left_out(rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the rules some run goes wrong, so the simulation would notice."""
    if rule == 7:
        monkeypatch.setattr(program, "ALIVE", float("inf"))
    for seed in range(40):
        try:
            simulate(seed, without=rule)
        except (Broken, program.Forked):
            return
    pytest.fail(f"nobody missed rule {rule}: {RULES[rule]}")


def test_a_round_that_cannot_be_read_takes_none_along() -> None:
    """Whoever waits for what stood before it in the same answer is told of the end."""
    follower = Follower(5)
    follower.start(10, [Row(11, 1.0, 5, 1, "[]")])
    outcome = Outcome()
    follower.begin([Handed(Said(1, [b"a: x"]), outcome, is_ours=True)])
    for unreadable in ("garbage", "{}", "[[99, 1]]", "[[1, 2]]", '[[10, 1, 2, 3, "new"]]'):
        with pytest.raises(HistoryError):
            follower.answered([Row(12, 2.0, 5, 2, "[]"), Row(13, 2.0, 6, 1, unreadable)])
    assert [one.outcome for one in follower.abandoned()] == [outcome]


def test_a_gap_takes_no_round_along() -> None:
    """Whoever waits for what stood before a row that is missing is told of the end too."""
    follower = Follower(5)
    follower.start(10, [Row(11, 1.0, 5, 1, "[]")])
    outcome = Outcome()
    follower.begin([Handed(Said(1, [b"a: x"]), outcome, is_ours=True)])
    with pytest.raises(Over):
        follower.answered([Row(12, 2.0, 5, 2, "[]"), Row(14, 2.0, 6, 1, "[]")])
    assert [one.outcome for one in follower.abandoned()] == [outcome]
