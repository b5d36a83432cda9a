"""What is typed on a terminal where it may go wrong: secrets, pastes, names, other programs."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
from chat import DEADLINE, Peer, no_leaks, run_chat, wait_until
from clients import ROOT, environment, pretended, read_line, read_to_end
from proxy import Proxy
from screens import CTRL_C, CTRL_D, CTRL_Z, KINDS, UP, assert_sane, command, enter, opener, prompts
from terminal import Terminal

from server import ChatServer

pytestmark = pytest.mark.parametrize("kind", KINDS)
SECRET = "tr0ub4dor"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An empty room that can have operators."""
    with run_chat(op_password=SECRET) as chat_server:
        yield chat_server


@pytest.fixture
def bob(server: ChatServer) -> Peer:
    """Somebody in the room."""
    return Peer(server.port).join("bob")


@pytest.fixture
def terminal(kind: str, server: ChatServer, bob: Peer) -> Iterator[Terminal]:
    """A terminal with alice's client, who is in the room and can type."""
    with opener(kind)(server.port) as terminal:
        enter(terminal, bob)
        yield terminal


# --- Secrets --------------------------------------------------------------------


@pytest.mark.parametrize("slip", [f" /op {SECRET}", f"//op {SECRET}", f"op {SECRET}"], ids=repr)
def test_password_by_a_slip_is_held_back(terminal: Terminal, bob: Peer, slip: str) -> None:
    """What looks like a password that would be said is asked about, and is not kept."""
    terminal.type("first\r")
    bob.expect("alice: first")
    terminal.type(f"{slip}\r")
    terminal.wait_for("That looks like a password; say it to everyone? (yes/no)")
    terminal.type("\r")
    terminal.wait_for("not said; /op alone asks for the password")
    terminal.wait_for(prompts(""))
    terminal.type(UP)
    terminal.wait_for(prompts("first"))
    terminal.type("\r")
    bob.expect("alice: first")
    assert SECRET not in terminal.screen.text()


def test_what_only_looks_like_a_password_can_be_said(terminal: Terminal, bob: Peer) -> None:
    """Whoever means it says it."""
    terminal.type("op amp\r")
    terminal.wait_for("say it to everyone?")
    terminal.type("yes\r")
    bob.expect("alice: op amp")
    terminal.type("op amps are old\r")
    bob.expect("alice: op amps are old")


def test_password_behind_a_tab(terminal: Terminal, bob: Peer) -> None:
    """A pasted /op with a tab is the command, and is not kept."""
    terminal.paste(f"/op\t{SECRET}")
    terminal.settle()
    terminal.type("\r")
    terminal.wait_for("you are an operator")
    terminal.wait_for(prompts(""))
    terminal.type(UP)
    terminal.settle()
    assert SECRET not in terminal.screen.text()
    bob.expect_nothing()


def test_password_in_a_paste(terminal: Terminal, bob: Peer) -> None:
    """A pasted second line with a password is the command, and the paste is not kept."""
    terminal.paste(f"one\n/op {SECRET}")
    terminal.settle()
    terminal.type("\r")
    bob.expect("alice: one")
    terminal.wait_for("you are an operator")
    terminal.wait_for(prompts(""))
    terminal.type(UP)
    terminal.settle()
    assert SECRET not in terminal.screen.text()
    bob.expect_nothing()


def test_password_typed_before_it_is_asked_for_again(kind: str) -> None:
    """Between two questions for a password nothing that is typed appears."""
    asked, typed = threading.Event(), threading.Event()

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"NICK\n")
        read_line(sock)
        sock.sendall(b"PASS\n")
        assert read_line(sock) == b"wrong"
        asked.set()
        assert typed.wait(DEADLINE)
        sock.sendall(b"-> wrong password\nPASS\n")
        read_to_end(sock)

    with pretended(talk) as port, opener(kind)(port) as terminal:
        terminal.wait_for("Password of the room: ")
        terminal.type("wrong\r")
        assert asked.wait(DEADLINE)
        terminal.type(SECRET)
        terminal.settle()
        typed.set()
        terminal.wait_for(lambda screen: screen.text().count("Password of the room:") == 2)
        terminal.settle()
        assert SECRET not in terminal.screen.text()
        terminal.type(CTRL_C)
        terminal.wait()
        assert_sane(terminal)


