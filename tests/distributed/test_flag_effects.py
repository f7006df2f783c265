"""Every flag of Megatron that the table calls supported changes what its name says, one run a flag.

A run of one layer and two iterations takes about half a second. With each flag it is compared with the same
run without it, in one aspect: the losses, or what the flag is for (checkpoints, records, communication,
kernels that a CPU does not have: there the configuration of the model that would be built). Flags that
other tests show (layouts, resumes, signals) name those tests in the table instead. A third of the rows runs
in `make test`, all of them in `make test-slow`.
"""

from __future__ import annotations

import dataclasses
import gc
import gzip
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from megatron_exact.training.flag_classes import (
    CONDITIONS,
    EFFECTS,
    INERT,
    megatron_flags_by_spelling,
)
from tests.distributed import jobs, ranks

BASE = (
    *("--num-layers", 1, "--hidden-size", 16, "--ffn-hidden-size", 32, "--num-attention-heads", 2),
    *("--group-query-attention", "--num-query-groups", 1, "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--position-embedding-type", "rope", "--vocab-size", jobs.VOCABULARY),
    *("--global-batch-size", 4, "--micro-batch-size", 2, "--lr", "1e-2", "--log-interval", 1),
    *("--lr-decay-style", "constant", "--eval-iters", 0, "--save-interval", 2),
)


class Effect(NamedTuple):
    """With `flags` a run is another one than without, in `aspect`."""

    flags: str
    """The flag under test and its value."""
    aspect: str = "losses"
    """What is compared: a key of what `look_at` returns."""
    beside: str = ""
    """Flags of both runs."""
    world: int = 1
    """Ranks."""
    without: str = ""
    """Flags of the other run alone."""


PP2 = "--pipeline-model-parallel-size 2 --num-layers 4"
VPP = "--pipeline-model-parallel-size 4 --num-layers 8 --num-layers-per-virtual-pipeline-stage 1"
EVAL = "--eval-iters 1 --eval-interval 1"
STEPS = "--lr-decay-style linear --train-iters 4"
WSD = "--lr-decay-style WSD --train-iters 4"
RISING = "--weight-decay-incr-style linear --end-weight-decay 0.6 --train-iters 4"
SAMPLES = "--train-samples 16 --lr-decay-style linear"
PROFILE = "--use-pytorch-profiler --profile-step-start 0"
LOADED = "--load CHAIN --train-iters 4"
NAMED = "--wandb-project p --wandb-exp-name n"
RAW = "KERNELS"
"""The CPU runtime leaves out what switches kernels off."""
LATE = "LATE"
"""The job believes that it began an hour ago."""

