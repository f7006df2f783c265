"""The definition of an experiment: a TOML file as frozen values, every key checked.

    name = "llama"
    seeds = [1234]
    [model]            hf = "models/Llama-3.1-8B"
    [[corpora]]        name = "web", input = ["web.jsonl.zst"]
    [training]         recipe = "llama3.1_8b_16k", or [[stages]] and arguments
    [[arms]]           name = "standard", rule = "none"; others are compared with the first
    [tuning]           hub = true
    [[suites]]         name = "ruler", lengths = "paper:llama-3.1-8b"
    [machine]          kind = "local"

docs/experiments.md lists every key. Paths are relative to the folder in which the tool is called, as on a
command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.evaluation.suites.suite import registered, token_lengths
from megatron_exact.exposure import RULES, RuleParameters, find_rule, readers, score_readers
from megatron_exact.json_input import build_record, read_toml
from megatron_exact.lineage import may_differ
from megatron_exact.report.paper_numbers import find_paper_model, paper_models, paper_windows
from megatron_exact.training.job_flags import has_flag
from megatron_exact.training.recipes import Recipe, chain_of, find_recipe

REMEDY = "correct it (docs/experiments.md lists all keys)"
PAPER = "paper:"
"""What a `lengths` that takes the paper's windows begins with."""
TRAINED, EXTRAPOLATED = "trained", "extrapolated"
ARM = "arm:"
"""What a scorer that is the trained model of an arm begins with."""
STANDARD = "none"
SCORES = "--confidence-scores"
"""Flag of run_stages.py with the scores of its packs."""
LOCAL, SLURM = "local", "slurm"


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """`[model]`: what every arm starts from."""

    hf: str
    """Hugging Face folder."""
    name: str | None = None
    """Name in tables; the paper's spelling (LLaMA-3.1-8B) puts its numbers beside yours."""
    preset: str | None = None
    """`--preset` of import_hf.py."""


@dataclass(frozen=True, kw_only=True)
class CorpusPart:
    """`[[corpora]]`: one source of the packs. Exactly one of input, hub, tokens and made_by is given."""

    name: str
    """Name of its files."""
    weight: float | None = None
    """Share of the train tokens; on all corpora or on none. A recipe has weights of its own."""
    input: tuple[str, ...] = ()
    """Text files to tokenize."""
    hub: str | None = None
    """Name of a data set that tokenize_corpus.py knows."""
    max_documents: int | None = None
    """With hub: documents to read."""
    tokens: str | None = None
    """Prefix of a corpus that is tokenized already."""
    made_by: tuple[str, ...] = ()
    """Command that writes {output}/corpus.jsonl, run once for every seed as {seed}; `python` is ours."""
    arguments: tuple[str, ...] = ()
    """More arguments of tokenize_corpus.py."""

    def __post_init__(self) -> None:
        given = [key for key in ("input", "hub", "tokens", "made_by") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"corpus {self.name} has {' and '.join(given) or 'no source'}: give exactly one of input, "
                "hub, tokens and made_by"
            )
        if self.max_documents is not None and not self.hub:
            raise ValueError(f"corpus {self.name}: max_documents is for hub; leave it out")


@dataclass(frozen=True, kw_only=True)
class StagePart:
    """`[[stages]]`: one row length, where no recipe says so."""

    row_tokens: Any
    """Inputs of a row: a number, or text such as "4K"."""
    train_tokens: Any = None
    """Tokens of the pack's train split; all there are."""
    corpus_slice: str | None = None
    """`--corpus-slice` of its pack."""


@dataclass(frozen=True, kw_only=True)
class PackingPart:
    """`[packing]`."""

    policy: str = "concat"
    """`concat` or `best-fit`."""
    validation_fraction: float = 0.005
    """Share of documents held out."""
    seed: int | None = None
    """Seed of split and order; without it every seed has packs of its own. A recipe's is 1234."""
    arguments: tuple[str, ...] = ()
    """More arguments of pack_corpus.py."""


