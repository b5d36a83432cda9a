"""What an installed package adds to the three files of the program: two commands.

`classic-chat` is ``python client.py`` and `classic-chat-server` is ``python server.py``.
"""

import sys
from pathlib import Path


def chat() -> int:
    """Run the client; return the exit status."""
    _find_program()
    import client

    return client.main()


def serve() -> int:
    """Run the server; return the exit status."""
    _find_program()
    import server

    return server.main()


def _find_program() -> None:
    """Let the three files, which lie in this folder, be found under the names they have."""
    sys.path.insert(0, str(Path(__file__).parent))
