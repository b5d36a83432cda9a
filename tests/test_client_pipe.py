"""The client in a pipe: what a shell sees of it, its receipts and its exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, Server, is_away, no_leaks, run_chat, run_server, wait_until
from clients import (
    CLIENT,
    HOST,
    ROOT,
    Talk,
    environment,
    greet,
    pretended,
    read_to_end,
    say,
    start,
)

import client
import protocol
from client import ChatClient

MANY = 100_000  # lines
MEMORY = 40_000  # KiB that a client may take for them; one that keeps all takes far more


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


def one_line(text: str) -> str:
    """Return a message, which is one line of the program's own."""
    assert re.fullmatch(r"client\.py: [^\n]+\n", text), text
    return text


# --- What goes in ------------------------------------------------------------


def test_says_and_leaves() -> None:
    """A name and a line in: it joins, says the line, shows it as the room does, and leaves."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        done = say("alice\nhello\n", port=server.port)
        assert (done.returncode, done.stderr) == (0, "")
        bob.expect("* alice joined the chat", "alice: hello", "* alice left the chat")
        assert done.stdout.splitlines()[-3:] == [
            "* alice joined the chat",
            "alice: hello",
            "-> bye",
        ]


def test_old_lines_are_no_receipts() -> None:
    """The same words again, under the same name, are said again and waited for again."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        for _ in range(2):
            assert say("alice\nhello\nhello\n", port=server.port).returncode == 0
            bob.expect("* alice joined the chat", "alice: hello", "alice: hello")
            bob.expect("* alice left the chat")


def test_waits_for_its_receipts() -> None:
    """At the end of input it stays until the room has broadcast what it said."""
    seen = threading.Event()

    def hold_back(sock: socket.socket) -> None:
        greet(sock)
        sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while b"/quit" not in sock.recv(4096):
                pass
            return  # it did not wait
        seen.set()
        sock.settimeout(DEADLINE)
        sock.sendall(b"alice: hello\n")
        read_to_end(sock)
        sock.sendall(b"-> bye\n")

    with pretended(hold_back) as port:
        done = say("hello\n", "--name", "alice", port=port)
    assert seen.is_set()
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (0, ["alice: hello", "-> bye"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\r\ntwo\r\n", ["build: one", "build: two"]),
        ("one\ntwo", ["build: one", "build: two"]),
        ("one\n\n  \ntwo\n", ["build: one", "build: two"]),
        ("/bin/sh: x\n//x\n/\n/ x\n", ["build: /bin/sh: x", "build: /x", "build: /", "build: / x"]),
        ("/me builds\n", ["** build builds"]),
        ("exit\nquit\n:q\n", ["build: exit", "build: quit", "build: :q"]),
        ("build: x\nbob: y\n", ["build: build: x", "build: bob: y"]),
        (" indented\ta tab \n", ["build:  indented a tab "]),
        ("x" * 997 + "\n", ["build: " + "x" * 997]),
        ("one\n/quit\n", ["build: one"]),
        ("one\n/QUIT\n\n", ["build: one"]),
        ("/names\n/nick built\none\n", ["* build is now built", "built: one"]),
        ("", []),
    ],
)
def test_what_is_said(text: str, said: list[str]) -> None:
    """Each line of the input is said as it stands; the commands of the chat are commands."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        done = say(text, "--name", "build", port=server.port)
        assert (done.returncode, done.stderr) == (0, "")
        heard = [bob.next_line() for _ in range(len(said) + 2)]
        left = f"* {'built' if 'built' in text else 'build'} left the chat"
        assert heard == ["* build joined the chat", *said, left]


def test_unicode_in_a_room_that_has_it() -> None:
    """A room of another format carries what that format can, letter for letter."""
    with run_chat(fmt="utf-8") as server:
        bob = Peer(server.port).join("bob")
        done = say("grüße, 世界 👩‍👧\n", "--name", "a", "--format", "utf-8", port=server.port)
        assert done.returncode == 0
        bob.expect("* a joined the chat", "a: grüße, 世界 👩‍👧")
        assert "a: grüße, 世界 👩‍👧" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"gr\xfc\xdfe", "ASCII"),
        (b"a\x1b[31mred", "ASCII"),
        (b"nul\0", "ASCII"),
        (b"x" * 998, "at most 997 bytes"),
        (b"y" * 300_000, "at most 997 bytes"),
    ],
)
def test_line_that_cannot_be_carried(bad: bytes, reason: str) -> None:
    """A line that no room can carry is told on standard error; all others are said."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        done = say(b"before\n" + bad + b"\nafter\n", "--name", "alice", port=server.port)
        assert done.returncode == 1
        assert reason in one_line(done.stderr)
        bob.expect("* alice joined the chat", "alice: before", "alice: after")
        bob.expect("* alice left the chat")


