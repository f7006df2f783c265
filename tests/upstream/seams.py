"""Which of our seams with megatron-core still fit: `make test-upstream` runs it on the newest version.

    python -m tests.upstream.seams            # compare the megatron-core that Python finds with the record
    python -m tests.upstream.seams record   # after moving the pin: write the record anew

A seam is a name of Megatron that this package imports, or an attribute of a Megatron module or class that
it assigns to, which replaces it at run time (megatron_exact/training/substitutions.py says why). Both are
found in the sources. An imported name must exist. What is replaced must also have the signature and the
code of the pinned version, apart from comments and docstrings: a replacement was written for that code.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("seams.json")
UPSTREAM = "megatron."
GONE = "gone"
Seams = dict[str, dict[str, str]]


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Parse the files of the package."""
    for path in sorted((ROOT / "megatron_exact").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Return what each local name of Megatron stands for, wherever in the file it is imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(UPSTREAM) and not node.level:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith(UPSTREAM):
                    local = name.asname or "megatron"
                    found[local] = name.name if name.asname else "megatron"
                    found.setdefault(f"import {name.name}", name.name)
    return found


def replaced_names(tree: ast.Module) -> set[str]:
    """Return the attributes of Megatron that a file assigns to."""
    names = imported_names(tree)
    found = set()
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            words: list[str] = []
            inner: ast.expr = target
            while isinstance(inner, ast.Attribute):
                words.insert(0, inner.attr)
                inner = inner.value
            if words and isinstance(inner, ast.Name) and inner.id in names:
                found.add(".".join([names[inner.id], *words]))
    return found


def seams() -> tuple[list[str], list[str]]:
    """Return the names that the package imports from Megatron, and those that it replaces."""
    imports: set[str] = set()
    replaced: set[str] = set()
    for _, tree in sources():
        imports |= {name for name in imported_names(tree).values() if name != "megatron"}
        replaced |= replaced_names(tree)
    return sorted(imports), sorted(replaced)


def resolve(name: str) -> Any:
    """Return what a dotted name stands for.

    Raises:
        AttributeError, ImportError: it is not there.
    """
    words = name.split(".")
    for number in range(len(words), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(words[:number]))
        except ModuleNotFoundError as error:
            if error.name not in (".".join(words[:end]) for end in range(1, number + 1)):
                raise  # something that the module imports is missing
            continue
        for word in words[number:]:
            value = getattr(value, word)
        return value
    raise ImportError(f"no module of {name}")


def described(name: str) -> dict[str, str]:
    """Return signature and hash of the code of what a name stands for; its type where it has no code."""
    try:
        value = resolve(name)
    except (ImportError, AttributeError):
        return {"signature": GONE, "code": GONE}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (TypeError, OSError):
        return {"signature": type(value).__name__, "code": type(value).__name__}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        is_documented = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        if is_documented and body and isinstance(body[0], ast.Expr) and ast.get_docstring(node) is not None:
            node.body = body[1:] or [ast.Pass()]
    code = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        signature = type(value).__name__
    return {"signature": signature, "code": code}


def compared(record: Seams, found: Seams) -> dict[str, list[str]]:
    """Return the replaced names that no longer fit, by what has changed."""
    changed: dict[str, list[str]] = {"is gone": [], "has another signature": [], "has other code": []}
    for name, before in record.items():
        now = found[name]
        if now["signature"] == GONE:
            changed["is gone"].append(name)
        elif now["signature"] != before["signature"]:
            changed["has another signature"].append(name)
        elif now["code"] != before["code"]:
            changed["has other code"].append(name)
    return changed


def missing(imports: list[str]) -> list[str]:
    """Return the imported names that are not there."""
    found = []
    for name in imports:
        try:
            resolve(name)
        except (ImportError, AttributeError):
            found.append(name)
    return found


def main(words: list[str]) -> int:
    """Compare or record; returns the exit code."""
    from megatron.core import __version__ as full_version

    version = full_version.partition("+")[0]  # it adds the commit of the folder where it runs

    imports, replaced = seams()
    found = {name: described(name) for name in replaced}
    if words == ["record"]:
        content = {"megatron-core": version, "replaced": found}
        RECORD.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{RECORD}: {len(found)} replaced names of megatron-core {version}")
        return 0
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    print(f"megatron-core {version} against {recorded['megatron-core']}, for which this package is")
    absent = missing(imports)
    changed = compared(recorded["replaced"], found)
    num_fitting = len(found) - sum(map(len, changed.values()))
    print(f"imported: {len(imports) - len(absent)} of {len(imports)} names are there")
    print(f"replaced: {num_fitting} of {len(found)} are as they were")
    for name in absent:
        print(f"  {name} is gone, and is imported")
    for what, names in changed.items():
        for name in names:
            print(f"  {name} {what}")
    return 1 if absent or any(changed.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
