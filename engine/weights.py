"""Streams safetensors into the decoder's fused parameters.

Owns where a tensor of the checkpoint goes, FP8 ones too; which there are is in
engine/layer_shapes.py. Never reads .bin or .pt (pickle), never keeps a second copy of the
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.layer_shapes import Shape, layer_shapes
from engine.quantisation import BLOCK, FP8, WeightFormat, quantise_rows

# Names of scales in checkpoints of each format.
_SCALES = {WeightFormat.CHANNEL: "weight_scale", WeightFormat.BLOCK: "weight_scale_inv"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor of the checkpoint goes; with `scales` [num_rows] it is quantised to FP8."""

    target: torch.Tensor
    scales: torch.Tensor | None = None


def load_weights(
    model_dir: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat = WeightFormat.PLAIN,
    progress: Callable[[str], None],
) -> Parameters:
    """All parameters by name: "embed", "norm", "head", "layers.{i}.{qkv,o,...}[.bias, .scale]".

    weight_format: the checkpoint's own, or CHANNEL to quantise a plain one. Scales are fp32: [N]
    per channel, [N / 128, K / 128] per block; of stacked experts with their number in front.
    ModelError names missing, unexpected or misshaped
    tensors.
    """
    files = _files(model_dir)  # before any memory is taken
    parameters, places = allocate(config, weight_format, device=device, dtype=dtype)
    missing = set(places)
    num_loaded, reported = 0, -1
    num_values = sum(place.target.numel() for place in places.values())
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


def allocate(
    config: ModelConfig,
    weight_format: WeightFormat,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Parameters, dict[str, Place]]:
    """(uninitialised parameters by our name, places in them by checkpoint name)."""
    parameters: Parameters = {}
    places: dict[str, Place] = {}
    is_plain = config.checkpoint_format is WeightFormat.PLAIN

    def add(name: str, prefix: str, shape: Shape, kind: str) -> None:
        columns = () if kind == "bias" else shape.columns
        size = (*_stack(shape), sum(shape.rows), *columns)
        made = torch.float32 if shape.is_wide else dtype
        whole = parameters[name] = torch.empty(size, device=device, dtype=made)
        for source, (part,) in _parts(prefix, shape, (whole, shape.rows)):
            places[f"{source}.{kind}"] = Place(target=part)

    table, columns = (config.vocab_size,), (config.hidden_size,)
    add("embed", "", Shape(parts=("model.embed_tokens",), rows=table, columns=columns), "weight")
    add("norm", "", Shape(parts=("model.norm",), rows=columns), "weight")
    if config.tie_embeddings:
        parameters["head"] = parameters["embed"]
    else:
        add("head", "", Shape(parts=("lm_head",), rows=table, columns=columns), "weight")
    for layer in range(config.num_layers):
        for name, shape in layer_shapes(config, layer).items():
            prefix, fused = f"model.layers.{layer}.", f"layers.{layer}.{name}"
            quantised = weight_format is not WeightFormat.PLAIN and shape.is_projection
            if quantised and shape.columns:
                values = _fp8(fused, prefix, shape, weight_format, is_plain, device)
                parameters.update(values[0])
                places.update(values[1])
            else:
                add(fused, prefix, shape, shape.suffix)
            if shape.has_bias:
                add(f"{fused}.bias", prefix, shape, "bias")
    return parameters, places


def _stack(shape: Shape) -> tuple[int, ...]:
    return () if shape.num_experts is None else (shape.num_experts,)


def _parts(
    prefix: str, shape: Shape, *wholes: tuple[torch.Tensor, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """(checkpoint name, its part of every whole), expert by expert; a whole comes with the rows of
    its parts.
    """
    for expert in range(shape.num_experts or 1):
        one = [whole if shape.num_experts is None else whole[expert] for whole, _ in wholes]
        splits = [part.split(rows) for part, (_, rows) in zip(one, wholes, strict=True)]
        for source, *parts in zip(shape.parts, *splits, strict=True):
            yield prefix + source.format(expert), tuple(parts)


def _fp8(
    fused: str,
    prefix: str,
    shape: Shape,
    weight_format: WeightFormat,
    is_plain: bool,
    device: torch.device,
) -> tuple[Parameters, dict[str, Place]]:
    """Values and scales of one fused FP8 weight; is_plain: the checkpoint is not FP8 itself."""
    num_rows, num_columns, stack = sum(shape.rows), shape.columns[0], _stack(shape)
    values = torch.empty(*stack, num_rows, num_columns, device=device, dtype=FP8)
    step = BLOCK if weight_format is WeightFormat.BLOCK else 1
    scale_rows = tuple(-(-n // step) for n in shape.rows)
    scale_shape = (sum(scale_rows), -(-num_columns // BLOCK)) if step > 1 else (num_rows,)
    scales = torch.empty(*stack, *scale_shape, device=device, dtype=torch.float32)
    places: dict[str, Place] = {}
    for source, (value, scale) in _parts(prefix, shape, (values, shape.rows), (scales, scale_rows)):
        if is_plain:
            places[f"{source}.weight"] = Place(target=value, scales=scale)
            continue
        places[f"{source}.weight"] = Place(target=value)
        target = scale if scale.dim() == 2 else scale[:, None]
        places[f"{source}.{_SCALES[weight_format]}"] = Place(target=target)
    return {fused: values, f"{fused}.scale": scales}, places


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that carry nothing: old checkpoints' rope tables, a tied head, extra layers."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    extra = range(config.num_layers, config.num_layers + config.num_extra_layers)
    return (name == "lm_head.weight" and config.tie_embeddings) or name.startswith(
        tuple(f"model.layers.{layer}." for layer in extra)
    )


def _copy(
    path: Path, name: str, tensor: torch.Tensor, place: Place | None, config: ModelConfig
) -> None:
    if place is None:
        raise ModelError(f"{path}: tensor {name} is unknown to {config.architecture}")
    target = place.target
    if target.shape != tensor.shape:
        raise ModelError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}, "
            f"config.json says {list(target.shape)}"
        )
    dtypes = (FP8,) if target.dtype == FP8 and place.scales is None else _FLOATS
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ModelError(f"{path}: tensor {name} is {tensor.dtype}; expected {names}")
    if place.scales is None:
        target.copy_(tensor)
    else:
        quantise_rows(tensor, target, place.scales)


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
