"""The README's commands and programs work as written, against a mesh on the default port."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.tree import ROOT

README = (ROOT / "README.md").read_text()
DEFAULT_PORTS = (50051, 50052, 50053)
TIMEOUT_S = 100


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
STARTS = [line for line in COMMANDS if line.startswith("kvmesh up")]
USES = [line for line in COMMANDS if line not in STARTS]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An activated environment: `kvmesh` and `python` are this interpreter's."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in (("python", ""), ("kvmesh", "-m kvmesh")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def start(command: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Starts a mesh and waits until it serves."""
    process = subprocess.Popen(
        shlex.split(command),
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if "serves at" in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process
    raise AssertionError(f"{command} ended with {process.wait()}:\n{''.join(lines)}")


def stop(process: subprocess.Popen[str]) -> int:
    """Ctrl-C; returns the exit code."""
    process.send_signal(signal.SIGINT)
    return process.wait(TIMEOUT_S)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def mesh(environment: dict[str, str]) -> Iterator[None]:
    if not all(map(is_free, DEFAULT_PORTS)):
        pytest.skip(f"another mesh holds one of the default ports {DEFAULT_PORTS}")
    process = start("kvmesh up", environment)
    yield
    assert stop(process) == 0


@pytest.mark.parametrize("command", USES)
def test_a_command_works_as_written(command: str, mesh: None, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    # The doctor warns of the ports that this very mesh holds, and exits 0 all the same.
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("program", blocks("python"), ids=lambda program: program.splitlines()[0])
def test_a_program_works_as_written(
    program: str, mesh: None, environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        ["python", "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", STARTS)
def test_a_mesh_starts_as_written_and_ends_on_ctrl_c(
    command: str, environment: dict[str, str]
) -> None:
    process = start(command, environment)
    assert stop(process) == 0


def test_make_targets_named_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"[`\n]make ([a-z-]+)", text)) <= targets


def test_links_in_the_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    dead = [
        (document.name, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not dead
