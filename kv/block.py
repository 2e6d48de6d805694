"""The names of blocks: a SHA-256 chain over token ids, rooted in what the bytes depend on.

Owns every hash that crosses a process border. Never random, never Python's hash(): equal inputs
give equal names on every host, and another model, dtype, layout or salt can never meet them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

KEY_NUM_BYTES = 32
_MAX_HEADER_NUM_BYTES = 100 * 2**20  # safetensors' own limit
_SAMPLE_NUM_BYTES = 256
_SAMPLES_PER_TENSOR = 8
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def block_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Names of the full blocks of a prompt, parents first.

    Each is SHA-256(parent || tokens as little-endian uint32), so any key can be the root of what
    follows it. A partial tail has no name. ValueError: block_tokens < 1, a token outside uint32.
    """
    data = _token_bytes(token_ids, block_tokens)
    width = block_tokens * 4
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(data) - width + 1, width):
        parent = hashlib.sha256(parent + data[start : start + width]).digest()
        keys.append(parent)
    return keys


def prefix_identity(root: bytes, token_ids: Sequence[int], block_tokens: int) -> bytes:
    """32 bytes that stand for exactly these tokens, tail included; never equal to a block's key."""
    keys = block_keys(root, token_ids, block_tokens)
    tail = _token_bytes(token_ids[len(keys) * block_tokens :], block_tokens)
    return _digest(b"kvmesh prefix", keys[-1] if keys else root, tail)


def salted_root(fingerprint: bytes, cache_salt: str) -> bytes:
    """The root of one tenant's names under one model."""
    return _digest(b"kvmesh root", fingerprint, cache_salt.encode())


def tenant_id(cache_salt: str) -> str:
    """What may be told to others of the tenant whom a salt stands for; the salt stays secret.

    Empty for no salt: all who have none share their blocks and are one tenant.
    """
    return _digest(b"kvmesh tenant", cache_salt.encode())[:8].hex() if cache_salt else ""


def model_fingerprint(
    model_dir: Path,
    *,
    kv_dtype: str,
    layout_version: int,
    block_tokens: int,
    weights_id: str | None = None,
) -> bytes:
    """32 bytes that stand for weights, config, tokenizer and the shape of a block.

    Reads safetensors headers, file sizes and samples of every tensor, not all of the weights.
    weights_id names weights that are in no file; files of weights are not looked at then, and no
    checkpoint has the fingerprint. ValueError names the file that is missing or malformed.
    """
    # No file has an empty name.
    weights = _weights_fields(model_dir) if weights_id is None else [b"", weights_id.encode()]
    config = model_dir / "config.json"
    if not config.is_file():
        raise ValueError(f"{config}: no such file")
    fields = [kv_dtype.encode(), str(layout_version).encode(), str(block_tokens).encode()]
    for path in (config, *(model_dir / name for name in _TOKENIZER_FILES)):
        if path.is_file():
            fields += [path.name.encode(), path.read_bytes()]
    return _digest(b"kvmesh model", *fields, *weights)


def _digest(domain: bytes, *fields: bytes) -> bytes:
    """SHA-256 over length-prefixed fields, so that no two lists of fields read the same."""
    hasher = hashlib.sha256(hashlib.sha256(domain).digest())
    for field in fields:
        hasher.update(len(field).to_bytes(8, "little"))
        hasher.update(field)
    return hasher.digest()


def _token_bytes(token_ids: Sequence[int], block_tokens: int) -> bytes:
    if block_tokens < 1:
        raise ValueError(f"block_tokens: {block_tokens}; at least 1")
    if len(token_ids) == 0:
        return b""
    try:
        ids = np.asarray(token_ids, dtype=np.int64)  # [num_tokens]
    except OverflowError as error:
        raise ValueError("token_ids: a token is outside [0, 2**32)") from error
    if ids.min() < 0 or ids.max() >= 2**32:
        bad = ids[(ids < 0) | (ids >= 2**32)][0]
        raise ValueError(f"token_ids: {bad} is outside [0, 2**32)")
    return ids.astype("<u4").tobytes()


def _weights_fields(model_dir: Path) -> list[bytes]:
    """Name and digest of every safetensors file."""
    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{model_dir}: no *.safetensors file")
    return [field for path in paths for field in (path.name.encode(), _weights_digest(path))]


def _weights_digest(path: Path) -> bytes:
    """Header, size and samples of each tensor of one safetensors file."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_len = int.from_bytes(file.read(8), "little")
        if not 2 <= header_len <= min(_MAX_HEADER_NUM_BYTES, num_bytes - 8):
            raise ValueError(f"{path}: header of {header_len} bytes in a file of {num_bytes}")
        header = file.read(header_len)
        try:
            tensors: dict[str, Any] = json.loads(header)
        except ValueError as error:
            raise ValueError(f"{path}: header is not JSON: {error}") from error
        hasher = hashlib.sha256(num_bytes.to_bytes(8, "little") + header)
        for name in sorted(tensors):
            if name == "__metadata__":
                continue
            try:
                first, last = (8 + header_len + int(end) for end in tensors[name]["data_offsets"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: tensor {name} has no data_offsets") from error
            if not 8 + header_len <= first <= last <= num_bytes:
                raise ValueError(f"{path}: tensor {name} ends at {last} of {num_bytes} bytes")
            hasher.update(_sample(file, first, last))
    return hasher.digest()


def _sample(file: BinaryIO, first: int, last: int) -> bytes:
    """All of a small tensor; of a large one, evenly spaced pieces with both ends."""
    if last - first <= _SAMPLE_NUM_BYTES * _SAMPLES_PER_TENSOR:
        file.seek(first)
        return file.read(last - first)
    room = last - first - _SAMPLE_NUM_BYTES
    pieces: list[bytes] = []
    for index in range(_SAMPLES_PER_TENSOR):
        file.seek(first + room * index // (_SAMPLES_PER_TENSOR - 1))
        pieces.append(file.read(_SAMPLE_NUM_BYTES))
    return b"".join(pieces)
