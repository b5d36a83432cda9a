"""The room as a machine: the same entries make the same room, however they are cut into rounds."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chat import Peer, hand_in, pair, room_lines, run_chat, session_of, wait_until

import protocol
import server as server_module
from protocol import Introduction, Refusal
from server import (
    Answered,
    Asked,
    Banned,
    Begin,
    ChatServer,
    Claim,
    End,
    Entry,
    Farewell,
    Gone,
    Handed,
    Kicked,
    Left,
    Lost,
    Outcome,
    Passed,
    Promoted,
    Renamed,
    Room,
    Said,
    ToOne,
    Unbanned,
    Whispered,
)

COUNT = 10_000
NAMES = ["alice", "Alice", "aIice", "bob", "B0b", "BOb", "carol", "dave", "erin", "mark", "rnark"]
NAMES += [f"p{number}" for number in range(30)]
KEYS = ["", "", "a" * 64, "b" * 64, "c" * 64, "d" * 64]
ADDRESSES = ["127.0.0.1", "192.0.2.1", "192.0.2.2", "2001:db8::/64"]


class Script:
    """Makes entries by chance, of people who come, talk and go, and of some who are gone."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 1000.0
        self.sessions = 0
        self.here: list[int] = []  # those that have not left by themselves, at most forty

    def entries(self, count: int) -> list[Entry]:
        """Return so many entries."""
        return [self._entry() for _ in range(count)]

    def _entry(self) -> Entry:
        self.now += self.chance.choice([0.0, 0.01, 1.0, -0.5])
        makers: list[Callable[[int], Entry]] = [
            self._claim, self._claim, self._claim, self._said, self._said, self._said,
            self._whispered, self._whispered, self._renamed, self._kicked, self._banned,
            self._asked,
            lambda session: Left(self._leaver(session), self.now),
            lambda session: Lost(self._leaver(session), self.now),
            lambda session: Promoted(session),
            *[lambda session: Unbanned(session, self.chance.choice(NAMES))] * 4,
            lambda session: Passed(self.now + 10.0 * self.chance.random()),
            lambda session: Answered(session, [b"-> hello\n"]),
        ]  # fmt: skip
        return self.chance.choice(makers)(self._session())

    def _session(self) -> int:
        """Return one that may be here, or any of the last."""
        if self.chance.random() < 0.8 and self.here:
            return self.chance.choice(self.here)
        return self.chance.randint(max(0, self.sessions - 60), self.sessions)

    def _leaver(self, session: int) -> int:
        if session in self.here:
            self.here.remove(session)
        return session

    def _claim(self, session: int) -> Entry:
        self.sessions += 1
        self.here = [*self.here, self.sessions][-40:]
        key = self.chance.choice(KEYS)
        whispers = self.chance.choice([None, 0, 1, 5, 2000]) if key else None
        asked = Introduction(
            self.chance.choice(NAMES), None, 20, wants_position=True, key=key, whispers=whispers
        )
        return Claim(self.sessions, asked, self.chance.choice(ADDRESSES), self.now)

    def _said(self, session: int) -> Entry:
        return Said(session, [b"x: %d" % self.chance.randint(0, 99)] * self.chance.randint(1, 3))

    def _whispered(self, session: int) -> Entry:
        return Whispered(session, self._session(), "psst" * self.chance.randint(1, 9))

    def _renamed(self, session: int) -> Entry:
        return Renamed(session, self.chance.choice(NAMES))

    def _kicked(self, session: int) -> Entry:
        return Kicked(session, self._session(), self.chance.choice(["", "out"]))

    def _banned(self, session: int) -> Entry:
        until = self.chance.choice([0.0, self.now + 5.0])
        return Banned(session, self.chance.choice(NAMES), until, "", self.now)

    def _asked(self, session: int) -> Entry:
        return Asked(session, self.chance.choice(["names", "bans"]))


