"""The README works as written: its commands and programs, against the mesh it starts; figures."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.tree import ROOT
from tests.support.readme import FENCES, PROSE, TEXT, blocks, commands
from tests.support.terminal import Terminal

DEFAULT_PORTS = (50051, 50052, 50053)
TIMEOUT_S = 100
SERVING = "Ctrl-C drains and stops"
NO_REGISTRY = re.compile(r"code (EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENOTFOUND|ETIMEDOUT)\b")
pytestmark = pytest.mark.timeout(300)  # a mesh starts and ends in one test, maybe on a busy machine

# Every command is one of these; docker's are in tests/compose.
FIRST = "make run"
CI = ("make setup", "make test")
ACTIVATE = "source .venv/bin/activate"
STARTS = [line for line in commands("kvmesh") if line.startswith("kvmesh up")]
ENDS = {"kvmesh top": ("inter-token", "q")}  # what a command shows on a terminal, what ends it
NODE, NPM = commands("node"), commands("npm")
USES = [
    line
    for line in commands("kvmesh", "python", "buf", "make")
    if line not in (FIRST, *CI, *STARTS, *ENDS)
]
PROGRAMS = ("buf", "docker", "kvmesh", "kubectl", "make", "node", "npm", "pip", "python", "source")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An activated environment that is set up: `kvmesh` and its like are this interpreter's."""
    folder = tmp_path_factory.mktemp("bin")
    python = shlex.quote(sys.executable)
    for name, words in {
        "python": python,
        "kvmesh": f"{python} -m kvmesh",
        "buf": shlex.quote(str(Path(sys.executable).with_name("buf"))),
        "make": f"{shutil.which('make')} -o setup BIN={shlex.quote(str(folder))}",
    }.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def start(command: str, environment: dict[str, str]) -> Terminal:
    """Starts a mesh on a terminal and waits until it serves."""
    terminal = Terminal(shlex.split(command), cwd=ROOT, env=environment)
    try:
        terminal.wait_for(SERVING)
    except BaseException:
        terminal.close()
        raise
    return terminal


def run(command: str, environment: dict[str, str]) -> str:
    """What a command prints; AssertionError when it fails or prints nothing."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    return done.stdout


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def mesh(environment: dict[str, str]) -> Iterator[Terminal]:
    """The first of the two commands, with what it showed; Ctrl-C ends it at the end."""
    if not all(map(is_free, DEFAULT_PORTS)):
        pytest.skip(f"another mesh holds one of the default ports {DEFAULT_PORTS}")
    terminal = start(FIRST, environment)
    yield terminal
    assert terminal.end("\x03") == 0, terminal.shown


@pytest.fixture(scope="module")
def node_packages(environment: dict[str, str]) -> None:
    """What the example in Node.js needs is installed, as the README says."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"EXAMPLE IN NODE.JS NOT TESTED: not installed: {', '.join(missing)}")
    for command in NPM:
        done = subprocess.run(
            shlex.split(command),
            cwd=ROOT, env={**environment, "npm_config_fetch_retries": "0"},
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        if NO_REGISTRY.search(done.stderr):
            pytest.skip("EXAMPLE IN NODE.JS NOT TESTED: npm reaches no registry")
        assert done.returncode == 0, done.stderr


def test_every_command_has_a_test() -> None:
    covered = {FIRST, ACTIVATE, *CI, *STARTS, *ENDS, *USES, *NODE, *NPM, *commands("docker")}
    assert not set(commands()) - covered
    assert {language for language, _ in FENCES} <= {"sh", "python"}
    named = [span for span in re.findall(r"`([^`\n]+)`", PROSE) if span.split()[0] in PROGRAMS]
    assert not [span for span in named if len(span.split()) > 1 and span not in covered]


def test_ci_runs_what_runs_this_test() -> None:
    steps = re.findall(r"^step (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert set(CI) <= {f"make {step}" for step in steps}


def test_an_activated_environment_has_the_command() -> None:
    if not (ROOT / ".venv").exists():
        pytest.skip("no .venv: another environment runs the tests")
    command = f"{ACTIVATE} && command -v kvmesh"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert Path(done.stdout.strip()).samefile(ROOT / ".venv" / "bin" / "kvmesh"), done.stderr


def test_make_run_streams_an_answer_and_says_where_it_serves(mesh: Terminal) -> None:
    assert "In the beginning" in mesh.shown
    assert re.search(r"\[64 tokens, prompt", mesh.shown)
    assert "127.0.0.1:50051" in mesh.shown


@pytest.mark.parametrize("command", USES)
def test_a_command_works_as_written(
    command: str, mesh: Terminal, environment: dict[str, str]
) -> None:
    # The doctor warns of the ports that this very mesh holds, and exits 0 all the same.
    run(command, environment)


@pytest.mark.parametrize("command", ENDS)
def test_a_command_on_a_terminal_ends_with_its_key(
    command: str, mesh: Terminal, environment: dict[str, str]
) -> None:
    assert command in commands()
    text, key = ENDS[command]
    terminal = Terminal(shlex.split(command), cwd=ROOT, env={**environment, "TERM": "xterm"})
    terminal.wait_for(text)
    assert terminal.end(key) == 0, terminal.shown


@pytest.mark.parametrize("program", blocks("python"), ids=lambda program: program.splitlines()[0])
def test_a_program_works_as_written(
    program: str, mesh: Terminal, environment: dict[str, str]
) -> None:
    run(f"python -c {shlex.quote(program)}", environment)


@pytest.mark.parametrize("command", NODE)
def test_the_example_in_node_works_as_written(
    command: str, mesh: Terminal, node_packages: None, environment: dict[str, str]
) -> None:
    assert re.search(r"\n\d+ tokens\n$", run(command, environment))


@pytest.mark.parametrize("url", sorted(set(re.findall(r"http://[^\s`)]+", PROSE))))
def test_a_page_is_where_it_is_said_to_be(url: str, mesh: Terminal) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        assert answer.headers.get_content_type() == "text/html"
        assert "<title>kvmesh</title>" in answer.read().decode()


@pytest.mark.parametrize("command", STARTS)
def test_a_mesh_starts_as_written_and_ends_on_ctrl_c(
    command: str, environment: dict[str, str]
) -> None:
    terminal = start(command, environment)
    assert terminal.end("\x03") == 0, terminal.shown


def numbers(value: object) -> Iterator[float]:
    """Every number in a result."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("row", re.findall(r"^\|.*benchmarks/results/.*\|$", TEXT, re.MULTILINE))
def test_figures_are_those_of_the_file_that_is_named(row: str) -> None:
    (target,) = re.findall(r"\((benchmarks/results/\w+\.json)\)", row)
    known = list(numbers(json.loads((ROOT / target).read_text())))
    _, _what, *cells, _source, _ = row.split("|")
    figures = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", " ".join(cells))
    assert figures
    for figure in figures:
        num_digits = len(figure.partition(".")[2])
        assert figure in {f"{number:,.{num_digits}f}" for number in known}, f"{figure}: {target}"


def test_make_targets_named_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = TEXT + (ROOT / "CONTRIBUTING.md").read_text()
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
