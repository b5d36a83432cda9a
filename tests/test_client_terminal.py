"""The client on a terminal of both kinds: what stands on the screen, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat import DEADLINE, Peer, kick, no_leaks, run_chat, wait_until
from clients import ROOT, environment, greet, pretended, read_to_end
from proxy import GHOST, Proxy
from screens import CTRL_C, CTRL_D, KINDS, LEFT, UP, Open, assert_sane, enter, opener, prompts
from terminal import Screen, Terminal

import client
from protocol import Kind, Line
from server import ChatServer


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest) -> Open:
    """Open clients with prompt_toolkit, or without any package that is installed."""
    return opener(request.param)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An empty room."""
    with run_chat() as chat_server:
        yield chat_server


@pytest.fixture
def bob(server: ChatServer) -> Peer:
    """Somebody in the room."""
    return Peer(server.port).join("bob")


@pytest.fixture
def terminal(opened: Open, server: ChatServer, bob: Peer) -> Iterator[Terminal]:
    """A terminal of the usual size with alice's client, who is in the room and can type."""
    with opened(server.port) as terminal:
        enter(terminal, bob)
        yield terminal


# --- Coming and going ---------------------------------------------------------


def test_asks_for_the_name(opened: Open) -> None:
    """Without --name it asks for one, joins with it, and /quit leaves everything in order."""
    with run_chat() as server, opened(server.port, "--no-bell") as terminal:
        terminal.wait_for("Your name: ")
        terminal.type("alice\r")
        terminal.wait_for("-> Welcome, alice! You are the first one here")
        terminal.wait_for(prompts(""))
        terminal.type("/quit\r")
        assert terminal.wait() == 0
        assert terminal.screen.shows("-> bye")
        assert_sane(terminal)
        assert terminal.screen.unsupported == []


def asked(times: int) -> Callable[[Screen], bool]:
    """Return a condition: the name was asked for so many times."""
    return lambda screen: screen.text().count("Your name:") == times


def test_name_is_asked_for_again(opened: Open) -> None:
    """A malformed, reserved or taken name is asked for again, with the reason."""
    with run_chat() as server, opened(server.port, "--no-bell") as terminal:
        bob = Peer(server.port).join("bob")
        for count, (name, reason) in enumerate(
            [("9", "begins with a letter"), ("Server", "reserved"), ("bob", "bob is taken")]
        ):
            terminal.wait_for(asked(count + 1))
            terminal.type(f"{name}\r")
            terminal.wait_for(reason)
        terminal.wait_for(asked(4))
        terminal.type("alice\r")
        enter(terminal, bob)
        assert server.names == ["bob", "alice"]


@pytest.mark.parametrize(
    "keys", [(CTRL_C, CTRL_C), CTRL_D, "/quit\r", "/QUIT\r", "/quit now\r"], ids=repr
)
def test_keys_that_leave(terminal: Terminal, bob: Peer, keys: str | tuple[str, str]) -> None:
    """Ctrl-C twice or Ctrl-D on an empty line, and /quit, leave the room and a sane terminal."""
    terminal.type(keys[0] if isinstance(keys, tuple) else keys)
    if isinstance(keys, tuple):
        terminal.wait_for("-- Ctrl-C again, Ctrl-D or /quit leaves --")
        terminal.wait_for(prompts(""))
        terminal.type(keys[1])
    assert terminal.wait() == 0
    bob.expect("* alice left the chat")
    assert_sane(terminal)
    assert terminal.screen.cursor[1] == 0
    assert "Traceback" not in terminal.screen.text()


@pytest.mark.parametrize("keys", [CTRL_C, CTRL_D], ids=repr)
def test_keys_that_leave_while_asked(opened: Open, keys: str) -> None:
    """Who does not want to give a name can leave too."""
    with run_chat() as server, opened(server.port, "--no-bell") as terminal:
        terminal.wait_for("Your name: ")
        terminal.type(keys)
        assert terminal.wait() in (0, 1)
        assert_sane(terminal)
        assert "Traceback" not in terminal.screen.text()


def test_ctrl_c_clears_a_line(terminal: Terminal, bob: Peer) -> None:
    """Ctrl-C on a half-typed line throws it away and stays."""
    terminal.type("never mind")
    terminal.wait_for(prompts("never mind"))
    terminal.type(CTRL_C)
    terminal.wait_for(prompts(""))
    terminal.type("hello\r")
    bob.expect("alice: hello")
    assert "never mind" not in terminal.screen.text()


