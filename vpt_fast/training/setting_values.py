"""Values of settings: read from YAML, and converted to the type of the setting's field."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

# PyYAML's own, and Python's plain errors: those of its constructors, for a month 13 or text that is marked
# !!int, and of its parser, for thousands of brackets.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
_MOST_VALUES = 100_000  # in a file of settings


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError if there is none."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ValueError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except _NOT_YAML as error:
        raise ValueError(f"configuration file {path} is not YAML: {_problem(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"configuration file {path} holds no mapping of settings")
    if _count(values, {}) > _MOST_VALUES:
        raise ValueError(
            f"configuration file {path} holds more than {_MOST_VALUES:,} values, counting those that it "
            "repeats by aliases (*); want settings"
        )
    return values


def _count(value: Any, known: dict[int, float]) -> float:
    """The number of values in a value, each alias in full: a few lines of aliases of aliases stand for
    billions, more than memory holds once they are copied or printed. Infinite if one contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]


def yaml_value(name: str, text: str, value: str) -> Any:
    """``value``, a part of ``text`` on the command line, parsed as YAML; its ValueError names the flag."""
    try:
        return yaml.safe_load(value)
    except _NOT_YAML as error:
        raise ValueError(
            f"{name} is {text!r}, whose value {value!r} is not YAML: {_problem(error)}"
        ) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys in a mapping; PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []  # not a set: keys may be unhashable
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # "<<", whose keys are defaults
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key!r} comes twice", problem_mark=key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def _problem(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split())


def typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type. Text is parsed (in YAML, "1e-4" is text); ValueError for other types."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if name == "prompt_layers":
        return _prompt_layers(value)
    kind = next(option for option in options if option is not type(None))
    if name == "backbone_arg":
        return _backbone_arg(value)
    if get_origin(kind) is Literal:
        if value is False and "off" in get_args(kind):
            return "off"  # YAML reads a bare off as False
        if value in get_args(kind):
            return value
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        if kind is int and isinstance(value, int | str):
            with contextlib.suppress(ValueError):
                return int(value)  # a float would round a large one
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number) and (kind is float or number.is_integer()):
            return kind(number)
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
    raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _prompt_layers(value: Any) -> int | list[int]:
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, int) and not isinstance(parts, bool):
        return parts
    try:
        indices = [int(str(part)) for part in parts if str(part).strip()]  # int itself takes 0.5 for 0
    except (TypeError, ValueError):
        indices = []
    if not indices:
        raise ValueError(
            f"prompt_layers is {value!r}; it must be K, -K or a list of block indices such as 0,2,5"
        )
    return indices[0] if isinstance(value, str) and "," not in value else indices


def _backbone_arg(value: Any) -> dict[str, Any]:
    """A mapping, or a list of KEY=VALUE whose values are parsed as YAML (img_size=384, global_pool=avg)."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"backbone_arg is {value!r}; its key {wrong[0]!r} must be text")
        return dict(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"backbone_arg is {value!r}; it must be a mapping, or a list of KEY=VALUE")
    arguments: dict[str, Any] = {}
    for text in value:
        key, equals, content = str(text).partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"backbone_arg is {text!r}; it must be KEY=VALUE")
        if key in arguments:
            raise ValueError(f"backbone_arg is {text!r}, and {key} is given before; leave out one of them")
        arguments[key] = yaml_value("backbone_arg", str(text), content)
    return arguments
