"""`kvmesh doctor`: what is installed, what works here, how fast, and what to do about each problem.

Owns the judgement and the remedies. Anything that may crash runs in a child process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import importlib.metadata
import json
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.console import table

ROOT = Path(__file__).resolve().parents[1]
PROBE_TIMEOUT_S = 120.0
BANDWIDTH = "benchmarks.transfer_bandwidth"
PORTS = (50051, 50052, 50053)
NIXL = "nixl-cu13"
NIXL_VERSION = "1.5.1"
INSTALL_NIXL = f"pip install --no-deps {NIXL}=={NIXL_VERSION}"
PACKAGES = ("grpcio", "protobuf", "opentelemetry-sdk", "numpy", "transformers", "safetensors")
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class State(enum.StrEnum):
    """Verdict of one check; only `fail` makes the exit code 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--no-bandwidth", action="store_true", help="skip the transfer measurement")


def run_doctor(args: argparse.Namespace) -> int:
    """Prints the report; exit code 1 when something kvmesh needs does not work."""
    checks = list(examine(measure=not args.no_bandwidth))
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print(render(checks))
    return 1 if any(check.state is State.FAIL for check in checks) else 0


def examine(*, measure: bool) -> Iterator[Check]:
    """Every check, in the order of the report."""
    yield check_python(sys.version_info[:2])
    yield from map(check_package, PACKAGES)
    yield check_kernels_distribution()
    yield check_torch(probe("torch"))
    yield from check_nixl(probe("nixl"), _version(NIXL) or _version("nixl"))
    yield check_cma(read_sibling)
    yield check_path(find_paths())
    if measure:
        yield check_bandwidth(measure_bandwidth())
    yield from (check_port(port) for port in PORTS)


def render(checks: list[Check]) -> str:
    """The report: a table, then what to do."""
    rows = [(check.state, check.name, check.detail) for check in checks]
    remedies = [f"{check.name}: {check.remedy}" for check in checks if check.remedy]
    parts = [table(("", "check", "finding"), rows)]
    parts.append("\n".join(["What to do:", *remedies]) if remedies else "Nothing to do.")
    return "\n\n".join(parts)


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or newer."""
    text = f"{'.'.join(map(str, version))} on {platform.platform()}"
    if version < (3, 11):
        remedy = "install Python 3.11 or newer, then: make clean setup PYTHON=python3.11"
        return Check(name="python", state=State.FAIL, detail=text, remedy=remedy)
    return Check(name="python", state=State.OK, detail=text)


def check_package(name: str) -> Check:
    """An installed distribution."""
    if version := _version(name):
        return Check(name=name, state=State.OK, detail=version)
    return Check(
        name=name,
        state=State.WARN,
        detail="not installed",
        remedy="make setup (or the extra of the service you run: gateway, kvstore, worker)",
    )


def check_kernels_distribution() -> Check:
    """The Hugging Face package named kernels would shadow ours."""
    version = _version("kernels")
    if version is None:
        return Check(name="kernels", state=State.OK, detail="ours alone")
    return Check(
        name="kernels",
        state=State.FAIL,
        detail=f"the distribution kernels {version} collides with kvmesh's package",
        remedy="pip uninstall kernels",
    )


def check_torch(facts: dict[str, Any]) -> Check:
    """torch, and what it can compute on."""
    if "error" in facts:
        remedy = "make setup; workers (prefill, decode) need torch, gateway and kvstore do not"
        return Check(name="torch", state=State.WARN, detail=str(facts["error"]), remedy=remedy)
    devices = ", ".join(facts["devices"]) or "no CUDA device: workers run on the CPU"
    detail = f"{facts['version']}, {facts['num_threads']} CPU threads; {devices}"
    return Check(name="torch", state=State.OK, detail=detail)


def check_nixl(facts: dict[str, Any], version: str | None) -> Iterator[Check]:
    """NIXL's import, version, plugins and a UCX agent."""
    if "error" in facts:
        detail = str(facts["error"])
        yield Check(name="nixl", state=State.FAIL, detail=detail, remedy=INSTALL_NIXL)
        return
    detail = f"{facts['module']} {version}"
    if version == NIXL_VERSION:
        yield Check(name="nixl", state=State.OK, detail=detail)
    else:
        remedy = f"every process must run the same version; {INSTALL_NIXL}"
        yield Check(name="nixl", state=State.WARN, detail=detail, remedy=remedy)
    has_ucx = "UCX" in facts["backends"]
    yield Check(
        name="nixl backends",
        state=State.OK if has_ucx else State.FAIL,
        detail=f"open: {', '.join(facts['backends'])}; plugins: {', '.join(facts['plugins'])}",
        remedy="" if has_ucx else f"UCX is missing; reinstall: {INSTALL_NIXL} --force-reinstall",
    )


