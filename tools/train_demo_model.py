"""Train the bundled demo model (models/demo) from the corpus that demo_corpus.py writes.

Owns: the tokenizer, the model's shape, the training loop, and the held-out perplexity. Never
downloads anything. A run is set by its arguments and seed; `--minutes` is a guard that shortens
the schedule on a slow machine, and a run it cut short says so.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from demo_check import END_OF_TEXT, MAX_LEN, PROSE, autocast, evaluate, read_corpus, render, verify
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IM_END = 2
VOCAB_SIZE = 4096
SHORT_LEN = 512
LONG_SHARE = 0.15  # of the steps, the last ones, at MAX_LEN
# How often a training window comes from each source: prose over glosses.
MIX = {"novels": 0.42, "kjv": 0.16, "web": 0.18, "wordnet": 0.08, "devil": 0.03, "chat": 0.13}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(documents: list[dict]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training side."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d["text"] for d in documents if not d["held_out"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL[END_OF_TEXT],
        pad_token=SPECIAL[END_OF_TEXT],
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LEN,
        chat_template=CHAT_TEMPLATE,
    )


def streams(
    documents: list[dict], tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> dict[str, Tensor]:
    """Each source's training side as one line of tokens, <|endoftext|> before every document."""
    lines = {}
    for source in MIX:
        texts = [
            render(d, tokenizer) for d in documents if d["source"] == source and not d["held_out"]
        ]
        random.Random(0).shuffle(texts)
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        flat = [token for document in ids for token in (END_OF_TEXT, *document)]
        lines[source] = torch.tensor(flat, device=device)  # [num_tokens]
        print(f"train {source:8} documents={len(texts):6} tokens={len(flat)}", flush=True)
    return lines


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Runs the command line."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config)


def add_dropout(model: Qwen3ForCausalLM, share: float) -> None:
    """Drop out each block's two branches while training; Qwen3 itself has no such option."""

    def drop(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)  # pyright: ignore[reportAttributeAccessIssue]
        layer.mlp.down_proj.register_forward_hook(drop)  # pyright: ignore[reportAttributeAccessIssue]
    model.model.embed_tokens.register_forward_hook(drop)


def windows(
    lines: dict[str, Tensor], num_rows: int, length: int, generator: torch.Generator
) -> Tensor:
    """Random windows, each from one source drawn by MIX: [num_rows, length + 1]."""
    shares = torch.tensor(list(MIX.values()))
    picks = torch.multinomial(shares, num_rows, replacement=True, generator=generator)
    rows = []
    for index, line in enumerate(lines.values()):
        count = int((picks == index).sum())
        starts = torch.randint(len(line) - length, (count, 1), generator=generator)
        offsets = starts.to(line.device) + torch.arange(length + 1, device=line.device)
        rows.append(line[offsets])
    return torch.cat(rows)


def optimizer_of(model: nn.Module, rate: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def rate_at(progress: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth."""
    if progress < 0.03:
        return progress / 0.03 + 1e-3
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97))


def train_step(runner: nn.Module, optimizer: torch.optim.AdamW, batch: Tensor) -> Tensor:
    """One update on windows [num_rows, length + 1]; returns the loss before it."""
    with autocast(batch.device):
        # A ready-made "no mask" keeps attention on the causal kernels, also under torch.compile.
        causal = {"full_attention": None}
        logits = runner(batch[:, :-1], attention_mask=causal, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(runner.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(
    model: Qwen3ForCausalLM,
    documents: list[dict],
    tokenizer: PreTrainedTokenizerFast,
    arguments: argparse.Namespace,
) -> dict[str, Tensor]:
    """Run the schedule; return the weights of the check with the best held-out prose."""
    device = torch.device(arguments.device)
    lines = streams(documents, tokenizer, device)
    prose = [d for d in documents if d["source"] in PROSE]
    generator = torch.Generator().manual_seed(arguments.seed)
    optimizer = optimizer_of(model, arguments.rate, device)
    runner = torch.compile(model) if arguments.compile else model
    started, step, progress = time.monotonic(), 0, 0.0
    best, best_weights = math.inf, {}
    while progress < 1:
        elapsed = time.monotonic() - started
        progress = min(max((step + 1) / arguments.steps, elapsed / 60 / arguments.minutes), 1)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate_at(progress)
        length = MAX_LEN if progress > 1 - LONG_SHARE else SHORT_LEN
        batch = windows(lines, arguments.tokens // length, length, generator)
        loss = train_step(runner, optimizer, batch)  # pyright: ignore[reportArgumentType]
        step += 1
        if step % arguments.every and progress < 1:
            continue
        held_out = math.log(evaluate(model, prose, tokenizer, device)["prose"]["perplexity"])
        print(f"{step=} {progress=:.3f} {length=} train={loss.item():.4f} {held_out=:.4f} "
              f"seconds={elapsed:.0f}", flush=True)  # fmt: skip
        if held_out < best:
            best = held_out
            best_weights = {name: w.detach().clone() for name, w in model.state_dict().items()}
    if step < arguments.steps:
        print(f"cut short by --minutes at step {step} of {arguments.steps}")
    return best_weights


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """bf16 weights, configs and tokenizer, as transformers reads them."""
    model.generation_config = GenerationConfig(
        eos_token_id=[END_OF_TEXT, IM_END],
        pad_token_id=END_OF_TEXT,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    model.to(torch.bfloat16).cpu().save_pretrained(out)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    # Written out in the form that transformers 4 reads too.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[END_OF_TEXT],
        "pad_token": SPECIAL[END_OF_TEXT],
        "additional_special_tokens": SPECIAL[1:],
        "model_max_length": MAX_LEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--corpus", type=Path, required=True, help="what demo_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=60, help="the longest training may take")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens in a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=250, help="steps between held-out checks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    # A graph that will not compile runs uncompiled rather than ending the run.
    torch._dynamo.config.suppress_errors = True
    documents = read_corpus(arguments.corpus)
    tokenizer = train_tokenizer(documents)
    model = build_model(arguments.seed).to(arguments.device)
    add_dropout(model, arguments.dropout)
    model.load_state_dict(train(model, documents, tokenizer, arguments))
    save(model, tokenizer, arguments.out)
    verify(arguments.out, documents, torch.device(arguments.device))


if __name__ == "__main__":
    main()
