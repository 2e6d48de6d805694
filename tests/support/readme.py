"""The README as a program reads it: the commands and programs in its fenced blocks, its links."""

from __future__ import annotations

import re

from tests.support.mesh import ROOT

TEXT = (ROOT / "README.md").read_text()
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCES: tuple[tuple[str, str], ...] = tuple(_FENCE.findall(TEXT))
PROSE = _FENCE.sub("", TEXT)


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for name, text in FENCES if name == language]


def commands(*programs: str) -> list[str]:
    """The commands of its shell blocks, without remarks; all, or those of some programs."""
    lines = [
        line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()
    ]
    return [line for line in lines if not programs or line.split()[0] in programs]
