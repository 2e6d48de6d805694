"""What lies in the tree: its size, its docstrings, what must not be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.rules.tree import PRODUCT, ROOT, project_files, python_files

MAX_TREE_BYTES = 30 * 10**6
MAX_DEMO_BYTES = 12 * 10**6
BANNED_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py", "manager.py"}
# Words that mark unfinished work; spelled apart so that this file does not contain them.
UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")))


def num_bytes(paths: tuple[Path, ...]) -> int:
    return sum((ROOT / path).stat().st_size for path in paths)


def test_the_tree_is_small() -> None:
    files = project_files()
    assert num_bytes(files) < MAX_TREE_BYTES
    demo = tuple(path for path in files if path.parts[:2] == ("models", "demo"))
    assert num_bytes(demo) <= MAX_DEMO_BYTES


def test_modules_are_named_after_what_they_own() -> None:
    assert not [path for path in python_files() if path.name in BANNED_NAMES]


@pytest.mark.parametrize("path", python_files(*PRODUCT, "tools", "benchmarks"), ids=str)
def test_a_module_opens_with_what_it_owns(path: Path) -> None:
    source = (ROOT / path).read_text()
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(source))
    assert not UNFINISHED.search(source)
    assert "time.sleep(" not in source
