"""The wire without a wire: framing, text, names and the form of every line."""

from __future__ import annotations

import doctest
import itertools

import pytest

import protocol
from protocol import (
    MAX_LINE,
    MAX_NAME,
    MAX_UNFRAMED,
    Framer,
    Introduction,
    Kind,
    Line,
    Refusal,
    check_name,
    decode,
    encode,
    escape,
    foreign_protocol,
    introduction,
    parse,
)


def outcome(line: bytes, fmt: str = "ascii") -> str:
    """Return what a receiver makes of a line: its text or its refusal."""
    try:
        return decode(line, fmt)
    except Refusal as refusal:
        return f"refused: {refusal}"


def feed(*chunks: bytes) -> list[str]:
    """Return what comes of the lines in some chunks."""
    framer = Framer()
    return [outcome(line) for chunk in chunks for line in framer.feed(chunk)]


def test_the_examples_in_the_module_are_true() -> None:
    """The doctests of the module pass."""
    assert doctest.testmod(protocol).failed == 0
    assert doctest.testmod(protocol).attempted >= 5


# --- Framing -----------------------------------------------------------------

STREAM = (
    b"one\n\ntwo\r\n\r\nth\rree\nfour\r\r\n\x0b\x0c\x1c\x1d\x1e\x85\n"
    + b"x" * (MAX_LINE - 1)
    + b"\n"
    + b"y" * (MAX_LINE - 1)
    + b"\r\n"
    + b"z" * MAX_LINE
    + b"\n"
    + b"w" * MAX_LINE
    + b"\r"
    + b"v" * 10
    + b"\nlast\nunfinished"
)


def test_lines_end_at_newlines_alone() -> None:
    """A line ends at a newline, loses one carriage return before it, and at nothing else."""
    assert Framer().feed(b"one\ntwo\r\n\nth\rree\r\r\na\x0bb\x0cc\x1cd\x1de\x1ef\x85g\nrest") == [
        b"one",
        b"two",
        b"",
        b"th\rree\r",
        b"a\x0bb\x0cc\x1cd\x1de\x1ef\x85g",
    ]


def test_the_unfinished_line_waits() -> None:
    """What has no newline yet is kept for the next bytes."""
    framer = Framer()
    assert framer.feed(b"hel") == []
    assert framer.partial == b"hel"
    assert framer.feed(b"lo\r") == []
    assert framer.feed(b"\n") == [b"hello"]
    assert framer.partial == b""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1023, 1024, 1025, 1026, 4096])
def test_framing_is_the_same_for_every_size_of_chunk(size: int) -> None:
    """The lines do not depend on the chunks in which the bytes come."""
    chunks = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert feed(*chunks) == feed(STREAM)


def test_framing_is_the_same_for_every_cut() -> None:
    """The lines are the same wherever the bytes are cut in two."""
    whole = feed(STREAM)
    assert len(whole) == 12
    for cut in range(len(STREAM) + 1):
        assert feed(STREAM[:cut], STREAM[cut:]) == whole, f"cut at {cut}"


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_the_longest_line_passes_and_one_byte_more_is_refused(ending: bytes) -> None:
    """A line of 1024 bytes with its newline is taken; a longer one is refused in its place."""
    longest = b"x" * (MAX_LINE - 1)
    assert feed(longest + ending) == [longest.decode()]
    assert feed(b"a\n" + longest + b"x" + ending + b"b\n") == [
        "a",
        "refused: a line has at most 1023 bytes; send it in parts",
        "b",
    ]


