"""SIGHUP takes the server's files anew, a rotated log is noticed, and nobody is disturbed."""

from __future__ import annotations

import os
import re
import resource
import signal
import ssl
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat import DEADLINE, SERVER, Peer, Server, close_peers, no_leaks, run_server, wait_until
from terminal import Terminal
from trust import Certificate, TlsPeer, make_certificate

import protocol

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")


def hang_up(server: Server) -> None:
    """Send what log rotation and administrators send."""
    os.kill(server.pid, signal.SIGHUP)


def replace(old: Certificate, new: Certificate) -> None:
    """Put a certificate and its key in the place of others."""
    new.file.replace(old.file)
    new.key.replace(old.key)


def certificates(tmp_path: Path) -> tuple[Certificate, Certificate]:
    """Return the certificate of today and the one of tomorrow."""
    folders = tmp_path / "today", tmp_path / "tomorrow"
    for folder in folders:
        folder.mkdir()
    return make_certificate(folders[0]), make_certificate(folders[1])


def test_a_renewed_certificate_is_taken_and_nobody_is_disturbed(tmp_path: Path) -> None:
    """After SIGHUP newcomers see the new certificate; who is there talks on, and sees them."""
    today, tomorrow = certificates(tmp_path)
    fingerprint = tomorrow.fingerprint()
    with run_server(*today.options()) as server:
        alice = TlsPeer(server.port, today).join("alice")
        replace(today, tomorrow)
        with pytest.raises(ssl.SSLCertVerificationError):
            TlsPeer(server.port, today)
        hang_up(server)
        server.expect_log(rf"fingerprint {fingerprint}\n")
        server.expect_log(rf"INFO took {today.file} anew\n")
        TlsPeer(server.port, today).join("bob").send("hello")
        alice.expect("* bob joined the chat", "bob: hello")
        alice.send("still here")
        alice.expect("alice: still here")


@pytest.mark.parametrize("fault", ["junk", "missing", "another key"])
def test_a_certificate_that_cannot_be_used_leaves_the_old_one(tmp_path: Path, fault: str) -> None:
    """What SIGHUP finds unusable is told in one line, and the old one goes on being shown."""
    today, tomorrow = certificates(tmp_path)
    trusted = Certificate(tmp_path / "trusted.pem", today.key)
    trusted.file.write_bytes(today.file.read_bytes())
    with run_server(*today.options()) as server:
        if fault == "junk":
            today.file.write_text("no certificate\n")
        elif fault == "missing":
            today.file.unlink()
        else:
            tomorrow.key.replace(today.key)
        hang_up(server)
        server.expect_log(rf"ERROR .*{today.file}.*; going on with what was there\n")
        TlsPeer(server.port, trusted).join("alice")
        assert "anew" not in server.log()


def test_renewed_passwords_are_taken(tmp_path: Path) -> None:
    """After SIGHUP the new passwords hold and the old do not; who is there stays."""
    room, operators = tmp_path / "room", tmp_path / "operators"
    room.write_text("open sesame\n")
    operators.write_text("swordfish\n")
    options = ["--password-file", str(room), "--op-password-file", str(operators)]
    with run_server(*options, WRONG_DELAY=0.01) as server:
        alice = Peer(server.port).introduce("alice").send("open sesame")
        alice.expect("PASS")
        alice.expect_eventually("* alice joined the chat")
        room.write_text("close sesame\n")
        operators.write_text("hammerhead\n")
        hang_up(server)
        server.expect_log(rf"took {operators} anew\n")
        bob = Peer(server.port).introduce("bob").send("open sesame", "close sesame")
        bob.expect_eventually("* bob joined the chat")
        assert server.log().count("gave a wrong password") == 1
        alice.send("/op swordfish", "/op hammerhead")
        alice.expect_eventually("* bob joined the chat")
        assert "wrong" in alice.next_line()
        assert "operator" in alice.next_line()


def test_an_empty_password_file_leaves_the_old_password(tmp_path: Path) -> None:
    """A password file with nothing in it does not open the room."""
    file = tmp_path / "password"
    file.write_text("open sesame\n")
    with run_server("--password-file", str(file)) as server:
        file.write_text("")
        hang_up(server)
        server.expect_log(r"ERROR .*password.*; going on with what was there\n")
        alice = Peer(server.port).introduce("alice").send("open sesame")
        alice.expect("PASS")
        alice.expect_eventually("* alice joined the chat")


def test_a_file_that_cannot_be_read_to_its_end_holds_up_no_end(tmp_path: Path) -> None:
    """With a password file that never comes, as on a dead disk, SIGTERM ends it in time."""
    file = tmp_path / "password"
    file.write_text("swordfish\n")
    with run_server("--op-password-file", str(file)) as server:
        file.unlink()
        os.mkfifo(file)
        hang_up(server)
        alice = Peer(server.port).join("alice")
        assert server.stop() == 0
        alice.expect(protocol.SHUTTING_DOWN)
        assert "anew" not in server.log()


