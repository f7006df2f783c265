"""Chains of training stages (4K > 8K > 16K, for each arm, all from one start), run by `train` or SLURM.

`plan_chain` returns a chain as a list of runs and starts nothing. `carry_out` prints the plan, runs it on
this machine, each run by `megatron-exact train`, or submits it to SLURM, one job a run after the run that
it starts from. The jobs are `examples/slurm/train.sbatch`, which requeues itself until its run is finished;
if a run fails, SLURM cancels the runs after it. Called again, finished runs are skipped, and jobs that wait
or run are left alone.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from megatron_exact.data.blend import CorpusSlice
from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.data.score_files import read_record
from megatron_exact.data.tokenizers import same_tokenizer
from megatron_exact.exposure import RULES, bucket_lower_bounds, score_readers
from megatron_exact.lineage import first_difference, may_differ
from megatron_exact.training.checkpoint_start import choose_start
from megatron_exact.training.job import check_against_pack, choose_model, expand_recipe
from megatron_exact.training.job_flags import flag_value, has_flag, without_flags
from megatron_exact.training.recipes import chain_of, find_recipe
from megatron_exact.training.run_record import RUN_RECORD, read_run_record
from megatron_exact.training.run_status import (
    read_status,
    read_submission,
    record_submission,
    row_length_name,
)
from megatron_exact.training.weighting_options import refuse_unread, unread_flags

DECIDED = ("--pack", "--save", "--load", "--pretrained-checkpoint", "--token-weighting", "--recipe")
"""Flags that a plan sets for each of its runs."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Dtypes as Megatron's flags spell them -> as torch, and run.json, spell them."""


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One training run of a chain."""

    stage: str
    """Name of the stage: its row length, such as `16k`."""
    arm: str
    """Token weighting rule."""
    folder: Path
    """Folder that it saves to."""
    previous: Path | None
    """Folder whose last intact checkpoint it starts from; None for random weights."""
    arguments: tuple[str, ...]
    """Arguments of `megatron_exact.training.pretrain`, the same whether the run begins or resumes."""
    iterations: int
    """Iterations at its end."""
    nodes: int | None
    """Number of machines in its recipe; None without a recipe."""
    gpus_per_node: int | None
    """GPUs of a machine in its recipe; None without a recipe."""

    @property
    def name(self) -> str:
        """Stage and arm, for messages."""
        return f"{self.stage} {self.arm}"

    def iteration(self) -> int | None:
        """Return the iteration of its newest intact checkpoint, None before the first.

        Raises:
            ValueError: there are checkpoints, but none is intact.
        """
        folder = str(self.folder)
        return choose_start(folder, folder).iteration

    def is_finished(self) -> bool:
        """Return whether its last checkpoint exists and is intact."""
        return (self.iteration() or 0) >= self.iterations


def plan_chain(
    packs: Sequence[str],
    output: Path,
    *,
    start: str | None,
    arms: Sequence[str],
    recipe: str | None = None,
    taus: Sequence[float] = (),
    scores: Sequence[str] = (),
    arguments: Sequence[str] = (),
    same_documents: bool = False,
) -> list[StageRun]:
    """Plan the runs of a chain, in the order to run them, with the arms of a stage beside each other.

    Args:
        packs: packed datasets, one for each stage, which their row length decides.
        output: folder that receives `<arm>/<stage>`.
        start: the checkpoint that every arm of the first stage starts from; None for random weights.
        arms: token weighting rules.
        recipe: recipe of the last stage, from which the earlier ones follow. None: `arguments` describe
            every stage alike.
        taus: first effective context of the tail of each stage, tokens, shortest rows first; one value is
            for all stages, none leaves the default of the row length.
        scores: score folders (`megatron-exact score`), one for each pack in any order, for the arms of
            confidence rules; with none the models score themselves.
        arguments: more flags for every run whose rule reads them; they win over the recipe's.
        same_documents: the stages are meant to read the same documents, so do not warn about it.

    Raises:
        ValueError: packs that do not fit the stages, each other or the start, scores of other packs,
            weighting flags that no arm reads, or an unknown rule or recipe.
    """
    unknown = [arm for arm in arms if arm not in RULES]
    if unknown or not arms:
        wrong = ", ".join(unknown) or "none given"
        raise ValueError(f"arms: {wrong}; token weighting rules are {', '.join(RULES)}")
    if len(set(arms)) < len(arms):
        raise ValueError(f"arms {', '.join(arms)}: name each once")
    refuse_decided(arguments, by="the chain")
    tau_words = ("--exact-tau", " ".join(f"{tau:g}" for tau in taus)) if taus else ()
    refuse_unread((*tau_words, *arguments), arms)
    manifests = {pack: read_manifest(pack) for pack in packs}
    _check_tokenizers(manifests)
    stages = _stages(manifests, recipe)
    if not same_documents:
        _warn_of_shared_documents([manifests[pack] for pack, _ in stages])
    tau_flags = _tau_flags(taus, [manifests[pack].row_tokens for pack, _ in stages])
    score_flags = _score_flags(scores, [manifests[pack] for pack, _ in stages], arms)
    if start is not None:
        choose_start(None, None, start)
        model = choose_model(flag_value(arguments, "--preset"), Path(start), None)
        for manifest in manifests.values():
            check_against_pack(model, manifest)
    runs = []
    for number, (pack, name) in enumerate(stages):
        for arm in arms:
            folder = output / arm / stage_name(manifests[pack])
            previous = Path(start) if start is not None else None
            if number:
                previous = output / arm / stage_name(manifests[stages[number - 1][0]])
            own = score_flags[number] if RULES[arm].reads_scores else ()
            flags = without_flags((*tau_flags[number], *own, *arguments), unread_flags(arm))
            runs.append(_run(pack, manifests[pack], name, arm, folder, previous, flags))
            _check_finished(runs[-1], manifests[pack])
    return runs


def refuse_decided(arguments: Sequence[str], *, by: str) -> None:
    """Raise ValueError for flags that a plan sets for each of its runs."""
    taken = [flag for flag in DECIDED if has_flag(arguments, flag)]
    if taken:
        raise ValueError(f"{', '.join(taken)}: {by} decides it for each of its runs; leave it out")


def _check_finished(run: StageRun, manifest: Manifest) -> None:
    """Raise ValueError where a finished run has another pack or other flags than planned.

    An unfinished run compares them itself when it resumes.
    """
    record = read_run_record(run.folder)
    if record is None or not run.is_finished():
        return
    other: tuple[str, Any, Any] | None = ("pack", record.get("fingerprint"), manifest.fingerprint)
    if record.get("fingerprint") == manifest.fingerprint:
        other = other_setting(record, expand_recipe(run.arguments), at_resume=True)
    if other is not None:
        name, found, wanted = other
        raise ValueError(
            f"{run.folder} is finished, and its {name} is {found}, not {wanted}: give what it was begun "
            "with, or choose another --output"
        )


def other_setting(
    record: Mapping[str, Any], words: Sequence[str], *, at_resume: bool
) -> tuple[str, Any, str] | None:
    """Return the first flag whose value differs from the run's beginning: name, recorded value, value now.

    Args:
        record: run.json of the run.
        words: flags of a job for its folder.
        at_resume: ignore settings that a resume may change; otherwise those that arms may differ in.
    """
    begun_with = {**(record.get("schedule") or {}), **(record.get("configuration") or {})}
    for name, found in begun_with.items():
        wanted = flag_value(words, "--" + name.replace("_", "-"))
        is_value = wanted is not None and not wanted.startswith("--") and not isinstance(found, bool)
        if wanted is None or not is_value or may_differ(name, at_resume=at_resume):
            continue
        if not _is_same(found, wanted):
            return name, found, wanted
    return None


def _is_same(recorded: Any, given: str) -> bool:
    """Return whether a recorded value equals that of a flag (`1e-5` is 0.00001); lists are not compared."""
    if isinstance(recorded, list | dict):
        return True
    try:
        return float(recorded) == float(given)
    except (TypeError, ValueError):
        return str(recorded) == DTYPES.get(given, given)


def _warn_of_shared_documents(manifests: Sequence[Manifest]) -> None:
    """Warn once where two stages may read the same documents, or evaluate on what another trains on."""
    for one, other in combinations(manifests, 2):
        shared = {source.idx_sha256 for source in one.sources} & {s.idx_sha256 for s in other.sources}
        if not shared or _is_disjoint(one, other):
            continue
        prefixes = [source.prefix for source in one.sources if source.idx_sha256 in shared]
        count = len(manifests)
        warnings.warn(
            f"stages {stage_name(one)} and {stage_name(other)} may read the same documents of "
            f"{', '.join(prefixes)}: pack the stages with one --seed and --validation-fraction, each with "
            f"its own part, --corpus-slice 1/{count} to {count}/{count}; --same-documents says that this "
            "is meant",
            stacklevel=3,
        )
        return


def _is_disjoint(one: Manifest, other: Manifest) -> bool:
    """Return whether two packs have no documents in common, in training and validation."""
    if one.corpus_slice is None or other.corpus_slice is None:
        return False
    if (one.seed, one.validation_fraction) != (other.seed, other.validation_fraction):
        return False
    return CorpusSlice.parse(one.corpus_slice).is_disjoint(CorpusSlice.parse(other.corpus_slice))


def check_pairs(runs: Sequence[StageRun]) -> None:
    """Compare the records of finished runs: the arms of a stage must be pairs.

    Raises:
        ValueError: two arms were not trained alike, for instance because one was resumed with other flags.
    """
    for stage in dict.fromkeys(run.stage for run in runs):
        records = [(run.folder, read_run_record(run.folder)) for run in runs if run.stage == stage]
        for (one, before), (other, after) in pairwise(records):
            if before is None or after is None:
                missing = one if before is None else other
                raise ValueError(f"{missing / RUN_RECORD} is missing: train both arms again")
            difference = first_difference(before, after)
            if difference is not None:
                raise ValueError(
                    f"{one} and {other} were not trained alike: {difference}; remove both and run again"
                )


def stage_name(manifest: Manifest) -> str:
    """Return the name of a pack's stage: `16k` for rows of 16,384 tokens, `96` for rows of 96."""
    return row_length_name(manifest.row_tokens)