def test_refused_command_is_a_failure() -> None:
    """A private line that reaches nobody is no success."""
    with run_chat() as server:
        done = say("alice\n/msg nobody psst\n", port=server.port)
        assert "-> not sent: nobody here is called nobody" in done.stdout
        assert done.returncode == 1


def test_listen_stays() -> None:
    """With --listen it shows the room after the end of its input, until it is told to leave."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with start(server.port, "--name", "ear", "--listen") as process:
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"here\n")
            process.stdin.close()
            bob.expect("* ear joined the chat", "ear: here")
            bob.send("still there?")
            for line in process.stdout:
                if line == b"bob: still there?\n":
                    break
            process.terminate()
            assert process.wait(DEADLINE) == 0
        bob.expect("bob: still there?", "* ear left the chat")


# --- What goes wrong ---------------------------------------------------------


def test_no_server() -> None:
    """Nobody listening is one line with the remedy, and status 1."""
    with socket.socket() as unheard:
        unheard.bind((HOST, 0))
        port = unheard.getsockname()[1]
        done = say("alice\nhello\n", port=port)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no server on 127.0.0.1 port {port}; start one" in one_line(done.stderr)


def test_nothing_stays_open() -> None:
    """Whatever keeps it from coming in, it has closed what it opened before it ends."""
    command = [sys.executable, "-W", "error", *CLIENT[1:], "--port", "1", "--name", "alice"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    one_line(done.stderr)


def test_unknown_host() -> None:
    """A host that there is not is one line with the remedy, and status 1."""
    done = say("alice\nhello\n", "--host", "no such host", port=1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown host no such host; check --host" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bob", "the name bob is taken; choose another"),
        ("BOB", "the name BOB is taken; choose another"),
        ("server", 'the name "server" is reserved'),
        ("9lives", "begins with a letter"),
        ("two words", "a name is one word"),
        ("x" * 25, "at most 24 letters"),
        ("", "a name cannot be empty"),
    ],
)
def test_name_that_cannot_be_had(name: str, reason: str) -> None:
    """A name that cannot be had is one line with the reason, and status 1."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        done = say(f"{name}\nhello\n", port=server.port)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in one_line(done.stderr)
        bob.expect_nothing()


def test_no_name_at_all() -> None:
    """An empty input without --name is one line with the remedy, and status 1."""
    done = say("", port=1)
    assert done.returncode == 1
    assert "--name" in one_line(done.stderr)


def test_full_room() -> None:
    """A room that is full is one line with the reason, and status 1."""
    with run_chat(max_clients=1) as server:
        Peer(server.port).join("bob")
        done = say("alice\nhello\n", port=server.port)
        assert done.returncode == 1
        assert "the room is full" in one_line(done.stderr)


@pytest.mark.parametrize("port", ["x", "-1", "65536", "1.5", "\u0661", ""])
def test_wrong_port(port: str) -> None:
    """What is no port number is wrong usage, status 2."""
    done = say("", "--port", port, port=1)
    assert done.returncode == 2
    assert "is not a port number; use 0 to 65535" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--tls-ca", "--password-file"])
def test_empty_name_of_a_file(option: str) -> None:
    """Nobody talks in the clear because a variable that was to name a file is empty."""
    with run_chat() as server:
        done = say("hello\n", "--name", "alice", f"{option}=", port=server.port)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith(f"{option}: no file is named; name one, or leave it out\n")


def test_link_local_address_without_its_interface() -> None:
    """What such an address lacks is told with an example of it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.connect(("fe80::1", 1))
    except OSError as error:
        if error.errno != errno.EINVAL:
            pytest.skip(f"this machine says {error}")
    done = say("hello\n", "--name", "alice", "--host", "fe80::1", port=1)
    assert done.returncode == 1
    assert "say the interface of a link-local one, as in fe80::1%eth0" in one_line(done.stderr)


def test_help_and_version() -> None:
    """--help and --version answer on standard output without a server."""
    shown = say("", "--help", port=1)
    assert shown.returncode == 0
    options = ("--name", "--host", "--port", "--format", "--listen", "--no-color", "--no-bell")
    assert all(option in shown.stdout for option in options)
    shown = say("", "--version", port=1)
    assert shown.stdout == f"client.py {protocol.__version__}\n"


# --- Signals and readers that go ----------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal(number: int) -> None:
    """A signal makes it leave the room in good order, with status 0 and no traceback."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with start(server.port, "--name", "alice") as process:
            bob.expect("* alice joined the chat")
            process.send_signal(number)
            assert process.wait(DEADLINE) == 0
            assert process.stderr
            assert process.stderr.read() == b""
        bob.expect("* alice left the chat")


