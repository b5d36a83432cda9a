"""The server as people start it: a process with a console, options, signals and an end."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
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
    wait_until,
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
        assert "refused" not in log


def test_the_console_shows_refusals() -> None:
    """Who was not let in, and why, stands on the console, and in the end how many."""
    with run_server("--max-clients", "1", "--name-deadline", "1") as server:
        Peer(server.port).join("alice")
        Peer(server.port).send("bob")
        server.expect_log(r"unnamed \(127\.0\.0\.1:\d+\) left: the room is full\n")
        Peer(server.port).send_raw(b"GET / HTTP/1.1\r\n\r\n")
        server.expect_log(r"unnamed \(127\.0\.0\.1:\d+\) left: speaks HTTP\n")
        Peer(server.port)
        server.expect_log(r"unnamed \(127\.0\.0\.1:\d+\) left: no name in time\n")
        expect_refused(server, the_room_is_full=1, speaks_HTTP=1, no_name_in_time=1)


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


@pytest.mark.parametrize(
    "option",
    [
        "--password-file",
        "--op-password-file",
        "--tls-cert",
        "--tls-key",
        "--history",
        "--log-file",
    ],
)
def test_an_empty_name_of_a_file_is_wrong_usage(option: str) -> None:
    """A variable that is empty in a script takes no password, no TLS and no history away."""
    expect_failure(
        2, f"error: argument {option}: no file is named; name one, or leave it out", f"{option}="
    )


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
        ("--name-deadline", "30"),
        ("--rate-limit", "5"),
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


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (
            "",
            "1000 in the room, 50 from one address but loopback, 64 without a name,"
            " 30 s to give one, 5 lines a second",
        ),
        (
            "--max-clients=9 --max-per-address=3 --max-unnamed=7"
            " --name-deadline=2.5 --rate-limit=1",
            "9 in the room, 3 from one address but loopback, 7 without a name,"
            " 2.5 s to give one, 1 line a second",
        ),
        (
            "--rate-limit=0",
            "1000 in the room, 50 from one address but loopback, 64 without a name,"
            " 30 s to give one, no limit of lines",
        ),
    ],
)
def test_the_limits_in_force_are_told(options: str, limits: str) -> None:
    """The log says at the start, in one line, what one client, one address and all may take."""
    with run_server(*options.split()) as server:
        server.expect_log(f"INFO limits: {re.escape(limits)}\n")
        assert server.stop() == 0
        assert server.log().count("limits:") == 1


# --- What was refused --------------------------------------------------------


def refused(server: Server) -> list[dict[str, int]]:
    """Return what each summary in the log says, by reason."""
    told = re.findall(r"INFO refused in the last minute: (.*)\n", server.log())
    counts = [re.findall(r"([^,(]+) \((\d+)\)(?:, |$)", summary) for summary in told]
    assert len(told) == server.log().count("refused in")
    return [{reason: int(count) for reason, count in summary} for summary in counts]


def test_what_was_refused_is_summed_up_while_it_is_refused() -> None:
    """Now and then one line counts who was refused since the last; without any there is none."""
    with run_server("--max-clients", "1", SUMMARY=0.1) as server:
        Peer(server.port).join("alice")
        Peer(server.port).introduce("bob").expect(protocol.ROOM_FULL)
        server.expect_log(r"refused in the last minute: the room is full \(1\)\n")
        for _ in range(2):
            Peer(server.port).send_raw(b"GET / HTTP/1.1\r\n\r\n")
        server.expect_log(r"(?s)(speaks HTTP \(1\)\n.*){2}|speaks HTTP \(2\)\n")
        close_peers()
        assert server.stop() == 0
        first, *others = refused(server)
        assert first == {"the room is full": 1}
        assert others in ([{"speaks HTTP": 2}], [{"speaks HTTP": 1}] * 2)


def test_what_was_refused_is_told_before_the_end() -> None:
    """A server that ends tells before what it has not told yet, the most frequent first."""
    with run_server("--max-clients", "1") as server:
        Peer(server.port).join("alice")
        Peer(server.port).send_raw(b"GET / HTTP/1.1\r\n\r\n").rest()
        for _ in range(3):
            Peer(server.port).introduce("bob").expect(protocol.ROOM_FULL)
        silent = Peer(server.port)
        silent.expect("NICK")
        server.ask_to_end()
        silent.expect(protocol.SHUTTING_DOWN)  # the end refuses nobody
        close_peers()
        assert server.wait() == 0
        assert re.search(
            r"INFO refused in the last minute: the room is full \(3\), speaks HTTP \(1\)\n"
            r"(?s:.*)INFO stopped\n$",
            server.log(),
        )
        assert len(refused(server)) == 1


def test_a_hangup_tells_what_was_refused_and_begins_anew() -> None:
    """With SIGHUP a log that is rotated gets what was refused before."""
    with run_server("--max-clients", "1") as server:
        Peer(server.port).join("alice")
        for summary in range(1, 3):
            Peer(server.port).introduce("bob").expect(protocol.ROOM_FULL)
            server.ask_to_end(signal.SIGHUP)
            server.expect_log(rf"(?s)(the room is full \(1\)\n.*){{{summary}}}")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A server of three people with passwords, which sums up only when it ends."""
    options = []
    for option in "--password-file", "--op-password-file":
        file = tmp_path / option
        file.write_text(f"right {option}\n")
        options += [option, str(file)]
    options += ["--max-clients", "3", "--max-unnamed", "2"]
    with run_server(*options, SUMMARY=3600.0, WRONG_DELAY=0.001) as server:
        yield server