ROWS: tuple[Effect, ...] = (
    # the model
    Effect("--max-position-embeddings 128", "parameters", "--position-embedding-type learned_absolute"),
    Effect("--kv-channels 16", "parameters"),
    Effect("--norm-epsilon 1e-2"),
    Effect("--add-qkv-bias", "parameters"),
    Effect("--qk-layernorm", "parameters"),
    Effect("--position-embedding-type none"),
    Effect("--position-embedding-type learned_absolute"),
    Effect("--use-rotary-position-embeddings", beside="--position-embedding-type none"),
    Effect("--rotary-base 100"),
    Effect("--rotary-percent 0.5", beside="--kv-channels 16"),
    Effect("--no-rope-freq 1"),
    Effect("--use-rope-scaling"),
    Effect("--rope-scaling-factor 32", beside="--use-rope-scaling --rotary-base 1000000"),
    Effect("--untie-embeddings-and-output-weights", "parameters"),
    Effect("--embedding-init-method-std 0.1"),
    Effect("--hidden-dropout 0.1"),
    Effect("--seed 7"),
    # the layout
    Effect("--decoder-last-pipeline-num-layers 1", "parameters", PP2, 2),
    Effect(
        "--account-for-embedding-in-pipeline-split",
        "parameters",
        "--pipeline-model-parallel-size 2 --num-layers 3",
        2,
        "--account-for-loss-in-pipeline-split",
    ),
    Effect(
        "--account-for-loss-in-pipeline-split",
        "parameters",
        "--pipeline-model-parallel-size 2 --num-layers 3",
        2,
        "--account-for-embedding-in-pipeline-split",
    ),
    Effect(
        "--microbatch-group-size-per-virtual-pipeline-stage 8", "config", f"{VPP} --global-batch-size 16", 4
    ),
    Effect("--no-overlap-p2p-communication", "config", f"{VPP} --global-batch-size 16", 4),
    Effect("--ddp-num-buckets 2", "buckets", "--overlap-grad-reduce"),
    Effect("--recompute-activations", "config"),
    Effect("--recompute-modules mlp", "config", "--recompute-granularity selective"),
    # number types
    Effect("--fp16"),
    Effect("--loss-scale 2", "scaler", "--fp16"),
    Effect("--initial-loss-scale 1024", "scaler", "--fp16"),
    Effect("--min-loss-scale 4", "scaler", "--fp16"),
    Effect("--loss-scale-window 1", "scaler", "--fp16"),
    Effect("--hysteresis 1", "scaler", "--fp16"),
    Effect("--grad-reduce-in-bf16", beside="--bf16"),
    Effect("--accumulate-allreduce-grads-in-fp32", "ddp", "--fp16"),
    # the optimizer and its schedule
    Effect("--optimizer sgd"),
    Effect("--sgd-momentum 0.1", beside="--optimizer sgd --train-iters 3"),
    Effect("--weight-decay 0.5"),
    Effect("--clip-grad 0.01"),
    Effect("--adam-beta1 0.5"),
    Effect("--adam-beta2 0.5"),
    Effect("--start-weight-decay 0.3", beside=RISING, without="--start-weight-decay 0.1"),
    Effect("--end-weight-decay 0.9", beside=f"{RISING} --start-weight-decay 0.1"),
    Effect("--weight-decay-incr-style cosine", beside=f"{RISING} --start-weight-decay 0.1"),
    Effect("--iterations-to-skip 2"),
    Effect("--min-lr 5e-3", beside=STEPS),
    Effect("--decoupled-lr 1e-1"),
    Effect("--decoupled-min-lr 5e-2", beside=f"--decoupled-lr 1e-1 {STEPS}"),
    Effect("--lr-decay-style linear"),
    Effect("--lr-wsd-decay-style linear", beside=f"{WSD} --lr-wsd-decay-iters 3"),
    Effect("--lr-wsd-decay-iters 3", beside=WSD, without="--lr-wsd-decay-iters 1"),
    Effect(
        "--lr-wsd-decay-samples 12",
        beside="--lr-decay-style WSD --train-samples 16",
        without="--lr-wsd-decay-samples 4",
    ),
    Effect("--lr-decay-iters 9", beside=STEPS),
    Effect("--lr-decay-samples 40", beside=SAMPLES),
    Effect("--lr-warmup-fraction 0.5", beside=STEPS),
    Effect("--lr-warmup-iters 2", beside=STEPS),
    Effect("--lr-warmup-samples 8", beside=SAMPLES),
    Effect("--lr-warmup-init 5e-3", beside=f"{STEPS} --lr-warmup-iters 2"),
    Effect(
        "--override-opt_param-scheduler",
        beside=f"{LOADED} --lr-decay-style linear",
        without="--use-checkpoint-opt_param-scheduler",
    ),
    Effect(
        "--use-checkpoint-opt_param-scheduler",
        beside=f"{LOADED} --lr-decay-style linear",
        without="--override-opt_param-scheduler",
    ),
    # the length of the job
    Effect("--train-samples 12", without="--train-samples 8"),
    Effect("--exit-interval 1"),
    Effect("--exit-duration-in-mins 1", beside=LATE),
    Effect("--manual-gc", "collections"),
    Effect("--manual-gc-interval 1", "collections", "--manual-gc"),
    Effect("--no-manual-gc-eval", "collections", f"--manual-gc {EVAL}"),
    Effect("--empty-unused-memory-level 2", "emptied"),
    # checkpoints
    Effect("--ckpt-step 1", beside=LOADED),
    Effect("--no-load-rng", beside=f"{LOADED} --hidden-dropout 0.5"),
    Effect("--no-save-optim", "stored"),
    Effect("--no-save-rng", "stored"),
    Effect("--no-ckpt-fully-parallel-save", "stored", world=2),
    Effect("--ckpt-fully-parallel-load", "parallel_loads", LOADED, 2),
    # records and logs
    Effect("--log-params-norm", "console"),
    Effect("--log-num-zeros-in-grad", "console"),
    Effect("--timing-log-level 1", "timers"),
    Effect("--timing-log-option all", "timers", "--timing-log-level 2"),
    Effect("--tensorboard-dir OTHER", "files"),
    Effect("--tensorboard-log-interval 2", "points"),
    Effect("--log-timers-to-tensorboard", "points", "--timing-log-level 2"),
    Effect("--no-log-loss-scale-to-tensorboard", "points"),
    Effect("--log-validation-ppl-to-tensorboard", "points", EVAL),
    Effect("--log-world-size-to-tensorboard", "points"),
    Effect("--log-progress", "files"),
    Effect("--wandb-project p", "wandb", "--wandb-exp-name n"),
    Effect("--wandb-exp-name m", "wandb", NAMED),
    Effect("--wandb-save-dir OTHER", "wandb", NAMED),
    Effect("--wandb-entity e", "wandb", NAMED),
    Effect("--profile --use-pytorch-profiler", "traces", "--profile-step-start 0 --profile-step-end 1"),
    Effect("--profile-step-start 1", "traces", f"--profile {PROFILE} --profile-step-end 2"),
    Effect("--profile-step-end 2", "traces", f"--profile {PROFILE} --profile-step-end 1"),
    Effect("--profile-ranks 1", "traces", f"--profile {PROFILE} --profile-step-end 1"),
    Effect("--pytorch-profiler-collect-shapes", "traces", f"--profile {PROFILE} --profile-step-end 1"),
    Effect("--pytorch-profiler-collect-callstack", "traces", f"--profile {PROFILE} --profile-step-end 1"),
    # evaluations
    Effect("--eval-interval 1", "evaluations", "--eval-iters 1"),
    Effect("--start-eval-at-iter 2", "evaluations", EVAL),
    # the machine
    Effect("--distributed-backend gloo", "group", RAW),
    Effect("--distributed-timeout-minutes 5", "group"),
    Effect("--transformer-impl local", "config", RAW),
    Effect("--attention-backend flash", "environment"),
    Effect("--num-workers 1", "loader"),
    Effect("--no-gradient-accumulation-fusion", "config", RAW),
    Effect("--no-rope-fusion", "config"),
    Effect("--no-bias-swiglu-fusion", "config"),
    Effect("--no-bias-dropout-fusion", "config", RAW),
    Effect("--use-cpu-initialization", "config", RAW),
)


