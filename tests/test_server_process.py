"""The server as people start it: a process with a console, options, signals and an end."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from chat import (
    DEADLINE,
    SERVER,
    STOP,
    Peer,
    Server,
    close_peers,
    crowd,
    no_leaks,
    pair,
    run_briefly,
    run_server,
)

import protocol

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def test_a_conversation_and_its_console() -> None:
    """People talk through a process; the console shows who comes and goes, not what is said."""
    with run_server() as server:
        alice, bob = pair(server.port)
        alice.send("hello bob")
        bob.send("/me waves", "/msg alice psst")
        lines = alice.lines(3)
        assert sorted(lines) == ["** bob waves", "[from bob] psst", "alice: hello bob"]
        bob.send("/quit")
        alice.expect("* bob left the chat")
        server.expect_log(r"INFO bob \(127\.0\.0\.1:\d+\) left: /quit\n")
        server.ask_to_end()
        alice.expect(protocol.SHUTTING_DOWN)
        alice.expect_closed()
        close_peers()
        assert server.wait() == 0
        log = server.log()
        assert re.search(r"INFO listening on 127\.0\.0\.1:\d+\n", log)
        for name in "alice", "bob":
            assert re.search(rf"INFO {name} \(127\.0\.0\.1:\d+\) joined\n", log)
        assert "hello" not in log
        assert "psst" not in log


def test_the_console_shows_refusals() -> None:
    """Who was not let in, and why, stands on the console."""
    with run_server("--max-clients", "1", "--name-deadline", "1") as server:
        Peer(server.port).join("alice")
        Peer(server.port).send("bob")
        server.expect_log(r"unnamed \(127\.0\.0\.1:\d+\) left: the room is full\n")
        Peer(server.port).send_raw(b"GET / HTTP/1.1\r\n\r\n")
        server.expect_log(r"unnamed \(127\.0\.0\.1:\d+\) left: speaks HTTP\n")
        Peer(server.port)
        server.expect_log(r"unnamed \(127\.0\.0\.1:\d+\) left: no name in time\n")


def test_verbose_logs_what_is_said_and_only_printably() -> None:
    """With -v the console shows the room's lines; nothing from the network is shown raw."""
    with run_server("-v", "--format", "utf-8") as server:
        alice = Peer(server.port).join("alice")
        alice.send("hello", "/me waves").send_raw("gr\u00fcn\n\x1b[31mred\n\u202eback\n".encode())
        server.expect_log(r"DEBUG alice: hello\n")
        server.expect_log(r"DEBUG \*\* alice waves\n")
        server.expect_log("DEBUG alice: gr\u00fcn\n")
        alice.lines(5)
        Peer(server.port).send_raw(b"\x1b]0;title\x07\n\xff\n\x00\n")
        server.expect_log("unnamed .* left: ")
        close_peers()
        assert server.stop() == 0
        printable = server.log().replace("\n", "")
        assert printable.isprintable(), printable


@pytest.mark.parametrize("number", SIGNALS)
def test_an_idle_server_ends(number: int) -> None:
    """A signal ends an empty room with exit status 0."""
    with run_server() as server:
        assert server.stop(number) == 0


def test_a_server_ends_whatever_its_clients_do() -> None:
    """Idle, talking, stuck and half-joined clients do not keep it; who reads is told."""
    with run_server("--rate-limit", "0") as one, run_server("--rate-limit", "0") as other:
        crowds = [Crowd(server) for server in (one, other)]
        for server, number in zip((one, other), SIGNALS, strict=True):
            server.ask_to_end(number)
        assert one.wait() == 0
        assert other.wait() == 0
        for crowd in crowds:
            crowd.expect_the_end()