def test_killed(terminal: Terminal, bob: Peer) -> None:
    """SIGTERM on a half-typed line leaves the room and a sane terminal."""
    terminal.type("half a line")
    terminal.wait_for(prompts("half a line"))
    terminal.signal(signal.SIGTERM)
    assert terminal.wait() == 0
    bob.expect("* alice left the chat")
    assert_sane(terminal)
    assert "Traceback" not in terminal.screen.text()


# A client for which a number and Ctrl-T send it that signal from inside readline, which
# then waits for the next key without having looked.
SIGNALS_INSIDE = f"""
import ctypes, readline, sys
bind = ctypes.PyDLL(readline.__file__).rl_bind_keyseq
bind(b"\\\\C-t", getattr(ctypes.CDLL(None), "raise"))
sys.path.insert(0, {str(ROOT)!r})
import client
sys.exit(client.main())
"""
# A client that says that it begins to read its second line and its third, and does so only
# when a key has been pressed.
KEY_BEFORE = f"""
import builtins, itertools, select, sys
def late(prompt, read=input, numbers=itertools.count(1)):
    number = next(numbers)
    if number in (2, 3):
        print("line", number, flush=True)
        select.select([0], [], [])
    return read(prompt)
builtins.input = late
sys.path.insert(0, {str(ROOT)!r})
import client
sys.exit(client.main())
"""


# A client that Ctrl-C comes to at the very moment when it takes the lock by which those
# who show lines wait for each other.
INTERRUPTED_INSIDE = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import client
class Lock:
    def __init__(self, lock):
        self.acquire, self.release, self.times = lock.acquire, lock.release, 0
    def __enter__(self):
        self.acquire()
        if threading.current_thread() is threading.main_thread():
            self.times += 1
            if self.times == 3:
                os.kill(os.getpid(), signal.SIGINT)
    def __exit__(self, *_):
        self.release()
def init(self, *arguments, init=client.ReadlineTerminal.__init__):
    init(self, *arguments)
    self._shown._cond._lock = Lock(self._shown._cond._lock)
client.ReadlineTerminal.__init__ = init
sys.exit(client.main())
"""


# A client to which a signal comes at the very moment when it has taken the half-typed line off
# the screen, and when it has written above it what came.
SIGNAL_WHILE_SHOWING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import client
inside = False
def signal_once():
    global inside
    if not inside:
        inside = True
        os.kill(os.getpid(), signal.NUMBER)
        inside = False
def hide(self, hide=client._Readline.hide):
    hide(self)
    signal_once()
def unhide(self, prompt, unhide=client._Readline.unhide):
    unhide(self, prompt)
    signal_once()
def write(self, text, write=client.ReadlineTerminal._write):
    write(self, text)
    if text.endswith("\\n") and self._showing:
        signal_once()
client._Readline.hide, client._Readline.unhide = hide, unhide
client.ReadlineTerminal._write = write
sys.exit(client.main())
"""


@contextmanager
def altered(script: str, server: ChatServer) -> Iterator[Terminal]:
    """Open a client with readline that a script alters before it starts."""
    run = [sys.executable, "-S", "-c", script, "--port", str(server.port), "--name", "alice"]
    with Terminal(run, 14, 60, env=environment(INPUTRC=os.devnull)) as terminal:
        yield terminal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_signal_that_readline_did_not_wait_for(
    server: ChatServer, bob: Peer, number: signal.Signals
) -> None:
    """A signal that comes just before readline waits for a key ends the client too."""
    with altered(SIGNALS_INSIDE, server) as terminal:
        enter(terminal, bob)
        terminal.type(f"half a line\x1b{int(number)}\x14")
        assert terminal.wait() == 0
        bob.expect("* alice left the chat")
        assert_sane(terminal)


def test_ctrl_c_that_readline_did_not_wait_for(server: ChatServer, bob: Peer) -> None:
    """Ctrl-C that comes just before readline waits for a key clears the line too."""
    with altered(SIGNALS_INSIDE, server) as terminal:
        enter(terminal, bob)
        terminal.type("half a line")
        terminal.wait_for(prompts("half a line"))
        terminal.type(f"\x1b{int(signal.SIGINT)}\x14")
        terminal.wait_for(prompts(""))
        terminal.type("another\r")
        bob.expect("alice: another")


