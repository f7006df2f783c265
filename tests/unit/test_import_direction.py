"""The direction of imports that DESIGN asks for, read from the sources, and measured where it matters."""

from __future__ import annotations

import ast
import functools
import graphlib
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_exact"

# Part of the package -> parts that it may import (besides itself), and whether Megatron is allowed.
# A new folder must be entered here before it can import anything of ours.
ALLOWED: dict[str, tuple[set[str], bool]] = {
    "__init__": (set(), False),
    "folder_lock": (set(), False),
    "files": ({"folder_lock"}, False),
    "json_input": ({"files"}, False),
    "command_line": (set(), False),
    "shares": ({"command_line"}, False),
    "integrity": ({"files"}, False),
    "lineage": (set(), False),
    "tokenizer_files": (set(), False),
    "low_precision": (set(), False),
    "exposure": (set(), False),
    "data": ({"exposure", "files", "folder_lock", "command_line", "shares"}, False),
    "model": ({"exposure", "files", "low_precision"}, True),
    # of conversion, training takes the restricted readers of checkpoints; conversion never imports training
    "training": (
        {
            "exposure",
            "data",
            "model",
            "conversion",
            "files",
            "folder_lock",
            "integrity",
            "lineage",
            "command_line",
        },
        True,
    ),
    "conversion": ({"data", "model", "files", "integrity", "lineage", "command_line"}, True),
    "evaluation": (
        {"data", "files", "folder_lock", "lineage", "command_line", "shares", "low_precision"},
        False,
    ),
    "scoring": ({"exposure", "data", "files", "command_line", "shares", "low_precision"}, False),
    # other stacks' trainers: torch alone, so that they install without Megatron
    "integrations": ({"exposure", "data", "files"}, False),
    # of evaluation, the report takes what a suite says about itself: its title
    "report": ({"exposure", "evaluation", "files"}, False),
    "cli": ({"commands", "command_line"}, False),
    "__main__": ({"cli"}, False),
    "commands": (
        {
            "exposure",
            "data",
            "scoring",
            "model",
            "training",
            "conversion",
            "evaluation",
            "report",
            "rehearsal",
            "acceptance",
            "experiments",
            "integrations",
            "files",
            "command_line",
            "shares",
        },
        False,
    ),
    # an experiment plans commands of the tools: what they know of stages, suites and tables, it asks them
    "experiments": (
        {
            *("exposure", "data", "model", "training", "evaluation", "report"),
            *("files", "folder_lock", "command_line", "lineage"),
        },
        False,
    ),
    "acceptance": (
        {
            *("data", "model", "training", "conversion", "scoring", "rehearsal"),
            *("files", "command_line"),
        },
        True,
    ),
    "rehearsal": ({"data", "model", "training", "files", "command_line"}, True),
}


def may_import(part: str) -> set[str]:
    """Parts that a part may import; whoever may write files may read JSON and name a tokenizer's files."""
    ours, _ = ALLOWED[part]
    return {part, "__version__"} | ours | ({"json_input", "tokenizer_files"} if "files" in ours else set())


def part_of(path: Path) -> str:
    """Folder of a module inside the package, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def parsed(source: str) -> ast.Module:
    """The syntax tree of a source; nobody changes it."""
    return ast.parse(source)


def imported_modules(source: str, package: str = "megatron_exact") -> set[str]:
    """Absolute names of all modules that a source imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            module = node.module or package
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def violations(part: str, source: str) -> list[str]:
    """What a module of this part imports and must not."""
    _, megatron = ALLOWED[part]
    bad = []
    for name in imported_modules(source):
        first, *rest = name.split(".")
        if first == "megatron" and not megatron:
            bad.append(name)
        if first == "examples":  # no installed package contains them
            bad.append(name)
        if first == "megatron_exact" and rest and rest[0] not in may_import(part):
            bad.append(name)
    return sorted(bad)