SIGNALLED = """
import signal, sys
sys.path.insert(0, {folder!r})
import client
def start(chat, start=client.ChatClient.start):
    if {behind}: start(chat)
    signal.raise_signal(signal.SIGTERM)
client.ChatClient.start = start
sys.exit(client.main())
"""


@pytest.mark.parametrize("behind", [False, True])
def test_signal_just_after_joining(behind: bool) -> None:
    """A signal before or behind the start of the thread that hears leaves no ghost in the room."""
    code = SIGNALLED.format(folder=str(ROOT), behind=behind)
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        command = [sys.executable, "-c", code, "--port", str(server.port), "--name", "alice"]
        done = subprocess.run(
            command, stdin=subprocess.PIPE, capture_output=True, env=environment(), timeout=DEADLINE
        )
        assert (done.returncode, done.stderr) == (0, b"")
        bob.expect("* alice joined the chat")
        room = server.broadcaster
        wait_until(lambda: is_away(server, "alice") or not room.room.by_name("alice"))
        assert not is_away(server, "alice")
        bob.expect("* alice left the chat")


def test_signal_before_anybody_answers() -> None:
    """A signal ends it also while it still waits for the server, without a traceback."""
    connected = threading.Event()

    def say_nothing(sock: socket.socket) -> None:
        connected.set()
        sock.recv(1)

    with pretended(say_nothing) as port, start(port, "--name", "alice") as process:
        assert connected.wait(DEADLINE)
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert process.stderr
        assert process.stderr.read() == b""


@pytest.mark.parametrize("listen", [[], ["--listen"]], ids=["", "listen"])
@pytest.mark.parametrize("shared", [False, True], ids=["output", "output and errors"])
def test_reader_that_goes_away(shared: bool, listen: list[str]) -> None:
    """When nobody reads what it shows, as behind `head`, it says the rest and leaves."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        reading, writing = os.pipe()
        errors = writing if shared else subprocess.PIPE
        process = start(server.port, "--name", "alice", *listen, stdout=writing, stderr=errors)
        with process:
            assert process.stdin
            os.close(writing)
            bob.expect("* alice joined the chat")
            wait_until(lambda: os.read(reading, 4096))
            os.close(reading)
            bob.send("anybody?")
            bob.expect("bob: anybody?")
            process.stdin.write(b"one\ntwo\n")
            process.stdin.flush()
            bob.expect("alice: one", "alice: two")
            process.stdin.write(b"three\n")
            process.stdin.close()
            assert process.wait(DEADLINE) == 0
            assert not process.stderr or process.stderr.read() == b""
        bob.expect("alice: three", "* alice left the chat")


def test_listener_whose_reader_goes_away() -> None:
    """With --listen and nothing more to say, it leaves when nobody reads what it shows."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        reading, writing = os.pipe()
        with start(server.port, "--name", "ear", "--listen", stdout=writing) as process:
            os.close(writing)
            assert process.stdin
            process.stdin.close()
            bob.expect("* ear joined the chat")
            bob.send("hello")
            bob.expect("bob: hello")
            with os.fdopen(reading, "rb") as shown:  # to its last line: it writes no more by itself
                assert b"bob: hello\n" in iter(shown.readline, b"")
            bob.send("anybody?")
            assert process.wait(DEADLINE) == 0
        bob.expect("bob: anybody?", "* ear left the chat")


@pytest.mark.parametrize("options", [(), ("--listen",)])
def test_output_that_cannot_be_written(options: tuple[str, ...]) -> None:
    """A full disk behind it is a failure, and all lines are said all the same."""
    with run_chat() as server, open("/dev/full", "wb") as full:
        bob = Peer(server.port).join("bob")
        command = [*CLIENT, "--port", str(server.port), "--name", "x", *options]
        done = subprocess.run(
            command,
            input=b"a\nb\nc\n",
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=DEADLINE,
        )
        assert done.returncode == 1
        assert "cannot write to standard output: No space" in one_line(done.stderr.decode())
        bob.expect("* x joined the chat", "x: a", "x: b", "x: c", "* x left the chat")


