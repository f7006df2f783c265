"""An acceptance on the CPU runtime, its work on forked ranks, and what a broken kernel does to it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.acceptance.accept import GROUPS, LAYOUTS, Options, WorkFailedError, accept
from megatron_exact.acceptance.kernel_checks import Comparison, compare
from megatron_exact.acceptance.rank_work import carry_out
from megatron_exact.acceptance.verdicts import Check, with_finite_numbers
from tests.distributed import layout_matrix, ranks


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


def forking(patch: Callable[[], None] = lambda: None) -> Any:
    """A `Launch` that forks ranks; `patch` is called in each of them first."""

    def launch(
        work: str, folder: Path, *, ranks: int, is_full_size: bool = False, **arguments: Any
    ) -> list[dict[str, Any]]:
        def rank() -> None:
            patch()
            carry_out(work, folder, arguments)

        ended = run_ranks(ranks, rank, folder)
        if any(ended.codes):
            raise WorkFailedError(f"exit codes {ended.codes}: {ended.outputs[0][-2000:]}")
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]

    return launch


run_ranks = ranks.run_ranks


def run(folder: Path, *only: str, ranks: int = 1, patch: Callable[[], None] = lambda: None) -> list[Check]:
    options = Options(output=folder / "accepted", cpu=True, ranks=ranks, only=only)
    return accept(options, launch=forking(patch))


def test_a_sound_machine_passes_and_says_what_was_not_run(tmp_path: Path) -> None:
    checks = run(tmp_path)
    verdicts = {check.name: check.verdict for check in checks}
    assert [check for check in checks if check.verdict == "fail"] == []
    passed = {name for name, verdict in verdicts.items() if verdict == "pass"}
    assert {
        *("version of megatron-core", "kernel: packed attention", "kernel: RMSNorm", "kernel: loss head"),
        *("documents are kept apart", "resume from a checkpoint"),
        "loss against transformers (random weights)",
    } <= passed
    left_out = {check.name: check.reason for check in checks if check.verdict == "not run"}
    assert left_out["layout TP2 SP"] == "needs 2 ranks"
    assert "a CPU's speed" in left_out["speed of 4 layers of llama3.1_8b_16k"]
    assert left_out["memory against the formula"] == "a CPU's allocator is not a GPU's"
    written = json.loads((tmp_path / "accepted" / "accept.json").read_text())
    assert written["passed"]
    assert [check["name"] for check in written["checks"]] == [check.name for check in checks]
    assert written["machine"]["kind"] == "cpu"


def leak() -> None:
    """Every document sees those before it in its row, at the right positions."""
    from megatron_exact.model import packed_attention

    sound = packed_attention.attend_by_segment

    def without_boundaries(query: Any, key: Any, value: Any, packing: Any, scale: float) -> Any:
        whole = replace(packing, cu_seqlens_q=packing.cu_seqlens_q[[0, -1]])
        return sound(query, key, value, whole, scale)

    packed_attention.attend_by_segment = without_boundaries


def test_a_leak_fails_three_checks(tmp_path: Path) -> None:
    checks = run(tmp_path, "kernels", "masking", "transformers", patch=leak)
    failed = {check.name for check in checks if check.verdict == "fail"}
    assert failed == {
        "kernel: packed attention",
        "documents are kept apart",
        "loss against transformers (random weights)",
    }
    assert not json.loads((tmp_path / "accepted" / "accept.json").read_text())["passed"]


@pytest.mark.slow
def test_layouts_of_two_ranks_agree(tmp_path: Path) -> None:
    checks = run(tmp_path, "layouts", "collectives", ranks=2)
    assert [check for check in checks if check.verdict == "fail"] == []
    ran = {check.name for check in checks if check.verdict == "pass"}
    assert ran == {f"layout {name}" for name in LAYOUTS if LAYOUTS[name][0] == 2} | {
        "values of collectives"
    }


@pytest.mark.slow
def test_a_layout_with_a_fault_fails(tmp_path: Path) -> None:
    checks = run(tmp_path, "layouts", ranks=2, patch=layout_matrix.order_of_ranks)
    assert [check.name for check in checks if check.verdict == "fail"] == ["layout CP2"]


def test_a_rank_that_dies_is_a_failure_of_its_group(tmp_path: Path) -> None:
    sound = forking()

    def launch(work: str, *args: Any, **kwargs: Any) -> Any:
        if work == "kernels":
            raise WorkFailedError("exit code -9")
        return sound(work, *args, **kwargs)

    checks = accept(Options(output=tmp_path / "a", cpu=True, only=("kernels",)), launch=launch)
    assert [(check.name, check.verdict, check.reason) for check in checks] == [
        ("kernels", "fail", "exit code -9")
    ]


def test_an_unknown_group_and_a_used_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--only masks is not a group of checks: choose one of versions"):
        run(tmp_path, "masks")
    (tmp_path / "accepted").mkdir()
    (tmp_path / "accepted" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty: choose another --output"):
        run(tmp_path, *GROUPS)


def test_what_cannot_work_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    def launch(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is launched")

    with pytest.raises(ValueError, match="recipe 'llama' is unknown"):
        accept(Options(output=tmp_path / "a", recipe="llama", only=("versions",)), launch=launch)
    (tmp_path / "other.json").write_text('{"rank": 1}')
    with pytest.raises(ValueError, match=r"other\.json has no ranks: give the file of `rehearse --json`"):
        accept(Options(output=tmp_path / "a", rehearsal=tmp_path / "other.json"), launch=launch)


def test_a_gradient_that_is_nan_is_the_difference() -> None:
    """The output is right; the square root's slope at 0 makes the gradient NaN."""
    same = lambda values: values * 2  # noqa: E731
    comparison = Comparison(
        name="kernel",
        kernel=lambda values: values * 2 + (values - values).abs().sqrt(),
        reference=same,
        wrong=lambda values: values,
        inputs=[torch.ones(3)],
    )
    assert math.isnan(compare(comparison)["error"])
    assert compare(replace(comparison, kernel=same))["error"] == 0