def test_a_long_line_takes_bounded_memory() -> None:
    """Of a line that does not end, no more is kept than a line may have."""
    framer = Framer()
    for _ in range(MAX_UNFRAMED // 1000):
        framer.feed(b"x" * 1000)
    assert len(framer.partial) <= MAX_LINE + 1
    assert not framer.overrun


@pytest.mark.parametrize("size", [1, 1000, 65535, 65536, 100_000])
def test_64_kib_without_a_newline_are_an_overrun(size: int) -> None:
    """The lines before 64 KiB without a newline come, those after it do not."""
    data = b"before\n" + b"x" * MAX_UNFRAMED + b"\nafter\n"
    framer = Framer()
    lines = []
    for start in range(0, len(data), size):
        lines += framer.feed(data[start : start + size])
    assert lines == [b"before"]
    assert framer.overrun
    assert framer.feed(b"more\n") == []


@pytest.mark.parametrize("size", [1, 1000, 65535, 65536, 100_000])
def test_one_byte_less_is_a_line_too_long(size: int) -> None:
    """A line of one byte under 64 KiB is refused, and what follows it comes."""
    data = b"x" * (MAX_UNFRAMED - 1) + b"\nafter\n"
    framer = Framer()
    lines = []
    for start in range(0, len(data), size):
        lines += framer.feed(data[start : start + size])
    assert [outcome(line)[:7] for line in lines] == ["refused", "after"]
    assert not framer.overrun


def test_many_short_lines_are_no_overrun() -> None:
    """A chunk of more than 64 KiB is fine as long as it has newlines."""
    framer = Framer()
    assert len(framer.feed(b"0123456\n" * 20_000)) == 20_000
    assert not framer.overrun


# --- Text --------------------------------------------------------------------


@pytest.mark.parametrize("position", ["start", "middle", "end"])
@pytest.mark.parametrize("value", range(256))
def test_each_byte_is_text_or_refused(value: int, position: str) -> None:
    """Printable ASCII passes unaltered, a tab as a space; any other byte refuses its line."""
    byte = bytes([value])
    line = {"start": byte + b"ab", "middle": b"a" + byte + b"b", "end": b"ab" + byte}[position]
    if value == 9:
        assert decode(line) == line.decode().replace("\t", " ")
    elif 0x20 <= value <= 0x7E:
        assert decode(line) == line.decode()
    else:
        with pytest.raises(Refusal, match="only printable ASCII characters"):
            decode(line)


@pytest.mark.parametrize(
    "text",
    [
        "gr\u00fc\u00dfe",
        "\u0437\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439",
        "\u4f60\u597d",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family, joined
        "\u2764\ufe0f",  # a heart with a variation selector
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # a Persian word's non-joiner
        "a\u00a0b",
        "a\u3000b",
        "e\u0301",
    ],
)
def test_the_worlds_writing_passes_under_utf_8(text: str) -> None:
    """Letters, emoji with joiners and spaces of all kinds go through both ways."""
    assert decode(encode(text, "utf-8")[:-1], "utf-8") == text
    with pytest.raises(Refusal, match="only printable ASCII"):
        encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "a\u202eb",  # right-to-left override
        "a\u202db",
        "a\u202ab",
        "a\u202cb",
        "a\u2066b",
        "a\u2069b",
        "a\u200eb",
        "a\u200bb",  # a space without a width
        "\u200dab",
        "ab\u200d",
        "a \u200db",
        "a\u200d\u200db",
        "a\x85b",
        "a\x9bb",  # the control sequence introducer in one character
        "a\u2028b",
        "a\u2029b",
        "a\ufeffb",
        "a\ue000b",
        "a\x1b[31mb",
        "a\x00b",
        "a\x7fb",
    ],
)
def test_what_deceives_a_terminal_is_refused_under_utf_8(text: str) -> None:
    """Controls, overrides and joiners that join nothing go through neither way."""
    with pytest.raises(Refusal, match="only printable UTF-8"):
        decode(text.encode(), "utf-8")
    with pytest.raises(Refusal, match="only printable UTF-8"):
        encode(text, "utf-8")


@pytest.mark.parametrize("line", [b"\xff", b"a\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80"])
def test_invalid_utf_8_is_refused(line: bytes) -> None:
    """Bytes that are not UTF-8 are refused, cut, overlong and surrogate ones too."""
    with pytest.raises(Refusal, match="only printable UTF-8"):
        decode(line, "utf-8")


