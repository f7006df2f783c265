"""`run.json`, the record of a run: its content, how it is written, and the comparison at a resume.

Which settings may differ, at a resume and between arms, stands in `lineage.py`.
"""

from __future__ import annotations

import argparse
import enum
import functools
import json
import math
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_exact
from megatron_exact import lineage
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.score_files import read_record
from megatron_exact.exposure import Weighting
from megatron_exact.files import write_json
from megatron_exact.json_input import read_json_object
from megatron_exact.model.shapes import num_query_groups_of
from megatron_exact.training.arguments import build_parser
from megatron_exact.training.qk_timing import qk_timing_record

RUN_RECORD = "run.json"
LOSSES = "losses.jsonl"
EVALUATIONS = "evaluations.jsonl"
ROWS = "rows.jsonl"
SPIKES = "spikes.jsonl"
THROUGHPUT = "throughput.jsonl"
LAYOUT_ARGUMENTS = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "data_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "use_distributed_optimizer",
    "recompute_granularity",
    "transformer_impl",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "recompute_method",
    "recompute_num_layers",
    "attention_backend",
)
OUR_LAYOUT_ARGUMENTS = ("loss_head", "loss_head_tokens", "loss_head_columns", "separate_qkv")
SCHEDULE_ARGUMENTS = (
    "global_batch_size",
    "train_iters",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_decay_iters",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "clip_grad",
    "adam_eps",
    "optimizer",
    "bf16",
    "fp16",
    "fp8",
    "finetune",
    "train_samples",
    "lr_warmup_fraction",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "attention_dropout",
    "hidden_dropout",
    "eval_iters",
    "eval_interval",
)
OUR_SCHEDULE_ARGUMENTS = ("carry_optimizer",)
MODEL_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "normalization",
    "layernorm_epsilon",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
)
MUST_AGREE = ("fingerprint", "weighting", "seed", "model")
"""Entries that a resume may not change, beside the configuration."""
MAY_CHANGE = ("layout", "schedule", "versions", "git_commit")
"""Entries that each resume records again."""
DERIVED_ARGUMENTS = ("world_size", "data_parallel_size")
"""Parts of the configuration that torchrun decides instead of flags."""


