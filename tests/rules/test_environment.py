"""The environment is read in mesh/settings.py and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.tree import PRODUCT, ROOT, python_files

SETTINGS = Path("mesh/settings.py")
# Sets defaults that UCX and NIXL read when they are loaded; reads nothing.
SETS_DEFAULTS = Path("kv/nixl_transfer.py")
NAMES = ("environ", "environb", "getenv", "getenvb")


def uses(source: str) -> Iterator[str]:
    """Every use of the environment: the expression around `os.environ`, or the import."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in NAMES
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        ):
            parent = parents[node]
            yield ast.unparse(parent if isinstance(parent, ast.Attribute) else node)


@pytest.mark.parametrize("path", python_files(*PRODUCT), ids=str)
def test_the_environment_is_not_read(path: Path) -> None:
    found = [use for use in uses((ROOT / path).read_text()) if path != SETTINGS]
    if path == SETS_DEFAULTS:
        found = [use for use in found if use != "os.environ.setdefault"]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']",
        "import os\nos.getenv('A')",
        "from os import environ",
        "import os\nos.environ.get('A')",
    ],
)
def test_the_rule_sees_every_way_of_reading(source: str) -> None:
    assert list(uses(source))