def test_ctrl_c_while_a_lock_is_taken(server: ChatServer, bob: Peer) -> None:
    """Ctrl-C at the worst moment leaves what comes after it to be shown."""
    with altered(INTERRUPTED_INSIDE, server) as terminal:
        bob.expect_eventually("* alice joined the chat")
        for number in range(5):
            bob.send(f"line {number}")
            terminal.wait_for(f"bob: line {number}")
        terminal.wait_for("-- Ctrl-C again, Ctrl-D or /quit leaves --")


def test_typed_before_the_prompt(server: ChatServer, bob: Peer) -> None:
    """What is typed just before readline takes the terminal is shown once, by readline."""
    with altered(KEY_BEFORE, server) as terminal:
        enter(terminal, bob)
        terminal.type("first\r")
        terminal.wait_for("line 2")
        terminal.type("second\r")
        terminal.wait_for("line 3")
        terminal.type("third\r")
        bob.expect("alice: first", "alice: second", "alice: third")
        terminal.wait_for("alice: third")
        for word in ("first", "second", "third"):
            assert terminal.screen.text().count(word) == 1


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_put_out(opened: Open, server: ChatServer, bob: Peer, disposition: signal.Handlers) -> None:
    """Who is kicked is told why and gets the shell back, also where SIGTERM is ignored."""
    inherited = signal.signal(signal.SIGTERM, disposition)
    try:
        with opened(server.port) as terminal:
            enter(terminal, bob)
            kick(server, "alice", "bob", "enough")
            assert terminal.wait() == 1
            assert_sane(terminal)
            assert "you were kicked by bob: enough" in terminal.screen.text()
    finally:
        signal.signal(signal.SIGTERM, inherited)


def test_window_closed(terminal: Terminal, bob: Peer) -> None:
    """Closing the window ends the program, and the room sees it leave."""
    terminal.hang_up()
    bob.expect("* alice left the chat")
    terminal.wait()


# --- Typing while others talk -------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="it shows in /proc that a signal was caught")
def test_signal_takes_nothing_that_readline_writes(server: ChatServer, bob: Peer) -> None:
    """Readline goes by what it wrote; what a signal keeps off the screen stays missing there."""
    with opener("readline")(server.port) as terminal:
        enter(terminal, bob)
        typed = ""
        for word in ("half ", "a ", "line ", "of ", "several ", "words"):
            terminal.hold()
            terminal.type(word)
            for _ in range(50):
                terminal.signal(client.KNOCK)
                wait_until(terminal.caught)
            terminal.hold(held=False)
            typed += word
            terminal.wait_for(prompts(typed))


def test_half_a_line_stays_whole(terminal: Terminal, bob: Peer) -> None:
    """What is half typed stands below what comes, once, with the cursor where it was."""
    terminal.type("half a line")
    terminal.wait_for(prompts("half a line"))
    bob.send(*(f"news {number}." for number in range(40)))
    terminal.wait_for("news 39.")
    terminal.wait_for(prompts("half a line"))
    terminal.type(LEFT * 5)
    terminal.wait_for(prompts("half a line", cursor=6))
    bob.send("more news")
    terminal.wait_for("more news")
    terminal.wait_for(prompts("half a line", cursor=6))
    text = terminal.screen.text()
    assert text.count("half") == 1
    shown = re.findall(r"^bob: (news \d+\.)$", text, re.MULTILINE)
    assert shown == [f"news {number}." for number in range(40)]
    terminal.type("\x7fX\r")
    bob.expect_eventually("alice: half X line")
    assert terminal.screen.unsupported == []


def test_half_a_line_over_several_rows(opened: Open, server: ChatServer, bob: Peer) -> None:
    """A half-typed line that wraps stays whole, also with the cursor in it."""
    half = "".join(f"{number:02} word " for number in range(14))
    with opened(server.port, columns=40) as terminal:
        enter(terminal, bob)
        terminal.type(half + "x")
        terminal.wait_for(prompts(half + "x", 40))
        bob.send(*(f"news {number}." for number in range(5)))
        terminal.wait_for("news 4.")
        terminal.wait_for(prompts(half + "x", 40))
        terminal.type(LEFT * 50)
        at = len(half) + 1 - 50
        terminal.wait_for(prompts(half + "x", 40, at))
        bob.send("more news")
        terminal.wait_for("more news")
        terminal.wait_for(prompts(half + "x", 40, at))
        assert terminal.screen.text().count("05 word") == 1
        assert terminal.screen.text().count("news 3.") == 1
        terminal.type("Y\r")
        bob.expect_eventually(f"alice: {half[:at]}Y{half[at:]}x")
        terminal.wait_for(prompts("", 40))


