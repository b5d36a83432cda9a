"""The promises, put to the test by force: killed servers, failing calls, hostile clients."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import socket
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chat as support
import pytest
from chat import (
    DEADLINE,
    Peer,
    close_peers,
    no_leaks,
    room_lines,
    run_chat,
    run_server,
    wait_until,
)
from clients import Shown, chatting, flush
from proxy import Proxy
from trust import ROOT, Certificate, TlsPeer, ended, integrity, make_certificate, stored

import client
import protocol
import server
from client import ChatClient
from protocol import Connection, TlsConnection

Wrap = Callable[..., Any]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """The room's certificate, for 127.0.0.1."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long before trying again, and rounds follow each other closely."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(client, "RETRY_MAX", 0.05)
    monkeypatch.setattr(server, "ROUND", 0.001)


def seeded() -> random.Random:
    """Return a source of chance whose seed a failing test prints."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


# --- kill -9 -----------------------------------------------------------------


class Witness:
    """Listens to a room through its deaths and knows at which position each line stood."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}

    def watch(self, port: int) -> Peer:
        """Come in and hear the room from where the last connection ended."""
        peer = Peer(port).introduce(f"witness {max(self.seen, default=-1) + 1 or -20}")
        self._peer = peer
        self._next = -1
        return peer

    def note(self) -> None:
        """Take down what comes until the server dies."""
        for line in ended(self._peer):
            if (position := protocol.position_in(line)) is not None:
                self._next = position
            elif protocol.parse(line).in_room:
                assert self._next not in self.seen, f"position {self._next} is given twice"
                self.seen[self._next] = line
                self._next += 1


def killed_again_and_again(file: Path, rounds: int) -> int:
    """Kill a busy server at random moments; see that all that was seen is in its file.

    Return how many lines that were.
    """
    chance, witness = seeded(), Witness()
    said: dict[str, list[str]] = {"alice": [], "bob": []}
    with Proxy(0) as proxy, contextlib.ExitStack() as stack:
        chats: dict[str, tuple[ChatClient, Shown]] = {}
        for number in range(rounds):
            with no_leaks_of_server("--history", str(file), "--rate-limit", "0") as process:
                proxy.server = process.port
                witness.watch(process.port)
                if not chats:
                    for name in said:
                        chats[name] = stack.enter_context(chatting(proxy.port, name))
                for name in (chance.choice([*said]) for _ in range(chance.randrange(4, 120))):
                    text = f"{len(said[name])} in round {number}"
                    said[name].append(text)
                    chats[name][0].send(text)
                name = chance.choice([*said])
                mark = chance.randrange(len(said[name])) if said[name] else 0
                if said[name] and chance.random() < 0.7:
                    chats[name][1].wait_for(f"{name}: {said[name][mark]}")
                threading.Event().wait(chance.uniform(0.0, 0.03))
                proxy.server = 0  # its port may be another server's as soon as it is dead
                process.stop_now()
                witness.note()
            kept = stored(file)
            assert integrity(file) == "ok"
            assert witness.seen.items() <= kept.items()
            for _, shown in chats.values():
                assert set(shown.room) <= set(kept.values())
        with run_server("--history", str(file), "--rate-limit", "0") as process:
            proxy.server = process.port
            for chat, _ in chats.values():
                flush(chat)
            carol = Peer(process.port).join("carol")
            carol.send("over")
            for _, shown in chats.values():
                shown.wait_for("carol: over")
            transcripts = [
                [line for line in shown.room if not line.startswith("* ")]
                for _, shown in chats.values()
            ]
            for chat, _ in chats.values():
                assert chat.failed == 0
            proxy.go_away()
    assert transcripts[0] == transcripts[1]
    for name, texts in said.items():
        own = [
            line for line in transcripts[0] if line.startswith(f"{name}: ") and "over" not in line
        ]
        assert own == [f"{name}: {text}" for text in texts]
    return len(witness.seen)


