"""`kvmesh generate`: streams one answer to the terminal, as text or as one JSON object a line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from kvmesh.answer import Result, SequenceResult
from kvmesh.client import Client, check_timeout
from kvmesh.console import table, usage_line
from kvmesh.generation import Generation
from kvmesh.request import GenerateOptions
from mesh.errors import KvmeshError, Unavailable

INTERRUPTED = 130
BAD_FLAG = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; what is not given is left to the gateway's defaults."""
    parser.add_argument("text", help="what to continue; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="send the text as one user message")
    parser.add_argument("--model", help="name of the model, when several are served")
    parser.add_argument("--max-new-tokens", type=int, help="most tokens generated")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default 1")
    parser.add_argument("--top-p", type=float, help="nucleus mass in (0, 1]")
    parser.add_argument("--seed", type=int, help="same seed, same answer")
    parser.add_argument("--stop", action="append", help="text that ends the answer; repeatable")
    parser.add_argument("--logprobs", type=int, metavar="N", help="alternatives per token, 0 to 20")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="deadline in seconds")


def run_generate(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    try:
        check_timeout("--timeout-s", args.timeout_s)
    except ValueError as error:
        print(f"kvmesh generate: {error}", file=sys.stderr)
        return BAD_FLAG
    text = sys.stdin.read() if args.text == "-" else args.text
    options = _options(args)
    try:
        with Client(args.addr, timeout_s=args.timeout_s) as client:
            messages = [{"role": "user", "content": text}]
            with (
                client.chat(messages, **options) if args.chat else client.generate(text, **options)
            ) as generation:
                show = _show_json if args.json else _show_text
                show(generation)
    except KvmeshError as error:
        print(f"\nkvmesh generate: {explain(error, args.addr)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return INTERRUPTED
    return 0


def explain(error: KvmeshError, addr: str) -> str:
    """An error for people: code, message, and what to do when nobody answers."""
    if isinstance(error, Unavailable) and "failed to connect" in str(error):
        return f"nothing answers at {addr}; start a mesh with: kvmesh up"
    return f"{error.code.name} ({error.reason}): {error}"


def _options(args: argparse.Namespace) -> GenerateOptions:
    options: GenerateOptions = {}
    for name in ("model", "max_new_tokens", "temperature", "top_p", "seed", "logprobs"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.stop:
        options["stop_strings"] = args.stop
    return options


def _show_text(generation: Generation) -> None:
    for delta in generation:
        print(delta.text, end="", flush=True)
    result = generation.result()
    print(flush=True)
    if any(sequence.logprobs for sequence in result.sequences):
        print(_logprob_table(result.sequences[0]))
    _print_summary(result)


def _show_json(generation: Generation) -> None:
    for delta in generation:
        print(json.dumps({"event": "delta", **dataclasses.asdict(delta)}), flush=True)
    print(json.dumps({"event": "result", **dataclasses.asdict(generation.result())}), flush=True)


def _print_summary(result: Result) -> None:
    print(usage_line(result.usage, result.prompt.seed), file=sys.stderr)


def _logprob_table(sequence: SequenceResult) -> str:
    rows = [
        (
            repr(position.chosen.text),
            f"{position.chosen.logprob:.3f}",
            str(position.chosen.rank),
            "  ".join(f"{entry.text!r} {entry.logprob:.3f}" for entry in position.top),
        )
        for position in sequence.logprobs
    ]
    return table(("token", "logprob", "rank", "most likely"), rows)