def test_a_hang_up_that_is_ignored_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started under nohup, the server neither ends with SIGHUP nor takes anything anew."""
    started_by(tmp_path, monkeypatch, "trap '' HUP")
    password = tmp_path / "password"
    password.write_text("open sesame\n")
    with run_server("--op-password-file", str(password)) as server:
        hang_up(server)
        Peer(server.port).join("alice")
        server.expect_log("alice .* joined")
        close_peers()
        assert server.stop() == 0
        assert "anew" not in server.log()


def started_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: str) -> None:
    """Have the servers of a test started by a shell that runs some commands first."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\n{commands}\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


# --- On a terminal -----------------------------------------------------------


def test_the_server_ends_with_its_terminal() -> None:
    """A window that is closed ends the server in order: people are told."""
    with no_leaks(), Terminal([sys.executable, str(SERVER), "--port", "0"]) as terminal:
        alice = Peer(listening(terminal)).join("alice")
        terminal.hang_up()
        alice.expect(protocol.SHUTTING_DOWN)
        alice.expect_closed()
        close_peers()
        assert terminal.wait() == 0


def test_a_hang_up_with_the_terminal_still_there_ends_nothing(tmp_path: Path) -> None:
    """SIGHUP from an administrator takes the files anew on a terminal too."""
    password = tmp_path / "password"
    password.write_text("swordfish\n")
    options = ["--port", "0", "--op-password-file", str(password)]
    with no_leaks(), Terminal([sys.executable, str(SERVER), *options], columns=200) as terminal:
        alice = Peer(listening(terminal)).join("alice")
        terminal.signal(signal.SIGHUP)
        terminal.wait_for(" anew")
        alice.send("hello")
        alice.expect("alice: hello")
        close_peers()
        terminal.signal(signal.SIGTERM)
        assert terminal.wait() == 0


def test_a_hang_up_without_descriptors_ends_nothing(tmp_path: Path) -> None:
    """Where it cannot be told whether the terminal is there, the room goes on as it was."""
    password = tmp_path / "password"
    password.write_text("swordfish\n")
    options = ["--port", "0", "--op-password-file", str(password)]
    with no_leaks(), Terminal([sys.executable, str(SERVER), *options], columns=200) as terminal:
        alice = Peer(listening(terminal)).join("alice")
        pid = terminal._process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        terminal.signal(signal.SIGHUP)
        terminal.wait_for("Too many open files; going on with what was there")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        alice.send("hello")
        alice.expect("alice: hello")
        close_peers()
        terminal.signal(signal.SIGTERM)
        assert terminal.wait() == 0


def listening(terminal: Terminal) -> int:
    """Return the port that a server on a terminal says it listens on."""
    terminal.wait_for("listening on")
    found = re.search(r"listening on \S+:(\d+)", "\n".join(terminal.screen.lines))
    assert found
    return int(found[1])


# --- The log file ------------------------------------------------------------


def expect_in(file: Path, text: str) -> None:
    """Wait until a text stands in a file."""
    wait_until(lambda: file.exists() and text in file.read_text(), f"{text!r} in {file}", DEADLINE)


@pytest.mark.parametrize("tell", [hang_up, lambda server: None], ids=["told", "untold"])
def test_a_rotated_log_goes_on_in_a_new_file(
    tmp_path: Path, tell: Callable[[Server], None]
) -> None:
    """A log that was moved away is begun anew, with SIGHUP or without; no line is lost."""
    file, old = tmp_path / "chat.log", tmp_path / "chat.log.1"
    with run_server("--log-file", str(file)) as server:
        Peer(server.port).join("alice")
        expect_in(file, "alice")
        file.rename(old)
        tell(server)
        Peer(server.port).join("bob")
        expect_in(file, "bob")
        assert "bob" not in old.read_text()
        close_peers()
        assert server.stop() == 0
        assert old.read_text() + file.read_text() == server.log()


def test_a_log_that_cannot_be_begun_anew_goes_on_in_the_old_file(tmp_path: Path) -> None:
    """Where the new file cannot be made, the old one is written on, until it can."""
    file, old = tmp_path / "chat.log", tmp_path / "chat.log.1"
    with run_server("--log-file", str(file)) as server:
        expect_in(file, "listening")
        file.rename(old)
        file.mkdir()  # a folder cannot be logged to, whoever the server runs as
        hang_up(server)
        server.expect_log(rf"ERROR cannot write {file}: .*; going on with what was there\n")
        Peer(server.port).join("alice")
        expect_in(old, "alice")
        file.rmdir()
        Peer(server.port).join("bob")
        expect_in(file, "bob")
        close_peers()
        assert server.stop() == 0
        assert old.read_text() + file.read_text() == server.log()


def test_the_log_is_its_owners_alone(tmp_path: Path) -> None:
    """Nobody else can read a log that the server has made; one that was there keeps its mode."""
    made, found = tmp_path / "made.log", tmp_path / "found.log"
    found.touch()
    found.chmod(0o640)
    for file, mode in ((made, 0o600), (found, 0o640)):
        with run_server("--log-file", str(file)):
            expect_in(file, "listening")
            assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_log_on_a_full_disk_ends_no_server() -> None:
    """With a log file that takes nothing the room talks, and ends without a traceback."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with run_server("--log-file", "/dev/full") as server:
        alice = Peer(server.port).join("alice")
        alice.send("hello")
        alice.expect("alice: hello")
        close_peers()
        assert server.stop() == 0
        assert re.fullmatch(r"(\S+ \S+ (INFO|WARNING) .*\n)+", server.log())
