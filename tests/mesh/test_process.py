"""Processes start, drain and end with the exit codes a supervisor can rely on."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mesh.logs import setup_logging
from mesh.process import (
    StartupError,
    Supervisor,
    host_id,
    new_incarnation,
    num_fds,
    rss_num_bytes,
    task_count,
)

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60
SERVICE = """
import asyncio, sys
from mesh.process import Supervisor, announce_ready, run_service
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry

async def main(stop):
    telemetry = Telemetry.off()
    server = ServiceServer(host="127.0.0.1", port=int(sys.argv[1]), telemetry=telemetry)
    port = await server.start()
    announce_ready(role="toy", address=f"127.0.0.1:{port}", incarnation="1")
    BODY
    await server.stop(1.0)
    print("drained", flush=True)

run_service(main, die_with_parent="--die" in sys.argv)
"""


def launch(body: str = "await stop.wait()", *argv: str) -> subprocess.Popen[str]:
    source = SERVICE.replace("BODY", textwrap.indent(body, "    ").lstrip())
    return subprocess.Popen(
        [sys.executable, "-c", source, *(argv or ("0",))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.match(r"kvmesh-ready role=toy address=127\.0\.0\.1:\d+ incarnation=1$", line), line


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it still printed, until it ended; `communicate` would lose lines already buffered."""
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        out, err = process.stdout.read(), process.stderr.read()
    process.wait()
    return out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number: signal.Signals) -> None:
    process = launch()
    ready(process)
    process.send_signal(number)
    out, err = finish(process)
    assert process.returncode == 0 and out == "drained\n" and err == ""


def test_a_second_signal_exits_130_at_once() -> None:
    process = launch(
        "await stop.wait(); print('draining', flush=True); await asyncio.Event().wait()"
    )
    ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGINT)
    finish(process)
    assert process.returncode == 130


def test_a_taken_port_is_one_clear_line_and_exit_code_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = launch("await stop.wait()", str(port))
        out, err = finish(process)
    assert process.returncode == 1 and out == ""
    assert f"error: cannot listen on 127.0.0.1:{port}: the port is taken" in err
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback_and_exits_1() -> None:
    process = launch("raise KeyError('bug')")
    _, err = finish(process)
    assert process.returncode == 1 and "Traceback" in err and "KeyError: 'bug'" in err


def test_a_failed_background_task_drains_and_exits_1() -> None:
    body = """
async def fail():
    raise RuntimeError("disk is gone")
tasks = Supervisor(stop)
tasks.spawn(asyncio.Event().wait(), "idle")
tasks.spawn(fail(), "sweep")
await stop.wait()
await tasks.close()
print("closed", flush=True)
tasks.raise_failure()"""
    process = launch(body.strip())
    ready(process)
    out, err = finish(process)
    assert process.returncode == 1 and "closed" in out
    assert "error: sweep failed: RuntimeError('disk is gone')" in err


def test_a_service_ends_with_its_parent_when_told_to() -> None:
    source = SERVICE.replace("BODY", "await stop.wait()")
    parent_source = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], '0', '--die'])\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_source, source], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    ready(parent)  # the child's line: it writes to its parent's stdout
    parent.kill()
    parent.wait()
    assert parent.stdout is not None
    assert parent.stdout.read() == "drained\n", "end of file comes when the child is gone too"
    parent.stdout.close()


async def test_a_supervisor_keeps_the_first_failure_and_cancels_the_rest() -> None:
    stop = asyncio.Event()
    tasks = Supervisor(stop)
    idle = tasks.spawn(asyncio.Event().wait(), "idle")

    async def fail() -> None:
        raise RuntimeError("first")

    tasks.spawn(fail(), "loop")
    await asyncio.wait_for(stop.wait(), WAIT_S)
    await tasks.close()
    assert idle.cancelled()
    with pytest.raises(StartupError, match="loop failed: RuntimeError"):
        tasks.raise_failure()


async def test_a_supervisor_takes_a_clean_end_for_no_failure() -> None:
    stop = asyncio.Event()
    tasks = Supervisor(stop)
    await tasks.spawn(asyncio.sleep(0), "brief")
    await tasks.close()
    tasks.raise_failure()
    assert not stop.is_set()


def test_figures_follow_what_the_process_holds() -> None:
    before = num_fds()
    with open(os.devnull) as _, open(os.devnull) as _other:
        assert num_fds() == before + 2
    assert num_fds() == before
    assert rss_num_bytes() > 10 * 2**20


async def test_tasks_are_counted_while_they_live() -> None:
    tasks = task_count()
    extra = asyncio.ensure_future(asyncio.Event().wait())
    assert task_count() == tasks + 1
    extra.cancel()
    await asyncio.wait([extra])
    assert task_count() == tasks


def test_incarnations_differ_and_host_ids_do_not() -> None:
    assert new_incarnation() != new_incarnation() and len(new_incarnation()) == 16
    assert host_id() == host_id() and host_id().startswith(socket.gethostname())


def test_json_logs_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        setup_logging("json", "info", "decode")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("kvmesh.x").exception("broken %s", "pipe")
        logging.getLogger("kvmesh.x").debug("unseen")
        setup_logging("text", "debug", "decode")
        logging.getLogger("kvmesh.y").debug("seen")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    first, second = capsys.readouterr().err.splitlines()
    entry = json.loads(first)
    assert entry["level"] == "error" and entry["role"] == "decode" and entry["logger"] == "kvmesh.x"
    assert entry["message"] == "broken pipe" and "ValueError: two\nlines" in entry["exception"]
    assert "decode DEBUG kvmesh.y: seen" in second


def test_counts_can_be_read_without_a_free_descriptor() -> None:
    script = (
        "import resource; from mesh.process import num_fds, rss_num_bytes;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); print(num_fds(), rss_num_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    num_open, num_bytes = map(int, done.stdout.split())
    assert num_open == 3 and num_bytes > 2**20
