"""The plan of an experiment: every step, its commands, and what they will cost. Nothing is started here.

OUTPUT/checkpoint                        import of the model
OUTPUT/corpora[/seed-S]/NAME             text and tokens
OUTPUT/packs[/seed-S]/4k                 one pack a stage
OUTPUT/runs/seed-S/ARM/RULE/4k           training; OUTPUT/tuned/seed-S/ARM its tuning
OUTPUT/models/seed-S/ARM                 exports, and ARM-tuned
OUTPUT/probes, results/seed-S/ARM        answers
OUTPUT/comparisons/ARM, ARM-probe        against the first arm, all seeds together
OUTPUT/comparisons/ARM-against-OTHER     against the arms of `also_against` ([comparison])
OUTPUT/table1.csv, report.html, ledger.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.data.score_files import RECORD_NAME
from megatron_exact.evaluation.suites.suite import registered, token_lengths
from megatron_exact.experiments.definition import (
    EXTRAPOLATED,
    SCORES,
    SLURM,
    TRAINED,
    ArmPart,
    CorpusPart,
    Experiment,
    SuitePart,
    suite_lengths,
    tokens_of,
)
from megatron_exact.json_input import read_json_object
from megatron_exact.model.families import preset, shape_of_hf_config
from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.job_flags import flag_value
from megatron_exact.training.preflight import checkpoint_bytes, flops_per_token
from megatron_exact.training.run_status import row_length_name
from megatron_exact.training.weighting_options import flag_of

PROGRAM = "megatron-exact"
"""First word of the commands that are ours; the runner starts them with its own interpreter."""
EVALUATION_SCRIPT = "examples/slurm/evaluate.sbatch"
Command = tuple[str, ...]
KINDS = (
    *("import", "corpus", "pack", "score", "train", "export", "probe", "tune", "export-tuned", "evaluate"),
    *("compare", "table", "report"),
)
"""Kinds of steps in order; the name of a step begins with its kind."""


@dataclass(frozen=True, kw_only=True)
class ExperimentStep:
    """One step."""

    kind: str
    """One of KINDS."""
    subject: str = ""
    """What it is about, such as `seed-1/exact`."""
    commands: tuple[Command, ...]
    """Commands in order; `megatron-exact` or `python` first. Empty where the runner does it."""
    makes: tuple[Path, ...]
    """Files and folders that exist once it is finished."""
    needs: tuple[Path, ...] = ()
    """Files and folders that must exist before it: those of earlier steps, or the user's."""
    resumes: bool = False
    """Whether the commands continue what an interrupted call left; otherwise it is removed first."""
    is_submitted: bool = False
    """Whether its commands submit jobs and return before these end."""
    runs: tuple[Path, ...] = ()
    """Folders of training runs whose last checkpoints it makes."""

    @property
    def name(self) -> str:
        """Kind and subject."""
        return f"{self.kind}:{self.subject}" if self.subject else self.kind


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a plan needs, roughly; None where the shape of the model is not known."""

    gpu_hours_training: float | None
    """All arms and seeds, at the assumed share of the peak, without tuning."""
    gpu_hours_reading: float | None
    """Prompts of the suites through the model once, at the same share; generation comes on top."""
    disk_bytes: float | None
    """Checkpoints that are kept, exports and tokens."""


class Planner:
    """Makes the steps of one experiment below one folder."""

    def __init__(self, experiment: Experiment, output: Path) -> None:
        self.experiment = experiment
        self.output = output
        self.is_slurm = experiment.machine.kind == SLURM
        self.base, *self.others = experiment.arms
        by_name = {arm.name: arm for arm in experiment.arms}
        self.pairs = [(self.base, arm) for arm in self.others]
        """Baseline and treatment of every comparison."""
        for name in experiment.comparison.also_against:
            self.pairs += [(by_name[name], arm) for arm in self.others if arm.name != name]
        self.rows = experiment.row_lengths()
        self.stages = [row_length_name(length) for length in self.rows]

    def steps(self) -> list[ExperimentStep]:
        """Return all steps, each after those that it needs."""
        made = [self._import()]
        groups = self.experiment.seeds if self.experiment.packs_differ_by_seed() else (None,)
        made += [step for seed in groups for step in (*self._corpora(seed), *self._packs(seed))]
        each = [(seed, arm) for seed in self.experiment.seeds for arm in self.experiment.arms]
        scored = [one for one in each if self.experiment.takes_scores(one[1])]
        for group in ([one for one in each if one not in scored], scored):
            if group and group is scored:
                made += [step for seed in groups for step in self._scores(seed)]
            made += [self._train(*one) for one in group]
            made += [self._export(*one) for one in group]
        if self.experiment.probe is not None:
            made += [self._probe(*one) for one in each]
        if self.experiment.tuning is not None:
            made += [self._pack_answers(), *map(self._tune, self.experiment.seeds)]
            made += [self._export_tuned(*one) for one in each]
        made += [
            self._evaluate(suite, *one, number=number)
            for one in each
            for number, suite in enumerate(self.experiment.suites)
        ]
        made += [step for pair in self.pairs for step in self._compare(*pair)]
        return [*made, self._table(), self._report()]

    # folders

    def _shared(self, kind: str, seed: int | None) -> Path:
        return self.output / kind / (f"seed-{seed}" if self.experiment.packs_differ_by_seed() else "all")

    def packs(self, seed: int) -> list[Path]:
        """Return the packs of a seed, first stage first."""
        return [self._shared("packs", seed) / stage for stage in self.stages]

    def run_folder(self, seed: int, arm: ArmPart) -> Path:
        """Return the folder of an arm's last training run."""
        return self._runs(seed, arm) / arm.rule / self.stages[-1]

    def _runs(self, seed: int, arm: ArmPart) -> Path:
        return self.output / "runs" / f"seed-{seed}" / arm.name

    def _of(self, kind: str, seed: int, arm: ArmPart, suffix: str = "") -> Path:
        return self.output / kind / f"seed-{seed}" / f"{arm.name}{suffix}"

    @property
    def checkpoint(self) -> Path:
        """The imported model."""
        return self.output / "checkpoint"

    @property
    def comparisons(self) -> list[Path]:
        """Folders of the comparisons: of suites and of the probe, as far as they are planned."""
        kinds = {"": bool(self.experiment.suites), "-probe": self.experiment.probe is not None}
        return [
            self.output / "comparisons" / f"{self._comparison_name(*pair)}{suffix}"
            for pair in self.pairs
            for suffix, is_there in kinds.items()
            if is_there
        ]

    # steps

    def _import(self) -> ExperimentStep:
        model = self.experiment.model
        options = ("--preset", model.preset) if model.preset else ()
        return ExperimentStep(
            kind="import",
            commands=(
                (PROGRAM, "import-hf", "--hf", model.hf, *options, "--output", str(self.checkpoint)),
            ),
            makes=(self.checkpoint,),
            needs=(Path(model.hf),),
        )

    def _corpora(self, seed: int | None) -> Iterator[ExperimentStep]:
        for corpus in self.experiment.corpora:
            if corpus.tokens:
                continue
            folder = self._shared("corpora", seed) / corpus.name
            commands: list[Command] = []
            needs = [Path(self.experiment.model.hf), *map(Path, corpus.input)]
            if corpus.made_by:
                values = {"{output}": str(folder), "{seed}": str(seed)}
                commands.append(tuple(_filled(word, values) for word in corpus.made_by))
            source: tuple[str, ...] = ("--input", *corpus.input)
            if corpus.made_by:
                source = ("--input", str(folder / "corpus.jsonl"))
            elif corpus.hub:
                most = corpus.max_documents
                source = ("--hub", corpus.hub, *(() if most is None else ("--max-documents", str(most))))
            commands.append(
                (
                    *(PROGRAM, "tokenize", *source, "--tokenizer", self.experiment.model.hf),
                    *("--output-prefix", str(folder / "tokens"), *corpus.arguments),
                )
            )
            yield ExperimentStep(
                kind="corpus",
                subject="/".join(filter(None, (self._seed_name(seed), corpus.name))),
                commands=tuple(commands),
                makes=(folder / "tokens.idx", folder / "tokens.json"),
                needs=tuple(needs),
            )

    def _seed_name(self, seed: int | None) -> str:
        return "" if seed is None else f"seed-{seed}"

    def _prefix(self, corpus: CorpusPart, seed: int | None) -> str:
        return corpus.tokens or str(self._shared("corpora", seed) / corpus.name / "tokens")

    def _packs(self, seed: int | None) -> Iterator[ExperimentStep]:
        experiment = self.experiment
        prefixes = {corpus.name: self._prefix(corpus, seed) for corpus in experiment.corpora}
        for number, length in enumerate(self.rows):
            folder = self._shared("packs", seed) / self.stages[number]
            recipes = experiment.recipes()
            if recipes:
                words = _recipe_pack(recipes[number].pack_command(), prefixes)
            else:
                stage = next(
                    one for one in experiment.stages if tokens_of(one.row_tokens, "row_tokens") == length
                )
                packing = experiment.packing
                words = []
                for corpus in experiment.corpora:
                    weight = "" if corpus.weight is None else f"{corpus.weight:g}:"
                    words += ["--source", weight + prefixes[corpus.name]]
                words += ["--row-tokens", str(length), "--policy", packing.policy]
                words += ["--validation-fraction", f"{packing.validation_fraction:g}"]
                words += ["--seed", str(packing.seed if packing.seed is not None else seed)]
                if stage.train_tokens is not None:
                    words += ["--train-tokens", str(tokens_of(stage.train_tokens, "train_tokens"))]
                if stage.corpus_slice is not None:
                    words += ["--corpus-slice", stage.corpus_slice]
                words += packing.arguments
            yield ExperimentStep(
                kind="pack",
                subject="/".join(filter(None, (self._seed_name(seed), self.stages[number]))),
                commands=((PROGRAM, "pack", *words, "--output", str(folder)),),
                makes=(folder / "manifest.json",),
                needs=tuple(Path(f"{prefix}.idx") for prefix in prefixes.values()),
            )

    def scores(self, seed: int | None) -> list[Path]:
        """Return the folders of the scores of a seed's packs, first stage first."""
        return [self._shared("scores", seed) / stage for stage in self.stages]

    def _scores(self, seed: int | None) -> Iterator[ExperimentStep]:
        scores = self.experiment.scores
        assert scores is not None
        scorer = self.experiment.scorer()
        model = scores.model or self.experiment.model.hf
        if scorer is not None:
            model = str(self._of("models", self.experiment.seeds[0] if seed is None else seed, scorer))
        for stage, output in zip(self.stages, self.scores(seed), strict=True):
            pack = self._shared("packs", seed) / stage
            words = ["score", "--pack", str(pack), "--model", model, "--output", str(output)]
            yield ExperimentStep(
                kind="score",
                subject="/".join(filter(None, (self._seed_name(seed), stage))),
                commands=(self._over_nodes([*words, *self._device(), *scores.arguments]),),
                makes=(output / RECORD_NAME,),
                needs=(Path(model), pack / "manifest.json"),
                resumes=True,
                is_submitted=self.is_slurm,
            )

    def _train(self, seed: int, arm: ArmPart) -> ExperimentStep:
        experiment, packs = self.experiment, self.packs(seed)
        recipe = experiment.training.recipe
        words = [PROGRAM, "stages", *(("--recipe", recipe) if recipe else ())]
        words += ["--start", str(self.checkpoint), "--pack", *map(str, packs)]
        words += ["--arms", arm.rule, "--output", str(self._runs(seed, arm)), *self._machine()]
        words += ["--seed", str(seed), *experiment.training.arguments]
        for name, value in arm.parameters.items():
            values = value if isinstance(value, list) else [value]
            words += [
                flag_of(name),
                *(f"{one:.15g}" if isinstance(one, float) else str(one) for one in values),
            ]
        words += arm.arguments
        scores = self.scores(seed) if experiment.takes_scores(arm) else []
        words += [SCORES, *map(str, scores)] if scores else []
        folders = tuple(self._runs(seed, arm) / arm.rule / stage for stage in self.stages)
        return ExperimentStep(
            kind="train",
            subject=f"seed-{seed}/{arm.name}",
            commands=(tuple(words),),
            makes=tuple(folder / "run.json" for folder in folders),
            needs=(
                self.checkpoint,
                *(pack / "manifest.json" for pack in packs),
                *(folder / RECORD_NAME for folder in scores),
            ),
            resumes=True,
            is_submitted=self.is_slurm,
            runs=folders,
        )

    def _machine(self) -> list[str]:
        machine = self.experiment.machine
        words = [] if machine.processes is None else ["--nproc-per-node", str(machine.processes)]
        return [*words, f"--sbatch={machine.sbatch}"] if self.is_slurm else words

    def _export(self, seed: int, arm: ArmPart) -> ExperimentStep:
        run, model = self.run_folder(seed, arm), self._of("models", seed, arm)
        return ExperimentStep(
            kind="export",
            subject=f"seed-{seed}/{arm.name}",
            commands=((PROGRAM, "export-hf", "--checkpoint", str(run), "--output", str(model)),),
            makes=(model,),
            needs=(run / "run.json",),
        )

    def _probe(self, seed: int, arm: ArmPart) -> ExperimentStep:
        probe, output = self.experiment.probe, self._of("probes", seed, arm)
        assert probe is not None
        model = self._of("models", seed, arm)
        words = [PROGRAM, "probe", "--model", str(model), "--output", str(output)]
        needs = [model]
        if probe.items is not None:
            made = next((corpus for corpus in self.experiment.corpora if corpus.made_by), None)
            folder = "" if made is None else str(self._shared("corpora", seed) / made.name)
            items = _filled(probe.items, {"{made}": folder})
            words += ["--items", items]
            needs.append(Path(items))
        if probe.kinds:
            words += ["--kinds", ",".join(probe.kinds)]
        if probe.distances:
            words += ["--distances", ",".join(probe.distances)]
        if probe.items_per_cell is not None:
            words += ["--items-per-cell", str(probe.items_per_cell)]
        return ExperimentStep(
            kind="probe",
            subject=f"seed-{seed}/{arm.name}",
            commands=((*words, *self._device(), *probe.arguments),),
            makes=(output / "probe.json",),
            needs=tuple(needs),
            resumes=True,
        )

    def _device(self) -> list[str]:
        device = self.experiment.machine.device
        return [] if device is None else ["--device", device]

    def _pack_answers(self) -> ExperimentStep:
        tuning, folder = self.experiment.tuning, self.output / "packs" / "answers"
        assert tuning is not None
        source = ["--hub"] if tuning.hub else ["--input", *tuning.input]
        words = [PROGRAM, "pack-qa", *source, "--tokenizer", self.experiment.model.hf]
        return ExperimentStep(
            kind="pack",
            subject="answers",
            commands=((*words, "--output", str(folder), *tuning.pack_arguments),),
            makes=(folder / "manifest.json",),
            needs=(Path(self.experiment.model.hf), *map(Path, tuning.input)),
        )

    def _tune(self, seed: int) -> ExperimentStep:
        experiment, tuning = self.experiment, self.experiment.tuning
        assert tuning is not None
        output = self.output / "tuned" / f"seed-{seed}"
        runs = {arm.name: self.run_folder(seed, arm) for arm in experiment.arms}
        words = [PROGRAM, "fine-tune", "--pack", str(self.output / "packs" / "answers")]
        words += [word for name, run in runs.items() for word in ("--arm", f"{name}={run}")]
        words += ["--output", str(output), *self._machine()]
        if experiment.training.recipe:
            words += ["--layout-of", experiment.training.recipe]
        return ExperimentStep(
            kind="tune",
            subject=f"seed-{seed}",
            commands=((*words, *tuning.arguments),),
            makes=tuple(output / name / "run.json" for name in runs),
            needs=(
                self.output / "packs" / "answers" / "manifest.json",
                *(run / "run.json" for run in runs.values()),
            ),
            resumes=True,
            is_submitted=self.is_slurm,
            runs=tuple(output / name for name in runs),
        )

    def _export_tuned(self, seed: int, arm: ArmPart) -> ExperimentStep:
        run = self.output / "tuned" / f"seed-{seed}" / arm.name
        model = self._of("models", seed, arm, "-tuned")
        return ExperimentStep(
            kind="export-tuned",
            subject=f"seed-{seed}/{arm.name}",
            commands=((PROGRAM, "export-hf", "--checkpoint", str(run), "--output", str(model)),),
            makes=(model,),
            needs=(run / "run.json",),
        )

    def _evaluate(self, suite: SuitePart, seed: int, arm: ArmPart, number: int) -> ExperimentStep:
        is_tuned = self.experiment.tuning is not None
        model = self._of("models", seed, arm, "-tuned" if is_tuned else "")
        output = self._of("results", seed, arm)
        lengths = self.lengths(suite)
        words = ["evaluate", "--model", str(model), "--suite", suite.name, "--output", str(output)]
        words += ["--template", "model"] if is_tuned else []
        words += ["--lengths", ",".join(lengths)] if lengths else []
        words += ["--tasks", ",".join(suite.tasks)] if suite.tasks else []
        words += [] if suite.samples is None else ["--samples", str(suite.samples)]
        words += [*self._device(), *suite.arguments]
        # one suite after the other writes into a folder
        before = [path for one in self.experiment.suites[:number] for path in self._cells(one, output)]
        return ExperimentStep(
            kind="evaluate",
            subject=f"seed-{seed}/{arm.name}/{suite.name}",
            commands=(self._over_nodes(words),),
            makes=(output / "results.json", *self._cells(suite, output)),
            needs=(model, *before),
            resumes=True,
            is_submitted=self.is_slurm,
        )

    def _over_nodes(self, words: Sequence[str]) -> Command:
        """Return a command of ours, or with SLURM the job array that shares it out."""
        if not self.is_slurm:
            return (PROGRAM, *words)
        machine = self.experiment.machine
        array = f"0-{machine.evaluation_nodes - 1}"
        options = ("--parsable", "--array", array, *shlex.split(machine.sbatch))
        return ("sbatch", *options, EVALUATION_SCRIPT, *words)

    def lengths(self, suite: SuitePart) -> list[str]:
        """Return all lengths of a suite, trained ones first; empty for a suite without lengths."""
        if not registered()[suite.name].has_lengths:
            return []
        found = suite_lengths(suite, max(self.rows))
        return [*found[TRAINED], *found[EXTRAPOLATED]]

    def _cells(self, suite: SuitePart, output: Path) -> list[Path]:
        """Return the files of the cells."""
        known = registered()[suite.name]
        tasks = suite.tasks or known.tasks
        given = {one.name: flag_value(suite.arguments, one.flag) for one in known.options}
        k_tokens = known.k_of_options({name: value for name, value in given.items() if value is not None})
        words = self.lengths(suite)
        lengths = [one.tokens(k_tokens) for word in words for one in token_lengths(word)] or [0]
        return [output / suite.name / task / f"{length}.jsonl" for task in tasks for length in lengths]

    def _comparison_name(self, base: ArmPart, arm: ArmPart) -> str:
        return arm.name if base == self.base else f"{arm.name}-against-{base.name}"

    def _compare(self, base: ArmPart, arm: ArmPart) -> Iterator[ExperimentStep]:
        experiment, comparison = self.experiment, self.experiment.comparison
        end = ["--resamples", str(comparison.resamples), "--seed", str(comparison.seed)]
        if experiment.suites:
            regimes: dict[str, list[str]] = {TRAINED: [], EXTRAPOLATED: []}
            for suite in experiment.suites:
                if registered()[suite.name].has_lengths:
                    for regime, words in suite_lengths(suite, max(self.rows)).items():
                        regimes[regime] += [word for word in words if word not in regimes[regime]]
            options = [
                word
                for regime, words in regimes.items()
                if words
                for word in (f"--{regime}-lengths", ",".join(words))
            ]
            yield self._comparison(base, arm, "results", [*options, *end])
        if experiment.probe is not None:
            span = experiment.probe.range
            options = ["--probe-distances", ",".join(span)] if span else []
            yield self._comparison(base, arm, "probes", [*options, *end])

    def _comparison(self, base: ArmPart, arm: ArmPart, kind: str, options: Sequence[str]) -> ExperimentStep:
        name = self._comparison_name(base, arm) + ("-probe" if kind == "probes" else "")
        sides = [[self._of(kind, seed, one) for seed in self.experiment.seeds] for one in (base, arm)]
        output = self.output / "comparisons" / name
        words = [PROGRAM, "compare", "--baseline", *map(str, sides[0]), "--treatment", *map(str, sides[1])]
        if kind == "results":
            files = [
                path
                for side in (*sides[0], *sides[1])
                for suite in self.experiment.suites
                for path in self._cells(suite, side)
            ]
        else:
            files = [side / "probe.json" for side in (*sides[0], *sides[1])]
        return ExperimentStep(
            kind="compare",
            subject=name,
            commands=((*words, "--output", str(output), *options),),
            makes=(output / "comparison.json",),
            needs=tuple(files),
        )

    def _table(self) -> ExperimentStep:
        return ExperimentStep(kind="table", commands=(), makes=(self.output / "table1.csv",))

    def _report(self) -> ExperimentStep:
        words = [PROGRAM, "report"]
        if self.comparisons:
            title = self.experiment.title
            words += ["--comparison", *(f"{title}={folder}" for folder in self.comparisons)]
        words += ["--pack", *map(str, self.packs(self.experiment.seeds[0]))]
        for arm in self.others:
            for seed in self.experiment.seeds:
                runs = (self.run_folder(seed, self.base), self.run_folder(seed, arm))
                words += ["--losses", arm.name, *map(str, runs)]
        words += ["--ledger", str(self.output / "ledger.json"), "--output", str(self.output)]
        return ExperimentStep(kind="report", commands=(tuple(words),), makes=(self.output / "report.html",))

    # costs

    def cost(self) -> Cost:
        """Estimate hours and room from shapes, budgets and lengths alone."""
        shape = self._shape()
        budgets = self._budgets()
        runs = len(self.experiment.seeds) * len(self.experiment.arms)
        machine = self.experiment.machine
        if shape is None:
            return Cost(gpu_hours_training=None, gpu_hours_reading=None, disk_bytes=None)
        per_hour = machine.peak_tflops * 1e12 * machine.assumed_mfu * 3600
        training = None
        if budgets is not None:  # a segment is at most the row
            flops = sum(
                budget * flops_per_token(shape, length)
                for budget, length in zip(budgets, self.rows, strict=True)
            )
            training = runs * flops / per_hour
        reading = 0.0
        for suite in self.experiment.suites:
            known = registered()[suite.name]
            samples = suite.samples or known.default_samples
            if samples is None or not known.has_lengths:
                continue
            for (length,) in map(token_lengths, self.lengths(suite)):
                tokens = length.tokens(max(known.k_tokens))
                cells = len(suite.tasks or known.tasks)
                reading += runs * samples * cells * tokens * flops_per_token(shape, tokens) / 3 / per_hour
        weights = checkpoint_bytes(shape, weight_bytes=2, optimizer_bytes=0)
        states = checkpoint_bytes(shape, weight_bytes=2, optimizer_bytes=12)
        trained, exports = (
            (len(self.rows), 1) if self.experiment.tuning is None else (len(self.rows) + 1, 2)
        )
        disk = weights + runs * (trained * 2 * states + exports * weights)
        disk += 0 if budgets is None else 4 * sum(budgets)
        return Cost(gpu_hours_training=training, gpu_hours_reading=reading, disk_bytes=disk)

    def _shape(self) -> ModelShape | None:
        recipes = self.experiment.recipes()
        name = recipes[-1].preset if recipes else self.experiment.model.preset
        if name is not None:
            return preset(name)
        path = Path(self.experiment.model.hf) / "config.json"
        if not path.is_file():
            return None
        return shape_of_hf_config(read_json_object(path, "copy the model again"), str(path))

    def _budgets(self) -> list[int] | None:
        """Return the trained tokens of each stage, None where flags do not say."""
        recipes = self.experiment.recipes()
        words = self.experiment.training.arguments
        given = [flag_value(words, flag) for flag in ("--train-iters", "--global-batch-size")]
        if recipes and given == [None, None]:
            return [recipe.schedule.budget_tokens for recipe in recipes]
        try:
            rows = [int(value or "") for value in given]
        except ValueError:
            return None
        return [rows[0] * rows[1] * length for length in self.rows]


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _recipe_pack(command: Sequence[str], prefixes: dict[str, str]) -> list[str]:
    """Return the arguments of a recipe's pack command with our corpora in place of its examples.

    Raises:
        ValueError: the recipe mixes a corpus that the experiment does not name.
    """
    words = list(command[2:-2])  # without `python tools/pack_corpus.py` and `--output FOLDER`
    for place, word in enumerate(words):
        weight, is_mix, example = word.rpartition("tokens/")
        if words[place - 1] == "--source" and is_mix:
            if example not in prefixes:
                raise ValueError(
                    f"the recipe mixes {example!r}, but [[corpora]] has {', '.join(prefixes)}: name one so"
                )
            words[place] = weight + prefixes[example]
    return words


def shown(command: Sequence[str], interpreter: str = sys.executable) -> str:
    """Return a command as a user types it."""
    return shlex.join("python" if word == interpreter else word for word in command)
