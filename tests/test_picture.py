"""The picture in the README is what the programs show, and can be read by everybody."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from trust import ROOT, SLOW_TO_START

PICTURE = ROOT / ".picture" / "chat.svg"
SVG = "{http://www.w3.org/2000/svg}"
LEGIBLE = 4.5  # contrast of text with what is behind it, by the rule for the web


def luminance(color: str) -> float:
    """Return how bright a colour such as #00875f is, from 0 to 1."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, from 1 to 21."""
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_picture_shows_what_the_programs_do() -> None:
    """The same conversation, recorded now, gives the very picture of the README."""
    pytest.importorskip("readline")
    if shutil.which("bash") is None:
        pytest.skip("no bash to type in")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / ".picture" / "record.py")],
        capture_output=True,
        text=True,
        timeout=SLOW_TO_START,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == PICTURE.read_text(encoding="utf-8"), (
        "record it anew: python .picture/record.py > .picture/chat.svg"
    )


def test_picture_is_text_that_tells_what_it_is() -> None:
    """The picture has a title, a description, and its text as text, dark on bright or inverse."""
    root = ElementTree.parse(PICTURE).getroot()
    assert root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}desc")
    texts = root.findall(f".//{SVG}text")
    assert "".join(texts[-1].itertext()).startswith("$")
    for text in texts:
        fill = text.attrib["fill"]
        behind = "#e6e6e6" if fill == "#000000" else "#000000"
        assert contrast(fill, behind) >= LEGIBLE, f"{text.text} cannot be read"


def test_readme_shows_the_picture_and_says_what_is_on_it() -> None:
    """The picture stands near the top of the README, with words for who cannot see it."""
    top = (ROOT / "README.md").read_text(encoding="utf-8")[:1500]
    [(words, file)] = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", top)
    assert (ROOT / file) == PICTURE
    assert len(words.split()) >= 5
