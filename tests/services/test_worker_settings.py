"""The flags and variables of a worker: what they may be, and what refuses the rest."""

from __future__ import annotations

import dataclasses

import pytest

from engine.loading import LOAD_FORMATS
from kernels.moe_align import ALIGN_SOURCES
from kernels.rmsnorm import check_warps
from mesh.settings import parse_settings
from services.worker_settings import WorkerSettings, parse_warps


def parse(*argv: str, **environ: str) -> WorkerSettings:
    return parse_settings(WorkerSettings, "worker", argv, environ)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    with pytest.raises(SystemExit) as raised:
        parse(*argv, **environ)
    assert raised.value.code == 2
    return capsys.readouterr().err


def is_taken(convert: object, value: object) -> bool:
    assert callable(convert)
    try:
        convert(value)
    except ValueError:
        return False
    return True


def test_weights_come_from_the_checkpoint_unless_told_otherwise() -> None:
    assert parse().load_format == "auto"
    assert parse("--load-format", "dummy").load_format == "dummy"
    assert parse(KVMESH_LOAD_FORMAT="dummy").load_format == "dummy"
    assert parse("--load-format", "auto", KVMESH_LOAD_FORMAT="dummy").load_format == "auto"


@pytest.mark.parametrize("value", ["Dummy", "dummy ", "", "none", "safetensors"])
def test_another_load_format_is_refused_with_the_choices(
    capsys: pytest.CaptureFixture[str], value: str
) -> None:
    message = refusal(capsys, "--load-format", value)
    assert f"argument --load-format: {value!r} is not one of auto, dummy" in message


def test_choices_are_the_engines_and_the_kernels_own() -> None:
    fields = {field.name: field.metadata for field in dataclasses.fields(WorkerSettings)}
    assert fields["load_format"]["choices"] == LOAD_FORMATS
    assert fields["moe_align"]["choices"] == ALIGN_SOURCES


def test_warps_are_the_tables_choice_unless_a_variable_or_flag_says_otherwise() -> None:
    assert parse().rmsnorm_warps is None
    assert parse(RMSNORM_WARPS="").rmsnorm_warps is None
    assert parse(RMSNORM_WARPS=" ").rmsnorm_warps is None
    assert parse(RMSNORM_WARPS=" 8 ").rmsnorm_warps == 8
    assert parse("--rmsnorm-warps", "16", RMSNORM_WARPS="8").rmsnorm_warps == 16
    assert parse(KVMESH_RMSNORM_WARPS="8").rmsnorm_warps is None


def test_the_warps_that_are_taken_are_those_of_the_kernel() -> None:
    taken = [n for n in range(-2, 130) if is_taken(parse_warps, str(n))]
    assert taken == [1, 2, 4, 8, 16, 32]
    assert taken == [n for n in range(-2, 130) if is_taken(check_warps, n)]


@pytest.mark.parametrize(
    "value",
    [
        "0", "-1", "-8", "3", "33", "64", "+8", "08", "8.0", "8e0", "0x8", "1_6", "4 4", "4,8",
        "\u0664", "nan", "inf", "true", "auto", "2" * 5000,
    ],
)  # fmt: skip
def test_other_warps_are_refused_with_variable_value_and_limit(
    capsys: pytest.CaptureFixture[str], value: str
) -> None:
    words = f"{value[:40]!r} is not a power of two from 1 to 32"
    message = refusal(capsys, RMSNORM_WARPS=value)
    assert f"variable RMSNORM_WARPS: {words}" in message and len(message) < 200
    assert f"argument --rmsnorm-warps: {words}" in refusal(capsys, f"--rmsnorm-warps={value}")
