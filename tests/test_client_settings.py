"""Settings that stay: what stands in the user's file, and what is said of a wrong one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, no_leaks, run_chat
from clients import CLIENT, environment
from screens import enter, opener, prompts

import client

ALICE = ("--name", "alice")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they stand elsewhere")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The place of the settings, where there are none yet."""
    place = tmp_path / "classic-chat" / "client.toml"
    place.parent.mkdir()
    return place


def run(file: Path, *options: str, text: str = "hello\n") -> subprocess.CompletedProcess[str]:
    """Run a client whose user has settings."""
    return subprocess.run(
        [*CLIENT, *options],
        input=text,
        capture_output=True,
        text=True,
        env=environment(XDG_CONFIG_HOME=str(file.parent.parent)),
        timeout=DEADLINE,
    )


# --- What they do -----------------------------------------------------------------


def test_settings_are_options_that_stay(file: Path) -> None:
    """Host and port come from the file, and options win over it."""
    with run_chat() as server:
        file.write_text(f'host = "127.0.0.1"\nport = {server.port}\n')
        done = run(file, *ALICE)
        assert (done.returncode, done.stderr) == (0, "")
        assert "alice: hello" in done.stdout.splitlines()
        assert run(file, *ALICE, "--port", "1").returncode == 1


def test_mark_of_an_editor_is_no_setting(file: Path) -> None:
    """A file that begins with a byte order mark, as some editors write it, is read like another."""
    file.write_text('name = "alice"\n', encoding="utf-8-sig")
    with run_chat() as server:
        done = run(file, "--settings", str(file), "--port", str(server.port))
        assert (done.returncode, done.stderr) == (0, "")
        assert "alice: hello" in done.stdout.splitlines()


def test_name_stays_on_a_terminal(file: Path) -> None:
    """Who has a name in the settings is not asked for one, and another on the command line wins."""
    file.write_text('name = "alice"\n')
    place = str(file.parent.parent)
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        for options, name in ((("--no-bell",), "alice"), (("--name", "carol"), "carol")):
            with opener("readline")(server.port, *options, XDG_CONFIG_HOME=place) as terminal:
                bob.expect_eventually(f"* {name} joined the chat")
                terminal.wait_for(f"* {name} joined the chat")


def test_settings_change_no_line_of_a_pipe(file: Path) -> None:
    """The first line of a pipe is its name and no line has a time, whatever its user has set."""
    with run_chat() as server:
        file.write_text(f'name = "alice"\ntimestamps = true\nport = {server.port}\n')
        done = run(file, text="build\nhello\n")
        assert (done.returncode, done.stderr) == (0, "")
        assert "build: hello" in done.stdout.splitlines()
        assert "build: build" not in done.stdout
        done = run(file, "--settings", str(file))
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^\d\d:\d\d alice: hello$", done.stdout, re.MULTILINE)


def test_options_win_over_switches(file: Path) -> None:
    """What the settings switch on, the command line can switch off."""
    with run_chat() as server:
        file.write_text(f"port = {server.port}\ntls = true\ntimestamps = true\n")
        named = (*ALICE, "--settings", str(file))
        done = run(file, *named, "--no-tls", "--no-timestamps")
        assert (done.returncode, done.stderr) == (0, "")
        assert "alice: hello" in done.stdout.splitlines()
        assert run(file, *ALICE).returncode == 1


@pytest.mark.parametrize("other", ["--tls-ca=ca.pem", f"--tls-fingerprint={'ab' * 32}"])
def test_no_tls_with_what_asks_for_it_is_refused(file: Path, other: str) -> None:
    """Nobody talks in the clear who asked for TLS too; what the settings ask for gives way."""
    done = run(file, *ALICE, "--no-tls", other)
    assert done.returncode == 2
    assert "leave one out" in done.stderr.splitlines()[-1]
    with run_chat() as server:
        name, _, value = other.removeprefix("--").partition("=")
        file.write_text(f'port = {server.port}\n{name} = "{value}"\n')
        assert run(file, *ALICE, "--no-tls").returncode == 0


def test_files_stand_beside_the_settings(file: Path) -> None:
    """A password file that is named without a folder is the one beside the settings."""
    (file.parent / "secret").write_text("tr0ub4dor\n")
    with run_chat(password="tr0ub4dor") as server:
        file.write_text(f'port = {server.port}\npassword-file = "secret"\n')
        done = run(file, *ALICE)
        assert (done.returncode, done.stderr) == (0, "")


