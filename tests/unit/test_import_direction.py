"""The direction of imports that DESIGN asks for, read from the sources, and measured where it matters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_exact"

# Part of the package -> parts that it may import (besides itself), and whether Megatron is allowed.
# A new folder must be entered here before it can import anything of ours.
ALLOWED: dict[str, tuple[set[str], bool]] = {
    "__init__": (set(), False),
    "files": (set(), False),
    "command_line": (set(), False),
    "integrity": ({"files"}, False),
    "lineage": (set(), False),
    "exposure": (set(), False),
    "data": ({"exposure", "files", "command_line"}, False),
    "model": ({"exposure", "files"}, True),
    "training": ({"exposure", "data", "model", "files", "integrity", "lineage", "command_line"}, True),
    "conversion": ({"model", "files", "integrity", "command_line"}, True),
    "evaluation": ({"files", "lineage", "command_line"}, False),
    "scoring": ({"exposure", "data", "files", "command_line"}, False),
    "report": ({"exposure", "files"}, False),
    "demo": ({"exposure", "data", "evaluation", "report", "files", "command_line"}, False),
    "miniature": (
        {"exposure", "data", "model", "evaluation", "report", "demo", "files", "command_line"},
        False,
    ),
}


def part_of(path: Path) -> str:
    """Folder of a module inside the package, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(source: str, package: str = "megatron_exact") -> set[str]:
    """Absolute names of all modules that a source imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            module = node.module or package
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def violations(part: str, source: str) -> list[str]:
    """What a module of this part imports and must not."""
    ours, megatron = ALLOWED[part]
    bad = []
    for name in imported_modules(source):
        first, *rest = name.split(".")
        if first == "megatron" and not megatron:
            bad.append(name)
        if first == "megatron_exact" and rest and rest[0] not in {part, "__version__"} | ours:
            bad.append(name)
    return sorted(bad)


SOURCES = sorted(PACKAGE.rglob("*.py"))


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
        ("evaluation", "import megatron.training"),
    ],
)
def test_a_violation_would_be_seen(part: str, source: str) -> None:
    assert violations(part, source) != []


def test_tools_import_no_megatron() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        names = imported_modules(path.read_text(encoding="utf-8"))
        assert not [name for name in names if name.split(".")[0] in ("megatron", "torch")], path


def test_global_arguments_are_read_in_training_only() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
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
        "import megatron_exact.data.verify",
        "import megatron_exact.demo.run, megatron_exact.report.paired",
        "import megatron_exact.evaluation.comparison, megatron_exact.report.comparison",
        "import megatron_exact.report.experiment",
    ],
)
def test_data_tools_start_without_megatron_torch_and_matplotlib(statement: str) -> None:
    heavy = {"megatron", "torch", "transformers", "matplotlib", "pyarrow"}
    assert not heavy & loaded_after(statement)


def test_the_measurement_would_see_torch() -> None:
    assert "torch" in loaded_after("import megatron_exact.data.dataset")