def test_all_is_said_when_the_reader_goes() -> None:
    """Two thousand lines into `head -1` are all said."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        reading, writing = os.pipe()
        with start(server.port, "--name", "x", stdout=writing) as process:
            os.close(writing)
            assert process.stdin
            bob.expect("* x joined the chat")
            os.close(reading)
            process.stdin.write(b"".join(b"%d\n" % number for number in range(2000)))
            process.stdin.close()
            bob.expect(*(f"x: {number}" for number in range(2000)))
            assert process.wait(DEADLINE) == 0


def test_lines_behind_quit_are_a_failure() -> None:
    """What stands behind /quit is not said, and the status tells."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        done = say("one\n/quit\ntwo\n", "--name", "x", port=server.port)
        assert done.returncode == 1
        assert "behind /quit" in one_line(done.stderr)
        bob.expect("* x joined the chat", "x: one", "* x left the chat")


def test_quit_in_input_that_goes_on() -> None:
    """A /quit leaves at once, also when the end of the input does not come."""
    with run_chat() as server, start(server.port, "--name", "x") as process:
        assert process.stdin
        process.stdin.write(b"/quit\n")
        process.stdin.flush()
        assert process.wait(DEADLINE) == 0


def test_verbatim() -> None:
    """With --verbatim no line is a command."""
    text = ["/quit", "/help", "//x", "/nick rob", "/", "plain", "/op secret"]
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        done = say("\n".join(text), "--name", "x", "--verbatim", port=server.port)
        assert (done.returncode, done.stderr) == (0, "")
        bob.expect("* x joined the chat", *(f"x: {line}" for line in text), "* x left the chat")


def test_errors_closed() -> None:
    """With standard error closed, what the client itself has to say is not in its output."""
    with run_chat() as server:
        command = " ".join([*CLIENT, "--port", str(server.port), "--name", "x", "2>&-"])
        done = subprocess.run(
            ["sh", "-c", command],
            input="grün\nfine\n".encode(),
            capture_output=True,
            env=environment(),
            timeout=DEADLINE,
        )
        assert done.returncode == 1
        assert b"client.py" not in done.stdout
        assert b"x: fine\n" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_input_or_output_closed(closed: str) -> None:
    """Without one of the two there is nothing to be done, and one line says so."""
    command = " ".join([*CLIENT, "--port", "1", "--name", "x", closed])
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, env=environment(), timeout=DEADLINE, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "client.py: standard input or output is closed; leave both open\n"


def test_slow_reader_of_the_output() -> None:
    """A full pipe behind it holds back nobody, and everything is there when it is read."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with start(server.port, "--name", "slow", "--listen") as process:
            assert process.stdout
            bob.expect("* slow joined the chat")
            lines = [f"bob: {number} {'x' * 900}" for number in range(2000)]
            bob.send(*(line.removeprefix("bob: ") for line in lines))
            bob.expect(*lines)
            bob.send("end")
            shown: list[str] = []
            while not shown or shown[-1] != "bob: end":
                shown.append(process.stdout.readline().decode().removesuffix("\n"))
            process.terminate()
            assert process.wait(DEADLINE) == 0
        assert [line for line in shown if line.startswith("bob: ")] == [*lines, "bob: end"]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to see memory in")
def test_many_lines_in_little_memory(tmp_path: Path) -> None:
    """100,000 lines are said, each once and in order, by a client that keeps few of them."""
    text, shown = tmp_path / "input", tmp_path / "output"
    text.write_text("".join(f"{number} {'x' * 100}\n" for number in range(MANY)))
    with (
        run_server("--rate-limit", "0") as server,
        text.open() as source,
        shown.open("w") as output,
    ):
        ear = Peer(server.port).join("ear")
        options = ("--name", "alice", "--listen")
        with start(server.port, *options, stdin=source.fileno(), stdout=output.fileno()) as process:
            heard = ear.lines_until(f"alice: {MANY - 1} {'x' * 100}")
            wait_until(lambda: f"alice: {MANY - 1} " in last_bytes(shown))
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            process.terminate()
            assert process.wait(DEADLINE) == 0
    assert [line.split(" ", 2)[1] for line in heard[1:]] == [str(n) for n in range(MANY)]
    assert [line for line in shown.read_text().splitlines() if line[0] == "a"] == heard[1:]
    assert peak
    assert int(peak[1]) < MEMORY


def last_bytes(file: Path) -> str:
    """Return the end of a file that is being written."""
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 1000))
        return lines.read().decode()


HASTY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import client
client.RETRY_FIRST = client.RETRY_MAX = 0.05
sys.exit(client.main())
"""


