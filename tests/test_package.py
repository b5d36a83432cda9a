"""What an installation gives: two commands, and nothing else that is in anybody's way."""

from __future__ import annotations

import contextlib
import email
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from chat import DEADLINE, STOP, Peer, wait_until
from clients import ROOT, environment

SECONDS = 50.0  # for a build whose tools are fetched first
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1"]


def pip(*arguments: str | Path) -> None:
    """Run pip; skip the test where it cannot do this, but never where all must be checked."""
    if importlib.util.find_spec("pip") is None:
        cannot("there is no pip")
    try:
        with tempfile.TemporaryDirectory() as folder:  # its own, for what a killed one leaves
            done = subprocess.run(
                [*PIP, *arguments],
                capture_output=True,
                text=True,
                env={**os.environ, "TMPDIR": folder},
                timeout=SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        cannot(f"pip cannot {arguments[0]} in {SECONDS:.0f} s")
    if done.returncode:
        cannot(f"pip cannot {arguments[0]}: {done.stderr}")


def cannot(reason: str) -> NoReturn:
    """Skip, or fail where all must be checked."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    [built] = folder.glob("classic_chat-*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel where nothing else is; give the folder of its commands."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    pip("--python", commands / "python", "install", "--quiet", "--no-index", wheel)
    return commands


@contextlib.contextmanager
def serving(commands: Path, log: Path) -> Iterator[int]:
    """Run the installed server; give its port, and see that SIGTERM ends it in order."""
    command: list[str | Path] = [commands / "classic-chat-server", "--port", "0", "--log-file", log]
    with subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=environment(), cwd=log.parent
    ) as server:
        try:
            wait_until(lambda: log.exists() and "listening on" in log.read_text(), "the server")
            found = re.search(r"listening on \S+:(\d+)", log.read_text())
            assert found
            yield int(found[1])
            server.terminate()
            assert server.wait(STOP) == 0
        finally:
            server.kill()


def test_installed_commands_chat(commands: Path, tmp_path: Path) -> None:
    """What is piped into `classic-chat` is said in the room of `classic-chat-server`."""
    with serving(commands, tmp_path / "room.log") as port:
        alice = Peer(port).join("alice")
        done = subprocess.run(
            [commands / "classic-chat", "--port", str(port), "--name", "build"],
            input=b"2 tests passed\n",
            stdout=subprocess.DEVNULL,
            env=environment(),
            cwd=tmp_path,
            timeout=DEADLINE,
            check=False,
        )
        alice.expect("* build joined the chat", "build: 2 tests passed", "* build left the chat")
        alice.close()
    assert done.returncode == 0


def test_installed_commands_go_by_their_names(commands: Path, tmp_path: Path) -> None:
    """Usage and complaints begin with what was typed, and examples are typed like it."""
    for name, wrong in (
        ("classic-chat", ["--name", "alice", "--password-file", "none"]),
        ("classic-chat-server", ["--password-file", "none"]),
    ):
        for arguments, start in ((["--help"], f"usage: {name} "), (wrong, f"{name}: cannot ")):
            done = subprocess.run(
                [commands / name, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=environment(),
                cwd=tmp_path,
                timeout=DEADLINE,
                check=False,
            )
            assert (done.stdout or done.stderr).startswith(start)
            assert "python " not in done.stdout
            assert bool(done.stdout) == (f"\n      {name} --host " in done.stdout)


@pytest.mark.parametrize("module", ["server", "client", "protocol"])
def test_installation_leaves_plain_names_alone(module: str, commands: Path, tmp_path: Path) -> None:
    """A program beside an installed chat finds no `server`, `client` or `protocol` of ours."""
    done = subprocess.run(
        [commands / "python", "-c", f"import classic_chat; import {module}"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        timeout=DEADLINE,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{module}'"


def test_wheel_is_one_package_with_its_extras(wheel: Path) -> None:
    """The wheel holds one package, needs no other, and names the extras."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(metadata))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"classic_chat", metadata.split("/")[0]}
    assert set(told.get_all("Provides-Extra", [])) == {"cluster", "lint", "test", "tui"}
    for needed in told.get_all("Requires-Dist", []):
        assert "extra ==" in needed
