"""Measure the bundled demo model on held-out documents, and let it write a few samples.

Owns: the held-out perplexity (every token of a held-out document is scored once, in windows of
MAX_LEN after an <|endoftext|>) and the sample prompts. Never trains.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

END_OF_TEXT = 0
MAX_LEN = 2048
PROSE = ("novels", "kjv", "web")
PROMPTS = (
    "The river ran",
    "In the beginning",
    "It was a cold evening, and",
    "The captain said",
    "She opened the letter",
)
QUESTIONS = ("What does river mean?", "Tell me about the sea.", "Hello!")


def read_corpus(path: Path) -> list[dict]:
    """The corpus's documents, in file order."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def render(document: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as the text the model reads."""
    if not document["messages"]:
        return document["text"]
    return tokenizer.apply_chat_template(document["messages"], tokenize=False)  # pyright: ignore[reportReturnType]


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic on a GPU, the weights' own type elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def pieces(ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets of a document in windows of MAX_LEN; every token is a target once."""
    line = [END_OF_TEXT, *ids]
    for start in range(0, len(ids), MAX_LEN):
        part = line[start : start + MAX_LEN + 1]
        yield part[:-1], part[1:]


@torch.no_grad()
def loss_of(model: nn.Module, ids: list[int], device: torch.device) -> float:
    """Negative log-likelihood of a document in nats."""
    loss = 0.0
    for inputs, targets in pieces(ids):
        with autocast(device):
            logits = model(torch.tensor([inputs], device=device), use_cache=False).logits[0]
        wanted = torch.tensor(targets, device=device)
        loss += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
    return loss


def evaluate(
    model: nn.Module,
    documents: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Held-out perplexity a token and bits a byte, by source and for `prose` (the books)."""
    was_training = model.training
    model.eval()
    sums: dict[str, list[float]] = {}
    for document in documents:
        if not document["held_out"]:
            continue
        text, source = render(document, tokenizer), document["source"]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        values = (loss_of(model, ids, device), len(ids), len(text.encode()))
        for key in (source, "prose") if source in PROSE else (source,):
            total = sums.setdefault(key, [0.0, 0, 0])
            for place, value in enumerate(values):
                total[place] += value
    model.train(was_training)
    return {
        key: {
            "perplexity": math.exp(loss / count),
            "bits_per_byte": loss / size / math.log(2),
            "num_tokens": count,
            "num_bytes": size,
        }
        for key, (loss, count, size) in sums.items()
    }


def sample(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a greedy and a sampled continuation of each prompt."""
    torch.set_num_threads(1)  # a model this small only loses to the threads' hand-overs
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    for prompt in (*PROMPTS, *chats):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)  # pyright: ignore[reportArgumentType]
        for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 1.0}):
            torch.manual_seed(0)
            tokens = model.generate(  # pyright: ignore[reportCallIssue]
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=80,
                **how,
            )
            print(f"[{'T=0.8' if how['do_sample'] else 'greedy'}] {tokenizer.decode(tokens[0])!r}")


def verify(folder: Path, documents: list[dict], device: torch.device) -> None:
    """Load what was saved as any user would, measure it in bf16, and let it write."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    print(f"parameters {sum(weight.numel() for weight in model.parameters())}")
    figures = evaluate(model.to(device), documents, tokenizer, device)  # pyright: ignore[reportArgumentType]
    for key, values in figures.items():
        print(f"held-out {key:8}", {name: round(value, 4) for name, value in values.items()})
    sample(model.cpu(), tokenizer)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--corpus", type=Path, required=True, help="what demo_corpus.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    verify(arguments.model, read_corpus(arguments.corpus), torch.device(arguments.device))


if __name__ == "__main__":
    main()