def test_password_where_there_is_no_termios(kind: str) -> None:
    """A password is typed unseen on a terminal such as that of Windows too."""
    opener(kind)  # skips the test where there is no such terminal
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import client;"
        " client.termios = None; sys.exit(client.main())"
    )
    bare = ["-S"] if kind == "readline" else []
    with run_chat(password=SECRET) as server:
        options = ["--port", str(server.port), "--name", "alice"]
        command = [sys.executable, *bare, "-c", program, *options]
        with Terminal(command, 14, 60, env=environment(INPUTRC=os.devnull)) as terminal:
            terminal.wait_for("Password of the room: ")
            terminal.type(f"{SECRET}\r")
            terminal.wait_for("* alice joined the chat")
            assert SECRET not in terminal.screen.text()


def test_message_while_a_password_is_typed(terminal: Terminal, bob: Peer) -> None:
    """What comes during the question for a password does not stand in its row."""
    terminal.type("/op\r")
    terminal.wait_for("Operator password: ")
    bob.send("hello there")
    bob.expect("bob: hello there")
    terminal.settle()
    terminal.type(f"{SECRET}\r")
    terminal.wait_for("you are an operator")
    terminal.wait_for("bob: hello there")
    assert "bob: hello there" in terminal.screen.lines
    assert SECRET not in terminal.screen.text()


# --- Keys ------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["exit", "quit", ":q"])
def test_words_that_leave_other_programs(terminal: Terminal, bob: Peer, word: str) -> None:
    """They come back once, with a word about /quit; a second Enter says them."""
    terminal.type(f"{word}\r")
    terminal.wait_for("/quit leaves; Enter says")
    terminal.wait_for(prompts(word))
    bob.expect_nothing()
    terminal.type("\r")
    bob.expect(f"alice: {word}")


def test_words_that_leave_other_programs_in_a_paste(terminal: Terminal, bob: Peer) -> None:
    """Among pasted lines they are text."""
    terminal.paste("exit\nquit\n:q")
    terminal.wait_for("alice> exit")
    terminal.type("\r")
    bob.expect("alice: exit", "alice: quit", "alice: :q")


def test_ctrl_c_leaves_at_once_while_it_is_away(kind: str) -> None:
    """Without a settled connection Ctrl-C needs no second."""
    with (
        run_chat() as server,
        Proxy(server.port) as proxy,
        opener(kind)(proxy.port) as terminal,
    ):
        enter(terminal, Peer(server.port).join("bob"))
        proxy.go_away()
        terminal.wait_for("connection lost")
        terminal.wait_for(prompts(""))
        terminal.type(CTRL_C)
        assert terminal.wait() == 0
        assert not terminal.screen.shows("-- Ctrl-C")


def test_paste_whose_end_does_not_come(terminal: Terminal, bob: Peer) -> None:
    """In the midst of a paste Ctrl-C clears the line, and a signal ends the program."""
    terminal.type("\x1b[200~half a paste")
    terminal.settle()
    bob.send("are you there?")
    terminal.wait_for("bob: are you there?")
    terminal.type(CTRL_C)
    terminal.wait_for(prompts(""))
    terminal.type("hello\r")
    bob.expect("bob: are you there?", "alice: hello")
    terminal.type("\x1b[200~more")
    terminal.settle()
    terminal.signal(signal.SIGTERM)
    assert terminal.wait() == 0
    bob.expect_eventually("* alice left the chat")
    assert_sane(terminal)


def test_ctrl_d_in_a_paste_whose_end_does_not_come(kind: str) -> None:
    """In the midst of a paste Ctrl-D leaves, when nothing was pasted yet."""
    with run_chat() as server, opener(kind)(server.port) as terminal:
        enter(terminal, Peer(server.port).join("bob"))
        terminal.type("\x1b[200~")
        terminal.settle()
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert_sane(terminal)


