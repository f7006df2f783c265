"""The exposure table, its text and figure, and `inspect_pack.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.commands.exposures import inspect as inspect_command
from megatron_exact.data.attention_work import StepLayout
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.shuffle import row_permutation
from megatron_exact.exposure import bucket_lower_bounds, exact_weights
from megatron_exact.report.exposure_figure import (
    exposure_table,
    format_exposure_table,
    plot_exposure,
    tail_summary,
)
from tests import forked

ROW_TOKENS = 64  # buckets from 0, 8, 16, 32


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 10**9), min_size=4, max_size=4),
    alpha=st.floats(0, 4),
    gamma=st.floats(0, 2),
)
def test_shares(counts: list[int], alpha: float, gamma: float) -> None:
    lower = bucket_lower_bounds(ROW_TOKENS)
    weights = exact_weights(counts, lower, alpha=alpha, gamma=gamma, tau=16)
    table = exposure_table(lower, counts, weights)
    assert sum(row["share"] for row in table) == pytest.approx(1)
    assert sum(row["weighted_share"] for row in table) == pytest.approx(1)
    assert [row["targets"] for row in table] == counts
    tail = tail_summary(table, 16)
    assert tail["lower_bounds"] == [16, 32]
    assert tail["mean_extra_weight"] == pytest.approx(alpha, abs=1e-9)
    share = sum(counts[2:]) / sum(counts)
    assert tail["share"] == pytest.approx(share)
    assert tail["weighted_share"] == pytest.approx(share * (1 + alpha) / (1 + share * alpha))


def test_the_papers_figure() -> None:
    """Tail share .274 with alpha .15 gives .3027; the paper prints 30.3 %."""
    counts = [400, 326, 137, 137]
    lower = bucket_lower_bounds(ROW_TOKENS)
    table = exposure_table(lower, counts, exact_weights(counts, lower, alpha=0.15, tau=16))
    assert round(tail_summary(table, 16)["weighted_share"], 3) == 0.303
    text = format_exposure_table(table, row_tokens=ROW_TOKENS, tau=16)
    assert "27.40% of 1,000 targets, 30.27% of the signal" in text


def test_no_targets_at_all() -> None:
    table = exposure_table([0, 8], [0, 0], [1, 1])
    assert [row["share"] for row in table] == [row["weighted_share"] for row in table] == [0, 0]
    assert tail_summary(table, 8)["mean_extra_weight"] == 0
    assert "0.00%" in format_exposure_table(table, row_tokens=16, tau=8)


def test_text_is_aligned_and_marks_the_tail() -> None:
    table = exposure_table([0, 8, 16, 32], [123456, 1, 20, 3], [1, 1, 1.1, 1.2])
    lines = format_exposure_table(table, row_tokens=ROW_TOKENS, tau=16).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1
    assert [line.split()[0] for line in lines if " * " in line[:20]] == ["16-31", "32-64"]
    markdown = format_exposure_table(table, row_tokens=ROW_TOKENS, tau=16, markdown=True).splitlines()
    assert all(line.startswith("| ") and line.endswith(" |") for line in markdown[:6])
    assert len({len(line) for line in markdown[:6]}) == 1


def test_figure(tmp_path: Path) -> None:
    table = exposure_table([0, 8, 16, 32], [400, 326, 137, 137], [1, 1, 1.15, 1.15])
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        plot_exposure(path, table, row_tokens=ROW_TOKENS, tau=16, title="a pack")
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(0)
    writer = IndexedWriter(root / "c.bin", root / "c.idx", 100)
    for length in rng.integers(1, 120, 60):
        writer.add(rng.integers(0, 100, length))
    writer.close()
    options = PackOptions(row_tokens=ROW_TOKENS, policy="concat", seed=0, validation_fraction=0.2)
    with pytest.warns(UserWarning, match="tokenizer"):
        pack_corpora([str(root / "c")], root / "pack", options)
    return root / "pack"


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool("inspect_pack.py", *arguments)


def test_json_contract(pack: Path, tmp_path: Path) -> None:
    done = inspect(
        pack, "--json", "--alpha", "0.5", "--gamma", "0", "--tau", "20", "--plot", tmp_path / "f.png"
    )
    assert (done.returncode, done.stderr) == (0, "")
    content, manifest = json.loads(done.stdout), read_manifest(pack)
    assert (content["row_tokens"], content["fingerprint"]) == (ROW_TOKENS, manifest.fingerprint)
    assert [bucket["lower"] for bucket in content["buckets"]] == [0, 8, 16, 32]
    assert [bucket["targets"] for bucket in content["buckets"]] == list(
        manifest.splits["train"].exposure.counts
    )
    assert [bucket["weight"] for bucket in content["buckets"]] == [1, 1, 1, 1.5]
    assert set(content["buckets"][0]) == {"lower", "targets", "share", "weight", "weighted_share"}
    assert content["tail"]["tau"] == 20
    assert content["tail"]["mean_extra_weight"] == pytest.approx(0.5)
    lengths = content["lengths"]
    assert set(lengths) == {"documents", "segments", "truncation", "padding", "left_out_tokens"}
    assert lengths["segments"]["tokens"] == manifest.splits["train"].tokens
    assert lengths["documents"]["documents"] == manifest.splits["train"].sources[0].documents
    for name in ("f.png", "f-lengths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_text_shows_exposure_and_lengths(pack: Path) -> None:
    done = inspect(pack)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("effective context", "* tail, from tau = 16 tokens", "documents", "cut: ", "padding: 0 "):
        assert words in done.stdout


def test_shares_of_data_parallel_ranks(pack: Path) -> None:
    steps = ("--data-parallel", "2", "--global-batch-size", "8", "--seed", "5")
    table = json.loads(inspect(pack, "--json", *steps, "--preset", "qwen2.5-0.5b").stdout)["step_balance"]
    reader = RowReader(pack, "train")
    pairs = reader.attention_pairs(range(len(reader)))
    order = row_permutation(len(reader), seed=5, epoch=0).all()

    def plain(work: np.ndarray, *, balanced: bool) -> float:
        """Mean over steps of the busiest rank over the mean, from the rows that the dataset deals."""
        layout = StepLayout(rows=8, ranks=2)
        dataset = PackedDataset(pack, "train", seed=5, balance=layout if balanced else None)
        ratios = []
        for first in range(0, len(reader) - 7, 8):
            step = [work[dataset.row_of(first + sample)] for sample in range(8)]
            totals = [sum(step[0::2]), sum(step[1::2])]
            ratios.append(max(totals) * 2 / sum(totals))
        return float(np.mean(ratios))

    for name, balanced in (("as drawn", False), ("balanced", True)):
        assert table["attention"][name]["step_mean"] == pytest.approx(plain(pairs, balanced=balanced))
    drawn, balanced_ = (table["attention"][name] for name in ("as drawn", "balanced"))
    assert balanced_["step_mean"] - 1 < 0.5 * (drawn["step_mean"] - 1)
    # Qwen2.5-0.5B: 14 heads and 2 groups of 64, width 896, 4,864 in the MLP; 4 FLOP a pair and channel
    matrices = 896 * 64 * (14 + 2 * 2) + 64 * 14 * 896 + 3 * 896 * 4864
    attention = 4 * 14 * 64 * float(pairs[order].mean())
    assert table["attention_share"] == pytest.approx(
        attention / (attention + 2 * matrices * ROW_TOKENS), rel=0.01
    )
    shown = inspect(pack, *steps).stdout
    assert "2 data-parallel ranks, 8 rows a step" in shown
    assert f"{balanced_['step_mean']:.3f}, {balanced_['step_worst']:.3f}" in shown
    refused = inspect(pack, "--data-parallel", "2")
    assert refused.returncode == 1
    assert "--data-parallel needs --global-batch-size" in refused.stderr


@pytest.mark.parametrize("option", ["--global-batch-size", "--micro-batch-size", "--seed", "--preset"])
@pytest.mark.parametrize(
    ("flags", "reason"), [((), "without --data-parallel"), (("--ledger",), "with --ledger")]
)
def test_options_of_steps_are_not_ignored(
    pack: Path, option: str, flags: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"^{option} {reason}"):
        inspect_command([str(pack), option, "qwen2.5-0.5b" if option == "--preset" else "8", *flags])
    assert not capsys.readouterr().out


def test_a_pack_without_its_corpus_shows_the_rest(pack: Path, tmp_path: Path) -> None:
    shutil.copytree(pack, tmp_path / "copy" / "pack")
    copy = tmp_path / "copy" / "pack"
    done = inspect(copy, "--json")
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert "lengths of whole documents are not shown" in done.stderr
    assert json.loads(done.stdout)["lengths"]["documents"] is None
    relocated = json.loads(inspect(copy, "--json", "--source-root", pack.parent).stdout)
    assert relocated == json.loads(inspect(pack, "--json").stdout)


def test_validation_targets_under_the_weights_of_training(pack: Path) -> None:
    train, validation = (
        json.loads(inspect(pack, "--json", "--split", s).stdout) for s in ("train", "validation")
    )
    weights = [[bucket["weight"] for bucket in content["buckets"]] for content in (train, validation)]
    assert weights[0] == weights[1]
    counts = read_manifest(pack).splits["validation"].exposure.counts
    assert [bucket["targets"] for bucket in validation["buckets"]] == list(counts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--alpha", "nan"), "alpha is nan"),
        (("--alpha", "-0.1"), "alpha is -0.1"),
        (("--gamma", "-1"), "gamma is -1.0"),
        (("--tau", "65"), "tau 65 is above the row length 64"),
        (("--tau", "0"), "tau is 0.0"),
        (("--tau", "x"), "invalid float value"),
    ],
)
def test_bad_parameters(pack: Path, tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    figure = tmp_path / "f.png"
    done = inspect(pack, *arguments, "--plot", figure)
    assert done.returncode != 0
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_pack(tmp_path: Path) -> None:
    done = inspect(tmp_path)
    assert done.returncode == 1
    assert "not a packed dataset" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_an_empty_tail_is_shown_with_weight_1_and_said(tmp_path: Path, as_json: bool) -> None:
    writer = IndexedWriter(tmp_path / "c.bin", tmp_path / "c.idx", 100)
    for _ in range(40):
        writer.add(np.arange(6))
    writer.close()
    options = PackOptions(row_tokens=ROW_TOKENS, policy="best-fit", seed=0)
    with pytest.warns(UserWarning, match="tokenizer"):
        pack_corpora([str(tmp_path / "c")], tmp_path / "pack", options)
    done = inspect(tmp_path / "pack", *(["--json"] if as_json else []))
    assert done.returncode == 0
    assert "every weight is shown as 1" in (done.stderr if as_json else done.stdout)
    if as_json:
        content = json.loads(done.stdout)
        assert [bucket["weight"] for bucket in content["buckets"]] == [1, 1, 1, 1]
        assert content["parameters"] == {"alpha": 0.15, "gamma": 0.5, "tau": 16}
    else:
        assert done.stderr == ""