@dataclass(frozen=True, kw_only=True)
class TrainingPart:
    """`[training]`."""

    recipe: str | None = None
    """Recipe of the last stage, which decides stages, packs and schedule."""
    arguments: tuple[str, ...] = ()
    """Flags of every training run."""


@dataclass(frozen=True, kw_only=True)
class ArmPart:
    """`[[arms]]`: a rule with its parameters."""

    name: str
    """Folder and short name."""
    rule: str
    """`--token-weighting`."""
    arguments: tuple[str, ...] = ()
    """More arguments of run_stages.py for this arm, such as `--confidence-scores DIR`."""
    parameters: dict[str, Any]
    """Parameters of the rule (`RuleParameters`), written as keys of the arm."""


@dataclass(frozen=True, kw_only=True)
class ScoresPart:
    """`[scores]`: every pack is scored at long and short context, for arms whose rule reads scores."""

    model: str | None = None
    """Scorer: a Hugging Face folder with the same tokenizer, or "arm:NAME" for the trained model of an arm
    with the same seed (the first one where all seeds share their packs); the model that every arm starts
    from."""
    arguments: tuple[str, ...] = ()
    """More arguments of score_tokens.py."""


@dataclass(frozen=True, kw_only=True)
class TuningPart:
    """`[tuning]`: instruction tuning of all arms before the suites; left out where the table is."""

    hub: bool = False
    """Take Dolly-15K from the Hub."""
    input: tuple[str, ...] = ()
    """Files of question-answer records."""
    pack_arguments: tuple[str, ...] = ()
    """More arguments of pack_qa.py."""
    arguments: tuple[str, ...] = ()
    """More flags of every tuning run."""

    def __post_init__(self) -> None:
        if self.hub == bool(self.input):
            raise ValueError("[tuning] needs records: give either hub = true or input = [files]")


@dataclass(frozen=True, kw_only=True)
class SuitePart:
    """`[[suites]]`: one suite, run on every arm and seed."""

    name: str
    """Name of the suite."""
    lengths: Any = ()
    """A list such as ["4K", "8K"], or "paper:MODEL" for the windows of the paper's table 1."""
    samples: int | None = None
    """Examples of each cell; the suite's own number."""
    tasks: tuple[str, ...] = ()
    """Some of its tasks; all."""
    arguments: tuple[str, ...] = ()
    """More arguments of evaluate_model.py, such as ["--nolima-data", "NoLiMa/data"]."""


@dataclass(frozen=True, kw_only=True)
class ProbePart:
    """`[probe]`: the evidence probe, on the models before tuning."""

    kinds: tuple[str, ...] = ()
    """Some of the kinds; all."""
    distances: tuple[str, ...] = ()
    """Distances, such as ["4K", "64K"]."""
    items: str | None = None
    """File of items made elsewhere; {made} is the folder of the first corpus with made_by."""
    items_per_cell: int | None = None
    """Items of each cell."""
    range: tuple[str, ...] = ()
    """Shortest and longest distance of an average of its own."""
    arguments: tuple[str, ...] = ()
    """More arguments of probe_evidence.py."""