def _run(
    pack: str,
    manifest: Manifest,
    recipe: str | None,
    arm: str,
    folder: Path,
    previous: Path | None,
    arguments: Sequence[str],
) -> StageRun:
    words = [] if recipe is None else ["--recipe", recipe]
    words += ["--pack", pack, "--token-weighting", arm, "--save", str(folder), "--load", str(folder)]
    if previous is not None:
        words += ["--pretrained-checkpoint", str(previous)]
    words += arguments
    iterations = flag_value(expand_recipe(words), "--train-iters")
    if iterations is None:
        raise ValueError("--train-iters is missing: name a --recipe, or say how long each stage is")
    known = find_recipe(recipe) if recipe is not None else None
    return StageRun(
        stage=stage_name(manifest),
        arm=arm,
        folder=folder,
        previous=previous,
        arguments=tuple(words),
        iterations=int(iterations),
        nodes=known.nodes if known is not None else None,
        gpus_per_node=known.gpus_per_node if known is not None else None,
    )


def _tau_flags(taus: Sequence[float], row_tokens: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the --exact-tau of each stage, checked against its row length before the first stage runs."""
    stages = len(row_tokens)
    if not taus:
        return [()] * stages
    if len(taus) not in (1, stages):
        raise ValueError(
            f"--exact-tau names {len(taus)} values for {stages} stages: give one for all, or one a stage, "
            "shortest rows first"
        )
    each = taus if len(taus) == stages else [taus[0]] * stages
    for tau, length in zip(each, row_tokens, strict=True):
        top = int(bucket_lower_bounds(length)[-1])
        if not 0 < tau <= top:
            raise ValueError(
                f"--exact-tau {tau:g} for the stage with rows of {length} tokens: choose a value in "
                f"(0, {top}], where the top bucket starts"
            )
    return [("--exact-tau", f"{tau:.15g}") for tau in each]


def _score_flags(
    scores: Sequence[str], manifests: Sequence[Manifest], arms: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return the --confidence-scores of each stage, for the arms of confidence rules."""
    if not scores:
        return [()] * len(manifests)
    if not any(RULES[arm].reads_scores for arm in arms):
        raise ValueError(
            f"--confidence-scores is for {', '.join(score_readers())}, but the arms are "
            f"{', '.join(arms)}: name such an arm, or drop it"
        )
    records = {folder: read_record(folder) for folder in scores}
    borders = {folder: record.short_border for folder, record in records.items()}
    if len(set(borders.values())) > 1:
        found = ", ".join(f"{folder} {border}" for folder, border in borders.items())
        raise ValueError(
            f"the scores have different borders of short windows ({found}): score all packs of a chain "
            "with one --short-border"
        )
    by_pack = {record.fingerprint: folder for folder, record in records.items()}
    unscored = [str(found.row_tokens) for found in manifests if found.fingerprint not in by_pack]
    if unscored or len(scores) != len(manifests):
        raise ValueError(
            f"--confidence-scores needs one folder a pack, {len(manifests)} in all, not {len(scores)}; the "
            f"packs with rows of {', '.join(unscored) or 'all lengths'} tokens have "
            f"{'none' if unscored else 'theirs'}: score each pack once (megatron-exact score)"
        )
    return [("--confidence-scores", by_pack[found.fingerprint]) for found in manifests]


def _stages(manifests: dict[str, Manifest], recipe: str | None) -> list[tuple[str, str | None]]:
    """Return (pack, recipe) of each stage, shortest rows first."""
    by_length: dict[int, str] = {}
    for pack, manifest in manifests.items():
        if manifest.row_tokens in by_length:
            raise ValueError(
                f"{by_length[manifest.row_tokens]} and {pack} both have rows of {manifest.row_tokens} "
                "tokens: name one pack a stage"
            )
        by_length[manifest.row_tokens] = pack
    if recipe is None:
        return [(by_length[length], None) for length in sorted(by_length)]
    there = ", ".join(map(str, sorted(by_length)))
    stages: list[tuple[str, str | None]] = []
    for name in chain_of(recipe):
        length = find_recipe(name).row_tokens
        if length not in by_length:
            raise ValueError(
                f"stage {name} needs a pack with rows of {length} tokens, but the packs have rows of "
                f"{there}: add one with --pack"
            )
        stages.append((by_length.pop(length), name))
    if by_length:
        pack = next(iter(by_length.values()))
        raise ValueError(
            f"{pack} has rows of {manifests[pack].row_tokens} tokens, which no stage of {recipe} has: "
            "leave it out"
        )
    return stages


def _check_tokenizers(manifests: dict[str, Manifest]) -> None:
    """Raise ValueError for packs that were made with different tokenizers."""
    known: dict[str, dict[str, Any]] = {}
    for pack, manifest in manifests.items():
        path = manifest.tokenizer_path(pack)
        if manifest.tokenizer is None:
            continue
        identity = {**asdict(manifest.tokenizer), "path": str(path)}
        other = next((pack for pack, one in known.items() if not same_tokenizer(one, identity)), None)
        if other is not None:
            raise ValueError(
                f"{other} and {pack} were made with different tokenizers: the stages of a chain "
                "train one model; tokenize and pack again"
            )
        known[pack] = identity


SHUTDOWN_SECONDS = 120
"""Time that torchrun gives its ranks after a signal, since a large checkpoint may be being written."""


def train_command(run: StageRun, processes: int | None = None) -> list[str]:
    """Return the command that begins or resumes a run.

    Args:
        run: a run of the plan.
        processes: ranks to start, if not the recipe's number of GPUs.

    Raises:
        ValueError: several nodes, or no number of ranks.
    """
    if (run.nodes or 1) > 1 and processes is None:
        raise ValueError(
            f"{run.name} asks for {run.nodes} nodes, and this starts processes on one: submit the stages "
            "to a batch system, or name a recipe of one node"
        )
    return [
        *(sys.executable, "-m", "megatron_exact", "train", "--standalone", "--nnodes", "1"),
        *("--nproc-per-node", str(_ranks_per_node(run, processes)), "--max-restarts", "0"),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
        *("--", *run.arguments),
    ]


def _ranks_per_node(run: StageRun, processes: int | None) -> int:
    ranks = processes or run.gpus_per_node
    if ranks is None:
        raise ValueError("--nproc-per-node is missing: say how many processes a node has")
    return ranks


def describe_plan(runs: Sequence[StageRun], processes: int | None = None) -> list[str]:
    """Return lines for a shell: the commands of unfinished runs, with a comment before each.

    Raises:
        ValueError: as `train_command`.
    """
    lines = []
    for run in runs:
        iteration = run.iteration()
        if run.is_finished():
            lines.append(f"# {run.name}: finished at iteration {iteration}")
            continue
        state = (
            f"resumes from iteration {iteration}"
            if iteration
            else f"starts from {run.previous or 'random weights'}"
        )
        lines += [f"# {run.name}: {state}", shlex.join(train_command(run, processes))]
    return lines


def run_chain(
    runs: Sequence[StageRun],
    processes: int | None = None,
    *,
    call: Callable[[Sequence[str]], int] | None = None,
) -> None:
    """Run the unfinished runs in order; stop at the first failure.

    Args:
        runs: from `plan_chain`.
        processes: ranks of each run, if not the recipe's number of GPUs.
        call: runs a command and returns its exit code (default: a child process with our terminal).

    Raises:
        ValueError: a run that failed, or ended before its last iteration.
    """
    for run in runs:
        if run.is_finished():
            print(f"{run.name}: finished", flush=True)
            continue
        print(f"{run.name}: {run.folder}", flush=True)
        code = (call or _run_and_wait)(train_command(run, processes))
        if code:
            raise ValueError(
                f"{run.name} ended with exit code {code}, its message is above; the same command resumes it"
            )
        if not run.is_finished():
            raise ValueError(
                f"{run.name} ended at iteration {run.iteration() or 0} of {run.iterations}: the same "
                "command resumes it"
            )


def _run_and_wait(command: Sequence[str]) -> int:
    """Run a child and return its exit code; a signal to this process also ends the child."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


SCRIPT = Path("examples/slurm/train.sbatch")
Call = Callable[[Sequence[str], Mapping[str, str]], str]
"""Runs a command with these environment variables added; returns what it prints."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The outcome of submitting one run."""

    run: StageRun
    """The run."""
    job: str | None
    """Number of its job; None where the run is finished."""
    is_new: bool
    """Whether the job was submitted now."""
    before: str | None = None
    """What became of an earlier job for it that has left the queue."""

    def describe(self) -> str:
        """Return the outcome as one line for a terminal."""
        if self.job is None:
            return f"{self.run.name}: finished"
        verb = "submitted as" if self.is_new else "is in the queue as"
        before = f" ({self.before})" if self.before else ""
        return f"{self.run.name}: {verb} job {self.job}{before}"


def job_name(run: StageRun) -> str:
    """Return the name of a run's job, which depends on its folder alone and is unique to it."""
    digest = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:8]
    return f"{run.stage}-{run.arm}-{digest}"