@pytest.mark.parametrize("fmt", protocol.FORMATS)
def test_encode_is_the_inverse_of_decode(fmt: str) -> None:
    """A text that can be sent comes out as it went in."""
    text = "".join(map(chr, range(0x20, 0x7F)))
    assert decode(encode(text, fmt)[:-1], fmt) == text
    assert encode("a\tb", fmt) == b"a b\n"


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\x1b[2J", "a\x00"])
def test_text_with_controls_cannot_be_encoded(text: str) -> None:
    """One text is one line: nothing can be smuggled in behind a newline."""
    with pytest.raises(Refusal):
        encode(text)


def test_a_text_too_long_cannot_be_encoded() -> None:
    """The limit is one of bytes and counts the newline."""
    assert len(encode("x" * 1023)) == MAX_LINE
    with pytest.raises(Refusal, match="1023 bytes"):
        encode("x" * 1024)
    assert len(encode("\u00fc" * 511, "utf-8")) == 1023
    with pytest.raises(Refusal, match="1023 bytes"):
        encode("\u00fc" * 512, "utf-8")


def test_a_refusal_to_encode_shows_the_character() -> None:
    """A person learns which character the room's format does not have."""
    with pytest.raises(Refusal, match="'\u00fc' is not"):
        encode("gr\u00fcn")


@pytest.mark.parametrize("value", range(256))
def test_escaping_shows_every_byte_printably(value: int) -> None:
    """Whatever byte comes from the network, only printable ASCII is shown of it."""
    shown = escape(b"a" + bytes([value]) + b"b")
    assert shown.isascii()
    assert shown.isprintable()
    if 0x20 <= value <= 0x7E:
        assert shown == f"a{chr(value)}b"
    else:
        assert len(shown) > 3


def test_escaping_text_keeps_what_is_printable() -> None:
    """Letters stay, controls and overrides become their numbers."""
    assert escape("gr\u00fcn\x1b[31m\u202e") == "gr\u00fcn\\x1b[31m\\u202e"
    assert escape("gr\u00fcn \u2713".encode(), "utf-8") == "gr\u00fcn \u2713"
    assert escape(b"\xff\x9b2J", "utf-8") == "\\xff\\x9b2J"


# --- Names and introductions -------------------------------------------------


@pytest.mark.parametrize("name", ["a", "Z", "alice", "Bob_2", "x-y", "a" * MAX_NAME, "servers"])
def test_good_names_pass(name: str) -> None:
    """A name is a letter and up to 23 letters, digits, - and _."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        ("1a", "begins with a letter"),
        ("-a", "begins with a letter"),
        ("_a", "begins with a letter"),
        ("a" * (MAX_NAME + 1), "at most 24"),
        ("a b", "one word"),
        ("a:", "letters, digits"),
        ("a*", "letters, digits"),
        ("a\n", "letters, digits"),
        ("\u00e4pfel", "letters, digits"),
        ("al\u0131ce", "letters, digits"),
        ("a\u0661", "letters, digits"),
        ("server", "reserved"),
        ("SERVER", "reserved"),
        ("Server", "reserved"),
    ],
)
def test_bad_names_are_refused_with_a_way_to_mend_them(name: str, why: str) -> None:
    """A refusal says what is wrong and asks to choose another name."""
    with pytest.raises(Refusal, match=f"{why}.*choose|choose.*{why}"):
        check_name(name)


KEY = "0123456789abcdefABCDEF"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alice", Introduction("alice")),
        ("  alice  ", Introduction("alice")),
        ("alice -5", Introduction("alice", last=5, wants_position=True)),
        ("alice -0", Introduction("alice", last=0, wants_position=True)),
        ("alice 1041", Introduction("alice", 1041, 0, True)),
        ("alice 0", Introduction("alice", 0, 0, True)),
        (f"alice -20 {KEY}", Introduction("alice", None, 20, True, KEY)),
        (f"alice 7 {KEY}", Introduction("alice", 7, 0, True, KEY)),
        (f"alice 7+3 {KEY}", Introduction("alice", 7, 0, True, KEY, 3)),
        (f"alice -20+0 {KEY}", Introduction("alice", None, 20, True, KEY, 0)),
    ],
)
def test_introductions(text: str, expected: Introduction) -> None:
    """The answer to the question for the name is read in its three forms."""
    assert introduction(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "alice bob",
        "alice x",
        "alice +5",
        "alice --5",
        "alice 1.5",
        "alice 5+3",
        "alice -5+3",
        f"alice 5+ {KEY}",
        "alice 5 short",
        f"alice 5 {'0' * 15}",
        f"alice 5 {'0' * 129}",
        f"alice 5 {'g' * 16}",
        f"alice 5 {KEY} more",
        f"alice {KEY}x",
        "alice " + "9" * 19,
        "alice \u0661",
        "1alice 5",
        "server 5",
    ],
)
def test_malformed_introductions_are_refused(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(Refusal):
        introduction(text)


@pytest.mark.parametrize(
    "asked",
    [
        Introduction("alice", last=5, wants_position=True),
        Introduction("alice", 1041, 0, True),
        Introduction("alice", None, 20, True, KEY),
        Introduction("alice", 12, 0, True, KEY),
        Introduction("alice", 12, 0, True, KEY, 345),
    ],
)
def test_an_introduction_reads_back_as_it_was_written(asked: Introduction) -> None:
    """``str`` is the inverse of `introduction`."""
    assert introduction(str(asked)) == asked


@pytest.mark.parametrize(
    "start",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"\x16\x03\x03\n\n\n",
        b"GET / HTTP/1.1\r\nHost: chat\r\n\r\n",
        b"POST /a?b=c HTTP/1.0\n",
        b"CONNECT host:443 HTTP/1.1\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
)
def test_other_protocols_are_recognised(start: bytes) -> None:
    """A TLS hello, an HTTP request and an SSH banner are no names."""
    assert foreign_protocol(start) in {"TLS", "HTTP", "SSH"}


@pytest.mark.parametrize(
    "start", [b"", b"\x16", b"GET", b"GET me\n", b"alice\nGET / HTTP/1.1\n", b"HTTP\n", b"SSH\n"]
)
def test_names_are_no_other_protocol(start: bytes) -> None:
    """What only looks a little like another protocol is not taken for it."""
    assert foreign_protocol(start) == ""


def test_a_name_with_a_hyphen_is_no_ssh() -> None:
    """A name that can be had is never taken for an SSH banner."""
    assert check_name("SSH-fan") == "SSH-fan"
    assert foreign_protocol(b"SSH-fan\n") == ""


# --- What the client sends ---------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("alice: hello", "hello"),
        ("Alice: hello", "hello"),
        ("alice:hello", "alice:hello"),
        ("alice::move", "alice::move"),
        ("ALICE:  hello", " hello"),
        ("hello", "hello"),
        ("bob: hello", "bob: hello"),
        ("alice : hello", "alice : hello"),
        ("alice2: hello", "alice2: hello"),
        ("alice: alice: hello", "alice: hello"),
        ("alice:", ""),
        ("", ""),
    ],
)
def test_the_own_name_is_taken_off(line: str, text: str) -> None:
    """One's own name and a colon are taken off a line, anyone else's stay."""
    assert protocol.without_name(line.encode(), b"alice: ") == text.encode()


ORDINARY = [b"alice: hello", b"alice: a /slash, alice: and more", b"alice: " + b"x" * 1016]
EXTRAORDINARY = [
    b"hello",
    b"Alice: hello",
    b"alice:hello",
    b"bob: hello",
    b"alice: /help",
    b"alice: //slash",
    b"alice: ",
    b"alice:  two blanks",
    b"alice: a\ttab",
    b"alice: a\x1bbell",
    b"alice: caf\xc3\xa9",
    b"alice: a\rb",
    b"alice: " + b"x" * 1017,
    b"",
    b" alice: hello",
]


@pytest.mark.parametrize("number", range(1, 5))
def test_lines_as_the_room_says_them_are_recognised(number: int) -> None:
    """Those under the sender's name are, however many; one other among them is enough."""
    ordinary = (ORDINARY * 2)[:number]
    assert protocol.are_plain(ordinary, b"alice: ")
    for other in EXTRAORDINARY:
        for index in range(number + 1):
            mixed = [*ordinary[:index], other, *ordinary[index:]]
            assert not protocol.are_plain(mixed, b"alice: "), mixed
    assert not protocol.are_plain([], b"alice: ")


@pytest.mark.parametrize("line", ORDINARY)
@pytest.mark.parametrize("fmt", protocol.FORMATS)
def test_a_line_recognised_so_is_what_a_closer_look_makes_of_it(line: bytes, fmt: str) -> None:
    """Taking such a line as it is and taking it apart come to the same."""
    text = protocol.check_line(line, b"alice: ", fmt)
    assert not protocol.is_command(text)
    assert b"alice: " + protocol.unslash(text) == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", ("help", "")),
        ("/ME waves  ", ("me", "waves")),
        ("/msg bob hi there", ("msg", "bob hi there")),
        ("/", ("", "")),
        ("//help", None),
        ("hello /help", None),
        (" /help", None),
        ("", None),
    ],
)
def test_commands_are_told_from_text(text: str, expected: tuple[str, str] | None) -> None:
    """One slash at the start is a command, two are a text."""
    assert protocol.command(text) == expected


