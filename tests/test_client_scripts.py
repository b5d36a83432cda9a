"""What is typed in any script takes nobody's line off the screen, whatever its width is there."""
# ruff: noqa: RUF001 - look-alikes are meant here

from __future__ import annotations

import importlib.util
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator

import pytest
from chat import Peer, no_leaks, run_chat
from clients import ROOT, environment
from terminal import Screen, Terminal

pytest.importorskip("readline")

SAMPLES = {
    "latin": "plain words and more of them ",
    "accents": "çà et là, où l’été s’achève ",
    "decomposed": "e\u0301te\u0301 u\u0308ber a\u030angstro\u0308m ",
    "greek": "καλημέρα κόσμε ",
    "cyrillic": "широкая электрификация ",
    "hebrew": "שלום עולם ",
    "pointed hebrew": "שָׁלוֹם ",
    "arabic": "السلام عليكم ",
    "vowelled arabic": "السَّلَامُ ",
    "thai": "สวัสดีชาวโลก น้ำ ",
    "devanagari": "नमस्ते दुनिया क्षत्रिय ",
    "tamil": "வணக்கம் உலகம் ",
    "bengali": "ওহে বিশ্ব ",
    "han": "世界你好",
    "kana": "こんにちは世界、カタカナ",
    "halfwidth kana": "ｺﾝﾆﾁﾊ ",
    "hangul": "안녕하세요 세계 ",
    "fullwidth": "ｆｕｌｌ　ｗｉｄｔｈ",
    "emoji": "😀🎉🚀",
    "family": "👩‍👩‍👧‍👦 ",
    "skin": "👍🏽👋🏿 ",
    "keycaps": "1️⃣2️⃣#️⃣ ",
    "flags": "🇩🇪🇫🇷 ",
    "hearts": "❤️❤︎☀️☀︎ ",
    "ambiguous": "±§¶×÷→… ",
    "mixed": "a世b界c😀é",
}
TIMES = (1, 4, 15)  # a sample is typed so many times over, as far as a line can have it
MARKS = ("Mn", "Me", "Cf")


def usual(text: str) -> int:
    """Return the columns of a character as most terminals have it."""
    if not text or unicodedata.category(text[0]) in MARKS:
        return 0
    return 2 if unicodedata.east_asian_width(text[0]) in "WF" else 1


def tight(text: str) -> int:
    """Return the columns in a terminal that draws what it can on the character before."""
    if not text or unicodedata.category(text[0]) in (*MARKS, "Mc", "Sk"):
        return 0
    return usual(text)


def loose(text: str) -> int:
    """Return the columns in a terminal for East Asia, where what is ambiguous is wide."""
    return 2 if text and unicodedata.east_asian_width(text[0]) in "WFA" else usual(text)


def narrow(text: str) -> int:
    """Return the columns in a terminal whose font has nothing wide but ideographs."""
    is_letter = text and unicodedata.category(text[0]) == "Lo"
    return usual(text) if is_letter else min(1, usual(text))


def texts() -> Iterator[str]:
    """Give all that is typed."""
    for sample in SAMPLES.values():
        for times in TIMES:
            text = (sample * times).strip()
            if len(text.encode()) < 900:
                yield text


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are back to where they were after each test."""
    with no_leaks():
        yield


@pytest.mark.long
@pytest.mark.parametrize(
    ("columns", "widths"),
    [(20, usual), (37, tight), (80, loose), (120, narrow)],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("kind", ["prompt_toolkit", "readline"])
@pytest.mark.timeout(120)
def test_enter_takes_nobodys_line_away(
    kind: str, columns: int, widths: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of others stands there after Enter, and after one that came while it was typed."""
    if kind == "prompt_toolkit" and not importlib.util.find_spec(kind):
        pytest.skip("prompt_toolkit is not installed")
    monkeypatch.setattr("terminal.width", widths)
    bare = ["-S"] if kind == "readline" else []
    with run_chat(fmt="utf-8") as server:
        command = [sys.executable, *bare, str(ROOT / "client.py"), "--port", str(server.port)]
        with Terminal(
            [*command, "--name", "alice", "--format", "utf-8", "--no-bell"],
            12,
            columns,
            env=environment(INPUTRC=os.devnull),
        ) as terminal:
            bob = Peer(server.port).join("bob")
            terminal.wait_for("* bob joined")
            count = 0
            for text in texts():
                for keys in (text, "\r"):
                    bob.send(f"<{count}>")
                    terminal.wait_for(f"bob: <{count}>")
                    count += 1
                    terminal.type(keys)
                bob.expect_eventually(f"alice: {text}")
            bob.send("over")
            terminal.wait_for("bob: over")
            assert missing(terminal.screen, count) == []
            terminal.type("\x04")
            assert terminal.wait() == 0


def missing(screen: Screen, count: int) -> list[str]:
    """Return which of bob's lines do not stand on rows of their own, on the screen or above."""
    rows = screen.text().split("\n")
    return [f"<{number}>" for number in range(count) if f"bob: <{number}>" not in rows]