def seen_by_job(aspect: str, markers: set[str], world: int, found: Path) -> Callable[[], None]:
    """What a rank does first: keep what the job does, and write it beside `found` when it ends.

    For the aspects `config` and `group` the job ends before anything is trained.
    """

    def watch() -> None:
        import megatron.training.training as driver
        from megatron.core.dist_checkpointing.strategies import fully_parallel
        from megatron.core.timers import Timers
        from torch.utils import data, tensorboard

        from megatron_exact.training import cpu_runtime, pretrain

        seen: dict[str, Any] = {
            "points": [],
            "wandb": [],
            "loader": [],
            "collections": [],
            "timers": [],
            "parallel_loads": 0,
        }
        rank = os.environ["RANK"]

        def write() -> None:
            seen["environment"] = {key: os.environ[key] for key in os.environ if key.startswith("NVTE")}
            found.with_suffix(f".{rank}.json").write_text(json.dumps(seen, default=repr, sort_keys=True))

        def end() -> None:
            write()
            os._exit(0)

        def keep(owner: Any, name: str, note: Callable[..., None], *, before: bool = True) -> None:
            stock = getattr(owner, name)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if before:
                    note(*args, **kwargs)
                    return stock(*args, **kwargs)
                result = stock(*args, **kwargs)
                note(result)
                return result

            setattr(owner, name, wrapped)

        def note_built(built: Any) -> None:
            model, optimizer, _ = built
            seen["parameters"] = [
                [name, list(value.shape)] for chunk in model for name, value in chunk.named_parameters()
            ]
            seen["ddp"] = repr(model[0].ddp_config)
            seen["buckets"] = [len(buffer.buckets) for buffer in model[0].buffers]
            scalers = [getattr(one, "grad_scaler", None) for one in optimizer.chained_optimizers]
            seen["scaler"] = [repr(sorted(vars(one).items())) for one in scalers if one is not None]

        def note_assembled(job: Any, args: Any, config: Any, *_: Any) -> None:
            fields = dataclasses.fields(config.transformer)
            seen["config"] = {field.name: repr(getattr(config.transformer, field.name)) for field in fields}
            seen["config"] = {
                key: re.sub("0x[0-9a-f]+", "", value) for key, value in seen["config"].items()
            }
            if aspect == "config":
                end()
            if LATE in markers:
                driver._TRAIN_START_TIME -= 3600

        def note_group(*args: Any, **kwargs: Any) -> None:
            seen["group"] = [kwargs.get("backend"), str(kwargs.get("timeout"))]
            if aspect == "group":
                end()

        def note_timers(text: str | None) -> None:
            seen["timers"] += re.sub(r"[\d.]+", "#", text or "").split("\n")

        def count(name: str) -> Callable[..., None]:
            def add(*_: Any, **__: Any) -> None:
                seen[name] = seen.get(name, 0) + 1

            return add

        keep(pretrain, "assemble", note_assembled)
        keep(
            pretrain,
            "assemble",
            lambda _: keep(driver, "setup_model_and_optimizer", note_built, before=False),
            before=False,
        )
        keep(torch.distributed, "init_process_group", note_group)
        keep(
            tensorboard.SummaryWriter,
            "add_scalar",
            lambda _, tag, value, step: seen["points"].append([tag, step]),
        )
        keep(data.DataLoader, "__init__", lambda *_, **kw: seen["loader"].append(kw.get("num_workers")))
        keep(fully_parallel.FullyParallelLoadStrategyWrapper, "__init__", count("parallel_loads"))
        for name in ("collect", "disable"):
            keep(gc, name, lambda *_, name=name, **__: seen["collections"].append(name))
        keep(torch.cuda, "empty_cache", count("emptied"))
        keep(Timers, "get_all_timers_string", note_timers, before=False)
        sys.modules["wandb"] = fake_wandb(seen["wandb"])
        if RAW in markers:  # what only a GPU has is not switched off
            cpu_runtime.CPU_ARGUMENTS = ("--log-interval", "1")
        if aspect == "config":
            os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        stock_main = pretrain.main

        def main(argv: list[str]) -> int:
            try:
                return stock_main(argv)
            finally:
                write()

        pretrain.main = main  # type: ignore[assignment]

    return watch


