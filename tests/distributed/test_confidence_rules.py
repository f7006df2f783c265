"""Confidence rules in training: the model's own short windows inside the step, and stored scores."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.data.rows import RowReader
from megatron_exact.exposure.confidence import ConfidenceParameters, ShortWindows, confidence_weights
from megatron_exact.scoring import ScoreOptions, Scorer, score_pack, score_rows
from tests.distributed import jobs, ranks
from tests.distributed import layout_matrix as matrix

WINDOWS = ShortWindows(window=16, stride=12)  # the defaults for rows of 64
BOUNDS = {"loss": 2e-6, "weighted_loss": 2e-5, "grad_norm": 1e-4}
"""float32, relative: ten times those of other rules for what is weighted. A weight is a difference of two
losses over a sum of such: where long context hardly matters in a row, the rounding of the losses does."""
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def start(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix.make_start(pack, tmp_path_factory.mktemp("confidence") / "start", ())


@pytest.fixture(scope="module")
def model(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starting weights as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    export_hf(start, folder)
    return folder


@pytest.fixture(scope="module")
def scores(pack: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "scores"
    score_pack(pack, model, folder, ScoreOptions(windows=WINDOWS, device="cpu", batch_rows=4))
    return folder


@pytest.fixture(scope="module")
def alone(pack: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with `ppmi`, its own scorer."""
    folder = tmp_path_factory.mktemp("alone")
    matrix.run(matrix.REFERENCE, "ppmi", pack, start, folder, "--log-row-ids", size=())
    return folder / "run"


def largest(records: Records, expected: Records) -> dict[str, float]:
    assert len(records) == len(expected) == matrix.ITERATIONS
    assert matrix.same_targets(records, expected)
    return matrix.largest_differences(records, expected)


def plain_objective(pack: Path, model: Path, row_ids: list[int], windows: ShortWindows) -> float:
    """sum(w CE) / n of some rows under transformers' model and the formulas in numpy."""
    reader = RowReader(pack, "train")
    scorer = Scorer(model, jobs.ROW_TOKENS, device="cpu", dtype="float32")
    found = score_rows(reader, row_ids, windows, scorer)
    total, targets = 0.0, 0
    for index, row_id in enumerate(row_ids):
        mask = reader.read(row_id).loss_mask > 0
        weights = confidence_weights("ppmi", found["difference"][index], mask, ConfidenceParameters())
        total += float((weights * found["long"][index])[mask].sum())
        targets += int(mask.sum())
    return total / targets


def test_the_step_weighs_as_transformers_and_the_formulas_do(pack: Path, model: Path, alone: Path) -> None:
    first = ranks.read_jsonl(alone / "losses.jsonl")[0]
    rows = ranks.read_jsonl(alone / "rows.jsonl")[0]["rows"]
    assert first["weighted_loss"] == pytest.approx(plain_objective(pack, model, rows, WINDOWS), rel=1e-5)
    other = plain_objective(pack, model, rows, ShortWindows(window=16, stride=12, border="input"))
    assert first["weighted_loss"] != pytest.approx(other, rel=1e-3)
    weighting = json.loads((alone / "run.json").read_text())["weighting"]
    assert weighting["rule"] == "ppmi"
    assert weighting["parameters"] == {"confidence_s": 1.0, "short_window": 16, "short_stride": 12}
    assert (weighting["by"], weighting["weights"], "scores" in weighting) == ("confidence", None, False)


QUICK = ("TP2 + SP", "PP2, micro-batch 2")
SLOW = (
    *(
        "DP2, micro-batch 2",
        "micro-batch 2",
        "TP2",
        "PP2",
        "DP2",
        "TP2 x PP2 + SP, micro-batch 2",
        "PP4",
        "DP2 x TP2",
    ),
    *("recompute full", "stock loss head", "DP2, distributed optimizer, overlapped"),
)


