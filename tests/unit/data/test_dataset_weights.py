"""Weights of whole packs under every rule of a table: mass, multiset, and what they may not depend on."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_corpora import (
    PlainRow,
    heavy_tailed_lengths,
    plain_bucket,
    random_documents,
    read_rows_plainly,
    write_corpus,
)

from megatron_exact.data import score_files
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.score_files import ScoreReader, ScoreRecord
from megatron_exact.data.targets import TargetLayout, TargetOrder
from megatron_exact.exposure import RULES, RuleParameters, Weighting, build_weighting, exact_weights
from megatron_exact.exposure.row_weights import ContextWeights, SplitTargets
from megatron_exact.exposure.rules import Rule, by_context

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")
ROW_TOKENS = 40
ALPHA = 0.7
WAYS = tuple(itertools.product(("concat", "best-fit"), (False, True)))
CONTROLS = ("random-same-mass", "constant", "uniform-tail", "packed-position")
SHAPED = {"cap": 1.5, "bucket_weights": ((0, 0.25),), "gamma": 2.0}
Weights = NDArray[np.float32]


class Packed:
    """A pack, its rows read token by token, and its rules."""

    def __init__(self, root: Path, policy: str, masked: bool) -> None:
        corpus = random_documents([40, 80, 81, 1, *heavy_tailed_lengths(150)])
        options = PackOptions(
            row_tokens=ROW_TOKENS,
            policy=policy,
            seed=1,
            validation_fraction=0.0,
            mask_cross_document_targets=masked,
        )
        self.path = root / "pack"
        pack_corpora([write_corpus(root / "c", corpus)], self.path, options)
        self.rows: list[PlainRow] = read_rows_plainly(self.path, "train", [corpus])
        self.manifest = read_manifest(self.path)
        self.split = self.manifest.splits["train"]

    def weigh(self, rule: str, **parameters: Any) -> Weighting:
        exposure = self.split.exposure
        layout = TargetLayout(self.path, self.manifest, "train")
        return build_weighting(
            rule,
            exposure.counts,
            exposure.lower,
            ROW_TOKENS,
            position_counts=layout.position_counts,
            **{"alpha": ALPHA, **parameters},
        )

    def dataset(self, rule: str, *, seed: int = 5, **parameters: Any) -> PackedDataset:
        return PackedDataset(self.path, "train", seed=seed, weighting=self.weigh(rule, **parameters))

    def by_row(self, dataset: PackedDataset, indices: Iterable[int] | None = None) -> list[Weights]:
        """Weights of the supervised targets, in the order of the plan."""
        found: dict[int, Weights] = {}
        for index in range(len(dataset)) if indices is None else indices:
            item = dataset[index]
            found[int(item["row_id"])] = item["target_weights"].numpy()[item["loss_mask"].numpy() > 0]
        return [found[row] for row in sorted(found)]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("weights"), *request.param)


@pytest.fixture(scope="module")
def best_fit(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("weights"), "best-fit", True)


def mass_of(weighting: Weighting) -> float:
    assert weighting.table is not None
    return float(np.dot(weighting.table.counts, weighting.table.weights))


def plain_table(packed: Packed, contexts: Iterable[int], gamma: float = 0.5) -> list[float]:
    """EXACT's table for targets of these contexts, by counting them."""
    counts = Counter(plain_bucket(context, ROW_TOKENS) for context in contexts)
    lower = packed.split.exposure.lower
    ordered = [counts[bucket] for bucket in range(len(lower))]
    return exact_weights(ordered, lower, alpha=ALPHA, gamma=gamma, tau=ROW_TOKENS / 4).tolist()