def fake_wandb(calls: list[Any]) -> types.ModuleType:
    """A `wandb` that keeps what it is started with."""
    module = types.ModuleType("wandb")

    def init(**kwargs: Any) -> Any:
        calls.append({key: str(value) for key, value in kwargs.items() if key != "config"})
        return module

    module.init = init  # type: ignore[attr-defined]
    module.run = mock.MagicMock(id="1")  # type: ignore[attr-defined]
    module.__getattr__ = lambda name: mock.MagicMock()  # type: ignore[method-assign]
    return module


class Runs:
    """Runs of the small model, each made once.

    Args:
        pack: what they train on.
        folder: receives a folder a run.
    """

    def __init__(self, pack: Path, folder: Path) -> None:
        self.pack, self.folder = pack, folder
        self._seen: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._chain: Path | None = None
        self._numbers = itertools.count()

    def chain(self) -> Path:
        """Checkpoints of iterations 1 and 2, with random states that dropout has used."""
        if self._chain is None:
            self._chain = self.folder / "chain"
            flags = ("--save", self._chain, "--save-interval", 1, "--hidden-dropout", 0.5)
            ranks.train(1, self._argv(*flags), self.folder / "chain-output").check()
        return self._chain

    def look_at(self, flags: str, aspect: str, world: int) -> dict[str, Any]:
        """What is seen of a run; `aspect` decides how far it goes."""
        key = (flags, aspect if aspect in ("config", "group") else "", world)
        if key not in self._seen:
            self._seen[key] = self._run(*key)
        return self._seen[key]

    def _argv(self, *flags: Any) -> list[Any]:
        length = () if "--train-samples" in flags else ("--train-iters", 2)
        return ["--pack", self.pack, "--token-weighting", "exact", *BASE, *length, *flags]

    def _run(self, flags: str, aspect: str, world: int) -> dict[str, Any]:
        folder = self.folder / str(next(self._numbers))
        markers = {word for word in flags.split() if word in (RAW, LATE)}
        if "CHAIN" in flags:
            flags = flags.replace("CHAIN", str(self.chain()))
        words = [
            word for word in flags.replace("OTHER", str(folder / "other")).split() if word not in markers
        ]
        argv = self._argv("--save", folder / "run", *words)
        found = folder / "seen"
        processes = 1 if aspect == "config" else world
        watch = seen_by_job(aspect, markers, world, found)
        ended = ranks.train(processes, argv, folder / "output", watch).check()
        seen = [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(processes)]
        return {
            **{name: [one.get(name) for one in seen] for name in set().union(*seen)},
            **_left_behind(folder),
            "console": [_shape_of(output) for output in ended.outputs],
            "said": ended.outputs[0],
        }


