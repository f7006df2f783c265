"""What can be checked of the images without a container engine."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
FROM_BASE_IMAGE = {"torch", "numpy", "triton", "transformer-engine"}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / name).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


def closure(name: str, found: dict[str, set[str]], extras: set[str]) -> None:
    """Names of all that a package needs, without what the base image brings."""
    key = canonicalize_name(name)
    if key in FROM_BASE_IMAGE or (key in found and extras <= found[key]):
        return
    found.setdefault(key, set()).update(extras)
    for text in distribution(name).requires or ():
        needed = Requirement(text)
        if needed.marker is None or any(
            needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}
        ):
            closure(needed.name, found, set(needed.extras))


def pins(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_image_installs_what_the_project_needs_in_tested_versions() -> None:
    needed: dict[str, set[str]] = {}
    closure("megatron-exact", needed, set())
    installed = pins(ROOT / "docker" / "requirements.txt")
    assert set(installed) == set(needed) - {"megatron-exact"}
    tested = pins(ROOT / "constraints.txt")
    assert {name: tested[name] for name in installed} == installed


@pytest.fixture
def check_image(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    return importlib.import_module("check_image")


def test_the_image_check_asks_for_what_the_project_asks(check_image: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        needed = Requirement(text)
        if needed.name in check_image.MINIMUM:
            (oldest,) = (spec.version for spec in needed.specifier if spec.operator == ">=")
            assert Version(check_image.MINIMUM[needed.name]) == Version(oldest)
    assert set(check_image.MINIMUM) <= FROM_BASE_IMAGE


def test_the_image_check_names_what_is_missing_or_old(
    check_image: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"torch": "2.13.0a0+1234abc", "numpy": "2.3.1", "transformer-engine": "2.20.2"}

    def version(name: str) -> str:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(check_image, "version", version)
    assert check_image.main() == 0
    printed = capsys.readouterr().out
    assert "torch 2.13.0a0+1234abc\n" in printed
    assert "transformer-engine 2.20.2 (NVIDIA tested megatron-core 0.19.0 with 2.17.1)\n" in printed
    there["torch"] = "2.9.1"
    del there["transformer-engine"]
    assert check_image.main() == 1
    errors = capsys.readouterr().err
    assert "error: torch 2.9.1 is older than 2.13: choose a newer base image" in errors
    assert "error: transformer-engine is missing: choose a base image that has it" in errors


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_copied_path_exists_and_is_let_through(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[ignored.index("*")] == "*"
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    for word, rest in instructions(name):
        assert word != "ADD"
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in let_through


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_pinned_and_runs_as_a_user(name: str) -> None:
    words = instructions(name)
    (base,) = (rest for word, rest in words if word == "FROM")
    if base == "${BASE}":
        (base,) = (rest.removeprefix("BASE=") for word, rest in words if word == "ARG" and "BASE" in rest)
    assert re.search(r":\d+\.\d+", base)
    assert [rest for word, rest in words if word == "USER"][-1] not in ("root", "0")
    text = (ROOT / "docker" / name).read_text()
    assert not re.search(r"(?i)(password|token|secret|api_?key)\s*=", text)
    (command,) = (rest for word, rest in words if word == "CMD")
    assert "megatron_exact.training.pretrain" in command


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(hadolint), str(ROOT / "docker" / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_torchrun_of_the_image_starts_ranks_that_see_the_environment(tmp_path: Path) -> None:
    """Two environments stand in for the base image and ours, a program for torch's own launcher."""
    base, ours = tmp_path / "base", tmp_path / "ours"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base], check=True)
    launcher = next((base / "lib").glob("python*/site-packages")) / "torch" / "distributed"
    launcher.mkdir(parents=True)
    (launcher / "run.py").write_text(
        "import subprocess, sys\n"
        "def main():\n    sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n"
    )
    stock = base / "bin" / "torchrun"  # as pip writes it
    stock.write_text(f"#!{base}/bin/python\nfrom torch.distributed.run import main\nmain()\n")
    stock.chmod(0o755)
    build = [base / "bin" / "python", "-m", "venv", "--without-pip", "--system-site-packages", ours]
    subprocess.run(build, check=True)
    # an environment made inside another takes that one's base for its system: name ours
    own = next((ours / "lib").glob("python*/site-packages"))
    (own / "base.pth").write_text(f"{launcher.parents[1]}\n")
    (own / "only_in_ours.py").write_text("print('seen')\n")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "VIRTUAL_ENV": str(ours),
        "PATH": f"{ours}/bin:{base}/bin:{os.environ['PATH']}",
    }

    def torchrun() -> subprocess.CompletedProcess[str]:
        words = ["bash", "-c", "torchrun -m only_in_ours"]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    assert "No module named only_in_ours" in torchrun().stderr  # the base image's
    (recipe,) = (rest for name, rest in instructions("Dockerfile") if name == "RUN" and "torchrun" in rest)
    subprocess.run(["bash", "-c", recipe], env=environment, check=True)
    assert torchrun().stdout == "seen\n"