def let_in(server: Server, name: str) -> Peer:
    """Return somebody who has given a name and the right password."""
    peer = Peer(server.port).introduce(name)
    peer.expect("PASS")
    return peer.send("right --password-file")


def expect_refused(server: Server, **counts: int) -> None:
    """End a server and expect it to have told so many refusals, by reason."""
    close_peers()
    assert server.stop() == 0
    assert refused(server) == [{reason.replace("_", " "): n for reason, n in counts.items()}]


def test_refused_passwords_are_counted(guarded: Server) -> None:
    """Each wrong password counts, and each connection that gave no right one; operators' too."""
    for _ in range(2):
        guesser = Peer(guarded.port).introduce("guesser").send("1", "2", "3")
        assert guesser.rest()[-1] == protocol.NO_MORE_PASSWORDS
    alice = let_in(guarded, "alice")
    alice.expect_eventually("* alice joined the chat")
    alice.send("/op 1", "/op 2", "/op 3", "/op 4")
    alice.expect(*[protocol.WRONG_PASSWORD] * 3, protocol.NO_MORE_OP_TRIES)
    expect_refused(
        guarded,
        a_wrong_password=6,
        no_right_password=2,
        a_wrong_operator_password=3,
        too_many_operator_passwords=1,
    )


def test_refused_names_are_counted(guarded: Server) -> None:
    """Each name that was refused counts, each connection out of tries, and who is banned."""
    bob = let_in(guarded, "bob")
    bob.expect_eventually("* bob joined the chat")
    alice = let_in(guarded, "alice")
    alice.expect_eventually("* alice joined the chat")
    alice.send("/op right --op-password-file", "/ban bob")
    bob.rest()
    assert let_in(guarded, "bob").rest()[-1].startswith("-> you are banned by alice")
    nobody = let_in(guarded, "server").send("alice", "1")
    assert nobody.rest()[-1] == protocol.NO_MORE_TRIES
    expect_refused(guarded, banned=1, a_name_refused=3, no_name_that_it_can_have=1)


