"""What the commands print: log lines with the service's colour, tables, one-line figures.

Owns the terminal's look; decides nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from kvmesh.answer import Usage

_COLOURS = {"gateway": 36, "prefill": 33, "decode": 32, "kvstore": 35}
_NAME_WIDTH = 10


class LogPrinter:
    """Prints the mesh's log lines, to stderr: `printer(name, line)`."""

    def __init__(self, log_format: str = "text", stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_json = log_format == "json"
        self._is_coloured = self._stream.isatty()

    def __call__(self, name: str, line: str) -> None:
        """Text: the name in its role's colour, then the line. JSON: every line is an object."""
        if self._is_json:
            print(_as_json(name, line), file=self._stream, flush=True)
            return
        label = f"{name:<{_NAME_WIDTH}}"
        if self._is_coloured:
            colour = _COLOURS.get(name.partition("-")[0], 34)
            label = f"\x1b[{colour}m{label}\x1b[0m"
        print(f"{label} | {line}", file=self._stream, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def usage_line(usage: Usage, seed: int) -> str:
    """One line of figures after an answer."""
    rate = (usage.num_output_tokens - 1) / usage.decode_s if usage.decode_s > 0 else 0.0
    return (
        f"[{usage.num_output_tokens} tokens, prompt {usage.num_prompt_tokens} "
        f"({usage.num_cached_tokens} cached), first token {usage.first_token_s * 1e3:.0f} ms, "
        f"{rate:.0f} tokens/s, seed {seed}]"
    )


def _as_json(name: str, line: str) -> str:
    try:
        if isinstance(json.loads(line), dict):
            return line
    except ValueError:
        pass
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"time": stamp, "level": "INFO", "role": name, "message": line})
