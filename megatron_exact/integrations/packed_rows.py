"""A pack as a plain map-style torch dataset, and as a Hugging Face dataset.

Rows are those that training on Megatron reads, with the weights that any rule gives them, also a rule that
position ids cannot express (`random-same-mass`, or one of stored scores).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.rows import RowReader
from megatron_exact.data.score_files import ScoreReader, gaining_counts
from megatron_exact.data.targets import TargetLayout
from megatron_exact.exposure import Weighting, bucket_lower_bounds, build_weighting, find_rule
from megatron_exact.integrations.target_weights import IGNORE_INDEX

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "row_id")
WEIGHTS = "target_weights"


class PackedRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of one split of a pack (S = row_tokens); item i is row i of the plan.

    | key | dtype, shape | content |
    |---|---|---|
    | tokens | int64 [S] | inputs, padded with 0 |
    | labels | int64 [S] | the token that each input predicts, -100 where unsupervised |
    | loss_mask | float32 [S] | 1 supervised, 0 not |
    | position_ids | int64 [S] | from 0 in every segment |
    | cu_seqlens | int32 [S + 1] | segment boundaries, filled up with S so that batches can be stacked |
    | row_id | int64 scalar | row of the plan |
    | target_weights | float32 [S] | with a rule: weight of each target, >= 0 |

    Args:
        pack_dir: a packed dataset.
        split: `train` or `validation`.
        rule: a name in `exposure.RULES`; its counts are those of the pack's training split. None gives rows
            without weights.
        scores: folder of stored scores of the split, for rules of scores.
        order_seed: seed of a Megatron run (its `--seed`, 1234 by default): item i is then the i-th row that
            the run trains on in its first epoch. It also is the seed of `random-same-mass` (0 if None).
        source_root: where the corpora lie now, if not where the manifest says.
        parameters: fields of `exposure.RuleParameters`: alpha, gamma, tau, cap, ...

    Attributes:
        row_tokens: S.
        fingerprint: fingerprint of the pack.
        keys: names of what a row contains.
        divides_by_mass: whether the rule divides the loss by the sum of weights.

    Raises:
        ValueError, FileNotFoundError: a pack, corpus or scores that are damaged or missing, an unknown
            rule, or one that needs scores without any.
    """

    def __init__(
        self,
        pack_dir: str | Path,
        split: str = "train",
        *,
        rule: str | None = None,
        scores: str | Path | None = None,
        order_seed: int | None = None,
        source_root: str | Path | None = None,
        **parameters: Any,
    ) -> None:
        manifest = read_manifest(pack_dir)
        if rule is None and (scores is not None or parameters):
            raise ValueError(f"{', '.join(parameters) or 'scores'} without a rule: name one with rule=")
        weighting: Weighting | None = None
        read = None if scores is None else ScoreReader(scores, manifest, split)
        if rule is not None:
            if find_rule(rule).reads_scores and scores is None:
                raise ValueError(
                    f"{rule} needs stored scores (megatron-exact score): name them with scores="
                )
            weighting = build_weighting(
                rule,
                manifest.splits["train"].exposure.counts,
                bucket_lower_bounds(manifest.row_tokens),
                manifest.row_tokens,
                position_counts=TargetLayout(pack_dir, manifest, "train", source_root).position_counts,
                has_scores=scores is not None,
                gaining_counts=None
                if scores is None
                else lambda nats: gaining_counts(
                    RowReader(pack_dir, "train", source_root=source_root),
                    ScoreReader(scores, manifest, "train"),
                    nats,
                )[0],
                **parameters,
            )
        self.divides_by_mass = weighting is not None and weighting.divides_by_mass
        self.row_tokens = manifest.row_tokens
        self.fingerprint = manifest.fingerprint
        self._rows = PackedDataset(
            pack_dir,
            split,
            seed=0 if order_seed is None else order_seed,
            shuffle=order_seed is not None,
            weighting=weighting,
            scores=read,
            source_root=source_root,
        )
        scored = None if read is None else repr(read.record)
        described = None if weighting is None else weighting.describe()
        self._identity = [manifest.fingerprint, split, described, order_seed, scored]
        self.keys = KEYS if weighting is None else (*KEYS, WEIGHTS)

    @property
    def digest(self) -> str:
        """Hex sha256 of what decides the rows: pack, split, rule, order and scores."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[range(len(self))[index]]  # an IndexError beyond the end, which ends a plain loop
        row["labels"] = row["labels"].masked_fill(row["loss_mask"] == 0, IGNORE_INDEX)
        return {key: row[key] for key in self.keys}


_INTEGERS = ("input_ids", "labels", "shift_labels", "position_ids", "seq_lengths")


def hf_dataset(rows: PackedRows, *, streaming: bool = False, cache_dir: str | Path | None = None) -> Any:
    """Return rows as a Hugging Face dataset.

    Columns, lists of S numbers: `input_ids`, `labels` (transformers' convention: the token itself, -100
    where it is no target), `shift_labels` (the target of each input, row ends included), `position_ids`,
    `seq_lengths` (of the segments, padding included, from which TRL's own collator makes position ids), and
    with a rule `target_weights`.

    Args:
        rows: the rows.
        streaming: return an `IterableDataset`, which reads the pack in place. Otherwise the rows are
            written once as Arrow files, 40 bytes a token.
        cache_dir: where these files go; None: the cache of `datasets`.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("hf_dataset needs datasets: pip install 'megatron-exact[hub]'") from None
    columns = {name: datasets.List(datasets.Value("int64")) for name in _INTEGERS}
    if WEIGHTS in rows.keys:
        columns[WEIGHTS] = datasets.List(datasets.Value("float32"))
    features = datasets.Features(columns)
    if streaming:
        return datasets.IterableDataset.from_generator(
            _records, gen_kwargs={"rows": rows}, features=features
        )
    # What decides the rows names them in the cache, so that another pack, rule or order is written anew
    return datasets.Dataset.from_generator(
        _records,
        gen_kwargs={"rows": rows},
        features=features,
        fingerprint=rows.digest,
        cache_dir=None if cache_dir is None else str(cache_dir),
    )


def _records(rows: PackedRows) -> Iterator[dict[str, list[Any]]]:
    for index in range(len(rows)):
        row = rows[index]
        labels = torch.full_like(row["labels"], IGNORE_INDEX)
        labels[1:] = row["labels"][:-1]
        lengths = row["cu_seqlens"].diff()
        record = {
            "input_ids": row["tokens"].tolist(),
            "labels": labels.tolist(),
            "shift_labels": row["labels"].tolist(),
            "position_ids": row["position_ids"].tolist(),
            "seq_lengths": lengths[lengths > 0].tolist(),
        }
        if WEIGHTS in row:
            record[WEIGHTS] = row[WEIGHTS].tolist()
        yield record
