"""The datasets of a job: rows of its pack as upstream's samplers read them."""

from __future__ import annotations

from typing import Any

from megatron.core.datasets.utils import Split

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import Manifest
from megatron_exact.exposure import Weighting
from megatron_exact.training.confidence_options import score_reader


def train_dataset(args: Any, manifest: Manifest, weighting: Weighting, num_samples: int) -> PackedDataset:
    """Weighted rows of the training split, in the order of the seed, epoch after epoch.

    Args:
        args: Megatron's validated namespace, with our options.
        manifest: of the pack.
        weighting: the rule applied to it.
        num_samples: those that the job reads, consumed ones included.
    """
    dataset = PackedDataset(
        args.pack,
        "train",
        # The sampler asks for more than was consumed, even by a job that only evaluates
        num_samples=max(num_samples, args.consumed_train_samples + args.global_batch_size),
        seed=args.seed,
        weighting=weighting,
        scores=score_reader(args, manifest),
        source_root=args.source_root,
    )
    dataset.split = Split.train  # type: ignore[attr-defined]  # data_samplers.py reads it
    return dataset


def validation_dataset(args: Any, num_samples: int) -> PackedDataset:
    """The first rows of the validation split, the same at every evaluation, unweighted.

    Args:
        args: as for training.
        num_samples: those that the evaluations to come read.
    """
    dataset = PackedDataset(
        args.pack,
        "validation",
        num_samples=num_samples + args.consumed_valid_samples,
        shuffle=False,
        cycle=args.eval_iters * args.global_batch_size,
        source_root=args.source_root,
    )
    dataset.split = Split.valid  # type: ignore[attr-defined]
    return dataset
