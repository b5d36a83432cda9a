"""The wire's tables, byte by byte, through a server and its sockets."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator

import pytest
from chat import Peer, pair, run_chat
from terminal import Terminal

import protocol
from protocol import MAX_LINE, MAX_UNFRAMED
from server import ChatServer

REFUSED = "-> not sent: only printable ASCII characters can be sent here"
TOO_LONG = "-> not sent: a line has at most 1023 bytes; send it in parts"


@pytest.fixture
def room() -> Iterator[ChatServer]:
    """An empty room."""
    with run_chat() as server:
        yield server


@pytest.fixture
def alice(room: ChatServer) -> Iterator[Peer]:
    """Somebody who is alone in the room, and has got every line when she leaves."""
    peer = Peer(room.port).join("alice")
    yield peer
    peer.send("/quit")
    peer.expect("-> bye")
    peer.expect_closed()


def answers(sent: bytes) -> list[str]:
    """Return what alice gets who sends these bytes, by the design's table."""
    lines = []
    for line in sent.split(b"\n")[:-1]:
        line = line.removesuffix(b"\r")
        text = line.decode("latin-1").replace("\t", " ")
        if len(line) >= MAX_LINE:
            lines.append(TOO_LONG)
        elif any(not 0x20 <= ord(character) <= 0x7E for character in text):
            lines.append(REFUSED)
        elif text.startswith("/"):
            lines.append(f"-> there is no {text}; /help lists the commands")
        elif text.strip():
            lines.append(f"alice: {text}")
    return lines


def with_byte(value: int, place: str) -> bytes:
    """Return a line that has a byte at a place."""
    byte = bytes([value])
    return {"start": byte + b"me", "middle": b"m" + byte + b"e", "end": b"me" + byte}[place] + b"\n"


# --- Each of the 256 bytes ---------------------------------------------------


@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("way", ["whole", "byte by byte", "glued"])
def test_each_byte_is_said_or_refused(alice: Peer, place: str, way: str) -> None:
    """A line with any byte anywhere is broadcast unaltered or refused in its place."""
    lines = [with_byte(value, place) for value in range(256) if chr(value) != "/"]
    if way == "glued":
        alice.send_raw(b"".join(lines))
    for line in lines if way == "whole" else ():
        alice.send_raw(line)
    for line in lines if way == "byte by byte" else ():
        alice.send_slowly(line)
    alice.expect(*answers(b"".join(lines)))
    alice.expect_nothing()


@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("value", [9, 10, 13, 128])
def test_a_byte_is_the_same_alone_in_its_packet(alice: Peer, value: int, place: str) -> None:
    """A line that comes in two pieces, read apart by the server, is the line."""
    line = with_byte(value, place)
    for cut in range(1, len(line)):
        alice.send_raw(b"/is-it-re" + b"ad\n" + line[:cut])
        lines = ["-> there is no /is-it-read; /help lists the commands"]
        lines += answers(line[: line[:cut].rfind(b"\n") + 1])
        alice.expect(*lines)
        alice.send_raw(line[cut:])
        alice.expect(*answers(line[line[:cut].rfind(b"\n") + 1 :]))
    alice.expect_nothing()


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_no_byte_makes_a_name_of_a_bad_one(room: ChatServer, place: str) -> None:
    """An answer with a byte that no name has is refused, and the name asked for again."""
    good = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    good += b"" if place == "start" else b"0123456789-_"
    harmless = b"\n" + (b"" if place == "middle" else b" \t")  # around a name they do not count
    harmless += b"\r" if place == "end" else b""
    for value in range(256):
        if value in good + harmless:
            continue
        peer = Peer(room.port)
        peer.expect("NICK")
        peer.send_raw(with_byte(value, place))
        peer.expect_match("-> .*")
        peer.expect("NICK")
        peer.close()


# --- Lines -------------------------------------------------------------------


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_lines_may_end_as_on_any_system(alice: Peer, ending: bytes) -> None:
    """A carriage return before the newline is dropped."""
    alice.send_raw(b"one" + ending + b"two" + ending)
    alice.expect("alice: one", "alice: two")
    alice.expect_nothing()


