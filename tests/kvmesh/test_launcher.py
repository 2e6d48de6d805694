"""The launcher over tiny fake services: order, restarts, drain, kill."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmesh import launcher as launcher_module
from kvmesh.launcher import Child, Launcher, LaunchError
from kvmesh.plan import MeshPlan, ServiceSpec

SCRIPT = Path(__file__).with_name("fake_service.py")


@dataclass(frozen=True, kw_only=True)
class FakeSpec(ServiceSpec):
    """A service whose process is the fake script."""

    journal: Path
    mode: str = "ready"

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPT), self.name, str(self.journal), self.mode]


class Harness:
    """A launcher, what it logged, and the journal of its children."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.lines: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.seen: list[tuple[str, str]] = []
        self.launcher: Launcher

    def build(self, *, drain_s: float = 10.0, **modes: str) -> Launcher:
        def spec(name: str) -> FakeSpec:
            return FakeSpec(
                role=name.partition("-")[0],
                name=name,
                address="127.0.0.1:1",
                flags=(),
                journal=self.journal,
                mode=modes.get(name.replace("-", "_"), "ready"),
            )

        plan = MeshPlan(
            kvstores=(spec("kvstore-0"),),
            workers=(spec("prefill-0"), spec("decode-0")),
            gateway=spec("gateway"),
            admin_address="127.0.0.1:2",
            http_address="127.0.0.1:3",
            drain_s=drain_s,
        )
        self.launcher = Launcher(plan, lambda name, line: self.lines.put_nowait((name, line)))
        return self.launcher

    def child(self, name: str) -> Child:
        return next(child for child in self.launcher.children if child.spec.name == name)

    async def until(self, condition: Callable[[str, str], bool]) -> None:
        while not condition(*(entry := await self.lines.get())):
            self.seen.append(entry)

    def events(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    harness = Harness(tmp_path / "journal")
    yield harness
    harness.launcher.kill()
    await harness.launcher.stop()


async def test_the_gateway_drains_first_and_the_store_last(harness: Harness) -> None:
    launcher = harness.build()
    await launcher.start()
    await launcher.stop()
    events = harness.events()
    assert len([event for event in events[:4] if event.startswith("start")]) == 4
    assert events[4] == "term gateway"
    assert set(events[5:7]) == {"term prefill-0", "term decode-0"}
    assert events[7] == "term kvstore-0"
    assert all(child.pid is None for child in launcher.children)


async def test_a_crashed_child_comes_back_under_a_new_incarnation(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "FIRST_BACKOFF_S", 0.01)
    launcher = harness.build()
    await launcher.start()
    child = harness.child("decode-0")
    first, first_pid = child.incarnation, child.pid
    assert first_pid is not None
    os.kill(first_pid, signal.SIGKILL)
    await harness.until(lambda name, line: name == "decode-0" and "SIGKILL" in line)
    await asyncio.wait_for(child.ready.wait(), 30)
    assert child.incarnation != first
    assert child.num_restarts == 1
    assert harness.child("gateway").num_restarts == 0


async def test_a_child_that_never_gets_ready_fails_the_start(harness: Harness) -> None:
    launcher = harness.build(prefill_0="broken")
    with pytest.raises(LaunchError, match="prefill-0 ended with exit code 3"):
        await launcher.start()
    await launcher.stop()
    assert all(child.pid is None for child in launcher.children)
    assert "cannot find the model" in harness.child("prefill-0").tail()


async def test_a_child_that_outlives_its_drain_is_killed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "KILL_MARGIN_S", 0.1)
    launcher = harness.build(drain_s=0.1, decode_0="stubborn")
    await launcher.start()
    await launcher.stop()
    assert "term decode-0" in harness.events()
    assert harness.child("decode-0").pid is None


async def test_stop_does_not_wait_for_a_back_off(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "FIRST_BACKOFF_S", 3600.0)
    launcher = harness.build(drain_s=3600.0)
    await launcher.start()
    pid = harness.child("decode-0").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await harness.until(lambda name, line: "starting again" in line)
    await asyncio.wait_for(launcher.stop(), 30)


async def test_an_endless_line_does_not_end_the_supervision(harness: Harness) -> None:
    launcher = harness.build(kvstore_0="chatty")
    await asyncio.wait_for(launcher.start(), 30)
    assert harness.child("kvstore-0").incarnation


async def test_children_are_in_process_groups_of_their_own(harness: Harness) -> None:
    launcher = harness.build()
    await launcher.start()
    pids = [child.pid for child in launcher.children]
    assert [os.getpgid(pid) for pid in pids if pid] == pids
