"""Files and functions stay small."""

from __future__ import annotations

from tests.rules.budget import EXCEPTIONS, violations
from tests.rules.tree import ROOT


def test_files_and_functions_keep_the_size_budget() -> None:
    assert not violations()


def test_exceptions_name_what_exists() -> None:
    missing = [name for name in EXCEPTIONS if not (ROOT / name.partition(":")[0]).exists()]
    assert not missing
