"""Checkpoints that belong to their run, and the last good one that stays, in whole jobs."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.files import sha256_file
from megatron_exact.integrity import check_integrity, read_seal
from megatron_exact.training.runtime import NOT_FINITE
from tests.distributed import jobs, ranks

TRACKER = "latest_checkpointed_iteration.txt"
UNUSED_ROW = jobs.VOCABULARY + 2


def command(pack: Path, run: Path, iterations: int, *extra: Any) -> list[Any]:
    """The same command starts and resumes; saves every second iteration; no document has UNUSED_ROW."""
    flags = ("--load", run, "--save", run, "--save-interval", 2, "--keep-last", 1)
    model = ("--vocab-size", jobs.VOCABULARY + 4, "--untie-embeddings-and-output-weights")
    return jobs.command(pack, "exact", iterations, *flags, *model, *extra)


@pytest.fixture(scope="module")
def finished(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations on two ranks, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    ranks.train(2, command(pack, folder / "run", 4), folder).check()
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def errors(ended: ranks.Ended) -> list[str]:
    return [line for output in ended.outputs for line in output.splitlines() if line.startswith("error: ")]


def strip(run: Path) -> None:
    """What an older version left: nothing names the run."""
    record = json.loads((run / "run.json").read_text())
    del record["run_id"]
    (run / "run.json").write_text(json.dumps(record))
    for file in run.glob("iter_*/integrity.json"):
        content = json.loads(file.read_text())
        del content["checkpoint"]
        file.write_text(json.dumps(content))


def test_each_checkpoint_names_run_rule_pack_and_the_one_before(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    two, four = (read_seal(finished / f"iter_000000{iteration}") for iteration in (2, 4))
    assert two is not None
    assert four is not None
    assert two.belonging is not None
    assert four.belonging is not None
    for iteration, seal in ((2, two), (4, four)):
        about = seal.belonging
        assert about is not None
        assert (about.origin, about.iteration, about.weighting) == ("saved", iteration, "exact")
        assert (about.run_id, about.fingerprint) == (record["run_id"], record["fingerprint"])
        folder = finished / f"iter_000000{iteration}"
        assert seal.sizes == {name: (folder / name).stat().st_size for name in seal.files}
        assert set(seal.files) == {path.name for path in folder.iterdir()} - {"integrity.json"}
    assert two.belonging.previous is None
    assert four.belonging.previous is not None
    assert four.belonging.previous.sha256 == sha256_file(finished / "iter_0000002" / "integrity.json")


def test_a_checkpoint_of_another_run_stops_the_job(run: Path, pack: Path, tmp_path: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "run_id": "0" * 32}))
    before = (run / "losses.jsonl").read_text()
    ended = ranks.train(1, command(pack, run, 6), tmp_path / "o")
    assert ended.codes == [1]
    (line,) = errors(ended)
    assert "iter_0000004 belongs to another run: its integrity.json says iteration 4, run " in line
    assert (run / "losses.jsonl").read_text() == before


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["sync", "async"])
def test_an_older_run_goes_on_and_names_itself_from_then_on(
    flags: tuple[str, ...], run: Path, finished: Path, pack: Path, tmp_path: Path
) -> None:
    """With a FIFO where the next iteration is to lie, and a link where the tracker is written."""
    shutil.rmtree(run / "iter_0000004")
    strip(run)
    os.mkfifo(run / "iter_0000004")
    (run / TRACKER).unlink()
    (run / TRACKER).symlink_to("/dev/null")
    ended = ranks.train(2, command(pack, run, 4, *flags), tmp_path / "o").check()
    output = ended.outputs[0]
    assert f"resuming from iter_0000002 of {run} (not taken: {TRACKER} is a link and is not read)" in output
    assert "names no run: Megatron or an older version wrote it" in output
    assert "iter_0000004 was a FIFO and is now .iter_0000004.set-aside-" in output
    assert (run / TRACKER).read_text() == "4"
    assert not (run / TRACKER).is_symlink()
    assert all(fault is None for _, fault in check_integrity(run / "iter_0000004") or [("", "none")])
    assert (run / "losses.jsonl").read_text() == (finished / "losses.jsonl").read_text()
    record = json.loads((run / "run.json").read_text())
    seal = read_seal(run / "iter_0000004")
    assert seal is not None
    assert seal.belonging is not None
    assert seal.belonging.run_id == record["run_id"]
    assert record["run_id_since"] == 2


def spoil(what: str, iteration: int, rank: int = 1) -> Any:
    """A patch that puts a NaN into the memory of a rank after an iteration, as a flipped bit may."""

    def patch() -> None:
        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.record_iteration

        def record_iteration(run: Any, number: int, **kwargs: Any) -> bool:
            has_loss = stock(run, number, **kwargs)
            if number == iteration and int(os.environ["RANK"]) == rank:
                (chunk,) = run._model
                weights = dict(chunk.named_parameters())
                name = next(name for name in weights if name.endswith(what))
                with torch.no_grad():
                    weights[name][UNUSED_ROW, 0] = float("nan")
            return has_loss

        TrainingRun.record_iteration = record_iteration  # type: ignore[method-assign]

    return patch


def test_a_nan_that_no_loss_shows_is_not_saved_and_the_last_good_checkpoint_stays(
    finished: Path, pack: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = command(pack, run, 4)
    ended = ranks.train(2, argv, tmp_path / "o1", spoil("embedding.word_embeddings.weight", 4))
    assert ended.codes == [NOT_FINITE, NOT_FINITE]
    (line,) = errors(ended)
    assert "iteration 4 is not saved" in line
    assert "rank 1: embedding.word_embeddings.weight, 1 of 4,800 values" in line
    assert "iter_0000002 is the last good checkpoint" in line
    assert [path.name for path in run.glob("iter_*")] == ["iter_0000002"]
    assert (run / TRACKER).read_text() == "2"
    ranks.train(2, argv, tmp_path / "o2").check()
    assert (run / "losses.jsonl").read_text() == (finished / "losses.jsonl").read_text()


def test_a_checkpoint_with_a_nan_is_named_at_the_start(
    run: Path, finished: Path, pack: Path, tmp_path: Path
) -> None:
    """An older version saved it, with hashes that agree."""
    shutil.rmtree(run / "iter_0000004")
    (run / TRACKER).write_text("2")
    argv = command(pack, run, 4)

    def save_it_all_the_same() -> None:
        from megatron_exact.training import substitutions

        substitutions.require_finite = lambda *_: None
        spoil("embedding.word_embeddings.weight", 4, rank=0)()

    ranks.train(2, argv, tmp_path / "o1", save_it_all_the_same).check()
    ended = ranks.train(2, command(pack, run, 6), tmp_path / "o2")
    assert ended.codes == [NOT_FINITE, NOT_FINITE]
    (line,) = errors(ended)
    assert f"nothing is trained from {run / 'iter_0000004'}, since" in line
    assert "embedding.word_embeddings.weight, 1 of 4,800 values" in line
    shutil.rmtree(run / "iter_0000004")
    ranks.train(2, argv, tmp_path / "o3").check()
    assert (run / "losses.jsonl").read_text() == (finished / "losses.jsonl").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_damage_is_found_in_every_type(value: float, dtype: torch.dtype) -> None:
    """Against torch.isfinite, element by element."""
    from megatron_exact.training.checkpoint_saving import damaged

    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5), (1,), (1000,), (2, 3, 4))
    ]
    tensors.append(torch.full((7,), torch.finfo(dtype).max, dtype=dtype))
    assert damaged(tensors) == []
    tensors[2][-1] = value
    tensors[3][0, 0, 0] = value
    assert damaged(tensors) == [n for n, tensor in enumerate(tensors) if not torch.isfinite(tensor).all()]
    assert damaged(tensors) == [2, 3]


def test_padding_of_the_distributed_optimizer_is_not_examined() -> None:
    """Megatron saves gaps between parameters as uninitialised memory, which may look like NaN."""
    import torch
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

    from megatron_exact.training.checkpoint_saving import _saved, damaged

    def state(is_padding: bool) -> dict[str, Any]:
        garbage = ShardedTensor.from_rank_offsets("exp_avg", torch.tensor([1.0, math.nan]))
        weight = ShardedTensor.from_rank_offsets("weight", torch.ones(3))
        buckets = [{"exp_avg": garbage, "padding": LocalNonpersistentObject(is_padding)}]
        return {"model": {"weight": weight}, "optimizer": {0: buckets}}

    def names(is_padding: bool) -> list[str]:
        found = list(_saved(state(is_padding)))
        return [found[place][0] for place in damaged(tensor for _, tensor in found)]

    assert names(is_padding=True) == []
    assert names(is_padding=False) == ["exp_avg"]
    assert [key for key, _ in _saved(state(is_padding=True))] == ["weight"]