class Record:
    """A room to which entries are applied in rounds, and all that comes of it."""

    def __init__(self) -> None:
        self.room = Room(5000, durable=True)
        self.lines: list[bytes] = []
        self.effects: list[Any] = []
        self.outcomes: list[Any] = []

    def round(self, entries: list[Entry], *, keeps: bool = True) -> None:
        """Apply entries as one round."""
        draft = self.room.draft(keeps=keeps)
        self.outcomes += [self._outcome(draft, entry) for entry in entries]
        self.lines += draft.result.lines
        self.effects += draft.result.effects
        self.room = draft

    def _outcome(self, draft: Room, entry: Entry) -> Any:
        try:
            return draft.apply(entry)
        except (Refusal, Farewell, Gone) as refusal:
            return type(refusal).__name__, str(refusal)

    def state(self) -> dict[str, Any]:
        """Return all that the room is."""
        transient = {"result", "is_shared"}
        return {name: value for name, value in vars(self.room).items() if name not in transient}


@pytest.mark.parametrize("seed", range(5))
def test_the_same_entries_make_the_same_room_however_they_are_cut(seed: int) -> None:
    """Lines, positions, names, bans, outcomes and effects do not depend on the rounds."""
    entries = Script(seed).entries(COUNT)
    one, other = Record(), Record()
    for entry in entries:
        one.round([entry])
    chance = random.Random(-seed - 1)
    rest = list(entries)
    while rest:
        size = chance.choice([1, 2, 10, 300])
        other.round(rest[:size])
        del rest[:size]
    assert one.lines == other.lines
    assert one.outcomes == other.outcomes
    assert one.effects == other.effects
    assert one.state() == other.state()
    assert one.room.end == 5000 + len(one.lines)
    assert len(one.lines) > 500
    refused = {outcome[0] for outcome in one.outcomes if isinstance(outcome, tuple)}
    assert refused >= {"Gone", "Refusal", "Denied", "Farewell"}


@pytest.mark.parametrize("seed", range(3))
def test_a_room_holds_together_whatever_happens(seed: int) -> None:
    """After each entry names, looks, keys and sessions are those of the stays, no more."""
    record = Record()
    for entry in Script(100 + seed).entries(3000):
        record.round([entry], keeps=record.room.end % 7 != 0)
        room = record.room
        stays = room.stays.values()
        assert room.names == {protocol.fold(stay.name): stay.number for stay in stays}
        assert room.looks == {protocol.look(stay.name): stay.number for stay in stays}
        assert room.keys == {stay.key: stay.number for stay in stays if stay.key}
        assert room.sessions == {s.session: s.number for s in stays if s.session is not None}
        assert all(stay.key or stay.session is not None for stay in stays)
        assert all(not ban.concerns(stay.name, stay.address, room.time) or stay.is_operator
                   for stay in stays for ban in room.bans)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_draft_leaves_the_room_as_it_was(seed: int) -> None:
    """Whatever is applied to a draft, the room that others read does not change."""
    record = Record()
    for entry in Script(200 + seed).entries(2000):
        before = record.state()
        copies = {k: v.copy() if isinstance(v, dict) else v for k, v in before.items()}
        room = record.room
        record.round([entry])
        assert {name: getattr(room, name) for name in before} == copies


def test_each_session_begins_and_ends_once() -> None:
    """Effects tell of each session one beginning, then what is for it, then one end."""
    record = Record()
    record.round(Script(7).entries(COUNT))
    life: dict[int, str] = {}
    for effect in record.effects:
        if isinstance(effect, Begin):
            assert effect.session not in life
            life[effect.session] = "following"
        else:
            assert life[effect.session] == "following", effect
            life[effect.session] = "ended" if isinstance(effect, End) else "following"
    present = {session for session, state in life.items() if state == "following"}
    assert present == set(record.room.sessions)


# --- Through the server ------------------------------------------------------


@pytest.fixture
def room() -> Iterator[ChatServer]:
    """An empty room."""
    with run_chat() as server:
        yield server


ENTRIES: list[Callable[[int], Entry]] = [
    lambda session: Claim(session + 1000, Introduction("new"), "127.0.0.1", 0.0),
    lambda session: Said(session, [b"alice: x"]),
    lambda session: Whispered(session, session, "x"),
    lambda session: Renamed(session, "alicia"),
    lambda session: Left(session, 0.0),
    lambda session: Lost(session, 0.0),
    lambda session: Promoted(session),
    lambda session: Kicked(session, session, ""),
    lambda session: Banned(session, "carol", 0.0, "", 0.0),
    lambda session: Unbanned(session, "carol"),
    lambda session: Passed(0.0),
    lambda session: Asked(session, "names"),
    lambda session: Answered(session, []),
]


