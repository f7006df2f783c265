"""Sizes of the evaluation demo: a model too small to know anything, so that every step takes seconds.

The windows are the shortest into which every RULER task fits with the demo's tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """The whole demo."""

    seed: int = 7
    """Of the model, the packs, the training and the examples."""
    vocabulary: int = 4096
    """Ids of the tokenizer."""
    hidden: int = 64
    """Width of the model, two layers."""
    row_tokens: int = 2048
    """Of continued pretraining."""
    iterations: int = 12
    """Of continued pretraining, each arm."""
    records: int = 240
    """Question-answer records."""
    qa_row_tokens: int = 512
    """Of QA-SFT."""
    qa_iterations: int = 24
    """Of QA-SFT; 600 in the paper."""
    trained_lengths: tuple[int, ...] = (2048,)
    """Windows of RULER and NoLiMa up to the rows of training."""
    extrapolated_lengths: tuple[int, ...] = (2560,)
    """Windows beyond."""
    samples: int = 4
    """Examples of a cell of RULER and NoLiMa."""
    qa_samples: int = 4
    """Examples of a QA task; of MMLU, one of each subject."""
    probe_distances: tuple[int, ...] = (64, 256, 1024)
    """Of the evidence probe."""
    probe_contexts: tuple[int, ...] = (512, 1536)
    """Of its field."""
    probe_items: int = 6
    """Of a cell of the probe."""


FULL = EvaluateSettings()
QUICK = EvaluateSettings(
    vocabulary=3072,
    iterations=4,
    records=60,
    qa_iterations=4,
    samples=2,
    qa_samples=2,
    probe_distances=(64, 256),
    probe_contexts=(512,),
    probe_items=2,
)
