"""`kvmesh up` as a process: what it prints and how it ends, over fake services."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("fake_service.py")
PROGRAM = """
import sys
from kvmesh import cli, plan
script, journal, mode, *argv = sys.argv[1:]
plan.ServiceSpec.command = property(
    lambda self: [sys.executable, script, self.name, journal, mode]
)
cli.main(argv)
"""


class Up:
    """`kvmesh up` with its services replaced by the fake script."""

    def __init__(self, folder: Path, mode: str, *flags: str) -> None:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (folder / name).write_text("{}")
        self.journal = folder / "journal"
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", PROGRAM, str(SCRIPT), str(self.journal), mode,
                "up", "--model", str(folder), "--port", "0", "--drain-s", "1", *flags,
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until(self, words: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"never printed: {words}\n{self.process.communicate()[1]}")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_drains_and_exits_zero(folder: Path, number: signal.Signals) -> None:
    up = Up(folder, "ready")
    up.until("generate")
    up.process.send_signal(number)
    _, errors = up.process.communicate(timeout=60)
    assert up.process.returncode == 0, errors
    assert "term gateway" in up.journal.read_text()


def test_it_prints_the_address_and_a_line_to_paste(folder: Path) -> None:
    up = Up(folder, "ready")
    address = up.until("serves at").split()[3]
    assert f"--addr {address}" in up.until("generate")
    port = int(address.rpartition(":")[2])
    assert f"live page: http://127.0.0.1:{port + 2}" in up.until("live page")
    up.process.send_signal(signal.SIGINT)
    up.process.communicate(timeout=60)


def test_the_second_signal_kills(folder: Path) -> None:
    up = Up(folder, "stubborn", "--drain-s", "3600")
    up.until("Ctrl-C")
    up.process.send_signal(signal.SIGINT)
    assert up.process.stderr is not None
    for line in up.process.stderr:
        if "draining" in line:
            break
    up.process.send_signal(signal.SIGINT)
    up.process.communicate(timeout=60)
    assert up.process.returncode == 130


def test_a_service_that_cannot_start_ends_the_mesh_with_its_words(folder: Path) -> None:
    up = Up(folder, "broken")
    _, errors = up.process.communicate(timeout=60)
    assert up.process.returncode == 1
    assert "ended with exit code 3" in errors  # whichever service ended first
    assert "cannot find the model" in errors


@pytest.mark.parametrize(
    "flags",
    [
        "--decode 0",
        "--admin-port 70000",
        "--http-port 70000",
        "--max-batch 0",
        "--drain-s nan",
        "--host 9.9.9.9",
    ],
)
def test_bad_flags_exit_two_with_the_flag_before_anything_starts(folder: Path, flags: str) -> None:
    up = Up(folder, "ready", *flags.split())
    _, errors = up.process.communicate(timeout=60)
    assert up.process.returncode == 2
    assert errors.startswith(f"kvmesh up: {flags}")
    assert not up.journal.exists()
