"""Other projects' kernels beside ours: they lie in .peers/, which is not part of this project.

Owns where they are found. Without a file there is nothing to compare with, and no error.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parents[2] / ".peers"


@cache
def peer_module(path: str) -> ModuleType | None:
    """The module in .peers/<path>; None when it is not there."""
    file = _FOLDER / path
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"peers_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