@contextlib.contextmanager
def no_leaks_of_server(*options: str) -> Iterator[Any]:
    """Run a server that is to be killed."""
    process = support.Server(*options)
    process.stop_now = lambda: process.stop(9)  # type: ignore[attr-defined]
    try:
        process.port = int(process.expect_log(r"listening on \S+:(\d+)\n")[1])
        yield process
        assert "Traceback" not in process.log(), process.log()
    finally:
        process.end()


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("quick")
def test_killed_server_keeps_every_line_that_was_seen(tmp_path: Path) -> None:
    """After kill -9 at any moment, all that was seen is kept, once, and clients make it whole."""
    with no_leaks():
        assert killed_again_and_again(tmp_path / "room.db", 30) > 30


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("quick")
def test_killed_server_keeps_every_line_many_times(tmp_path: Path) -> None:
    """The same holds for many more rounds, with a file that has grown long."""
    with no_leaks():
        assert killed_again_and_again(tmp_path / "room.db", 150) > 150


# --- The n-th failing call ---------------------------------------------------


class Nth:
    """Counts the calls of a function while armed, and makes the n-th of them fail."""

    def __init__(self, fail_at: int, error: Callable[[], Exception]) -> None:
        self.fail_at = fail_at
        self.error = error
        self.calls = 0
        self.armed = False
        self._lock = threading.Lock()  # guards the count

    def check(self) -> None:
        """Count a call, or raise."""
        if not self.armed:
            return
        with self._lock:
            self.calls += 1
            if self.calls == self.fail_at:
                raise self.error()

    def before(self, function: Wrap) -> Wrap:
        """Return a function that is checked before it is called."""

        def checked(*arguments: Any, **options: Any) -> Any:
            self.check()
            return function(*arguments, **options)

        return checked


def break_calls(patch: pytest.MonkeyPatch, what: str, nth: Nth) -> None:
    """Have the n-th call of one kind fail, at the seam between the chat and the system."""
    if what in ("send", "receive_now"):
        for kind in (Connection, TlsConnection):
            patch.setattr(kind, what, nth.before(getattr(kind, what)))
    elif what == "accept":
        patch.setattr(socket.socket, "accept", nth.before(socket.socket.accept))
    elif what == "start":
        patch.setattr(threading.Thread, "start", nth.before(threading.Thread.start))
    elif what == "handshake":
        patch.setattr(TlsConnection, "shake_hands", nth.before(TlsConnection.shake_hands))
    else:
        break_database(patch, what, nth)