@dataclass(frozen=True, kw_only=True)
class MachinePart:
    """`[machine]`: where steps run."""

    kind: str = LOCAL
    """`local`, or `slurm` for training, tuning and suites."""
    processes: int | None = None
    """Ranks of a training run on each node; the recipe's."""
    device: str | None = None
    """Device of probe and suites, such as cpu."""
    sbatch: str = ""
    """With slurm: options of every sbatch, as one line."""
    evaluation_nodes: int = 1
    """With slurm: nodes of the job array of a suite."""
    peak_tflops: float = 989.0
    """Of a card, for the hours of the plan (H100 SXM, bf16)."""
    assumed_mfu: float = 0.4
    """Share of the peak that training reaches; assumed."""

    def __post_init__(self) -> None:
        if self.kind not in (LOCAL, SLURM):
            raise ValueError(f"[machine] kind is {self.kind!r}: choose {LOCAL} or {SLURM}")
        for name in ("processes", "evaluation_nodes"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"[machine] {name} is {number}: give 1 or more")
        if not 0 < self.assumed_mfu <= 1:
            raise ValueError(f"[machine] assumed_mfu is {self.assumed_mfu:g}: give a share, such as 0.4")
        if not 0 < self.peak_tflops < float("inf"):
            raise ValueError(f"[machine] peak_tflops is {self.peak_tflops:g}: give a number above 0")
        try:
            options = shlex.split(self.sbatch)
        except ValueError as error:
            raise ValueError(f"[machine] sbatch is {self.sbatch!r} ({error}): close the quote") from None
        if options and self.kind != SLURM:
            raise ValueError(f'[machine] sbatch is for kind = "{SLURM}": set it, or leave sbatch out')