def plain_weights(packed: Packed, rule: str) -> list[list[float]]:
    """By row, for the rules without chance: METHOD's definitions token by token."""
    contexts = [[c for c, m in zip(row.context, row.mask, strict=True) if m] for row in packed.rows]
    places = [[p + 1 for p, m in enumerate(row.mask) if m] for row in packed.rows]
    looked_at = places if rule == "packed-position" else contexts
    table = plain_table(
        packed, itertools.chain.from_iterable(looked_at), 0 if rule == "uniform-tail" else 0.5
    )
    weights = [[table[plain_bucket(value, ROW_TOKENS)] for value in row] for row in looked_at]
    if rule == "constant":
        mean = np.mean(list(itertools.chain.from_iterable(weights)))
        return [[mean] * len(row) for row in weights]
    return weights


@pytest.mark.parametrize(
    "rule", ["exact", "exact-normalized", "constant", "uniform-tail", "packed-position"]
)
def test_each_weight_is_what_the_definition_says(packed: Packed, rule: str) -> None:
    found = packed.by_row(packed.dataset(rule))
    for weights, expected in zip(found, plain_weights(packed, rule), strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-7)


@pytest.mark.parametrize("rule", CONTROLS)
def test_the_table_tells_how_often_each_weight_is_dealt_out(packed: Packed, rule: str) -> None:
    """So the mass of an epoch is that of the table in float64, whatever float32 makes of one weight."""
    dataset = packed.dataset(rule)
    table = packed.weigh(rule).table
    assert table is not None
    expected: Counter[float] = Counter()
    for weight, count in zip(table.weights.astype(np.float32).tolist(), table.counts.tolist(), strict=True):
        expected[weight] += count
    found = Counter(np.concatenate(packed.by_row(dataset)).tolist())
    assert found == +expected
    assert sum(found.values()) == packed.split.supervised_targets


@pytest.mark.parametrize(
    ("rule", "shaped"),
    [
        *((rule, {}) for rule in ("random-same-mass", "constant", "uniform-tail")),
        *((rule, SHAPED) for rule in ("random-same-mass", "constant")),
    ],
)
def test_same_mass_rules_have_the_mass_of_exact(packed: Packed, rule: str, shaped: dict[str, Any]) -> None:
    exact, control = (mass_of(packed.weigh(name, **shaped)) for name in ("exact", rule))
    assert control == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("rule", ["packed-position", "uniform-tail", "constant", "random-same-mass"])
def test_matched_mass_counted_target_by_target(packed: Packed, rule: str) -> None:
    """Every weight that the dataset gives, against the definition, and their mean against EXACT's."""
    exact = np.concatenate(plain_weights(packed, "exact"))
    found = np.concatenate(packed.by_row(packed.dataset(rule, match_mass="exact"))).astype(np.float64)
    assert found.mean() == pytest.approx(exact.mean(), rel=1e-7)  # weights are float32
    if rule == "packed-position":
        own = np.concatenate(plain_weights(packed, rule))
        scale = (exact.mean() - 1) / (own.mean() - 1)
        np.testing.assert_allclose(found, 1 + scale * (own - 1), rtol=1e-7)
        assert scale < 0.9
        unmatched = np.concatenate(packed.by_row(packed.dataset(rule))).astype(np.float64)
        assert abs(unmatched.mean() / exact.mean() - 1) > 0.01  # negative control