def break_database(patch: pytest.MonkeyPatch, statement: str, nth: Nth) -> None:
    """Have the n-th of one kind of statement fail."""

    class Faulty(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith(statement):
                nth.check()
            return super().execute(sql, *values)

        def executemany(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith(statement):
                nth.check()
            return super().executemany(sql, *values)

    connect = sqlite3.connect
    patch.setattr(
        sqlite3, "connect", lambda *where, **options: connect(*where, factory=Faulty, **options)
    )


def converse(join: Callable[[], Peer]) -> list[str]:
    """Have two people come, talk and go, whatever happens to them; return all that they saw."""
    heard: list[str] = []
    scripts = (
        ("alice", ["hello", "/me waves", "/names", "/history 5", "/nick alicia", "/help"]),
        ("bob", ["hello too", "/msg bob psst", "/search hello", "x" * 2000, "\x07", "bye"]),
    )
    for name, script in scripts:
        peers = []
        with contextlib.suppress(OSError):
            peers.append(join())
            peers[0].send(f"{name} 0", *script, "/quit")
        for peer in peers:
            heard += ended(peer)
            peer.close()
    return heard


def broken_handshake() -> ssl.SSLError:
    """Return an error as OpenSSL gives it."""
    with pytest.raises(ssl.SSLError) as caught:
        ssl.create_default_context(cadata="no certificate")
    return caught.value.with_traceback(None)


ERRORS: dict[str, Callable[[], Exception]] = {
    "send": lambda: ConnectionResetError(104, "reset by the test"),
    "receive_now": lambda: ConnectionResetError(104, "reset by the test"),
    "accept": lambda: OSError(24, "too many open files, says the test"),
    "start": lambda: RuntimeError("can't start new thread, says the test"),
    "handshake": broken_handshake,
    "BEGIN": lambda: sqlite3.OperationalError("disk I/O error, says the test"),
    "INSERT": lambda: sqlite3.OperationalError("database or disk is full, says the test"),
    "COMMIT": lambda: sqlite3.OperationalError("disk I/O error, says the test"),
    "SELECT": lambda: sqlite3.OperationalError("disk I/O error, says the test"),
}


def survive(
    what: str, fail_at: int, file: Path, certificate: Certificate | None, patch: pytest.MonkeyPatch
) -> int:
    """Hold a conversation in which one call fails, and see that the room is well after it."""
    nth = Nth(fail_at, ERRORS[what])
    with patch.context() as broken:
        break_calls(broken, what, nth)
        tls = certificate.server() if certificate else None
        with run_chat(history=str(file), tls=tls) as room:
            port = room.port

            def join() -> Peer:
                return TlsPeer(port, certificate) if certificate else Peer(port)

            nth.armed = True
            heard = converse(join)
            nth.armed = False
            wait_until(lambda: not room.names, "everybody to have left")
            carol = join().join("carol")
            carol.send("/names", "hello")
            carol.expect("-> 1 here: carol", "carol: hello")
            assert room.names == ["carol"]
            seen = room_lines(heard)
    kept = [*stored(file).values()]
    assert set(seen) <= set(kept)
    assert integrity(file) == "ok"
    return nth.calls


CASES = [
    *((what, False) for what in ERRORS if what != "handshake"),
    *((what, True) for what in ("send", "receive_now", "handshake", "start")),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("what", "inside_tls"), CASES)
def test_every_call_may_fail(
    what: str,
    inside_tls: bool,
    certificate: Certificate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever call fails, the server serves a newcomer, its lists are right, nothing leaks."""
    inside = certificate if inside_tls else None
    faults: list[str] = []
    monkeypatch.setattr(server.log, "exception", lambda text, *about: faults.append(text % about))
    for fail_at in itertools.count(1):
        file = tmp_path / f"{fail_at}.db"
        if survive(what, fail_at, file, inside, monkeypatch) < fail_at:
            assert fail_at > 2, f"no {what} was made to fail"
            break
    assert what == "SELECT" or not faults, "a fault that nobody foresaw"


@pytest.mark.usefixtures("quick")
def test_thread_that_cannot_start_for_a_client_that_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two faults at once, no thread and no way to say so, leave nothing behind either."""
    starts, sends = Nth(1, ERRORS["start"]), Nth(1, ERRORS["send"])
    with monkeypatch.context() as broken:
        break_calls(broken, "start", starts)
        break_calls(broken, "send", sends)
        with run_chat() as room:
            starts.armed = sends.armed = True
            with socket.create_connection(("127.0.0.1", room.port)):
                wait_until(lambda: sends.calls, "the server to try to answer")
                starts.armed = sends.armed = False
                alice = Peer(room.port).join("alice")
                alice.send("hello")
                alice.expect("alice: hello")
                assert len(room.clients) == 1


# --- Hostility ---------------------------------------------------------------


VERBS = [*protocol.COMMANDS, "", "none", "/", "quit now", "NICK", "me\t"]


def nonsense(chance: random.Random) -> bytes:
    """Return bytes that no friend would send."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 3000))
    if kind == 1:
        return b"\x16\x03\x01" + chance.randbytes(50)
    if kind == 2:
        return b"x" * chance.randrange(1000, 70_000)
    if kind == 3:
        return b"alice: I am alice\nbob: and I am bob\n* bob left the chat\n-> at 5\n"
    if kind == 4:
        return b"\n" * chance.randrange(500)
    if kind == 5:
        name = chance.choice(["alice", "bob", "server", "mallory", "eve", "*", "->"])
        return f"/{chance.choice(VERBS)} {name} {chance.randrange(9**9)}\n".encode()
    if kind == 6:
        return b"/msg alice \x1b[2J\n/msg alice psst\n/msg bob psst\n/nick Alice\n/nick eve\n"
    return f"/{chance.choice(VERBS)}\n".encode() * chance.randrange(1, 30)


def harass(port: int, seed: int, over: threading.Event) -> None:
    """Come, behave badly and go, again and again."""
    chance = random.Random(seed)
    while not over.is_set():
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.settimeout(0.2)
            if chance.random() < 0.3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", port))
            if chance.random() < 0.8:
                name = chance.choice(["mallory", "trudy", "alice", "BOB", "eve", "x" * 30])
                key = chance.choice(["", " -5", " 0", " 1 " + "ab" * 8, " -0 zz", " 9" * 3])
                sock.sendall(f"{name}{key}\n".encode())
            for _ in range(chance.randrange(12)):
                data = nonsense(chance)
                for part in (data[:7], data[7:]) if chance.random() < 0.3 else (data,):
                    sock.sendall(part)
                if chance.random() < 0.5:
                    sock.recv(chance.choice([1, 100, 65536]))
                if chance.random() < 0.1:
                    over.wait(chance.uniform(0, 0.3))
            if chance.random() < 0.3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("durable", [False, True])
def test_hostile_clients_do_not_disturb_a_conversation(tmp_path: Path, durable: bool) -> None:
    """Beside random bytes, commands, resets and stalls, two people see a perfect transcript."""
    chance, over = seeded(), threading.Event()
    options: dict[str, Any] = {"history": str(tmp_path / "room.db")} if durable else {}
    with (
        run_chat(max_unnamed=16, name_deadline=1.0, **options) as room,
        chatting(room.port, "alice") as (alice, alices),
        chatting(room.port, "bob") as (bob, bobs),
    ):
        alices.wait_for("* bob joined the chat")
        with ThreadPoolExecutor(6) as pool:
            for _ in range(6):
                pool.submit(harass, room.port, chance.randrange(2**32), over)
            try:
                converse_well(alice, alices, bob, bobs)
            finally:
                over.set()
        bob.send("over")
        alices.wait_for("bob: over")
        bobs.wait_for("bob: over")
    heard = _after(alices.room, "* bob joined the chat", "bob: over")
    assert heard == _after(bobs.room, "* bob joined the chat", "bob: over")
    own = [line for line in heard if line.startswith(("alice: ", "bob: "))]
    expected = [f"{name}: {turn}" for turn in range(TURNS) for name in ("alice", "bob")]
    assert own == [*expected, "bob: over"]
    for line in heard:
        assert line.isascii()
        assert line.isprintable()


TURNS = 150


def converse_well(alice: ChatClient, alices: Shown, bob: ChatClient, bobs: Shown) -> None:
    """Take turns, each after hearing the other."""
    for turn in range(TURNS):
        alice.send(str(turn))
        bobs.wait_for(f"alice: {turn}")
        bob.send(str(turn))
        alices.wait_for(f"bob: {turn}")


def _after(lines: list[str], first: str, last: str) -> list[str]:
    return lines[lines.index(first) : lines.index(last) + 1]


def test_nobody_speaks_under_anothers_name(tmp_path: Path) -> None:
    """Whatever mallory sends, no line of the room looks as if it came from alice or the room."""
    with run_chat(fmt="utf-8") as room:
        alice, mallory = Peer(room.port).join("alice"), Peer(room.port).join("mallory")
        alice.expect("* mallory joined the chat")
        tries = [
            "alice: it is me",
            "* alice left the chat",
            "** alice waves",
            "[from alice] psst",
            "-> at 5",
            "NICK",
            "x\ralice: over a return",
            "x\x0balice: over a tab",
            "x\x85alice: over a newline",
            "x\u2028alice: over a separator",
            "x\u202ealice: backwards",
            "mallory: alice: twice",
            "/me is alice: you know",
            "/nick alice",
            "/nick ALICE",
            "/nick server",
            "/nick al\u0131ce",
            "/nick alice:",
        ]
        mallory.send(*tries, "over")
        for line in alice.lines_until("mallory: over"):
            assert line.startswith(("mallory: ", "** mallory "))
            assert line.isprintable()


@pytest.mark.parametrize("inside_tls", [False, True])
def test_of_fifty_that_claim_one_name_one_gets_it(
    inside_tls: bool, certificate: Certificate
) -> None:
    """All claim it at the same moment; one is welcomed, and the others are told it is taken."""
    with run_chat(tls=certificate.server() if inside_tls else None) as room:
        peers: list[Peer] = []
        for _ in range(50):
            peers.append(TlsPeer(room.port, certificate) if inside_tls else Peer(room.port))
            peers[-1].expect("NICK")
        together = threading.Barrier(len(peers), timeout=DEADLINE)

        def claim(peer: Peer) -> str:
            together.wait()
            peer.send(random.choice(["alice", "Alice", "ALICE"]))
            return peer.next_line()

        with ThreadPoolExecutor(len(peers)) as pool:
            answers = list(pool.map(claim, peers))
        welcomed = [line for line in answers if line.startswith("-> Welcome, ")]
        refused = [line for line in answers if re.fullmatch("-> the name .* is taken; .*", line)]
        assert (len(welcomed), len(refused)) == (1, 49)
        assert len(room.names) == 1
        assert len(room.history.last(100)) == 1


# --- Memory ------------------------------------------------------------------


# What the constants allow one client: two answers that do not fit the outbox any more, one on its
# way to the socket and one behind it; a chunk of the room's lines; what was read at once, in lines
# of two bytes, each an object of 48 bytes in a list; a line that has no end yet; its thread.
ANSWER = server.OUTBOX_BYTES + server.MAX_ANSWER * protocol.MAX_SERVER_LINE
READ = protocol.RECEIVE + protocol.RECEIVE // 3 * (48 + 8)
BOUND = 2 * ANSWER + server.CHUNK * protocol.MAX_SERVER_LINE + READ + 4096 + server.STACK

SMALL_BUFFERS = """
import socket, sys
create = socket.create_server
def create_small(*where, **options):
    listener = create(*where, **options)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return listener
socket.create_server = create_small
sys.path.insert(0, {root!r})
import server
sys.exit(server.main())
"""


def resident(pid: int) -> int:
    """Return how many bytes of memory a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def wait_until_idle(pid: int) -> None:
    """Wait until a process has used no time for a while."""
    same, last = 0, ""

    def is_idle() -> bool:
        nonlocal same, last
        times = " ".join(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        same, last = same + 1 if times == last else 0, times
        return same >= 50

    wait_until(is_idle, "the server to have nothing to do", 60.0)


@pytest.mark.timeout(120)
def test_memory_of_a_client_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred clients that each hold all that they can stay under the bound."""
    runner = tmp_path / "small.py"
    runner.write_text(SMALL_BUFFERS.format(root=str(ROOT)))
    monkeypatch.setattr(support, "SERVER", runner)
    count = 200
    with run_server("--rate-limit", "0") as process:
        alice = Peer(process.port).join("alice")
        alice.send(*["x" * 1000] * 50)
        alice.lines(50)
        before = resident(process.pid)
        # Answers that are not read fill the outbox; then short commands that are not looked at
        # any more, and a line that does not end.
        greed = b"/history 50\n" * 120 + b"/a\n" * 60_000 + b"unfinished"
        stuck = []
        for number in range(count):  # one by one: too many without a name would be turned away
            stuck.append(Peer(process.port, buffer=4096).introduce(f"greedy{number}"))
            stuck[-1].expect_match("-> Welcome, .*")
        with ThreadPoolExecutor(count) as pool:
            taken = list(pool.map(lambda peer: peer.send_until_blocked(greed, 1.0), stuck))
        assert max(taken) < len(greed), "the server took all of it"
        alice.send("/names")
        while not alice.next_line().startswith(f"-> {count + 1} here: "):
            pass
        alice.send(*["x" * 1000] * 1000)
        alice.expect_eventually("alice: " + "x" * 1000)
        wait_until_idle(process.pid)
        held = (resident(process.pid) - before) / count
        print(f"{held / 1024:.0f} KiB for each client, {BOUND / 1024:.0f} KiB allowed")
        assert held < BOUND
        close_peers()
        process.expect_log(f"greedy{count - 1} .* left")