def test_who_speaks_something_else_is_counted(guarded: Server) -> None:
    """Other protocols and endless lines are counted, at the door and in the room."""
    for data in b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n", b"x" * 66_000:
        Peer(guarded.port).send_raw(data).rest()
    alice = let_in(guarded, "alice")
    alice.expect_eventually("* alice joined the chat")
    assert alice.send_raw(b"x" * 66_000).rest()[-1] == protocol.UNFRAMED
    guarded.expect_log(r"alice .* left: speaks no lines\n")
    expect_refused(guarded, speaks_HTTP=1, speaks_SSH=1, speaks_no_lines=2)


def test_who_is_turned_away_is_counted_once(guarded: Server) -> None:
    """One without a name too many is counted; who leaves without one, or quits, is not."""
    for name in "alice", "bob":
        let_in(guarded, name).send("/quit").rest()
    silent = [Peer(guarded.port) for _ in range(3)]
    assert silent[0].rest()[-1] == protocol.TOO_MANY_UNNAMED
    guarded.expect_log(r"left: too many connections without a name")
    silent[1].end_input().rest()
    guarded.expect_log(r"left: the input ended before a name\n")
    expect_refused(guarded, too_many_connections_without_a_name=1)


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


def test_an_error_stream_on_a_full_disk_ends_no_server(tmp_path: Path) -> None:
    """With standard error on a full disk the log file is written, and the status is 0."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    file = tmp_path / "chat.log"
    command = [sys.executable, str(SERVER), "--port", "0", "--log-file", str(file)]
    with (
        no_leaks(),
        open("/dev/full", "w") as full,
        subprocess.Popen(command, stderr=full) as process,
    ):
        try:
            wait_until(lambda: file.exists() and "listening on" in file.read_text(), "the log")
            process.terminate()
            assert process.wait(STOP) == 0
        finally:
            process.kill()
    assert file.read_text().endswith("INFO stopped\n")


def test_a_console_that_nobody_reads_keeps_nothing_from_the_log_file(tmp_path: Path) -> None:
    """Behind a terminal that is held, the log file goes on."""
    file = tmp_path / "chat.log"
    with console("--rate-limit", "0", "--log-file", str(file)) as (_, _, alice):
        texts = [f"{number} {'x' * 100}" for number in range(2000)]  # more than a pipe holds
        alice.send(*texts)
        alice.expect(*(f"alice: {text}" for text in texts))
        wait_until(lambda: f"alice: {texts[-1]}\n" in file.read_text(), "the last line")


def test_it_is_started_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server finds its modules whatever the current folder is."""
    monkeypatch.chdir(tmp_path)
    assert SERVER.is_absolute()
    assert run_briefly("--version").returncode == 0


# --- Few descriptors ---------------------------------------------------------