def test_tab_offers_who_wrote(kind: str) -> None:
    """Behind /msg, Tab offers who wrote to one alone first, before who spoke last."""
    with run_chat() as server, opener(kind)(server.port) as terminal:
        bea, bob = Peer(server.port).join("bea"), Peer(server.port).join("bob")
        enter(terminal, bob)
        bea.send("/msg alice psst")
        terminal.wait_for("[from bea] psst")
        bob.send("to all")
        terminal.wait_for("bob: to all")
        terminal.wait_for(prompts(""))
        terminal.type("/msg b\t")
        offered = re.compile(r"^alice> /msg b(?:(ea|ob)|\n +b(ea|ob))", re.M)  # in place, or a menu
        terminal.wait_for(lambda screen: bool(offered.search(screen.text())))
        found = offered.search(terminal.screen.text())
        assert found
        assert "ea" in found.groups()


def test_refused_whisper_comes_back(terminal: Terminal, bob: Peer) -> None:
    """A private line to nobody stands in the prompt again, to be mended."""
    terminal.type("/msg bab psst\r")
    terminal.wait_for("-> not sent: nobody here is called bab")
    terminal.wait_for(prompts("/msg bab psst"))
    terminal.type("\x1b[D" * 6 + "\x7fo\r")
    bob.expect("[from alice] psst")


def test_reply(terminal: Terminal, bob: Peer) -> None:
    """/reply answers who wrote last, and its answer is its receipt."""
    bob.send("/msg alice psst")
    terminal.wait_for("[from bob] psst")
    bob.expect("-> to alice: psst")
    for verb in ("/reply", "/r"):
        terminal.type(f"{verb} hush\r")
        bob.expect("[from alice] hush")
        terminal.wait_for("-> to bob: hush")
        terminal.wait_for(prompts(""))


def test_prompt_has_the_name_of_now(terminal: Terminal, bob: Peer) -> None:
    """After each /nick the prompt shows the name that the user has then."""
    for name in ("ally", "al", "alison"):
        terminal.type(f"/nick {name}\r")
        terminal.wait_for(f"-> you are now {name}")
        bob.expect_match(rf"\* \w+ is now {name}")
        wait_for_row(terminal, f"{name}>")