class Crowd:
    """Clients of all kinds, one of them stuck."""

    def __init__(self, server: Server) -> None:
        self.idle = Peer(server.port).join("idle")
        self.stuck = Peer(server.port, buffer=4096).join("stuck")
        self.silent, self.half = Peer(server.port), Peer(server.port)
        for peer in self.silent, self.half:
            peer.expect("NICK")
        self.half.send_raw(b"hal")
        self.partly = Peer(server.port).join("partly").send_raw(b"not finis")
        self.talker = Peer(server.port).join("talker")
        for peer in self.idle, self.partly:
            peer.expect_eventually("* talker joined the chat")
        for _ in range(80):  # over 6 MB: more than the system keeps for who does not read
            self.talker.send(*["x" * 1000] * 80)
            for peer in self.talker, self.idle, self.partly:
                peer.expect(*["talker: " + "x" * 1000] * 80)

    def expect_the_end(self) -> None:
        """Expect the last word and the end wherever there is a reader."""
        for peer in self.idle, self.partly, self.talker, self.silent, self.half:
            peer.expect(protocol.SHUTTING_DOWN)
            peer.expect_closed()
        assert self.stuck.next_line() == "* partly joined the chat"


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_accepted_is_delivered(number: int) -> None:
    """What one reader has seen before the signal comes to all, slow ones too, before the end."""
    with run_server("--rate-limit", "0") as server:
        alice, bob = pair(server.port)
        lines = [f"{line} {'x' * 500}" for line in range(2000)]
        alice.send(*lines)
        alice.expect(*(f"alice: {line}" for line in lines))
        alice.send("/msg bob psst")
        alice.expect("-> to bob: psst")
        server.ask_to_end(number)
        bob.expect(*(f"alice: {line}" for line in lines), "[from alice] psst")
        bob.expect(protocol.SHUTTING_DOWN)
        bob.expect_closed()
        close_peers()
        assert server.wait() == 0


def test_a_busy_room_ends_in_order() -> None:
    """Ended while all talk, the room gives everyone the same lines and its last word."""
    with run_server("--rate-limit", "0") as server:
        talkers = crowd(server.port, 5)
        transcripts: list[list[str]] = []
        busy = threading.Barrier(len(talkers) + 1)

        def talk(peer: Peer, name: str) -> None:
            lines: list[str] = []
            for turn in range(100_000):
                with contextlib.suppress(OSError):  # the server has ended
                    peer.send(*[str(turn)] * 5)
                while line := peer.next_line():
                    lines.append(line)
                    if line in (f"{name}: {turn}", protocol.SHUTTING_DOWN):
                        break
                if turn == 10:
                    busy.wait()
                if line == protocol.SHUTTING_DOWN:
                    break
            transcripts.append(lines)

        threads = [
            threading.Thread(target=talk, args=[peer, f"peer{number}"], daemon=True)
            for number, peer in enumerate(talkers)
        ]
        for thread in threads:
            thread.start()
        busy.wait()
        server.ask_to_end()
        for thread in threads:
            thread.join()
        close_peers()
        assert server.wait() == 0
        assert len(transcripts) == 5
        for transcript in transcripts:
            assert transcript == transcripts[0]


def test_the_second_signal_changes_nothing() -> None:
    """Somebody impatient who presses Ctrl-C again still gets an orderly end."""
    with run_server() as server:
        alice = Peer(server.port).join("alice")
        Peer(server.port).expect("NICK")
        for _ in range(3):
            server.ask_to_end(signal.SIGINT)
        alice.expect(protocol.SHUTTING_DOWN)
        close_peers()
        assert server.wait() == 0


def test_the_port_is_free_again_at_once() -> None:
    """A server can be started again on the port where people were connected."""
    with run_server() as server:
        alice = Peer(server.port).join("alice")
        server.ask_to_end()
        alice.expect(protocol.SHUTTING_DOWN)
        alice.expect_closed()  # the server closed first, so it is its port that lingers
        alice.close()
        assert server.wait() == 0
        port = server.port
        with run_server("--port", str(port)) as again:
            assert again.port == port
            Peer(port).join("alice")


# --- What is said when it cannot start ---------------------------------------


def expect_failure(status: int, reason: str, *options: str) -> None:
    """Expect one line on standard error, nothing else, and an exit status."""
    result = run_briefly(*options)
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    *usage, line = result.stderr.splitlines()
    assert re.fullmatch(f"server.py: {reason}", line), result.stderr
    if status == 1:
        assert not usage
    else:
        assert usage[0].startswith("usage: server.py")
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_told() -> None:
    """Two servers on one port: the second says so and what to do."""
    with run_server() as server:
        expect_failure(
            1,
            r"cannot listen on 127\.0\.0\.1 port \d+: the port is in use; choose .* --port",
            "--port",
            str(server.port),
        )


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "fe80::1%nowhere"])
def test_an_unknown_host_is_told(host: str) -> None:
    """A name that is no host's is called unknown."""
    expect_failure(
        1, f"cannot listen on {host} port 0: unknown host; .* --host", "--port", "0", "--host", host
    )


def test_an_address_that_is_not_ours_is_told() -> None:
    """One cannot listen on another machine's address."""
    expect_failure(
        1,
        r"cannot listen on 192\.0\.2\.1 port 0: not an address of this machine; .* --host",
        "--port",
        "0",
        "--host",
        "192.0.2.1",
    )


