"""The command that began a run resumes it, whatever the model and its flags.

A run writes `hf/`, from which a resumed job reads the model that the flags alone described at the start:
the two ways have to come to the same record. Start and resume are read and validated as a job would, in one
forked process, without building a model; whole runs are at the end of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from examples.demo_text import FULL, PROCESSES, QUICK, DemoSettings, training_command
from examples.evaluate_demo import TRAINING_FLAGS
from examples.miniature.base_model import BASE_STAGES
from examples.miniature.experiment import stage_options
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.model.families import PRESETS
from megatron_exact.training.job_flags import without_flags
from megatron_exact.training.recipes import RECIPES, find_recipe
from tests.distributed import jobs, ranks

PLAIN = (
    *("--num-layers", 4, "--hidden-size", 48, "--num-attention-heads", 4, "--vocab-size", 96),
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--position-embedding-type", "rope"),
)
"""A model without grouped-query attention: Megatron's namespace says 1 group, hf/ says 4."""
BATCH = ("--global-batch-size", 8, "--eval-iters", 0, "--save-interval", 2)
STEPS = (*BATCH, "--train-iters", 6, "--lr", "1e-3")
MODELS: dict[str, tuple[Any, ...]] = {
    "multi-head": (*PLAIN, *STEPS),
    "one-group": (*PLAIN, *STEPS, "--group-query-attention", "--num-query-groups", 1),
    "two-groups": (*PLAIN, *STEPS, "--group-query-attention", "--num-query-groups", 2),
    "as-many-groups-as-heads": (*PLAIN, *STEPS, "--group-query-attention", "--num-query-groups", 4),
    "wide-heads": (*PLAIN, *STEPS, "--kv-channels", 16),
    "wide-mlp": (*PLAIN, *STEPS, "--ffn-hidden-size", 80),
    "untied-with-bias": (*PLAIN, *STEPS, "--untie-embeddings-and-output-weights", "--add-qkv-bias"),
    "rotary": (*PLAIN, *STEPS, "--rotary-base", 500_000, "--use-rope-scaling"),
    "rotary-factor": (*PLAIN, *STEPS, "--use-rope-scaling", "--rope-scaling-factor", 32),
    "idle-rotary-factor": (*PLAIN, *STEPS, "--rope-scaling-factor", 32),
    "old-rotary-flag": (*PLAIN[:-2], *STEPS, "--use-rotary-position-embeddings"),
    "every-second-layer-without-rotation": (*PLAIN, *STEPS, "--no-rope-freq", 2),
    "first-layer-without-rotation": (*PLAIN, *STEPS, "--no-rope-freq", "[1,0,0,0]"),
    "every-second-layer-by-a-list": (*PLAIN, *STEPS, "--no-rope-freq", "([0]+[1])*2"),
    "half-of-a-head-rotates": (*PLAIN, *STEPS, "--rotary-percent", 0.5),
    "norms-after-the-layers": (*PLAIN, *STEPS, "--qk-layernorm", "--post-norm"),
    "epsilon": (*PLAIN, *STEPS, "--norm-epsilon", "1e-06"),
    "epsilon-of-a-third": (*PLAIN, *STEPS, "--norm-epsilon", "3.3333333333333335e-07"),
    "window-of-its-own": (*PLAIN, *STEPS, "--max-position-embeddings", 4096),
    "initialisation": (*PLAIN, *STEPS, "--init-method-std", 0.006, "--seed", 7),
    "no-export": (*PLAIN[:-2], *STEPS, "--position-embedding-type", "none"),
    "gelu-and-bias": (
        *PLAIN[:8],
        *STEPS,
        "--normalization",
        "RMSNorm",
        "--position-embedding-type",
        "rope",
    ),
}
SCHEDULES: dict[str, tuple[Any, ...]] = {
    "samples": (*PLAIN, *BATCH, "--train-samples", 48, "--lr", "1e-3", "--lr-warmup-samples", 8),
    "decay-samples": (*PLAIN, *BATCH, "--train-samples", 48, "--lr", "1e-3", "--lr-decay-samples", 32),
    "wsd": (
        *(*PLAIN, *STEPS, "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", 2),
        *("--lr-wsd-decay-style", "linear", "--lr-decay-iters", 6),
    ),
    "cosine": (*PLAIN, *STEPS, "--lr-decay-style", "cosine", "--min-lr", "1e-4", "--lr-warmup-iters", 2),
    "warm-up-fraction": (*PLAIN, *STEPS, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1),
    "inverse-square-root": (
        *(*PLAIN, *STEPS, "--lr-decay-style", "inverse-square-root"),
        *("--lr-warmup-iters", 1),
    ),
    "half-precision": (*PLAIN, *STEPS, "--bf16", "--accumulate-allreduce-grads-in-fp32"),
    "loss-scale": (*PLAIN, *STEPS, "--fp16", "--initial-loss-scale", 1024),
    "optimizer": (
        *(*PLAIN, *STEPS, "--adam-beta2", 0.95, "--adam-eps", "1e-10"),
        *("--weight-decay", 0.1, "--clip-grad", 0.5),
    ),
    "distributed-optimizer": (*PLAIN, *STEPS, "--use-distributed-optimizer", "--overlap-grad-reduce"),
    "dropout": (*PLAIN, *STEPS, "--hidden-dropout", 0.1),
    "default-batch": (*PLAIN, "--train-iters", 6, "--lr", "1e-3", "--save-interval", 2, "--eval-iters", 0),
    "queries-and-keys": (*PLAIN, *STEPS, "--qk-timing", "--qk-timing-fraction", 0.5),
    "recompute": (
        *(*PLAIN, *STEPS, "--recompute-granularity", "full"),
        *("--recompute-method", "uniform", "--recompute-num-layers", 1),
    ),
    "stock-loss-head": (*PLAIN, *STEPS, "--loss-head", "stock", "--micro-batch-size", 2),
    "saves": (*PLAIN, *STEPS, "--async-save", "--keep-last", 2, "--exit-interval", 2, "--log-row-ids"),
    "validation": (*PLAIN, *BATCH[:2], "--save-interval", 2, "--train-iters", 6, "--lr", "1e-3"),
}
RULES: dict[str, tuple[Any, ...]] = {
    rule: (*PLAIN, *STEPS, "--token-weighting", rule) for rule in ("none", "exact-normalized", "constant")
}
WRITTEN = {**MODELS, **SCHEDULES, **RULES}