def repeated_names(paths: Iterable[Path]) -> list[str]:
    """File names that occur more than once, so that an editor would not know which is meant."""
    counts = Counter(path.name for path in paths if path.name != "__init__.py")
    return sorted(name for name, count in counts.items() if count > 1)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_name_occurs_once() -> None:
    assert repeated_names(SOURCES) == []
    assert repeated_names([*SOURCES, PACKAGE / "data" / "buckets.py", PACKAGE / "__init__.py"]) == [
        "buckets.py"
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_folder_may(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"enter {part} and what it may import in this test's table"
    assert violations(part, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("exposure", "from megatron_exact.files import write_json"),
        ("data", "def f():\n    from megatron.core import mpu"),
        ("data", "import megatron_exact.training.pretrain"),
        ("report", "from megatron_exact import data"),
        ("integrations", "from megatron.core import mpu"),
        ("integrations", "from megatron_exact.training.loss import weighted_token_loss"),
        ("evaluation", "import megatron.training"),
        ("report", "from examples.miniature import page"),
    ],
)
def test_a_violation_would_be_seen(part: str, source: str) -> None:
    assert violations(part, source) != []


def module_name(path: Path) -> str:
    """Absolute name of a module of the package; a folder's for its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_among(known: Collection[str], source: str) -> set[str]:
    """Those of the known modules that a source imports; `from folder import module` is the module's."""
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= set(known) else {*names, node.module or ""}
    return found & set(known)


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty if none do.

    Imports inside functions count, and so do those for type checkers alone: two modules that need each
    other's types can only be read together.

    Args:
        sources: name of each module and its text.
    """
    imports = {name: modules_among(sources, text) - {name} for name, text in sources.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]  # it says who is imported by whom
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in SOURCES}
    assert len(sources) == len(SOURCES)
    assert circle(sources) == []


FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    "sources",
    [
        {"p.a": "import p.b", "p.b": f"{FOR_TYPES}from p.a import Type"},
        {"p.a": f"{FOR_TYPES}import p.b", "p.b": f"{FOR_TYPES}import p.a"},
        {"p.a": "from p import b", "p.b": "def f():\n    from p.c import name", "p.c": "import p.a"},
        {"p": "from p.a import name", "p.a": "from p.b import name", "p.b": "from p import name"},
    ],
)
def test_a_circle_would_be_seen(sources: dict[str, str]) -> None:
    found = circle(sources)
    assert set(found) == set(sources)
    assert found[0] == found[-1]
    assert len(found) == len(sources) + 1
    for importer, imported in itertools.pairwise(found):
        assert imported in modules_among(sources, sources[importer])


@pytest.mark.parametrize(
    "sources",
    [
        {"p": "", "p.a": "from p.b import x\nimport p.c", "p.b": "import p.c", "p.c": "import os"},
        {"p": "from p.a import name", "p.a": "from p import b", "p.b": ""},
    ],
)
def test_a_tree_is_no_circle(sources: dict[str, str]) -> None:
    assert circle(sources) == []


def test_tools_import_no_megatron() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        names = imported_modules(path.read_text(encoding="utf-8"))
        assert not [name for name in names if name.split(".")[0] in ("megatron", "torch")], path


def test_nothing_imports_the_command_line() -> None:
    """Modules take arguments of their own; words and options end in `commands`."""
    for path in SOURCES:
        if part_of(path) not in ("cli", "commands", "__main__"):
            names = imported_modules(path.read_text(encoding="utf-8"))
            parts = {name.split(".")[1] for name in names if name.startswith("megatron_exact.")}
            assert not parts & {"cli", "commands"}, path


def test_global_arguments_are_read_in_training_only() -> None:
    for path in SOURCES:
        tree = parsed(path.read_text(encoding="utf-8"))
        calls = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and (
                (isinstance(node.func, ast.Name) and node.func.id == "get_args")
                or (
                    isinstance(node.func, ast.Attribute)
                    and ast.unparse(node.func).endswith("global_vars.get_args")
                )
            )
        ]
        assert not calls or part_of(path) == "training", f"{path} calls get_args() in lines {calls}"


def test_the_cpu_runtime_is_imported_inside_functions_only() -> None:
    for path in SOURCES:
        tree = parsed(path.read_text(encoding="utf-8"))
        lazy = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in lazy:
                last = {name.rpartition(".")[2] for name in imported_modules(ast.unparse(node))}
                assert "cpu_runtime" not in last, f"{path} imports it when it is imported"


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron_exact.exposure",
        "import megatron_exact.data.tokenize, megatron_exact.data.pack, megatron_exact.data.rows",
        "import megatron_exact.data.verify_pack",
        "import examples.demo_text, megatron_exact.report.training_pair",
        "import megatron_exact.evaluation.comparison, megatron_exact.report.experiment",
        "import megatron_exact.report.experiment",
        "import megatron_exact.integrations.exposure_table",
    ],
)
def test_data_tools_start_without_megatron_torch_and_matplotlib(statement: str) -> None:
    heavy = {"megatron", "torch", "transformers", "matplotlib", "pyarrow"}
    assert not heavy & loaded_after(statement)


def test_integrations_need_no_megatron() -> None:
    modules = ("hf_trainer", "packed_rows", "bridge_step", "target_weights")
    names = ", ".join(f"megatron_exact.integrations.{name}" for name in modules)
    assert not {"megatron", "transformers", "datasets"} & loaded_after(f"import {names}")


def test_the_measurement_would_see_torch() -> None:
    assert "torch" in loaded_after("import megatron_exact.data.dataset")
