"""The preflight with Megatron: its own validation, its own memory report, packs, checkpoints, verdicts."""

from __future__ import annotations

import copy
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.training.layout import layout_of_arguments
from megatron_exact.training.memory_forecast import Cluster, MemoryForecast
from megatron_exact.training.preflight import Examination, examine, format_examination
from megatron_exact.training.recipes import RECIPES, find_recipe
from tests.distributed import jobs, memory_peak, ranks


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A small pack for each window of the paper."""
    folder = tmp_path_factory.mktemp("packs")
    return {
        rows: memory_peak.make_pack(folder / str(rows), row_tokens=rows, vocabulary=128, rows=4)
        for rows in sorted({find_recipe(name).row_tokens for name in RECIPES})
    }


def forked(function: Any, folder: Path) -> Any:
    """What a function returns in a process of its own: Megatron's validation leaves marks in this one."""
    result = folder / "result.json"

    def write() -> None:
        result.write_text(json.dumps(function()))

    ranks.run_ranks(1, write, folder).check()
    return json.loads(result.read_text())


def verdicts(found: Examination) -> dict[str, str]:
    """Name -> worst verdict."""
    order = ("ok", "note", "FAILED")
    worst: dict[str, str] = {}
    for check in found.checks:
        worst[check.name] = max(worst.get(check.name, "ok"), check.verdict, key=order.index)
    return worst


def upstream_memory(args: Any) -> dict[str, float]:
    """Bytes of state and of activations in upstream's report, whose formulas take the recipe's flags."""
    from megatron.training import theoretical_memory_usage as report

    args = copy.copy(args)
    args.padded_vocab_size = args.vocab_size
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    with redirect_stdout(io.StringIO()):
        # the report knows nothing of context parallelism: a rank has its part of a row, and the distributed
        # optimizer shares its states among these ranks, too
        activations = report.compute_activation_memory(args, micro_batches) / args.context_parallel_size
        args.data_parallel_size *= args.context_parallel_size
        return {"state": report.compute_weight_and_optimizer_memory(args), "activations": activations}


def test_every_recipe_passes_megatron_s_validation_and_agrees_with_its_report(
    packs: dict[int, Path], tmp_path: Path
) -> None:
    def look() -> dict[str, Any]:
        from megatron_exact.training import preflight as module

        seen: list[Any] = []
        validate = module._validate

        def keep(job: Any) -> Any:
            seen.append(validate(job))
            return seen[-1]

        module._validate = keep  # type: ignore[assignment]
        results = {}
        for name in RECIPES:
            recipe = find_recipe(name)
            run = ["--recipe", name, "--pack", str(packs[recipe.row_tokens]), "--eval-iters", "0"]
            found = examine(run, Cluster(world_size=recipe.world_size))
            args = seen[-1][0]
            assert layout_of_arguments(args) == recipe.layout
            assert isinstance(found.forecast, MemoryForecast)
            largest = found.forecast.largest()
            results[name] = {
                "verdicts": verdicts(found),
                "text": format_examination(found),
                "layers": recipe.layout.pipeline_parallel,
                "state": largest.weights + largest.gradients + largest.optimizer,
                "activations": largest.activations,
                "upstream": upstream_memory(args),
                "tensor": recipe.layout.tensor_parallel,
            }
        return results

    for name, result in forked(look, tmp_path).items():
        assert "FAILED" not in result["verdicts"].values(), f"{name}\n{result['text']}"
        upstream = result["upstream"]
        # biases and norms apart, the same count of parameters on the fullest pipeline stage
        assert result["state"] == pytest.approx(upstream["state"], rel=0.01), name
        # upstream's layer is one of full heads without a gate, and it adds the logits of one micro-batch
        assert 0.6 < result["activations"] / upstream["activations"] < 1.6, name


def test_a_run_of_two_ranks_and_what_its_restart_finds(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    base = jobs.command(pack, "exact", 4, "--save", run, "--load", run, "--save-interval", 2, "--cpu")
    argv = [str(word) for word in [*base, "--pretrained-checkpoint", checkpoint]]
    small = Cluster(world_size=2, gpu_memory_gib=1.0, reserve_gib=0.0)

    def look() -> Any:
        found = examine(argv, small)
        return [verdicts(found), {check.name: check.detail for check in found.checks}, found.passed]

    worst, details, passed = forked(look, tmp_path / "before")
    assert passed, details
    assert worst["start"] == worst["resume"] == worst["disk"] == worst["memory"] == "ok"
    assert "later the same command will resume there" in details["resume"]
    assert "2 checkpoints of" in details["disk"]
    ranks.train(2, [*argv, "--exit-interval", "2"], tmp_path / "train").check()
    worst, details, passed = forked(look, tmp_path / "after")
    assert passed, details
    assert details["resume"].startswith("resumes from")
    assert "iter_0000002" in details["resume"]
    saved = sum(path.stat().st_size for path in (run / "iter_0000002").iterdir())
    one = float(details["disk"].split(" checkpoints of ")[1].split()[0]) * 2**30
    assert one == pytest.approx(saved, rel=0.25, abs=0.005 * 2**30)  # toy tensors: metadata weighs as much
    (next((run / "iter_0000002").glob("*.distcp"))).write_bytes(b"")
    worst, details, passed = forked(look, tmp_path / "damaged")
    assert not passed
    assert "iter_0000002" in details["arguments"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--tensor-model-parallel-size", 3), "layout"),
        (("--no-such-flag",), "arguments"),
        (("--seq-length", 128), "arguments"),
        (("--pack", "nowhere"), "arguments"),
        (("--global-batch-size", 12), "layout"),
        ((), None),
    ],
)
def test_faults_are_found(flags: tuple[Any, ...], line: str | None, pack: Path, tmp_path: Path) -> None:
    batch = ("--global-batch-size", 8)  # a row for each of the GPUs
    argv = [str(word) for word in jobs.command(pack, "none", 4, "--bf16", *batch, *flags)]

    def look() -> Any:
        found = examine(argv, Cluster(world_size=8))
        return [verdicts(found), format_examination(found)]

    verdict, text = forked(look, tmp_path)
    failed = {name for name, worst in verdict.items() if worst == "FAILED"}
    assert (line in failed) if line is not None else not failed, text


def test_a_layout_that_does_not_fit_is_answered_with_one_that_does(
    packs: dict[int, Path], tmp_path: Path
) -> None:
    argv = ["--recipe", "llama3.1_8b_16k", "--pack", str(packs[16_384]), "--eval-iters", "0"]
    argv += ["--recipe-set", "tensor_parallel=1", "--recipe-set", "sequence_parallel=false"]

    def look() -> Any:
        found = examine(argv, Cluster(world_size=8))
        assert found.forecast is not None
        assert found.proposal is not None
        fits = found.proposal.largest().total <= Cluster(world_size=8).usable_bytes
        return [verdicts(found)["memory"], found.passed, fits, format_examination(found)]

    memory, passed, fits, text = forked(look, tmp_path)
    assert (memory, passed, fits) == ("FAILED", False, True)
    assert "a layout that fits:" in text
    assert "--tensor-model-parallel-size" in text.split("a layout that fits:")[1]