def start_and_resume(
    argv: Sequence[Any],
    run: Path,
    *,
    world_size: int = 1,
    base: Path | None = None,
    added: Sequence[Any] = (),
) -> dict[str, Any]:
    """Records of a job's start and of its resume, as the job makes them; to be called in a forked process.

    Args:
        argv: the command without --save and --load.
        run: its folder; receives run.json and hf/.
        world_size: ranks of the job.
        base: what the start takes its weights from.
        added: flags of the resume alone.
    """
    from megatron_exact.training import job as jobs_of_training
    from megatron_exact.training.checkpoint_start import Start
    from megatron_exact.training.cpu_runtime import CPU_ARGUMENTS
    from megatron_exact.training.job import write_hf_folder
    from megatron_exact.training.megatron_parse import parse_for_megatron
    from megatron_exact.training.run_record import check_same_run, describe_run, write_run_record

    os.environ.update(
        RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"
    )
    words = [str(word) for word in (*argv, "--save", run, "--load", run)]
    if base is not None:
        words += ["--pretrained-checkpoint", str(base)]

    def start(load: Path | None, *, is_resume: bool) -> Start:
        return Start(
            load=load,
            checkpoint=load and load / "iter_0000002",
            iteration=2 if load else None,
            is_resume=is_resume,
            weights_only=load is not None and not is_resume,
            message="",
        )

    for is_resume in (False, True):
        chosen = start(run if is_resume else base, is_resume=is_resume)
        with (
            mock.patch.object(jobs_of_training, "choose_start", return_value=chosen),
            mock.patch.object(jobs_of_training, "require_free_run"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            argv = [*words, *map(str, added)] if is_resume else words
            job = jobs_of_training.prepare_job(argv, choose_runtime=lambda options: CPU_ARGUMENTS)
            args, _ = parse_for_megatron(job)
        record = describe_run(args, job.weighting, job.manifest)
        assert check_same_run(run, record, is_resume=is_resume) is None or is_resume
        write_run_record(run, record, 2 if is_resume else None)
        if not is_resume:
            write_hf_folder(job.model, args, job.manifest)
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def faults_of(commands: dict[str, Callable[[], dict[str, Any]]], folder: Path) -> dict[str, str]:
    """Name and error of every command that does not resume, or that records something as changed."""
    result = folder / "faults.json"

    def check() -> int:
        faults = {}
        for name, start in commands.items():
            try:
                record = start()
                (resume,) = record["resumes"]
                if resume["changes"] or any(resume[key] != record[key] for key in ("schedule", "layout")):
                    faults[name] = f"the resume records a change: {resume}"
            except Exception as error:
                faults[name] = f"{type(error).__name__}: {error}"
        result.write_text(json.dumps(faults))
        return 0

    ranks.run_ranks(1, check, folder / "output").check()
    found: dict[str, str] = json.loads(result.read_text())
    return found


def written(names: Sequence[str], pack: Path, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """The commands of WRITTEN."""

    def command(name: str) -> Callable[[], dict[str, Any]]:
        words = ["--pack", pack, "--token-weighting", "exact", *WRITTEN[name]]
        return lambda: start_and_resume(words, folder / name)

    return {name: command(name) for name in names}


FEW = (
    *("multi-head", "wide-heads", "old-rotary-flag", "idle-rotary-factor", "no-export"),
    *("samples", "wsd", "saves", "first-layer-without-rotation"),
)


def test_the_same_command_is_the_same_run(pack: Path, tmp_path: Path) -> None:
    assert faults_of(written(FEW, pack, tmp_path), tmp_path) == {}


@pytest.mark.slow
def test_every_written_command_is_the_same_run(pack: Path, tmp_path: Path) -> None:
    assert faults_of(written(tuple(WRITTEN), pack, tmp_path), tmp_path) == {}


def demo_commands(settings: DemoSettings, pack: Path, folder: Path) -> dict[str, Sequence[str]]:
    """What the demo trains: the base from random weights, an arm from the base."""
    commands: dict[str, Sequence[str]] = {}
    for name, stage, base in (("short", settings.short, None), ("long", settings.long, folder / "base")):
        words = training_command(
            settings, stage, pack=pack, validation_rows=9, rule="exact", save=folder / name, base=base
        )
        commands[name] = words[words.index("megatron_exact.training.pretrain") + 1 :]
    return commands


@pytest.mark.slow
def test_the_commands_of_presets_and_demos_are_the_same_run(pack: Path, tmp_path: Path) -> None:
    commands: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, argv: Sequence[Any], **options: Any) -> None:
        commands[name] = lambda: start_and_resume(argv, tmp_path / name, **options)

    words = ["--pack", pack, "--token-weighting", "exact", "--eval-iters", 0]
    for name in PRESETS:
        add(name, [*words, "--preset", name, *STEPS])
    for number, stage in enumerate(BASE_STAGES):
        add(f"miniature-{number}", [*words, *PLAIN, *stage_options(stage.training), "--eval-iters", 0])
    evaluate_demo = without_flags(TRAINING_FLAGS, ("--nproc-per-node",))
    add("evaluate-demo", [*words, *PLAIN, *evaluate_demo, "--train-iters", 6, "--save-interval", 6])
    for title, settings in (("full", FULL), ("quick", QUICK)):
        for name, argv in demo_commands(settings, pack, tmp_path).items():
            run = f"{title}-{name}"
            add(run, [*argv, "--vocab-size", 96, "--eval-iters", 0], world_size=PROCESSES)
    assert faults_of(commands, tmp_path) == {}


@pytest.mark.slow
def test_the_commands_of_recipes_are_the_same_run(tmp_path: Path) -> None:
    """On packs of the recipes' row lengths, without the validation rows that they ask for."""
    corpus = tmp_path / "long"
    with contextlib.closing(IndexedWriter(f"{corpus}.bin", f"{corpus}.idx", 128)) as writer:
        for length in (12_000, 12_000, 2**17 + 12_000):  # the last fills a row of 128K
            writer.add(np.full(length, 7))
    recipes = {name: find_recipe(name) for name in RECIPES}
    packs = {
        rows: jobs.make_pack(corpus, "concat", f"rows-{rows}", row_tokens=rows, validation_fraction=0.0)
        for rows in {recipe.row_tokens for recipe in recipes.values()}
    }
    commands: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, pack: Path, world_size: int) -> None:
        words = ["--recipe", name, "--pack", pack, "--token-weighting", "exact", "--eval-iters", 0]
        commands[name] = lambda: start_and_resume(words, tmp_path / name, world_size=world_size)

    for name, recipe in recipes.items():
        add(name, packs[recipe.row_tokens], recipe.world_size)
    assert faults_of(commands, tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*PLAIN, "--num-query-groups", 2), "--num-query-groups 2 without --group-query-attention"),
        (
            ("--encoder-num-layers", 4, *PLAIN[2:]),
            "--encoder-num-layers 4 is not supported: the layers are counted by --num-layers",
        ),
    ],
)
def test_flags_that_hf_would_contradict_do_not_start(
    flags: tuple[Any, ...], message: str, pack: Path, tmp_path: Path
) -> None:
    """Started, it would be a model whose hf/ the same command would contradict."""
    words = ["--pack", pack, *flags, *STEPS]
    found = faults_of({"start": lambda: start_and_resume(words, tmp_path / "run")}, tmp_path)
    assert message in found["start"]


