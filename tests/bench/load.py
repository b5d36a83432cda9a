"""The load: a room full of real connections in one process, without threads.

    python load.py < job.json > figures.json

Reads one `Job` from standard input, fills a room on the server it names, lets
the clients talk, and writes what was seen to standard output; progress goes to
standard error. It takes the server's CPU time and memory from Linux and
speaks to nothing outside 127.0.0.0/8.

How it measures, and why the figures can be trusted:

* Open loop. When a line is due is a matter of the clock, never of the server.
  A line carries the time it was *due*, so a server that stops the sender for a
  second shows that second in its latency.
* Two kinds of reader. *Watchers*, spread evenly from the first to join to the
  last, are read in full and, unless it is a flood, at once: they give the
  latencies. The *crowd* is emptied in turn, fifty sockets every millisecond,
  with MSG_TRUNC, which makes Linux throw the bytes away and say how many. All
  lines are made equally long, so bytes divided by the length of a line are
  deliveries, and one core of Python can receive what a fast server on another
  core sends. In every run the watchers count both ways; `count_error` is the
  difference.
* When the load itself used its core up, the figures say so (`load_core`).
"""

import gc
import json
import os
import re
import select
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MARK = b"%"
"""Begins the text of every line that is counted, and stands nowhere else."""

STAMP = 15
"""Digits of a stamp: microseconds of the monotonic clock, which all processes share."""

FILLER = b" the quick brown fox jum"
"""Makes a text 40 bytes long, about what people write; a torn line lacks its end."""

MISSED_PREFIX = b"-> missed "
MISSED = re.compile(rb"(?m)^-> missed (\d+) lines")
"""What our server says to a reader that it had to skip ahead."""

TEXT = len(MARK) + STAMP + len(FILLER)

SAMPLES = 64
"""Stamps read from one piece of input at most, so that a flood is not slowed by its reading."""

SLICE, PAUSE = 50, 0.001
"""The crowd is emptied in slices of so many sockets, so many seconds apart."""

BLOCK = 64
"""Lines that a flooding sender writes at once; they share a stamp."""

FLOOD_BUFFER = 64 * 1024
"""Send buffer of a flooding sender: what waits in its own kernel is not the server's delay."""

STUCK_BUFFER = 256 * 1024
"""Receive buffer of a reader that is to stop, so that it fills soon, and not before."""

QUIET = 0.2
"""Seconds without a byte for anyone after which a room has settled."""

ALL_BUT = 0.999
"""Share of the deliveries due after which the last few are not waited for."""

SPIN = 0.0002
"""Seconds before a line is due from which the load watches the clock: a sleep ends too late."""

PATIENCE = 30.0
"""Seconds to wait for a room to settle, or for the lines that are still on their way."""

GRACE = 0.25
"""Seconds after its last line by which a server that keeps up has delivered everything."""

ADDRESSES = 100
"""Source addresses, 127.0.100.100 and up: more ports, and all written equally long."""

CPUCLOCK_SCHED = 2
PAGE = os.sysconf("SC_PAGE_SIZE")


class LoadError(Exception):
    """The scenario could not be carried out; the text says why, for the table."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a kind of server is spoken to: `{name}` stands for the client's name.

    `steps` are what to wait for and what to answer then, in order; after the last
    of them the client is in the room. `line` is a text said to the room.
    """

    steps: tuple[tuple[bytes, str], ...]
    line: str


DIALECTS = {
    "ours": Dialect(((b"NICK\n", "{name}\n"), (b"-> Welcome", "")), "{name}: {text}\n"),
    "tutorial": Dialect(((b"NICK", "{name}"), (b"Connected to server!", "")), "{name}: {text}\n"),
    "irc": Dialect(
        (
            (b"", "NICK {name}\r\nUSER {name} 0 * :bench\r\n"),
            (b" 001 ", "JOIN #bench\r\n"),
            (b" 366 ", ""),
        ),
        "PRIVMSG #bench :{text}\r\n",
    ),
}


