"""A request's phases add up to the times that clients feel."""

from __future__ import annotations

import pytest

from protos import prefill_pb2
from services.gateway.ledger import Ledger
from tests.support.meters import Meters

PHASES = "kvmesh.phase.duration"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("services.gateway.ledger.time.monotonic", lambda: now[0])
    return now


def finished(clock: list[float]) -> Ledger:
    """First token after 0.5 s, KV at a rank after 0.6, second token after 0.75."""
    ledger = Ledger(arrived_at=100.0)
    clock[0] = 100.04
    ledger.on_call()
    ledger.on_started(
        prefill_pb2.PrefillStarted(queue_s=0.12, lookup_s=0.01, get_s=0.04, verify_s=0.02)
    )
    ledger.prefill_s, ledger.put_s = 0.3, 0.03
    for at, event in ((0.5, ledger.on_token), (0.6, lambda: ledger.on_admitted(0.05))):
        clock[0] = 100.0 + at
        event()
    for at in (0.75, 0.9):
        clock[0] = 100.0 + at
        ledger.on_token()
    return ledger


def test_phases_add_up_to_both_tokens(clock: list[float]) -> None:
    meters = Meters()
    finished(clock).record(meters.telemetry.instruments, "completed", [3])
    phases = {key: round(total, 6) for key, total in meters.totals(PHASES).items()}
    assert phases == {
        ("first_token", "queue"): 0.09,
        ("first_token", "lookup"): 0.01,
        ("first_token", "get"): 0.04,
        ("first_token", "verify"): 0.02,
        ("first_token", "prefill"): 0.3,
        ("first_token", "put"): 0.03,
        ("first_token", "wire"): 0.01,
        ("second_token", "handover"): 0.1,
        ("second_token", "first_step"): 0.15,
    }
    assert round(meters.totals("gen_ai.server.time_to_first_token")[()], 6) == 0.5


def test_a_request_without_a_token_has_no_phases(clock: list[float]) -> None:
    meters = Meters()
    Ledger(arrived_at=100.0).record(meters.telemetry.instruments, "failed", [0])
    assert not meters.totals(PHASES)


def test_a_request_of_one_token_has_no_second(clock: list[float]) -> None:
    meters, ledger = Meters(), Ledger(arrived_at=100.0)
    ledger.on_call()
    ledger.on_token()
    ledger.record(meters.telemetry.instruments, "completed", [1])
    assert {stage for stage, _ in meters.totals(PHASES)} == {"first_token"}
