"""Put the tests' own modules on the path, so that a test says `from chat import Peer`."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("chat")  # its assertions show what they compared

from workers import pytest_addoption, pytest_runtestloop  # noqa: E402

__all__ = ["pytest_addoption", "pytest_runtestloop"]  # tests run side by side

# Started in the background of a script, tests and the programs they start would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup, the programs would ignore SIGHUP.  A handler is not passed on to them, and the
# tests themselves go on without their terminal.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
