"""What a command line is refused for before Megatron and torch are imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.training.flag_classes import (
    CONDITIONS,
    GivenFlags,
    flags_without_effect,
    megatron_flags_by_spelling,
    read_flags,
)
from megatron_exact.training.job import prepare_job
from megatron_exact.training.job_flags import default_eval_iters, describe_evaluations
from megatron_exact.training.memory_forecast import Cluster
from megatron_exact.training.preflight import examine, format_examination
from megatron_exact.training.refusals import check_pack_has_rows, length_of

MODEL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --vocab-size 32"
)
SCHEDULE = "--global-batch-size 2 --lr 1e-3 --train-iters 4"


def flags(words: str) -> GivenFlags:
    return read_flags(words.split())


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    writer = IndexedWriter(folder / "docs.bin", folder / "docs.idx", 32)
    for length in range(5, 45):
        writer.add(np.arange(length) % 32)
    writer.close()
    options = PackOptions(row_tokens=16, policy="concat", seed=1, validation_fraction=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the corpus has no tokenizer
        pack_corpora([str(folder / "docs")], folder / "pack", options)
    return folder / "pack"


REFUSED: tuple[tuple[str, str], ...] = (
    (SCHEDULE, r"^no model is given: .*--pretrained-checkpoint .* --preset .*--num-layers --hidden-size"),
    (f"{SCHEDULE} --num-layers 2 --hidden-size 8", r"^--num-attention-heads missing: .*--preset"),
    (f"{SCHEDULE} {MODEL.replace('--normalization RMSNorm', '')}", r"^--normalization RMSNorm is missing"),
    (
        f"{SCHEDULE} {MODEL} --normalization LayerNorm",
        r"^--normalization LayerNorm is not supported: .*RMSNorm",
    ),
    (
        f"{SCHEDULE} {MODEL} --hidden-size 15",
        r"^--hidden-size 15 does not divide by --num-attention-heads 2",
    ),
    (f"{SCHEDULE} {MODEL} --group-query-attention --num-query-groups 3", "does not divide by --num-query"),
    (f"{MODEL} --lr 1e-3", r"^--train-iters is missing: .*--train-samples"),
    (f"{MODEL} --lr 1e-3 --train-iters 0", r"^--train-iters 0 is not a whole number of 1 or more"),
    (f"{MODEL} --lr 1e-3 --train-iters -1", r"^--train-iters -1 is not a whole number of 1 or more"),
    (f"{MODEL} --lr 1e-3 --train-iters {'9' * 5000}", r"^--train-iters 9{40}\.\.\. \(5000 characters\)"),
    (f"{MODEL} {SCHEDULE} --train-samples 9", r"^--train-iters 4 and --train-samples 9 are two lengths"),
    (
        f"{MODEL} --lr 1 --train-samples 3 --global-batch-size 4",
        r"^--train-samples 3 is less than one batch of 4",
    ),
    (f"{MODEL} --train-iters 4", r"^--lr is missing"),
    (f"{MODEL} {SCHEDULE} --lr inf", r"^--lr inf is not a finite number of 0 or more"),
    (f"{MODEL} {SCHEDULE} --lr nan", r"^--lr nan is not a finite number"),
    (f"{MODEL} {SCHEDULE} --lr 1e38", r"^--lr 1e38 is not a learning rate"),
    (f"{MODEL} {SCHEDULE} --min-lr 1", r"^--min-lr 1 is above --lr 1e-3"),
    (
        f"{MODEL} {SCHEDULE} --lr-warmup-iters 4",
        r"^--lr-warmup-iters 4 is not shorter than --train-iters 4",
    ),
    (
        f"{MODEL} {SCHEDULE} --lr-warmup-iters=9",
        r"^--lr-warmup-iters 9 is not shorter than --train-iters 4",
    ),
    (
        f"{MODEL} {SCHEDULE} --lr-warmup-iters 3 --lr-decay-iters 3",
        "is not shorter than --lr-decay-iters 3",
    ),
    (f"{MODEL} {SCHEDULE} --lr-warmup-fraction 1", r"^--lr-warmup-fraction 1 is the whole run"),
    (f"{MODEL} {SCHEDULE} --lr-warmup-fraction .1 --lr-warmup-iters 1", "give one of them"),
    (f"{MODEL} {SCHEDULE} --lr-warmup-samples 8", r"^--lr-warmup-samples 8 beside --train-iters 4"),
    (
        f"{MODEL} --lr 1 --train-samples 8 --lr-wsd-decay-iters 2",
        r"^--lr-wsd-decay-iters 2 beside --train-samples",
    ),
    (f"{MODEL} {SCHEDULE} --lr-decay-style WSD", r"^--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (
        f"{MODEL} {SCHEDULE} --start-weight-decay 0.1",
        r"^--start-weight-decay 0.1 with a constant weight decay",
    ),
    (
        f"{MODEL} {SCHEDULE} --weight-decay-incr-style linear",
        "needs --start-weight-decay and --end-weight-decay",
    ),
    (f"{MODEL} {SCHEDULE} --adam-beta2 1", r"^--adam-beta2 1 is not below 1"),
    (f"{MODEL} {SCHEDULE} --adam-beta2 2", r"^--adam-beta2 2 is not a number from 0 to 1"),
    (f"{MODEL} {SCHEDULE} --clip-grad -1", r"^--clip-grad -1 is not a finite number of 0 or more"),
    (f"{MODEL} {SCHEDULE} --save runs/a", r"^--save runs/a needs --save-interval"),
    (f"{MODEL} {SCHEDULE} --log-interval 0", r"^--log-interval 0 is not a whole number of 1 or more"),
    (f"{MODEL} {SCHEDULE} --eval-iters 1000", r"^--eval-iters 1000 x --global-batch-size 2 asks for 2000"),
    (f"{MODEL} {SCHEDULE} --fp16 --bf16", r"^--fp16 and --bf16 are both given"),
    (f"{MODEL} {SCHEDULE} --profile", "add --use-pytorch-profiler"),
    (
        f"{MODEL} {SCHEDULE} --profile --use-pytorch-profiler --profile-step-start 12",
        "is not before --profile-st",
    ),
    (f"{MODEL} {SCHEDULE} --kv-channels 7", r"^heads of 7 channels cannot be rotated in pairs"),
    (f"{MODEL} {SCHEDULE} --ffn-hidden-size 1", r"^--ffn-hidden-size 1 is not a layer size"),
    (
        f"{MODEL} {SCHEDULE} --recompute-modules mlp layernorm",
        r"^--recompute-modules layernorm is not supported",
    ),
    (f"{MODEL} {SCHEDULE} --ddp-bucket-size 9 --ddp-num-buckets 2", "both decide the buckets"),
    (f"{MODEL} {SCHEDULE} --seed 99999999999", r"^--seed 99999999999 is too large"),
    (f"{MODEL} {SCHEDULE} --distributed-timeout-minutes 99999999", "is more than a year"),
    (f"{MODEL} {SCHEDULE} --exit-signal FOO", r"^--exit-signal FOO is not a signal"),
    (f"{MODEL} {SCHEDULE} --fp16 --initial-loss-scale 0", r"^--initial-loss-scale 0 is not above 0"),
    (f"{MODEL} {SCHEDULE} --fp16 --hysteresis 0", r"^--hysteresis 0 is not 1 or more"),
    (f"{MODEL} {SCHEDULE} --fp16 --min-loss-scale 1e300", r"^--min-loss-scale 1e\+300 is above"),
    (
        f"{MODEL} {SCHEDULE} --eval-iters 1 --start-eval-at-iter 5",
        r"^--start-eval-at-iter 5 is beyond the 4 iter",
    ),
    (
        f"{MODEL} {SCHEDULE} --optimizer sgd --use-distributed-optimizer",
        r"^--optimizer sgd with --use-distributed",
    ),
    (f"{MODEL} {SCHEDULE} --ckpt-step x", r"^--ckpt-step x is not a whole number of 0 or more"),
    (
        f"{MODEL} {SCHEDULE} --train-itrs 3",
        r"unrecognized arguments: --train-itrs 3 \(did you mean --train-iters",
    ),
    (f"{MODEL} {SCHEDULE} --exact-gama 3", r"did you mean --exact-gamma"),
    (f"{MODEL} {SCHEDULE} --lr", "argument --lr: expected one argument"),
    (
        f"{MODEL} {SCHEDULE} --exact-alpha x --token-weighting exact",
        "argument --exact-alpha: invalid float",
    ),
    (
        f"{MODEL} {SCHEDULE} --attention-backend local",
        r"^--attention-backend local is not supported: .*documents",
    ),
    (
        f"{MODEL} {SCHEDULE} --cuda-graph-impl local",
        r"^--cuda-graph-impl local is not supported: a CUDA graph .* boundaries of packed rows",
    ),
    (f"{MODEL} {SCHEDULE} --enable-cuda-graph", r"^--enable-cuda-graph is not supported: a CUDA graph"),
    (
        f"{MODEL} {SCHEDULE} --tp-comm-overlap",
        r"^--tp-comm-overlap is not supported: its buffers .* NVLink",
    ),
    (
        f"{MODEL} {SCHEDULE} --use-precision-aware-optimizer --exp-avg-dtype bf16",
        r"^--use-precision-aware-optimizer is not supported: .*states of Adam in fewer bits",
    ),
    (
        f"{MODEL} {SCHEDULE} --optimizer-cpu-offload",
        r"^--optimizer-cpu-offload is not supported: its states .* checkpoints",
    ),
    (
        f"{MODEL} {SCHEDULE} --bf16 --fp8-format hybrid",
        r"^--fp8-format hybrid needs --fp8-recipe: .*delayed",
    ),
    (
        f"{MODEL} {SCHEDULE} --bf16 --fp8-format hybrid --fp8-recipe delayed",
        r"^--fp8-recipe delayed is not supported: delayed .* pickle.*; choose tensorwise$",
    ),
    (
        f"{MODEL} {SCHEDULE} --bf16 --fp8-format e4m3 --fp8-recipe mxfp8",
        r"^--fp8-recipe mxfp8 is not supported: .*mxfp8 needs a B200",
    ),
    (
        f"{MODEL} {SCHEDULE} --bf16 --fp8-format e4m3 --fp8-recipe blockwise",
        r"^--fp8-recipe blockwise is not supported: .*blockwise could not be rehearsed",
    ),
    (
        f"{MODEL} {SCHEDULE} --fp8-param-gather",
        r"^--fp8-param-gather is not supported: weights stay in bf16",
    ),
    (f"{MODEL} {SCHEDULE} --fp8-output-proj", r"^--fp8-output-proj is not supported: the loss head"),
    (
        f"{MODEL} {SCHEDULE} --first-last-layers-bf16",
        r"^--first-last-layers-bf16 is not supported: .*all lay",
    ),
    (f"{MODEL} {SCHEDULE} --fp4-format e2m1", r"^--fp4-format e2m1 is not supported: an H100 does not"),
    (f"{MODEL} {SCHEDULE} --init-method-xavier-uniform", r"^--init-method-xavier-uniform is not supported"),
    (
        f"{MODEL} {SCHEDULE} --rope-type yarn",
        r"^--rope-type yarn is not supported: no supported model family",
    ),
    (f"{MODEL} {SCHEDULE} --ddp-average-in-collective", r"^--ddp-average-in-collective is not supported"),
    (f"{MODEL} {SCHEDULE} --config-logger-dir x", r"^--config-logger-dir x is not supported"),
    (f"{MODEL} {SCHEDULE} --optimizer muon", r"^--optimizer muon is not supported: .*choose adam or sgd"),
    (f"{MODEL} {SCHEDULE} --num-distributed-optimizer-instances 2", r"^--num-distributed-optimizer-inst"),
    (f"{MODEL} {SCHEDULE} --perform-rl-step", r"^--perform-rl-step is not supported: it belongs to rein"),
    (f"{MODEL} {SCHEDULE} --fault-injector-ranks 0", r"^--fault-injector-ranks 0 is not supported"),
    (f"{MODEL} {SCHEDULE} --cross-entropy-loss-fusion", r"^--cross-entropy-loss-fusion is not supported: "),
    (f"{MODEL} {SCHEDULE} --rampup-batch-size 2 2 16", r"^--rampup-batch-size 2 2 16 is not supported"),
    (
        f"{MODEL} {SCHEDULE} --freeze-all-layers --fp4-format e2m1",
        "freeze-all-layers .*; --fp4-format e2m1",
    ),
)


@pytest.mark.parametrize(("words", "complaint"), REFUSED)
def test_a_job_is_refused_in_one_line(words: str, complaint: str, pack: Path) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        prepare_job(["--pack", str(pack), *words.split()], choose_runtime=lambda _: ())
    assert "\n" not in str(refused.value)


def test_a_good_command_line_passes(pack: Path) -> None:
    """The control: the flags beside those that are refused above are good ones."""
    argv = ["--pack", str(pack), *MODEL.split(), *SCHEDULE.split(), "--lr-warmup-iters", "3"]
    job = prepare_job(argv, choose_runtime=lambda _: ())
    assert read_flags(job.argv).whole("--train-iters", 0) == 4
    argv = ["--pack", str(pack), *MODEL.split(), "--lr", "1", "--train-samples", "8"]
    assert prepare_job([*argv, "--lr-warmup-samples", "7"], choose_runtime=lambda _: ())


def test_a_check_of_the_masking_needs_no_schedule(pack: Path) -> None:
    words = ["--pack", str(pack), *MODEL.split()]
    prepare_job(words, choose_runtime=lambda _: (), trains=False)
    with pytest.raises(ValueError, match="--normalization LayerNorm"):
        prepare_job([*words, "--normalization", "LayerNorm"], choose_runtime=lambda _: (), trains=False)


def test_a_pack_without_rows_and_a_missing_pack(pack: Path, tmp_path: Path) -> None:
    manifest = read_manifest(pack)
    check_pack_has_rows(manifest)
    empty = replace(manifest.splits["train"], rows=0)
    with pytest.raises(
        ValueError, match="train split has no rows of 16 tokens: pack more text, or shorter"
    ):
        check_pack_has_rows(replace(manifest, splits={**manifest.splits, "train": empty}))
    words = [*MODEL.split(), *SCHEDULE.split()]
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        prepare_job(["--pack", str(tmp_path), *words], choose_runtime=lambda _: ())


PROBE = """
import sys
from megatron_exact.training import pretrain
code = pretrain.main(sys.argv[1:])
assert "torch" not in sys.modules and "megatron.core" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_needs_neither_torch_nor_megatron(rank: int, pack: Path, tmp_path: Path) -> None:
    """Rank 0 says it at once, in one line, and torchrun is told; another rank says its number."""
    told = tmp_path / "error.json"
    environment = {**os.environ, "RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(told)}
    words = [sys.executable, "-c", PROBE, "--pack", str(pack), *MODEL.split(), "--lr", "1"]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        "error: --train-iters is missing" if rank == 0 else "error: rank 1: --train-iters"
    )
    assert "--train-iters is missing" in json.loads(told.read_text())["message"]["message"]