@dataclass(frozen=True, kw_only=True)
class ComparisonPart:
    """`[comparison]`."""

    resamples: int = 10_000
    """`--resamples` of compare_runs.py."""
    seed: int = 0
    """`--seed` of compare_runs.py."""
    also_against: tuple[str, ...] = ()
    """Arms that the others are compared with besides the first arm, such as EXACT for its controls."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole experiment."""

    name: str
    """Name in tables where the model has none."""
    seeds: tuple[int, ...]
    """Seeds of training; every arm is trained with each."""
    model: ModelPart
    """What every arm starts from."""
    corpora: tuple[CorpusPart, ...]
    """Sources of the packs."""
    arms: tuple[ArmPart, ...]
    """The first is the baseline."""
    training: TrainingPart = TrainingPart()
    """Recipe and flags."""
    stages: tuple[StagePart, ...] = ()
    """Row lengths, without a recipe."""
    packing: PackingPart = PackingPart()
    """Options of the packs, without a recipe."""
    scores: ScoresPart | None = None
    """Scores of the packs."""
    tuning: TuningPart | None = None
    """Instruction tuning."""
    suites: tuple[SuitePart, ...] = ()
    """Benchmarks."""
    probe: ProbePart | None = None
    """The evidence probe."""
    comparison: ComparisonPart = ComparisonPart()
    """Intervals."""
    machine: MachinePart = MachinePart()
    """Where steps run."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: give at least one, each once")
        if len(self.arms) < 2:
            raise ValueError(
                f"[[arms]] has {len(self.arms)}: give the baseline first, then at least one more"
            )
        if not self.corpora:
            raise ValueError("[[corpora]] is empty: name at least one corpus")
        for subject, names in (
            ("arms", [arm.name for arm in self.arms]),
            ("corpora", [corpus.name for corpus in self.corpora]),
            ("suites", [suite.name for suite in self.suites]),
        ):
            _check_names(subject, names)
        known = [arm.name for arm in self.arms[1:]]
        for name in self.comparison.also_against:
            if name not in known or self.comparison.also_against.count(name) > 1:
                raise ValueError(
                    f"[comparison] also_against has {name!r}: name arms other than the first, each once "
                    f"({', '.join(known)})"
                )
        self._check_stages()
        self._check_mix()
        for suite in self.suites:
            _check_suite(suite)
        self._check_arguments()

    def _check_stages(self) -> None:
        if (self.training.recipe is None) == (not self.stages):
            both = "both a recipe and [[stages]]" if self.stages else "neither a recipe nor [[stages]]"
            raise ValueError(f"the experiment has {both}: give exactly one of them")
        if self.training.recipe is not None:
            find_recipe(self.training.recipe)
        for stage in self.stages:
            tokens_of(stage.row_tokens, "[[stages]] row_tokens")
            if stage.train_tokens is not None:
                tokens_of(stage.train_tokens, "[[stages]] train_tokens")
        lengths = self.row_lengths()
        for length in lengths:
            if lengths.count(length) > 1:
                raise ValueError(f"[[stages]] has rows of {length:,} tokens twice: give each length once")

    def _check_mix(self) -> None:
        """Raise ValueError for corpora, shares and options of packs that would not be used."""
        weights = [corpus.weight is not None for corpus in self.corpora]
        if self.training.recipe is None:
            if any(weights) and not all(weights):
                raise ValueError("[[corpora]]: give a weight to all of them or to none")
            return
        if any(weights):
            raise ValueError("[[corpora]] weight with a recipe, which has shares of its own: leave it out")
        if self.packing != PackingPart():
            raise ValueError("[packing] with a recipe, which decides the packs: leave the table out")
        mixed = {name for recipe in self.recipes() for name, _ in recipe.corpus_mix}
        for corpus in self.corpora:
            if corpus.name not in mixed:
                raise ValueError(
                    f"[[corpora]] {corpus.name!r} is not in the mix of {self.training.recipe} "
                    f"({', '.join(sorted(mixed))}), so no pack would contain it: leave it out"
                )

    def _check_arguments(self) -> None:
        """Raise ValueError for flags that a key or the plan decides; the last one would win in silence."""
        of_runs = ("--start", "--pack", "--arms", "--output", "--recipe", "--seed", *_OF_MACHINE)
        refuse_flags("[training] arguments", self.training.arguments, of_runs)
        for arm in self.arms:
            place = f"arm {arm.name}: arguments"
            refuse_flags(place, arm.arguments, of_runs)
            for word in arm.arguments:
                flag = word.partition("=")[0]
                if flag.startswith("--") and not may_differ(
                    flag.removeprefix("--").replace("-", "_"), at_resume=False
                ):
                    raise ValueError(
                        f"{place} has {flag}, in which arms must not differ to be compared: "
                        "give it to all of them, in [training]"
                    )
        for corpus in self.corpora:
            refuse_flags(f"corpus {corpus.name}: arguments", corpus.arguments, _OF_CORPORA)
        refuse_flags("[packing] arguments", self.packing.arguments, _OF_PACKS)
        if self.scores is not None:
            refuse_flags("[scores] arguments", self.scores.arguments, _OF_SCORES)
            if not any(map(self.takes_scores, self.arms)):
                raise ValueError(
                    f"[scores], but no arm reads them: give one a rule such as {score_readers()[0]} "
                    f"without {SCORES} of its own, or leave the table out"
                )
            scorer = self.scorer()
            if scorer is not None and self.takes_scores(scorer):
                raise ValueError(
                    f"[scores] model is arm {scorer.name}, which is trained with these scores: name another"
                )
        for suite in self.suites:
            refuse_flags(f"[[suites]] {suite.name} arguments", suite.arguments, _OF_SUITES)
        if self.probe is not None:
            refuse_flags("[probe] arguments", self.probe.arguments, _OF_PROBES)
        if self.tuning is not None:
            of_tuning = ("--pack", "--arm", "--output", "--layout-of", *_OF_MACHINE)
            refuse_flags("[tuning] arguments", self.tuning.arguments, of_tuning)
            of_answers = ("--hub", "--input", "--tokenizer", "--output")
            refuse_flags("[tuning] pack_arguments", self.tuning.pack_arguments, of_answers)

    def takes_scores(self, arm: ArmPart) -> bool:
        """Return whether an arm reads the scores of `[scores]`."""
        own = any(word.partition("=")[0] == SCORES for word in arm.arguments)
        return self.scores is not None and RULES[arm.rule].reads_scores and not own

    def scorer(self) -> ArmPart | None:
        """Return the arm whose models score the packs; None where it is a folder.

        Raises:
            ValueError: there is no such arm.
        """
        model = None if self.scores is None else self.scores.model
        if model is None or not model.startswith(ARM):
            return None
        for arm in self.arms:
            if arm.name == model.removeprefix(ARM):
                return arm
        raise ValueError(f"[scores] model is {model!r}: there is no such arm, name one of [[arms]]")

    @property
    def title(self) -> str:
        """Name of the model in tables."""
        return self.model.name or self.name

    def recipes(self) -> list[Recipe]:
        """Return the recipes of all stages, first stage first; empty without a recipe."""
        return (
            [find_recipe(name) for name in chain_of(self.training.recipe)] if self.training.recipe else []
        )

    def row_lengths(self) -> list[int]:
        """Return the row lengths of the stages, shortest first."""
        if self.stages:
            return sorted(tokens_of(stage.row_tokens, "row_tokens") for stage in self.stages)
        return [recipe.row_tokens for recipe in self.recipes()]

    def packs_differ_by_seed(self) -> bool:
        """Return whether every seed has packs of its own."""
        drawn = any(corpus.made_by for corpus in self.corpora)
        return drawn or (self.training.recipe is None and self.packing.seed is None)


_OF_MACHINE = ("--nproc-per-node", "--sbatch", "--dry-run")
_OF_CORPORA = ("--input", "--hub", "--max-documents", "--tokenizer", "--output-prefix")
_OF_PACKS = (
    *("--source", "--row-tokens", "--policy", "--validation-fraction", "--seed", "--train-tokens"),
    *("--corpus-slice", "--output"),
)
_OF_SCORES = ("--verify", "--pack", "--model", "--checkpoint", "--output", "--splits", "--device")
_OF_SUITES = ("--model", "--suite", "--output", "--lengths", "--tasks", "--samples", "--device")
_OF_PROBES = (
    *("--model", "--output", "--items", "--kinds", "--distances", "--items-per-cell", "--device"),
)


def refuse_flags(place: str, arguments: Sequence[str], decided: Sequence[str]) -> None:
    """Raise ValueError for flags among the arguments of a place that the experiment decides."""
    for flag in decided:
        if has_flag(arguments, flag):
            raise ValueError(f"{place} has {flag}, which the experiment decides by its keys: leave it out")


def read_experiment_file(path: str | Path) -> Experiment:
    """Read and check the TOML file of an experiment.

    Raises:
        ValueError: the file is not TOML; a key is unknown, missing or of another type, or a value does not
            fit; the message names file, place, value and remedy.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content = read_toml(path, REMEDY)
    arms = content.get("arms", [])
    if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
        raise ValueError(f"{path}: arms is not a list of tables: write [[arms]] before each; {REMEDY}")
    shaped = [_arm_content(arm) for arm in arms]
    try:
        experiment = build_record(Experiment, {**content, "arms": shaped}, str(path), REMEDY)
        for arm in experiment.arms:
            _check_arm(arm, len(experiment.row_lengths()), has_scores=experiment.takes_scores(arm))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return experiment


