"""The README names tests that exist and the command that really runs them."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, run_chat, run_server
from clients import environment
from trust import ROOT

import client
import server

README = ROOT / "README.md"


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


def blocks(kind: str = "") -> list[str]:
    """Return the blocks of code of a kind."""
    text = README.read_text(encoding="utf-8")
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [block for its_kind, block in fenced if its_kind == kind]


def commands(start: str) -> list[str]:
    """Return the commands in blocks of the README that begin so."""
    lines = [line for block in blocks() for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


def test_options_of_the_readme_exist() -> None:
    """Each option that the README names is one of the client's, the server's or the benchmark's."""
    known = client._parser().format_help() + server._parser().format_help()
    bench = (ROOT / "tests" / "bench" / "__main__.py").read_text(encoding="utf-8")
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", README.read_text(encoding="utf-8")))
    for line in commands("python "):
        named |= set(re.findall(r"--[a-z][a-z-]+", line))
    assert len(named) > 20
    for option in named:
        assert re.search(rf"{option}\b", known) or f'"{option}"' in bench, option


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_readme_lets_friends_in_with_tls_and_a_password(tmp_path: Path) -> None:
    """The commands for a room with TLS and a password make one, and a client is in with them."""
    [make] = commands("openssl req")
    [secret] = commands("echo ")
    [start] = [line for line in commands("python server.py") if "--tls-cert" in line]
    for line in (make, secret):
        subprocess.run(line, shell=True, cwd=tmp_path, check=True, capture_output=True)
    options = start.split()[2:]
    options[options.index("::")] = "127.0.0.1"  # a machine may have no IPv6
    files = [str(tmp_path / one) if one.endswith((".pem", "password")) else one for one in options]
    with run_server(*files) as room:
        found = re.search(r"([0-9A-F]{2}(?::[0-9A-F]{2}){31})", room.log())
        assert found
        for trust in (["--tls-fingerprint", found[1]], ["--tls-ca", str(tmp_path / "cert.pem")]):
            done = subprocess.run(
                [
                    sys.executable, "client.py", "--host", "localhost", "--port", str(room.port),
                    "--name", "alice", "--password-file", str(tmp_path / "password"), *trust,
                ],
                cwd=ROOT, input="hello\n", capture_output=True, text=True, timeout=DEADLINE,
                env=environment(), check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            assert "alice: hello" in done.stdout


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="there is no sqlite3")
def test_readme_looks_at_a_history_and_copies_it(tmp_path: Path) -> None:
    """The commands for a history show what was said, and copy it whole while the server runs."""
    with run_server("--history", str(tmp_path / "history.db")) as room:
        alice = Peer(room.port).join("alice")
        alice.send("hello")
        alice.expect("alice: hello")
        shown = [
            subprocess.run(
                line, shell=True, cwd=tmp_path, check=True, capture_output=True, text=True
            ).stdout
            for line in commands("sqlite3 history.db")
        ]
        assert "|alice|hello" in shown[0]
        copy = sqlite3.connect(tmp_path / "copy.db")
        assert copy.execute("SELECT text FROM lines WHERE name = 'alice'").fetchall()[-1] == (
            "hello",
        )
        copy.close()


def test_readme_unit_starts_a_server(tmp_path: Path) -> None:
    """The unit for systemd is well formed, and the command in it starts a room."""
    [unit] = blocks("ini")
    file = tmp_path / "chat.service"
    file.write_text(unit)
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
        )
        ours = [line for line in done.stderr.splitlines() if "chat.service" in line]
        assert not ours, ours
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(unit)
    start = parsed["Service"]["ExecStart"]
    options = start.partition("server.py ")[2].split()
    options[options.index("::")] = "127.0.0.1"
    options[-1] = str(tmp_path / "history.db")
    with run_server(*options) as room:
        Peer(room.port).join("alice")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare")
def test_server_is_process_1_of_a_container() -> None:
    """As process 1 of its own namespace, as in a container, SIGTERM ends the server in order."""
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace can be made here")
    process = subprocess.Popen(
        [*apart, sys.executable, str(ROOT / "server.py"), "--port", "0"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    try:
        found = None
        while not found:
            line = process.stderr.readline()
            assert line, "it did not start"
            found = re.search(r"listening on \S+:(\d+)$", line.strip())
        alice = Peer(int(found[1])).join("alice")
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        subprocess.run(["kill", "-TERM", listed.stdout.strip()], check=True)
        alice.expect("-> the server is shutting down")
        alice.expect_closed()
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        alice.close()