def test_preflight_refuses_what_training_refuses(pack: Path) -> None:
    """The same reading: a run that cannot start never passes."""
    for words in (f"{MODEL} --lr 1", SCHEDULE, f"{MODEL} --lr 1 --train-samples 1 --global-batch-size 2"):
        found = examine(["--pack", str(pack), *words.split()], Cluster(world_size=1))
        assert not found.passed
        assert "can start and fits" not in format_examination(found)


@pytest.mark.parametrize(
    ("words", "rows", "expected"),
    [
        ("--train-iters 4 --global-batch-size 2", 100, 1),  # a tenth of a short run, but at least one
        ("--train-iters 300 --global-batch-size 2", 1000, 30),
        ("--train-iters 5000 --global-batch-size 2", 1000, 100),
        ("--train-iters 5000 --global-batch-size 2 --eval-interval 200", 1000, 20),
        ("--train-samples 600 --global-batch-size 2", 1000, 30),
        ("--train-iters 5000 --global-batch-size 2", 7, 3),  # no more rows than there are
        ("--train-iters 4 --global-batch-size 8", 7, 0),
    ],
)
def test_the_default_evaluation_costs_little(words: str, rows: int, expected: int) -> None:
    manifest = _manifest(rows)
    given = read_flags(words.split())
    assert default_eval_iters(given, manifest) == expected
    job = read_flags([*words.split(), "--eval-iters", str(expected)])
    length = length_of(job)
    line = describe_evaluations(job, length, manifest)
    if not expected:
        assert line == "no evaluation: the pack has fewer validation rows than a batch"
        return
    share = re.search(r"about ([\d.]+)% of the time", line)
    assert share is not None
    assert float(share[1]) <= 8.4  # one evaluation iteration of four training iterations is the dearest