def test_half_a_line_when_the_window_is_resized(
    opened: Open, server: ChatServer, bob: Peer
) -> None:
    """After a resize what is half typed stands whole below what comes, and is sent whole."""
    with opened(server.port, columns=40) as terminal:
        enter(terminal, bob)
        terminal.type("a line that is half typed")
        terminal.wait_for(prompts("a line that is half typed", 40))
        for rows, columns in ((16, 70), (12, 36)):
            terminal.resize(rows, columns)
            terminal.settle()
            bob.send(f"seen at {columns}")
            terminal.wait_for(f"bob: seen at {columns}")
            terminal.wait_for(prompts("a line that is half typed", columns))
        terminal.type("!\r")
        bob.expect_eventually("alice: a line that is half typed!")


def test_half_a_line_of_two_rows_when_the_window_is_resized(
    opened: Open, server: ChatServer, bob: Peer
) -> None:
    """After each resize a half-typed line of several rows stands there once, and no old prompt."""
    half = "word one and word two and word three and the end"
    with opened(server.port, rows=24, columns=40) as terminal:
        enter(terminal, bob)
        terminal.type(half)
        terminal.wait_for(prompts(half, 40))
        for columns in (30, 25, 60, 100, 35):
            terminal.resize(24, columns)
            terminal.settle()
            bob.send(f"seen at {columns}")
            terminal.wait_for(f"bob: seen at {columns}")
            terminal.wait_for(prompts(half, columns))
        assert terminal.screen.text().count("alice>") == 1
        terminal.type("!\r")
        bob.expect_eventually(f"alice: {half}!")


@pytest.mark.parametrize("text", ["नमस्ते दुनिया", "வணக்கம் உலகம்", "สวัสดีชาวโลก", "👩‍👩‍👧 1️⃣"])
def test_half_a_line_in_any_script(opened: Open, text: str) -> None:
    """What others say puts no second prompt before a half-typed line, whatever its width is."""
    with (
        run_chat(fmt="utf-8") as server,
        opened(server.port, "--name", "alice", "--format", "utf-8") as terminal,
    ):
        bob = Peer(server.port).join("bob")
        terminal.wait_for("* bob joined the chat")
        for character in text:
            terminal.type(character)
        for number in range(5):
            terminal.settle()
            bob.send(f"news {number}")
            terminal.wait_for(f"bob: news {number}")
            terminal.settle()
            assert [row for row in terminal.screen.lines if "lice>" in row] == [f"alice> {text}"]
        terminal.type("!\r")
        bob.expect_eventually(f"alice: {text}!")


def test_keys_typed_while_lines_pour_in(terminal: Terminal, bob: Peer) -> None:
    """No key is lost or doubled while hundreds of lines arrive, and no line is."""
    words = [f"w{number}" for number in range(30)]
    for number, word in enumerate(words):
        bob.send(*(f"news {number}-{part}." for part in range(10)))
        terminal.type(word)
    terminal.type("\r")
    bob.expect_eventually("alice: " + "".join(words))
    terminal.wait_for("news 29-9.")
    terminal.wait_for(lambda screen: "alice:\nw0w1w2" in screen.text())
    terminal.wait_for(prompts(""))
    shown = re.findall(r"^bob: news (\d+-\d+)\.$", terminal.screen.text(), re.MULTILINE)
    assert shown == [f"{number}-{part}" for number in range(30) for part in range(10)]
    assert terminal.screen.unsupported == []


def test_sent_line_stands_once_and_comes_back_with_up(terminal: Terminal, bob: Peer) -> None:
    """What was sent stands on the screen as the room said it, once, and Up recalls it."""
    for text in ("hello", "words " * 20):
        terminal.type(f"{text}\r")
        bob.expect(f"alice: {text}")
        terminal.wait_for("alice: " + text[:40])
        terminal.wait_for(prompts(""))
        assert re.sub(r"\n( {4})?", " ", terminal.screen.text()).count(text.strip()) == 1
        assert "alice> " + text[:5] not in terminal.screen.text()
    terminal.type(UP + UP)
    terminal.wait_for(prompts("hello"))
    terminal.type("!\r")
    bob.expect("alice: hello!")


