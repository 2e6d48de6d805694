"""Names of blocks: equal for equal inputs, different for anything that changes the bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest

from kv.block import block_keys, model_fingerprint, prefix_identity, salted_root, tenant_id
from kv.layout import LAYOUT_VERSION, BlockLayout

ROOT = b"r" * 32


def test_keys_are_the_documented_chain() -> None:
    first = hashlib.sha256(ROOT + struct.pack("<4I", 1, 2, 3, 2**32 - 1)).digest()
    second = hashlib.sha256(first + struct.pack("<4I", 5, 6, 7, 8)).digest()
    tokens = [1, 2, 3, 2**32 - 1, 5, 6, 7, 8, 9]
    assert block_keys(ROOT, tokens, 4) == [first, second]


def test_a_key_is_the_root_of_what_follows() -> None:
    tokens = list(range(40))
    keys = block_keys(ROOT, tokens, 8)
    assert block_keys(keys[1], tokens[16:], 8) == keys[2:]


def test_no_full_block_has_no_key() -> None:
    assert block_keys(ROOT, [], 8) == [] == block_keys(ROOT, [1] * 7, 8)


@pytest.mark.parametrize("token", [-1, 2**32, 2**70])
def test_tokens_outside_uint32_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=r"token_ids: .*outside"):
        block_keys(ROOT, [token, 1], 2)


def test_identities_tell_every_prefix_apart() -> None:
    tokens = list(range(1, 20))
    identities = {prefix_identity(ROOT, tokens[:num], 4) for num in range(20)}
    assert len(identities) == 20
    assert identities.isdisjoint({ROOT, *block_keys(ROOT, tokens, 4)})
    assert prefix_identity(salted_root(ROOT, "tenant"), tokens, 4) not in identities


def test_a_tenant_is_told_without_its_salt() -> None:
    assert tenant_id("") == ""
    assert len({tenant_id("a"), tenant_id("b"), salted_root(ROOT, "a").hex()[:16]}) == 3
    assert tenant_id("a") == tenant_id("a") and len(tenant_id("a")) == 16


def test_salts_and_fingerprints_give_different_roots() -> None:
    pairs = [(b"ab", "c"), (b"a", "bc"), (b"ab", ""), (b"abc", "")]
    assert len({salted_root(fingerprint, salt) for fingerprint, salt in pairs}) == 4


def _model(directory: Path, data: bytes = bytes(range(256)) * 64) -> Path:
    directory.mkdir()
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    ).encode()
    weights = struct.pack("<Q", len(header)) + header + data
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "config.json").write_text('{"hidden_size": 8}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def _fingerprint(
    model: Path,
    kv_dtype: str = "fp32",
    layout_version: int = LAYOUT_VERSION,
    block_tokens: int = 64,
    weights_id: str | None = None,
) -> bytes:
    return model_fingerprint(
        model,
        kv_dtype=kv_dtype,
        layout_version=layout_version,
        block_tokens=block_tokens,
        weights_id=weights_id,
    )


def test_a_copy_of_a_model_has_the_same_fingerprint(tmp_path: Path) -> None:
    model = _model(tmp_path / "a")
    copy = Path(shutil.copytree(model, tmp_path / "b"))
    (copy / "README.md").write_text("unrelated")
    assert _fingerprint(model) == _fingerprint(copy)


def test_whatever_changes_the_bytes_changes_the_fingerprint(tmp_path: Path) -> None:
    model = _model(tmp_path / "a")
    prints = {
        _fingerprint(model),
        _fingerprint(model, kv_dtype="bf16"),
        _fingerprint(model, layout_version=LAYOUT_VERSION + 1),
        _fingerprint(model, block_tokens=32),
        _fingerprint(_model(tmp_path / "weights", b"\0" + bytes(range(1, 256)) * 64)),
        _fingerprint(_model(tmp_path / "tuned", bytes(reversed(range(256))) * 64)),
    }
    (model / "config.json").write_text('{"hidden_size": 9}')
    prints.add(_fingerprint(model))
    (model / "tokenizer.json").write_text("{ }")
    prints.add(_fingerprint(model))
    assert len(prints) == 8


def test_weights_of_no_file_go_by_their_name_and_never_meet_a_checkpoint(tmp_path: Path) -> None:
    model = _model(tmp_path / "a")
    of_files, random = _fingerprint(model), _fingerprint(model, weights_id="random")
    (model / "model.safetensors").unlink()
    assert _fingerprint(model, weights_id="random") == random
    (model / "model.safetensors").write_text("not looked at")
    assert _fingerprint(model, weights_id="random") == random
    others = {_fingerprint(model, weights_id=name) for name in ("", "random 1")}
    others.add(_fingerprint(model, weights_id="random", kv_dtype="bf16"))
    (model / "config.json").write_text('{"hidden_size": 9}')
    others.add(_fingerprint(model, weights_id="random"))
    assert len({of_files, random, *others}) == 6
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        _fingerprint(model, weights_id="random")


def test_malformed_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        _fingerprint(tmp_path)
    model = _model(tmp_path / "a")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor w ends at"):
        _fingerprint(model)
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: header of"):
        _fingerprint(model)


def test_layout_counts_bytes_and_refuses_nothing_sized() -> None:
    layout = BlockLayout(
        num_kv_heads=8, num_layers=32, block_tokens=64, head_dim=128, dtype_num_bytes=2
    )
    assert layout.shape == (8, 32, 2, 64, 128)
    assert layout.num_bytes == 8 * 2**20
    with pytest.raises(ValueError, match="num_layers: 0; at least 1"):
        BlockLayout(num_kv_heads=8, num_layers=0, block_tokens=64, head_dim=8, dtype_num_bytes=2)
