"""The servers under test: how each is found, configured and started.

    with running(OURS, setup, folder) as server:
        server.port, server.pid

A server runs in a temporary folder of its own, on 127.0.0.1, on cores of its
own where there are two, and dies with the benchmark whatever happens to that.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import postgres  # noqa: E402 - it stands beside the tests that share it

START_DEADLINE = 15.0
STOP_DEADLINE = 6.0
"""Seconds: our server promises to be gone 5 s after SIGTERM."""

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: a signal for this process when its parent dies."""

NGIRCD_CONFIGURATION = """\
[Global]
Name = {name}.example.net
Info = bench
AdminInfo1 = bench
AdminInfo2 = bench
AdminEMail = bench@example.net
Listen = 127.0.0.1
Ports = {port}
MotdPhrase = bench
[Limits]
MaxConnections = 0
MaxConnectionsIP = 0
MaxJoins = 0
MaxPenaltyTime = 0
PingTimeout = 3600
PongTimeout = 3600
[Options]
DNS = no
Ident = no
PAM = no
"""


NGIRCD_LINK = """\
[Server]
Name = {name}.example.net
MyPassword = bench
PeerPassword = bench
{how}
"""


class StartError(Exception):
    """A server did not come up; the text says why."""


@dataclass(slots=True)
class Setup:
    """What a scenario asks of a server; `program` is the folder of server.py.

    `at_once` of the clients may be on their way in at a time.
    """

    program: Path
    clients: int
    at_once: int
    history: bool = False
    tls: bool = False
    address: str = ""  # of the history that several servers share
    first: int = 0  # the port of the first of several, that others link to


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to measure.

    `command` makes the command line from the setup, a free port and the folder.
    `ready` is what its log says when it listens, with the port as its group.
    `queue` is how many may connect at a time without overflowing the queue that it
    listens with; more would wait a second for their SYN to be sent again. `remark`
    says in what its conditions differ from the others'.
    """

    name: str
    dialect: str
    echo: bool
    found: Callable[[Setup], bool]
    command: Callable[[Setup, int, Path], list[str]]
    ready: str
    queue: int = 100
    remark: str = ""
    servers: int = 1
    """Of one room; ours have their history in PostgreSQL if there are several."""
    linked: str = ""
    """What the log of the second says when they are one, if they link to each other."""


@dataclass(slots=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    started_ms: float
    more: list[tuple[int, int]] = field(default_factory=list)
    """Ports and process numbers of the other servers of the room."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def last_words(self) -> str:
        """If the server has ended, the last line of its log."""
        if self.process.poll() is None:
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the server ended: {lines[-1]}" if lines else "the server ended"


# Commands


