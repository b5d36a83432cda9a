"""Put the tests' own modules on the path, so that a test says `from chat import Peer`."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("chat")  # its assertions show what they compared

# Started in the background of a script, tests and the programs they start would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