def test_only_one_carriage_return_is_dropped(alice: Peer) -> None:
    """Two carriage returns before the newline are one too many."""
    alice.send_raw(b"one\r\r\n\r\r\n")
    alice.expect(REFUSED, REFUSED)
    alice.expect_nothing()


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b" \n", b"\t \r\n", b"\n\n\n"])
def test_blank_lines_are_nothing(alice: Peer, blank: bytes) -> None:
    """A line of nothing but spaces is neither said nor refused."""
    alice.send_raw(blank + b"hello\n" + blank)
    alice.expect("alice: hello")
    alice.send_raw(b"alice:" + blank)
    alice.expect_nothing()


def test_other_separators_do_not_end_a_line(alice: Peer) -> None:
    """What `str.splitlines` would split on makes no second line."""
    for separator in b"\x0b\x0c\x1c\x1d\x1e\x85":
        alice.send_raw(b"one" + bytes([separator]) + b"bob: two\n")
        alice.expect(REFUSED)
    alice.expect_nothing()


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_the_longest_line_is_said(alice: Peer, ending: bytes) -> None:
    """A line of 1024 bytes with its newline is broadcast whole."""
    alice.send_raw(b"x" * (MAX_LINE - 1) + ending)
    alice.expect(f"alice: {'x' * (MAX_LINE - 1)}")


@pytest.mark.parametrize("length", [MAX_LINE, MAX_LINE + 1, 5000, MAX_UNFRAMED - 1])
def test_an_overlong_line_is_refused_and_the_connection_kept(alice: Peer, length: int) -> None:
    """A line too long is thrown away up to its newline, in its place, and nothing else is."""
    alice.send_raw(b"before\n" + b"x" * length + b"\nafter\n")
    alice.expect("alice: before", TOO_LONG, "alice: after")
    alice.expect_nothing()


def test_every_line_fits_the_limit_of_the_server(room: ChatServer) -> None:
    """The longest things that can be said and asked come back in lines of at most 1152 bytes."""
    names = ["a" * 24, "b" * 24]
    one, other = (Peer(room.port).join(name) for name in names)
    for start in ("", "/me ", f"/msg {names[1]} ", "/search ", "/nick ", "/msg ", "/x"):
        one.send(start + "y" * (MAX_LINE - 1 - len(start)))
    one.send("/msg " + "y" * (MAX_LINE - 8) + " x", "/history 5", "/quit")
    other.send("/quit")
    for line in one.rest() + other.rest():
        assert len(line) < protocol.MAX_SERVER_LINE


def test_64_kib_without_a_newline_close_the_connection(room: ChatServer) -> None:
    """Who sends 64 KiB without a newline is told so and let go; what was said before counts."""
    bob = Peer(room.port).join("bob")
    carol = Peer(room.port).join("carol")
    bob.expect("* carol joined the chat")
    bob.send_raw(b"before\n" + b"x" * MAX_UNFRAMED)
    bob.expect("bob: before", protocol.UNFRAMED)
    bob.expect_closed()
    carol.expect("bob: before", "* bob left the chat")
    carol.send("/quit")
    carol.expect("-> bye")


def test_64_kib_instead_of_a_name_close_the_connection(room: ChatServer) -> None:
    """The same holds before there is a name."""
    peer = Peer(room.port)
    peer.send_raw(b"x" * MAX_UNFRAMED)
    peer.expect("NICK", protocol.UNFRAMED)
    peer.expect_closed()


# --- The answer to NICK ------------------------------------------------------


def test_a_name_may_come_in_pieces(room: ChatServer) -> None:
    """A name is read when its newline comes, however many pieces it comes in."""
    peer = Peer(room.port)
    peer.expect("NICK")
    peer.send_slowly(b"pieces\r\n")
    peer.expect_eventually("* pieces joined the chat")