def submit_chain(
    runs: Sequence[StageRun],
    options: Sequence[str] = (),
    processes: int | None = None,
    *,
    call: Call | None = None,
) -> list[Submission]:
    """Submit the runs that are neither finished nor in the queue.

    A job that waits for one that has left the queue is cancelled and submitted again: its dependency can
    no longer be satisfied, even where SLURM has not noticed yet.

    Args:
        runs: from `plan_chain`.
        options: options of every `sbatch`, such as a partition and a time limit.
        processes: ranks a node, if not the recipe's number of GPUs.
        call: runs a command (default: a child process).

    Raises:
        ValueError: the script is missing, no number of ranks, a command of SLURM failed, or options or
            flags with which a run would not wait for the one that it starts from.
    """
    _check_submission(runs, options)
    if not SCRIPT.is_file():
        raise ValueError(f"{SCRIPT} is not here: submit from the checkout, whose folder the jobs run in")
    run_command = call or _run_command
    jobs: dict[Path, str] = {}
    new: set[Path | None] = set()  # folders of the runs that were submitted now
    submissions = []
    for run in runs:
        if run.is_finished():
            submissions.append(Submission(run=run, job=None, is_new=False))
            continue
        before: str | None = None
        queued = _queued(run, run_command)
        if queued is not None and queued.waits and run.previous in new:
            run_command(["scancel", queued.number], {})
            before, queued = f"job {queued.number} waited for a job that has ended", None
        elif queued is None:
            before = _ended_before(run)
        is_new = queued is None
        after = None if run.previous is None else jobs.get(run.previous)
        number = queued.number if queued else _submit(run, options, processes, after, run_command)
        jobs[run.folder] = number
        if is_new:
            new.add(run.folder)
        submissions.append(Submission(run=run, job=number, is_new=is_new, before=before))
    return submissions


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job of the queue."""

    number: str
    """Its number."""
    waits: bool
    """Whether it waits for another job."""


PAUSING = ("--exit-interval", "--exit-duration-in-mins")
"""Flags with which a job ends before its last iteration, and yet successfully."""

CHAINING = {"--dependency": "-d", "--job-name": "-J"}
"""Options of sbatch that chain the jobs, long -> short; sbatch takes the last one of a kind."""


def _check_submission(runs: Sequence[StageRun], options: Sequence[str]) -> None:
    """Raise ValueError for flags and options with which a stage would not wait for its predecessor."""
    for word in options:
        name = word.split("=")[0]
        for long, short in CHAINING.items():
            is_long = len(name) > len("--") and name.startswith("--") and long.startswith(name)
            if is_long or (word.startswith(short) and not word.startswith("--")):
                raise ValueError(
                    f"--sbatch {word}: the chain sets {long} of each of its jobs, and sbatch would take "
                    "this one instead; leave it out (to wait for another job, submit the chain after it)"
                )
    waited_for = {run.previous for run in runs}
    for run in runs:
        words = expand_recipe(run.arguments)
        pausing = [flag for flag in PAUSING if has_flag(words, flag)]
        if run.folder in waited_for and pausing:
            raise ValueError(
                f"{', '.join(pausing)}: {run.name} would end before its last iteration, which Slurm takes "
                "for success, and the next stage would start from it; leave it out, or limit the time by "
                "--sbatch=--time=..."
            )


NEVER = "DependencyNeverSatisfied"
"""What squeue says of a job that SLURM is about to cancel."""
ENDING_LOOKS, LOOK_SECONDS = 60, 2.0
"""How often, and how far apart, a job that is ending is looked at before we give up."""


def _queued(run: StageRun, call: Call) -> QueuedJob | None:
    """Return this run's job that waits or runs, or None.

    squeue shows a job that is ending as COMPLETING whether it is over or will start again, so we wait until
    it says which.

    Raises:
        ValueError: a job that is still ending after two minutes.
    """
    command = ["squeue", "--noheader", "--me", "--format=%A|%T|%r", f"--name={job_name(run)}"]
    for look in range(ENDING_LOOKS):
        ending = ""
        for line in call(command, {}).splitlines():
            number, state, reason = (*line.strip().split("|"), "", "")[:3]
            if state == "COMPLETING":
                ending = number
            elif number and reason != NEVER:
                waits = state == "PENDING" and reason == "Dependency"
                return QueuedJob(number=number, waits=waits)
        if not ending:
            return None
        if look == 0:
            print(f"{run.name}: job {ending} is ending, waiting for it", flush=True)
        time.sleep(LOOK_SECONDS)
    raise ValueError(
        f"{run.name}: job {ending} is still ending (COMPLETING in squeue), and may start again: run the "
        "same command when squeue no longer shows it"
    )


def _ended_before(run: StageRun) -> str | None:
    """Return what became of an earlier job of this run, None if there was none."""
    submitted = read_submission(run.folder)
    if submitted is None:
        return None
    status = read_status(run.folder)
    return f"job {submitted.get('job')} has ended: {status.last_line or 'it never began'}"


def _submit(
    run: StageRun, options: Sequence[str], processes: int | None, after: str | None, call: Call
) -> str:
    """Submit a run, after the job `after` if one is given, and return the number of its job."""
    variables = {"RUN_DIR": str(run.folder), "GPUS_PER_NODE": str(_ranks_per_node(run, processes))}
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--parsable", f"--job-name={job_name(run)}", f"--nodes={run.nodes or 1}"]
    command += [f"--output={logs}/%x-%j.out"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    printed = call([*command, *options, str(SCRIPT), *run.arguments], variables)
    job = printed.strip().split(";")[0]
    about = {"stage": run.stage, "arm": run.arm, "iterations": run.iterations}
    record_submission(run.folder, job, None if after is None else run.previous, about)
    return job


def _run_command(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run a command of SLURM with more environment variables and return what it prints."""
    try:
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not there: submit on a machine of the SLURM cluster") from error
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def carry_out(
    runs: Sequence[StageRun], *, processes: int | None, sbatch: str | None, dry_run: bool
) -> bool:
    """Carry out a plan as `--nproc-per-node`, `--sbatch` and `--dry-run` say.

    Args:
        runs: the plan, in order.
        processes: ranks of a run on each node; None for the recipe's.
        sbatch: options of every sbatch, as one line of a shell; None to run without SLURM.
        dry_run: print the commands only.

    Returns:
        Whether the runs are finished.

    Raises:
        ValueError: a run or a submission that fails, or arms that were not trained alike.
    """
    if dry_run:
        print("\n".join(describe_plan(runs, processes)))
        return False
    if sbatch is not None:
        for submission in submit_chain(runs, shlex.split(sbatch), processes):
            print(submission.describe())
        return False
    run_chain(runs, processes)
    check_pairs(runs)
    return True
