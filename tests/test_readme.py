"""The README names tests that exist and the command that really runs them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from chat import DEADLINE, Peer, run_chat
from trust import ROOT

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
    assert len(promises) >= 11
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