def test_another_file_or_none(file: Path, tmp_path: Path) -> None:
    """A script names its own settings, or none at all."""
    other = tmp_path / "other.toml"
    file.write_text("nonsense")
    with run_chat() as server:
        other.write_text(f'name = "carol"\nport = {server.port}\n')
        assert "carol: hello" in run(file, "--settings", str(other)).stdout.splitlines()
        done = run(file, "--settings", "", "--port", str(server.port), "--name", "dave")
        assert "dave: hello" in done.stdout.splitlines()


@pytest.mark.parametrize("no_status", [False, True])
def test_status_line_can_be_off(file: Path, no_status: bool) -> None:
    """The line below the prompt stands there unless the settings say no."""
    file.write_text(f"no-status = {str(no_status).lower()}\n")
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        place = str(file.parent.parent)
        with opener("prompt_toolkit")(server.port, *ALICE, XDG_CONFIG_HOME=place) as terminal:
            enter(terminal, bob)
            terminal.type("x")
            terminal.wait_for(prompts("x"))
            terminal.settle()
            assert ("alice on 127.0.0.1" in terminal.screen.text()) is not no_status


def test_help_says_where(file: Path) -> None:
    """--help names the file, in whatever place it is, and has each group and the examples."""
    done = run(file, "--help")
    assert done.returncode == 0
    assert str(file) in "".join(done.stdout.split())
    for title in ("where:", "who:", "safety:", "display:", "pipes:", "examples:"):
        assert title in done.stdout.splitlines()


# --- What is wrong with them ------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ('nmae = "alice"', "there is no setting 'nmae'; take one of host, name,"),
        ('password = "x"', "a password does not belong here; name its file in password-file"),
        ('port = "55555"', "port must be a whole number; it is '55555'"),
        ("port = true", "port must be a whole number; it is True"),
        ("port = 99999", "port: '99999' is not a port number; use 0 to 65535"),
        ('tls = "yes"', "tls must be true or false; it is 'yes'"),
        ("name = 1", "name must be a text in quotes; it is 1"),
        ('name = "a b"', "name: a name is one word of at most 24 letters"),
        ('format = "latin-1"', "format: invalid choice: 'latin-1' (choose from"),
        ('host = ""', "host: '' names no host; give"),
        ('host = "a\\nb"', "host has a character that cannot be seen; write it without"),
        ('tls-ca = "a\\u0000"', "tls-ca has a character that cannot be seen; write it without"),
        (
            'tls-fingerprint = "AB"',
            "tls-fingerprint: 'AB' is not a fingerprint of 64 hex digits; the server logs",
        ),
        ("[server]\nport = 1", "there is no setting 'server'; take one of"),
    ],
)
def test_wrong_setting_is_told_in_one_line(file: Path, settings: str, complaint: str) -> None:
    """One line names the file, the setting and what to do; it is a wrong usage."""
    file.write_text(settings)
    done = run(file)
    assert done.returncode == 2
    assert done.stderr.startswith(f"client.py: {file}: {complaint}")
    assert done.stderr.count("\n") == 1


def test_unreadable_settings_are_told_in_one_line(file: Path) -> None:
    """What is no TOML, no text or no file is told with what to do."""
    file.write_text("name alice")
    done = run(file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{file} is not TOML: " in done.stderr
    assert 'write lines such as name = "alice"' in done.stderr
    for absurd in ("port = " + "9" * 5000, "port = " + "[" * 5000):
        file.write_text(absurd)
        done = run(file)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{file} is not TOML: " in done.stderr
    file.write_bytes(b'name = "\xff"')
    assert run(file).stderr == f"client.py: {file} is not UTF-8; save it as that\n"
    file.write_text("#" * (client.MAX_SETTINGS + 1))
    assert f"{file} has over {client.MAX_SETTINGS} characters" in run(file).stderr
    if Path("/dev/zero").exists():  # it has no end
        assert run(file, "--settings", "/dev/zero").returncode == 2
    file.unlink()
    file.mkdir()
    done = run(file)
    assert done.returncode == 2
    assert f"cannot read {file}: {os.strerror(21)}; make it readable" in done.stderr
    done = run(file, "--settings", str(file.parent / "none"))
    assert done.returncode == 2
    assert "No such file or directory; name another file" in done.stderr