@dataclass(slots=True)
class Job:
    """One scenario on one server.

    `rate` is lines a second of all senders together, 0 for a flood; the first
    `senders` clients send. `stuck` clients more stop reading when half is over. `echo` says whether
    an author gets its own line back. All times are seconds.
    """

    port: int
    pid: int
    dialect: str
    echo: bool
    clients: int
    senders: int
    rate: float
    watchers: int
    stuck: int
    at_once: int
    seconds: float
    join_deadline: float
    authority: str = ""
    title: str = ""
    more: list[tuple[int, int]] = field(default_factory=list)
    """Ports and process numbers of the other servers of the room."""

    @property
    def pids(self) -> list[int]:
        return [self.pid, *(pid for _, pid in self.more)]

    def port_for(self, index: int) -> int:
        """Spread the clients over the servers."""
        return [self.port, *(port for port, _ in self.more)][index % (1 + len(self.more))]


@dataclass(slots=True)
class Heard:
    """What the watchers read in the time that is measured; latencies are in microseconds."""

    latencies: list[int] = field(default_factory=list)
    torn: int = 0
    missed: int = 0


# eq=False: a member is itself, and can stand in a set
@dataclass(slots=True, eq=False)
class Member:
    """One connection of the room."""

    name: str
    sock: socket.socket
    started: float
    step: int = 0
    opening: bytes = b""
    unsent: bytes = b""
    tail: bytes = b""
    received: int = 0
    marks: int = 0
    marked_bytes: int = 0
    line_length: int = 0
    joined_after: float = 0.0


Serve = Callable[[Member, int], None]
"""What is done for a member, with the events that epoll saw, 0 if it was not epoll."""


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that all threads of the process used, its children left out.

    What utime and stime of /proc/PID/stat say, but to the nanosecond where those
    count hundredths: a quiet room uses less than one. The clock's number is made
    as clock_getcpuclockid(3) makes it.
    """
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def stolen_seconds() -> float:
    """Seconds of all cores in which a virtual machine was not allowed to run."""
    steal = Path("/proc/stat").read_text().split(None, 9)[8]
    return int(steal) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def microseconds() -> int:
    return time.monotonic_ns() // 1000


def text_due(stamp: int) -> str:
    return f"{MARK.decode()}{stamp:0{STAMP}d}{FILLER.decode()}"


def percentile(ordered: list[int], share: float) -> float:
    """Milliseconds under which `share` of the microseconds in `ordered` lie."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1000


def receive_into(sock: socket.socket, view: memoryview, flags: int = 0) -> int:
    """Receive what is there; -1 when there is nothing. Raise ConnectionError at the end."""
    try:
        count = sock.recv_into(view, len(view), flags)
    except (BlockingIOError, ssl.SSLWantReadError):
        return -1
    except OSError as error:
        raise ConnectionError(str(error)) from error
    if count == 0:
        raise ConnectionError("closed by the server")
    return count