def test_server_that_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines go on being piped in while the server is replaced; those after it are said."""
    monkeypatch.setattr("clients.CLIENT", [sys.executable, "-c", HASTY])
    with contextlib.ExitStack() as stack:
        first = Server()
        stack.callback(first.end)
        port = int(first.expect_log(r"listening on \S+:(\d+)\n")[1])
        bob = Peer(port).join("bob")
        process = stack.enter_context(start(port, "--name", "alice"))
        assert process.stdin
        assert process.stderr
        process.stdin.write(b"before\n")
        process.stdin.flush()
        bob.expect("* alice joined the chat", "alice: before")
        bob.close()
        assert first.stop() == 0
        for line in process.stderr:
            if b"connection lost; trying again" in line:
                break
        process.stdin.write(b"after\n")
        process.stdin.close()
        second = Server("--port", str(port))
        stack.callback(second.end)
        second.expect_log("listening on")
        bob = Peer(port).introduce("bob")
        bob.expect_eventually("alice: after")
        bob.expect_eventually("* alice left the chat")
        assert process.wait(DEADLINE) == 0


# --- Servers that mean no good ------------------------------------------------


def sends(data: bytes) -> Talk:
    """Pretend to be a server that sends bytes and then only reads."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.recv(4096)

    return talk


@pytest.mark.parametrize(
    "greeting",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"220 mail.example ESMTP\r\n",
        b"* OK IMAP4 ready\r\n",
        b"\x15\x03\x01\0\x02\x02\x16\n",
        b"\xff\xfd\x18\xff\xfd\x20\n",
        b"\x1b]0;owned\x07\x1b[2J\n",
        b"x" * 5000 + b"\n",
    ],
)
def test_not_a_chat(greeting: bytes) -> None:
    """What does not speak like a chat is told in one line with the remedy, and status 1."""
    with pretended(sends(greeting)) as port:
        done = say("alice\nhello\n", port=port)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not this chat; check --host and --port" in one_line(done.stderr)


@pytest.mark.parametrize("data", [b"", b"NICK", b"NICK\n-> so", b"NICK\n"])
def test_server_that_hangs_up(data: bytes) -> None:
    """A server that closes before it lets anybody in is one line, and status 1."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(data)

    with pretended(talk) as port:
        done = say("alice\nhello\n", port=port)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot talk to 127.0.0.1" in one_line(done.stderr)


@pytest.mark.parametrize(
    "start_of_talk", [b"", b"NIC", b"NICK\n", b"-> wait\n", b"x" * 100_000], ids=len
)
def test_silent_server(start_of_talk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not go on talking is given up."""
    monkeypatch.setattr(client, "CONNECT_TIMEOUT", 0.1)

    def talk(sock: socket.socket) -> None:
        sock.sendall(start_of_talk)
        while sock.recv(4096):
            pass

    given_up = pytest.raises((TimeoutError, ConnectionError))
    with pretended(talk) as port, given_up, ChatClient("alice", port=port):
        pass


