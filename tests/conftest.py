"""Put the tests' own modules on the path, so that a test says `from chat import Peer`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("chat")  # its assertions show what they compared