def complete(terminal: Terminal, typed: str, wanted: str) -> None:
    """Type the start of a word and have Tab complete it, the first that it offers."""
    terminal.type(typed + "\t")
    stem = typed.rpartition(" ")[0]
    done = f"alice> {stem} {wanted}" if stem else f"alice> {wanted}"
    menu = re.compile(rf"^alice> {re.escape(typed)}\n +\S+", re.MULTILINE)
    terminal.wait_for(lambda screen: done in screen.lines or bool(menu.search(screen.text())))
    if done not in terminal.screen.lines:  # a menu: the next Tab takes its first line
        terminal.type("\t")
        terminal.wait_for(lambda screen: done in screen.lines)


def test_tab_completes(opened: Open) -> None:
    """Tab completes commands, and names: who spoke last comes first, oneself never."""
    with run_chat() as server, opened(server.port) as terminal:
        bea, bob = Peer(server.port).join("bea"), Peer(server.port).join("bob")
        enter(terminal, bob)
        complete(terminal, "/hel", "/help")
        terminal.type("\x15")
        terminal.wait_for(prompts(""))
        for number, (peer, name) in enumerate(((bea, "bea"), (bob, "bob"), (bea, "bea"))):
            peer.send(f"me {number}")
            bob.expect_eventually(f"{name}: me {number}")
            terminal.wait_for(f"{name}: me {number}")
            terminal.wait_for(prompts(""))
            complete(terminal, "b", f"{name}:")
            terminal.type("hi\r")
            bob.expect(f"alice: {name}: hi")
            terminal.wait_for(prompts(""))
        complete(terminal, "/msg be", "bea")
        terminal.type("psst\r")
        bea.expect_eventually("[from alice] psst")


def test_tab_knows_who_spoke_before(opened: Open) -> None:
    """To a newcomer, who spoke last in what it was shown comes first."""
    with run_chat() as server:
        ben, bea = Peer(server.port).join("ben"), Peer(server.port).join("bea")
        ben.send("first")
        bea.expect_eventually("ben: first")
        bea.send("last")
        bea.expect("bea: last")
        with opened(server.port) as terminal:
            enter(terminal, bea)
            complete(terminal, "be", "bea:")


def test_paste_of_several_lines(terminal: Terminal, bob: Peer) -> None:
    """Pasted lines are said as so many lines, once each, and leave the screen in order."""
    terminal.paste("one\ntwo two\nthree")
    terminal.wait_for("three")
    terminal.type("\r")
    bob.expect("alice: one", "alice: two two", "alice: three")
    terminal.wait_for("alice: three")
    terminal.wait_for(prompts(""))
    shown = re.findall("^alice: .*", terminal.screen.text(), re.MULTILINE)
    assert shown == ["alice: one", "alice: two two", "alice: three"]
    for text in ("one", "two two", "three"):
        assert len(re.findall(rf"\b{text}$", terminal.screen.text(), re.MULTILINE)) == 1
    assert terminal.screen.unsupported == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [("grüße", "ASCII"), ("x" * 1000, "at most 997 bytes")],
    ids=["format", "length"],
)
def test_line_that_cannot_be_sent_comes_back(
    opened: Open, server: ChatServer, bob: Peer, line: str, reason: str
) -> None:
    """What the room cannot carry stands in the prompt again, with the reason above it."""
    with opened(server.port, rows=40, columns=80) as terminal:
        enter(terminal, bob)
        terminal.type(f"{line}\r")
        terminal.wait_for(reason)
        terminal.wait_for(prompts(line, 80))
        terminal.type("\x7f" * 5 + "ok\r")
        if line == "grüße":
            bob.expect("alice: ok")
            terminal.wait_for(prompts("", 80))
            return
        bob.expect("alice: " + "x" * 995 + "ok")


def test_line_that_the_server_refuses_comes_back(opened: Open) -> None:
    """What the server refuses is told, and stands in the prompt again at once."""
    waiting = threading.Event()

    def refuse(sock: socket.socket) -> None:
        greet(sock, b"* bob joined the chat\n")
        while b"hello" not in sock.recv(4096):
            pass
        assert waiting.wait(DEADLINE)
        sock.sendall(b"-> not sent: this room is read-only\n")
        read_to_end(sock)

    with pretended(refuse) as port, opened(port) as terminal:
        terminal.wait_for("* bob joined the chat")
        terminal.wait_for(prompts(""))
        terminal.type("hello")
        terminal.wait_for(prompts("hello"))
        terminal.type("\r")
        terminal.wait_for(prompts(""))
        waiting.set()
        terminal.wait_for("not sent: this room is read-only")
        terminal.wait_for("the last line was not sent")
        terminal.wait_for(prompts("hello"))
        terminal.type(CTRL_C)
        terminal.wait_for(prompts(""))
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