def plain_scores(packed: Packed, folder: Path, seed: int = 0) -> tuple[ScoreReader, NDArray[np.float16]]:
    """Write made-up scores of a pack; return their reader and the differences, [rows, S]."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(0, 0.3, (packed.split.rows, ROW_TOKENS)).astype(np.float16)
    record = ScoreRecord(
        format_version=score_files.FORMAT_VERSION,
        fingerprint=packed.manifest.fingerprint,
        row_tokens=ROW_TOKENS,
        model={},
        dtype="float32",
        short_window=8,
        short_stride=6,
        shard_rows=16,
        rows={"train": packed.split.rows},
        is_complete=False,
    )
    for split, shard in score_files.begin_scores(folder, record):
        part = differences[16 * shard : 16 * shard + 16]
        score_files.write_shard(folder, record, split, shard, {"long": part, "difference": part})
    score_files.finish_scores(folder, record)
    return ScoreReader(folder, packed.manifest, "train"), differences


def test_evidence_weights_counted_target_by_target(packed: Packed, tmp_path: Path) -> None:
    """Tail targets that gain carry EXACT's extra mass, all others weigh 1; whoever reads the rows."""
    scores, differences = plain_scores(packed, tmp_path / "scores")
    layout = RowReader(packed.path, "train")

    def counted(nats: float) -> NDArray[np.int64]:
        return score_files.gaining_counts(layout, scores, nats)[0]

    weighting = packed.weigh("exact-evidence", gaining_counts=counted)
    dataset = PackedDataset(packed.path, "train", seed=5, weighting=weighting, scores=scores)
    found = np.concatenate(packed.by_row(dataset)).astype(np.float64)
    exact = np.concatenate(plain_weights(packed, "exact"))
    contexts = np.array([c for row in packed.rows for c, m in zip(row.context, row.mask, strict=True) if m])
    helped = (
        np.concatenate(
            [values[np.array(row.mask) > 0] for values, row in zip(differences, packed.rows, strict=True)]
        )
        < -0.1
    )
    tail = contexts >= packed.weigh("exact").lower_bounds[exact_tail(packed)]
    assert 0.2 < helped.mean() < 0.5
    assert (found[~(helped & tail)] == 1).all()
    assert (found[helped & tail] > 1).all()
    assert (found - 1).sum() == pytest.approx((exact - 1).sum(), rel=1e-5)  # weights are float32
    buckets = np.array([plain_bucket(context, ROW_TOKENS) for context in contexts.tolist()])
    recount = np.bincount(buckets[helped], minlength=len(packed.split.exposure.lower))
    np.testing.assert_array_equal(counted(0.1), recount)
    q = recount[buckets[tail].min() :] / recount[buckets[tail].min() :].sum()
    r = (q + 1e-6) ** -0.5
    alpha = ALPHA * tail.sum() / (helped & tail).sum()
    expected = (1 + alpha * r / (q * r).sum())[buckets[helped & tail] - buckets[tail].min()]
    np.testing.assert_allclose(found[helped & tail], expected, rtol=1e-6)
    # The same for another process and another order; another pack's scores would not be
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    again = np.concatenate(packed.by_row(copy, reversed(range(len(copy)))))
    np.testing.assert_array_equal(again, found.astype(np.float32))
    shifted, _ = plain_scores(packed, tmp_path / "other", seed=1)
    other = PackedDataset(packed.path, "train", seed=5, weighting=weighting, scores=shifted)
    assert (np.concatenate(packed.by_row(other)) != again).mean() > 0.02


def exact_tail(packed: Packed) -> int:
    """Return the first bucket of the tail."""
    return int(np.flatnonzero(np.array(packed.split.exposure.lower) >= ROW_TOKENS / 4)[0])


def test_rules_of_another_mass(packed: Packed) -> None:
    """Negative control, and what the documentation says of them."""
    exact = mass_of(packed.weigh("exact"))
    assert abs(mass_of(packed.weigh("packed-position")) / exact - 1) > 0.01
    capped, uniform = (mass_of(packed.weigh(rule, **SHAPED)) for rule in ("exact", "uniform-tail"))
    assert abs(uniform / capped - 1) > 0.001


def test_random_same_mass_is_the_multiset_of_exact_elsewhere(packed: Packed) -> None:
    exact = np.concatenate(packed.by_row(packed.dataset("exact")))
    random = np.concatenate(packed.by_row(packed.dataset("random-same-mass")))
    assert (np.sort(random) == np.sort(exact)).all()
    assert (random != exact).mean() > 0.2
    assert abs(np.corrcoef(random, exact)[0, 1]) < 0.1, "chance knows nothing of context"


def test_independent_draws_would_not_keep_the_mass(best_fit: Packed) -> None:
    """Negative control: what a permutation is for."""
    exact = np.concatenate(best_fit.by_row(best_fit.dataset("exact")))
    drawn = np.random.default_rng(0).choice(exact, exact.size)
    assert (np.sort(drawn) != np.sort(exact)).any()
    assert abs(drawn.astype(float).sum() - exact.astype(float).sum()) > 0.1


