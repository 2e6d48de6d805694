"""The doctor's judgement of facts, and its real probes of this machine."""

from __future__ import annotations

import pytest

from kvmesh import doctor
from kvmesh.doctor import State

NIXL = {"module": "nixl_cu13", "backends": ["UCX"], "plugins": ["POSIX", "UCX"]}


def test_every_problem_comes_with_a_remedy() -> None:
    problems = [
        doctor.check_python((3, 10)),
        doctor.check_package("no-such-distribution"),
        doctor.check_torch({"error": "No module named torch"}),
        *doctor.check_nixl({"error": "nixl_cu13: No module"}, None),
        next(doctor.check_nixl(NIXL, "1.0.0")),
        list(doctor.check_nixl({**NIXL, "backends": []}, "1.5.1"))[1],
        doctor.check_cma(lambda: "Operation not permitted"),
        doctor.check_path({"error": "NIXL is missing"}),
        doctor.check_bandwidth({"error": "crashed"}),
    ]
    assert all(check.state is not State.OK and check.remedy for check in problems)


def test_a_missing_transport_fails_and_a_slow_one_warns() -> None:
    assert next(doctor.check_nixl({"error": "x"}, None)).state is State.FAIL
    assert doctor.check_cma(lambda: "Operation not permitted").state is State.WARN


def test_the_best_bandwidth_is_reported() -> None:
    slow = {"num_blocks": 1, "block_num_bytes": 4096}
    slow |= {"read_gb_per_s": 0.1, "write_gb_per_s": 0.1, "memcpy_gb_per_s": 1.0}
    fast = {"num_blocks": 64, "block_num_bytes": 2**20}
    fast |= {"read_gb_per_s": 6.54, "write_gb_per_s": 5.0, "memcpy_gb_per_s": 9.96}
    check = doctor.check_bandwidth({"rows": [slow, fast]})
    assert check.detail == "READ 6.5, WRITE 5.0, memcpy 10.0 GB/s (64 blocks of 1 MiB)"


def test_a_crashing_probe_is_a_finding() -> None:
    facts = doctor.run_json("kvmesh.probes", "no-such-probe")
    assert "KeyError" in facts["error"]


def test_nixl_opens_ucx_here() -> None:
    facts = doctor.probe("nixl")
    assert "UCX" in facts["backends"]


def test_the_cma_probe_reads_the_right_bytes_or_says_why_not() -> None:
    assert doctor.read_sibling() in ("", "Operation not permitted")


def test_the_paths_are_those_that_workers_here_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = not doctor.read_sibling()
    assert doctor.find_paths()["here"] == ("read" if reads else "write")
    monkeypatch.setenv("UCX_TLS", "tcp")
    facts = doctor.find_paths()
    assert facts == {"here": "write", "elsewhere": "write"}
    detail = doctor.check_path(facts).detail
    assert detail == "auto: write from kvstores of this host, write from others"


def test_the_report_lists_findings_and_remedies() -> None:
    checks = [doctor.check_python((3, 10)), doctor.check_cma(lambda: "")]
    report = doctor.render(checks)
    assert "What to do:" in report
    assert "make clean setup PYTHON=python3.11" in report