def test_prompt_stands_once(terminal: Terminal, bob: Peer) -> None:
    """A line that comes at the moment when a prompt appears leaves one prompt, not two."""
    for number in range(40):
        terminal.type("\r")
        bob.send(f"at once {number}", f"and again {number}")
        terminal.wait_for(f"bob: and again {number}")
        terminal.wait_for(prompts(""))
    assert "alice> alice>" not in terminal.screen.text()


def test_answer_has_a_row_of_its_own(terminal: Terminal) -> None:
    """An answer that comes just when the next prompt appears does not stand behind it."""
    for number in range(40):
        terminal.type("/bans\r")
        terminal.wait_for(lambda s, n=number: s.text().count("only operators") > n)  # type: ignore[misc]
    assert not re.search("alice> .*only operators", terminal.screen.text())


@pytest.mark.parametrize("kind", ["readline"])
def test_line_that_scrolls_sideways(
    kind: str, server: ChatServer, bob: Peer, tmp_path: Path
) -> None:
    """Where readline keeps a long line on one row, Enter takes that row and no other."""
    inputrc = tmp_path / "inputrc"
    inputrc.write_text("set horizontal-scroll-mode on\n")
    with opener(kind)(server.port, INPUTRC=str(inputrc)) as terminal:
        enter(terminal, bob)
        bob.send(*(f"news {number}." for number in range(5)))
        terminal.wait_for("bob: news 4.")
        terminal.type("word " * 40)
        terminal.settle()
        terminal.type("\r")
        bob.expect_eventually("alice: " + "word " * 40)
        terminal.wait_for("alice: word")
        for number in range(5):
            assert f"bob: news {number}." in terminal.screen.text().split("\n")


def test_suspended_terminal_goes_on(terminal: Terminal, bob: Peer) -> None:
    """Stopped and continued, it shows what came meanwhile and keeps what was half typed."""
    terminal.type("half")
    terminal.wait_for(prompts("half"))
    terminal.signal(signal.SIGSTOP)
    bob.send("are you there?")
    bob.expect("bob: are you there?")
    terminal.signal(signal.SIGCONT)
    terminal.wait_for("bob: are you there?")
    terminal.wait_for(prompts("half"))


@pytest.mark.parametrize("number", ["SIGTSTP", "SIGCONT", "SIGWINCH"])
def test_line_that_comes_as_it_is_continued(server: ChatServer, bob: Peer, number: str) -> None:
    """Stopped or continued at any moment of showing a line, it shows each on its own row, once."""
    with altered(SIGNAL_WHILE_SHOWING.replace("NUMBER", number), server) as terminal:
        enter(terminal, bob)
        terminal.type("half")
        terminal.wait_for(prompts("half"))
        for count in range(3):
            bob.send(f"news {count}")
            terminal.wait_for(f"bob: news {count}")
            terminal.wait_for(prompts("half"))
        assert [line for line in terminal.screen.lines if "news" in line] == [
            f"bob: news {count}" for count in range(3)
        ]
        assert sum("half" in line for line in terminal.screen.lines) == 1


class PlainTerminal(client.ReadlineTerminal):
    """A terminal without readline, as on Windows, that keeps what would stand on its screen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client, "_import_readline", lambda: None)
        super().__init__(client.Look())
        self.written: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None  # done once, while a line is written

    def _take_terminal(self) -> None:
        pass

    def _render(self, item: Line | client.Notice) -> str:
        return str(item)

    def _write(self, text: str) -> None:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        self.written.append(text)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainTerminal]:
    """A terminal without readline."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield PlainTerminal(monkeypatch)
    finally:
        signal.signal(signal.SIGINT, handler)


def show(screen: client.Screen, text: str, seconds: float = DEADLINE) -> threading.Thread:
    """Show a line of bob's from another thread, which may take longer than so many seconds."""
    item = Line(Kind.SAID, "bob", text)
    thread = threading.Thread(target=screen.show, args=[item])
    thread.start()
    thread.join(seconds)
    return thread


