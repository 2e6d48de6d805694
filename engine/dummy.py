"""Random weights of any supported config.json, for benchmarks: `--load-format dummy`.

Owns their distribution: activations and logits stay near unit size, so that nothing overflows and
FP8 scales look like a real model's. Never reads a checkpoint.
"""

from __future__ import annotations

import torch

from engine.config import ModelConfig
from engine.quantisation import WeightFormat, quantise_rows
from engine.weights import Parameters, allocate

SEED = 0
# Rows made at a time: fp32 temporaries stay small beside the model.
_PASS_VALUES = 1 << 26


def dummy_weights(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat = WeightFormat.PLAIN,
    seed: int = SEED,
) -> Parameters:
    """Parameters as `load_weights` returns them; the same for the same `dummy_weights_id`."""
    parameters, _ = allocate(config, weight_format, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in parameters.items():
        if name.endswith(".scale") or (name == "head" and config.tie_embeddings):
            continue
        scales = parameters.get(f"{name}.scale")
        if parameter.dim() > 1:
            std = 1.0 if name == "embed" else parameter.shape[-1] ** -0.5
            if parameter.dim() == 3:  # experts, one above the other
                parameter = parameter.flatten(0, 1)
                scales = None if scales is None else scales.flatten(0, 1)
            _fill(parameter, scales, std, generator)
        else:
            mean = 0.0 if name.endswith((".bias", "_correction")) else 1.0
            parameter.normal_(mean, 0.1, generator=generator)
    return parameters


def dummy_weights_id(device: torch.device, *, seed: int = SEED) -> str:
    """Names the weights that `dummy_weights` makes of a config: seed and kind of device.

    A GPU's kind is its model: the numbers are dealt out to the threads it can run at once.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"random, seed {seed}, {kind}"


def _fill(
    weight: torch.Tensor, scales: torch.Tensor | None, std: float, generator: torch.Generator
) -> None:
    """Normal values into weight [N, K]; quantised when scales [N] or [N / 128, K / 128] are there.

    Block scales vary by a factor of two, so that a kernel that mixes them up is found out.
    """
    if scales is None:
        weight.normal_(0.0, std, generator=generator)
        return
    num_rows = max(1, _PASS_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        part = weight[rows]
        wide = torch.empty(part.shape, device=weight.device)
        wide.normal_(0.0, std if scales.dim() == 1 else 64.0, generator=generator)
        if scales.dim() == 1:
            quantise_rows(wide, part, scales[rows])
        else:
            part.copy_(wide.clamp_(-448.0, 448.0))
    if scales.dim() == 2:
        scales.uniform_(std / 96, std / 48, generator=generator)
