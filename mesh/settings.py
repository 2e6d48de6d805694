"""Settings of every process: frozen dataclasses read from flags and the environment.

Owns the only place that reads the environment. A flag beats its variable, the variable its default;
`--help` shows the flags grouped by topic. Never keeps a parsed value: callers pass values on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar


class Settings(typing.Protocol):
    """A dataclass made of `setting`s."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Settings)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def setting(
    default: Any,
    *,
    group: str,
    help: str,  # noqa: A002 - argparse's own word
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    env: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is also a flag.

    `env` names its variable when that is not KVMESH_<FLAG>. `parse` turns text into the value and
    raises ValueError (such as `parse_bytes`); without it the annotation decides: int, float, str,
    bool, Path, tuple[str, ...] (comma-separated) or one of these `| None`. Limits are inclusive.
    """
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "env": env,
        "parse": parse,
    }
    return dataclasses.field(default=default, metadata=metadata)


def parse_names(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names; ValueError names one that is not allowed."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        for name in names:
            if name not in allowed:
                raise ValueError(f"{name[:40]!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def parse_settings(
    cls: type[T],
    prog: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> T:
    """Reads flags (default sys.argv) and variables (default os.environ) into `cls`.

    A bad value ends the process with code 2 and a line naming flag or variable, value and limit.
    """
    environ = os.environ if environ is None else environ
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], field, hints[field.name])
    values = vars(parser.parse_args(argv))
    for field in dataclasses.fields(cls):
        if field.name not in values:
            values[field.name] = _default(parser, field, hints[field.name], environ)
    try:
        return cls(**values)
    except ValueError as error:
        _refuse(parser, str(error))


def parse_bytes(text: str) -> int:
    """Bytes in a size such as 256MiB, 2GB or 4096; ValueError names the text and the units."""
    match = _SIZE.fullmatch(text)
    if match is None or match.group(2).upper() not in _UNITS:
        raise ValueError(
            f"{text!r} is not a size; write a number and B, KiB, MiB, GiB, TiB, KB, MB, GB or TB"
        )
    num_bytes = float(match.group(1)) * _UNITS[match.group(2).upper()]
    if num_bytes >= 2**63:
        raise ValueError(f"{text.strip()[:40]!r} is above the greatest size, 2^63 - 1 bytes")
    return int(num_bytes)


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    metadata = field.metadata
    shown = _show(field.default)
    text = f"{metadata['help']} (default {shown}; {_variable(field)})".replace("%", "%%")
    if hint is bool:
        group.add_argument(_flag(field), action=argparse.BooleanOptionalAction, help=text)
        return
    choices = metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices else _metavar(field, hint)

    def convert(value: str) -> Any:
        try:
            return _convert(value, field, hint)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).replace("%", "%%")) from None

    group.add_argument(_flag(field), type=convert, metavar=metavar, help=text)


def _default(
    parser: argparse.ArgumentParser,
    field: dataclasses.Field[Any],
    hint: Any,
    environ: Mapping[str, str],
) -> Any:
    """The variable's value, or the field's default; an empty variable counts as absent."""
    variable = _variable(field)
    text = environ.get(variable, "").strip()
    if text:
        try:
            return _convert(text, field, hint)
        except ValueError as error:
            _refuse(parser, f"variable {variable}: {error}")
    if field.metadata["parse"] is not None and isinstance(field.default, str):
        return _convert(field.default, field, hint)
    return field.default


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(2, f"{parser.prog}: error: {message}\n")


def _convert(text: str, field: dataclasses.Field[Any], hint: Any) -> Any:
    """The value in `text`, checked against choices and limits; ValueError names both."""
    metadata = field.metadata
    value = metadata["parse"](text) if metadata["parse"] else _parse(text, hint)
    choices, low, high = metadata["choices"], metadata["minimum"], metadata["maximum"]
    if choices and value not in choices:
        raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
    if low is not None and value < low:
        raise ValueError(f"{text} is below the least value {low}")
    if high is not None and value > high:
        raise ValueError(f"{text} is above the greatest value {high}")
    return value


def _parse(text: str, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"{text!r} is not true or false")
        return text.lower() in _TRUE
    if hint is Path:
        return Path(text).expanduser()
    if hint is int or hint is float:
        try:
            value = hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{text!r} is not {kind}") from None
        if not math.isfinite(value):
            raise ValueError(f"{text!r} is not a finite number")
        return value
    assert hint is str, f"no way to read a {hint}"
    return text


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _variable(field: dataclasses.Field[Any]) -> str:
    return field.metadata["env"] or "KVMESH_" + field.name.upper()


def _show(default: Any) -> str:
    if isinstance(default, tuple):
        default = ",".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None or default == "" else str(default)


def _metavar(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.metadata["parse"] is parse_bytes:
        return "SIZE"
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return "A,B,..."
    return {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")
