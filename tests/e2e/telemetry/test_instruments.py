"""Every series that the table of metrics declares moves under one scripted load."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.instruments import TO_FIRST_TOKEN, TO_SECOND_TOKEN
from tests.e2e.telemetry.conftest import LoudRun
from tests.support.series import Series, declared

# Why not here, and which: a metric's key and the attributes that it has then.
EXCEPTIONS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "of a GPU": [
        ("decode_graphs", {}),
        ("decode_padding", {}),
        ("gpu_memory", {}),
        ("gpu_utilization", {}),
        ("kv_verify_failures", {"reason": "disk_copy"}),
    ],
    "pinned DRAM lies below a GPU's memory only": [
        ("kv_blocks", {"tier": "dram"}),
        ("kv_evictions", {"tier": "dram"}),
        ("kv_tier_blocks", {"tier": "dram"}),
        ("kv_verify_failures", {"reason": "host_read"}),
        ("kv_verify_failures", {"reason": "host_write"}),
    ],
    "there is no such thing": [
        *(
            ("kv_blocks", {"tier": "disk", "state": state})
            for state in ("reserved", "private", "quarantined", "dropped", "promoting")
        ),
        ("kv_evictions", {"tier": "disk", "cause": "quota"}),
        *(
            ("peer_state", {"role": role, "state": state})
            for role in ("prefill", "decode")
            for state in ("connecting", "up", "down", "leaving")
        ),
        *(
            ("phase_duration", {"stage": "second_token", "phase": phase})
            for phase in TO_FIRST_TOKEN
        ),
        *(
            ("phase_duration", {"stage": "first_token", "phase": phase})
            for phase in TO_SECOND_TOKEN
        ),
    ],
    "over before anyone can look": [
        ("kv_blocks", {"tier": "memory", "state": "promoting"}),
        ("peer_state", {"role": "kvstore", "state": "connecting"}),
    ],
    "the stores' addresses stay the same here": [
        ("peer_state", {"role": "kvstore", "state": "leaving"}),
    ],
    "stores WRITE here, nobody READs": [("kv_verify_failures", {"reason": "read"})],
    "a full file system ends the test's own files, too": [
        ("kv_verify_failures", {"reason": "disk_full"}),
    ],
    "tens of thousands of blocks in a row": [
        ("kv_tier_blocks", {"tier": "disk", "move": "skipped"}),
    ],
}


def _excepted(series: set[Series], key: str, attributes: dict[str, str]) -> set[Series]:
    return {one for one in series if one[0] == key and one[1] >= attributes.items()}


@pytest.mark.timeout(600)  # the whole load
def test_every_declared_series_moves(loud_run: LoudRun) -> None:
    missing = declared() - loud_run.mesh.scrapes.moved
    for exceptions in EXCEPTIONS.values():
        for key, attributes in exceptions:
            missing -= _excepted(missing, key, attributes)
    assert not missing


@pytest.mark.timeout(600)
def test_no_other_series_is_exported(loud_run: LoudRun) -> None:
    assert loud_run.mesh.scrapes.moved <= declared()


def test_every_exception_is_declared() -> None:
    exceptions: list[Any] = [one for many in EXCEPTIONS.values() for one in many]
    for key, attributes in exceptions:
        assert _excepted(declared(), key, attributes), (key, attributes)