def test_endless_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that talks for ever without letting anybody in is given up too."""
    monkeypatch.setattr(client, "CONNECT_TIMEOUT", 0.1)
    ended = threading.Event()

    def talk(sock: socket.socket) -> None:
        while not ended.is_set():
            sock.sendall(b"-> one moment\n" * 100)

    with pretended(talk) as port:
        chat = ChatClient("alice", port=port)
        outcome: list[BaseException] = []

        def connect() -> None:
            try:
                with chat:
                    pass
            except OSError as error:
                outcome.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join(2.0)
        ended.set()
        endless = thread.is_alive()
        thread.join()
    assert not endless
    assert isinstance(outcome[0], TimeoutError)


def test_hostile_lines_are_escaped() -> None:
    """Control characters that a server sends come out as text that does nothing."""

    def talk(sock: socket.socket) -> None:
        greet(
            sock,
            b"mallory: \x1b[2J\x1b]0;owned\x07 \x9b31m\n",
            b"* \x1b[8mhidden\x00\r\r\n",
            b"-> \xff\xfe\n",
            b"[from mallory] \x08\x08\n",
            b"mallory: " + b"y" * 5000 + b"\n",
            b"\x1b[31m\n",
            b"mallory: end\n",
        )
        read_to_end(sock)

    with pretended(talk) as port:
        done = say("alice\n", port=port)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(line.isprintable() and line.isascii() for line in done.stdout.split("\n"))
    assert r"mallory: \x1b[2J\x1b]0;owned\x07 \x9b31m" in done.stdout
    assert max(map(len, done.stdout.split("\n"))) < 1200


def test_unsafe_unicode_is_escaped() -> None:
    """In a wider format too: overrides of direction and C1 controls come out as text."""

    def talk(sock: socket.socket) -> None:
        greet(sock, "mallory: a\u202eb\u2066c\x9bd\u2028e\n".encode())
        read_to_end(sock)

    with pretended(talk) as port:
        done = say("alice\n", "--format", "utf-8", port=port)
    assert r"mallory: a\u202eb\u2066c\x9bd\u2028e" in done.stdout


def test_no_escape_sequences_in_a_pipe() -> None:
    """Output that is no terminal gets no colour, no bell and no prompt."""
    with run_chat() as server:
        Peer(server.port).join("bob").send("alice, hello", "/me waves at alice")
        done = say("alice\n/msg alice psst\nhello\n", "--timestamps", port=server.port)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout
        assert "\a" not in done.stdout
        assert re.search(r"^bob: alice, hello$", done.stdout, re.MULTILINE)
        assert re.search(r"^\d\d:\d\d alice: hello$", done.stdout, re.MULTILINE)


# --- From Python -------------------------------------------------------------


def test_bot() -> None:
    """A bot in ten lines answers those who ask, and leaves with the last line that it said."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with ChatClient("clock", port=server.port) as chat:
            bob.expect("* clock joined the chat")
            bob.send("!time", "!stop")
            for line in chat:
                if line.text == "!time":
                    chat.send("late")
                if line.text == "!stop":
                    break
        bob.expect("bob: !time", "bob: !stop", "clock: late", "* clock left the chat")


def test_bot_that_only_speaks() -> None:
    """A program that never listens may say as much as it likes."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with ChatClient("meter", port=server.port) as chat:
            for number in range(client.MAX_WAITING + 5000):
                chat.send(str(number))
        bob.expect("* meter joined the chat")
        bob.expect(*(f"meter: {number}" for number in range(client.MAX_WAITING + 5000)))


def test_bot_that_stops_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that listened for a while can still speak and leave."""
    monkeypatch.setattr(client, "MAX_WAITING", 10)
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        chat = ChatClient("bot", port=server.port)
        ended = threading.Event()

        def talk() -> None:
            with chat:
                for line in chat:
                    if line.text == "go":
                        break
                for number in range(30):
                    chat.send(str(number))
            ended.set()

        thread = threading.Thread(target=talk)
        thread.start()
        bob.expect("* bot joined the chat")
        bob.send("go")
        in_time = ended.wait(3.0)
        if not in_time:  # let go of it, come what may
            monkeypatch.setattr(client, "MAX_WAITING", 1000)
            chat.outgoing.end()
            chat._inbox.end()
        thread.join()
        assert in_time
        bob.expect("bob: go", *(f"bot: {number}" for number in range(30)))


def test_bot_is_refused() -> None:
    """What the room cannot carry, or let in, is an exception with the reason."""
    with run_chat() as server:
        Peer(server.port).join("bob")
        with pytest.raises(client.NameRefused, match="taken"), ChatClient("bob", port=server.port):
            pass
        with pytest.raises(protocol.Refusal, match="begins with a letter"):
            ChatClient("9")
        with ChatClient("alice", port=server.port) as chat:
            with pytest.raises(protocol.Refusal, match="ASCII"):
                chat.send("grüße")
            with pytest.raises(protocol.Refusal, match="at most"):
                chat.send("x" * 1000)
            with pytest.raises(protocol.Refusal):
                chat.send("two\nlines")


def test_bot_that_fails() -> None:
    """An exception in a program leaves the room at once and comes out as it was."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with pytest.raises(ZeroDivisionError), ChatClient("bot", port=server.port):
            raise ZeroDivisionError
        bob.expect("* bot joined the chat", "* bot left the chat")