@pytest.mark.parametrize("make", ENTRIES, ids=lambda make: type(make(1)).__name__)
def test_each_entry_has_an_outcome_when_applying_it_fails(
    room: ChatServer,
    make: Callable[[int], Entry],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who waits is told that something went wrong; the rest of the round goes on."""
    alice, bob = pair(room.port)
    entry, outcome = make(session_of(room, "alice")), Outcome()
    apply = Room.apply

    def fail(draft: Room, applied: Any) -> Any:
        if applied is entry:
            raise ValueError("a fault of the test")
        return apply(draft, applied)

    monkeypatch.setattr(Room, "apply", fail)
    room.broadcaster.entries.hand_in(Handed(entry, outcome))
    hand_in(room, Said(session_of(room, "bob"), [b"bob: after"]))
    with pytest.raises(Refusal, match="something went wrong here"):
        outcome.wait()
    if isinstance(entry, Left | Lost):
        bob.expect("* alice left the chat")  # whatever fails, who leaves is let go
    bob.expect("bob: after")
    if not isinstance(entry, Left | Lost):
        alice.expect("bob: after")
    assert "a fault of the test" in caplog.text


def test_each_entry_has_an_outcome_when_the_room_stops() -> None:
    """Nobody waits for what was handed in before the end, and nothing is handed in after it."""
    with run_chat() as server:
        Peer(server.port).join("alice")
        session = session_of(server, "alice")
        outcomes = [Outcome() for _ in range(100)]
        for outcome in outcomes:
            entry = Answered(session, [])
            server.broadcaster.entries.hand_in(Handed(entry, outcome))
    for outcome in outcomes:
        assert outcome.wait() is None
    with pytest.raises(Gone):
        server.broadcaster.entries.hand_in(Handed(Passed(0.0)))


@pytest.fixture
def hasty() -> Iterator[None]:
    """Have threads take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_a_crowd_under_hasty_threads(hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve who talk, whisper, rename, come back and leave: one order, and nothing is left."""
    monkeypatch.setattr(server_module, "HELD", 0.05)
    with run_chat() as room:
        witness = Peer(room.port).join("witness")

        def live(number: int) -> None:
            name, key = f"peer{number}", f"{number:032x}"
            for turn in range(6):
                peer = Peer(room.port).introduce(f"{name} -0 {key}")
                peer.expect_match("-> Welcome.*")
                peer.send(
                    *(f"turn {turn} line {line}" for line in range(20)),
                    "/msg witness psst", f"/nick other{number}", "under another name",
                    f"/nick {name}", "/names", "/history 5", "done",
                )  # fmt: skip
                peer.expect_eventually(f"{name}: done")
                if turn % 3 == 0:
                    peer.vanish()
                elif turn % 3 == 1:
                    peer.send("/quit").rest()
                else:
                    Peer(room.port).introduce(f"{name} -0 {key}").expect_match("-> Welcome.*")
                    peer.rest()

        threads = [threading.Thread(target=live, args=[number]) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        witness.send("over")
        seen = room_lines(witness.lines_until("witness: over"))
        kept = [text for _, text in room.history.last(len(seen))]
        assert kept[: len(seen)] == seen
        for number in range(12):
            mine = [line for line in seen if line.startswith(f"peer{number}: turn ")]
            assert mine == [
                f"peer{number}: turn {turn} line {line}" for turn in range(6) for line in range(20)
            ]
        for client in room.clients[1:]:
            client.cut()
        wait_until(lambda: room.names == ["witness"], "the others to be gone")


def test_every_private_line_is_for_one_alone() -> None:
    """What is whispered is an effect for one session, and no line of the room."""
    record = Record()
    for number, name in enumerate(("alice", "bob"), 1):
        record.round([Claim(number, Introduction(name), "127.0.0.1", 0.0)])
    lines = len(record.lines)
    record.round([Whispered(1, 2, "psst")])
    assert len(record.lines) == lines
    assert [e for e in record.effects if isinstance(e, ToOne)][-2:] == [
        ToOne(1, record.room.end, b"-> to bob: psst\n"),
        ToOne(2, record.room.end, b"[from alice] psst\n"),
    ]
