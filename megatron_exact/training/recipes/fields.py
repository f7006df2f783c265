"""Fields of a recipe by name: their help, and changes from the command line.

Names are unique over a recipe, its layout and its schedule, so `tensor_parallel=2` needs no prefix.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.training.recipes.recipe import Recipe


def field_help(owner: type) -> dict[str, str]:
    """The text under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(text.value.value).split())
    return texts


def flat_fields(value: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, value, help) of every field, those of the layout and the schedule in their place."""
    for field in fields(value):
        inner = getattr(value, field.name)
        if is_dataclass(inner) and not isinstance(inner, type):
            yield from flat_fields(inner)
        else:
            yield field.name, inner, field_help(type(value))[field.name]


def change_fields(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """A recipe with some fields changed.

    Args:
        recipe: to start from.
        changes: `NAME=VALUE` each; tokens and counts understand K, M and G (x 1,024).

    Raises:
        ValueError: an unknown field, one that holds no single value, or a value of another type.
    """
    wanted: dict[str, Any] = {}
    known = {name: value for name, value, _ in flat_fields(recipe)}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is no change of a field: write NAME=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or list(known)
            raise ValueError(f"a recipe has no field {name!r}: did you mean {', '.join(near)}?")
        wanted[name] = _convert(name, text, known[name])
    parts = {}
    for part in ("layout", "schedule"):
        inner = getattr(recipe, part)
        names = {field.name for field in fields(inner)} & set(wanted)
        parts[part] = replace(inner, **{name: wanted.pop(name) for name in names})
    return replace(recipe, **parts, **wanted)


def _convert(name: str, text: str, current: Any) -> Any:
    if isinstance(current, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{name}={text}: write true or false")
        return text == "true"
    if isinstance(current, int):
        return 0 if text == "0" else positive_int(text)
    if isinstance(current, float):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name}={text}: {text!r} is not a number") from None
    if isinstance(current, str):
        return text
    raise ValueError(f"{name} cannot be changed on the command line: write a recipe in registry.py")