def test_name_and_text_may_come_at_once(room: ChatServer) -> None:
    """Everything may be sent before anything was asked, as `printf … | nc` does."""
    peer = Peer(room.port).send_raw(b"printf\nhello\nprintf: again\n").end_input()
    peer.expect("NICK")
    peer.expect_eventually("* printf joined the chat")
    peer.expect("printf: hello", "printf: again")
    peer.expect_closed()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "-> a name cannot be empty; choose one"),
        ("1alice", "-> a name is one word of at most 24 letters, .*; choose another"),
        ("a" * 25, "-> a name is one word of at most 24 letters, .*; choose another"),
        ("server", '-> the name "server" is reserved; choose another'),
        ("SerVer -20", '-> the name "SerVer" is reserved; choose another'),
        ("alice bob", "-> answer with NAME, NAME FROM or NAME FROM KEY; .*"),
        ("alice -20 xyz", "-> answer with NAME, NAME FROM or NAME FROM KEY; .*"),
        ("x" * 2000, "-> a line has at most 1023 bytes; .*"),
        ("al\x1bice", "-> only printable ASCII characters .*"),
    ],
)
def test_a_bad_name_is_refused_and_asked_for_again(
    room: ChatServer, answer: str, reason: str
) -> None:
    """A refusal says what is wrong; there are three tries, and the third may be good."""
    peer = Peer(room.port)
    for _ in range(2):
        peer.introduce(answer)
        peer.expect_match(reason)
    peer.introduce("third")
    peer.expect_eventually("* third joined the chat")
    peer.send("/quit")
    peer.expect("-> bye")
    peer.expect_closed()


def test_the_third_bad_name_is_the_last(room: ChatServer) -> None:
    """After three refusals the connection is closed with a word."""
    peer = Peer(room.port)
    for _ in range(3):
        peer.introduce("server")
        peer.expect('-> the name "server" is reserved; choose another')
    peer.expect(protocol.NO_MORE_TRIES)
    peer.expect_closed()


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (bytes.fromhex("16030100f8010000f40303") + bytes(range(200)), "TLS"),
        (b"GET / HTTP/1.1\r\nHost: localhost:55555\r\nAccept: */*\r\n\r\n", "HTTP"),
        (b"POST /chat HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello", "HTTP"),
        (b"SSH-2.0-OpenSSH_9.6p1\r\n", "SSH"),
    ],
)
@pytest.mark.parametrize("slowly", [False, True])
def test_another_protocol_gets_one_line(
    room: ChatServer, start: bytes, name: str, slowly: bool
) -> None:
    """What plainly speaks another protocol is told so in one line and let go."""
    peer = Peer(room.port)
    if slowly:
        peer.send_slowly(start[:20])
        peer.send_raw(start[20:])
    else:
        peer.send_raw(start)
    peer.expect("NICK", protocol.FOREIGN[name])
    peer.expect_closed()


def test_a_text_like_another_protocol_is_a_text(alice: Peer) -> None:
    """Once in the room, anything printable may be said."""
    alice.send("GET / HTTP/1.1", "SSH-2.0-OpenSSH")
    alice.expect("alice: GET / HTTP/1.1", "alice: SSH-2.0-OpenSSH")


# --- Telnet ------------------------------------------------------------------

CTRL_C = b"\xff\xf4\xff\xfd\x06"  # Interrupt Process, and: tell me when you are there
SYNCH = b"\xff\xf2"  # a data mark, of which the last byte is urgent
BEGIN = bytes.fromhex("fffd03 fffb18 fffb1f fffb20 fffb21 fffb22 fffb27 fffd05")  # Linux's telnet


def test_ctrl_c_in_telnet_leaves_it_talking(alice: Peer) -> None:
    """What telnet sends for Ctrl-C is answered as it asks, and the next line is said."""
    for text in "hello", "again":
        alice.send_raw(CTRL_C)
        assert alice.take(3) == b"\xff\xfc\x06"
        alice.send_raw(f"{text}\r\n".encode())
        alice.expect(f"alice: {text}")


def test_what_telnet_sends_as_urgent_takes_no_letter(alice: Peer) -> None:
    """Telnet's Synch, whose last byte comes out of band, leaves every line as it was."""
    alice.send_raw(b"before\r\n\xff\xf4\xff")
    alice.sock.send(SYNCH[1:], socket.MSG_OOB)
    alice.send_raw(b"\xff\xfd\x06")
    alice.expect("alice: before")
    assert alice.take(3) == b"\xff\xfc\x06"
    alice.send_raw(b"hello\r\n")
    alice.expect("alice: hello")