@pytest.mark.parametrize("text", ["hello", "/help", "//", "///", "/", ""])
def test_a_slash_can_be_said(text: str) -> None:
    """Any text can be sent so that it is said and not obeyed."""
    sent = protocol.slash(text)
    assert protocol.command(sent) is None
    assert protocol.unslash(sent) == text


# --- What the server sends ---------------------------------------------------

LINES = [
    ("NICK", Line(Kind.NICK, "", "")),
    ("PASS", Line(Kind.PASS, "", "")),
    ("alice: hello", Line(Kind.SAID, "alice", "hello")),
    ("alice: ", Line(Kind.SAID, "alice", "")),
    ("a-b_9: bob: ** -> *", Line(Kind.SAID, "a-b_9", "bob: ** -> *")),
    ("** alice waves", Line(Kind.DID, "alice", "waves")),
    ("* bob joined the chat", Line(Kind.NOTICE, "", "bob joined the chat")),
    ("* ", Line(Kind.NOTICE, "", "")),
    ("[from bob] psst", Line(Kind.PRIVATE, "bob", "psst")),
    ("-> Welcome, alice!", Line(Kind.ANSWER, "", "Welcome, alice!")),
    ("-> ", Line(Kind.ANSWER, "", "")),
    ("", Line(Kind.UNKNOWN, "", "")),
    ("hello", Line(Kind.UNKNOWN, "", "hello")),
    ("nick", Line(Kind.UNKNOWN, "", "nick")),
    ("NICK ", Line(Kind.UNKNOWN, "", "NICK ")),
    ("alice:hello", Line(Kind.UNKNOWN, "", "alice:hello")),
    ("1: hello", Line(Kind.UNKNOWN, "", "1: hello")),
    ("** alice", Line(Kind.UNKNOWN, "", "** alice")),
    ("->hello", Line(Kind.UNKNOWN, "", "->hello")),
    ("[from bob]psst", Line(Kind.UNKNOWN, "", "[from bob]psst")),
    ("x" * 25 + ": hello", Line(Kind.UNKNOWN, "", "x" * 25 + ": hello")),
]


