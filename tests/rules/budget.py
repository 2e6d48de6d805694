"""The size budget: files of at most 300 lines, functions of at most 40, jit bodies of at most 120.

`python -m tests.rules.budget` prints what is over it. An exception needs a reason in EXCEPTIONS and
still obeys the hard limits.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.rules.tree import ROOT, python_files

FILE_LINES, HARD_FILE_LINES = 300, 400
FUNCTION_LINES, HARD_FUNCTION_LINES = 40, 60
JIT_LINES = 120
# "path" or "path:function" to the reason why the soft limit does not fit.
EXCEPTIONS: dict[str, str] = {
    "engine/engine.py": "one loop and its books",
    "mesh/instruments.py:declare": "a table: one line an instrument",
    "tests/engine/test_engine.py": "one subject",
    "tests/engine/test_engine.py:_random_life": "one script of a random life",
}


def violations() -> list[str]:
    """Every file and function over its limit, in words."""
    return [line for path in python_files() for line in _check(path, (ROOT / path).read_text())]


def _check(path: Path, source: str) -> Iterator[str]:
    num_lines = source.count("\n")
    limit = HARD_FILE_LINES if str(path) in EXCEPTIONS else FILE_LINES
    if num_lines > limit:
        yield f"{path}: {num_lines} lines, limit {limit}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _check_function(path, node)


def _check_function(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    name = f"{path}:{node.name}"
    limit = HARD_FUNCTION_LINES if name in EXCEPTIONS else FUNCTION_LINES
    if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
        limit = JIT_LINES
    num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if num_lines > limit:
        yield f"{name}: {num_lines} lines, limit {limit}"


if __name__ == "__main__":
    found = violations()
    print("\n".join(found) or "size budget: kept")
    sys.exit(1 if found else 0)
