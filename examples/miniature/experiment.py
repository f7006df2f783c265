"""The experiment: arms, seeds, sizes, and the steps of each.

Learning rate and number of steps were chosen on the arm with rule `none` alone (docs/miniature.md describes
how); alpha 0.15, gamma 0.5 and tau = a quarter of the row are the paper's. Alphas of 1 and 4 are
exaggerations, so that a run of minutes shows more than the noise between seeds.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from examples.miniature.language import CorpusDesign, write_corpus, write_items
from examples.miniature.pipeline import (
    CONVERSION_CODE,
    DATA_CODE,
    PROBE_CODE,
    ROOT,
    TRAINING_CODE,
    Pipeline,
    StageSettings,
    Step,
    say,
)
from megatron_exact.files import sha256_file

SHIPPED_BASE = ROOT / "examples" / "miniature" / "base"
LANGUAGE_CODE = ("examples/miniature/language.py",)
CORPUS = "corpus.jsonl"
"""Documents, in the folder of a corpus step."""
ITEMS = "items.jsonl"
"""Questions of the probe, in the folder of the base step."""

# No document is longer than a row, so best-fit packing cuts none and no question loses its answer.
PACKING = (
    "python tools/tokenize_corpus.py --input {here}/corpus.jsonl --tokenizer {model} "
    "--output-prefix {here}/tokens --workers 1",
    "python tools/pack_corpus.py --source {here}/tokens --row-tokens {row_tokens} --policy best-fit "
    "--validation-fraction {validation_fraction} --seed {seed} --output {here}/pack",
)
IMPORT = "python tools/import_hf.py --hf {model} --output {here}/checkpoint"
PROBE = (
    "python tools/probe_evidence.py --model {model} --items {base}/items.jsonl --output {here}/probe "
    "--device cpu"
)


def remove_checkpoints(here: Path) -> None:
    """Remove the checkpoints of a run: the exported weights are the same and half the files."""
    for leftover in (*(here / "run").glob("iter_*"), here / "run" / "tensorboard"):
        shutil.rmtree(leftover, ignore_errors=True)


TRAINING = (
    "python -m megatron_exact.training.pretrain --cpu --pack {corpus}/pack "
    "--pretrained-checkpoint {base}/checkpoint --save {here}/run --load {here}/run "
    "--no-save-optim --no-save-rng --seed {seed} {options}",
    "python tools/export_hf.py --checkpoint {here}/run --output {here}/model",
    remove_checkpoints,
)
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
"""Of all commands: one thread, and any free port for the one process of a training run."""
if sys.platform == "linux":
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"

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
        """Return the flags in which arms differ, apart from the number of steps."""
        alpha = [] if self.alpha is None else ["--exact-alpha", f"{self.alpha:g}"]
        return ["--token-weighting", self.rule, *alpha]


def exact_arm(alpha: float) -> Arm:
    """Return the arm of EXACT at one alpha."""
    return Arm(name=f"exact-{alpha:g}", title=f"EXACT, alpha {alpha:g}", rule="exact", alpha=alpha)


STANDARD = Arm(name="standard", title="standard", rule="none")
LONGER = Arm(name="standard-2x", title="standard, twice the steps", rule="none", length=2)
DOSES = tuple(exact_arm(alpha) for alpha in (PAPER_ALPHA, EXAGGERATED_ALPHA, 4.0))
CONTROLS = tuple(
    Arm(name=rule, title=f"{title}, alpha 1", rule=rule, alpha=EXAGGERATED_ALPHA)
    for rule, title in {
        "random-same-mass": "random same-mass",
        "packed-position": "packed position",
        "uniform-tail": "uniform tail",
        "exact-normalized": "normalized EXACT",
    }.items()
)
Arms = dict[str, tuple[Arm, ...]]
ARMS: Arms = {DISTANT: (STANDARD, *DOSES, *CONTROLS, LONGER), NEAR: (STANDARD, *DOSES[:2])}
"""Arms by design; the first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class MiniatureSettings:
    """The whole experiment."""

    seeds: int
    """Numbered from 1. A seed is one draw of the corpus, its split, its rows and their order."""
    long: StageSettings
    """Continued pretraining, once an arm and seed."""
    arms: Arms
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
FULL = MiniatureSettings(
    seeds=5,
    long=StageSettings(
        row_tokens=512,
        rows_per_iteration=4,
        rows_per_micro_batch=4,
        iterations=160,
        warmup_iterations=8,
        learning_rate=2e-3,
        evaluation_batches=16,
    ),
    arms=ARMS,
    corpus_tokens=1_200_000,
    validation_fraction=0.06,
    distances=(16, 32, 64, 96, 128, 192, 256, 320, 384),
    items_per_distance=48,
    resamples=10_000,
)
DEMO = replace(
    FULL, seeds=1, arms={DISTANT: (STANDARD, exact_arm(PAPER_ALPHA), exact_arm(EXAGGERATED_ALPHA))}
)
QUICK_DEMO = replace(
    DEMO,
    arms={DISTANT: (STANDARD, exact_arm(EXAGGERATED_ALPHA))},  # on two cores both train at the same time
    long=replace(DEMO.long.of_length(12), evaluation_batches=4),
    corpus_tokens=120_000,
    distances=(16, 64, 96, 192, 384),
    items_per_distance=8,
    resamples=1_000,
)


