"""The model's tokenizer: text and chat to ids, ids to text.

Owns the loaded tokenizer and its chat template. Never imports torch: it loads transformers' fast
tokenizer class directly, because the Auto classes pull torch in where it is installed.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from mesh.errors import InvalidArgument, invalid
from services.gateway.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer

# Longer texts are tokenized on a thread; shorter ones take less time than the hop.
MAX_INLINE_LEN = 2048
# Long texts at a time. Those whose caller has gone leave the queue; one that has begun runs on.
_NUM_THREADS = 2
# Normalisers may shorten a text before it is split: three combined characters become one, not more.
_NORMALISED = 4

T = TypeVar("T")
ChatMessages = Sequence[tuple[str, str]]


class Tokenizer:
    """Encodes prompts and decodes outputs. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._is_byte_level = _is_byte_level(self._backend.to_str())
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenizer")
        # A byte-level vocabulary has a character per byte; other kinds may merge without a limit.
        vocab = self._backend.get_vocab() if self._is_byte_level else {}
        self._longest_token_len = max(map(len, vocab), default=0)

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Reads `tokenizer.json` and its companions; FileNotFoundError when there is none."""
        if not (model_dir / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{model_dir}/tokenizer.json is missing; the gateway needs a fast tokenizer"
            )
        return cls(PreTrainedTokenizerFast.from_pretrained(str(model_dir)))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can take chat prompts."""
        return bool(self._tokenizer.chat_template)

    def check_len(self, field: str, texts: Iterable[str], context_len: int) -> None:
        """Refuses, without tokenizing it, what cannot fit context_len tokens."""
        if not self._longest_token_len:
            return
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        limit = context_len * self._longest_token_len * _NORMALISED
        if num_bytes > limit:
            raise invalid(
                field, f"is {num_bytes} bytes long; {context_len} tokens hold at most {limit}"
            )

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; long texts are tokenized off the event loop."""
        if len(text) <= MAX_INLINE_LEN:
            return self._encode(text, add_special_tokens)
        return await self._on_thread(self._encode, text, add_special_tokens)

    async def encode_chat(self, messages: ChatMessages) -> list[int]:
        """Token ids of a conversation with the template's generation prompt.

        Raises InvalidArgument on field `chat` without a template, on `chat.messages` when the
        template refuses the conversation.
        """
        if not self.has_chat_template:
            raise invalid("chat", "the model has no chat template; send text or token_ids")
        if sum(len(content) for _, content in messages) <= MAX_INLINE_LEN:
            return self._encode_chat(messages)
        return await self._on_thread(self._encode_chat, messages)

    async def decode_long(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """As `decode`, off the event loop when there are many ids."""
        decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        if len(token_ids) <= MAX_INLINE_LEN:
            return decode(token_ids)
        return await self._on_thread(decode, token_ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of all ids; undecodable bytes become U+FFFD, unknown ids nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A new sequence's incremental decoding."""
        if self._is_byte_level:
            lookup = self._shown_bytes if skip_special_tokens else self._token_bytes
            return ByteLevelDetokenizer(lookup)
        return WindowDetokenizer(self, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token's string as the vocabulary spells it, None outside the vocabulary."""
        return self._backend.id_to_token(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens shown; for logprobs."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    async def _on_thread(self, fn: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, fn, *args)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _encode_chat(self, messages: ChatMessages) -> list[int]:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is the model's code and raises what it likes
            raise _template_refusal(error) from error
        # The template writes the special tokens itself.
        return self._encode(str(text), False)

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self._token_bytes(token_id)

    def _token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = _byte_level_bytes(self.token(token_id) or "")
        return found


def _template_refusal(error: Exception) -> InvalidArgument:
    return invalid("chat.messages", f"the model's chat template refuses them: {error}")


def _is_byte_level(tokenizer_json: str) -> bool:
    decoder = json.loads(tokenizer_json).get("decoder") or {}
    if decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTES_BY_CHARACTER = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; added tokens stand for themselves."""
    values = [_BYTES_BY_CHARACTER.get(character) for character in token]
    if any(value is None for value in values):
        return token.encode("utf-8")
    return bytes(value for value in values if value is not None)
