"""Corpora, arms and probes of all seeds, as steps that may run side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_exact.demo.workspace import Step, Workspace
from megatron_exact.files import sha256_file
from megatron_exact.miniature.chain import (
    COMMANDS,
    DATA_CODE,
    MINIATURE_CODE,
    PACKAGE,
    PROBE_CODE,
    TRAINING_CODE,
    Chain,
    StoppedError,
    import_model,
    pack_corpus,
    tool,
    train_and_export,
)
from megatron_exact.miniature.corpus import write_corpus
from megatron_exact.miniature.probe_items import write_items
from megatron_exact.miniature.settings import DESIGNS, Arm, MiniatureSettings, stage_options

SHIPPED_BASE = PACKAGE.parent / "examples" / "miniature" / "base"
CORPUS = "corpus.jsonl"
"""Documents, in the folder of a corpus step."""


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
        """Of its step."""
        return f"{self.design}-{self.seed}-{self.arm.name}"


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """A trial and where its files are."""

    trial: Trial
    """Which."""
    pack: Path
    """Packed dataset that it was trained on."""
    run: Path
    """run.json, losses.jsonl, evaluations.jsonl."""
    probe: Path
    """Result folder of tools/probe_evidence.py."""
    seconds: float
    """Wall time of training, export and probe."""
    commands: tuple[str, ...]
    """Of training, export and probe, as a user would type them."""


def trials(settings: MiniatureSettings) -> list[Trial]:
    """All trials, seed by seed, so that an interrupted experiment holds whole seeds."""
    return [
        Trial(design=design, seed=seed, arm=arm)
        for seed in range(1, settings.seeds + 1)
        for design, arms in settings.arms.items()
        for arm in arms
    ]


def run_trials(
    chain: Chain, settings: MiniatureSettings, *, base: Path, jobs: int
) -> tuple[list[FinishedTrial], FinishedBase]:
    """Run every trial that is not finished.

    Args:
        chain: runs the steps.
        settings: of the experiment.
        base: Hugging Face folder of the base model.
        jobs: trials at a time.

    Raises:
        ValueError: a step failed; the others are stopped.
    """
    wanted = trials(settings)
    corpora = list(dict.fromkeys((trial.design, trial.seed) for trial in wanted))
    steps = side_by_side(
        chain.stop,
        jobs,
        [
            partial(base_step, chain, settings, base),
            *(partial(corpus_step, chain, settings, base, *key) for key in corpora),
        ],
    )
    started = FinishedBase(tokenizer=base, step=steps[0])
    packs = dict(zip(corpora, steps[1:], strict=True))
    finished = side_by_side(
        chain.stop,
        jobs,
        [
            partial(trial_step, chain, settings, started, packs[trial.design, trial.seed], trial)
            for trial in wanted
        ],
    )
    return finished, started


@dataclass(frozen=True, kw_only=True)
class FinishedBase:
    """What all trials begin with."""

    tokenizer: Path
    """The base model's Hugging Face folder."""
    step: Step
    """Its checkpoint, the items of the probe, and the probe of the base model itself."""

    @property
    def checkpoint(self) -> Path:
        """For --pretrained-checkpoint."""
        return self.step.folder / "checkpoint"

    @property
    def items(self) -> Path:
        """For probe_evidence.py --items."""
        return self.step.folder / "items.jsonl"

    @property
    def probe(self) -> Path:
        """Result folder of the base model's probe."""
        return self.step.folder / "probe"


def base_hashes(base: Path) -> dict[str, str]:
    """Hex sha256 of the files of a base model that trials depend on, by name."""
    return {
        name: sha256_file(base / name) for name in ("config.json", "model.safetensors", "tokenizer.json")
    }


def base_step(chain: Chain, settings: MiniatureSettings, base: Path) -> Step:
    """Import the base model, draw the items of the probe and probe the base model."""

    def build(folder: Path) -> None:
        import_model(chain, folder, base)
        write_items(
            folder / "items.jsonl",
            distances=settings.distances,
            items_per_distance=settings.items_per_distance,
        )
        probe(chain, model=base, items=folder / "items.jsonl", output=folder / "probe")

    depends_on = {
        "base": list(base_hashes(base).values()),
        "items": [settings.distances, settings.items_per_distance],
    }
    code = ("miniature/probe_items.py", *MINIATURE_CODE, "model", "conversion", *PROBE_CODE)
    return chain.step("base", depends_on, code, build)


