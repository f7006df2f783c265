"""Read JSON that somebody else may have written, edited or damaged: one set of limits for every file.

Every JSON file and JSON line that this package reads goes through this module, because Python's own
reader accepts more than a record may contain: `NaN`, numbers that no float stores, a key that is given
twice (the last one wins), and lists nested so deeply that later code runs out of stack. Each of these is a
ValueError here, whose message names the file, the field and the value. A line of losses.jsonl takes
46 us instead of 13. `parse_corpus_line` reads millions of lines: it keeps Python's fast reader and
looks at the fields that are used.

`build_record` makes a dataclass of such a value. pydantic in strict mode would check the same types; sixty
lines spare every command its import and keep our messages, which say what to do about a damaged file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_exact.files import open_regular_file

LARGEST_BYTES = 64 << 20
"""Default limit of a file and of a line; parsed it takes about ten times as much memory."""
LARGEST_DEPTH = 100
"""Lists and objects within each other; records of ours and of Hugging Face stay below 12."""
INT64 = range(-(1 << 63), 1 << 63)
"""Integers that the arrays of this package can store."""
_SHORT_INTEGER = 18
"""Characters of an integer that int64 stores whatever its digits are."""
_LONGEST_INTEGER = 310
"""Characters above which an integer is beyond every float; also bounds the cost of reading one."""
_SHOWN = 24
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Unusable:
    """Stands in a parsed value for a rejected number, until its field is known."""

    def __init__(self, what: str) -> None:
        self.what = what


class _RepeatedKeys(dict[str, Any]):
    """An object whose text gives some keys more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs)
        self.repeated = [name for name, count in counts.items() if count > 1]


def read_json(
    path: str | Path, remedy: str, *, largest_bytes: int = LARGEST_BYTES, wide_integers: bool = False
) -> Any:
    """Return the value that a JSON file contains.

    Args:
        path: a regular file.
        remedy: end of every message: what the user can do about a file like this.
        largest_bytes: size above which the file is not read.
        wide_integers: accept integers up to the largest float, not only those of int64 (Hugging Face
            writes 10^30 for "no limit").

    Raises:
        ValueError: anything in the file that the module's head names, or text that is not JSON.
        OSError: the file is missing or unreadable.
    """
    return parse_json(
        _read_bytes(Path(path), remedy, largest_bytes), str(path), remedy, wide_integers=wide_integers
    )


def read_json_object(
    path: str | Path, remedy: str, *, largest_bytes: int = LARGEST_BYTES, wide_integers: bool = False
) -> dict[str, Any]:
    """Read a file that contains one object, as `read_json`."""
    value = read_json(path, remedy, largest_bytes=largest_bytes, wide_integers=wide_integers)
    return _require_object(value, str(path), remedy)


def read_toml(path: str | Path, remedy: str) -> dict[str, Any]:
    """Return the table that a TOML file contains, with the limits of `read_json`.

    Args:
        path: a regular file.
        remedy: end of every message.

    Raises:
        ValueError: text that is not TOML, nested too deeply, or with a number that is not finite or, as an
            integer, beyond int64.
        OSError: the file is missing or unreadable.
    """
    text = _read_bytes(Path(path), remedy, LARGEST_BYTES)
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not TOML ({error}): {remedy}") from None
    _require_depth(table, str(path), remedy)
    fault = _first_fault(_marked(table))
    if fault is not None:
        raise ValueError(f"{path}: {fault}: {remedy}")
    return table