def _left_behind(folder: Path) -> dict[str, Any]:
    """Records, checkpoints and traces of a run."""
    run = folder / "run"
    losses = run / "losses.jsonl"
    evaluations = run / "evaluations.jsonl"
    files = {re.sub(r"tfevents.*", "tfevents", str(path.relative_to(folder))) for path in folder.rglob("*")}
    traces = [gzip.decompress(path.read_bytes()).decode() for path in sorted(run.glob("torch_profile/*"))]
    return {
        "losses": losses.read_text() if losses.exists() else None,
        "evaluations": len(evaluations.read_text().splitlines()) if evaluations.exists() else 0,
        "files": sorted(
            name for name in files if not name.startswith(("output", "seen", "run/torch_profile"))
        ),
        "stored": {path.name: _keys(path) for path in sorted(run.glob("iter_*"))},
        "traces": [
            (
                len(set(re.findall(r"ProfilerStep#\d+", text))),
                "Input Dims" in text or '"record_shapes": 1' in text,
                "python_function" in text,
            )
            for text in traces
        ],
    }


def _keys(checkpoint: Path) -> list[str]:
    """Kinds of states in a checkpoint, and the ranks that wrote them."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(checkpoint).read_metadata()
    kinds = {
        "optimizer" if "exp_avg" in name else name.split("/")[0] for name in metadata.state_dict_metadata
    }
    return sorted(kinds) + sorted(path.name for path in checkpoint.glob("*.distcp"))


def _shape_of(output: str) -> list[str]:
    """Lines of Megatron's log without numbers, without the dump of all arguments and our own lines."""
    lines = {re.sub(r"[-+]?[\d.]+(e[-+]?\d+|E[-+]?\d+)?", "#", line) for line in output.splitlines()}
    return sorted(line for line in lines if re.search(r" iteration +#/", line))


@pytest.fixture(scope="module")
def runs(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pack, tmp_path_factory.mktemp("effects"))


