"""Somebody who is not to be seen on one client, whatever the others see."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from chat import Peer, no_leaks, run_chat
from clients import greet, pretended, read_line, read_to_end, say
from screens import KINDS, enter, opener, prompts

from server import ChatServer


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An empty room."""
    with run_chat() as chat_server:
        yield chat_server


# --- On a terminal ----------------------------------------------------------------

TERMINALS = [("prompt_toolkit", "xterm"), ("readline", "xterm"), ("readline", "dumb")]


@pytest.mark.parametrize(("kind", "term"), TERMINALS)
def test_ignored_are_not_seen_until_asked_for(kind: str, term: str, server: ChatServer) -> None:
    """Lines, actions and private lines of a name are hidden in any case, also under a new one."""
    bob, carol = Peer(server.port).join("bob"), Peer(server.port).join("carol")
    with opener(kind)(server.port, "--name", "alice", columns=100, rows=24, TERM=term) as terminal:
        terminal.wait_for("* alice joined the chat")
        bob.expect_eventually("* alice joined the chat")
        terminal.type("/ignore BOB\r")
        terminal.wait_for("-- what BOB says is not shown here; /unignore BOB ends it --")
        bob.send("spam one", "/me spams two", "/msg alice spam three", "/nick rob", "spam four")
        carol.expect_eventually("rob: spam four")
        carol.send("tea?")
        terminal.wait_for("carol: tea?")
        assert "* bob is now rob" in terminal.screen.text()
        assert "spam" not in terminal.screen.text()
        terminal.type("/ignore\r")
        terminal.wait_for("-- you ignore rob; /unignore NAME ends it --")
        terminal.type("/unignore Rob\r")
        terminal.wait_for("-- what Rob says is shown again --")
        bob.send("sorry")
        terminal.wait_for("rob: sorry")
        assert "ignore" not in "\n".join(line for _, line in server.history.last(50))


@pytest.mark.parametrize("kind", KINDS)
def test_help_names_what_the_client_itself_can_do(kind: str, server: ChatServer) -> None:
    """Behind the server's commands stand the client's own, which Tab completes."""
    bob = Peer(server.port).join("bob")
    with opener(kind)(server.port, columns=120, rows=30) as terminal:
        enter(terminal, bob)
        terminal.type("/help\r")
        terminal.wait_for("-- and of this client: /ignore [NAME], to hide what NAME says")
        text = terminal.screen.text()
        assert text.index("/bans") < text.index("/ignore [NAME]")
        terminal.type("/ig\t")
        terminal.wait_for(prompts("/ignore ", 120))
        terminal.type("b\t")
        terminal.wait_for(prompts("/ignore bob ", 120))
        terminal.type("\r")
        terminal.wait_for("-- what bob says is not shown here")


def test_slip_is_not_said_to_everyone(server: ChatServer) -> None:
    """Blanks before the slash are told, and nobody hears who was meant."""
    bob = Peer(server.port).join("bob")
    with opener("readline")(server.port, columns=100) as terminal:
        enter(terminal, bob)
        terminal.type(" /ignore bob\r")
        terminal.wait_for("-- not sent: begin the line with the slash")
        bob.expect_nothing()


@pytest.mark.parametrize("reply", ["/r", "/REPLY"])
def test_reply_is_not_for_somebody_unseen(reply: str, server: ChatServer) -> None:
    """What is meant for who is seen to have written last does not go to who is hidden."""
    bob, carol = Peer(server.port).join("bob"), Peer(server.port).join("carol")
    with opener("readline")(server.port, columns=100, rows=24) as terminal:
        enter(terminal, carol)
        carol.send("/msg alice the code?")
        terminal.wait_for("[from carol] the code?")
        terminal.type("/ignore bob\r")
        terminal.wait_for("what bob says is not shown")
        bob.expect_eventually("* alice joined the chat")
        bob.send("/msg alice spam")
        bob.expect("-> to alice: spam")
        carol.send("well?")
        terminal.wait_for("carol: well?")
        terminal.type(f"{reply} 42\r")
        terminal.wait_for("-- not sent: bob, whom you ignore, wrote to you last; write /msg NAME")
        terminal.wait_for(prompts(f"{reply} 42", 100))
        bob.expect("carol: well?")
        bob.expect_nothing()
        carol.send("/msg alice here")
        terminal.wait_for("[from carol] here")
        terminal.type("\r")
        carol.expect_eventually("[from alice] 42")


# --- In a pipe --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/ignore alice", "you cannot ignore yourself; name somebody else"),
        ("/IGNORE Alice", "you cannot ignore yourself; name somebody else"),
        ("/ignore a b", "a name is one word of at most 24 letters, digits, - and _,"),
        ("/unignore bob", "you do not ignore bob; /ignore lists whom you ignore"),
        ("/unignore", "usage: /unignore NAME; /ignore lists whom you ignore"),
    ],
)
def test_what_cannot_be_ignored(line: str, answer: str, server: ChatServer) -> None:
    """What cannot be done is told in one line, and is a failure of a script."""
    done = say(f"alice\n{line}\nhello\n", port=server.port)
    assert done.returncode == 1
    assert done.stderr.startswith(f"client.py: {answer}")
    assert done.stderr.count("\n") == 1
    assert "alice: hello" in done.stdout
    assert "ignore" not in done.stdout


def test_verbatim_says_it(server: ChatServer) -> None:
    """With --verbatim it is text like any other."""
    done = say("/ignore bob\n", "--name", "alice", "--verbatim", port=server.port)
    assert (done.returncode, done.stderr) == (0, "")
    assert "alice: /ignore bob" in done.stdout.splitlines()


def test_alone_it_lists_nobody(server: ChatServer) -> None:
    """Nobody is ignored at first, which is no failure."""
    done = say("/ignore\n", "--name", "alice", port=server.port)
    assert done.returncode == 0
    assert done.stderr == "client.py: you ignore nobody; /ignore NAME hides what somebody says\n"


# --- What goes on as before -------------------------------------------------------


def test_hidden_lines_count_as_lines_of_the_room() -> None:
    """Who comes back goes on behind what was hidden, ignores on, and hears nothing twice."""
    asked: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        if asked:
            sock.sendall(b"NICK\n")
            asked.append(read_line(sock))
            sock.sendall(b"-> Welcome back, alice!\n-> at 6\n")
            read_line(sock)
            sock.sendall(b"-> 1 here: alice\nbob: c\ncarol: d\n")
            read_to_end(sock)
            return
        greet(sock)
        asked.append(read_line(sock))
        sock.sendall(b"alice: go\nbob: a\n** bob b\n[from bob] p\n* bob sings\n")

    with pretended(talk) as port, opener("readline")(port, columns=80) as terminal:
        terminal.wait_for("* alice joined the chat")
        terminal.type("/ignore bob\r")
        terminal.wait_for("what bob says is not shown")
        terminal.type("go\r")
        terminal.wait_for("* bob sings")
        terminal.wait_for("carol: d")
        assert asked[0] == b"alice: go"
        assert asked[1].startswith(b"alice 6+1 ")
        text = terminal.screen.text()
        assert not any(line in text for line in ("bob: a", "** bob", "[from bob]", "bob: c"))