@pytest.mark.parametrize("layout", QUICK)
def test_a_layout_agrees_with_one_process(
    layout: str, pack: Path, start: Path, alone: Path, tmp_path: Path
) -> None:
    records = matrix.run(matrix.LAYOUTS[layout], "ppmi", pack, start, tmp_path, size=())
    check_bounds(layout, records, ranks.read_jsonl(alone / "losses.jsonl"))


@pytest.fixture(scope="module")
def large_start(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix.make_start(pack, tmp_path_factory.mktemp("large_confidence") / "start")


@pytest.fixture(scope="module")
def reference(
    pack: Path, large_start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Records]:
    """Records of one process by rule."""

    @functools.cache
    def records(rule: str) -> Records:
        return matrix.run(matrix.REFERENCE, rule, pack, large_start, tmp_path_factory.mktemp("reference"))

    return records


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "layout"),
    [("ppmi", layout) for layout in SLOW]
    + [(rule, "TP2 x PP2 + SP, micro-batch 2") for rule in ("dense", "sparse", "longce", "npmi")],
)
def test_a_further_layout_agrees_with_one_process(
    rule: str,
    layout: str,
    pack: Path,
    large_start: Path,
    reference: Callable[[str], Records],
    tmp_path: Path,
) -> None:
    records = matrix.run(matrix.LAYOUTS[layout], rule, pack, large_start, tmp_path)
    check_bounds(layout, records, reference(rule))


def check_bounds(layout: str, records: Records, expected: Records) -> None:
    for key, difference in largest(records, expected).items():
        bound = BOUNDS[key]
        assert difference <= bound, f"{layout}: {key} differs by {difference:.1e} (bound {bound:.0e})"


def test_stored_scores_weigh_as_the_model_that_made_them(
    pack: Path, start: Path, scores: Path, alone: Path, tmp_path: Path
) -> None:
    given = ("--confidence-scores", scores)
    frozen = matrix.run(matrix.REFERENCE, "ppmi", pack, start, tmp_path, *given, size=())
    unfrozen = ranks.read_jsonl(alone / "losses.jsonl")
    first = {key: frozen[0][key] / unfrozen[0][key] - 1 for key in ("weighted_loss", "grad_norm")}
    assert max(map(abs, first.values())) < 1e-3  # float16 scores
    assert frozen[0]["loss"] == unfrozen[0]["loss"]
    last = abs(frozen[-1]["weighted_loss"] / unfrozen[-1]["weighted_loss"] - 1)
    assert last > 10 * abs(first["weighted_loss"])  # the model has moved, its stored scores have not
    weighting = json.loads((tmp_path / "run" / "run.json").read_text())["weighting"]
    assert (
        weighting["scores"]["fingerprint"]
        == json.loads((pack / "manifest.json").read_text())["fingerprint"]
    )
    assert (weighting["scores"]["short_window"], weighting["scores"]["short_stride"]) == (16, 12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2 + SP", "PP2, micro-batch 2", "DP2, micro-batch 2", "CP2"])
def test_stored_scores_on_a_layout(
    layout: str, pack: Path, start: Path, scores: Path, tmp_path: Path
) -> None:
    given = ("--confidence-scores", scores)
    expected = matrix.run(matrix.REFERENCE, "sparse", pack, start, tmp_path / "alone", *given, size=())
    records = matrix.run(matrix.LAYOUTS[layout], "sparse", pack, start, tmp_path / "many", *given, size=())
    for key, difference in largest(records, expected).items():
        assert difference <= BOUNDS[key], key


@pytest.mark.slow
def test_a_resume_goes_on_with_the_same_weights(pack: Path, start: Path, tmp_path: Path) -> None:
    flags = ("--pretrained-checkpoint", start, "--save-interval", 3)
    for name, more in (("whole", ()), ("parts", ("--exit-interval", 3)), ("parts", ())):
        run = tmp_path / name
        argv = jobs.command(pack, "longce", 6, *flags, "--save", run, "--load", run, *more)
        ranks.train(1, argv, tmp_path / f"{name}-output").check()
    whole, parts = (ranks.read_jsonl(tmp_path / name / "losses.jsonl") for name in ("whole", "parts"))
    assert whole == parts