def describe_run(
    args: Any,
    weighting: Weighting,
    manifest: Manifest,
    *,
    model_changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return run.json for the beginning of a run; the start checkpoint is entered once it is verified.

    Args:
        args: Megatron's validated namespace.
        weighting: the weighting of the run.
        manifest: the manifest of the pack.
        model_changes: what the run changes of the model that it starts from (`JobModel.changes`).
    """
    folder = args.confidence_scores
    scores = {} if folder is None else {"scores": read_record(folder).identity()}
    return {
        "fingerprint": manifest.fingerprint,
        "pack": str(args.pack),
        "corpora": [
            {"name": Path(source.prefix).name, "licence": source.licence} for source in manifest.sources
        ],
        "row_tokens": weighting.row_tokens,
        "supervision": supervision_of(manifest),
        "weighting": {**weighting.describe(), **scores},
        "start_checkpoint": None,
        "seed": args.seed,
        # The same for a start from flags and a resume from `hf/` of the run
        "model": {
            **_pick(args, MODEL_ARGUMENTS),
            "num_query_groups": num_query_groups_of(args),
            **_yarn(args),
        },
        **({"model_changes": model_changes} if model_changes else {}),
        "schedule": {
            **_pick(args, SCHEDULE_ARGUMENTS + OUR_SCHEDULE_ARGUMENTS),
            "qk_timing": qk_timing_record(args),
        },
        "layout": _pick(args, LAYOUT_ARGUMENTS + OUR_LAYOUT_ARGUMENTS),
        **_whole_configuration(args),
        "versions": _versions(),
        "git_commit": git_commit(),
        "resumes": [],
    }


def _yarn(args: Any) -> dict[str, Any]:
    """Return the entry of a model with YaRN; records of other models have none, as before it existed."""
    scaling = getattr(args, "yarn", None)
    return {} if scaling is None else {"yarn": scaling}


def _whole_configuration(args: Any) -> dict[str, Any]:
    """Return every setting that differs from its default: three entries of run.json.

    The values are those of Megatron's validated namespace, so a flag that validation overrides or implies
    is recorded as it is in force. Paths stand apart under `places`, which exported models do not carry.
    """
    defaults = {name: _plain(action.default) for name, action in _flags().items()}
    found = {name: _plain(getattr(args, name, None)) for name in (*defaults, *DERIVED_ARGUMENTS)}
    # a resume reads the model from hf/, which always says how many groups there are
    found["num_query_groups"] = num_query_groups_of(args)
    found["group_query_attention"] = found["num_query_groups"] != args.num_attention_heads
    changed = {name: found[name] for name in sorted(found) if found[name] != defaults.get(name)}
    return {
        "configuration": {name: value for name, value in changed.items() if not lineage.is_place(name)},
        "environment": _environment(),
        "places": {name: value for name, value in changed.items() if lineage.is_place(name)},
    }


def _environment() -> dict[str, str]:
    """Return the environment variables that can change numbers, and torch's threads on a CPU."""
    import torch  # not with the module: plans of stages read records without it

    from megatron_exact.training.runtime import cpu_runtime_is_active

    found = {name: os.environ[name] for name in sorted(os.environ) if lineage.can_change_numbers(name)}
    if cpu_runtime_is_active():
        found["CPU_THREADS"] = str(torch.get_num_threads())
    return found


@functools.cache
def _flags() -> dict[str, argparse.Action]:
    """Return every flag of a job, Megatron's and ours, by its name in the namespace."""
    from megatron.training.arguments import add_megatron_arguments

    stock = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions = [*stock._actions, *build_parser()._actions]
    return {action.dest: action for action in actions if action.dest != "help"}


def _spelled(name: str) -> str:
    """Return how a user gives a setting: the flag of an argument, or an environment variable."""
    if name.isupper():
        return name
    usual = f"--{name.replace('_', '-')}"
    spellings = _flags()[name].option_strings if name in _flags() else [usual]
    return usual if usual in spellings else f"{spellings[0]}, {name}"


def _in_words(name: str, value: Any) -> str:
    """Return the value of a setting for a message; one that is not recorded has its default."""
    if value is not lineage.DEFAULT:
        return _short(value)
    default = None if name.isupper() or name not in _flags() else _plain(_flags()[name].default)
    return "not set" if default is None else f"{_short(default)}, the default"


def supervision_of(manifest: Manifest) -> dict[str, Any] | None:
    """Return the targets and template of a pack of question-answer records, or None for ordinary packs."""
    if manifest.supervision is None:
        return None
    return {
        "targets": manifest.supervision.targets,
        "template_sha256": manifest.supervision.template_sha256,
    }


def write_run_record(
    run_dir: Path,
    record: dict[str, Any],
    resumed_iteration: int | None,
    restart: dict[str, Any] | None = None,
) -> None:
    """Write run.json, or add a resume to the existing one.

    Args:
        run_dir: the run's folder.
        record: from `describe_run`.
        resumed_iteration: the iteration loaded from the run's own checkpoint, None at its beginning.
        restart: row of a start that follows a fault or a preemption, from `restart_row`.

    Raises:
        ValueError: the folder belongs to another run.
    """
    first = check_same_run(run_dir, record)
    if resumed_iteration is not None and first is not None:
        resume = {"iteration": resumed_iteration, **{key: record[key] for key in MAY_CHANGE}}
        if lineage.has_whole_configuration(first):
            resume["changes"] = lineage.changes_at_resume(first, record)
        added = {key: record[key] for key in ("wandb_run",) if key in record}
        record = {**identity_of(record), **added, **first, "resumes": [*first.get("resumes", []), resume]}
    restarts = [*restarts_of(first or {}), *([restart] if restart is not None else [])]
    if restarts:
        record = {**record, "restarts": restarts}
    write_json(run_dir / RUN_RECORD, record)


def settle_identity(run_dir: Path | None, record: dict[str, Any], resumed_iteration: int | None) -> None:
    """Set the id of the run in its record: that of run.json, or a new one.

    Args:
        run_dir: the run's folder.
        record: from `describe_run`; `run_id` is added, and `run_id_since` where checkpoints up to an
            iteration do not contain it.
        resumed_iteration: the iteration loaded from the run's own checkpoint, None at its beginning.
    """
    first = None if run_dir is None else read_run_record(run_dir)
    if first is not None and "run_id" in first:
        record.update(identity_of(first))
        return
    record["run_id"] = uuid.uuid4().hex
    if resumed_iteration is not None:
        record["run_id_since"] = resumed_iteration


def identity_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that identify its run."""
    return {key: record[key] for key in ("run_id", "run_id_since") if key in record}


def read_run_record(run_dir: Path) -> dict[str, Any] | None:
    """Return the run.json of a folder, or None.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / RUN_RECORD
    if not path.exists():
        return None
    record = read_json_object(path, "restore it, or choose another folder")
    if not isinstance(record.get("resumes", []), list):
        raise ValueError(f"{path} is not the record of a run: restore it, or choose another folder")
    return record


def check_same_run(
    run_dir: Path, record: dict[str, Any], *, is_resume: bool = False
) -> dict[str, Any] | None:
    """Return the run.json of a folder, or None, after comparing it with the record of this job.

    Args:
        run_dir: the run's folder.
        record: from `describe_run`.
        is_resume: whether the job resumes from a checkpoint of this run, which then must have a run.json.

    Raises:
        ValueError: run.json is missing at a resume; or it has another pack, weighting, seed or model than
            `record`, or another value of a setting that a resume may not change (`lineage.FREEDOMS`).
    """
    first = read_run_record(run_dir)
    if first is None:
        if is_resume:
            raise ValueError(
                f"{run_dir / RUN_RECORD} is missing, so nobody knows what the checkpoints were trained on: "
                "put it back, or begin a new run from them (--load THEM --finetune --save ELSEWHERE)"
            )
        return None
    for key in MUST_AGREE:
        if not _is_same(key, first.get(key), record[key]):
            raise ValueError(
                f"{run_dir} belongs to another run: its {key} is {_short(first.get(key))}, this job's "
                f"is {_short(record[key])}; choose another --save"
            )
    refused = lineage.refused_at_resume(first, record)
    if refused:
        raise ValueError(
            f"{run_dir} was begun with "
            + ", ".join(
                f"{_spelled(name)} {_in_words(name, before)} (now {_in_words(name, now)})"
                for name, (before, now) in refused.items()
            )
            + ": a run keeps its configuration; give the flags of its beginning, or choose another --save"
        )
    return first


def _is_same(key: str, first: Any, now: Any) -> bool:
    if key == "model" and isinstance(first, dict) and isinstance(now, dict):
        # earlier versions recorded 1 group for every model without grouped-query attention
        heads = now.get("num_attention_heads")
        if first.get("num_query_groups") == 1 and now.get("num_query_groups") == heads:
            first = {**first, "num_query_groups": heads}
    return bool(first == now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _pick(args: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _plain(getattr(args, name)) for name in names}


def _plain(value: Any) -> Any:
    """Convert a value of the namespace to JSON: enumerations and dtypes by name, other types as text."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    is_json = value is None or isinstance(value, bool | int | str)
    if is_json or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value).removeprefix("torch.")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "megatron-exact": megatron_exact.__version__}
    for package in ("megatron-core", "torch", "transformer-engine", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if tracked files differ, or None outside one."""
    root = Path(megatron_exact.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


RESTART_VARIABLE = "MEGATRON_EXACT_RESTART"
"""When the previous start ended (seconds since 1970), node or `-`, and reason, between tabs.

A batch script sets it when it starts a job again, since only the script knows why. The job knows where it
resumes and when its first iteration ends, so together they give the cost of each restart.
"""


def restart_row(reason: str | None, iteration: int, reached: int) -> dict[str, Any] | None:
    """Return the row of run.json for a start that a batch script began again.

    Args:
        reason: content of `RESTART_VARIABLE`; None if it is not set.
        iteration: the iteration from which the job resumes.
        reached: the last iteration that the previous start recorded.

    Raises:
        ValueError: the variable has another format.
    """
    if reason is None:
        return None
    seconds, *rest = reason.split("\t", 2)
    if len(rest) != 2 or not seconds.isdecimal():
        raise ValueError(
            f"{RESTART_VARIABLE} is {reason[:80]!r}: unset it, or give seconds, node and reason"
        )
    return {
        "when": datetime.fromtimestamp(int(seconds), UTC).isoformat(),
        "why": rest[1],
        "node": None if rest[0] == "-" else rest[0],
        "iteration": iteration,
        "lost_iterations": max(0, reached - iteration),
        "minutes": None,
    }


def end_restart(run_dir: Path, now: float) -> None:
    """Enter the minutes from the fault to the first iteration after it into the last row.

    Args:
        run_dir: the run's folder.
        now: seconds since 1970, at the end of that iteration.
    """
    record = read_run_record(run_dir)
    rows = restarts_of(record or {})
    if record is None or not rows or rows[-1].get("minutes") is not None:
        return
    began = datetime.fromisoformat(rows[-1]["when"]).timestamp()
    rows[-1]["minutes"] = round(max(0.0, now - began) / 60, 1)
    write_json(run_dir / RUN_RECORD, {**record, "restarts": rows})


def restarts_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a record; those of an earlier version are none."""
    rows = record.get("restarts")
    return [dict(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def describe_restarts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line: how often a run started again, and what that cost."""
    lost = sum(row["lost_iterations"] for row in rows)
    minutes = [row["minutes"] for row in rows if row["minutes"] is not None]
    known = (
        f"{sum(minutes):.1f} minutes until the next iteration" if minutes else "the time is not known yet"
    )
    return (
        f"started again {len(rows)} times so far: {lost} iterations repeated, {known}; the last time "
        f"since {rows[-1]['why']}"
    )