def choose_arms(arms: Arms, *, designs: str | None, names: str | None) -> Arms:
    """Return the arms that a user names; the first one of a design is always among them.

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


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One arm with one seed on one corpus design."""

    design: str
    """Name in `DESIGNS`."""
    seed: int
    """Of the corpus, its split and the order of its rows."""
    arm: Arm
    """What is trained."""

    @property
    def name(self) -> str:
        """Name of its step."""
        return f"{self.design}-{self.seed}-{self.arm.name}"


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """A trial and its files."""

    trial: Trial
    """Which."""
    corpus: Step
    """Documents and `pack`, the packed dataset."""
    step: Step
    """`run` with run.json, losses.jsonl and evaluations.jsonl, `model`, and `probe` with its results."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that was run."""

    settings: MiniatureSettings
    """What."""
    base: Path
    """Hugging Face folder of the base model."""
    started: Step
    """Its checkpoint, `items.jsonl`, and `probe` of the base model itself."""
    trials: list[FinishedTrial]
    """Seed by seed."""


def trials(settings: MiniatureSettings) -> list[Trial]:
    """Return all trials, seed by seed, so that an interrupted experiment contains whole seeds."""
    return [
        Trial(design=design, seed=seed, arm=arm)
        for seed in range(1, settings.seeds + 1)
        for design, arms in settings.arms.items()
        for arm in arms
    ]


def stage_options(stage: StageSettings) -> list[str]:
    """Return the flags of a stage in one process, the same in every arm; it evaluates at its end."""
    rest = f"--weight-decay 0.01 --eval-iters {stage.evaluation_batches} --save-interval {stage.iterations}"
    return [*stage.schedule_flags(), *rest.split(), "--log-interval", "50"]


def base_hashes(base: Path) -> dict[str, str]:
    """Return the hex sha256 of the files of a base model that trials depend on, by name."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return {name: sha256_file(base / name) for name in names}


def base_step(pipeline: Pipeline, settings: MiniatureSettings, base: Path) -> Step:
    """Import the base model, draw the items of the probe and probe the base model."""
    distances, number = settings.distances, settings.items_per_distance
    return pipeline.step(
        "base",
        IMPORT,
        lambda here: write_items(here / ITEMS, distances=distances, items_per_distance=number),
        PROBE,
        depends_on={"base": base_hashes(base), "items": [distances, number]},
        code=(*LANGUAGE_CODE, *CONVERSION_CODE, *PROBE_CODE),
        values={"model": base, "base": pipeline.folder / "base"},
    )


def corpus_step(
    pipeline: Pipeline, settings: MiniatureSettings, base: Path, design: str, seed: int
) -> Step:
    """Documents of one design and seed, tokenised and packed."""
    tokens = settings.corpus_tokens
    return pipeline.step(
        f"{design}-{seed}-corpus",
        lambda here: write_corpus(here / CORPUS, DESIGNS[design], seed=seed, tokens=tokens),
        *PACKING,
        depends_on={"design": repr(DESIGNS[design]), "tokens": tokens, "base": base_hashes(base)},
        code=(*LANGUAGE_CODE, *DATA_CODE),
        values={
            "model": base,
            "row_tokens": settings.long.row_tokens,
            "validation_fraction": settings.validation_fraction,
            "seed": seed,
        },
    )


def trial_step(
    pipeline: Pipeline, settings: MiniatureSettings, started: Step, corpus: Step, trial: Trial
) -> FinishedTrial:
    """Continue the base model in one arm, export the model and probe it."""
    schedule = settings.long.of_length(trial.arm.length * settings.long.iterations)
    step = pipeline.step(
        trial.name,
        *TRAINING,
        PROBE,
        code=(*TRAINING_CODE, *CONVERSION_CODE, *PROBE_CODE),
        values={
            "corpus": corpus,
            "base": started,
            "model": pipeline.folder / trial.name / "model",
            "options": [*trial.arm.command_options(), *stage_options(schedule)],
            "seed": trial.seed,
        },
    )
    if not step.reused:
        say(f"{trial.name}: {step.seconds:.0f} s")
    return FinishedTrial(trial=trial, corpus=corpus, step=step)


def run_trials(pipeline: Pipeline, settings: MiniatureSettings, base: Path, jobs: int) -> Experiment:
    """Run every trial that is not finished, `jobs` at a time, or fewer where there are fewer cores.

    Raises:
        ValueError: a step failed; the others are stopped.
    """
    jobs = max(1, min(jobs, len(os.sched_getaffinity(0))))
    wanted = trials(settings)
    keys = list(dict.fromkeys((trial.design, trial.seed) for trial in wanted))
    tasks = [partial(base_step, pipeline, settings, base)]
    tasks += [partial(corpus_step, pipeline, settings, base, *key) for key in keys]
    started, *corpora = pipeline.side_by_side(jobs, tasks)
    packs = dict(zip(keys, corpora, strict=True))
    finished = pipeline.side_by_side(
        jobs,
        [
            partial(trial_step, pipeline, settings, started, packs[trial.design, trial.seed], trial)
            for trial in wanted
        ],
    )
    return Experiment(settings=settings, base=base, started=started, trials=finished)