def test_a_resume_that_starts_over_fails(tmp_path: Path) -> None:
    sound = forking()

    def launch(work: str, folder: Path, **kwargs: Any) -> Any:
        if folder.name == "second":  # the checkpoint and the records of the first job are lost
            shutil.rmtree(folder.parent / "run")
        return sound(work, folder, **kwargs)

    options = Options(output=tmp_path / "a", cpu=True, ranks=1, only=("resume",))
    (check,) = accept(options, launch=launch)
    assert check.verdict == "fail"
    assert "the second job found no checkpoint and started over" in check.reason


class FakeGpus:
    """A `Launch` whose ranks report what GPUs would: the logic of verdicts, without a GPU.

    Args:
        mfu: of the timed job.
        peak_gib: of its memory, against a forecast of 40 GiB.
        values_are_right: of collectives.
    """

    def __init__(self, *, mfu: float | None = 0.4, peak_gib: float = 41.0, right: bool = True) -> None:
        self.mfu, self.peak_gib, self.right = mfu, peak_gib, right

    def __call__(self, work: str, folder: Path, *, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
        answer = getattr(self, f"_{work}")(**arguments)
        return [answer] * ranks

    def _machine(self, **_: Any) -> dict[str, Any]:
        return {
            "kind": "gpu",
            "gpus": 4,
            "device": "H100",
            "capability": [9, 0],
            "cuda": "13",
            "nccl": "2",
        }

    def _kernels(self, **_: Any) -> dict[str, Any]:
        one = {"name": "attention", "error": float("nan"), "control": float("nan"), "bound": 0.02}
        return with_finite_numbers({"comparisons": [one]})  # type: ignore[no-any-return]

    def _collectives(self, **_: Any) -> dict[str, Any]:
        speeds = {"all_reduce_gb_per_second": 300.0, "all_gather_gb_per_second": 310.0}
        return {"values_are_right": self.right, **speeds}

    def _job(self, argv: list[str], **_: Any) -> dict[str, Any]:
        if "--run-dir" in argv:
            folder = Path(argv[argv.index("--run-dir") + 1])
            folder.mkdir(parents=True)
            line = {"tokens_per_second": 5e4, "model_tflops": 395.0, "mfu": self.mfu}
            (folder / "throughput.jsonl").write_text(json.dumps(line) + "\n")
        if "--save" in argv:
            save = Path(argv[argv.index("--save") + 1])
            save.mkdir()
            (save / "data").write_bytes(b"0" * 1000)
        return {
            "peak_gib": self.peak_gib,
            "forecast_gib": 40.0,
            "save_seconds": 2.0,
            "load_seconds": 1.0,
        }


MEASURED = ("collectives", "throughput", "memory", "checkpoint-speed")


def test_nan_is_a_failure_with_its_text_and_verdicts_are_kept(tmp_path: Path) -> None:
    class Breaks(FakeGpus):
        def _collectives(self, **_: Any) -> dict[str, Any]:
            written.append(json.loads((tmp_path / "a" / "accept.json").read_text()))
            raise IndexError("list index out of range")

    written: list[dict[str, Any]] = []
    accept(Options(output=tmp_path / "a", only=("kernels", "collectives", "memory")), launch=Breaks())
    (before,) = written
    assert [(one["name"], one["verdict"]) for one in before["checks"]] == [("kernel: attention", "fail")]
    assert (before["complete"], before["passed"]) == (False, False)
    assert before["checks"][0]["reason"] == "differs by nan from the reference, bound 0.02"
    assert before["checks"][0]["measured"]["error"] == "nan"
    whole = json.loads((tmp_path / "a" / "accept.json").read_text())
    reasons = [one["reason"] for one in whole["checks"]]
    assert reasons[1] == "IndexError: list index out of range"
    assert whole["complete"]
    assert len(whole["checks"]) == 4


def test_a_timed_job_that_fails_runs_once_and_its_reload_fails_alone(tmp_path: Path) -> None:
    class Breaks(FakeGpus):
        fails_at = ""
        started: tuple[str, ...] = ()

        def __call__(self, work: str, folder: Path, **arguments: Any) -> list[dict[str, Any]]:
            self.started += (folder.name,)
            if folder.name == self.fails_at:
                raise WorkFailedError("out of memory")
            return super().__call__(work, folder, **arguments)

    first, second = Breaks(), Breaks()
    first.fails_at, second.fails_at = "layer_stack", "second"
    options = Options(
        output=tmp_path / "a",
        only=("throughput", "memory", "checkpoint-speed"),
        recipe="qwen2.5_0.5b_4k",
        stack_layers=1,
    )
    checks = accept(options, launch=first)
    assert [check.reason for check in checks if check.verdict == "fail"] == ["out of memory"] * 3
    assert first.started.count("layer_stack") == 1
    checks = accept(replace(options, output=tmp_path / "b"), launch=second)
    assert [(check.name, check.reason) for check in checks if check.verdict == "fail"] == [
        ("checkpoint-speed", "out of memory")
    ]


def on_gpus(folder: Path, **changes: Any) -> dict[str, Check]:
    options = Options(output=folder / "a", only=MEASURED, recipe="qwen2.5_0.5b_4k", stack_layers=1)
    return {check.name: check for check in accept(options, launch=FakeGpus(**changes))}


def test_what_a_gpu_measures_gets_a_verdict(tmp_path: Path) -> None:
    checks = on_gpus(tmp_path)
    assert [check.name for check in checks.values() if check.verdict == "fail"] == []
    assert checks["speed of 1 layers of qwen2.5_0.5b_4k"].value.endswith("MFU 40.0%")
    assert checks["memory against the formula"].value == "41.00 GiB"
    assert checks["speed of checkpoints"].measured == {
        "bytes": 1000,
        "write_seconds": 2.0,
        "read_seconds": 1.0,
    }
    assert checks["bandwidth of collectives"].value.startswith("all-reduce 300, all-gather 310 GB/s")
    assert "stack_arguments.txt" in checks["memory against the rehearsal"].reason
    assert "--num-layers 1 " in (tmp_path / "a" / "stack_arguments.txt").read_text()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param({"mfu": 0.1}, "speed of 1 layers of qwen2.5_0.5b_4k", id="slow"),
        pytest.param({"peak_gib": 48.0}, "memory against the formula", id="memory"),
        pytest.param({"right": False}, "values of collectives", id="collectives"),
    ],
)
def test_a_bad_measurement_fails(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    checks = on_gpus(tmp_path, **change)
    assert [check.name for check in checks.values() if check.verdict == "fail"] == [name]