def test_the_cost_of_an_evaluation_is_counted() -> None:
    """Evaluations after 200 and 400 iterations and at the end, forward alone: a third of a step each."""
    job = flags("--train-iters 500 --global-batch-size 2 --eval-interval 200 --eval-iters 50")
    line = describe_evaluations(job, length_of(job), _manifest(1000))
    assert line.startswith(
        "evaluation: 3 x 100 validation rows (every 200 iterations and at the end), about 10.0%"
    )
    late = flags(
        "--train-iters 400 --global-batch-size 2 --eval-interval 200 --eval-iters 50 "
        "--start-eval-at-iter 300"
    )
    assert "evaluation: 1 x 100" in describe_evaluations(late, length_of(late), _manifest(1000))
    off = flags("--train-iters 500 --eval-iters 0")
    assert describe_evaluations(off, length_of(off), _manifest(1000)) == "no evaluation: --eval-iters 0"


def _manifest(validation_rows: int) -> Any:
    class Split:
        rows = validation_rows

    class Manifest:
        splits = {"validation": Split()}  # noqa: RUF012

    return Manifest()


def test_a_resumed_run_keeps_its_evaluation(tmp_path: Path) -> None:
    """A longer run would have another default; every evaluation of a run reads the same rows."""
    from megatron_exact.training.job import _recorded_eval_iters

    assert _recorded_eval_iters(None) is None
    assert _recorded_eval_iters(tmp_path) is None
    (tmp_path / "run.json").write_text(json.dumps({"schedule": {"eval_iters": 7}}))
    assert _recorded_eval_iters(tmp_path) == 7