def rows() -> list[Any]:
    """The table as parameters; two of three are slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(row, id=f"{row.flags} {row.beside}".strip(), marks=[slow] if number % 3 else [])
        for number, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("row", rows())
def test_a_supported_flag_has_its_effect(row: Effect, runs: Runs) -> None:
    with_it = runs.look_at(f"{row.beside} {row.flags}".strip(), row.aspect, row.world)
    without = runs.look_at(f"{row.beside} {row.without}".strip(), row.aspect, row.world)
    assert with_it.get(row.aspect) != without.get(row.aspect), row.aspect
    assert with_it.get(row.aspect) is not None
    idle = re.search("without effect here: .*", with_it["said"])
    assert idle is None or re.search("needs (a GPU|Transformer Engine)", idle[0])


def test_two_equal_runs_differ_in_nothing(runs: Runs) -> None:
    """The negative control: no aspect differs by chance."""
    first, second = (runs._run("--eval-iters 1 --log-params-norm", "", 1) for _ in range(2))
    aspects = {row.aspect for row in ROWS} - {"config", "group"}
    assert aspects <= set(first)
    for aspect in aspects:
        assert first[aspect] == second[aspect], aspect


def test_every_flag_that_the_table_says_is_shown_here() -> None:
    shown = {word for row in ROWS for word in row.flags.split() if word.startswith("--")}
    table = megatron_flags_by_spelling()
    missing = {flag.name for flag in table.values() if flag.why == EFFECTS} - {
        table[word].name for word in shown
    }
    assert not missing


INERT_VALUES = {
    **{"--tokenizer-type": "NullTokenizer", "--dist-ckpt-strictness": "raise_all"},
    **{"--async-strategy": "mcore", "--tiktoken-pattern": "v2", "--num-dataset-builder-threads": "1"},
    **{"--mid-level-dataset-surplus": "0.1", "--make-vocab-size-divisible-by": "1", "--onnx-safe": "1"},
    **{
        "--tiktoken-num-special-tokens": "7",
        "--null-tokenizer-eod-id": "7",
        "--null-tokenizer-pad-id": "7",
    },
}
"""Values that Megatron's parser takes; any text for the others."""


def test_inert_flags_change_nothing_and_are_said(runs: Runs) -> None:
    names = [
        f"--{word.partition('=')[0].partition('/')[0]}" for _, words in INERT for word in words.split()
    ]
    table = megatron_flags_by_spelling()
    words = " ".join(
        name if table[name].nargs == 0 else f"{name} {INERT_VALUES.get(name, 'x')}" for name in names
    )
    seen = runs.look_at(words, "losses", 1)
    assert seen["losses"] == runs.look_at("", "losses", 1)["losses"]
    (line,) = (line for line in seen["said"].splitlines() if "without effect here" in line)
    assert all(f"{name} " in line for name in names)


def test_flags_whose_condition_does_not_hold_change_nothing_and_are_said(runs: Runs) -> None:
    """Those that may be given together; the others are refused or shown above."""
    words = (
        "--sgd-momentum 0.5 --initial-loss-scale 2 --min-loss-scale 2 --loss-scale-window 2 --hysteresis 3 "
        "--accumulate-allreduce-grads-in-fp32 --loss-scale 2 --grad-reduce-in-bf16 --min-lr 1e-3 "
        "--decoupled-min-lr 1e-3 --lr-decay-iters 7 --lr-wsd-decay-style linear --lr-wsd-decay-iters 1 "
        "--lr-warmup-init 1e-3 --rope-scaling-factor 32 --recompute-num-layers 1 --eval-interval 1 "
        "--start-eval-at-iter 1 --manual-gc-interval 1 --no-manual-gc-eval --exit-signal SIGUSR1 "
        "--timing-log-option all --wandb-exp-name n --wandb-save-dir d --wandb-entity e "
        "--profile-step-start 0 --profile-step-end 1 --profile-ranks 0 --sequence-parallel "
        "--microbatch-group-size-per-virtual-pipeline-stage 2 --no-overlap-p2p-communication "
        "--ddp-bucket-size 100 --attention-backend flash --no-gradient-accumulation-fusion "
        "--no-bias-dropout-fusion --empty-unused-memory-level 1 --use-cpu-initialization --no-load-optim "
        "--no-load-rng --ckpt-fully-parallel-load --override-opt_param-scheduler"
    )
    seen = runs.look_at(words, "losses", 1)
    assert seen["losses"] == runs.look_at("", "losses", 1)["losses"]
    (line,) = (line for line in seen["said"].splitlines() if "without effect here" in line)
    names = [word for word in words.split() if word.startswith("--")]
    assert [name for name in names if f"{name} " not in line] == []
    assert set(names) <= {f"--{word}" for _, flags in CONDITIONS for word in flags.split()}