def allow(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the servers of a test started with a limit of open files that they cannot raise."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nulimit -n {count}\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


def test_few_descriptors_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 descriptors there is room for many, and a way in past those who say no name."""
    allow(64, tmp_path, monkeypatch)
    with run_server() as server:
        told = server.expect_log(r"room for (\d+) clients and (\d+) without a name only: 64 ")
        clients, unnamed = int(told[1]), int(told[2])
        assert clients >= 20
        assert unnamed >= 5
        silent = [Peer(server.port) for _ in range(unnamed - 1)]
        for peer in silent:
            peer.expect("NICK")
        crowd(server.port, clients)
        Peer(server.port).introduce("late").expect(protocol.ROOM_FULL)
        silent[0].send("late").expect(protocol.ROOM_FULL)
        assert "cannot accept" not in server.log()
        server.expect_log(f"limits: {clients} in the room, .*, {unnamed} without a name, ")


@pytest.mark.parametrize("count", [8, 16, 33])
def test_too_few_descriptors_are_told(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody could be let in, the server says so and does not start."""
    allow(count, tmp_path, monkeypatch)
    reason = rf"cannot start: {count} open files are allowed; .* ulimit -n"
    expect_failure(1, reason, "--port", "0")


# --- All addresses -----------------------------------------------------------


@pytest.fixture
def _ipv6() -> None:
    """Skip a test where there is no IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")


def expect_let_in(host: str, port: int, name: str) -> None:
    """Expect that somebody can join who comes to an address, and leave."""
    with socket.create_connection((host, port), timeout=DEADLINE) as sock, sock.makefile() as lines:
        sock.sendall(f"{name}\n/quit\n".encode())
        assert next(lines) == "NICK\n"
        assert next(lines).startswith(f"-> Welcome, {name}!")
        assert [*lines][-1] == "-> bye\n"


@pytest.mark.usefixtures("_ipv6")
def test_the_server_listens_on_ipv6_too() -> None:
    """`--host ::1` takes people in who come that way."""
    with run_server("--host", "::1") as server:
        expect_let_in("::1", server.port, "alice")


@pytest.mark.usefixtures("_ipv6")
def test_all_addresses_are_those_of_both_kinds() -> None:
    """`--host ::` takes in people over IPv6 and IPv4, and calls each by the own address."""
    with run_server("--host", "::") as server:
        for name, host in (("six", "::1"), ("four", "127.0.0.1")):
            expect_let_in(host, server.port, name)
            server.expect_log(rf"{name} \({re.escape(host)}:\d+\) joined\n")
        assert re.search(rf"listening on \[::\]:{server.port}\n", server.log())


def test_where_friends_can_reach_it_is_told() -> None:
    """Listening on all addresses, the server names those by which it can be reached."""
    with run_server("--host", "0.0.0.0") as server:
        found = server.expect_log(r"friends can reach it at (\S+), port (\d+)\n|WARNING")
        if found[1] is None:
            pytest.skip("this machine is on no network")
        assert int(found[2]) == server.port
        expect_let_in(found[1], server.port, "alice")


@pytest.mark.parametrize(
    ("host", "password", "lack"),
    [
        ("0.0.0.0", False, "without TLS and without a password"),
        ("0.0.0.0", True, "without TLS"),
        ("127.0.0.1", False, ""),
        ("localhost", False, ""),
    ],
)
def test_an_open_room_is_warned_of(tmp_path: Path, host: str, password: bool, lack: str) -> None:
    """A room that the network can enter or read along with says so, once; another does not."""
    file = tmp_path / "password"
    file.write_text("open sesame\n")
    options = ["--password-file", str(file)] if password else []
    with run_server("--host", host, *options) as server:
        assert server.stop() == 0
        warnings = re.findall(r"WARNING the room is open to the network (.*); see", server.log())
        assert warnings == ([lack] if lack else [])


def test_a_link_local_address_is_listened_on() -> None:
    """An address that is one only together with an interface is taken with it."""
    table = Path("/proc/net/if_inet6")
    rows = [row.split() for row in table.read_text().splitlines()] if table.exists() else []
    found = [f"{ipaddress.IPv6Address(int(row[0], 16))}%{row[5]}" for row in rows if row[3] == "20"]
    if not found:
        pytest.skip("this machine has no link-local address")
    with run_server("--host", found[0]) as server:
        expect_let_in(found[0], server.port, "alice")


def test_a_link_local_address_without_its_interface_is_told() -> None:
    """An address that is one only together with an interface is said to want it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("fe80::1", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            pytest.skip(f"this machine says {error}")
    expect_failure(1, "cannot listen on fe80::1 port 0: .*%eth0", "--port=0", "--host=fe80::1")


def test_help_is_in_groups_with_examples() -> None:
    """The help says where, who, what is kept and the limits with their defaults, then examples."""
    done = subprocess.run(
        [sys.executable, SERVER, "--help"], capture_output=True, text=True, check=True
    )
    groups = ["where:", "who may come in:", "history and log:", "limits:", "examples:"]
    assert [line for line in done.stdout.splitlines() if line in groups] == groups
    assert "in the room (default: 1000)" in done.stdout
    assert ":: is all, 0.0.0.0 all of IPv4" in " ".join(done.stdout.split())
    assert "      python server.py --host ::\n" in done.stdout