def test_the_cpu_runtime_has_no_gpus_libraries(pack: Path) -> None:
    words = ["--pack", str(pack), *MODEL.split(), *SCHEDULE.split()]
    runtime = ("--distributed-backend", "gloo", "--transformer-impl", "local")
    for flag, word in (("--distributed-backend", "nccl"), ("--transformer-impl", "transformer_engine")):
        with pytest.raises(ValueError, match=f"^{flag} {word} needs a GPU"):
            prepare_job([*words, flag, word], choose_runtime=lambda _: runtime)
        prepare_job([*words, flag, word], choose_runtime=lambda _: ())


def test_conditions_name_supported_flags() -> None:
    table = megatron_flags_by_spelling()
    for (words, _), flags in CONDITIONS:
        assert words
        for word in flags.split():
            assert table[f"--{word}"].kind == "supported", word


def test_what_has_no_effect_is_said_of_the_users_flags_alone() -> None:
    job = flags("--adam-beta1 .9 --optimizer sgd --use-mcore-models --min-lr 0 --lr-decay-style cosine")
    said = flags_without_effect(job, job)
    assert said == [
        "--use-mcore-models (Megatron itself does not read it any more)",
        "--adam-beta1 .9 (needs --optimizer adam)",
    ]
    assert flags_without_effect(read_flags(["--min-lr", "0"]), job) == []
