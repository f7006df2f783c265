"""The schedule of QA-SFT as one value; the text under a field is what the paper states about it.

The paper (EXACT, arXiv 2605.10544) tunes both arms for 600 steps on Dolly-15K before evaluations that
generate, and says nothing else of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_exact.training.recipes.recipe import Flag


@dataclass(frozen=True, kw_only=True)
class QaSchedule:
    """How long and how fast; every field is a Megatron flag that the user may give instead."""

    iterations: int = 600
    """Steps (stated)."""
    batch_rows: int = 8
    """Rows an iteration. Not stated in the paper. With rows of 2,048 tokens 600 steps read 9.8 million
    tokens, and eight GPUs have a row each."""
    learning_rate: float = 1e-5
    """Peak. Not stated in the paper; that of our recipes of continued pretraining."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the rate rises. Not stated in the paper; usual in fine-tuning."""
    weight_decay: float = 0.0
    """Of AdamW. Not stated in the paper; none is usual in fine-tuning."""
    gradient_clip: float = 1.0
    """Largest gradient norm. Not stated in the paper; 1 is usual."""
    adam_beta1: float = 0.9
    """Decay of the first moment. Not stated in the paper."""
    adam_beta2: float = 0.95
    """Decay of the second moment. Not stated in the paper; as in pretraining."""
    seed: int = 1234
    """Order of the rows, the same in every arm. The value is not stated in the paper."""
    save_every: int = 200
    """Iterations between two checkpoints. Not stated in the paper."""
    evaluate_every: int = 100
    """Iterations between two validation losses. Not stated in the paper."""

    def flags(self) -> list[Flag]:
        """Megatron's flags. The rate falls to 0 as a cosine (not stated in the paper)."""
        return [
            ("--train-iters", str(self.iterations)),
            ("--global-batch-size", str(self.batch_rows)),
            ("--optimizer", "adam"),
            ("--lr", f"{self.learning_rate:g}"),
            ("--min-lr", "0"),
            ("--lr-decay-style", "cosine"),
            ("--lr-warmup-fraction", f"{self.warmup_fraction:g}"),
            ("--weight-decay", f"{self.weight_decay:g}"),
            ("--clip-grad", f"{self.gradient_clip:g}"),
            ("--adam-beta1", f"{self.adam_beta1:g}"),
            ("--adam-beta2", f"{self.adam_beta2:g}"),
            ("--seed", str(self.seed)),
            ("--save-interval", str(self.save_every)),
            ("--eval-interval", str(self.evaluate_every)),
            ("--log-interval", "1"),
        ]
