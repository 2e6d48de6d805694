"""Turns one sequence's token ids into text as they come.

Owns what is held back until it can no longer change: an unfinished UTF-8 character, an open run of
byte tokens. Deltas, concatenated and flushed, equal the tokenizer's decoding of all ids. Never
tokenizes.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Other decoders may show an unfinished character as U+FFFD, at most this many tokens long.
MAX_UNFINISHED_TOKENS = 8


class Vocabulary(Protocol):
    """What a detokenizer asks of the tokenizer."""

    def token(self, token_id: int) -> str | None:
        """The token's string, None for an id outside the vocabulary."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all ids at once."""
        ...


class Detokenizer(Protocol):
    """One sequence's incremental decoding."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new ids; returns the text that is final now."""
        ...

    def flush(self) -> str:
        """The text held back, at the sequence's end."""
        ...

    def copy(self) -> Detokenizer:
        """An independent detokenizer in the same state."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): tokens are bytes, so a UTF-8 decoder is exact."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new ids; returns the text that is final now."""
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """An unfinished character as U+FFFD."""
        return self._decoder.decode(b"", True)

    def copy(self) -> ByteLevelDetokenizer:
        """An independent detokenizer in the same state."""
        other = ByteLevelDetokenizer(self._token_bytes)
        other._decoder.setstate(self._decoder.getstate())
        return other


class WindowDetokenizer:
    """For every other decoder: decodes the new ids behind a few old ones, which give the context.

    A run of byte tokens (`<0xE2>`) is one unit to the tokenizer: a single bad byte turns the whole
    run into U+FFFD, so it is held until the run ends.
    """

    __slots__ = ("_context", "_context_text", "_pending", "_skip_special_tokens", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new ids; returns the text that is final now."""
        vocabulary = self._vocabulary
        num_closed = 0
        for token_id in token_ids:
            token = vocabulary.token(token_id)
            if token is None or (self._skip_special_tokens and vocabulary.is_special(token_id)):
                continue
            self._pending.append(token_id)
            if not BYTE_TOKEN.fullmatch(token):
                num_closed = len(self._pending)
        return self._emit(num_closed, is_last=False) if num_closed else ""

    def flush(self) -> str:
        """The open run and whatever else was held."""
        return self._emit(len(self._pending), is_last=True)

    def copy(self) -> WindowDetokenizer:
        """An independent detokenizer in the same state."""
        other = WindowDetokenizer(self._vocabulary, skip_special_tokens=self._skip_special_tokens)
        other._context = list(self._context)
        other._context_text = self._context_text
        other._pending = list(self._pending)
        return other

    def _emit(self, num_closed: int, *, is_last: bool) -> str:
        closed = self._pending[:num_closed]
        if not closed:
            return ""
        window = self._context + closed
        text = self._decode(window)
        unfinished = text.endswith("\ufffd") and len(closed) < MAX_UNFINISHED_TOKENS
        if unfinished and not is_last:
            return ""
        new_text = text[len(self._context_text) :]
        self._pending = self._pending[num_closed:]
        # The context must show as text: a leading space is dropped only at the very start.
        alone = self._decode(closed)
        self._context, self._context_text = (closed, alone) if alone else (window, text)
        return new_text

    def _decode(self, token_ids: list[int]) -> str:
        return self._vocabulary.decode(token_ids, skip_special_tokens=False)
