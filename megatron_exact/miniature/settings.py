"""Sizes, designs and arms of the miniature.

Learning rate and number of steps were chosen on the arm with rule `none` alone (docs/miniature.md tells
how); alpha 0.15, gamma 0.5 and tau = a quarter of the row are the paper's. Alphas of 1 and 4 are
exaggerations, so that a run of minutes shows more than the noise between seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_exact.demo.settings import StageSettings
from megatron_exact.miniature.corpus import CorpusDesign

LONG_ROW_TOKENS = 512
PAPER_ALPHA = 0.15
EXAGGERATED_ALPHA = 1.0

NEARBY = (16, 96)
"""Distances of evidence that the base model was trained on."""
FAR = (192, 384)
"""Distances that only rows of 512 tokens hold; the primary measure is the mean margin over them."""

DISTANT = "distant"
NEAR = "near"
_HEAVY_TAILED = CorpusDesign(evidence="distant", shortest=12, longest=511, median=72, spread=1.05)
DESIGNS = {DISTANT: _HEAVY_TAILED, NEAR: replace(_HEAVY_TAILED, evidence="near")}


def stage_options(stage: StageSettings) -> list[str]:
    """Flags of a stage in one process, the same in every arm; it saves and evaluates at its end."""
    options: list[object] = [
        *stage.schedule_flags(),
        *("--weight-decay", 0.01, "--eval-iters", stage.evaluation_batches),
        *("--save-interval", stage.iterations, "--log-interval", 50),
    ]
    return [str(option) for option in options]


@dataclass(frozen=True, kw_only=True)
class BaseStage:
    """One stage of the base model's training."""

    name: str
    """Short, also of its folder."""
    summary: str
    """Its documents, in words."""
    design: CorpusDesign
    """Its documents."""
    training: StageSettings
    """Its schedule."""


BASE_SEED = 1
BASE_STAGES = (
    BaseStage(
        name="drill",
        summary="16-32 words: two to four facts, then questions about them",
        design=CorpusDesign(evidence="drill", shortest=16, longest=32),
        training=StageSettings(
            row_tokens=64,
            rows_per_iteration=16,
            rows_per_micro_batch=16,
            iterations=400,
            warmup_iterations=50,
            learning_rate=3e-3,
            evaluation_batches=4,
        ),
    ),
    BaseStage(
        name="documents",
        summary="16-127 words, facts in the first quarter, each asked for once",
        design=CorpusDesign(evidence="distant", shortest=16, longest=127),
        training=StageSettings(
            row_tokens=128,
            rows_per_iteration=16,
            rows_per_micro_batch=16,
            iterations=400,
            warmup_iterations=50,
            learning_rate=3e-3,
            evaluation_batches=4,
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to continue from the base model."""

    name: str
    """Folder and short name."""
    title: str
    """For tables and figures."""
    rule: str
    """`--token-weighting`."""
    alpha: float | None = None
    """`--exact-alpha`; None for rules without it."""
    length: int = 1
    """Times the steps of the other arms, with the learning rate's schedule stretched along."""

    def command_options(self) -> list[str]:
        """Flags in which arms differ, apart from the number of steps."""
        alpha = [] if self.alpha is None else ["--exact-alpha", f"{self.alpha:g}"]
        return ["--token-weighting", self.rule, *alpha]


def exact_arm(alpha: float) -> Arm:
    """EXACT at one alpha."""
    return Arm(name=f"exact-{alpha:g}", title=f"EXACT, alpha {alpha:g}", rule="exact", alpha=alpha)


def _control(rule: str, title: str) -> Arm:
    return Arm(name=rule, title=title, rule=rule, alpha=EXAGGERATED_ALPHA)


STANDARD = Arm(name="standard", title="standard", rule="none")
LONGER = Arm(name="standard-2x", title="standard, twice the steps", rule="none", length=2)
ALPHAS = (PAPER_ALPHA, EXAGGERATED_ALPHA, 4.0)
DOSES = tuple(exact_arm(alpha) for alpha in ALPHAS)
CONTROLS = (
    _control("random-same-mass", "random same-mass, alpha 1"),
    _control("packed-position", "packed position, alpha 1"),
    _control("uniform-tail", "uniform tail, alpha 1"),
    _control("exact-normalized", "normalized EXACT, alpha 1"),
)
ARMS: dict[str, tuple[Arm, ...]] = {
    DISTANT: (STANDARD, *DOSES, *CONTROLS, LONGER),
    NEAR: (STANDARD, *DOSES[:2]),
}
"""Arms by design; the first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class MiniatureSettings:
    """The whole experiment."""

    seeds: int
    """Numbered from 1. A seed is one draw of the corpus, its split, its rows and their order."""
    long: StageSettings
    """Continued pretraining, once an arm and seed."""
    arms: dict[str, tuple[Arm, ...]]
    """By design."""
    corpus_tokens: int
    """Of one corpus, both splits."""
    validation_fraction: float
    """Share of the documents that is held out."""
    distances: tuple[int, ...]
    """Of the probe, tokens from the evidence to the answer."""
    items_per_distance: int
    """Questions of the probe at each distance, the same for every arm and seed."""
    resamples: int
    """Of the bootstrap."""


RATES_TRIED = (5e-4, 1e-3, 2e-3, 4e-3)
"""Learning rates that standard training was tried with on the first seed, see docs/miniature.md."""
LONG = StageSettings(
    row_tokens=LONG_ROW_TOKENS,
    rows_per_iteration=4,
    rows_per_micro_batch=4,
    iterations=160,
    warmup_iterations=8,
    learning_rate=2e-3,
    evaluation_batches=16,
)
FULL = MiniatureSettings(
    seeds=5,
    long=LONG,
    arms=ARMS,
    corpus_tokens=1_200_000,
    validation_fraction=0.06,
    distances=(16, 32, 64, 96, 128, 192, 256, 320, 384),
    items_per_distance=48,
    resamples=10_000,
)


def choose_arms(
    arms: dict[str, tuple[Arm, ...]], *, designs: str | None, names: str | None
) -> dict[str, tuple[Arm, ...]]:
    """The arms that a user names; the first one of a design is always among them.

    Args:
        arms: by design.
        designs: comma-separated, None for all.
        names: of arms, comma-separated, None for all.

    Raises:
        ValueError: a name that nothing has.
    """
    chosen = arms if designs is None else {name: arms.get(name, ()) for name in designs.split(",")}
    if unknown := [name for name, found in chosen.items() if not found]:
        raise ValueError(f"no design {', '.join(unknown)}: there are {', '.join(arms)}")
    if names is None:
        return chosen
    wanted = names.split(",")
    known = {arm.name for found in chosen.values() for arm in found}
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(f"no arm {', '.join(missing)}: there are {', '.join(sorted(known))}")
    return {
        design: (first, *(arm for arm in others if arm.name in wanted))
        for design, (first, *others) in chosen.items()
    }
