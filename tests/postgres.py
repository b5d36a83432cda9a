"""PostgreSQL for tests and the benchmark: clusters of their own, on free ports."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

DEADLINE = 30.0  # seconds that anything may take on a busy machine
SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 60
shared_buffers = 16MB
wal_keep_size = 64MB
log_min_messages = warning
"""


@functools.cache
def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, 15 or newer, if there is one."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("pg_ctl"):
        candidates.append(Path(found).resolve().parent)
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


def reason_to_skip() -> str:
    """Return why there can be no cluster here, or ''."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    if sys.platform == "win32" or programs() is None:
        return "PostgreSQL's programs are not installed"
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return "PostgreSQL does not run as root, and there is no runuser"
    return ""


def free_port() -> int:
    """Return a port that nobody listens on, out of those that no connection is given."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Postgres:
    """A running PostgreSQL with an empty database for each test."""

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder = folder
        self.port = port or free_port()

    def create(self, *, fsync: bool = False) -> Postgres:
        """Make a cluster and start it; without `fsync` it survives a crash of its own alone."""
        self.run("initdb", "-D", self.data, "-U", "chat", "-A", "trust", "-N", "-E", "UTF8")
        with (self.folder / "data" / "postgresql.conf").open("a") as conf:
            conf.write(SETTINGS + f"fsync = {'on' if fsync else 'off'}\n")
        self.start()
        return self

    @property
    def data(self) -> str:
        """The folder of the cluster."""
        return str(self.folder / "data")

    def address(self, database: str = "postgres", host: str = "127.0.0.1") -> str:
        """Return what `--history` wants."""
        return f"postgresql://chat@{host}:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = self.folder / "log"
        options = f"-p {self.port}"
        self.run("pg_ctl", "-D", self.data, "-l", str(log), "-o", options, "-w", "start")

    def stop(self, how: str = "immediate") -> None:
        """Stop it."""
        self.run("pg_ctl", "-D", self.data, "-m", how, "-w", "stop")

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        main = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(main)], capture_output=True, text=True, check=False
        )
        for pid in [main, *map(int, listed.stdout.split())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill it as a power cut does, and wait for its end."""
        main = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        self.signal(signal.SIGKILL)
        _wait_until(lambda: not _runs(main))
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def standby(self, folder: Path) -> Postgres:
        """Return a standby of it that it commits nothing without."""
        other = Postgres(folder)
        self.run(
            "pg_basebackup", "-D", other.data, "-R", "-X", "stream", "-c", "fast",
            "-d", f"{self.address()}?application_name=standby",
        )  # fmt: skip
        other.start()
        self.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        self.sql("SELECT pg_reload_conf()")
        is_sync = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        _wait_until(lambda: self.sql(is_sync) == "1")
        return other

    def promote(self) -> None:
        """Have a standby be the primary."""
        self.run("pg_ctl", "-D", self.data, "-w", "promote")

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Have a statement done and return what it gives, fields by | and rows by newline."""
        done = self.run("psql", "-XAtq", "-d", self.address(database), "-c", statement)
        return done.strip()

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs, as somebody that it accepts."""
        folder = programs()
        assert folder is not None
        done = subprocess.run(
            _accepted([str(folder / program), *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program == "psql" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if program == "psql" else subprocess.DEVNULL,
            text=True,
            check=False,
            cwd=str(self.folder),
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"
        return done.stdout or ""

    def __enter__(self) -> Postgres:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.signal(signal.SIGCONT)
            self.stop()


@contextlib.contextmanager
def pooler(cluster: Postgres, mode: str) -> Iterator[int]:
    """Run a pgbouncer before a PostgreSQL; give its port."""
    with folder() as place:
        port, settings = free_port(), place / "settings"
        settings.write_text(
            f"[databases]\n* = host=127.0.0.1 port={cluster.port} user=chat\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\nauth_file =\npool_mode = {mode}\n"
        )
        command = _accepted(["pgbouncer", "-q", str(settings)])
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                _wait_until(lambda: _listens(port))
                yield port
            finally:
                process.terminate()


def _accepted(command: list[str]) -> list[str]:
    """Return a command that is run as somebody whom PostgreSQL's programs accept."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def _wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline, f"waited {DEADLINE} seconds for PostgreSQL"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Give a folder that PostgreSQL's user can use, and remove it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def owned(path: Path) -> Path:
    """Make a folder that belongs to who runs PostgreSQL."""
    path.mkdir()
    if os.geteuid() == 0:
        shutil.chown(path, "postgres", "postgres")
    return path