def wait_for_row(terminal: Terminal, row: str) -> None:
    """Wait until a row of the screen is this one."""
    terminal.wait_for(lambda screen: row in screen.lines)


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_letter_of_two_bytes_in_a_plain_locale(kind: str, locale: str) -> None:
    """Backspace takes a whole letter back, also where the locale says ASCII."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        with opener(kind)(server.port, LC_ALL=locale) as terminal:
            enter(terminal, bob)
            terminal.paste("naï")
            terminal.settle()
            terminal.type("\x7five\r")
            bob.expect("alice: naive")


def test_refusal_names_the_format(terminal: Terminal, bob: Peer) -> None:
    """A letter that an ASCII room cannot carry is refused with the remedy; the text comes back."""
    terminal.type("grüße\r")
    terminal.wait_for("--format utf-8")
    terminal.wait_for(prompts("grüße"))
    terminal.type("\x7f" * 5 + "gruesse\r")
    bob.expect("alice: gruesse")


# --- Under a shell ----------------------------------------------------------------


class Shell:
    """A shell with job control on a terminal of its own."""

    def __init__(self) -> None:
        env = environment(PS1="$ ", INPUTRC=os.devnull)
        self.terminal = Terminal(["bash", "--norc", "--noediting"], 24, 80, env=env, cwd=ROOT)
        self._count = 0

    def run(self, line: str) -> None:
        """Type a command."""
        self.terminal.type(f"{line}\r")

    def sync(self) -> None:
        """Wait until the shell has done all that was typed."""
        self._count += 1
        self.run(f"echo done $(({self._count}+1000))")
        self.terminal.wait_for(f"done {self._count + 1000}")


@pytest.fixture
def shell() -> Iterator[Shell]:
    """A shell."""
    shell = Shell()
    with shell.terminal:
        shell.terminal.wait_for("$ ")
        yield shell


def test_stopped_and_continued(kind: str, server: ChatServer, bob: Peer, shell: Shell) -> None:
    """After Ctrl-Z and fg what is typed is seen, said once, and stands once on the screen."""
    opener(kind)  # or it is skipped
    shell.run(" ".join([*command(kind, server.port), "--name alice"]))
    enter_from_shell(shell.terminal, bob)
    shell.terminal.type(CTRL_Z)
    shell.terminal.wait_for("Stopped")
    wait_for_row(shell.terminal, "$")
    shell.sync()
    bob.send("meanwhile")
    bob.expect("bob: meanwhile")
    shell.run("fg")
    shell.terminal.wait_for("bob: meanwhile")
    shell.terminal.wait_for(lambda screen: "alice>" in screen.lines)
    for text in ("first", "second"):
        shell.terminal.type(text)
        shell.terminal.wait_for(f"alice> {text}")
        shell.terminal.type("\r")
        bob.expect(f"alice: {text}")
        shell.terminal.wait_for(f"alice: {text}")
    wait_for_row(shell.terminal, "alice>")
    shell.terminal.type(CTRL_D)
    shell.terminal.wait_for("-> bye")
    shell.sync()
    assert "alice> first" not in shell.terminal.screen.text()


def test_stopped_while_asked(kind: str, server: ChatServer, bob: Peer, shell: Shell) -> None:
    """Brought back, a question stands there again with what is half typed."""
    opener(kind)
    shell.run(" ".join(command(kind, server.port)))
    shell.terminal.wait_for("Your name:")
    shell.terminal.type("al")
    shell.terminal.wait_for("Your name: al")
    shell.terminal.type(CTRL_Z)
    shell.terminal.wait_for("Stopped")
    wait_for_row(shell.terminal, "$")
    shell.run("clear; fg")
    shell.terminal.wait_for("Your name: al")
    shell.terminal.type("ice\r")
    enter_from_shell(shell.terminal, bob)
    shell.terminal.type(CTRL_D)
    shell.terminal.wait_for("-> bye")
    shell.sync()


def enter_from_shell(terminal: Terminal, bob: Peer) -> None:
    """Wait until alice is in the room and can type."""
    bob.expect_eventually("* alice joined the chat")
    terminal.wait_for("* alice joined the chat")
    terminal.wait_for(lambda screen: "alice>" in screen.lines)


@pytest.mark.long
@pytest.mark.parametrize("how", ["stopped", "in the background"])
def test_killed_without_the_terminal(
    kind: str, server: ChatServer, bob: Peer, shell: Shell, how: str
) -> None:
    """A client that is stopped or in the background ends when it is killed, and leaves the room."""
    opener(kind)
    start = " ".join([*command(kind, server.port), "--name alice"])
    if how == "stopped":
        shell.run(start)
        enter_from_shell(shell.terminal, bob)
        shell.terminal.type(CTRL_Z)
        shell.terminal.wait_for("Stopped")
        wait_for_row(shell.terminal, "$")
    else:
        shell.run(start + " &")
        bob.expect_eventually("* alice joined the chat")
    wait_for_job(shell, "Stopped")
    shell.sync()
    shell.run("kill %1")
    bob.expect("* alice left the chat")
    wait_for_job(shell, "Done")
    shell.run("stty -a | grep -c -e '-echo ' -e '-icanon'; echo end")
    shell.terminal.wait_for(lambda screen: "end" in screen.lines)
    assert screen_line_before(shell.terminal, "end") == "0"
    assert "Traceback" not in shell.terminal.screen.text()


def wait_for_job(shell: Shell, state: str) -> None:
    """Wait until the shell says that its job is in a state."""

    def is_there() -> bool:
        shell.run("jobs")
        shell.sync()
        return state in shell.terminal.screen.text()

    wait_until(is_there, f"the job to be {state}")


def screen_line_before(terminal: Terminal, line: str) -> str:
    """Return the row above one."""
    lines = terminal.screen.lines
    return lines[lines.index(line) - 1]


def test_started_in_the_background(kind: str, server: ChatServer, bob: Peer, shell: Shell) -> None:
    """Brought to the foreground, what is typed is seen."""
    opener(kind)
    shell.run(" ".join([*command(kind, server.port), "--name alice &"]))
    bob.expect_eventually("* alice joined the chat")
    wait_for_job(shell, "Stopped")
    shell.run("fg")
    shell.terminal.wait_for(lambda screen: "alice>" in screen.lines)
    shell.terminal.type("seen")
    shell.terminal.wait_for("alice> seen")
    shell.terminal.type("\r")
    bob.expect("alice: seen")
    shell.terminal.wait_for("alice: seen")
    wait_for_row(shell.terminal, "alice>")
    shell.terminal.type(CTRL_D)
    shell.terminal.wait_for("-> bye")
    shell.sync()
