"""The project's files: what git tracks or would track; in a copy without git, what is no output."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("engine", "kernels", "kv", "kvmesh", "mesh", "services")
_OUTPUTS = (".git", ".venv", "build", "dist", "__pycache__", "node_modules", "results")
_STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Every file of the project that exists, relative to its root."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
        paths = [Path(name) for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        paths = [path for path in paths if not _is_output(path)]
    return tuple(sorted(path for path in paths if (ROOT / path).is_file()))


def python_files(*folders: str) -> tuple[Path, ...]:
    """The project's Python files, generated stubs excepted; all or those under some folders."""
    return tuple(
        path
        for path in project_files()
        if path.suffix == ".py"
        and not path.name.endswith(_STUBS)
        and (not folders or path.parts[0] in folders)
    )


def _is_output(path: Path) -> bool:
    hidden = any(part.startswith(".") and part != ".ci" for part in path.parts[:-1])
    return hidden or path.name.endswith(_STUBS) or bool(set(path.parts) & set(_OUTPUTS))
