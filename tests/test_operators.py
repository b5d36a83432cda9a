"""Passwords are asked for and never shown; operators keep the peace, and are told apart."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat import (
    DEADLINE,
    Peer,
    is_away,
    pair,
    run_briefly,
    run_chat,
    run_server,
    stopping,
    wait_until,
)
from clients import CLIENT, Shown, environment, pretended, read_line, say, start
from proxy import Proxy
from terminal import Terminal
from trust import ROOT, SLOW_TO_START, stored

import protocol
import server
from client import ChatClient
from server import ChatServer

SECRET = "correct-horse"
OPERATOR = "battery staple"  # with a blank in it
WRONG = "-> wrong password"
ENTER = "-> you are an operator; /kick, /ban, /unban and /bans are yours"
UP = "\x1b[A"
KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong password delays a test only as long as the test wants."""
    monkeypatch.setattr(server, "WRONG_DELAY", 0.01)
    for name in ("CHAT_PASSWORD", "CHAT_OP_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def room() -> Iterator[ChatServer]:
    """A room that can have operators."""
    with run_chat(op_password=OPERATOR) as chat_server:
        yield chat_server


@pytest.fixture
def locked() -> Iterator[ChatServer]:
    """A room that has a password."""
    with run_chat(password=SECRET) as chat_server:
        yield chat_server


def let_in(port: int, name: str) -> Peer:
    """Return somebody who has given a name and the room's password."""
    peer = Peer(port).introduce(name)
    peer.expect("PASS")
    return peer.send(SECRET)


def operator(room: ChatServer, name: str = "alice", source: str = "127.0.0.1") -> Peer:
    """Return somebody who may use the operators' commands."""
    peer = Peer(room.port, source=source).join(name)
    peer.send(f"/op {OPERATOR}")
    peer.expect_eventually(ENTER)
    return peer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give a function that lets so many seconds pass on the wall."""
    real, passed = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + passed[0])

    def let_pass(seconds: float) -> None:
        passed[0] += seconds

    return let_pass


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server take 127.0.0.0/8 for addresses somewhere else."""
    monkeypatch.setattr(server, "_is_loopback", lambda host: False)


# --- The room's password -----------------------------------------------------


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_right_password_lets_in(locked: ChatServer, wrong: int) -> None:
    """The room's password is asked for after the name; the third answer may still be right."""
    alice = Peer(locked.port).introduce("alice")
    for _ in range(wrong):
        alice.expect("PASS")
        alice.send("guess")
        alice.expect(WRONG)
    alice.expect("PASS")
    alice.send(SECRET)
    alice.expect_match("-> Welcome, alice! .*")
    alice.expect("* alice joined the chat")


def test_three_wrong_passwords_are_all(locked: ChatServer) -> None:
    """After the third wrong password the connection ends, and the room never heard of it."""
    mallory = Peer(locked.port).introduce("mallory")
    for guess in ("", SECRET + "x", SECRET.upper()):
        mallory.expect("PASS")
        mallory.send(guess)
        mallory.expect(WRONG) if guess != SECRET.upper() else None
    assert mallory.rest()[-1] == "-> wrong password; that was the third try"
    assert locked.history.last(10) == []


def test_name_is_looked_at_only_behind_the_password(locked: ChatServer) -> None:
    """Who does not know the password cannot find out who is here; who knows gives it once."""
    alice = let_in(locked.port, "alice")
    alice.expect_eventually("* alice joined the chat")
    other = let_in(locked.port, "Alice")
    other.expect("-> the name Alice is taken; choose another")
    other.introduce("bob")
    other.expect_match("-> Welcome, bob! .*")


def test_waiting_for_a_password_holds_no_name(locked: ChatServer) -> None:
    """A name that was given without the password is free for who has it."""
    squatter = Peer(locked.port).introduce("alice")
    squatter.expect("PASS")
    alice = let_in(locked.port, "alice")
    alice.expect_match("-> Welcome, alice! You are the first one here.*")


def test_one_deadline_for_name_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answering slowly, and wrongly, does not buy more time than the deadline."""
    monkeypatch.setattr(server, "WRONG_DELAY", 0.0)
    monkeypatch.setattr(server, "TRIES", 1_000_000)
    with run_chat(password=SECRET, name_deadline=0.5) as chat_server:
        slow = Peer(chat_server.port).introduce("slow")
        line, lines = slow.next_line(), 0
        while line in ("PASS", WRONG):
            lines += 1
            if line == "PASS":
                slow.send("guess")
            line = slow.next_line()
        assert line == "-> no name came in time; connect again"
        assert lines > 2


def test_wrong_password_is_answered_late_and_delays_nobody_else(
    locked: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who guesses waits for the answer; the others talk meanwhile, and the server can stop."""
    monkeypatch.setattr(server, "WRONG_DELAY", 3600.0)
    guesser = Peer(locked.port).introduce("guesser")
    guesser.expect("PASS")
    guesser.send("guess")
    alice = let_in(locked.port, "alice")
    alice.expect_eventually("* alice joined the chat")
    alice.send("hello")
    alice.expect("alice: hello")
    with stopping(locked):
        assert WRONG not in guesser.rest()


def secret_file(folder: Path, text: str | bytes = f"{SECRET}\n") -> str:
    """Write a password into a file."""
    file = folder / "password"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def test_client_takes_the_password_from_a_file(locked: ChatServer, tmp_path: Path) -> None:
    """A client in a pipe gives the password that is in its file."""
    options = ("--name", "alice", "--password-file", secret_file(tmp_path))
    done = say("hello\n", *options, port=locked.port)
    assert done.returncode == 0, done.stderr
    assert "alice: hello" in done.stdout.splitlines()


def run_client(port: int, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a client that says hello, with variables in its environment."""
    return subprocess.run(
        [*CLIENT, "--port", str(port), "--name", "alice", *options],
        input="hello\n",
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=SLOW_TO_START,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line with which a client failed."""
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("client.py: ")
    return lines[0]


def test_client_takes_the_password_from_its_environment(locked: ChatServer) -> None:
    """A client in a pipe gives the password that is in CHAT_PASSWORD."""
    done = run_client(locked.port, CHAT_PASSWORD=SECRET)
    assert done.returncode == 0, done.stderr
    assert "alice: hello" in done.stdout.splitlines()


def test_client_without_the_password_says_what_is_missing(
    locked: ChatServer, tmp_path: Path
) -> None:
    """A client in a pipe that has no password, a wrong one or an empty file ends in one line."""
    assert "--password-file" in one_line(run_client(locked.port))
    wrong = one_line(run_client(locked.port, CHAT_PASSWORD="guess"))
    assert "wrong password; see --password-file, or the variable CHAT_PASSWORD" in wrong
    assert "CHAT_PASSWORD is empty" in one_line(run_client(locked.port, CHAT_PASSWORD=""))
    empty = secret_file(tmp_path, "")
    line = one_line(run_client(locked.port, "--password-file", empty))
    assert empty in line
    missing = one_line(run_client(locked.port, "--password-file", "/nowhere/file"))
    assert "/nowhere/file" in missing
    assert locked.history.last(10) == []


@pytest.mark.parametrize("variable", [False, True])
def test_server_takes_the_passwords_from_files_or_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: bool
) -> None:
    """The room's and the operators' password are the first line of a file, or a variable."""
    options: list[str] = []
    if variable:
        monkeypatch.setenv("CHAT_PASSWORD", SECRET)
        monkeypatch.setenv("CHAT_OP_PASSWORD", OPERATOR)
    else:
        (tmp_path / "op").write_text(f"{OPERATOR}\r\nand not this line\n")
        options = ["--password-file", secret_file(tmp_path)]
        options += ["--op-password-file", str(tmp_path / "op")]
    with run_server(*options) as process:
        alice = let_in(process.port, "alice")
        alice.expect_eventually("* alice joined the chat")
        alice.send(f"/op {OPERATOR}")
        alice.expect(ENTER)


@pytest.mark.parametrize("option", ["--password-file", "--op-password-file"])
def test_server_names_a_password_file_that_it_cannot_use(tmp_path: Path, option: str) -> None:
    """A password file that is missing or empty stops the start in one line that names it."""
    for file in ("/nowhere/file", secret_file(tmp_path, "\n")):
        done = run_briefly("--port", "0", option, file)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert file in done.stderr


@pytest.mark.parametrize("variable", ["CHAT_PASSWORD", "CHAT_OP_PASSWORD"])
def test_server_refuses_an_empty_password(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A variable that was to have a password and is empty stops the start."""
    monkeypatch.setenv(variable, "")
    done = run_briefly("--port", "0")
    assert done.returncode == 1
    why = f"the variable {variable} is empty; put a password in it, or unset it"
    assert done.stderr == f"server.py: {why}\n"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such file")
def test_password_file_without_an_end_is_refused() -> None:
    """A first line that never ends is no password."""
    done = run_briefly("--port", "0", "--password-file", "/dev/zero")
    assert done.returncode == 1
    assert "/dev/zero has no password in its first line" in done.stderr


def test_password_file_in_another_encoding(tmp_path: Path) -> None:
    """A password of bytes that are no UTF-8 opens the room, or is refused in a line about it."""
    file = secret_file(tmp_path, b"caf\xe9\n")
    with contextlib.ExitStack() as stack:
        try:
            process = stack.enter_context(run_server("--password-file", file))
        except AssertionError as error:
            assert file in str(error)  # noqa: PT017 - what the server said is in it
            return
        alice = Peer(process.port).introduce("alice")
        alice.expect("PASS")
        alice.send_raw(b"caf\xe9\n")
        alice.expect_match("-> Welcome, alice! .*")


@pytest.mark.parametrize("fmt", ["ascii", "utf-8"])
def test_password_beyond_ascii_opens_the_room(tmp_path: Path, fmt: str) -> None:
    """A password is the same on both ends, whatever the format of the text."""
    file = secret_file(tmp_path, "pâté\n")
    with run_chat(password="pâté", fmt=fmt) as chat_server:
        done = run_client(chat_server.port, "--format", fmt, "--password-file", file)
        assert done.returncode == 0, done.stderr


# --- Never shown -------------------------------------------------------------


def test_passwords_are_never_written_down(tmp_path: Path) -> None:
    """No password, right or wrong, gets into the log, the history's file or the process list."""
    history, log = tmp_path / "room.db", tmp_path / "log"
    (tmp_path / "op").write_text(OPERATOR)
    with run_server(
        *("-v", "--history", str(history), "--log-file", str(log)),
        *("--password-file", secret_file(tmp_path), "--op-password-file", str(tmp_path / "op")),
        WRONG_DELAY=0.01,
    ) as process:
        alice = Peer(process.port).introduce("alice")
        for answer in ("wrong-guess", SECRET):
            alice.expect_eventually("PASS")
            alice.send(answer)
        alice.expect_eventually("* alice joined the chat")
        alice.send("said aloud", "/op wrong-guess", f"/op {OPERATOR}", f"alice: /OP  {OPERATOR}")
        alice.expect_eventually(ENTER)
        alice.expect_eventually(ENTER)
        commands = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.expect_log("said aloud")
    written = {"the log": process.log().encode(), "the log file": log.read_bytes()}
    written |= {"the process list": commands}
    for file in tmp_path.glob("room.db*"):
        written[file.name] = file.read_bytes()
    assert b"said aloud" in b"".join(written.values())
    for where, data in written.items():
        for word in (SECRET, OPERATOR, "wrong-guess"):
            assert word.encode() not in data, f"{word} is in {where}"


WITHOUT_TOOLKIT = """
import sys
sys.modules["prompt_toolkit"] = None
import client
sys.exit(client.main())
"""


@pytest.fixture(params=["readline", "toolkit"])
def opened(request: pytest.FixtureRequest) -> Callable[[int], Terminal]:
    """Open alice's client on a terminal, with prompt_toolkit or with readline."""
    if request.param == "toolkit" and not importlib.util.find_spec("prompt_toolkit"):
        pytest.skip("prompt_toolkit is not installed")
    bare = request.param == "readline"
    program = [sys.executable, *(("-c", WITHOUT_TOOLKIT) if bare else (CLIENT[-1],))]
    variables = environment(TERM="xterm-256color", INPUTRC=os.devnull, PYTHONPATH=str(ROOT))

    def open_one(port: int) -> Terminal:
        return Terminal([*program, "--port", str(port), "--name", "alice"], rows=30, env=variables)

    return open_one


@pytest.fixture
def terminal(room: ChatServer, opened: Callable[[int], Terminal]) -> Iterator[Terminal]:
    """A terminal on which alice is in a room that can have operators."""
    with opened(room.port) as terminal:
        terminal.wait_for("Welcome, alice!")
        yield terminal


def test_password_is_asked_for_without_showing_it(
    locked: ChatServer, opened: Callable[[int], Terminal]
) -> None:
    """On a terminal the room's password is asked for, again when it is wrong, and never shown."""
    with opened(locked.port) as terminal:
        terminal.wait_for("Password of the room: ")
        terminal.type("wrong-guess\r")
        terminal.wait_for("wrong password")
        terminal.wait_for(lambda screen: screen.text().count("Password of the room:") == 2)
        terminal.type(f"{SECRET}\r")
        terminal.wait_for("Welcome, alice!")
        terminal.type(f"hello{UP}{UP}\x15/quit\r")
        assert terminal.wait() == 0
        assert SECRET not in terminal.screen.text()
        assert "wrong-guess" not in terminal.screen.text()


def test_op_alone_asks_without_showing_it(terminal: Terminal) -> None:
    """/op alone on a terminal asks for the password, which is neither shown nor recalled."""
    terminal.type("first\r")
    terminal.wait_for("alice: first")
    terminal.type("/op\r")
    terminal.wait_for("Operator password: ")
    terminal.type(f"{OPERATOR}\r")
    terminal.wait_for("you are an operator")
    terminal.type(f"{UP}{UP}{UP}")
    terminal.wait_for("> first")
    terminal.type("\x15/quit\r")
    assert terminal.wait() == 0
    assert OPERATOR not in terminal.screen.text()


@pytest.mark.parametrize("command", ["/op", "/OP"])
def test_op_with_its_password_is_not_recalled(terminal: Terminal, command: str) -> None:
    """A password typed behind /op works, and the keys for recall never bring it back."""
    terminal.type("first\r")
    terminal.wait_for("alice: first")
    terminal.type(f"{command} {OPERATOR}\r")
    terminal.wait_for("you are an operator")
    terminal.type(UP)
    terminal.wait_for("alice> first")
    terminal.type("\x15second\r")
    terminal.wait_for("alice: second")
    terminal.type(f"{UP}{UP}")
    terminal.wait_for("alice> first")
    assert OPERATOR not in terminal.screen.text()


def test_operator_password_that_cannot_be_sent_is_not_shown(terminal: Terminal) -> None:
    """A password asked for by /op that the room's format cannot carry does not reach the screen."""
    terminal.type("/op\r")
    terminal.wait_for("Operator password: ")
    terminal.type("sécret\r")
    terminal.wait_for("not sent: ")
    terminal.settle()
    assert "cret" not in terminal.screen.text()


def test_op_while_away_is_not_told_aloud(room: ChatServer, terminal: Terminal) -> None:
    """The notice of what waits for the connection does not repeat a password."""
    room.stop()
    terminal.wait_for("connection lost")
    terminal.type(f"/op {OPERATOR}\r")
    terminal.wait_for("to be sent when we are back: /op ...")
    terminal.type("/quit\r")
    terminal.wait()
    assert f"{OPERATOR} --" not in terminal.screen.text()


def test_unanswered_op_is_told_without_its_password(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client in a pipe that leaves without an answer to /op does not print the password."""
    monkeypatch.setattr(server, "WRONG_DELAY", 3600.0)
    process = start(room.port, "--name", "alice")
    assert process.stdin
    process.stdin.write(b"hello\n/op wrong-guess\n")
    process.stdin.flush()
    wait_until(lambda: any(line == "alice: hello" for _, line in room.history.last(10)))
    room.stop()
    process.terminate()
    output, errors = process.communicate(timeout=DEADLINE)
    assert b"wrong-guess" not in output + errors


# --- Becoming an operator ----------------------------------------------------


def test_op_with_the_right_password(room: ChatServer) -> None:
    """The operators' password makes one; the others learn nothing of it."""
    bob = Peer(room.port).join("bob")
    alice = operator(room)
    alice.send("/bans", "over")
    alice.expect("-> nobody is banned", "alice: over")
    bob.expect("* alice joined the chat", "alice: over")


def test_operators_commands_are_for_operators(room: ChatServer) -> None:
    """Who is no operator is told how to become one, and nothing happens."""
    alice, bob = pair(room.port)
    for command in ("/kick bob", "/ban bob", "/unban bob", "/bans", "/kick", "/BAN bob 5 you"):
        alice.send(command)
        alice.expect("-> only operators can do that; /op PASSWORD makes you one")
    alice.send("over")
    bob.expect("alice: over")


def test_op_without_operators() -> None:
    """A room that was given no operators' password has no operators."""
    with run_chat() as chat_server:
        alice = Peer(chat_server.port).join("alice")
        alice.send("/op anything", "/op")
        alice.expect("-> this room has no operators")
        alice.expect_match("-> usage: /op PASSWORD, .*")


def test_three_wrong_operator_passwords_are_all(room: ChatServer) -> None:
    """After three wrong passwords the right one is not taken either, but the talk goes on."""
    alice = Peer(room.port).join("alice")
    for guess in ("guess", OPERATOR.upper(), OPERATOR + "x"):
        alice.send(f"/op {guess}")
        alice.expect(WRONG)
    alice.send(f"/op {OPERATOR}", "/bans", "hello")
    alice.expect_match("-> .*no more tries.*")
    alice.expect("-> only operators can do that; /op PASSWORD makes you one", "alice: hello")


def test_wrong_operator_password_delays_only_who_gave_it(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who guesses waits for the answer, and can do nothing meanwhile; the others talk."""
    monkeypatch.setattr(server, "WRONG_DELAY", 3600.0)
    alice, bob = pair(room.port)
    alice.send("/op guess", "/op another", "not yet")
    for number in range(10):
        bob.send(str(number))
        bob.expect(f"bob: {number}")
        alice.expect(f"bob: {number}")


def test_operator_stays_one_across_a_lost_connection(room: ChatServer) -> None:
    """Who takes a place back with the key is still an operator; who only takes the name is not."""
    key = "ab" * 16
    alice = Peer(room.port).introduce(f"alice -1 {key}")
    alice.expect_eventually("* alice joined the chat")
    alice.send(f"/op {OPERATOR}")
    alice.expect(ENTER)
    again = Peer(room.port).introduce(f"alice -1 {key}")
    again.expect("-> Welcome back, alice!")
    again.send("/bans", "/quit")
    again.expect_eventually("-> nobody is banned")
    again.expect("-> bye")
    again.rest()
    other = Peer(room.port).join("alice")
    other.send("/bans")
    other.expect_eventually("-> only operators can do that; /op PASSWORD makes you one")


@pytest.mark.parametrize("way", ["restart", "given up"])
def test_rights_end_with_the_place_and_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Who comes back to a new place is an operator again after /op, and told so when asking."""
    monkeypatch.setattr(server, "HELD", 0.0)
    options: dict[str, Any] = {"history": str(tmp_path / "room.db"), "op_password": OPERATOR}
    with contextlib.ExitStack() as stack:
        room = stack.enter_context(run_chat(**options))
        alice = Peer(room.port).introduce(f"alice -0 {KEY}")
        alice.expect_eventually("* alice joined the chat")
        alice.send(f"/op {OPERATOR}")
        alice.expect(ENTER)
        if way == "restart":
            stack.close()
            room = stack.enter_context(run_chat(**options))
        else:
            alice.vanish()
            wait_until(lambda: not room.names, "the place to be given up")
        alice = Peer(room.port).introduce(f"alice -0 {KEY}")
        alice.expect("-> Welcome, alice! You are the first one here; /help lists the commands")
        alice.expect_eventually("* alice joined the chat")
        for command in "/bans", "/kick bob", "/ban bob", "/unban bob":
            alice.send(command)
            alice.expect("-> only operators can do that; /op PASSWORD makes you one")
        alice.send(f"/op {OPERATOR}", "/bans")
        alice.expect(ENTER, "-> nobody is banned")


# --- Kicking -----------------------------------------------------------------


@pytest.mark.parametrize(("said", "shown"), [("", ""), (" enough of that", ": enough of that")])
def test_kick_shows_who_and_why(room: ChatServer, said: str, shown: str) -> None:
    """Who is kicked is told by whom and why, all see it, and nobody is said to have left."""
    carol = Peer(room.port).join("carol")
    alice, bob = operator(room), Peer(room.port).join("bob")
    alice.send(f"/kick BOB{said}")
    line = f"* bob was kicked by alice{shown}"
    assert bob.rest() == [f"-> you were kicked by alice{shown}", line]
    alice.expect("* bob joined the chat", line, "-> bob was put out")
    alice.send("/names", "over")
    alice.expect("-> 2 here: carol, alice", "alice: over")
    carol.expect("* alice joined the chat", "* bob joined the chat", line, "alice: over")


def test_kicked_may_come_again(room: ChatServer) -> None:
    """A kick is no ban: the name is free and its owner may come in again."""
    alice, bob = operator(room), Peer(room.port).join("bob")
    alice.send("/kick bob")
    bob.rest()
    Peer(room.port).join("bob").send("back")
    alice.expect_eventually("bob: back")


@pytest.mark.parametrize("command", ["kick", "ban"])
def test_who_is_away_can_be_put_out(room: ChatServer, command: str) -> None:
    """A kept place is taken away before everyone's eyes; its key opens nothing any more."""
    alice, carol = operator(room), Peer(room.port).join("carol")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    bob.expect_eventually("* bob joined the chat")
    bob.vanish()
    wait_until(lambda: is_away(room, "bob"), "bob's place to be kept")
    alice.expect("* carol joined the chat", "* bob joined the chat")
    alice.send(f"/{command} bob", "/names")
    carol.expect("* bob joined the chat")
    carol.expect_match(r"\* bob was kicked by alice(: banned for good)?")
    alice.expect_match(r"\* bob was kicked by alice(: banned for good)?")
    alice.expect_match("-> bob (was put out|may not come in .*)")
    alice.expect("-> 2 here: alice, carol")
    bob = Peer(room.port).introduce(f"bob -0 {KEY}")
    if command == "ban":
        assert bob.rest() == ["-> you are banned by alice for good"]
    else:
        bob.expect_match("-> Welcome, bob! .* alice, carol")
        carol.expect("* bob joined the chat")


def test_kick_of_nobody(room: ChatServer) -> None:
    """Kicking who is not here is answered, and no name at all is answered with the usage."""
    alice = operator(room)
    alice.send("/kick bob", "/kick")
    alice.expect("-> not sent: nobody here is called bob; /names lists who is here")
    alice.expect_match(r"-> usage: /kick NAME \[REASON\], .*")


def test_kicked_in_the_middle_of_talking(room: ChatServer) -> None:
    """Nothing that somebody kicked had yet to say is heard behind the kick."""
    alice, bob = operator(room), Peer(room.port).join("bob")
    alice.expect("* bob joined the chat")
    talking = threading.Thread(target=_talk_until_closed, args=[bob])
    talking.start()
    alice.expect_eventually("bob: on and on")
    alice.send("/kick bob")
    alice.expect_eventually("* bob was kicked by alice")
    talking.join()
    alice.expect("-> bob was put out")
    alice.expect_nothing()


def _talk_until_closed(peer: Peer) -> None:
    with contextlib.suppress(OSError):
        while True:
            peer.send("on and on")
            peer.sock.recv(65536)


def test_kicked_who_does_not_read_is_gone_at_once() -> None:
    """Somebody whose sockets are full can be kicked like anybody."""
    with run_chat(op_password=OPERATOR, shrunken=True) as chat_server:
        alice = operator(chat_server)
        Peer(chat_server.port, buffer=4096).join("bob")
        alice.expect("* bob joined the chat")
        for number in range(300):
            alice.send(f"{number} {'x' * 900}")
        alice.lines(300)
        alice.send("/kick bob", "/names")
        alice.expect("* bob was kicked by alice", "-> bob was put out", "-> 1 here: alice")


def test_operator_in_a_pipe_leaves_when_all_is_answered(room: ChatServer) -> None:
    """Each command of an operator has an answer, so that a pipe knows when it is done."""
    bob = Peer(room.port).join("bob")
    commands = f"/op {OPERATOR}\n/kick bob\n/ban bob 5\n/bans\n/unban bob\n".encode()
    process = start(room.port, "--name", "alice", stdin=subprocess.PIPE)
    output, errors = process.communicate(commands, timeout=DEADLINE)
    assert (process.returncode, errors) == (0, b"")
    assert output.endswith(b"-> bob may come in again\n-> bye\n")
    bob.rest()


# --- Bans --------------------------------------------------------------------


def turned_away(port: int, name: str, source: str = "127.0.0.1") -> str:
    """Try to come in under a name; return what the server says before it closes."""
    peer = Peer(port, source=source).introduce(name)
    lines = peer.rest()
    assert len(lines) == 1, lines
    return lines[0]


def test_ban_keeps_out_for_good(room: ChatServer) -> None:
    """Who is banned is put out, told by whom and why, and not let in again, in any case."""
    alice, bob = operator(room), Peer(room.port).join("bob")
    alice.expect("* bob joined the chat")
    alice.send("/ban Bob too loud")
    assert bob.rest() == [
        "-> you were kicked by alice: banned for good: too loud",
        "* bob was kicked by alice: banned for good: too loud",
    ]
    alice.expect("* bob was kicked by alice: banned for good: too loud")
    alice.expect_match(
        "-> [Bb]ob may not come in until the server ends, which keeps no history: too loud"
    )
    assert turned_away(room.port, "BOB") == "-> you are banned by alice for good: too loud"
    Peer(room.port).join("carol")


def test_ban_for_minutes_tells_until_when_and_ends(
    room: ChatServer, clock: Callable[[float], None]
) -> None:
    """A ban for minutes tells when it ends, and then it ends."""
    alice, bob = operator(room), Peer(room.port).join("bob")
    alice.send("/ban bob 10 cool down")
    bob.rest()
    until = time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(time.time() + 600))
    told = turned_away(room.port, "bob")
    assert re.fullmatch(
        r"-> you are banned by alice until \d{4}-\d\d-\d\d \d\d:\d\dZ: cool down", told
    )
    assert until[:15] <= told.partition("until ")[2][:16]
    clock(590)
    turned_away(room.port, "bob")
    clock(20)
    Peer(room.port).join("bob").send("calm")
    alice.expect_eventually("bob: calm")
    alice.send("/bans")
    alice.expect("-> nobody is banned")


def test_ban_of_who_is_not_here(room: ChatServer) -> None:
    """Who has left already can be banned by name."""
    alice = operator(room)
    alice.send("/ban bob", "/ban", "/ban 7up")
    alice.expect("-> bob may not come in until the server ends, which keeps no history")
    alice.expect_match(r"-> usage: /ban NAME \[MINUTES\] \[REASON\], .*")
    alice.expect_match("-> not sent: a name is one word .*")
    assert turned_away(room.port, "bob") == "-> you are banned by alice for good"


def test_banned_name_cannot_be_taken_inside(room: ChatServer) -> None:
    """/nick does not lead around a ban."""
    alice, carol = operator(room), Peer(room.port).join("carol")
    alice.send("/ban bob")
    alice.expect_eventually("-> bob may not come in until the server ends, which keeps no history")
    carol.send("/nick BOB", "still here")
    carol.expect_match("-> not sent: the name BOB is banned.*")
    carol.expect("carol: still here")


def test_ban_by_address(room: ChatServer, far_away: None) -> None:
    """Who is banned cannot come back under another name from the same address; others can."""
    alice = operator(room, source="127.0.0.2")
    bob = Peer(room.port, source="127.0.0.3").join("bob")
    alice.send("/ban bob 5")
    bob.rest()
    alice.expect_eventually("* bob joined the chat")
    alice.expect_match(r"\* bob was kicked by alice: banned until \S+ \S+")
    alice.expect_match(r"-> bob and 127\.0\.0\.3 may not come in until \S+ \S+")
    assert turned_away(room.port, "robert", "127.0.0.3").startswith("-> you are banned by alice")
    assert turned_away(room.port, "bob", "127.0.0.4").startswith("-> you are banned by alice")
    Peer(room.port, source="127.0.0.4").join("carol")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no socket for IPv6 and IPv4 here")
def test_ban_by_address_through_a_socket_for_ipv6(far_away: None) -> None:
    """Who comes by IPv4 to a server on IPv6 is banned with the IPv4 address, and counted so."""
    with run_chat(host="::", op_password=OPERATOR, max_per_address=2) as room:
        alice = operator(room, source="127.0.0.2")
        bob, carol = (Peer(room.port, source="127.0.0.3").join(name) for name in ("bob", "carol"))
        third = Peer(room.port, source="127.0.0.3").introduce("third")
        assert third.rest() == [protocol.ADDRESS_FULL]
        alice.send("/ban bob 5")
        alice.expect_eventually("* carol joined the chat")
        for name in "bob", "carol":
            alice.expect_match(rf"\* {name} was kicked by alice: banned until .*")
        alice.expect_match(r"-> bob and 127\.0\.0\.3 may not come in until .*")
        for peer in bob, carol:
            peer.rest()
        turned_away(room.port, "dave", "127.0.0.3")
        Peer(room.port, source="127.0.0.4").join("dave")


def test_ban_from_this_machine_is_by_name_alone(room: ChatServer) -> None:
    """A ban of somebody on the loopback address does not keep out everybody on it."""
    alice, bob = operator(room), Peer(room.port).join("bob")
    alice.send("/ban bob")
    bob.rest()
    Peer(room.port).join("carol").send("hello")
    alice.expect_eventually("carol: hello")


def test_ban_puts_out_all_from_the_address(room: ChatServer, far_away: None) -> None:
    """Every connection of the banned address is put out, a kept place too; the others stay."""
    alice = operator(room, source="127.0.0.2")
    bob, carol = (Peer(room.port, source="127.0.0.3").join(name) for name in ("bob", "carol"))
    dave = Peer(room.port, source="127.0.0.3").introduce(f"dave -0 {KEY}")
    dave.expect_eventually("* dave joined the chat")
    erin = Peer(room.port, source="127.0.0.4").join("erin")
    dave.vanish()
    wait_until(lambda: is_away(room, "dave"), "dave's place to be kept")
    unnamed = Peer(room.port, source="127.0.0.3")
    unnamed.expect("NICK")
    alice.send("/ban bob loud", "/names")
    for peer in bob, carol:
        assert "-> you were kicked by alice: banned for good: loud" in peer.rest()
    for name in "bob", "carol", "dave":
        erin.expect(f"* {name} was kicked by alice: banned for good: loud")
    alice.expect_eventually("-> 2 here: alice, erin")
    unnamed.send("frank")
    unnamed.expect("-> you are banned by alice for good: loud")
    told = turned_away(room.port, f"dave -0 {KEY}", "127.0.0.3")
    assert told == "-> you are banned by alice for good: loud"


@pytest.mark.parametrize("way", ["left", "renamed", "lost", "renamed and left"])
def test_ban_of_who_is_away_bans_the_address(room: ChatServer, far_away: None, way: str) -> None:
    """A name that somebody had, and has no more, is banned with the address it was used from."""
    alice = operator(room, source="127.0.0.2")
    bob = Peer(room.port, source="127.0.0.3").introduce(f"bob -0 {KEY}")
    bob.expect_eventually("* bob joined the chat")
    alice.expect("* bob joined the chat")
    if way.startswith("renamed"):
        bob.send("/nick rob")
        alice.expect("* bob is now rob")
    if way.endswith("left"):
        bob.send("/quit")
        alice.expect_match(r"\* (bob|rob) left the chat")
    if way == "lost":
        bob.vanish()
        wait_until(lambda: is_away(room, "bob"), "bob's place to be kept")
    alice.send("/ban bob")
    if way in ("renamed", "lost"):
        alice.expect_match(r"\* (bob|rob) was kicked by alice: banned for good")
    alice.expect(
        "-> bob and 127.0.0.3 may not come in until the server ends, which keeps no history"
    )
    assert turned_away(room.port, "carol", "127.0.0.3") == "-> you are banned by alice for good"
    Peer(room.port, source="127.0.0.4").join("carol")


def test_renewed_ban_keeps_its_address(room: ChatServer, far_away: None) -> None:
    """A ban that is given again while its bearer is away holds for the address as before."""
    alice = operator(room, source="127.0.0.2")
    Peer(room.port, source="127.0.0.3").join("bob")
    alice.expect("* bob joined the chat")
    alice.send("/ban bob 5 first")
    alice.expect_match(r"\* bob was kicked by alice: .*")
    alice.expect_match("-> bob and 127.0.0.3 may not .* first")
    Peer(room.port, source="127.0.0.4").join("carol")
    alice.send("/ban BOB 10 second", "/bans")
    alice.expect("* carol joined the chat")
    alice.expect_match("-> BOB and 127.0.0.3 may not .* second")
    alice.expect_match(r"-> BOB 127\.0\.0\.3 by alice until \S+ \S+: second")
    assert turned_away(room.port, "robert", "127.0.0.3").endswith(": second")


def test_renewed_ban_keeps_its_address_over_a_restart(tmp_path: Path, far_away: None) -> None:
    """The address is known from the file when the ban is given again by a later server."""
    options: dict[str, Any] = {"history": str(tmp_path / "room.db"), "op_password": OPERATOR}
    with run_chat(**options) as chat_server:
        alice = operator(chat_server, source="127.0.0.2")
        Peer(chat_server.port, source="127.0.0.3").join("bob")
        alice.expect("* bob joined the chat")
        alice.send("/ban bob 5")
        alice.expect_match(r"\* bob was kicked by alice: .*")
        alice.expect_match("-> bob and 127.0.0.3 may not .*")
    for _ in range(2):
        with run_chat(**options) as chat_server:
            alice = operator(chat_server, source="127.0.0.2")
            alice.send("/ban bob")
            alice.expect("-> bob and 127.0.0.3 may not come in for good")
    with run_chat(**options) as chat_server:
        turned_away(chat_server.port, "robert", "127.0.0.3")


def test_ban_never_hits_its_operator(room: ChatServer, far_away: None) -> None:
    """Nobody bans themselves, by a name or an address, and who shares it can still come in."""
    alice = operator(room, source="127.0.0.3")
    bob = Peer(room.port, source="127.0.0.3").join("bob")
    alice.expect("* bob joined the chat")
    for name in "alice", "ALICE", "aIice":
        alice.send(f"/ban {name}")
        alice.expect("-> not sent: that would put you out too; choose somebody else")
    alice.send("/ban bob", "/bans")
    alice.expect("* bob was kicked by alice: banned for good")
    alice.expect("-> bob may not come in until the server ends, which keeps no history")
    alice.expect("-> bob - by alice for good")
    bob.rest()
    alice.send("/quit")
    alice.rest()
    alice = operator(room, source="127.0.0.3")
    alice.send("/unban bob")
    alice.expect("-> bob may come in again")
    Peer(room.port, source="127.0.0.3").join("bob")


@pytest.mark.parametrize("name", ["alice", "ALICE", "aIice", "a1ice"])
def test_ban_of_a_name_covers_its_looks(room: ChatServer, name: str) -> None:
    """Who is banned cannot come as somebody who looks the same, at the door or by /nick."""
    boss = operator(room, "boss")
    carol = Peer(room.port).join("carol")
    boss.send("/ban alice")
    boss.expect_eventually("-> alice may not come in until the server ends, which keeps no history")
    assert turned_away(room.port, name) == "-> you are banned by boss for good"
    carol.send(f"/nick {name}")
    carol.expect(f"-> not sent: the name {name} is banned; choose another")


def test_ban_by_a_look_puts_out_who_looks_so(room: ChatServer, far_away: None) -> None:
    """An operator who types what the screen shows bans who is meant, with the address."""
    boss = operator(room, "boss", source="127.0.0.2")
    alice = Peer(room.port, source="127.0.0.3").join("alice")
    boss.expect("* alice joined the chat")
    boss.send("/ban aIice")
    boss.expect("* alice was kicked by boss: banned for good")
    boss.expect_match("-> aIice and 127.0.0.3 may not come in .*")
    alice.rest()
    turned_away(room.port, "carol", "127.0.0.3")


def test_ban_ends_without_anybodys_doing(room: ChatServer, clock: Callable[[float], None]) -> None:
    """A ban that is over is not listed, and its name free, though nobody came or left since."""
    alice = operator(room)
    alice.send("/ban bob 1", "/ban carol", "/bans")
    alice.expect_match("-> bob may not .*")
    alice.expect_match("-> carol may not .*")
    alice.expect_match("-> bob - by alice until .*")
    alice.expect("-> carol - by alice for good")
    clock(61)
    alice.send("a moment")
    alice.expect("alice: a moment")
    alice.send("/bans", "/nick bob")
    alice.expect("-> carol - by alice for good", "-> you are now bob", "* alice is now bob")


def test_ban_for_decades_holds_up_nobody(tmp_path: Path) -> None:
    """The longest ban that can be asked for is kept, and an empty room lets people in."""
    options: dict[str, Any] = {"history": str(tmp_path / "room.db"), "op_password": OPERATOR}
    with run_chat(**options) as chat_server:
        alice = operator(chat_server)
        alice.send("/ban bob 9999999")
        alice.expect_match(r"-> bob may not come in until 20\d\d-\S+ \S+")
    with run_chat(**options) as chat_server:
        told = turned_away(chat_server.port, "bob")
        assert told.startswith("-> you are banned by alice until 20")
        Peer(chat_server.port).join("carol")


def test_ban_holds_with_a_clock_set_back(room: ChatServer, clock: Callable[[float], None]) -> None:
    """A ban for minutes holds from when it is given, though the clock was ahead before."""
    alice = operator(room)
    clock(7200)
    Peer(room.port).join("carol")
    clock(-7200)
    alice.send("/ban bob 30")
    alice.expect_eventually("* carol joined the chat")
    alice.expect_match("-> bob may not come in until .*")
    assert turned_away(room.port, "bob").startswith("-> you are banned by alice until ")


def test_ban_with_a_full_disk_holds_and_is_told_to_be_forgotten(tmp_path: Path) -> None:
    """An operator hears that a ban could not be stored; it holds, and is gone after a restart."""
    (tmp_path / "op").write_text(OPERATOR)
    options = ("--history", str(tmp_path / "room.db"), "--op-password-file", str(tmp_path / "op"))
    with run_server(*options) as process:
        alice, bob = pair(process.port)
        alice.send(f"/op {OPERATOR}")
        alice.expect(ENTER)
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        alice.send("/ban bob", "/names")
        alice.expect("-> bob may not come in for good", NOT_KEPT, "-> 1 here: alice")
        assert bob.rest() == ["-> you were kicked by alice: banned for good"]
        assert turned_away(process.port, "bob") == "-> you are banned by alice for good"
        alice.send("/unban bob", "/kick alice")
        alice.expect("-> bob may come in again")  # as the file has it
        assert alice.rest() == ["-> you were kicked by alice"]
        alice = Peer(process.port).introduce("alice")
        alice.send(f"/op {OPERATOR}", "/ban bob")
        alice.expect_eventually(NOT_KEPT)
    with run_server(*options) as process:
        Peer(process.port).join("bob")


NOT_KEPT = "-> it could not be stored, and will be forgotten when the server ends"


@pytest.mark.parametrize(
    ("host", "own", "expected"),
    [
        ("192.0.2.7", "192.0.2.1", "192.0.2.7"),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.1", "192.0.2.7"),
        ("::ffff:192.0.2.7", "2001:db8::1", "192.0.2.7"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", "127.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8::1", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2:ffff::4", "2001:db8::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3:3::4", "2001:db8::1", "2001:db8:1:3::/64"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::1", "2001:db8:1:2:3::4"),
        ("fe80::1%eth0", "fe80::2%eth0", "fe80::1"),
        ("fe80::1%eth0", "2001:db8::1", "fe80::1"),
        ("::1", "::1", "::1"),
    ],
)
def test_what_counts_as_one_address(host: str, own: str, expected: str) -> None:
    """An IPv6 /64 does, but a link's own or ours; a mapped address is the IPv4 one."""
    assert server.network(host, own) == expected


def test_ban_covers_the_network_of_an_ipv6_address() -> None:
    """The next address of the /64 does not get in, one of another network does."""
    room = server.Room(durable=False)
    own = "2001:db8::1"

    def claim(session: int, name: str, host: str) -> None:
        asked = protocol.introduction(name)
        room.apply(server.Claim(session, asked, server.network(host, own), 1.0))

    claim(1, "alice", "2001:db8:a::1")
    claim(2, "bob", "2001:db8:b::1")
    claim(3, "carol", "2001:db8:b::2")
    room.apply(server.Promoted(1))
    room.apply(server.Banned(1, "bob", 0.0, "", 2.0))
    assert room.present() == ["alice"]
    with pytest.raises(server.Farewell, match="banned"):
        claim(4, "dave", "2001:db8:b:0:ffff::99")
    claim(5, "erin", "2001:db8:b:1::1")
    room.apply(server.Banned(1, "frank", 0.0, "", 3.0))
    room.apply(server.Banned(1, "erin", 0.0, "", 4.0))
    assert [ban.address for ban in room.bans] == ["2001:db8:b::/64", "", "2001:db8:b:1::/64"]


@pytest.fixture
def elsewhere() -> Iterator[concurrent.futures.Executor]:
    """Give a thread that is in a network of its own, with addresses of three IPv6 networks."""
    ip, name = shutil.which("ip"), f"chat-{os.getpid()}"
    if ip is None or os.geteuid() != 0:
        pytest.skip("making a network namespace takes root and the program ip")

    def run(command: str) -> int:
        return subprocess.run([ip, *command.split()], capture_output=True, check=False).returncode

    commands = [f"netns add {name}", f"-n {name} link set lo up"]
    commands += [f"-n {name} addr add {host}/64 dev lo nodad" for host in (HOST, *GUESTS)]
    try:
        for command in commands:
            if run(command):
                pytest.skip(f"this machine makes no such network: ip {command}")
        with (
            open(f"/run/netns/{name}", "rb") as namespace,
            concurrent.futures.ThreadPoolExecutor(1) as thread,
        ):
            setns = ctypes.CDLL(None).setns
            assert thread.submit(setns, namespace.fileno(), 0).result() == 0
            yield thread
    finally:
        run(f"netns del {name}")


HOST = "2001:db8:0:1::1"
GUESTS = ("2001:db8:0:1::2", "2001:db8:0:2::a", "2001:db8:0:2::b", "2001:db8:0:3::a")


def test_ban_covers_the_network_of_a_real_connection(
    elsewhere: concurrent.futures.Executor,
) -> None:
    """Over IPv6 the next address of a banned /64 is turned away, another network's let in."""
    chat = run_chat(host="::", op_password=OPERATOR, max_per_address=2)
    room = elsewhere.submit(chat.__enter__).result()
    with contextlib.ExitStack() as stack:
        stack.push(chat)

        def connect(source: str) -> Peer:
            return elsewhere.submit(Peer, room.port, source=source, host=HOST).result()

        near, first, second, other = GUESTS
        alice = connect(near).join("alice")
        alice.send(f"/op {OPERATOR}")
        alice.expect(ENTER)
        bob, carol = connect(first).join("bob"), connect(second).join("carol")
        assert connect(second).introduce("third").rest() == [protocol.ADDRESS_FULL]
        alice.send("/ban bob")
        for peer in bob, carol:
            assert "-> you were kicked by alice: banned for good" in peer.rest()
        wait_until(lambda: len(room.clients) == 1, "the places of the address to be free")
        told = connect(second).introduce("dave").rest()
        assert told == ["-> you are banned by alice for good"]
        connect(other).join("erin")


def test_bans_are_listed_and_taken_back(room: ChatServer, far_away: None) -> None:
    """/bans tells who may not come in, by whom, until when and why; /unban takes one back."""
    alice = operator(room, source="127.0.0.2")
    Peer(room.port, source="127.0.0.3").join("bob")
    alice.expect("* bob joined the chat")
    alice.send("/ban bob loud", "/ban carol 30 louder", "/bans")
    alice.expect("* bob was kicked by alice: banned for good: loud")
    alice.expect(
        "-> bob and 127.0.0.3 may not come in until the server ends, which keeps no history: loud"
    )
    alice.expect_match(r"-> carol may not come in until \S+ \S+: louder")
    alice.expect("-> bob 127.0.0.3 by alice for good: loud")
    alice.expect_match(r"-> carol - by alice until \S+ \S+: louder")
    alice.send("/unban BOB", "/unban nobody", "/unban", "/bans")
    alice.expect("-> BOB may come in again")
    alice.expect("-> not sent: nobody called nobody is banned; /bans lists who is")
    alice.expect_match("-> usage: /unban NAME, .*")
    alice.expect_match(r"-> carol - by alice until \S+ \S+: louder")
    Peer(room.port, source="127.0.0.3").join("bob")


def test_second_ban_replaces_the_first(room: ChatServer) -> None:
    """Banning a name again changes how long and why."""
    alice = operator(room)
    alice.send("/ban bob 1 first", "/ban Bob second", "/bans")
    alice.expect_match("-> bob may not come in until .*")
    alice.expect(
        "-> Bob may not come in until the server ends, which keeps no history: second",
        "-> Bob - by alice for good: second",
    )
    alice.expect_nothing()


def test_bans_survive_a_restart(
    tmp_path: Path, far_away: None, clock: Callable[[float], None]
) -> None:
    """With a durable history, bans are there after a restart, and end when they should."""
    options: dict[str, Any] = {"history": str(tmp_path / "room.db"), "op_password": OPERATOR}
    with run_chat(**options) as chat_server:
        alice = operator(chat_server, source="127.0.0.2")
        Peer(chat_server.port, source="127.0.0.3").join("bob")
        alice.expect("* bob joined the chat")
        alice.send("/ban bob loud", "/ban carol 30", "/ban dave", "/unban dave")
        alice.expect_eventually("-> dave may come in again")
    with run_chat(**options) as chat_server:
        assert turned_away(chat_server.port, "bob") == "-> you are banned by alice for good: loud"
        turned_away(chat_server.port, "carol", "127.0.0.4")
        turned_away(chat_server.port, "erin", "127.0.0.3")
        Peer(chat_server.port, source="127.0.0.4").join("dave")
    clock(1801)
    with run_chat(**options) as chat_server:
        turned_away(chat_server.port, "bob", "127.0.0.4")
        Peer(chat_server.port, source="127.0.0.4").join("carol")
        alice = operator(chat_server, source="127.0.0.2")
        alice.send("/unban bob")
        alice.expect("-> bob may come in again")
    with run_chat(**options) as chat_server:
        Peer(chat_server.port, source="127.0.0.3").join("bob")


def test_kick_and_ban_stand_in_the_history(tmp_path: Path) -> None:
    """Who was put out, by whom and why stays in the room's history; how it was typed does not."""
    file = tmp_path / "room.db"
    with run_chat(history=str(file), op_password=OPERATOR) as chat_server:
        alice, bob = operator(chat_server), Peer(chat_server.port).join("bob")
        alice.send("/kick bob enough")
        bob.rest()
    kept = list(stored(file).values())
    assert "* bob was kicked by alice: enough" in kept
    assert not [line for line in kept if "/" in line]


# --- The client that is put out ----------------------------------------------


def test_kicked_client_ends_with_the_reason(room: ChatServer) -> None:
    """A client that is kicked says why, exits with 1 and does not come back by itself."""
    alice = operator(room)
    process = start(room.port, "--name", "bob")
    alice.expect("* bob joined the chat")
    alice.send("/kick bob enough")
    alice.expect("* bob was kicked by alice: enough", "-> bob was put out")
    output, errors = process.communicate(timeout=DEADLINE)  # which ends its input
    assert process.returncode == 1
    assert b"client.py: you were kicked by alice: enough\n" in errors
    assert b"* bob joined the chat" in output
    alice.expect_nothing()


def test_client_put_out_at_once_shows_all_that_came() -> None:
    """Also when the reason comes with the welcome: what stood between the two is shown."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        read_line(sock)
        sock.sendall(
            b"-> Welcome, bob!\n-> at 1\n* bob joined the chat\nalice: look out\n"
            b"* bob was kicked by alice: enough\n-> you were kicked by alice: enough\n"
        )

    with pretended(talk) as port:
        done = say("", "--name", "bob", port=port)
    assert done.returncode == 1
    assert "client.py: you were kicked by alice: enough\n" in done.stderr
    assert done.stdout.splitlines()[1:] == [
        "* bob joined the chat",
        "alice: look out",
        "* bob was kicked by alice: enough",
        "-> you were kicked by alice: enough",
    ]


def test_banned_client_ends_with_the_reason(room: ChatServer) -> None:
    """A client whose name is banned says by whom and until when, and exits with 1."""
    alice = operator(room)
    alice.send("/ban bob 10 enough")
    alice.expect_match("-> bob may not come in until .*")
    done = say("hello\n", "--name", "bob", port=room.port)
    assert done.returncode == 1
    assert re.search(r"client\.py: you are banned by alice until \S+ \S+: enough\n", done.stderr)


def test_kicked_client_gives_the_terminal_back(room: ChatServer, terminal: Terminal) -> None:
    """On a terminal a kicked client ends with the reason while its user is typing."""
    boss = operator(room, "boss")
    terminal.type("half a li")
    terminal.wait_for("half a li")
    boss.send("/kick alice enough")
    assert terminal.wait() == 1
    terminal.wait_for("you were kicked by boss: enough")


def test_client_banned_while_it_was_away_ends_with_the_reason(
    room: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that comes back and finds itself banned ends with the reason, and tries no more."""
    monkeypatch.setattr("client.RETRY_FIRST", 0.01)
    monkeypatch.setattr("client.RETRY_MAX", 0.02)
    alice = operator(room)
    shown, ended = Shown(), threading.Event()
    with Proxy(room.port) as proxy:
        chat = ChatClient("bob", port=proxy.port, show=shown, ended=ended.set)
        chat.connect()
        chat.start()
        try:
            proxy.go_away()
            alice.expect("* bob joined the chat")
            wait_until(lambda: is_away(room, "bob"))
            alice.send("/ban bob enough")
            alice.expect("* bob was kicked by alice: banned for good: enough")
            alice.expect(
                "-> bob may not come in until the server ends, which keeps no history: enough"
            )
            proxy.come_back()
            assert ended.wait(3.0), "it goes on trying"
            assert chat.reason == "you are banned by alice for good: enough"
        finally:
            chat.leave()