class Room:
    """All clients of one server, and the loop that serves them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.dialect = DIALECTS[job.dialect]
        # select() waits to the microsecond where epoll rounds up to a millisecond; as
        # the first descriptor opened, epoll's own stays under the 1024 that select takes.
        self.epoll = select.epoll()
        self.at: dict[int, tuple[Member, Serve]] = {}
        self.members: list[Member] = []
        self.joining: set[Member] = set()
        self.watchers: list[Member] = []
        self.crowd: list[Member] = []
        self.rota: list[tuple[Member, Serve]] = []
        self.next_reader = 0
        self.stuck: list[Member] = []
        self.late: set[Member] = set()
        self.lost = 0
        self.last_words = ""
        self.heard = Heard()
        self.buffer = bytearray(1 << 20)
        self.view = memoryview(self.buffer)
        self.next_slice = 0.0
        self.last_byte = 0.0
        self.tls = ssl.create_default_context(cafile=job.authority) if job.authority else None

    # The loop

    def turn(self, until: float) -> None:
        """Serve whoever is ready and the rota's next slice; return at `until` at the latest."""
        now = time.monotonic()
        wake = min(until, self.next_slice) if self.rota else until
        if wake > now:
            select.select([self.epoll], [], [], wake - now)
        for descriptor, events in self.epoll.poll(0):
            member, serve = self.at[descriptor]
            self.guarded(member, serve, events)
        if self.rota and time.monotonic() >= self.next_slice:
            self.read_slice()
        for member in tuple(self.late):
            self.guarded(member, self.flush, 0)

    def guarded(self, member: Member, serve: Serve, events: int) -> None:
        try:
            serve(member, events)
        except ConnectionError as error:
            self.lose(member, error)

    def wait_for(self, done: Callable[[], bool], seconds: float, step: float = 0.01) -> bool:
        """Go on until `done()`, asked every `step`, or the seconds are over; say which it was."""
        deadline = time.monotonic() + seconds
        while not done():
            pause = min(time.monotonic() + step, deadline)
            while time.monotonic() < pause:
                self.turn(pause)
            if time.monotonic() >= deadline:
                return done()
        return True

    def run_for(self, seconds: float) -> None:
        self.wait_for(lambda: False, seconds)

    def serve_with(self, member: Member, events: int, serve: Serve) -> None:
        descriptor = member.sock.fileno()
        if descriptor in self.at:
            self.epoll.modify(descriptor, events)
        else:
            self.epoll.register(descriptor, events)
        self.at[descriptor] = member, serve

    def leave_alone(self, member: Member) -> None:
        if self.at.pop(member.sock.fileno(), None):
            self.epoll.unregister(member.sock.fileno())

    def lose(self, member: Member, error: ConnectionError) -> None:
        self.lost += 1
        self.leave_alone(member)
        self.joining.discard(member)
        self.late.discard(member)
        self.rota = [turn for turn in self.rota if turn[0] is not member]
        heard = member.opening.decode("ascii", "replace").strip()
        self.last_words = heard.splitlines()[-1] if heard else str(error)
        member.sock.close()

    # Joining

    def join(self) -> float:
        """Bring everybody in, at most `at_once` on their way at a time; return the seconds."""
        start = shown = time.monotonic()
        total = self.job.clients + self.job.stuck
        while len(self.members) - len(self.joining) < total:
            while len(self.members) < total and len(self.joining) < self.job.at_once:
                self.open(len(self.members))
                self.turn(0)
            self.turn(time.monotonic() + 0.1)
            now = time.monotonic()
            if self.lost or now - start > self.job.join_deadline:
                raise LoadError(self.why_not_joined(now - start))
            if now - shown > 2:
                shown = now
                report(f"{self.job.title}: {len(self.members) - len(self.joining)} of {total} in")
        return time.monotonic() - start

    def why_not_joined(self, seconds: float) -> str:
        joined = len(self.members) - len(self.joining) - self.lost
        total = self.job.clients + self.job.stuck
        why = f" ({self.last_words})" if self.last_words else ""
        return f"{joined:,} of {total:,} had joined after {seconds:.0f} s{why}"

    def open(self, index: int) -> None:
        sock = socket.socket()
        if index >= self.job.clients:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STUCK_BUFFER)
        if not self.job.rate and index < self.job.senders:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FLOOD_BUFFER)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((f"127.0.100.{100 + index % ADDRESSES}", 0))
        started = time.monotonic()
        address = "127.0.0.1", self.job.port_for(index)
        if self.tls:
            sock.settimeout(self.job.join_deadline)
            sock.connect(address)
            sock = self.tls.wrap_socket(sock, server_hostname="127.0.0.1")
        sock.setblocking(False)
        if not self.tls:
            sock.connect_ex(address)
        member = Member(f"u{index:05d}", sock, started)
        self.members.append(member)
        self.joining.add(member)
        self.serve_with(member, select.EPOLLOUT, self.connected)

    def connected(self, member: Member, events: int) -> None:
        error = member.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise ConnectionError(os.strerror(error))
        self.serve_with(member, select.EPOLLIN, self.greet)
        self.take_steps(member)

    def greet(self, member: Member, events: int) -> None:
        """Read one who is joining, and answer what the server asks."""
        count = receive_into(member.sock, self.view)
        while count > 0:
            member.opening += self.buffer[:count]
            count = receive_into(member.sock, self.view) if self.tls else 0
        for cookie in re.findall(rb"(?m)^PING (\S+)\r$", member.opening):
            self.send(member, b"PONG " + cookie + b"\r\n")
        self.take_steps(member)

    def take_steps(self, member: Member) -> None:
        steps = self.dialect.steps
        while member.step < len(steps) and steps[member.step][0] in member.opening:
            expected, answer = steps[member.step]
            member.opening = member.opening.partition(expected)[2] if expected else b""
            member.step += 1
            self.send(member, answer.format(name=member.name).encode())
        if member.step == len(steps):
            self.welcome(member)

    def welcome(self, member: Member) -> None:
        member.joined_after = time.monotonic() - member.started
        member.opening = b""
        self.joining.discard(member)
        self.leave_alone(member)
        if member in self.members[self.job.clients :]:
            self.stuck.append(member)
            self.rota.append((member, self.discard))
        elif self.tls:
            self.watch(member)
        else:
            self.crowd.append(member)
            self.rota.append((member, self.discard))

    def appoint_watchers(self) -> None:
        """Take the watchers out of the crowd: the first to join, the last, and between."""
        everyone, self.crowd = self.crowd, []
        self.rota = [(member, self.discard) for member in self.stuck]
        count = min(self.job.watchers, len(everyone))
        chosen = {round(i * (len(everyone) - 1) / max(1, count - 1)) for i in range(count)}
        for index, member in enumerate(everyone):
            if index in chosen:
                self.watch(member)
            else:
                self.crowd.append(member)
                self.rota.append((member, self.discard))

    def watch(self, member: Member) -> None:
        """Read a member in full: at once, but in a flood, full of small pieces, in turn."""
        self.watchers.append(member)
        if self.job.rate:
            self.serve_with(member, select.EPOLLIN, self.read)
        else:
            self.rota.append((member, self.read))

    # Reading

    def rota_round(self) -> float:
        """Seconds in which everyone on the rota is read once."""
        return PAUSE * len(self.rota) / SLICE

    def read_slice(self) -> None:
        """Read the next sockets of the rota."""
        readers = self.rota[self.next_reader : self.next_reader + SLICE]
        self.next_reader += SLICE
        if self.next_reader >= len(self.rota):
            self.next_reader = 0
        for member, serve in readers:
            self.guarded(member, serve, 0)
        self.next_slice = time.monotonic() + PAUSE

    def discard(self, member: Member, events: int) -> None:
        """Let the kernel throw away what came, and keep the count."""
        count = receive_into(member.sock, self.view, socket.MSG_TRUNC)
        if count > 0:
            member.received += count
            self.last_byte = time.monotonic()

    def read(self, member: Member, events: int) -> None:
        """Read a watcher in full."""
        while self.read_piece(member) > 0 and self.tls:
            pass  # of what TLS has unpacked already, epoll would not tell

    def read_piece(self, member: Member) -> int:
        start = len(member.tail)
        self.buffer[:start] = member.tail
        count = receive_into(member.sock, self.view[start:])
        if count > 0:
            self.last_byte = time.monotonic()
            end = start + count
            whole = self.buffer.rfind(b"\n", start, end) + 1
            member.tail = bytes(self.view[whole:end][-4096:])
            member.received += count
            self.count_lines(member, whole)
        return count

    def count_lines(self, member: Member, whole: int) -> None:
        """Count the complete lines in the buffer and take the stamps of some."""
        if self.buffer.find(MISSED_PREFIX, 0, whole) >= 0:
            self.heard.missed += sum(map(int, MISSED.findall(self.buffer, 0, whole)))
        marks = self.buffer.count(MARK, 0, whole)
        if not marks:
            return
        member.marks += marks
        member.marked_bytes += whole
        last_line = self.buffer.rfind(b"\n", 0, whole - 1) + 1
        if self.buffer.find(MARK, last_line, whole) >= 0:
            member.line_length = whole - last_line
        self.take_stamps(whole)

    def take_stamps(self, whole: int) -> None:
        now, heard, buffer = microseconds(), self.heard, self.buffer
        stride = max(TEXT, whole // SAMPLES)
        at = buffer.find(MARK, 0, whole)
        while at >= 0:
            digits = buffer[at + 1 : at + 1 + STAMP]
            if not (digits.isdigit() and buffer.startswith(FILLER, at + 1 + STAMP)):
                heard.torn += 1
            else:
                heard.latencies.append(now - int(digits))
            at = buffer.find(MARK, at + stride, whole)

    def settle(self, quiet: float = QUIET) -> bool:
        """Wait until nobody gets anything more; say whether that came to pass."""
        self.last_byte = time.monotonic()
        pause = max(quiet, 2 * self.rota_round())
        return self.wait_for(lambda: time.monotonic() - self.last_byte > pause, PATIENCE)

    # Sending

    def send(self, member: Member, data: bytes) -> None:
        member.unsent += data
        self.flush(member, 0)

    def flush(self, member: Member, events: int) -> None:
        while member.unsent:
            try:
                sent = member.sock.send(member.unsent)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self.late.add(member)
                return
            except OSError as error:
                raise ConnectionError(str(error)) from error
            member.unsent = member.unsent[sent:]
        self.late.discard(member)

    def line(self, member: Member, stamp: int) -> bytes:
        return self.dialect.line.format(name=member.name, text=text_due(stamp)).encode()

    def speakers(self) -> list[Member]:
        present = [m for m in self.members[: self.job.senders] if m.sock.fileno() >= 0]
        if not present:
            raise LoadError(f"the server dropped every sender ({self.last_words})")
        return present

    def talk(self, seconds: float) -> int:
        """Say `rate` lines a second, the clients in turn; return how many were said."""
        speakers, start = self.speakers(), time.monotonic()
        count = max(1, round(self.job.rate * seconds))
        for number in range(count):
            due = start + number / self.job.rate
            while time.monotonic() < due:
                self.turn(due - SPIN)
            speaker = speakers[number % len(speakers)]
            if speaker.sock.fileno() >= 0:
                speaker.unsent += self.line(speaker, int(due * 1e6))
                self.guarded(speaker, self.flush, 0)
            self.turn(0)
        return count

    def pour(self, member: Member, events: int) -> None:
        """Give a flooding sender's socket all that it takes for now."""
        if not member.unsent:
            member.unsent = self.line(member, microseconds()) * BLOCK
        self.flush(member, 0)
        self.late.discard(member)  # epoll tells when there is room again

    def start_flood(self) -> None:
        for member in self.speakers():
            self.serve_with(member, select.EPOLLOUT, self.pour)

    # Counting

    def line_length(self) -> int:
        """Bytes of a line as the readers get it, 0 if none has come."""
        lengths = [w.line_length for w in self.watchers if w.line_length]
        return max(set(lengths), key=lengths.count) if lengths else 0

    def deliveries(self) -> float:
        length = self.line_length()
        discarded = sum(member.received for member in self.crowd)
        return sum(w.marks for w in self.watchers) + (discarded / length if length else 0)

    def count_error(self) -> float:
        """By what share the watchers' count of bytes differs from their count of lines."""
        marks = sum(w.marks for w in self.watchers)
        by_bytes = sum(w.marked_bytes for w in self.watchers) / max(1, self.line_length())
        return abs(by_bytes - marks) / max(1, marks)

    def forget(self) -> None:
        """Start counting from here."""
        for member in self.members:
            member.received = member.marks = member.marked_bytes = 0
        self.heard = Heard()

    def stop_reading(self) -> None:
        """Let those who are to be stuck read no more."""
        self.rota = [turn for turn in self.rota if turn[0] not in self.stuck]
        self.next_reader = 0

    def stuck_dropped(self) -> int:
        """Count the stuck readers that the server has thrown out."""
        return sum(self.was_dropped(member) for member in self.stuck)

    def was_dropped(self, member: Member) -> bool:
        try:
            while receive_into(member.sock, self.view, socket.MSG_TRUNC) > 0:
                pass
        except ConnectionError:
            return True
        return False


@dataclass(slots=True)
class Clock:
    """Wall time and CPU used, by server and load, since it was made."""

    pids: list[int]
    started: float = 0.0
    server: float = 0.0
    load: float = 0.0
    stolen: float = 0.0

    def __post_init__(self) -> None:
        self.started, self.stolen = time.monotonic(), stolen_seconds()
        self.server, self.load = self.servers(), time.process_time()

    def servers(self) -> float:
        return sum(map(cpu_seconds, self.pids))

    def figures(self) -> dict[str, float]:
        wall = time.monotonic() - self.started
        used = self.servers() - self.server
        return {
            "wall_s": wall,
            "server_cpu_s": used,
            "server_core": used / wall,
            "load_core": (time.process_time() - self.load) / wall,
            "stolen": (stolen_seconds() - self.stolen) / wall / (os.cpu_count() or 1),
        }


def latency_figures(latencies: list[int]) -> dict[str, float]:
    if not latencies:
        return {}
    ordered = sorted(latencies)
    return {
        "p50_ms": percentile(ordered, 0.5),
        "p99_ms": percentile(ordered, 0.99),
        "max_ms": ordered[-1] / 1000,
        "samples": len(ordered),
    }


def measure_joining(room: Room) -> dict[str, float]:
    """Fill the room and let it settle; `one_…` is what a single client waited."""
    job, before = room.job, sum(map(resident_bytes, room.job.pids))
    clock = Clock(job.pids)
    join_seconds = room.join()
    settled = room.settle(min(QUIET, job.seconds / 4))
    waits = sorted(int(m.joined_after * 1e6) for m in room.members)
    return {
        "join_s": join_seconds,
        "quiet_s": room.last_byte - clock.started if settled else PATIENCE,
        "join_server_cpu_s": clock.figures()["server_cpu_s"],
        "one_p50_ms": percentile(waits, 0.5),
        "one_max_ms": waits[-1] / 1000,
        "memory_per_client": (sum(map(resident_bytes, job.pids)) - before) / len(room.members),
    }


def measure_rate(room: Room) -> dict[str, float]:
    """Talk at the job's rate and wait until everybody has heard everything."""
    job = room.job
    room.talk(min(1.0, job.seconds / 5))
    room.settle(min(QUIET, job.seconds / 4))
    room.forget()
    clock = Clock(job.pids)
    said = room.talk(job.seconds)
    talked = time.monotonic() - clock.started
    expected = said * (job.clients - (not job.echo))
    room.wait_for(lambda: room.deliveries() > expected - 1, GRACE + 2 * room.rota_round())
    in_time = room.deliveries() >= expected * ALL_BUT
    if not in_time:
        room.wait_for(lambda: room.deliveries() > expected - 1, min(PATIENCE, job.seconds))
    figures = clock.figures()
    delivered = room.deliveries()
    seconds = talked if in_time else figures["wall_s"]
    return {
        **figures,
        "lines_said": said,
        "deliveries": delivered,
        "deliveries_per_s": delivered / seconds,
        "reached": delivered / expected,
        "behind_s": 0.0 if in_time else figures["wall_s"] - talked,
    }


def measure_flood(room: Room) -> dict[str, float]:
    """Flood, and count over a window that begins when all buffers are full.

    With a reader that stops, over one before it does, and one that begins when half as
    much time again has filled its buffers and the server's.
    """
    room.start_flood()
    room.run_for(room.job.seconds / 4)
    if not room.stuck:
        return measure_window(room)
    before = measure_window(room)["deliveries_per_s"]
    room.stop_reading()
    room.run_for(room.job.seconds / 2)
    figures = measure_window(room)
    return {**figures, "of_before": figures["deliveries_per_s"] / before if before else 0.0}


def measure_window(room: Room) -> dict[str, float]:
    """Count what is delivered for as long as the job says."""
    room.forget()
    clock = Clock(room.job.pids)
    room.run_for(room.job.seconds)
    figures = clock.figures()
    delivered = room.deliveries()
    missed = room.heard.missed
    return {
        **figures,
        "deliveries": delivered,
        "deliveries_per_s": delivered / figures["wall_s"],
        "missed": missed / max(1, missed + sum(w.marks for w in room.watchers)),
    }


def carry_out(job: Job) -> dict[str, float]:
    room = Room(job)
    figures = measure_joining(room)
    if job.senders:
        room.appoint_watchers()
        figures |= measure_rate(room) if job.rate else measure_flood(room)
        figures |= latency_figures(room.heard.latencies)
        figures["count_error"] = room.count_error()
        figures["torn"] = room.heard.torn / max(1, room.heard.torn + len(room.heard.latencies))
        figures["cpu_us_per_delivery"] = (
            figures["server_cpu_s"] * 1e6 / figures["deliveries"] if figures["deliveries"] else 0.0
        )
    figures["lost"] = room.lost
    figures["stuck_dropped"] = room.stuck_dropped()
    figures["clients"] = len(room.members)
    return figures


def main() -> int:
    job = Job(**json.load(sys.stdin))
    gc.disable()  # nothing here is cyclic, and a pause would be taken for the server's
    try:
        figures = carry_out(job)
    except (LoadError, OSError) as error:
        json.dump({"failed": str(error)}, sys.stdout)
        return 1
    json.dump(figures, sys.stdout)
    return 0


if __name__ == "__main__":
    # nothing to tidy: the kernel closes ten thousand sockets faster than Python
    status = main()
    sys.stdout.flush()
    os._exit(status)
