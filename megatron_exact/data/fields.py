"""Build frozen dataclasses from JSON with every field checked by its annotation."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def build_record[Record](cls: type[Record], content: Any, where: str) -> Record:
    """Build dataclass `cls` from a JSON object.

    Understands int, float (whole numbers too), str, bool, Any, `X | None`, `tuple[X, ...]`, `dict[str, X]`
    and nested dataclasses.

    Args:
        content: from `read_json_object`.
        where: file and place, for messages.

    Raises:
        ValueError: a field unknown, of another type, or missing although it has no default, named with
            its place.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {type(content).__name__} where an object is needed")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING}
    missing = [name for name in names if name not in content and name not in optional]
    unknown = [name for name in content if name not in names]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}: it is damaged or of another version, make it again"
        )
    if unknown:
        raise ValueError(
            f"{where} has unknown {', '.join(unknown)}: it was edited or is of another version"
        )
    return cls(
        **{
            name: _convert(hints[name], content[name], f"{where}: {name}")
            for name in names
            if name in content
        }
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(part for part in arguments if part is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build_record(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r}, of the wrong type: it was edited or damaged, make it again")