@pytest.mark.parametrize(("text", "line"), LINES)
def test_each_kind_of_line_is_read_and_written(text: str, line: Line) -> None:
    """A line says what it is by its first word, and `parse` is the inverse of ``str``."""
    assert parse(text) == line
    assert str(line) == text


def test_parts_of_many_lines_are_those_of_each() -> None:
    """Read at once, lines have the parts that they have alone, whatever stands beside them."""
    lines = [text for text, _ in LINES] + ["alice: \x0b\x85\u2028 \r", "zoë: * x", "bob: bob: "]
    for some in itertools.permutations(lines, 2):
        assert protocol.parts_of_each("\n".join(some)) == [protocol.parts(line) for line in some]
    kinds = [(line.kind.value, line.name, line.text) for _, line in LINES]
    assert protocol.parts_of_each("\n".join(text for text, _ in LINES)) == kinds


def test_every_kind_of_line_is_among_the_examples() -> None:
    """No kind is left out of the test above."""
    assert {line.kind for _, line in LINES} == set(Kind)


def test_only_the_rooms_lines_have_positions() -> None:
    """What is said, done and announced is of the room; answers and private lines are not."""
    assert {line.kind for _, line in LINES if line.in_room} == {Kind.SAID, Kind.DID, Kind.NOTICE}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (protocol.said("alice", "hi"), Kind.SAID),
        (protocol.did("alice", "waves"), Kind.DID),
        (protocol.private("alice", "psst"), Kind.PRIVATE),
        (protocol.answer("no"), Kind.ANSWER),
        (protocol.joined("alice"), Kind.NOTICE),
        (protocol.left("alice"), Kind.NOTICE),
        (protocol.renamed("alice", "alicia"), Kind.NOTICE),
        (protocol.welcome("alice", [], 0), Kind.ANSWER),
        (protocol.welcome("alice", ["bob"], 1), Kind.ANSWER),
        (protocol.welcome_back("alice"), Kind.ANSWER),
        (protocol.at(5), Kind.ANSWER),
        (protocol.missed(5), Kind.ANSWER),
        (protocol.not_sent("too long"), Kind.ANSWER),
        (protocol.sent_to("bob", "psst"), Kind.ANSWER),
        (protocol.now_named("bob"), Kind.ANSWER),
        (protocol.BYE, Kind.ANSWER),
        (protocol.SHUTTING_DOWN, Kind.ANSWER),
    ],
)
def test_what_is_worded_here_is_of_its_kind(text: str, kind: Kind) -> None:
    """Each wording is a line of the kind that it is meant to be."""
    assert parse(text).kind is kind
    assert str(parse(text)) == text


