"""Tests that run side by side are reported as those that run one after the other."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat import DEADLINE, wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers")

CONFTEST = """
import sys
sys.path.insert(0, {folder!r})
from workers import pytest_addoption, pytest_runtestloop
"""


def start(folder: Path, tests: str, *options: str) -> subprocess.Popen[str]:
    """Start pytest with two workers and a file of tests."""
    (folder / "conftest.py").write_text(CONFTEST.format(folder=str(Path(__file__).parent)))
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--workers", "2"]
    # Of its own: others clean up in the folder that all have, and warn of each other.
    command.append(f"--basetemp={folder / 'temporary'}")
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, tests: str, *options: str) -> tuple[int, str]:
    """Run it to its end; return its exit status and what it shows."""
    with start(folder, tests, *options) as process:
        output, _ = process.communicate(timeout=DEADLINE * 2)
    return process.returncode, output


def test_all_outcomes_are_reported(tmp_path: Path) -> None:
    """What passes, fails, is skipped and is warned of is counted, with the output of failures."""
    status, output = run(
        tmp_path,
        "import os, pytest, warnings\n"
        "@pytest.mark.parametrize('number', range(20))\n"
        "def test_good(number, tmp_path): assert not list(tmp_path.iterdir())\n"
        "def test_bad(): print('seen'); os.write(1, b'written'); assert [1] == [2]\n"
        "def test_left_out(): pytest.skip('why not')\n"
        "def test_warned(): warnings.warn('beware')\n",
    )
    assert status == 1
    assert "1 failed, 21 passed, 1 skipped, 1 warning in" in output
    for text in ("[100%]", "assert [1] == [2]", "seen", "written", "UserWarning: beware"):
        assert text in output


def test_a_fixture_of_a_module_is_shared(tmp_path: Path) -> None:
    """Tests that share a fixture run in one process, which ends the fixture behind the last."""
    status, output = run(
        tmp_path,
        "import pytest\n"
        "@pytest.fixture(scope='module')\n"
        "def made():\n"
        "    with open('made', 'a') as file: file.write('begun ')\n"
        "    yield\n"
        "    with open('made', 'a') as file: file.write('ended ')\n"
        "@pytest.mark.parametrize('number', range(5))\n"
        "def test_it(number, made): pass\n",
    )
    assert (status, (tmp_path / "made").read_text()) == (0, "begun ended "), output


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("os.write(2, b'last words'); os._exit(3)", "status 3"),
    ],
)
def test_a_worker_that_dies_has_its_test_fail(tmp_path: Path, death: str, how: str) -> None:
    """The test is named that a process died of, and all others run."""
    status, output = run(
        tmp_path,
        "import os, pytest, signal\n"
        f"def test_deadly(): {death}\n"
        "@pytest.mark.parametrize('number', range(20))\n"
        "def test_good(number): pass\n",
    )
    assert status == 1
    assert f"the process that ran this test ended with {how}" in output
    assert "FAILED test_it.py::test_deadly" in output
    assert "1 failed, 20 passed in" in output


@pytest.mark.parametrize("method", ["signal", "thread"])
def test_a_test_that_hangs_fails_in_time(tmp_path: Path, method: str) -> None:
    """A timeout ends a test in a worker, and shows where it hung."""
    status, output = run(
        tmp_path,
        "import threading\ndef test_hangs(): threading.Event().wait()\ndef test_good(): pass\n",
        *("--timeout", "0.5", "--timeout-method", method),
    )
    assert status == 1
    assert "1 failed, 1 passed in" in output
    assert "threading.Event().wait()" in output


def test_the_first_failure_ends_the_run(tmp_path: Path) -> None:
    """With -x no test begins behind a failure, and what has begun is ended."""
    status, output = run(
        tmp_path,
        "import pytest\n"
        "@pytest.mark.parametrize('number', range(50))\n"
        "def test_bad(number): assert False\n",
        "-x",
    )
    assert status == 1
    found = re.search(r"stopping after (\d) failures", output)
    assert found, output
    assert f"{found[1]} failed in" in output


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    """Ctrl-C is told as ever, and no process is left, but what a test has to end is ended."""
    tests = (
        "import os, pytest, time\n"
        "@pytest.fixture\n"
        "def ends():\n"
        "    yield\n"
        "    open(f'ended{os.getpid()}', 'w').close()\n"
        "@pytest.mark.parametrize('number', range(2))\n"
        "def test_long(number, ends):\n"
        "    open(f'begun{os.getpid()}', 'w').close()\n"
        "    time.sleep(60)\n"
    )
    with start(tmp_path, tests) as process:
        wait_until(lambda: len(list(tmp_path.glob("begun*"))) == 2, "the tests to begin")
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert "KeyboardInterrupt" in output
    assert time.monotonic() - started < DEADLINE
    assert len(list(tmp_path.glob("ended*"))) == 2
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