def _arm_content(arm: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {name: arm[name] for name in ("name", "rule", "arguments") if name in arm}
    return {**own, "parameters": {name: value for name, value in arm.items() if name not in own}}


PARAMETERS = tuple(field.name for field in fields(RuleParameters))


def _check_arm(arm: ArmPart, num_stages: int, *, has_scores: bool) -> None:
    """Raise ValueError for an unknown rule, or parameters that it does not read or that are no values."""
    rule = find_rule(arm.rule)
    if arm.rule == "exact-evidence" and not has_scores and SCORES not in arm.arguments:
        raise ValueError(
            f"arm {arm.name}: exact-evidence needs the scores of every pack: add a table [scores], or "
            f'arguments = ["{SCORES}", FOLDER, ...] with those of megatron-exact score'
        )
    for name, value in arm.parameters.items():
        if name not in PARAMETERS:
            raise ValueError(
                f"arm {arm.name} has unknown {name}: {arm.rule} reads "
                f"{', '.join(rule.parameters) or 'no parameter'}; {REMEDY}"
            )
        if name not in rule.parameters:
            raise ValueError(
                f"arm {arm.name} gives {name} = {value!r}, which {arm.rule} does not read "
                f"({', '.join(readers(name))} do): leave it out"
            )
        is_text = name in ("match_mass", "bucket_weights")
        values = value if name == "tau" and isinstance(value, list) else [value]
        if len(values) not in (1, num_stages):
            raise ValueError(
                f"arm {arm.name}: tau has {len(values)} values for {num_stages} stages: give one, or "
                "one a stage, shortest rows first"
            )
        for one in values:
            fits = isinstance(one, str) if is_text else type(one) in (int, float)
            if not fits:
                needed = "text" if is_text else "a number"
                raise ValueError(f"arm {arm.name}: {name} is {value!r}, where {needed} is needed: {REMEDY}")


def _check_names(subject: str, names: list[str]) -> None:
    for name in names:
        if not name or set(name) & set("/\\ \t\n=:{}") or name.startswith((".", "-")):
            raise ValueError(
                f"[[{subject}]] name {name!r} cannot be a folder: use letters, digits, - and _"
            )
        if names.count(name) > 1:
            raise ValueError(f"[[{subject}]] has {name!r} twice: give each another name")


def _check_suite(suite: SuitePart) -> None:
    """Raise ValueError for an unknown suite or task, or lengths that the suite cannot have."""
    known = registered().get(suite.name)
    if known is None:
        raise ValueError(f"[[suites]] name is {suite.name!r}: choose one of {', '.join(registered())}")
    if unknown := set(suite.tasks) - set(known.tasks):
        raise ValueError(
            f"[[suites]] {suite.name} has no task {min(unknown)!r}: choose from {', '.join(known.tasks)}"
        )
    if known.has_lengths == (not suite.lengths):
        does = "needs lengths: give a list" if known.has_lengths else "has no lengths: leave them out"
        raise ValueError(f"[[suites]] {suite.name} {does}")
    if known.has_lengths:
        suite_lengths(suite, 0)


def suite_lengths(suite: SuitePart, window: int) -> dict[str, list[str]]:
    """Return the lengths of a suite by regime, as a user writes them (`1.5K`).

    Args:
        suite: a suite with lengths.
        window: longest rows of training, in tokens; a listed length up to it counts as trained. K is 1,024
            for this decision. The paper's lists name their regimes themselves.

    Raises:
        ValueError: no lengths, or a model or suite that the paper's table does not have.
    """
    if isinstance(suite.lengths, str):
        if not suite.lengths.startswith(PAPER):
            raise ValueError(
                f'[[suites]] {suite.name}: lengths is {suite.lengths!r}; write a list, or "{PAPER}MODEL"'
            )
        name = suite.lengths.removeprefix(PAPER)
        model = find_paper_model(name)
        if model is None:
            raise ValueError(
                f"[[suites]] {suite.name}: the paper has no model {name!r}: choose one of "
                f"{', '.join(paper_models())}"
            )
        found = {
            regime: list(paper_windows(model, suite.name, regime) or ())
            for regime in (TRAINED, EXTRAPOLATED)
        }
        if not any(found.values()):
            raise ValueError(f"the paper has no windows of {suite.name} for {model}: give a list")
        return found
    if not isinstance(suite.lengths, list | tuple):
        raise ValueError(f"[[suites]] {suite.name}: lengths is {suite.lengths!r}, where a list is needed")
    found = {TRAINED: [], EXTRAPOLATED: []}
    for word in map(str, suite.lengths):
        (length,) = token_lengths(word)
        found[TRAINED if length.tokens(1024) <= window else EXTRAPOLATED].append(word)
    return found


def tokens_of(value: Any, where: str) -> int:
    """Return a number of tokens that is written as a number or as text such as `4K`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f'{where} is {value!r}: give a whole number, or text such as "4K"')
    try:
        return positive_int(str(value))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