def test_numbers_and_names_are_read_out_of_answers() -> None:
    """A client finds in an answer what the server put there, and nothing in other lines."""
    assert protocol.position_in(protocol.at(1041)) == 1041
    assert protocol.missed_in(protocol.missed(42)) == 42
    assert protocol.missed_in(protocol.missed(1)) == 1
    assert protocol.missed(1) == "-> missed 1 line"
    assert protocol.name_in(protocol.now_named("bob")) == "bob"
    for line in ("alice: -> at 5", "* missed 5 lines", "-> at x", "-> you are now nobody else"):
        assert protocol.position_in(line) is None
        assert protocol.missed_in(line) is None
        assert protocol.name_in(line) is None


def test_lists_of_names_fit_into_lines() -> None:
    """A thousand names are told in lines that can be sent, each name once and whole."""
    names = [f"{'n' * 20}{number:03}" for number in range(1000)]
    lines = protocol.here(names, 1000)
    for line in lines:
        encode(line, "ascii", protocol.MAX_SERVER_LINE)
    told = " ".join(line.removeprefix("-> ") for line in lines)
    assert told == "1000 here: " + ", ".join(names)


def test_a_welcome_names_some_and_counts_the_others() -> None:
    """A greeting fits into a line however many are here."""
    names = [f"{'n' * 20}{number:03}" for number in range(1000)]
    line = protocol.welcome("alice", names[: protocol.WELCOME_NAMES], 1000)
    encode(line, "ascii", protocol.MAX_SERVER_LINE)
    assert line.endswith(f"{names[protocol.WELCOME_NAMES - 1]} and 980 more")
    assert "first" not in line
    assert "first" in protocol.welcome("alice", [], 0)


# --- Telnet ------------------------------------------------------------------

TELNET = [
    (b"ali\xff\xf4\xff\xfd\x06ce\n", b"alice\n", b"\xff\xfc\x06"),
    (b"\xff\xfb\x01\xff\xfc\x01\xff\xfe\x03hi", b"hi", b"\xff\xfe\x01"),
    (b"\xff\xfa\x18\x00xterm\xff\xffa\xff\xf0hi", b"hi", b""),
    (b"\xff\xf1\xff\xf0hi", b"hi", b""),
    (b"caf\xff\xe9", b"caf\xff\xe9", b""),
    (b"\xff\xff\n", b"\xff\xff\n", b""),
    (b"\xff\xfa" + b"x" * 1025 + b"\xff\xf0", b"\xff\xfa" + b"x" * 1025, b""),
]


@pytest.mark.parametrize(("data", "text", "answers"), TELNET)
def test_telnets_own_bytes_are_taken_out(data: bytes, text: bytes, answers: bytes) -> None:
    """Commands go and are refused where they ask; what else stands behind an 0xFF stays."""
    telnet = protocol.Telnet()
    assert telnet.feed(data) == text
    assert telnet.answers == answers


