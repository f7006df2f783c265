"""The wheel in an environment of its own: every verb answers, and a chain runs from a folder of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_exact.cli import VERBS

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "miniature" / "base"
SOURCES = ("megatron_exact", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def checked(command: list[str], folder: Path) -> str:
    """Output of a command that must end with 0, without the paths by which this checkout is found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of the wheel; the packages that it needs are those of this interpreter.

    They come by a .pth file: a folder of packages that is added so has no editable installs of its own, so
    that megatron_exact is the wheel's. Building takes the setuptools that is installed: no network.
    """
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = (
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(place),
        str(source),
    )
    checked([*pip, *build], place)
    (wheel,) = place.glob("megatron_exact-*.whl")
    shutil.rmtree(source)
    environment = place / "environment"
    checked([sys.executable, "-m", "venv", "--without-pip", str(environment)], place)
    python = environment / "bin" / "python"
    checked([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], place)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = checked([str(python), "-c", "import megatron_exact; print(megatron_exact.__file__)"], place)
    assert Path(where.strip()).is_relative_to(packages)
    return environment / "bin" / "megatron-exact"


def test_every_verb_of_the_script_has_a_help(script: Path, tmp_path: Path) -> None:
    assert checked([str(script), "--version"], tmp_path).startswith("megatron-exact ")
    overview = checked([str(script), "--help"], tmp_path)
    for verb in VERBS:
        assert f"\n  {verb} " in overview
        text = checked([str(script), verb, "--help"], tmp_path)
        assert text.startswith(f"usage: megatron-exact {verb} ")
    assert list(tmp_path.iterdir()) == []


def write_documents(path: Path) -> None:
    """Documents of words that the base model's tokenizer knows, of heavy-tailed lengths."""
    words = [
        word
        for word in json.loads((BASE / "tokenizer.json").read_text())["model"]["vocab"]
        if word != "<end>"
    ]
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(400):
            length = min(200, max(3, int(draw.lognormvariate(3.0, 1.0))))
            stream.write(json.dumps({"text": " ".join(draw.choices(words, k=length))}) + "\n")


def test_a_chain_runs_from_any_folder(script: Path, tmp_path: Path) -> None:
    """Tokenize to export, by the script alone, and the two verbs that read files of the package."""

    def run(*words: object) -> str:
        return checked([str(script), *map(str, words)], tmp_path)

    write_documents(tmp_path / "text.jsonl")
    assert "400 documents" in run(
        "tokenize",
        "--input",
        "text.jsonl",
        "--tokenizer",
        BASE,
        "--output-prefix",
        "corpus",
        "--workers",
        1,
    )
    packed = ("--row-tokens", 64, "--policy", "best-fit", "--validation-fraction", 0.1, "--seed", 1)
    run("pack", "--source", "corpus", *packed, "--output", "pack")
    assert "every check passed" in run("pack", "--verify", "pack")
    exposure = json.loads(run("inspect", "pack", "--json"))
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert exposure["fingerprint"] == manifest["fingerprint"]
    assert len(exposure["buckets"]) == len(manifest["splits"]["train"]["exposure"]["lower"])

    run("import-hf", "--hf", BASE, "--output", "base")
    job = (
        *("--pack", "pack", "--token-weighting", "exact", "--pretrained-checkpoint", "base", "--cpu"),
        *("--load", "run", "--save", "run", "--save-interval", 4, "--train-iters", 4, "--eval-iters", 0),
        *("--global-batch-size", 4, "--lr", "1e-4", "--lr-decay-style", "constant"),
    )
    run("train", "--nproc-per-node", 2, *job)
    losses = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in losses] == [1, 2, 3, 4]
    run("export-hf", "--checkpoint", "run", "--output", "model")
    assert "checks passed" in run("verify-checkpoint", "--checkpoint", "run", "--hf", "model")

    record = {"instruction": "ask k00", "context": "k01 k02", "response": "k03"}
    (tmp_path / "records.jsonl").write_text((json.dumps(record) + "\n") * 20)
    run(
        "pack-qa",
        "--input",
        "records.jsonl",
        "--tokenizer",
        BASE,
        "--row-tokens",
        64,
        "--output",
        "answers",
    )
    run("report", "--pack", "pack", "--output", "page")
    assert "EXACT" in (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