def test_telnet_may_negotiate_before_there_is_a_name(room: ChatServer) -> None:
    """What telnet asks at the start costs no try at the name, and each question one answer."""
    peer = Peer(room.port)
    peer.expect("NICK")
    peer.send_raw(BEGIN + b"\xff\xfa\x18\x00xterm\xff\xf0")
    refusals = "fffc03 fffe18 fffe1f fffe20 fffe21 fffe22 fffe27 fffc05"
    assert peer.take(24) == bytes.fromhex(refusals)
    for _ in range(2):
        peer.send_raw(b"server\r\n")
        peer.expect('-> the name "server" is reserved; choose another', "NICK")
    peer.send_raw(b"ali" + CTRL_C + b"ce\r\n")
    assert peer.take(3) == b"\xff\xfc\x06"
    peer.expect_eventually("* alice joined the chat")


def test_telnet_that_asks_without_end_is_answered_for_a_while(alice: Peer) -> None:
    """Two ends that answer each other do not do so for ever."""
    alice.send_raw(b"\xff\xfd\x01" * 1000 + b"hello\n")
    assert alice.take(3 * 32 + 13) == b"\xff\xfc\x01" * 32 + b"alice: hello\n"


@pytest.mark.parametrize("line", [b"caf\xff\xe9", b"\xff\xff", b"\xffhello"])
def test_what_is_nothing_of_telnets_has_its_line_refused(alice: Peer, line: bytes) -> None:
    """A byte that telnet begins its commands with, before anything else, is not printable."""
    alice.send_raw(line + b"\n")
    alice.expect(REFUSED)
    alice.expect_nothing()


def test_the_real_telnet_goes_on_after_an_interrupt(room: ChatServer) -> None:
    """A person with telnet gives a name, says something, interrupts, and says more."""
    program = shutil.which("telnet")
    if program is None:
        pytest.skip("telnet is not installed")
    bob = Peer(room.port).join("bob")
    with Terminal([program, "127.0.0.1", str(room.port)]) as telnet:
        telnet.wait_for("NICK")
        telnet.type("alice\r")
        bob.expect("* alice joined the chat")
        for text in "hello", "again":
            telnet.type(f"{text}\r")
            bob.expect(f"alice: {text}")
            telnet.wait_for(f"alice: {text}")
            telnet.type("\x03")
        telnet.type("/quit\r")
        bob.expect("* alice left the chat")


# --- Who says what -----------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["bob: hi", "** bob waves", "* bob joined the chat", "[from bob] psst", "-> bye", "NICK"],
)
def test_nobody_can_produce_the_line_of_another(alice: Peer, text: str) -> None:
    """Whatever somebody says stands behind the own name."""
    alice.send(text, f"alice: {text}", f"/me {text}", f"//{text}")
    alice.expect(
        f"alice: {text}",
        f"alice: {text}",
        f"** alice {text}",
        f"alice: /{text}",
    )
    alice.expect_nothing()


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("std", "std::move is a cast", "std: std::move is a cast"),
        ("std", "std: std::move is a cast", "std: std::move is a cast"),
        ("std", "STD: hello", "std: hello"),
        ("std", "std:hello", "std: std:hello"),
        ("std", "std hello", "std: std hello"),
        ("std", "std: std: hello", "std: std: hello"),
        ("C", "C:/temp is full", "C: C:/temp is full"),
        ("C", "c:/temp is full", "C: c:/temp is full"),
        ("C", "C: C:/temp is full", "C: C:/temp is full"),
        ("C", "C: //temp is full", "C: /temp is full"),
        ("C", "C: /temp is full", "-> there is no /temp; /help lists the commands"),
    ],
)
@pytest.mark.parametrize("fmt", ["ascii", "utf-8"])
def test_only_the_own_name_is_taken_off(name: str, line: str, said: str, fmt: str) -> None:
    """The name with colon and blank before a line is the classic's; all else is text."""
    with run_chat(fmt=fmt) as server:
        peer = Peer(server.port).join(name)
        peer.send(line, "/quit")
        assert peer.rest() == [said, "-> bye"]


SLIP = "-> not sent: begin the line with the slash, or with // to say it"