@pytest.mark.parametrize(("data", "text", "answers"), TELNET)
def test_telnets_bytes_are_taken_out_however_they_come(
    data: bytes, text: bytes, answers: bytes
) -> None:
    """Byte by byte, the same text and the same answers come out."""
    telnet = protocol.Telnet()
    assert b"".join(telnet.feed(bytes([byte])) for byte in data) == text
    assert telnet.answers == answers


def test_subnegotiations_without_end_are_text_but_the_first() -> None:
    """After one that was too long no other is looked for; other commands still are."""
    telnet = protocol.Telnet()
    data = b"\xff\xfa" * 16_000
    assert telnet.feed(data + b"\xff\xfd\x01hi") == data + b"hi"
    assert telnet.feed(b"\xff\xfa\x18\xff\xf0") == b"\xff\xfa\x18"
    assert telnet.answers == b"\xff\xfc\x01"


def test_telnet_is_answered_so_often_and_no_more() -> None:
    """Whoever asks a thousand times is answered thirty-two times."""
    telnet = protocol.Telnet()
    assert telnet.feed(b"\xff\xfd\x01" * 1000) == b""
    assert telnet.answers == b"\xff\xfc\x01" * 32


# --- What looks like something else ------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"), [("alice", "aIice"), ("Bill", "BiIl"), ("mark", "rnark"), ("O1", "0I")]
)
def test_names_that_look_alike(one: str, other: str) -> None:
    """Names that a screen shows alike have one look."""
    assert protocol.look(one) == protocol.look(other)


def test_names_that_only_sound_alike() -> None:
    """Ian and Lan are two people."""
    assert protocol.look("Ian") != protocol.look("Lan")


@pytest.mark.parametrize(
    "text",
    ["\u2800", "\u3164", "\u115f", "\uffa0", "\u00a0", "\u3000", "\ufe0f", "\u0301", " \u3164 "],
)
def test_what_looks_empty_is_refused(text: str) -> None:
    """A line of fillers, odd blanks and marks alone cannot be said."""
    assert protocol.is_blank(text)
    with pytest.raises(Refusal, match="look empty"):
        protocol.check_line(text.encode(), b"alice: ", "utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "h\u00e9",
        "e\u0301",
        "1\ufe0f\u20e3",
        "\u0e19\u0e49\u0e33",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
    ],
)
def test_marks_on_letters_are_said(text: str) -> None:
    """What people write in any script passes."""
    assert protocol.check_line(text.encode(), b"alice: ", "utf-8") == text.encode()


def test_a_pile_of_marks_is_refused() -> None:
    """Marks that would cover the lines around are not passed on."""
    with pytest.raises(Refusal, match="marks"):
        protocol.check_line(("e" + "\u0301" * 7).encode(), b"alice: ", "utf-8")


@pytest.mark.parametrize("line", [b" /op secret", b"alice:  /msg bob psst", b"\t/OP secret"])
def test_a_blank_before_a_command_is_a_slip(line: bytes) -> None:
    """What would have been said to everyone is held back, with the remedy."""
    with pytest.raises(Refusal, match="begin the line with the slash, or with // to say it"):
        protocol.check_line(line, b"alice: ")


def test_a_blank_before_another_slash_is_text() -> None:
    """A path is no slip."""
    assert protocol.check_line(b" /bin/sh: not found", b"alice: ") == b" /bin/sh: not found"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (protocol.joined("bob"), (protocol.Event.JOINED, "bob", "")),
        (protocol.left("bob"), (protocol.Event.LEFT, "bob", "")),
        (protocol.renamed("bob", "rob"), (protocol.Event.RENAMED, "bob", "rob")),
        (protocol.kicked("bob", "al", ""), (protocol.Event.KICKED, "bob", "")),
        (protocol.kicked("bob", "al", "is now rob"), (protocol.Event.KICKED, "bob", "")),
        ("bob: * bob left the chat", None),
        ("** bob joined the chat", None),
        ("* bob waves", None),
    ],
)
def test_what_the_room_announces_is_told(line: str, expected: tuple[object, ...] | None) -> None:
    """Each announcement is told from the others and from what people say."""
    assert protocol.announcement(line) == expected
