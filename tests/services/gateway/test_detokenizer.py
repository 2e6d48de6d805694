"""Incremental text equals the tokenizer's, for byte-level BPE and sentencepiece-like ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from services.gateway.tokenizer import Tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café — “quotes” and ellipsis…",
    "日本語のテキスト、中文文本, 한국어",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 done",
    "  leading,   double  spaces \n and\ttabs ",
]
SPECIALS = ["<s>", "</s>"]


def load(backend: Backend, path: Path) -> Tokenizer:
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(path)


def byte_level(path: Path) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["añadido token"])
    return load(backend, path)


def sentencepiece_like(path: Path) -> Tokenizer:
    """Llama 2's shape: ▁ for spaces, byte fallback, one leading space stripped."""
    pieces = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁qu", "ick", "▁caf", "é", "日", "a", "b", " ", "▁▁", ".", "�"]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIALS)
    return load(backend, path)


def metaspace(path: Path) -> Tokenizer:
    pieces = ["<unk>", *SPECIALS, "▁", "▁the", "▁qu", "ick", "▁caf", "é", "日", "a", "▁b", "▁▁"]
    backend = Backend(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIALS)
    return load(backend, path)


def without_decoder(path: Path) -> Tokenizer:
    pieces = ["<unk>", *SPECIALS, "the", "quick", "fox"]
    backend = Backend(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.add_special_tokens(SPECIALS)
    return load(backend, path)


KINDS: list[Callable[[Path], Tokenizer]] = [
    byte_level,
    sentencepiece_like,
    metaspace,
    without_decoder,
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_deltas_equal_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    num_known = next(i for i in range(10**6) if tokenizer.token(i) is None)
    ids = data.draw(st.lists(st.integers(0, num_known + 1), max_size=24))
    skip = data.draw(st.booleans())
    cut = data.draw(st.integers(1, 5))
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    parts = [detokenizer.push(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    text = "".join(parts) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_no_delta_splits_a_character(tokenizer: Tokenizer, text: str) -> None:
    if "Level" not in type(tokenizer.detokenizer(skip_special_tokens=True)).__name__:
        ids = [i for c in text.encode() if (i := _byte_token(tokenizer, c)) is not None]
    else:
        ids = tokenizer._encode(text, False)
    detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
    parts = [detokenizer.push([token_id]) for token_id in ids]
    parts.append(detokenizer.flush())
    assert not any("\ufffd" in part for part in parts)
    if ids:
        assert "".join(parts) == text.removeprefix(" " if _strips(tokenizer) else "")


def _byte_token(tokenizer: Tokenizer, byte: int) -> int | None:
    token_id = 3 + byte
    return token_id if tokenizer.token(token_id) == f"<0x{byte:02X}>" else None


def _strips(tokenizer: Tokenizer) -> bool:
    return _byte_token(tokenizer, 0) is not None


def test_byte_level_text_comes_as_soon_as_a_character_is_whole(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    ids = tokenizer._encode("🏳", False)
    assert len(ids) > 1
    detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
    assert [detokenizer.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["🏳"]
    assert detokenizer.push(ids[:1]) == "" and detokenizer.flush() == "\ufffd"


def test_special_tokens_are_shown_when_asked(tokenizer: Tokenizer) -> None:
    end = next(i for i in range(300) if tokenizer.token(i) == "</s>")
    shown = tokenizer.detokenizer(skip_special_tokens=False)
    hidden = tokenizer.detokenizer(skip_special_tokens=True)
    assert shown.push([end]) + shown.flush() == "</s>"
    assert hidden.push([end]) + hidden.flush() == ""
    assert tokenizer.token_text(end) == "</s>"