def test_line_that_comes_while_another_is_shown_without_readline(
    plain: PlainTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited for an answer and what comes just then is shown, each once and in order."""
    threads = []

    def answer(question: str) -> str:
        show(plain, "first")
        assert plain.written == []
        plain.meanwhile = lambda: threads.append(show(plain, "second", 0.2))
        return "yes"

    monkeypatch.setattr("builtins.input", answer)
    assert plain.ask("Sure? ") == "yes"
    for thread in threads:
        thread.join(DEADLINE)
    assert plain.written == ["bob: first\n", "bob: second\n"]


def test_prompt_stands_below_what_comes_without_readline(
    plain: PlainTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a line is typed its prompt is written again, and only then."""

    def type_line(prompt: str) -> str:
        show(plain, "while typing")
        return "hello"

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(plain, "_erase", lambda typed: None)
    assert plain.read() == "hello"
    show(plain, "afterwards")
    assert plain.written == ["\r\x1b[Kbob: while typing\n> ", "bob: afterwards\n"]


# --- How it looks --------------------------------------------------------------


def test_names_have_colours(opened: Open) -> None:
    """A name keeps its colour; a mention and a private line stand out, and ring."""
    with run_chat() as server, opened(server.port, rows=20) as terminal:
        bob, carol = Peer(server.port).join("bob"), Peer(server.port).join("carol")
        enter(terminal, carol)
        bob.send("plain words")
        terminal.wait_for("bob: plain words")
        bob.send("/me acts")
        terminal.wait_for("** bob acts")
        terminal.settle()
        colour = terminal.screen.style_of("bob: plain words")
        assert colour.startswith("38;5;")
        assert terminal.screen.style_of("bob acts") == colour
        assert terminal.screen.style_of("plain words") == ""
        carol.send("malice is no mention")
        terminal.wait_for("carol: malice")
        assert terminal.screen.style_of("carol: malice") not in ("", colour)
        assert terminal.screen.bells == 0
        carol.send("look, ALICE!")
        terminal.wait_for("carol: look, ALICE!")
        terminal.wait_for(lambda screen: screen.bells == 1)
        assert terminal.screen.style_of("ALICE!") == "1;7"
        carol.send("/msg alice psst")
        terminal.wait_for("[from carol] psst")
        terminal.wait_for(lambda screen: screen.bells == 2)
        assert terminal.screen.style_of("[from carol]") == "1;38;5;133"
        terminal.type("I am alice\r")
        terminal.wait_for("alice: I am alice")
        terminal.settle()
        assert terminal.screen.style_of("alice: I am") == "1"
        assert terminal.screen.bells == 2
        assert terminal.screen.unsupported == []


@pytest.mark.parametrize("how", ["--no-color", "NO_COLOR"])
def test_no_colour(opened: Open, server: ChatServer, bob: Peer, how: str) -> None:
    """--no-color and the variable NO_COLOR leave all as plain text, and the bell."""
    options = ("--name", "alice", *(["--no-color"] if how == "--no-color" else []))
    unset = "1" if how == "NO_COLOR" else ""
    with opened(server.port, *options, NO_COLOR=unset) as terminal:
        enter(terminal, bob)
        terminal.type("ready\r")  # what comes before it may be of the replay, without a bell
        terminal.wait_for("alice: ready")
        bob.send("look, alice")
        terminal.wait_for("bob: look, alice")
        terminal.wait_for(lambda screen: screen.bells == 1)
        assert [terminal.screen.style_of(text) for text in ("bob: look", "alice")] == ["", ""]


def test_timestamps_and_no_bell(opened: Open) -> None:
    """--timestamps puts the time before each line; --no-bell keeps quiet."""
    with (
        run_chat() as server,
        opened(server.port, "--name", "alice", "--timestamps", "--no-bell") as terminal,
    ):
        bob = Peer(server.port).join("bob")
        enter(terminal, bob)
        bob.send("look, alice", "/msg alice psst", "end")
        terminal.wait_for("bob: end")
        terminal.settle()
        text = terminal.screen.text()
        assert re.search(r"^\d\d:\d\d bob: look, alice$", text, re.MULTILINE)
        assert re.search(r"^\d\d:\d\d \[from bob\] psst$", text, re.MULTILINE)
        assert terminal.screen.bells == 0


def test_old_mentions_are_quiet(opened: Open) -> None:
    """What was said before one came rings no bell."""
    with run_chat() as server:
        bob = Peer(server.port).join("bob")
        bob.send("where is alice?")
        bob.expect("bob: where is alice?")
        with opened(server.port) as terminal:
            enter(terminal, bob)
            terminal.wait_for("bob: where is alice?")
            terminal.settle()
            assert terminal.screen.bells == 0


def test_hostile_server_moves_nothing(opened: Open) -> None:
    """Escape sequences from a server stand there as text: nothing is cleared, titled or rung."""

    def talk(sock: socket.socket) -> None:
        greet(
            sock,
            b"mallory: \x1b[2J\x1b[H\x1b]0;owned\x07\n",
            b"[from mallory] \x9b2J\x08\x08\x0d\x0b\n",
            b"* \x1b[?1049h\n",
            b"mallory: end\n",
        )
        read_to_end(sock)

    with pretended(talk) as port, opened(port, "--name", "alice", "--no-bell") as terminal:
        terminal.wait_for("mallory: end")
        terminal.wait_for(prompts(""))
        assert terminal.screen.shows(r"mallory: \x1b[2J\x1b[H\x1b]0;owned\x07")
        assert terminal.screen.shows(r"[from mallory] \x9b2J\x08\x08\r\x0b")
        assert terminal.screen.shows(r"* \x1b[?1049h")
        assert terminal.screen.shows("-> Welcome, alice!")
        assert (terminal.screen.bells, terminal.screen.unsupported) == (0, [])
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


def test_connection_lost_and_back(opened: Open) -> None:
    """The user sees that the connection is lost, goes on typing, and sees what was missed."""
    with (
        run_chat() as server,
        Proxy(server.port) as proxy,
        opened(proxy.port) as terminal,
    ):
        bob = Peer(server.port).join("bob")
        enter(terminal, bob)
        terminal.type("half")
        terminal.wait_for(prompts("half"))
        proxy.go_away(GHOST)
        terminal.wait_for("-- connection lost; trying again --")
        terminal.wait_for(prompts("half"))
        bob.send("missed this")
        bob.expect("bob: missed this")
        terminal.type(" a line\r")
        terminal.wait_for("to be sent when we are back: half a line")
        proxy.come_back()
        bob.expect("alice: half a line")
        terminal.wait_for("alice: half a line")
        text = terminal.screen.text()
        assert re.search(r"-- back after \d+ s, 1 line missed --\nbob: missed this\n", text)
        assert text.count("alice: half a line") == 1
        terminal.wait_for(prompts(""))


def test_status_line() -> None:
    """With prompt_toolkit a status line tells name, address and the state of the connection."""
    pytest.importorskip("prompt_toolkit")
    command = [sys.executable, str(ROOT / "client.py"), "--name", "alice", "--port"]
    with (
        run_chat() as server,
        Proxy(server.port) as proxy,
        Terminal([*command, str(proxy.port)], 14, 60, env=environment()) as terminal,
    ):
        terminal.wait_for(f"alice on 127.0.0.1:{proxy.port}, connected")
        proxy.go_away()
        terminal.wait_for(f"alice on 127.0.0.1:{proxy.port}, next try in")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


def test_all_refused_lines_of_a_paste_come_back(terminal: Terminal, bob: Peer) -> None:
    """Of a paste the lines that can be said are said, and all others come back for editing."""
    terminal.paste("grün\nfine\nblaß")
    terminal.wait_for("blaß")
    terminal.type("\r")
    bob.expect("alice: fine")
    terminal.wait_for("alice> grün")
    terminal.wait_for("blaß")


def test_question_for_the_operator_password_can_be_taken_back(opened: Open) -> None:
    """Ctrl-D instead of a password goes back to the conversation."""
    with run_chat(op_password="secret") as server, opened(server.port) as terminal:
        bob = Peer(server.port).join("bob")
        enter(terminal, bob)
        terminal.type("/op\r")
        terminal.wait_for("Operator password: ")
        terminal.type("\x04")
        terminal.wait_for("no password was given")
        terminal.wait_for(prompts(""))
        terminal.type("still here\r")
        bob.expect("alice: still here")


def test_ctrl_c_among_pouring_lines(terminal: Terminal, bob: Peer) -> None:
    """Clearing the line again and again while lines pour in stops neither of them."""
    for number in range(20):
        bob.send(*(f"{number} {line}" for line in range(20)))
        terminal.type("abc")
        terminal.wait_for(prompts("abc"))
        terminal.type("\x03")
        terminal.wait_for(prompts(""))
    bob.send("the end")
    terminal.wait_for("bob: the end")
    terminal.type("\x04")
    assert terminal.wait() == 0
