"""A network for tests: this machine, another one that is a namespace of it, and a cable.

with network() as net:
    with net.start("import socket; ...", net.here) as process:
        net.cut()
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

SECONDS = 30  # for a command that sets something up on a busy machine


class Network:
    """Two ends, each with an address; what is sent from there can be made to be lost."""

    def __init__(self) -> None:
        # Of its own, for tests that run at the same time, out of those for measurements.
        first = ipaddress.ip_address("198.18.0.0") + os.getpid() % 2**15 * 4
        self.here, self.there = str(first + 1), str(first + 2)
        self._space = f"chat{os.getpid()}"
        self._ends = f"chat{os.getpid()}a", f"chat{os.getpid()}b"

    def lay(self) -> None:
        """Make the namespace and the cable; skip the test where that is not allowed."""
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("a network namespace needs Linux, root and the ip command")
        here, there = self._ends
        try:
            _ip("netns", "add", self._space)
            _ip(*f"link add {here} type veth peer name {there} netns {self._space}".split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace here: {error.stderr.strip()}")
        _ip("address", "add", f"{self.here}/30", "dev", here)
        _ip("link", "set", here, "up")
        self._there("address", "add", f"{self.there}/30", "dev", there)
        self._there("link", "set", there, "up")

    def take_away(self) -> None:
        """Remove what was made."""
        with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
            _ip("netns", "delete", self._space)

    @contextlib.contextmanager
    def start(self, code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run a Python program there; it is ended at the end."""
        command = ["ip", "netns", "exec", self._space, sys.executable, "-c", code, *arguments]
        with subprocess.Popen(command, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def cut(self) -> None:
        """Lose all that is sent from there, without a word to anybody."""
        self._there("route", "replace", "blackhole", f"{self.here}/32")

    def _there(self, *arguments: str) -> None:
        _ip("-n", self._space, *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=SECONDS)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Give a network, and take it away."""
    net = Network()
    try:
        net.lay()
        yield net
    finally:
        net.take_away()