def test_rows_counted_wrongly_would_change_the_multiset(
    best_fit: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one target too few before every row but the first, another seed each time."""

    def shifted(order: TargetOrder, row: int) -> NDArray[np.int64]:
        first = order.targets_before(row) - (row > 0)
        return order.permutation.part(first, order.targets_before(row + 1) - (row > 0))

    exact = np.sort(np.concatenate(best_fit.by_row(best_fit.dataset("exact"))))
    monkeypatch.setattr(TargetOrder, "places", shifted)
    datasets = (best_fit.dataset("random-same-mass", seed=seed) for seed in range(6))
    found = [np.sort(np.concatenate(best_fit.by_row(dataset))) for dataset in datasets]
    assert any((random != exact).any() for random in found)


@pytest.mark.parametrize(
    ("rule", "parameters"),
    [("random-same-mass", {}), ("packed-position", {"match_mass": "exact"}), ("exact", {})],
)
def test_weights_depend_on_the_row_and_the_seed_alone(
    best_fit: Packed, rule: str, parameters: dict[str, Any]
) -> None:
    """Not on the epoch, the order of reading, the process, data-parallel rank or a resume."""
    rows = len(best_fit.rows)
    expected = best_fit.by_row(best_fit.dataset(rule, **parameters))
    weighting = best_fit.weigh(rule, **parameters)
    long = PackedDataset(best_fit.path, "train", seed=5, weighting=weighting, num_samples=3 * rows)
    copy = pickle.loads(pickle.dumps(long))  # noqa: S301
    ranks = [range(rank, rows, 4) for rank in range(4)]
    looks = {
        "third epoch": best_fit.by_row(long, range(2 * rows, 3 * rows)),
        "backwards, in another process": best_fit.by_row(copy, reversed(range(rows))),
        "rank by rank": best_fit.by_row(copy, itertools.chain(*ranks)),
    }
    for name, found in looks.items():
        assert all((a == b).all() for a, b in zip(found, expected, strict=True)), name
    other = best_fit.by_row(best_fit.dataset(rule, seed=6, **parameters))
    same = all((a == b).all() for a, b in zip(other, expected, strict=True))
    assert same == (rule != "random-same-mass")


def test_a_pickle_is_small(best_fit: Packed) -> None:
    """The rule and the pack's place travel to a spawned worker; nothing that grows with the corpus does."""
    assert len(pickle.dumps(best_fit.dataset("random-same-mass"))) < 20_000


def test_weight_0_leaves_the_mask_alone(best_fit: Packed) -> None:
    dataset = best_fit.dataset("exact", bucket_weights=((0, 0.0),))
    plain = PackedDataset(best_fit.path, "train", seed=5)
    for index in range(len(dataset)):
        item = dataset[index]
        assert (item["loss_mask"] == plain[index]["loss_mask"]).all()
        supervised = item["loss_mask"] > 0
        zero = item["target_weights"][supervised] == 0
        assert (zero == (item["target_buckets"][supervised] == 0)).all()
    assert sum(float(dataset[i]["loss_mask"].sum()) for i in range(len(dataset))) == (
        best_fit.split.supervised_targets
    )


def test_a_new_rule_is_a_function_and_a_row(best_fit: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/extending.md."""

    def logarithmic(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
        return by_context(split, 1 + parameters.alpha * np.log2(np.maximum(split.lower_bounds, 1)))

    row = Rule(weigh=logarithmic, parameters=("alpha",), summary="1 + alpha * log2(context)")
    monkeypatch.setitem(RULES, "logarithmic", row)
    item = best_fit.dataset("logarithmic")[0]
    lower = np.array(best_fit.split.exposure.lower)[item["target_buckets"]]
    np.testing.assert_allclose(item["target_weights"], 1 + ALPHA * np.log2(np.maximum(lower, 1)), rtol=1e-6)
    assert best_fit.weigh("logarithmic").describe()["parameters"] == {"alpha": ALPHA}
