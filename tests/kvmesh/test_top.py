"""`kvmesh top` over a gateway that answers from a script: frames, pipes, and the terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kvmesh import cli, top_frame
from mesh import buckets
from mesh.step_rates import Board, RateTracker
from protos import status_pb2, status_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"
PATIENCE_S = 60


def statuses(num_looks: int) -> list[status_pb2.InstanceStatus]:
    """A gateway and a rank that makes 50 steps of 8 tokens a second, one a look."""
    num_steps = 50 * num_looks
    gateway = status_pb2.InstanceStatus(role=status_pb2.ROLE_GATEWAY, ready=True)
    steps = status_pb2.DecodeSteps(
        num_steps=num_steps,
        forward_s=0.015 * num_steps,
        gap_s=0.005 * num_steps,
        num_delivered=8 * num_steps,
        num_recomputed=2 * num_steps,
        num_running=8,
        steps_by_tokens=[num_steps if row == 3 else 0 for row in range(len(buckets.COUNTS) + 1)],
        steps_by_inter_token=[num_steps * (row % 2) for row in range(len(buckets.PER_TOKEN_S) + 1)],
    )
    rank = status_pb2.InstanceStatus(
        role=status_pb2.ROLE_DECODE,
        address="127.0.0.1:7",
        ready=True,
        counts=status_pb2.Counts(num_tokens=8 * num_steps, num_blocks_used=3, num_blocks=40),
        model=status_pb2.WorkerModel(name="demo"),
        decode_steps=steps,
        uptime_s=num_looks,
    )
    return [gateway, rank]


def boards(num_looks: int) -> list[Board]:
    tracker = RateTracker()
    return [tracker.observe(statuses(number)) for number in range(1, num_looks + 1)]


class Gateway(status_pb2_grpc.StatusServiceServicer):
    """An admin port; each look at it is a second later."""

    def __init__(self, port: int = 0) -> None:
        self._num_looks = 0
        self._server = grpc.server(ThreadPoolExecutor(2))
        status_pb2_grpc.add_StatusServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def GetStatus(  # noqa: N802
        self, request: status_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        self._num_looks += 1
        return status_pb2.GetStatusResponse(instances=statuses(self._num_looks))

    def close(self) -> None:
        self._server.stop(None).wait()


class Terminal:
    """`kvmesh top` on a terminal of its own."""

    def __init__(self, port: int) -> None:
        self._ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmesh", "top", "--admin-addr", f"127.0.0.1:{port}",
             "--interval", "0.2"],
            cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._theirs = theirs
        self.output = b""

    def until(self, words: bytes) -> bytes:
        """Reads until it shows the words; returns everything since the last call."""
        while words not in self.output:
            ready, _, _ = select.select([self._ours], [], [], PATIENCE_S)
            assert ready, f"never shown: {words!r}\n{self.output[-4000:]!r}"
            self.output += os.read(self._ours, 65536)
        shown, self.output = self.output, b""
        return shown

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def mode(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def terminal(gateway: Gateway) -> Iterator[Terminal]:
    terminal = Terminal(gateway.port)
    yield terminal
    terminal.close()


def text(num_looks: int, *, width: int = 120, trouble: str = "") -> str:
    lines = top_frame.frame(boards(num_looks), source="g:2", trouble=trouble, width=width)
    return "\n".join(top_frame.paint(line, width=width, is_coloured=False) for line in lines)


def test_a_frame_shows_the_boards_figures() -> None:
    shown = text(5)
    for words in (
        "kvmesh demo  g:2  live",
        "tokens/s 400   steps/s 50.0   tokens per step 6 p50, 8 p95",
        "gap 25.0 %   wasted 20.0 %   recomputed 20.0 %",
        "forward 15 ms",
        "max 400",
        "3/40",
    ):
        assert words in shown


def test_a_heat_map_shows_the_rows_with_most_steps() -> None:
    shown = text(3)
    assert "≤ 8 " in shown and "≤ 16 " not in shown
    rows = shown[shown.index("inter-token, steps") :].splitlines()[1:]
    assert len(rows) == 8


def test_before_the_second_look_there_is_a_table_and_no_rates() -> None:
    shown = text(1)
    assert "no decode rank has told of its steps twice yet" in shown and "decode 0" in shown


def test_trouble_stands_beside_the_last_figures() -> None:
    shown = text(3, trouble="the gateway is gone")
    assert "the gateway is gone" in shown and "live" not in shown and "tokens/s 400" in shown


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = top_frame.frame(boards(300), source="g:2", trouble="", width=width)
    for line in lines:
        painted = top_frame.paint(line, width=width, is_coloured=True)
        assert len(re.sub(r"\x1b\[\d+m", "", painted)) <= width


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["top", *argv])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_once_prints_one_frame_without_colours(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--admin-addr", f"127.0.0.1:{gateway.port}", "--once", "--interval", "0.2") == 0
    out = capsys.readouterr().out
    assert out.count("kvmesh demo") == 1 and "tokens/s 400" in out and "\x1b" not in out


def test_once_without_a_gateway_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--admin-addr", "127.0.0.1:1", "--once") == 1
    assert "nothing answers at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "0.1", "1e9"])
def test_an_interval_that_is_none_is_refused(
    interval: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--interval", interval) == 2
    assert f"--interval {float(interval)}: give 0.2 to 3600" in capsys.readouterr().err


def test_a_pipe_gets_plain_frames_until_its_reader_is_gone(gateway: Gateway) -> None:
    address = f"127.0.0.1:{gateway.port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmesh", "top", "--admin-addr", address, "--interval", "0.2"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    num_frames = 0
    for line in process.stdout:
        assert b"\x1b" not in line
        num_frames += line.startswith(b"kvmesh demo")
        if num_frames == 3:
            break
    process.stdout.close()
    assert process.wait(PATIENCE_S) == cli.BROKEN_PIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_q_ends_it_and_gives_the_terminal_back(terminal: Terminal) -> None:
    terminal.until(b"tokens/s")
    assert terminal.mode() != terminal.before
    terminal.type(b"xq")
    terminal.until(LEFT)
    assert terminal.process.wait(PATIENCE_S) == 0
    assert terminal.mode() == terminal.before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_gives_the_terminal_back(
    terminal: Terminal, number: signal.Signals
) -> None:
    terminal.until(b"tokens/s")
    terminal.process.send_signal(number)
    terminal.until(LEFT)
    assert terminal.process.wait(PATIENCE_S) == 0
    assert terminal.mode() == terminal.before


def test_a_suspended_one_gives_the_terminal_back_meanwhile(terminal: Terminal) -> None:
    terminal.until(b"tokens/s")
    terminal.process.send_signal(signal.SIGTSTP)
    terminal.until(LEFT)
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status) and terminal.mode() == terminal.before
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until(ENTERED)
    terminal.until(b"tokens/s")
    terminal.type(b"q")
    assert terminal.process.wait(PATIENCE_S) == 0


def test_it_outlives_the_gateway(terminal: Terminal, gateway: Gateway) -> None:
    terminal.until(b"live")
    gateway.close()
    terminal.until(b"the gateway is gone, trying again")
    successor = Gateway(gateway.port)
    terminal.until(b"live")
    successor.close()
