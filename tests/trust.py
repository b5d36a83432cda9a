"""What the tests of trust share: certificates, peers inside TLS, files of a history.

certificate = make_certificate(tmp_path)
with run_chat(tls=certificate.server(), history=str(tmp_path / "room.db")) as room:
    alice = TlsPeer(room.port, certificate).join("alice")
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chat import DEADLINE, Peer

import protocol
from protocol import Kind, Line

ROOT = Path(__file__).resolve().parent.parent
SLOW_TO_START = 30.0  # seconds for a process on a busy machine


# --- TLS ---------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """A certificate that vouches for itself, with its key."""

    file: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        """Return a server's context with it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        """Return the context of a client that trusts it."""
        return ssl.create_default_context(cafile=self.file)

    def fingerprint(self) -> str:
        """Return its fingerprint as openssl tells it."""
        told = openssl("x509", "-in", str(self.file), "-noout", "-fingerprint", "-sha256")
        return told.strip().partition("=")[2]

    def options(self) -> list[str]:
        """Return a server's options for it."""
        return ["--tls-cert", str(self.file), "--tls-key", str(self.key)]


def openssl(*arguments: str) -> str:
    """Run openssl and return its output."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    done = subprocess.run(
        ["openssl", *arguments], capture_output=True, text=True, timeout=SLOW_TO_START, check=True
    )
    return done.stdout


def make_certificate(folder: Path, host: str = "IP:127.0.0.1", passphrase: str = "") -> Certificate:
    """Make a certificate for a host, as the README shows it."""
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-days", "2", "-subj", "/CN=chat", "-addext", f"subjectAltName={host}"),
        *("-passout", f"pass:{passphrase}") if passphrase else ("-nodes",),
        *("-out", str(made.file), "-keyout", str(made.key)),
    )
    return made


class TlsPeer(Peer):
    """A peer that speaks TLS."""

    sock: ssl.SSLSocket

    def __init__(
        self,
        port: int,
        certificate: Certificate,
        *,
        source: str = "127.0.0.1",
        buffer: int = 0,
    ) -> None:
        super().__init__(port, source=source, buffer=buffer)
        self.sock = certificate.client().wrap_socket(self.sock, server_hostname="127.0.0.1")

    def _wait_for_bytes(self, deadline: float, wanted: str) -> None:
        if not self.sock.pending():  # what is decrypted already, no descriptor tells of
            super()._wait_for_bytes(deadline, wanted)


class OneAtATime:
    """Counts the calls on each object that overlap, and draws them out so that they would."""

    def __init__(self) -> None:
        self.calls = 0
        self.overlaps: list[str] = []
        self._inside: set[int] = set()
        self._lock = threading.Lock()  # guards all of the above

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that is watched."""

        def watched(thing: object, *arguments: Any) -> Any:
            with self._lock:
                self.calls += 1
                if id(thing) in self._inside:
                    self.overlaps.append(function.__name__)
                self._inside.add(id(thing))
            threading.Event().wait(0.0002)
            try:
                return function(thing, *arguments)
            finally:
                with self._lock:
                    self._inside.discard(id(thing))

        return watched


def ended(peer: Peer) -> list[str]:
    """Return all that a peer still gets until it is closed or reset, torn or whole."""
    peer.sock.settimeout(DEADLINE)
    data = peer.unread()
    with contextlib.suppress(ConnectionError):
        while piece := peer.sock.recv(65536):
            data += piece
    return data.decode("utf-8", "backslashreplace").split("\n")[:-1]


# --- Histories ---------------------------------------------------------------


def stored(file: Path) -> dict[int, str]:
    """Return the lines of the room that a history's file has, by position."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT position, kind, name, text FROM lines ORDER BY position")
        return {position: str(Line(Kind(kind), *rest)) for position, kind, *rest in rows}


def integrity(file: Path) -> str:
    """Return what SQLite finds wrong with a file, or ok."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])


def consecutive(positions: dict[int, str]) -> bool:
    """Tell whether no position is left out."""
    return not positions or list(positions) == list(range(min(positions), max(positions) + 1))


def position_of(peer: Peer) -> int:
    """Read on to ``-> at N`` and return N."""
    while True:
        position = protocol.position_in(peer.next_line())
        if position is not None:
            return position
