"""Streams safetensors into the decoder's fused parameters.

Owns the table from checkpoint names to parameters. Never reads .bin or .pt (pickle), never keeps a
second copy of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.config import ModelConfig
from engine.errors import ModelError

# Parts of a fused parameter, in order.
_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "o": ("self_attn.o_proj",),
    "down": ("mlp.down_proj",),
    "input_norm": ("input_layernorm",),
    "post_norm": ("post_attention_layernorm",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
Parameters = dict[str, torch.Tensor]


def load_weights(
    model_dir: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], None],
) -> Parameters:
    """All parameters by name: "embed", "norm", "head", "layers.{i}.{qkv,o,...}[.bias]".

    ModelError names missing, unexpected or misshaped tensors.
    """
    files = _files(model_dir)  # before any memory is taken
    parameters, places = _allocate(config, device, dtype)
    missing = set(places)
    num_loaded, reported = 0, -1
    num_values = sum(place.numel() for place in places.values())
    for path in files:
        for name, tensor in _tensors(path):
            if _ignored(name, config):
                continue
            if name in places and name not in missing:
                raise ModelError(f"{path}: tensor {name} was already read from another file")
            _copy(path, name, tensor, places.get(name), config)
            missing.discard(name)
            num_loaded += tensor.numel()
            percent = 100 * num_loaded // num_values
            if percent // 10 != reported:
                reported = percent // 10
                progress(f"loading weights: {percent} % ({path.name})")
    if missing:
        raise ModelError(
            f"{files[0] if len(files) == 1 else model_dir}: {len(missing)} tensors that "
            f"config.json needs are missing, first {sorted(missing)[0]}"
        )
    return parameters


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that carry nothing: old checkpoints' rope tables, and a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (
        name == "lm_head.weight" and config.tie_embeddings
    )


def _copy(
    path: Path, name: str, tensor: torch.Tensor, place: torch.Tensor | None, config: ModelConfig
) -> None:
    if place is None:
        raise ModelError(f"{path}: tensor {name} is unknown to {config.architecture}")
    if place.shape != tensor.shape:
        raise ModelError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}, "
            f"config.json says {list(place.shape)}"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"{path}: tensor {name} is {tensor.dtype}; float32, bfloat16 or float16")
    place.copy_(tensor)


def _allocate(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Parameters, Parameters]:
    """(parameters by our name, views into them by checkpoint name)."""
    parameters: Parameters = {}
    places: Parameters = {}

    def add(name: str, sources: list[tuple[str, int]], *tail: int) -> None:
        rows = sum(size for _, size in sources)
        whole = torch.empty(rows, *tail, device=device, dtype=dtype)
        parameters[name] = whole
        for (source, _), part in zip(
            sources, whole.split([size for _, size in sources]), strict=True
        ):
            places[source] = part

    hidden = config.hidden_size
    add("embed", [("model.embed_tokens.weight", config.vocab_size)], hidden)
    add("norm", [("model.norm.weight", hidden)])
    if config.tie_embeddings:
        parameters["head"] = parameters["embed"]
    else:
        add("head", [("lm_head.weight", config.vocab_size)], hidden)
    for layer in range(config.num_layers):
        _allocate_layer(config, layer, add)
    return parameters, places


def _allocate_layer(config: ModelConfig, layer: int, add: Callable[..., None]) -> None:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    # name -> (rows of each part, columns or nothing, has bias)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
        "qkv": ((q_size, kv_size, kv_size), (hidden,), config.qkv_bias),
        "o": ((hidden,), (q_size,), config.output_bias),
        "gate_up": ((inner, inner), (hidden,), config.mlp_bias),
        "down": ((hidden,), (inner,), config.mlp_bias),
        "input_norm": ((hidden,), (), False),
        "post_norm": ((hidden,), (), False),
    }
    if config.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = ((config.head_dim,), (), False)
    for name, (rows, columns, has_bias) in shapes.items():
        prefix = f"model.layers.{layer}."
        weights = [(f"{prefix}{p}.weight", n) for p, n in zip(_FUSED[name], rows, strict=True)]
        add(f"layers.{layer}.{name}", weights, *columns)
        if has_bias:
            biases = [(f"{prefix}{p}.bias", n) for p, n in zip(_FUSED[name], rows, strict=True)]
            add(f"layers.{layer}.{name}.bias", biases)


def _files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of safetensors: {error!r}") from error
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index}: {name!r} is not the name of a file beside it")
        files = [model_dir / name for name in names]
    else:
        files = [model_dir / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise ModelError(f"{path} does not exist; weights must be safetensors")
    return files


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
