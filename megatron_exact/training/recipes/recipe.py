"""What a training stage is, as one value that can be printed, compared and changed field by field.

The text under a field is its help. It says what the paper (EXACT, arXiv 2605.10544) states about it; where
the paper says nothing, it says so and gives the reason for our default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_exact.data.split import CorpusSlice
from megatron_exact.exposure import default_tau
from megatron_exact.model.presets import preset as find_preset
from megatron_exact.training.layout import Layout

ALL_DOCUMENTS = "1/1"
Flag = tuple[str, str | None]
"""A flag and its value; None for a switch."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much is trained, and how fast. Amounts are tokens, from which iterations follow.

    Raises:
        ValueError: a number out of range.
    """

    budget_tokens: int = 2**30
    """Tokens of the stage. The paper says that steps are derived from a budget; the budget is not stated in
    the paper. About 1 billion: published continuations to longer windows took 0.5 to 5 billion."""
    global_batch_tokens: int = 2**19
    """Tokens an iteration, the same in every stage of a chain. Not stated in the paper. Half a million
    gives 2,048 iterations a billion tokens, and still 32 rows of 16K, enough for 32 GPUs at TP4 x PP2."""
    learning_rate: float = 1e-5
    """After warm-up, constant (stated: linear warm-up, then constant). The value is not stated in the
    paper. Some ten times below the peak rates of pretraining, since nothing anneals it at the end."""
    warmup_tokens: int = 2**24
    """Tokens of linear warm-up. Not stated in the paper. 32 iterations of the default batch, enough for the
    second moments of Adam, which start from zero in every stage."""
    weight_decay: float = 0.1
    """Of AdamW (stated). The value is not stated in the paper; 0.1 is the usual one in pretraining."""
    gradient_clip: float = 1.0
    """Largest gradient norm (clipping is stated). The value is not stated in the paper; 1 is usual."""
    adam_beta1: float = 0.9
    """Decay of the first moment. Not stated in the paper; the usual value in pretraining."""
    adam_beta2: float = 0.95
    """Decay of the second moment. Not stated in the paper; the usual value in pretraining."""
    adam_epsilon: float = 1e-8
    """Guards Adam's division. Not stated in the paper; Megatron's default."""
    seed: int = 1234
    """Order of the rows, the same in both arms (stated: paired data stream). The value is not stated in the
    paper; Megatron's default. Repeat a pair with several seeds: the effect may lie near seed noise."""
    save_every_tokens: int = 2**27
    """Between two checkpoints. Not stated in the paper. An eighth of the budget: what a crash may cost."""
    keep_checkpoints: int = 2
    """Checkpoints kept, besides the one being written. Not stated in the paper. One to fall back on, should
    the newest be damaged; a checkpoint of an 8B model with its optimizer has over 100 GB."""
    evaluate_every_tokens: int = 2**27
    """Between two validation losses. Not stated in the paper. As often as a checkpoint is saved."""
    evaluation_tokens: int = 2**21
    """Of the validation split, in each evaluation. Not stated in the paper. 2 million, 64 times fewer than
    are trained between two; a pack with fewer validation rows needs a smaller number, or --eval-iters."""

    def __post_init__(self) -> None:
        for name in ("budget_tokens", "global_batch_tokens", "save_every_tokens", "evaluate_every_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more tokens")
        if self.warmup_tokens < 0 or self.evaluation_tokens < 0:
            raise ValueError("warmup_tokens and evaluation_tokens are 0 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: give a number above 0")

    def flags(self, row_tokens: int, batch_rows: int | None = None) -> list[Flag]:
        """Megatron's flags for rows of this length.

        Args:
            row_tokens: of the stage.
            batch_rows: rows of a batch if the user says how many; iterations follow from it.

        Raises:
            ValueError: a batch that is no whole number of rows.
        """
        if batch_rows is None:
            batch_rows, rest = divmod(self.global_batch_tokens, row_tokens)
            if rest or not batch_rows:
                raise ValueError(
                    f"global_batch_tokens {self.global_batch_tokens} is no multiple of the row of "
                    f"{row_tokens}: give a multiple"
                )
        step_tokens = batch_rows * row_tokens
        return [
            ("--global-batch-size", str(batch_rows)),
            ("--train-iters", str(math.ceil(self.budget_tokens / step_tokens))),
            ("--optimizer", "adam"),
            ("--lr", f"{self.learning_rate:g}"),
            ("--lr-decay-style", "constant"),
            ("--lr-warmup-iters", str(math.ceil(self.warmup_tokens / step_tokens))),
            ("--weight-decay", f"{self.weight_decay:g}"),
            ("--clip-grad", f"{self.gradient_clip:g}"),
            ("--adam-beta1", f"{self.adam_beta1:g}"),
            ("--adam-beta2", f"{self.adam_beta2:g}"),
            ("--adam-eps", f"{self.adam_epsilon:g}"),
            ("--seed", str(self.seed)),
            ("--save-interval", str(math.ceil(self.save_every_tokens / step_tokens))),
            ("--keep-last", str(self.keep_checkpoints)),
            ("--eval-interval", str(math.ceil(self.evaluate_every_tokens / step_tokens))),
            ("--eval-iters", str(math.ceil(self.evaluation_tokens / step_tokens))),
            ("--log-interval", "1"),
        ]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training stage of one model; `--token-weighting` says which arm.

    Raises:
        ValueError: an unknown preset, or sizes that do not divide.
    """

    preset: str
    """The model (stated). Its shape stands in `megatron_exact.model.presets` alone."""
    row_tokens: int
    """The window of the stage (stated: 4K, 8K, 16K); the pack must have rows of this length."""
    corpus_mix: tuple[tuple[str, float], ...]
    """Corpora and their weights (stated for a model's whole chain; whether the stages differ is not stated
    in the paper). Weights are taken as shares of tokens, which is what pack_corpus.py does."""
    corpus_slice: str = ALL_DOCUMENTS
    """Which of several disjoint parts of the corpora's documents the stage reads. Our choice: whether the
    paper's stages share documents is not stated. Packed with one seed and budget from whole corpora, they
    would be passes over the same documents; 1/1 in every stage gives that."""
    previous: str | None = None
    """Recipe of the stage before, whose weights this one starts from (stated: staged training)."""
    nodes: int = 1
    """Machines. The paper states 8 H100 GPUs in all."""
    gpus_per_node: int = 8
    """GPUs of a machine (stated: 8 H100)."""
    layout: Layout = field(default_factory=Layout)
    """How the model is spread over them. Not stated in the paper, and without influence on the result: the
    loss is the same on every layout. Ours are the fastest that leave room in 80 GB (tools/preflight.py)."""
    schedule: Schedule = field(default_factory=Schedule)
    """How much is trained, and how fast."""

    def __post_init__(self) -> None:
        find_preset(self.preset)
        CorpusSlice.parse(self.corpus_slice)
        if self.row_tokens < 1 or self.nodes < 1 or self.gpus_per_node < 1:
            raise ValueError("row_tokens, nodes and gpus_per_node are 1 or more")
        if self.world_size % self.layout.model_parallel:
            raise ValueError(
                f"{self.world_size} GPUs do not divide by TP x PP x CP = {self.layout.model_parallel}: "
                "change nodes or the sizes of the layout"
            )

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def tau(self) -> int:
        """First effective context of the tail, tokens (stated: 1K, 2K, 4K, a quarter of the window)."""
        return default_tau(self.row_tokens)

    def flags(self, *, batch_rows: int | None = None) -> list[Flag]:
        """The expansion, except for the model's shape, which follows from `--preset`.

        Args:
            batch_rows: the user's `--global-batch-size`; iterations follow from it.
        """
        return [
            ("--preset", self.preset),
            ("--seq-length", str(self.row_tokens)),
            ("--token-weighting", "none"),
            ("--exact-tau", str(self.tau)),
            *self.layout.flags(),
            ("--bf16", None),
            *self.schedule.flags(self.row_tokens, batch_rows),
        ]

    def pack_command(self) -> list[str]:
        """The command line of `pack_corpus.py` for this stage's corpus; folders are left to the reader."""
        sources = [f"{weight:g}:tokens/{name}" for name, weight in self.corpus_mix]
        if len(sources) == 1:
            sources = [f"tokens/{self.corpus_mix[0][0]}"]
        part = [] if self.corpus_slice == ALL_DOCUMENTS else ["--corpus-slice", self.corpus_slice]
        return [
            *("python", "tools/pack_corpus.py"),
            *(word for source in sources for word in ("--source", source)),
            *("--row-tokens", str(self.row_tokens), "--policy", "concat"),
            *("--validation-fraction", "0.005", "--seed", str(self.schedule.seed)),
            *("--train-tokens", str(self.schedule.budget_tokens)),
            *part,
            *("--output", f"packs/{self.row_tokens // 1024}k"),
        ]
