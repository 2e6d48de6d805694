"""Flags, variables and limits of settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.service_settings import ServiceSettings
from mesh.settings import parse_bytes, parse_settings, setting


@dataclass(frozen=True, kw_only=True)
class ToySettings(ServiceSettings):
    model: Path = setting(Path("models/demo"), group="model", help="directory, 100% local")
    dtype: str = setting("auto", group="model", help="precision", choices=("auto", "fp32"))
    peers: tuple[str, ...] = setting((), group="mesh", help="addresses")
    poll_s: float = setting(0.5, group="mesh", help="seconds", minimum=0.05, maximum=60.0)
    seed: int | None = setting(None, group="model", help="seed")
    kv_bytes: int = setting("4MiB", group="memory", help="memory", parse=parse_bytes, minimum=1024)

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ValueError("--seed: 13 is not a seed")


def parse(*argv: str, **environ: str) -> ToySettings:
    return parse_settings(ToySettings, "toy", argv, environ)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    with pytest.raises(SystemExit) as raised:
        parse(*argv, **environ)
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_defaults_hold_without_flags_and_variables() -> None:
    settings = parse()
    assert settings.host == "127.0.0.1" and settings.port == 0 and settings.drain_s == 10.0
    assert settings.model == Path("models/demo") and settings.peers == () and settings.seed is None
    assert settings.otlp_endpoint == "" and settings.otlp_interval_ms == 5000
    assert settings.kv_bytes == 4 * 2**20


def test_flags_have_their_field_types() -> None:
    settings = parse(
        "--port", "7", "--poll-s", "1.5", "--peers", "a:1, b:2,", "--model", "/m",
        "--die-with-parent", "--seed", "5", "--kv-bytes", "1.5KiB",
    )  # fmt: skip
    assert settings.port == 7 and settings.poll_s == 1.5 and settings.peers == ("a:1", "b:2")
    assert settings.model == Path("/m") and settings.die_with_parent and settings.seed == 5
    assert settings.kv_bytes == 1536
    assert not parse("--no-die-with-parent", KVMESH_DIE_WITH_PARENT="yes").die_with_parent


def test_a_flag_beats_its_variable_and_the_variable_the_default() -> None:
    environ = {"KVMESH_PORT": "8", "KVMESH_PEERS": "c:3", "KVMESH_DIE_WITH_PARENT": "true"}
    settings = parse(**environ)
    assert settings.port == 8 and settings.peers == ("c:3",) and settings.die_with_parent
    assert parse("--port", "9", **environ).port == 9
    assert parse("--port", "9", KVMESH_PORT="no number").port == 9
    assert parse(KVMESH_PORT="").port == 0


def test_opentelemetry_variables_keep_their_own_names() -> None:
    settings = parse(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4317", OTEL_METRIC_EXPORT_INTERVAL="250")
    assert settings.otlp_endpoint == "http://c:4317" and settings.otlp_interval_ms == 250


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("--port", "70000", "above the greatest value 65535"),
        ("--port", "-1", "below the least value 0"),
        ("--port", "12.5", "not a whole number"),
        ("--poll-s", "0.01", "below the least value 0.05"),
        ("--poll-s", "nan", "not a finite number"),
        ("--drain-s", "inf", "not a finite number"),
        ("--dtype", "fp8", "not one of auto, fp32"),
        ("--kv-bytes", "10 apples", "not a size"),
        ("--kv-bytes", "100", "below the least value 1024"),
    ],
)
def test_a_bad_flag_is_named_with_value_and_limit(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, limit: str
) -> None:
    message = refusal(capsys, f"{flag}={value}")
    assert flag in message and value in message and limit in message


def test_a_bad_variable_is_named_with_value_and_limit(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, KVMESH_PORT="70000")
    assert "KVMESH_PORT" in message and "70000" in message and "65535" in message
    message = refusal(capsys, KVMESH_DIE_WITH_PARENT="perhaps")
    assert "KVMESH_DIE_WITH_PARENT" in message and "'perhaps' is not true or false" in message


def test_a_bad_combination_ends_with_the_same_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "13 is not a seed" in refusal(capsys, "--seed", "13")


def test_abbreviated_and_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--por" in refusal(capsys, "--por", "5")


def test_help_groups_flags_and_shows_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse("--help", KVMESH_PORT="no number")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert {"network", "process", "telemetry", "model", "mesh", "memory"} <= set(titles)
    words = " ".join(text.split())
    assert "100% local (default models/demo; KVMESH_MODEL)" in words
    assert "(default none; OTEL_EXPORTER_OTLP_ENDPOINT)" in words
    assert "--kv-bytes SIZE" in words and "--dtype {auto,fp32}" in words


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("256MiB", 256 * 2**20),
        ("2GB", 2 * 10**9),
        ("0.5 kib", 512),
        ("1TiB", 2**40),
    ],
)
def test_sizes_read_as_written(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1e9", "12 parsecs", "1..5MiB", "9000000TiB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_bytes(text)