@pytest.mark.parametrize("start", [" ", "   ", "\t", "alice:  ", "alice: \t"])
@pytest.mark.parametrize(
    "command", ["/op secret", "/msg bob secret", "/r secret", "/MSG bob secret", "/me", "/quit"]
)
def test_a_command_behind_blanks_is_held_back(room: ChatServer, start: str, command: str) -> None:
    """What was meant for one alone is neither said nor kept, and its author hears the remedy."""
    alice, bob = pair(room.port)
    alice.send(f"{start}{command}")
    alice.expect(SLIP)
    alice.expect_nothing()
    bob.expect_nothing()
    assert not [line for _, line in room.history.last(10) if "alice:" in line]


@pytest.mark.parametrize("line", [" /bin/sh: not found", " //op secret", " / or", "see /op"])
def test_another_slash_behind_blanks_is_text(alice: Peer, line: str) -> None:
    """A path, two slashes and a slash amid the line are said as they are."""
    alice.send(line)
    alice.expect(f"alice: {line}")


def test_blanks_of_every_kind_hide_no_command() -> None:
    """Under UTF-8 a blank that is wider, or no letter at all, does not make a command a text."""
    with run_chat(fmt="utf-8") as server:
        alice, bob = pair(server.port)
        for blank in "\u00a0\u3000\u2003":
            alice.send(f"{blank}/msg bob secret")
            alice.expect(SLIP)
        bob.expect_nothing()


EMPTY = "-> not sent: the line would look empty; write something that can be seen"


@pytest.mark.parametrize(
    "blank", ["\u2800", "\u3164", "\u115f", "\uffa0", "\u00a0", "\u3000", "\ufe0f", "\u0301"]
)
def test_no_line_looks_empty(blank: str) -> None:
    """Fillers, odd blanks and lone marks are refused, said, done or whispered."""
    with run_chat(fmt="utf-8") as server:
        alice, bob = pair(server.port)
        alice.send(blank, f"alice: {blank * 3}", f"{blank} {blank}")
        alice.expect(EMPTY, EMPTY, EMPTY)
        alice.send(f"/me {blank}", f"/msg bob {blank}")
        alice.expect_match("-> (usage: /me|not sent: ).*")
        alice.expect_match("-> (usage: /msg|not sent: ).*")
        alice.expect_nothing()
        bob.expect_nothing()
        alice.send(f"a{blank}b" if blank not in "\ufe0f\u0301" else f"a{blank}")
        assert bob.next_line().startswith("alice: a")


@pytest.mark.parametrize("start", ["", "/me ", "/msg bob "])
def test_marks_do_not_pile_up_over_other_lines(start: str) -> None:
    """Hundreds of marks on one letter are refused, however it is said; a few are said."""
    with run_chat(fmt="utf-8") as server:
        alice, bob = pair(server.port)
        alice.send(f"{start}e{chr(0x301) * 480}")
        alice.expect("-> not sent: a character has at most 6 marks; send it with fewer")
        bob.expect_nothing()
        alice.send(f"{start}e{chr(0x301) * 4}")
        assert bob.next_line().endswith(f"e{chr(0x301) * 4}")


def test_other_formats_carry_other_letters() -> None:
    """Under UTF-8 the world's writing is said, and what deceives a terminal refused."""
    with run_chat(fmt="utf-8") as server:
        alice = Peer(server.port).join("alice")
        said = ["gr\u00fc\u00dfe", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u4f60\u597d"]
        alice.send(*said)
        alice.expect(*(f"alice: {text}" for text in said))
        refused = "-> not sent: only printable UTF-8 characters can be sent here"
        for text in ("a\u202eb", "a\u2066b", "a\x9bb", "a\u2028b", "\u200bab"):
            alice.send(text)
            alice.expect(refused)
        alice.send_raw(b"\xff\xff\n" + "\u00fc".encode()[:1] + b"\n")
        alice.expect(refused, refused)
        alice.send_slowly("\u00fc\u4f60\n".encode())
        alice.expect("alice: \u00fc\u4f60")
        bob = Peer(server.port).introduce("b\u00f6b")
        bob.expect_match("-> a name is one word .*")
