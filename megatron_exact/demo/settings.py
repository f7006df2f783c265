"""Sizes of the demo: small enough for minutes on two cores, large enough that the loss moves.

The model has 0.6 million parameters and sees about a million tokens; the paper's smallest model has
eight hundred times as many parameters. The shape of the experiment is the paper's: one base model,
one packed corpus, two arms that differ in the weights of their tokens alone, tau a quarter of the row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PROCESSES = 2


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training, of this demo or of the miniature."""

    row_tokens: int
    """Inputs of a packed row."""
    rows_per_iteration: int
    """Global batch."""
    rows_per_micro_batch: int
    """Rows of one forward pass."""
    iterations: int
    """Optimizer steps."""
    warmup_iterations: int
    """Steps over which the learning rate rises."""
    learning_rate: float
    """Peak, reached after the warm-up; it falls along a cosine to a tenth."""
    evaluation_batches: int
    """Global batches of every evaluation; fewer where the validation split is smaller."""
    evaluations: int = 1
    """Evaluations over the stage, the last one at its end."""

    @property
    def tokens(self) -> int:
        """Inputs that the stage reads."""
        return self.iterations * self.rows_per_iteration * self.row_tokens

    def of_length(self, iterations: int) -> StageSettings:
        """The same with another number of steps, the warm-up stretched along."""
        warmup = max(1, round(self.warmup_iterations * iterations / self.iterations))
        return replace(self, iterations=iterations, warmup_iterations=warmup)

    def schedule_flags(self) -> list[str]:
        """Batch, steps and learning rate as flags of Megatron; `--eval-iters` depends on the split."""
        options: list[object] = [
            *("--global-batch-size", self.rows_per_iteration),
            *("--micro-batch-size", self.rows_per_micro_batch),
            *("--train-iters", self.iterations, "--lr", self.learning_rate),
            *("--min-lr", f"{self.learning_rate / 10:g}", "--lr-decay-style", "cosine"),
            *("--lr-warmup-iters", self.warmup_iterations),
            *("--clip-grad", 1.0, "--adam-beta2", 0.95),
            *("--eval-interval", max(1, self.iterations // self.evaluations)),
        ]
        return [str(option) for option in options]


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The whole demo."""

    takes: str
    """For people: how long all steps take on two quiet cores."""
    seed: int
    """Of the packs, the initial weights and the order of rows."""
    vocabulary: int
    """Pieces of the SentencePiece model; divisible by the tensor parallel size."""
    tokenizer_sample_bytes: int
    """Text that the tokenizer is trained on."""
    validation_fraction: float
    """Share of the documents that is held out."""
    layers: int
    """Transformer layers."""
    hidden: int
    """Width of the model."""
    feed_forward: int
    """Width inside the gated MLP."""
    heads: int
    """Query heads."""
    query_groups: int
    """Key and value heads."""
    initial_std: float
    """Of the weights; wider than Megatron's 0.02, with which so narrow a model learns far more slowly."""
    short: StageSettings
    """Stage 1, from scratch, on short rows."""
    long: StageSettings
    """Stage 2, continued pretraining on long rows, run once an arm."""


FULL = DemoSettings(
    takes="About six minutes",
    seed=20260,
    vocabulary=2048,
    tokenizer_sample_bytes=3_000_000,
    validation_fraction=0.05,
    layers=4,
    hidden=96,
    feed_forward=256,
    heads=4,
    query_groups=2,
    initial_std=0.08,
    short=StageSettings(
        row_tokens=256,
        rows_per_iteration=16,
        rows_per_micro_batch=16,
        iterations=150,
        warmup_iterations=15,
        learning_rate=8e-3,
        evaluation_batches=8,
    ),
    long=StageSettings(
        row_tokens=1024,
        rows_per_iteration=4,
        rows_per_micro_batch=2,
        iterations=80,
        warmup_iterations=10,
        learning_rate=2e-3,
        evaluation_batches=16,
        evaluations=4,
    ),
)

QUICK = DemoSettings(
    takes="About two minutes",
    seed=20260,
    vocabulary=512,
    tokenizer_sample_bytes=300_000,
    validation_fraction=0.05,
    layers=2,
    hidden=64,
    feed_forward=192,
    heads=2,
    query_groups=2,
    initial_std=0.08,
    short=StageSettings(
        row_tokens=128,
        rows_per_iteration=16,
        rows_per_micro_batch=8,
        iterations=12,
        warmup_iterations=2,
        learning_rate=3e-3,
        evaluation_batches=2,
    ),
    long=StageSettings(
        row_tokens=256,
        rows_per_iteration=8,
        rows_per_micro_batch=4,
        iterations=8,
        warmup_iterations=1,
        learning_rate=1e-3,
        evaluation_batches=2,
        evaluations=2,
    ),
)