def corpus_step(chain: Chain, settings: MiniatureSettings, base: Path, design: str, seed: int) -> Step:
    """Documents of one design and seed, tokenised and packed."""

    def build(folder: Path) -> None:
        write_corpus(folder / CORPUS, DESIGNS[design], seed=seed, tokens=settings.corpus_tokens)
        pack_corpus(
            chain,
            folder,
            tokenizer=base,
            row_tokens=settings.long.row_tokens,
            validation_fraction=settings.validation_fraction,
            seed=seed,
        )

    depends_on = {
        "design": repr(DESIGNS[design]),
        "seed": seed,
        "tokenizer": base_hashes(base)["tokenizer.json"],
        "sizes": [settings.corpus_tokens, settings.validation_fraction, settings.long.row_tokens],
    }
    return chain.step(f"{design}-{seed}-corpus", depends_on, (*MINIATURE_CODE, *DATA_CODE), build)


def trial_step(
    chain: Chain, settings: MiniatureSettings, started: FinishedBase, corpus: Step, trial: Trial
) -> FinishedTrial:
    """Continue the base model in one arm, export the model and probe it."""
    schedule = settings.long.of_length(trial.arm.length * settings.long.iterations)
    options = [*trial.arm.command_options(), *stage_options(schedule)]
    pack = corpus.folder / "pack"

    def build(folder: Path) -> None:
        train_and_export(
            chain, folder, pack=pack, start=started.checkpoint, options=options, seed=trial.seed
        )
        probe(chain, model=folder / "model", items=started.items, output=folder / "probe")

    depends_on = {"corpus": corpus.key, "base": started.step.key, "options": options, "seed": trial.seed}
    step = chain.step(trial.name, depends_on, (*TRAINING_CODE, *PROBE_CODE), build)
    if not step.reused:
        chain.say(f"{trial.name}: {step.seconds:.0f} s")
    return FinishedTrial(
        trial=trial,
        pack=pack,
        run=step.folder / "run",
        probe=step.folder / "probe",
        seconds=step.seconds,
        commands=read_commands(step.folder),
    )


def corpus_commands(done: FinishedTrial) -> tuple[str, ...]:
    """The commands that made the pack of a trial."""
    return read_commands(done.pack.parent)


def read_commands(folder: Path) -> tuple[str, ...]:
    """The commands that a step has run."""
    return tuple((folder / COMMANDS).read_text(encoding="utf-8").splitlines())


def probe(chain: Chain, *, model: Path, items: Path, output: Path) -> None:
    """Score the items with a model."""
    chain.call(
        tool("probe_evidence", "--model", model, "--items", items, "--output", output, "--device", "cpu"),
        output.parent / "log.txt",
        {"OMP_NUM_THREADS": "1"},
    )


def side_by_side[T](stop: threading.Event, jobs: int, tasks: Iterable[Callable[[], T]]) -> list[T]:
    """Results of the tasks in their order, `jobs` of them running at a time.

    The first failure, or an interruption, sets `stop`: no further task begins, those that run end their
    children, and the failure is raised when all have ended.
    """

    def guarded(task: Callable[[], T]) -> T:
        if stop.is_set():
            raise StoppedError("a task before this one failed")
        try:
            return task()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(guarded, task) for task in tasks]
        try:
            wait(futures)
        except BaseException:
            stop.set()
            raise
    failures = [error for future in futures if (error := future.exception()) is not None]
    if failures:
        raise next((error for error in failures if not isinstance(error, StoppedError)), failures[0])
    return [future.result() for future in futures]


def open_workspace(output: Path, say: Callable[[str], None]) -> Workspace:
    """The folder of all steps below the output folder."""
    return Workspace(output / "work", say)
