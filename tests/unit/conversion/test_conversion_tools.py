"""The three tools as their user meets them: exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from tests import forked
from tests.unit.conversion.small_models import LLAMA, flip_bit, read_weights, write_model

ROOT = Path(__file__).parents[3]
LARGE = dataclasses.replace(LLAMA, num_layers=12, hidden_size=512, ffn_hidden_size=2048)


def run_tool(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run_tool(f"{tool}.py", *arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", LLAMA)
    done = run_tool("import_hf", "--hf", hf, "--output", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "float32" in done.stdout
    assert done.stderr.startswith("warning: ")
    assert "no tokenizer" in done.stderr
    done = run_tool("verify_checkpoint", "--checkpoint", tmp_path / "c", "--hf", hf, "--no-logits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model.layers.1.mlp.up_proj.weight" in done.stdout
    assert done.stdout.strip().endswith("checks passed")
    words = ("--checkpoint", tmp_path / "c", "--output", tmp_path / "out", "--shard-size", "40KB")
    done = run_tool("export_hf", *words, "--max-position-embeddings", 65_536)
    assert done.returncode == 0, done.stderr
    assert "max_position_embeddings is 65536 instead of the imported 32768: --max" in done.stdout
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    ours, theirs = read_weights(tmp_path / "out"), read_weights(hf)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    flip_bit(tmp_path / "c" / "release" / "__0_0.distcp", 3000)
    done = run_tool("verify_checkpoint", "--checkpoint", tmp_path / "c")
    assert done.returncode == 1
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("import_hf", ("--hf", "missing", "--output", "c"), "missing is not a folder"),
        ("import_hf", ("--hf", "missing"), "--output"),
        ("export_hf", ("--checkpoint", "missing", "--output", "o"), "missing is not a folder"),
        ("export_hf", ("--checkpoint", "x", "--output", "o", "--shard-size", "5QB"), "not a size such as"),
        ("verify_checkpoint", ("--checkpoint", "missing"), "missing is not a folder"),
    ],
)
def test_errors_are_one_line(tool: str, arguments: tuple[str, ...], message: str) -> None:
    done = run_tool(tool, *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def kill_when_writing(folder: Path, suffix: str, number: int, tool: str, *arguments: object) -> int:
    """Start a tool and send a signal once it has written part of a weight file; its exit code."""
    process = forked.start(forked.tool_work(f"{tool}.py", *arguments), folder / "output.txt")
    deadline = time.monotonic() + 120
    while (code := forked.exit_code(process)) is None and time.monotonic() < deadline:
        written = [
            path for path in folder.glob(f".*partial*/**/*{suffix}") if path.stat().st_size > 1 << 20
        ]
        if written:
            os.kill(process, number)
            break
        time.sleep(0.001)
    return forked.wait(process) if code is None else code


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("large") / "hf", LARGE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_half_way_and_called_again(large: Path, tmp_path: Path, number: int) -> None:
    words = ("import_hf", "--hf", large, "--output", tmp_path / "c")
    code = kill_when_writing(tmp_path, ".distcp", number, *words)
    assert code == (143 if number == signal.SIGTERM else -number), "it was stopped in the middle"
    assert "c" not in names(tmp_path)
    import_hf(large, tmp_path / "c")
    assert names(tmp_path) == ["c", "output.txt"], "what was left behind is gone"

    words = ("export_hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out")
    code = kill_when_writing(tmp_path, ".safetensors", number, *words)
    assert code == (143 if number == signal.SIGTERM else -number)
    assert "out" not in names(tmp_path)
    export_hf(tmp_path / "c", tmp_path / "out")
    assert names(tmp_path) == ["c", "out", "output.txt"]
    ours, theirs = read_weights(tmp_path / "out"), read_weights(large)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_converting_imports_no_megatron() -> None:
    code = (
        "import megatron_exact.conversion.import_hf, megatron_exact.conversion.export_hf\n"
        "import megatron_exact.conversion.verify_checkpoint, sys\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"megatron", "transformers", "matplotlib"} & set(done.stdout.split())
    assert "torch" in done.stdout.split()