CHANGES: dict[str, tuple[tuple[Any, ...], dict[str, str]]] = {
    "its seed is": (("--seed", 5), {}),
    "--adam-beta2 0.999, the default (now 0.9)": (("--adam-beta2", 0.9), {}),
    "--decoupled-lr not set (now 0.01)": (("--decoupled-lr", 0.01), {}),
    "--start-weight-decay 0.01 (now 0.1)": (
        (
            *("--weight-decay-incr-style", "linear"),
            *("--start-weight-decay", 0.1, "--end-weight-decay", 0.5),
        ),
        {},
    ),
    "--init-method-std 0.02, the default (now 0.01)": (("--init-method-std", 0.01), {}),
    "--bf16 false, the default (now true)": (("--bf16",), {}),
    'NVTE_ALLOW_NONDETERMINISTIC_ALGO not set (now "0")': ((), {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}),
    'CUBLAS_WORKSPACE_CONFIG not set (now ":4096:8")': ((), {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
}
"""What is said -> flags and variables of the resumed job."""


def test_a_changed_command_is_another_run_and_is_told_by_its_flag(pack: Path, tmp_path: Path) -> None:
    """The negative control: what the commands above agree in is compared."""
    from megatron_exact.training.run_record import check_same_run

    def check(words: str) -> Callable[[], dict[str, Any]]:
        flags, variables = CHANGES[words]

        def start() -> dict[str, Any]:
            number = list(CHANGES).index(words)
            run = tmp_path / f"run{number}"
            record = start_and_resume(["--pack", pack, *MODELS["multi-head"]], run)
            with mock.patch.dict(os.environ, variables):
                other = tmp_path / f"other{number}"
                changed = start_and_resume(["--pack", pack, *MODELS["multi-head"], *flags], other)
            check_same_run(run, changed, is_resume=True)
            return record

        return start

    found = faults_of({words: check(words) for words in CHANGES}, tmp_path)
    assert set(found) == set(CHANGES)
    for words, message in found.items():
        assert words in message
        assert "\n" not in message


RECORDED: dict[tuple[Any, ...], dict[str, Any]] = {
    ("--no-load-optim",): {"no_load_optim": True},
    ("--no-load-rng",): {"no_load_rng": True},
    ("--override-opt_param-scheduler",): {"override_opt_param_scheduler": True},
    ("--train-iters", 9): {"train_iters": 9},
    ("--log-interval", 3, "--save-interval", 1, "--exit-interval", 5): {},
}


def test_what_a_resume_may_change_is_recorded(pack: Path, tmp_path: Path) -> None:
    """Flags of the resume alone, and what its entry in run.json says of them."""

    def check(flags: tuple[Any, ...]) -> Callable[[], dict[str, Any]]:
        def start() -> dict[str, Any]:
            run = tmp_path / str(flags[0])
            record = start_and_resume(["--pack", pack, *MODELS["multi-head"]], run, added=flags)
            (resume,) = record["resumes"]
            assert resume["changes"] == RECORDED[flags], resume["changes"]
            unchanged: dict[str, Any] = {"changes": {}, "schedule": 0, "layout": 0}
            return {"resumes": [unchanged], "schedule": 0, "layout": 0}

        return start

    assert faults_of({str(flags[0]): check(flags) for flags in RECORDED}, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi-head", "wide-heads", "wsd", "samples", "half-precision"])
def test_a_run_that_was_stopped_and_started_again_is_the_whole_run(
    name: str, pack: Path, tmp_path: Path
) -> None:
    """Plain Megatron models from random weights, by the identical command, to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def command(run: Path) -> list[Any]:
        words = ["--pack", pack, "--token-weighting", "exact", *WRITTEN[name]]
        return [*words, "--log-interval", 1, "--save", run, "--load", run]

    def kill_in_iteration_4() -> None:
        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.record_iteration

        def record(self: Any, iteration: int, **options: Any) -> Any:
            if iteration == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(self, iteration, **options)

        TrainingRun.record_iteration = record  # type: ignore[method-assign]

    ranks.train(1, command(whole), tmp_path / "o1").check()
    assert ranks.train(1, command(parts), tmp_path / "o2", kill_in_iteration_4).codes == [-signal.SIGKILL]
    ended = ranks.train(1, command(parts), tmp_path / "o3").check()
    assert "resuming from iter_0000002" in ended.outputs[0]
    assert (parts / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    record = json.loads((parts / "run.json").read_text())
    assert [resume["changes"] for resume in record["resumes"]] == [{}]
