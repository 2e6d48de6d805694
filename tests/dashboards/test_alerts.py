"""The alert rules: valid, over declared metrics, each fired and kept quiet by promtool's tests."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import yaml

from dashboards.build import FOLDER
from tests.dashboards.exported import OTHERS, declared_names, used_names
from tests.support.prometheus import Programs

RULES: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
TESTS: dict[str, Any] = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]


def promtool(programs: Programs, *words: str) -> None:
    done = subprocess.run(
        [programs.promtool, *words], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules(programs: Programs) -> None:
    promtool(programs, "check", "rules", "alerts.yaml")


def test_promtool_sees_each_rule_fire_and_keep_quiet(programs: Programs) -> None:
    promtool(programs, "test", "rules", "alerts_test.yaml")


def test_metrics_are_declared() -> None:
    for alert in ALERTS:
        names = used_names(alert["expr"])
        assert names and names <= declared_names() | OTHERS, alert["alert"]


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(set(names)) == len(names)
    for alert in ALERTS:
        assert set(alert["annotations"]) == {"summary", "action"}, alert["alert"]
        assert alert["labels"]["severity"] in ("warning", "critical")


def test_each_rule_has_a_case_and_its_metrics_a_quiet_one() -> None:
    samples = [
        sample["labels"]
        for case in TESTS["tests"]
        for query in case["promql_expr_test"]
        for sample in query["exp_samples"]
    ]
    fired = {name for labels in samples for name in re.findall(r'alertname="(\w+)"', labels)}
    assert fired == {alert["alert"] for alert in ALERTS}
    quiet = TESTS["tests"][0]
    assert not [query for query in quiet["promql_expr_test"] if query["exp_samples"]]
    series = {name for entry in quiet["input_series"] for name in used_names(entry["series"])}
    assert series == {name for alert in ALERTS for name in used_names(alert["expr"])}
