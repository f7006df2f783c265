"""Options of the confidence rules: what they mean for a pack, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.score_files import FORMAT_VERSION, ScoreRecord, begin_scores, finish_scores
from megatron_exact.exposure.rules import ConfidenceWeights
from megatron_exact.files import write_json
from megatron_exact.training.arguments import build_parser
from megatron_exact.training.refusals import check_scores_in_step
from megatron_exact.training.weighting_options import weighting_of
from tests.distributed.jobs import make_corpus, make_pack

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(make_corpus(tmp_path_factory.mktemp("packs") / "corpus"), "concat")


@pytest.fixture
def scores(pack: Path, tmp_path: Path) -> Path:
    """A record of no rows: nothing of the arrays is read here."""
    record = ScoreRecord(
        format_version=FORMAT_VERSION,
        fingerprint=read_manifest(pack).fingerprint,
        row_tokens=64,
        model={"config_sha256": "0"},
        dtype="float32",
        short_window=24,
        short_stride=20,
        short_border="input",
        shard_rows=8,
        rows={"train": 0},
        is_complete=False,
    )
    begin_scores(tmp_path / "scores", record)
    finish_scores(tmp_path / "scores", record)
    return tmp_path / "scores"


def weigh(pack: Path, rule: str, *flags: Any) -> Any:
    words = ["--pack", str(pack), "--token-weighting", rule, *map(str, flags)]
    return weighting_of(build_parser().parse_args(words), read_manifest(pack))


def test_without_scores_the_step_weighs(pack: Path) -> None:
    weighting = weigh(pack, "sparse")
    assert isinstance(weighting.row_weights, ConfidenceWeights)
    assert weighting.row_weights.in_step
    assert weighting.parameters == {"confidence_kappa": 0.2, "short_window": 16, "short_stride": 12}
    assert weigh(pack, "longce", "--confidence-cap", 3).parameters["confidence_cap"] == 3
    given = weigh(pack, "npmi", "--confidence-s", 2, "--confidence-kappa", 0.5, "--short-window", 20)
    assert given.row_weights.parameters.s == 2
    assert given.parameters == {
        "confidence_s": 2,
        "confidence_kappa": 0.5,
        "short_window": 20,
        "short_stride": 15,
    }


def test_with_scores_the_dataset_weighs_by_their_windows(pack: Path, scores: Path) -> None:
    weighting = weigh(pack, "dense", "--confidence-lambda", 0.25, "--confidence-scores", scores)
    assert not weighting.row_weights.in_step
    assert weighting.parameters == {"confidence_lambda": 0.25, "short_window": 24, "short_stride": 20}
    assert weighting.describe()["weights"] is None
    assert weighting.row_weights.windows.border == "input"
    assert "short_border" not in weighting.describe()  # as in records that name none


def test_the_border_of_short_windows_is_theirs_unless_named(pack: Path) -> None:
    assert weigh(pack, "dense").describe()["short_border"] == "target"
    assert weigh(pack, "dense", "--short-border", "input").row_weights.windows.border == "input"


@pytest.mark.parametrize(
    ("rule", "flags", "match"),
    [
        (
            "exact",
            ("--confidence-scores", "nowhere"),
            "which reads none: choose one of exact-evidence, dense",
        ),
        ("dense", ("--confidence-scores", "nowhere"), r"make the scores with megatron-exact score"),
        ("dense", ("--confidence-lambda", 2), "--confidence-lambda 2 is not in"),
        ("dense", ("--short-window", 64), "scores nothing"),
    ],
)
def test_what_cannot_be_is_refused(pack: Path, rule: str, flags: tuple[Any, ...], match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        weigh(pack, rule, *flags)


def test_scores_fix_their_windows_and_their_pack(pack: Path, scores: Path) -> None:
    with pytest.raises(ValueError, match="windows were chosen when the pack was scored"):
        weigh(pack, "dense", "--confidence-scores", scores, "--short-stride", 8)
    with pytest.raises(ValueError, match="windows were chosen when the pack was scored"):
        weigh(pack, "dense", "--confidence-scores", scores, "--short-border", "input")
    manifest = read_manifest(pack)
    words = ["--pack", str(pack), "--token-weighting", "dense", "--confidence-scores", str(scores)]
    with pytest.raises(ValueError, match="contains scores of the pack"):
        weighting_of(build_parser().parse_args(words), replace(manifest, fingerprint="0" * 64))


def test_incomplete_scores_are_refused(pack: Path, scores: Path) -> None:
    from megatron_exact.data.score_files import read_record

    record = read_record(scores)
    write_json(scores / "scores.json", asdict(replace(record, is_complete=False)))
    with pytest.raises(ValueError, match="is not complete"):
        weigh(pack, "dense", "--confidence-scores", scores)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size 2 .* score the pack first"),
        ({"virtual_pipeline_model_parallel_size": 2}, "an interleaved pipeline .* score the pack first"),
        ({"hidden_dropout": 0.1}, "--hidden-dropout 0.1 .* score the pack first"),
    ],
)
def test_layouts_that_cannot_score_inside_the_step_are_refused(changes: dict[str, Any], match: str) -> None:
    args = SimpleNamespace(
        context_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        hidden_dropout=0.0,
    )
    check_scores_in_step(args)
    with pytest.raises(ValueError, match=match):
        check_scores_in_step(SimpleNamespace(**{**vars(args), **changes}))
