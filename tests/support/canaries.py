"""Secrets that a mesh is told, and the search for them in what it says about itself.

Owns every form in which a secret could hide: as it is, base64, hex, escaped, and token ids as
numbers. Knows nothing of telemetry.
"""

from __future__ import annotations

import base64
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

NUM_IDS = 8
"""So many token ids in a row are no chance."""
_MIN_DIFFERENT = 4
_TEXT_LEN = 10
_NUMBER = re.compile(r"\d+")


class Canaries:
    """`add` what must not be seen, then `find` it."""

    def __init__(self) -> None:
        self._forms: dict[str, str] = {}
        self._ids: dict[tuple[int, ...], str] = {}
        self._examples: dict[str, str] = {}

    def add(self, kind: str, text: str) -> str:
        """A secret text; returns it."""
        self._examples[kind] = text
        for form in _forms(text):
            self._forms[form.casefold()] = kind
        return text

    def add_ids(self, kind: str, ids: Sequence[int]) -> list[int]:
        """Secret token ids, of which no few in a row may be seen; returns them."""
        for window in _windows(ids, NUM_IDS):
            self._ids[tuple(window)] = kind
        return list(ids)

    def add_output(self, text: str) -> None:
        """Generated text, of which no few characters in a row may be seen."""
        for start in range(0, len(text) - _TEXT_LEN + 1, _TEXT_LEN):
            part = text[start : start + _TEXT_LEN]
            if part.isprintable() and "\ufffd" not in part and len(set(part)) >= _MIN_DIFFERENT + 2:
                self.add("output", part)

    def example(self, kind: str) -> str:
        """The last text of a kind."""
        return self._examples[kind]

    def find(self, evidence: Mapping[str, str]) -> list[str]:
        """Where which secret is: one line for each place and kind."""
        return [
            f"{kind} in {place}: {found!r}"
            for place, text in evidence.items()
            for kind, found in {**self._texts_in(text), **self._ids_in(text)}.items()
        ]

    def _texts_in(self, text: str) -> dict[str, str]:
        folded = text.casefold()
        found: dict[str, str] = {}
        for form, kind in self._forms.items():
            at = folded.find(form)
            if at >= 0:
                found[kind] = text[max(0, at - 80) : at + 80]
        return found

    def _ids_in(self, text: str) -> dict[str, str]:
        last: deque[int] = deque(maxlen=NUM_IDS)
        found: dict[str, str] = {}
        for match in _NUMBER.finditer(text):
            last.append(int(match.group()) if len(match.group()) < 10 else -1)
            if kind := self._ids.get(tuple(last)):
                found[kind] = text[max(0, match.end() - 80) : match.end() + 80]
        return found


def _forms(text: str) -> Iterator[str]:
    data = text.encode()
    yield text
    yield json.dumps(text)[1:-1]
    yield quote(text)
    yield data.hex()
    for shift in range(3):  # where it stands in a longer run of base64
        encoded = base64.b64encode(b"\0" * shift + data).decode().rstrip("=")
        inner = encoded[-(-shift * 8 // 6) : len(encoded) - 1]
        yield inner
        yield inner.translate(str.maketrans("+/", "-_"))


def _windows(ids: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    for start in range(len(ids) - length + 1):
        window = ids[start : start + length]
        if len(set(window)) >= _MIN_DIFFERENT:
            yield window