def check_cma(read: Callable[[], str]) -> Check:
    """Whether one process may read another's memory: the fast path between processes here."""
    scope = YAMA.read_text().strip() if YAMA.exists() else "absent"
    problem = read()
    if not problem:
        detail = f"process_vm_readv between siblings works (ptrace_scope {scope})"
        return Check(name="cma", state=State.OK, detail=detail)
    return Check(
        name="cma",
        state=State.WARN,
        detail=f"{problem} (ptrace_scope {scope}): transfers fall back to TCP",
        remedy="sysctl kernel.yama.ptrace_scope=0, or in a container --cap-add SYS_PTRACE",
    )


def check_path(facts: dict[str, Any]) -> Check:
    """Who moves the blocks between kvstores and workers whose memory is DRAM (kv/path.py)."""
    if "error" in facts:
        remedy = "the checks of nixl say what is missing"
        detail = str(facts["error"])
        return Check(name="kv path", state=State.WARN, detail=detail, remedy=remedy)
    detail = f"{facts['here']} from kvstores of this host, {facts['elsewhere']} from others"
    return Check(name="kv path", state=State.OK, detail=f"auto: {detail}")


def check_bandwidth(facts: dict[str, Any]) -> Check:
    """What a NIXL transfer between two processes reaches here: the best row of the benchmark."""
    if "error" in facts:
        return Check(
            name="transfer bandwidth",
            state=State.FAIL,
            detail=str(facts["error"]),
            remedy=f"python -m {BANDWIDTH} shows the whole failure",
        )
    best = max(facts["rows"], key=lambda row: row["read_gb_per_s"])
    size = f"{best['num_blocks']} blocks of {best['block_num_bytes'] / 2**20:g} MiB"
    detail = (
        f"READ {best['read_gb_per_s']:.1f}, WRITE {best['write_gb_per_s']:.1f}, "
        f"memcpy {best['memcpy_gb_per_s']:.1f} GB/s ({size})"
    )
    return Check(name="transfer bandwidth", state=State.OK, detail=detail)


def check_port(port: int) -> Check:
    """Whether `kvmesh up` could listen on its default ports."""
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(
                name=f"port {port}",
                state=State.WARN,
                detail=str(error),
                remedy="a mesh may be running (kvmesh status); else kvmesh up --port 0",
            )
    return Check(name=f"port {port}", state=State.OK, detail="free")


def probe(name: str) -> dict[str, Any]:
    """The facts of one probe of kvmesh.probes, or its failure under `error`."""
    return run_json("kvmesh.probes", name)


def measure_bandwidth() -> dict[str, Any]:
    """The rows of a short run of the transfer benchmark, or its failure under `error`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bandwidth.json"
        done = _run(BANDWIDTH, "--repeats", "3", "--out", str(out))
        if done.returncode == 0 and out.exists():
            return json.loads(out.read_text())
    return {"error": _failure(BANDWIDTH, done)}


def run_json(module: str, *flags: str) -> dict[str, Any]:
    """Runs a module in a child process; its last line is a JSON object. Failures under `error`."""
    done = _run(module, *flags)
    try:
        facts = json.loads((done.stdout.strip().splitlines() or [""])[-1])
    except ValueError:
        facts = None
    if done.returncode != 0 or not isinstance(facts, dict):
        return {"error": _failure(module, done)}
    return facts


def read_sibling() -> str:
    """Lets one child read another's memory; returns what went wrong, empty when it worked."""
    with _owner("cma-owner") as line:
        facts = json.loads(line)
        answer = run_json("kvmesh.probes", "cma-reader", str(facts["pid"]), str(facts["address"]))
        if "error" in answer:
            return str(answer["error"])
        return "" if answer["head"] == facts["head"] else "read other bytes than were written"


def find_paths() -> dict[str, Any]:
    """The paths to a kvstore `here` and `elsewhere`, or the failure under `error`."""
    with _owner("path-owner") as line:
        return run_json("kvmesh.probes", "path-reader", line)


@contextlib.contextmanager
def _owner(name: str) -> Iterator[str]:
    """A probe that lives as long as the with block, and its first line."""
    owner = subprocess.Popen(
        [sys.executable, "-m", "kvmesh.probes", name],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        yield owner.stdout.readline()
    finally:
        owner.communicate()


def _run(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """One child process; one that does not end in time counts as exit code 124."""
    command = [sys.executable, "-m", module, *flags]
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        text = f"did not end within {PROBE_TIMEOUT_S:g} s"
        return subprocess.CompletedProcess(command, 124, "", text)


def _failure(module: str, done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"]
    return f"{module} ended with {done.returncode}: {lines[-1]}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
