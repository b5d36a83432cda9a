"""What the README says is so: its commands run, and the tests that it names exist.

A block of commands (``sh``) runs as it stands, in a network of its own where the default port
is free and the address of the examples is this machine's.  One that begins with ``# needs ...``
wants something that a test has not, and is checked as far as it goes.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from chat import DEADLINE, STOP, Peer, run_chat, wait_until
from clients import environment
from terminal import Screen, Terminal
from trust import ROOT, SLOW_TO_START

import client
import server

README = ROOT / "README.md"
PROGRAMS = ("server.py", "client.py", "protocol.py")
ADDRESS = "192.168.1.20"  # the one of the examples
NETWORK = f"""
ip link set lo up
ip address add {ADDRESS}/32 dev lo
echo laid
exec sleep 3600
"""


def blocks(language: str, part: str = "") -> list[str]:
    """Return the blocks of a language, in the whole README or under one of its headings."""
    text = README.read_text(encoding="utf-8")
    if part:
        found = re.search(rf"^#+ {part}\n(.*?)(?=^#+ [A-Z]|\Z)", text, re.M | re.S)
        assert found, f"the README has no part {part!r}"
        text = found[1]
    found_blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for of, block in found_blocks if of == language]


def is_elsewhere(block: str) -> bool:
    """Tell whether a block needs what a test has not."""
    return block.startswith("# needs ")


class House:
    """A machine in a network of its own, with a copy of the program."""

    def __init__(self, folder: Path, holder: int) -> None:
        self.folder = folder
        self._inside = ["nsenter", "--target", str(holder), "--user", "--net"]
        self._inside.append("--preserve-credentials")
        for name in PROGRAMS:
            shutil.copy(ROOT / name, folder)
        commands = folder / "commands"
        commands.mkdir()
        (commands / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (commands / "python").chmod(0o755)
        self._environment = environment(PATH=f"{commands}:{os.environ['PATH']}", INPUTRC=os.devnull)

    def run(self, block: str) -> str:
        """Run a block to its end; return its output."""
        done = subprocess.run(
            [*self._inside, "bash", "-euc", block],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self._environment,
            timeout=SLOW_TO_START,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def open(self, block: str, rows: int = 24) -> Terminal:
        """Type a block into a terminal."""
        command = [*self._inside, "bash", "-c", block]
        return Terminal(command, rows, 120, self._environment, self.folder)

    @contextlib.contextmanager
    def serve(self, block: str) -> Iterator[Terminal]:
        """Run a server until the end, which is by Ctrl-C."""
        with self.open(block) as terminal:
            terminal.wait_for("listening on")
            yield terminal
            terminal.type("\x03")
            assert terminal.wait() == 0

    def talk(self, block: str, password: str = "") -> None:
        """Come with a client, say something, and leave."""
        with self.open(block) as terminal:
            terminal.wait_for("Your name: ")
            terminal.type("alice\r")
            if password:
                terminal.wait_for("Password of the room: ")
                terminal.type(f"{password}\r")
            terminal.wait_for("* alice joined the chat")
            terminal.wait_for("alice> ")
            terminal.type("hello\r")
            terminal.wait_for("alice: hello")
            terminal.type("/quit\r")
            assert terminal.wait() == 0


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Give a machine, where this one lets a test lay a network."""
    for needed in ("unshare", "nsenter", "ip", "bash"):
        if shutil.which(needed) is None:
            pytest.skip(f"a network of one's own needs the command {needed}")
    with subprocess.Popen(
        ["unshare", "--map-root-user", "--net", "bash", "-euc", NETWORK],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout
            if holder.stdout.readline() != "laid\n":
                pytest.skip("no network of one's own is allowed here")
            yield House(tmp_path, holder.pid)
        finally:
            holder.kill()


# --- Commands ----------------------------------------------------------------


def test_run_it(house: House) -> None:
    """The first two blocks are a room and somebody who talks in it."""
    room, person = (block for block in blocks("sh", "Run it") if not is_elsewhere(block))
    with house.serve(room):
        house.talk(person)


def test_let_friends_in(house: House) -> None:
    """A certificate, a password, a room with both, and a friend who gets in with them."""
    secrets, room, friend = (
        block for block in blocks("sh", "Let friends in") if not is_elsewhere(block)
    )
    house.run(secrets)
    assert (house.folder / "key.pem").stat().st_mode & 0o077 == 0
    assert (house.folder / "password").stat().st_mode & 0o077 == 0
    with house.serve(room) as terminal:
        assert not terminal.screen.shows("open to the network without")
        house.talk(friend, (house.folder / "password").read_text().strip())


def test_settings(house: House) -> None:
    """With the settings, a certificate and a password beside them, a friend types no option."""
    secrets, room, _ = (
        block for block in blocks("sh", "Let friends in") if not is_elsewhere(block)
    )
    [settings] = blocks("toml")
    house.run(secrets)
    place = house.folder / "settings" / "classic-chat"
    place.mkdir(parents=True)
    (place / "client.toml").write_text(settings, encoding="utf-8")
    for name in ("cert.pem", "password"):
        shutil.copy(house.folder / name, place)
    kept = shlex.quote(str(place.parent))
    command = f"XDG_CONFIG_HOME={kept} XDG_STATE_HOME={kept} python client.py"
    with house.serve(room), house.open(command) as terminal:
        terminal.wait_for("* alice joined the chat")
        terminal.wait_for("alice> ")
        terminal.type("/quit\r")
        assert terminal.wait() == 0


def test_pipe(house: House) -> None:
    """What a build prints is said in the room."""
    [pipe] = blocks("sh", "Pipes and bots")
    [room, _, _] = blocks("sh", "Run it")
    with house.serve(room):
        assert "build: 2 tests passed" in house.run(pipe).splitlines()


def test_history(house: House) -> None:
    """A history is copied and looked at while the server runs, and thinned out after it."""
    if shutil.which("sqlite3") is None:
        pytest.skip("no sqlite3 command")
    room, copy_and_look, delete = blocks("sh", "The history")
    [_, person, _] = blocks("sh", "Run it")
    with house.serve(room):
        house.talk(person)
        assert "|alice|hello\n" in house.run(copy_and_look)
    assert (house.folder / "copy.db").exists()
    assert not (house.folder / "room.db-wal").exists()
    house.run("sqlite3 room.db 'UPDATE lines SET time = 0 WHERE kind = \"said\"'")
    house.run(delete)
    kept = house.run("sqlite3 room.db 'SELECT kind FROM lines'")
    assert set(kept.split()) == {"notice"}
    with house.serve(room):
        house.talk(person)


def begins_with(lines: list[str], screen: Screen) -> bool:
    """Tell whether a screen begins with these lines."""
    return screen.lines[: len(lines)] == lines


def test_wire(house: House) -> None:
    """The conversation by `nc` goes as it is shown."""
    if shutil.which("nc") is None:
        pytest.skip("no nc command")
    [room, _, _] = blocks("sh", "Run it")
    [shown] = blocks("", "The wire")
    command, *lines = shown.splitlines()
    with house.serve(room), house.open(command.removeprefix("$ ")) as terminal:
        for number, line in enumerate(lines):
            if line in ("carol", "hello from nc", "/quit"):
                terminal.type(f"{line}\r")
            terminal.wait_for(partial(begins_with, lines[: number + 1]))


def test_each_command_is_run_or_says_what_it_needs() -> None:
    """Each block of commands is run by a test above, or begins with what it needs."""
    run = [
        block
        for part in ("Run it", "Let friends in", "Pipes and bots", "The history")
        for block in blocks("sh", part)
        if not is_elsewhere(block)
    ]
    assert [block for block in blocks("sh") if not is_elsewhere(block)] == run


@pytest.mark.parametrize("block", [block for block in blocks("sh") if is_elsewhere(block)])
def test_command_that_needs_more_is_sound(block: str) -> None:
    """A command that cannot be run here can at least be read by a shell."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    subprocess.run(["bash", "-n", "-c", block], check=True, timeout=DEADLINE)


def test_options_exist() -> None:
    """Each option in a command of our programs, and each in the text, is one of theirs."""
    parsers = {"server.py": server._parser(), "client.py": client._parser()}
    known = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    text = README.read_text(encoding="utf-8")
    used = re.findall(r"\b(server\.py|client\.py)((?: (?!\|)[^\s`]+)*)", text)
    assert len(used) > 10
    for program, arguments in used:
        assert set(re.findall(r"(?<= )--[a-z-]+", arguments)) <= known[program], arguments
    for option in re.findall(r"`(--[a-z-]+)[ `]", text):
        assert option in known["server.py"] | known["client.py"], option


def test_table_of_commands_is_what_help_says() -> None:
    """The commands that the server explains stand in the README, word for word."""
    [table] = blocks("", "Every day")
    with run_chat() as room:
        alice = Peer(room.port).join("alice").send("/help", "said")
        told = [line.removeprefix("-> ") for line in alice.lines_until("alice: said")[:-1]]
    listed = [line.split() for line in told if line.startswith("/")]
    assert len(listed) >= 9
    shown = [line.split() for line in table.splitlines()]
    assert [line for line in listed if line not in shown] == []


# --- A server that always runs -----------------------------------------------


def lasting() -> list[str]:
    """Return the arguments of the server in the unit and in the container."""
    [unit] = blocks("ini")
    [container] = (block for block in blocks("sh") if "docker run" in block)
    return re.findall(r"server\.py (.*)", unit + container)


@pytest.mark.parametrize("arguments", lasting())
def test_server_runs_as_process_1(arguments: str, tmp_path: Path) -> None:
    """The commands of the unit and the container run as process 1, and SIGTERM ends them."""
    alone = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no process tree of one's own is allowed here")
    given = re.sub(r"/\S*/", f"{tmp_path}/", arguments).split()
    log = tmp_path / "room.log"
    options = [*given, "--port", "0", "--log-file", str(log)]
    with subprocess.Popen(
        [*alone, sys.executable, str(ROOT / "server.py"), *options], stderr=subprocess.DEVNULL
    ) as outside:
        try:
            wait_until(lambda: log.exists() and "listening on" in log.read_text(), "the server")
            children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text()
            os.kill(int(children), signal.SIGTERM)
            assert outside.wait(STOP) == 0
        finally:
            outside.kill()
    assert (tmp_path / "room.db").exists()


def test_unit_is_one(tmp_path: Path) -> None:
    """The unit is one that systemd takes without a word."""
    if shutil.which("systemd-analyze") is None or not Path("/usr/bin/python3").exists():
        pytest.skip("no systemd")
    [unit] = blocks("ini")
    file = tmp_path / "classic-chat.service"
    file.write_text(unit, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)],
        capture_output=True,
        text=True,
        timeout=SLOW_TO_START,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- Tests and bots ----------------------------------------------------------


def names_of_tests(file: Path) -> set[str]:
    """Return the names of the tests in a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_readme_names_tests_that_exist() -> None:
    """Each test that the README names in backticks is in the suite, and in the file it names."""
    named = re.findall(
        r"`(?:tests/)?(?:(test_\w+\.py)(?:::)?)?(test_\w+)?(?:\[[^`]*\])?`",
        README.read_text(encoding="utf-8"),
    )
    files = {file.name: names_of_tests(file) for file in (ROOT / "tests").glob("test_*.py")}
    every = set().union(*files.values())
    assert any(test for _, test in named), "the README names no test"
    for file, test in named:
        assert not file or file in files, f"there is no tests/{file}"
        assert not test or test in files.get(file, every), (
            f"there is no {test} in {file or 'tests'}"
        )


def test_each_promise_names_its_test() -> None:
    """Each of the promises in the README names at least one test that proves it."""
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^#+ [^\n]*promise[^\n]*\n(.*?)(?=^#+ |\Z)", text, re.M | re.S | re.I)
    assert section, "the README has no promises"
    promises = re.findall(r"^(?:\| *\d|\d+\. ).*(?:\n {2,}\S.*)*", section[1], re.MULTILINE)
    assert len(promises) >= 12
    for promise in promises:
        assert re.search(r"`[^`]*test_\w+[^`]*`", promise), promise


def test_readme_has_the_command_that_is_checked() -> None:
    """The command for the tests in the README is a line of what checks every change."""
    blocks = re.findall(r"```\w*\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "-m pytest" in line]
    checked = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands, "the README does not tell how to run the tests"
    for command in commands:
        assert command in checked


def test_readme_bot_runs() -> None:
    """The bot of the README answers, and ends when it is told to."""
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    with run_chat() as room:
        alice = Peer(room.port).join("alice")
        code = block[1].replace('ChatClient("clock")', f'ChatClient("clock", port={room.port})')
        bot = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        try:
            alice.expect("* clock joined the chat")
            alice.send("!time")
            alice.expect("alice: !time")
            alice.expect_match(r"clock: \w+ \w+ .*")
            alice.send("!bye")
            alice.expect("alice: !bye", "* clock left the chat")
            assert bot.wait(DEADLINE) == 0
        finally:
            bot.kill()
            bot.wait()