def _marked(value: Any) -> Any:
    """Return a parsed value with its unusable numbers replaced."""
    if isinstance(value, dict):
        return {name: _marked(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_marked(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _Unusable(f"{value}, not a finite number")
    if isinstance(value, int) and value not in INT64:
        return _Unusable("an integer beyond int64")
    return value


def read_json_lines(
    path: str | Path, remedy: str, *, largest_bytes: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of each line of a JSONL file; the place is `FILE, line N`.

    Args:
        path: a regular file.
        remedy: end of every message.
        largest_bytes: of the file, None for no limit: one line is in memory at a time.

    Raises:
        ValueError: a line that is not an object, or one that is empty; see `read_json`.
    """
    path = Path(path)
    with open_regular_file(path) as stream:
        if largest_bytes is not None:
            _require_size(path, os.fstat(stream.fileno()).st_size, largest_bytes, remedy)
        number = 0
        while line := stream.readline(LARGEST_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            _require_size(where, len(line), LARGEST_BYTES, remedy)
            yield where, parse_json_object(line, where, remedy)


def parse_json_object(
    text: str | bytes, where: str, remedy: str, *, wide_integers: bool = False
) -> dict[str, Any]:
    """Parse text that contains one object, as `parse_json`."""
    return _require_object(parse_json(text, where, remedy, wide_integers=wide_integers), where, remedy)


def parse_json(text: str | bytes, where: str, remedy: str, *, wide_integers: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.
        where: file and place, begins every message.
        remedy: ends every message.
        wide_integers: see `read_json`.

    Raises:
        ValueError: see `read_json`.
    """
    faults: list[object] = []  # refused numbers and objects with repeated keys, to be found in the value

    def unusable(what: str) -> _Unusable:
        faults.append(_Unusable(what))
        return faults[-1]  # type: ignore[return-value]

    def integer(digits: str) -> Any:
        if len(digits) <= _SHORT_INTEGER:
            return int(digits)
        if len(digits) > _LONGEST_INTEGER:
            return unusable(f"an integer of {len(digits):,} digits, which no number of this program stores")
        value = int(digits)
        if value in INT64:
            return value
        if not wide_integers:
            return unusable(f"the integer {_shorten(digits)}, which 64 bits cannot store")
        try:
            float(value)
        except OverflowError:
            return unusable(f"the integer {_shorten(digits)}, which is beyond every float")
        return value

    def number(digits: str) -> Any:
        value = float(digits)
        return value if math.isfinite(value) else unusable(f"{_shorten(digits)}, which is not finite")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            found = _RepeatedKeys(pairs)
            faults.append(found)
        return found

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start:,}"
        raise ValueError(f"{where} is not UTF-8 text ({byte}): {remedy}") from None
    try:
        value = json.loads(
            decoded,
            parse_int=integer,
            parse_float=number,
            parse_constant=lambda name: unusable(f"{name}, which is not finite"),
            object_pairs_hook=members,
        )
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not JSON ({reason}): {remedy}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested more than {LARGEST_DEPTH} deep: {remedy}") from None
    _require_depth(value, where, remedy)
    if faults:
        raise ValueError(f"{where}: {_first_fault(value)}: {remedy}")
    if _ESCAPED_SURROGATE.search(decoded):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{where} contains half of a surrogate pair: {remedy}") from None
    return value


def parse_corpus_line(line: str, *used: str) -> Any:
    """Return the value of one line of a corpus of which only the texts in some fields are used.

    Whole numbers become 0: nobody needs them, and Python does not read one of more than 4,300 digits.

    Args:
        line: one JSON text.
        used: names of fields; each may occur once, as JSON leaves open which of two would count.

    Raises:
        ValueError: text that is not JSON (JSONDecodeError), nested too deeply, or gives a used field twice.
    """
    try:
        # rarely so: two quoted names may also lie in different objects, an escape may stand in any text
        if "\\u00" in line or any(line.count(f'"{field}"') > 1 for field in used):
            value = _CAREFUL.decode(line)
            if isinstance(value, _RepeatedKeys) and (twice := set(used) & set(value.repeated)):
                raise ValueError(f"it gives the field {min(twice)!r} twice")
            return value
        return _FAST.decode(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _corpus_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _RepeatedKeys(pairs)


def _no_number(digits: str) -> int:
    return 0


_FAST = json.JSONDecoder(parse_int=_no_number)
_CAREFUL = json.JSONDecoder(parse_int=_no_number, object_pairs_hook=_corpus_members)


def require_shape(value: Any, shape: Any, field: str = "") -> None:
    """Raise unless a JSON value has the fields and types that its reader relies on.

    Args:
        value: from one of the readers above.
        shape: one of
            a type (`float` accepts whole numbers, `bool` is not a number), or a tuple of types;
            `[shape]`, a list of any length;
            `{name: shape}`, an object with at least these fields; `name?` may be missing or null;
            `{"*": shape}`, an object whose fields all have one shape.
        field: where the value stands, for the message.

    Raises:
        ValueError: what does not fit, with its field.
    """
    if isinstance(shape, tuple):
        if not any(_fits(value, one) for one in shape):
            raise ValueError(f"{_shown_field(field)} is {_shorten(repr(value))}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{_shown_field(field)} is {_shorten(repr(value))}, not a list")
        for index, one in enumerate(value):
            require_shape(one, shape[0], f"{field}[{index}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{_shown_field(field) or 'it'} is {_shorten(repr(value))}, not an object")
        for key, one in shape.items():
            name = key.removesuffix("?")
            for found in value if key == "*" else [name]:
                place = f"{field}.{found}" if field else found
                if found not in value and key == name:
                    raise ValueError(f"{_shown_field(place)} is missing")
                if key == name or value.get(found) is not None:
                    require_shape(value[found], one, place)
    elif not _fits(value, shape):
        raise ValueError(f"{_shown_field(field)} is {_shorten(repr(value))}, not {_TYPE_NAMES[shape]}")


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
}


def _fits(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if shape is float:
        return type(value) in (int, float)
    return isinstance(shape, type) and type(value) is shape


def as_json(value: Any) -> Any:
    """Return a value of ours as a reader of its JSON sees it: tuples as lists, keys as text."""
    return json.loads(json.dumps(value, allow_nan=False))


def _read_bytes(path: Path, remedy: str, largest_bytes: int) -> bytes:
    with open_regular_file(path) as stream:
        _require_size(path, os.fstat(stream.fileno()).st_size, largest_bytes, remedy)
        content = stream.read(largest_bytes + 1)  # it may have grown meanwhile
    _require_size(path, len(content), largest_bytes, remedy)
    return content


def _require_size(where: object, size: int, largest: int, remedy: str) -> None:
    if size > largest:
        raise ValueError(f"{where} has {size:,} bytes, more than the {largest:,} that are read: {remedy}")


def _require_object(value: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} contains {_kind(value)}, not an object: {remedy}")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _require_depth(value: Any, where: str, remedy: str) -> None:
    """Raise where lists and objects are nested more than LARGEST_DEPTH deep; without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(LARGEST_DEPTH):
        if not level:
            return
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))  # half the time of a union, over a vocabulary
        ]
    if level:
        raise ValueError(f"{where} is nested more than {LARGEST_DEPTH} deep: {remedy}")


def _first_fault(value: Any, field: str = "") -> str | None:
    """Return the first rejected number or repeated key of a value, with its field, in words."""
    if isinstance(value, _Unusable):
        return f"{_shown_field(field)} is {value.what}"
    if isinstance(value, _RepeatedKeys):
        place = _shown_field(field) if field else "it"
        return f"{place} gives the key {_shorten(value.repeated[0])!r} twice"
    if isinstance(value, dict):
        parts = [(f"{field}.{name}" if field else name, part) for name, part in value.items()]
    elif isinstance(value, list):
        parts = [(f"{field}[{index}]", part) for index, part in enumerate(value)]
    else:
        return None
    return next((fault for name, part in parts if (fault := _first_fault(part, name))), None)


def _shown_field(field: str) -> str:
    return field if len(field) <= 200 else f"{field[:200]}..."


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def build_record[Record](cls: type[Record], content: Any, where: str, remedy: str | None = None) -> Record:
    """Build the frozen dataclass `cls` from a JSON object, every field checked by its annotation.

    Understands int, float (whole numbers too), str, bool, Any, `X | None`, `tuple[X, ...]`, `dict[str, X]`
    and nested dataclasses.

    Args:
        content: the value of the JSON text.
        where: file and place, for messages.
        remedy: what a user who wrote the text should do; None for a file that a tool wrote.

    Raises:
        ValueError: a field unknown, of another type, or missing although it has no default, named with
            its place.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {type(content).__name__} where an object is needed")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in content]
    unknown = [name for name in content if name not in names]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}: "
            f"{remedy or 'it is damaged or of another version, make it again'}"
        )
    if unknown:
        known = f"it knows {', '.join(names)}; {remedy}"
        raise ValueError(
            f"{where} has unknown {', '.join(unknown)}: "
            f"{known if remedy else 'it was edited or is of another version'}"
        )
    return cls(
        **{
            name: _as_annotated(hints[name], content[name], f"{where}: {name}", remedy)
            for name in names
            if name in content
        }
    )


def _as_annotated(hint: Any, value: Any, where: str, remedy: str | None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        first = next(part for part in arguments if part is not type(None))
        return _as_annotated(first, value, where, remedy)
    if origin is tuple and isinstance(value, list):
        return tuple(
            _as_annotated(arguments[0], item, f"{where}[{index}]", remedy)
            for index, item in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        return {
            key: _as_annotated(arguments[1], item, f"{where}.{key}", remedy) for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return build_record(hint, value, where, remedy)  # type: ignore[arg-type]
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    if remedy is not None:
        needed = "a list" if origin is tuple else getattr(hint, "__name__", str(hint))
        raise ValueError(f"{where} is {value!r}, where {needed} is needed: {remedy}")
    raise ValueError(f"{where} is {value!r}, of the wrong type: it was edited or damaged, make it again")
