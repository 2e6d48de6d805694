"""The wire is commented and follows buf's STANDARD rules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules.tree import ROOT

PROTOS = sorted((ROOT / "protos").glob("*.proto"))
DECLARATION = re.compile(
    r"^\s*(message|service|enum|rpc|oneof|(optional |repeated )?[\w.<>, ]+ \w+ =)"
)
BUF = Path(sys.executable).with_name("buf")


def test_buf_lint_is_clean() -> None:
    done = subprocess.run([BUF, "lint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_declaration_is_commented(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = [
        f"{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if DECLARATION.match(line)
        and not line.startswith(("syntax", "option "))
        and not lines[number - 1].strip().startswith("//")
    ]
    assert not bare
    assert lines[0].startswith("//")


def test_the_stubs_are_not_tracked() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py"} <= set(ignored)
