"""JSON becomes dataclasses only when every field is there and of its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from megatron_exact.json_input import build_record


@dataclass(frozen=True, kw_only=True)
class Inner:
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    flag: bool
    numbers: tuple[int, ...]
    inner: dict[str, Inner]
    free: tuple[dict[str, Any], ...]


GOOD = {
    "count": 1,
    "flag": True,
    "numbers": [1, 2],
    "inner": {"a": {"value": 1}, "b": {"value": None}},
    "free": [{"x": [1]}],
}


def test_builds() -> None:
    built = build_record(Outer, GOOD, "f")
    assert built == Outer(
        count=1,
        flag=True,
        numbers=(1, 2),
        inner={"a": Inner(value=1.0), "b": Inner(value=None)},
        free=({"x": [1]},),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "f: count is True"),
        ({"count": 1.0}, r"f: count is 1\.0"),
        ({"flag": 1}, "f: flag is 1"),
        ({"numbers": [1, "2"]}, r"f: numbers\[1\] is '2'"),
        ({"numbers": 3}, "f: numbers is 3"),
        ({"inner": {"a": {}}}, r"f: inner\.a lacks value"),
        ({"inner": {"a": 3}}, r"f: inner\.a is int where an object"),
        ({"more": 1}, "f has unknown more"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_record(Outer, {**GOOD, **change}, "f")


@pytest.mark.parametrize("name", sorted(GOOD))
def test_names_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=f"f lacks {name}"):
        build_record(Outer, {key: value for key, value in GOOD.items() if key != name}, "f")