def find_program(name: str) -> str | None:
    """Find a program in PATH, beside this Python, or where Debian puts daemons."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin"]
    return shutil.which(name, path=os.pathsep.join(places))


def our_command(setup: Setup, port: int, folder: Path) -> list[str]:
    most = str(setup.clients + 10)
    command = [sys.executable, str(setup.program / "server.py"), "--port", "0"]
    command += ["--rate-limit", "0", "--max-clients", most]
    command += ["--max-per-address", most, "--max-unnamed", str(setup.at_once + 10)]
    if setup.address:
        command += ["--history", setup.address]
    elif setup.history:
        command += ["--history", str(folder / "history.db")]
    if setup.tls:
        certificate, key = folder / "certificate.pem", folder / "key.pem"
        command += ["--tls-cert", str(certificate), "--tls-key", str(key)]
    return command


def tutorial_command(setup: Setup, port: int, folder: Path) -> list[str]:
    return [sys.executable, str(HERE / "tutorial.py"), str(port)]


def ngircd_command(setup: Setup, port: int, folder: Path) -> list[str]:
    configuration = folder / "ngircd.conf"
    configuration.write_text(NGIRCD_CONFIGURATION.format(name="bench", port=port))
    return [str(find_program("ngircd")), "--nodaemon", "--config", str(configuration)]


def linked_ngircd_command(setup: Setup, port: int, folder: Path) -> list[str]:
    own, other, how = "one", "two", "Passive = yes"
    if setup.first:
        own, other, how = "two", "one", f"Host = 127.0.0.1\nPort = {setup.first}"
    command = ngircd_command(setup, port, folder)
    text = NGIRCD_CONFIGURATION.format(name=own, port=port)
    text += NGIRCD_LINK.format(name=other, how=how)
    (folder / "ngircd.conf").write_text(text)
    return command


def miniircd_command(setup: Setup, port: int, folder: Path) -> list[str]:
    command = [str(find_program("miniircd")), "--listen", "127.0.0.1", "--ports", str(port)]
    if os.geteuid() == 0:
        command += ["--setuid", "root"]  # it refuses to be started by root without a word
    return [*command, "--verbose"]


OURS = Contender(
    name="ours",
    dialect="ours",
    echo=True,
    found=lambda setup: (setup.program / "server.py").exists(),
    command=our_command,
    ready=r"listening on 127\.0\.0\.1:(\d+)",
)

SEVERAL = tuple(
    replace(
        OURS,
        name=f"ours-{count}",
        servers=count,
        found=lambda setup: not postgres.reason_to_skip(),
        remark=f"{count} servers of one room, PostgreSQL on the same cores",
    )
    for count in (2, 3)
)

NGIRCD = Contender(
    name="ngircd",
    dialect="irc",
    echo=False,
    found=lambda setup: find_program("ngircd") is not None,
    command=ngircd_command,
    ready=r"listening on \[127\.0\.0\.1\]:(\d+)",
    queue=10,
    remark="DNS, Ident, PAM and penalties are off; 3 lines of a client in turn are built in",
)

CONTENDERS = (
    OURS,
    *SEVERAL,
    Contender(
        name="tutorial",
        dialect="tutorial",
        echo=True,
        found=lambda setup: True,
        command=tutorial_command,
        ready=r"listening on 127\.0\.0\.1:(\d+)",
        remark="unframed; no limits, checks or history",
    ),
    NGIRCD,
    replace(
        NGIRCD,
        name="ngircd-2",
        servers=2,
        command=linked_ngircd_command,
        linked="Synchronization with .* done",
        remark="two servers that are linked; no history",
    ),
    Contender(
        name="miniircd",
        dialect="irc",
        echo=False,
        found=lambda setup: find_program("miniircd") is not None,
        command=miniircd_command,
        ready=r"Listening on port (\d+)",
        queue=5,
        remark="uses select(), so about 1,000 clients at most",
    ),
)


# Running


def cores() -> tuple[set[int], set[int]]:
    """Cores for the server and for the load: apart where there are two."""
    usable = os.sched_getaffinity(0)
    if len(usable) == 1:
        return usable, usable
    load = {max(usable)}
    return usable - load, load


def bound_child(where: set[int]) -> Callable[[], None]:
    """Make what a child does before its program starts: take its cores, die with its parent."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        os.sched_setaffinity(0, where)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


def environment() -> dict[str, str]:
    """Return the environment of a program under test: Python keeps what it has compiled."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def await_ready(process: subprocess.Popen[bytes], log: Path, ready: str) -> str:
    """Wait until the log says that the server is ready; return what it says of it."""
    deadline = time.monotonic() + START_DEADLINE
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        text = log.read_text(errors="replace")
        if found := re.search(ready, text):
            return found[1]
        if ended:
            lines = text.strip().splitlines()
            raise StartError(f"did not start: {lines[-1] if lines else 'it said nothing'}")
        time.sleep(0.001)
    raise StartError(f"did not listen within {START_DEADLINE:.0f} s")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process: by SIGTERM, or when it does not listen, by SIGKILL."""
    process.terminate()
    try:
        process.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running_several(contender: Contender, setup: Setup, folder: Path) -> Iterator[Server]:
    """Run the servers of a room: ours with a database that they share, others linked."""
    with contextlib.ExitStack() as stack:
        if not contender.linked:
            folder.chmod(0o755)  # for PostgreSQL's user
            database = postgres.Postgres(postgres.owned(folder / "database"))
            stack.enter_context(database.create(fsync=True))
            setup = replace(setup, address=database.address())
        servers: list[Server] = []
        for number in range(contender.servers):
            own = folder / str(number)
            own.mkdir()
            setup = replace(setup, first=servers[0].port if servers else 0)
            servers.append(stack.enter_context(running(contender, setup, own)))
        first, *others = servers
        if contender.linked:
            await_ready(others[0].process, others[0].log, f"({contender.linked})")
        first.more = [(other.port, other.pid) for other in others]
        yield first


@contextlib.contextmanager
def running(contender: Contender, setup: Setup, folder: Path) -> Iterator[Server]:
    """Run a server for as long as the block lasts. Raise StartError when it does not come up."""
    command = contender.command(setup, free_port(), folder)
    log = folder / "log"
    # Several servers and their database share all that there is, as on two machines of one core.
    where = os.sched_getaffinity(0) if contender.servers > 1 else cores()[0]
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=bound_child(where),
        )
    try:
        port = int(await_ready(process, log, contender.ready))
        yield Server(process, port, log, (time.monotonic() - started) * 1000)
    finally:
        end(process)


def make_certificate(folder: Path) -> None:
    """Make certificate.pem and key.pem for 127.0.0.1 with the openssl command."""
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run(
        ["openssl", "req", "-x509", *kind, *files, *subject],
        check=True,
        capture_output=True,
        timeout=30,
    )