@pytest.mark.parametrize("file", ["no/such/folder/log", "."])
def test_a_log_that_cannot_be_written_is_told(tmp_path: Path, file: str) -> None:
    """The log file is tried before anything is promised."""
    expect_failure(
        1,
        r"cannot write .*: .*; name another file",
        "--port",
        "0",
        "--log-file",
        str(tmp_path / file),
    )


@pytest.mark.parametrize("port", ["65536", "-1", "http", "", "\u0661"])
def test_a_port_that_is_no_number_is_wrong_usage(port: str) -> None:
    """A port is a number from 0 to 65535."""
    expect_failure(2, "error: argument --port: .*", f"--port={port}")


@pytest.mark.parametrize(
    "option",
    [
        "--max-clients=0",
        "--max-per-address=0",
        "--max-unnamed=x",
        "--name-deadline=0",
        "--name-deadline=nan",
        "--rate-limit=-1",
        "--rate-limit=inf",
        "--format=latin-1",
    ],
)
def test_a_limit_that_is_none_is_wrong_usage(option: str) -> None:
    """Each option says what it takes."""
    expect_failure(2, f"error: argument {option.partition('=')[0]}: .*", option)


def test_an_unknown_option_is_wrong_usage() -> None:
    """What is not an option is called so."""
    expect_failure(2, "error: unrecognized arguments: --shout", "--shout")
    expect_failure(2, "error: unrecognized arguments: 5555", "5555")


def test_help_shows_each_option_with_its_default() -> None:
    """`--help` is the manual of the limits."""
    result = run_briefly("--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    for option, default in (
        ("--host", "127.0.0.1"),
        ("--port", "55555"),
        ("--format", "ascii"),
        ("--max-clients", "1000"),
        ("--max-per-address", "50"),
        ("--max-unnamed", "64"),
        ("--name-deadline", "30.0"),
        ("--rate-limit", "5.0"),
    ):
        shown = text[text.index(f" {option} ", text.index("options:")) :]
        assert re.search(r"\(default: (\S+)\)", shown)[1] == default  # type: ignore[index]


def test_version_is_told() -> None:
    """`--version` is one line."""
    result = run_briefly("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"server.py {protocol.__version__}\n"


# --- The console and its file ------------------------------------------------


def test_the_log_file_gets_what_the_console_gets(tmp_path: Path) -> None:
    """With --log-file the same lines stand in both."""
    file = tmp_path / "chat.log"
    with run_server("--log-file", str(file)) as server:
        Peer(server.port).join("alice").send("/quit").rest()
        close_peers()
        assert server.stop() == 0
        assert file.read_text() == server.log()
        assert "alice" in server.log()


@contextlib.contextmanager
def console(*options: str) -> Iterator[tuple[IO[bytes], int, Peer]]:
    """Run a talkative server; give its console, a pipe, its port, and alice, who sees it end."""
    command = [sys.executable, str(SERVER), "-v", "--port", "0", *options]
    with no_leaks(), subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            port = int(process.stderr.readline().rpartition(b":")[2])
            alice = Peer(port).join("alice")
            yield process.stderr, port, alice
            process.terminate()
            alice.expect(protocol.SHUTTING_DOWN)
            alice.close()
            assert process.wait(STOP) == 0
        finally:
            process.kill()


def test_a_console_that_is_closed_ends_no_server() -> None:
    """A room whose console has nobody reading goes on, and still ends in order."""
    with console() as (log, _, alice):
        log.close()
        for number in range(10):
            alice.send(f"line {number}")
            alice.expect(f"alice: line {number}")


def test_a_console_that_nobody_reads_stops_nothing() -> None:
    """With a full pipe for a console, as behind a stopped pager, people talk, come and go."""
    with console("--rate-limit", "0") as (_, port, alice):
        texts = [f"{number} {'x' * 100}" for number in range(2000)]
        alice.send(*texts)
        alice.expect(*(f"alice: {text}" for text in texts))
        bob = Peer(port).join("bob")
        bob.send("/quit").rest()
        bob.close()
        alice.expect("* bob joined the chat", "* bob left the chat")


def test_the_server_listens_on_ipv6_too() -> None:
    """`--host ::1` takes people in who come that way."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    with (
        run_server("--host", "::1") as server,
        socket.create_connection(("::1", server.port), timeout=DEADLINE) as sock,
        sock.makefile() as lines,
    ):
        sock.sendall(b"alice\n")
        assert next(lines) == "NICK\n"
        assert next(lines).startswith("-> Welcome, alice!")


def test_it_is_started_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server finds its modules whatever the current folder is."""
    monkeypatch.chdir(tmp_path)
    assert SERVER.is_absolute()
    assert run_briefly("--version").returncode == 0
