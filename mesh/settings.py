"""Settings of every process: frozen dataclasses read from flags and KVMESH_* variables.

Owns the only place that reads the environment. A flag beats its variable, the variable its default;
`--help` shows flags grouped by topic.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound="ServiceSettings")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def setting(
    default: Any,
    *,
    group: str,
    help: str,  # noqa: A002 - argparse's own word
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    env: str | None = None,
) -> Any:
    """A dataclass field that is also a flag; `env` names the variable when not KVMESH_<FLAG>."""
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "env": env,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Flags every service has."""

    host: str = setting("127.0.0.1", group="network", help="address to listen on")
    port: int = setting(
        0, group="network", help="port to listen on; 0 picks one", minimum=0, maximum=65535
    )
    die_with_parent: bool = setting(
        False, group="process", help="end when the process that started this one ends"
    )
    drain_s: float = setting(
        10.0, group="process", help="seconds to finish live requests on SIGTERM", minimum=0
    )
    num_threads: int = setting(
        1, group="process", help="CPU threads for tensor work", minimum=1, maximum=1024
    )
    log_format: str = setting(
        "text", group="telemetry", help="log lines as", choices=("text", "json")
    )
    log_level: str = setting(
        "info",
        group="telemetry",
        help="least severe log line",
        choices=("debug", "info", "warning", "error"),
    )
    otlp_endpoint: str = setting(
        "",
        group="telemetry",
        help="OTLP gRPC endpoint, http://host:port; empty turns telemetry off",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    otlp_interval_ms: int = setting(
        5000,
        group="telemetry",
        help="milliseconds between metric exports",
        minimum=50,
        env="OTEL_METRIC_EXPORT_INTERVAL",
    )


def parse_settings(
    cls: type[T],
    prog: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> T:
    """Reads flags and environment; a bad value exits 2 with the flag, the value and the limit."""
    environ = os.environ if environ is None else environ
    parser = argparse.ArgumentParser(
        prog=prog, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        _add_flag(parser, group, field, hints[field.name], environ)
    return cls(**vars(parser.parse_args(argv)))


def parse_bytes(text: str) -> int:
    """Bytes in a size such as 256MiB, 2GB or 4096; ValueError names the text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write a number and B, KiB, MiB, GiB, KB, MB, GB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def _add_flag(
    parser: argparse.ArgumentParser,
    group: Any,
    field: dataclasses.Field[Any],
    hint: Any,
    environ: Mapping[str, str],
) -> None:
    metadata = field.metadata
    flag = "--" + field.name.replace("_", "-")
    variable = metadata["env"] or "KVMESH_" + field.name.upper()
    convert = _converter(field, hint)
    default = field.default
    if environ.get(variable):
        try:
            default = convert(environ[variable])
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"variable {variable}: {error}")
    help_text = f"{metadata['help']} (env {variable})"
    if hint is bool:
        group.add_argument(
            flag, default=default, action=argparse.BooleanOptionalAction, help=help_text
        )
    else:
        group.add_argument(flag, default=default, type=convert, help=help_text)


def _converter(field: dataclasses.Field[Any], hint: Any) -> Any:
    metadata = field.metadata

    def convert(text: str) -> Any:
        value = _parse(text, hint)
        low, high = metadata["minimum"], metadata["maximum"]
        if metadata["choices"] and value not in metadata["choices"]:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {metadata['choices']}")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is below the least value {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is above the greatest value {high}")
        return value

    return convert


def _parse(text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
            raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
        return text.lower() in ("1", "true", "yes")
    if isinstance(hint, types.GenericAlias):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if hint is Path:
        return Path(text).expanduser()
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {hint.__name__}") from None
    return text
