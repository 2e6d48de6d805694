"""What transformers generates: the reference every mesh test compares with."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@functools.cache
def _model(path: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def greedy_tokens(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation by transformers in fp32, EOS ignored; [num_tokens] token ids."""
    model = _model(path)
    output: list[int] = []
    ids = torch.tensor([prompt])
    cache = None
    for _ in range(num_tokens):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        output.append(int(result.logits[0, -1].argmax()))
        ids = torch.tensor([[output[-1]]])
    return output
