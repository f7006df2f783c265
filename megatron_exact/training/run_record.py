"""`run.json`: what makes two runs comparable, and one run the same run after a resume."""

from __future__ import annotations

import enum
import json
import platform
import subprocess
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_exact
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.score_files import read_record
from megatron_exact.exposure import Weighting
from megatron_exact.files import write_json
from megatron_exact.json_input import read_json_object
from megatron_exact.model.megatron_flags import num_query_groups_of
from megatron_exact.training.qk_timing import qk_timing_record

RUN_RECORD = "run.json"
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
"""Entries in which a resumed run may not differ from its own beginning."""
MAY_CHANGE = ("layout", "schedule", "versions", "git_commit")
"""Entries that are recorded anew with each resume."""
SCHEDULE_MAY_CHANGE = (
    *("train_iters", "train_samples", "lr_decay_iters", "lr_wsd_decay_iters"),  # a run may be made longer
    *("finetune", "eval_iters", "eval_interval"),  # nothing of them enters the weights after the start
)
"""Parts of the schedule that a resume may change."""


def describe_run(
    args: Any,
    weighting: Weighting,
    manifest: Manifest,
) -> dict[str, Any]:
    """Content of run.json for the beginning of a run; its start checkpoint is entered once it is verified.

    Args:
        args: Megatron's validated namespace.
        weighting: the rule and its table.
        manifest: of the pack.
    """
    return {
        "fingerprint": manifest.fingerprint,
        "pack": str(args.pack),
        "corpora": [
            {"name": Path(source.prefix).name, "licence": source.licence} for source in manifest.sources
        ],
        "row_tokens": weighting.row_tokens,
        "supervision": supervision_of(manifest),
        "weighting": {**weighting.describe(), **_scores_of(args)},
        "start_checkpoint": None,
        "seed": args.seed,
        "model": _model_of(args),
        "schedule": {
            **_pick(args, SCHEDULE_ARGUMENTS + OUR_SCHEDULE_ARGUMENTS),
            "qk_timing": qk_timing_record(args),
        },
        "layout": _pick(args, LAYOUT_ARGUMENTS + OUR_LAYOUT_ARGUMENTS),
        "versions": _versions(),
        "git_commit": git_commit(),
        "resumes": [],
    }


def supervision_of(manifest: Manifest) -> dict[str, Any] | None:
    """What a pack of question-answer records supervises, and by which template; None for ordinary packs."""
    if manifest.supervision is None:
        return None
    return {
        "targets": manifest.supervision.targets,
        "template_sha256": manifest.supervision.template_sha256,
    }


def _scores_of(args: Any) -> dict[str, Any]:
    """What the weights were computed from, if from files."""
    folder = args.confidence_scores
    return {} if folder is None else {"scores": read_record(folder).identity()}


def write_run_record(run_dir: Path, record: dict[str, Any], resumed_iteration: int | None) -> None:
    """Write run.json, or add a resume to the one that is there.

    Args:
        run_dir: the run's folder.
        record: from `describe_run`.
        resumed_iteration: the iteration loaded from the run's own checkpoint, None at its beginning.

    Raises:
        ValueError: the folder belongs to another run.
    """
    first = check_same_run(run_dir, record)
    if resumed_iteration is not None and first is not None:
        resume = {"iteration": resumed_iteration, **{key: record[key] for key in MAY_CHANGE}}
        record = {**identity_of(record), **first, "resumes": [*first.get("resumes", []), resume]}
    write_json(run_dir / RUN_RECORD, record)


def settle_identity(run_dir: Path | None, record: dict[str, Any], resumed_iteration: int | None) -> None:
    """Enter the id of the run into its record: that of run.json, or a new one.

    Args:
        run_dir: the run's folder.
        record: from `describe_run`; `run_id` is added, and `run_id_since` where checkpoints up to an
            iteration do not name it.
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
    """The entries of a record that say which run it is of."""
    return {key: record[key] for key in ("run_id", "run_id_since") if key in record}


def read_run_record(run_dir: Path) -> dict[str, Any] | None:
    """The run.json of a folder, None if there is none.

    Raises:
        ValueError: it is no JSON.
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
    """The run.json of a folder, None if there is none.

    Args:
        run_dir: the run's folder.
        record: from `describe_run`.
        is_resume: whether the job goes on from a checkpoint of this run: then there has to be one.

    Raises:
        ValueError: it tells of another pack, weighting, seed or model than `record`, or of a schedule
            that differs in more than its length; or it is missing where it may not be.
    """
    first = read_run_record(run_dir)
    if first is None:
        if is_resume:
            raise ValueError(
                f"{run_dir / RUN_RECORD} is missing, so nobody knows what the checkpoints were trained on: "
                "put it back, or begin a run of its own from them (--load THEM --finetune --save ELSEWHERE)"
            )
        return None
    for key in MUST_AGREE:
        if not _is_same(key, first.get(key), record[key]):
            raise ValueError(
                f"{run_dir} belongs to another run: its {key} is {_short(first.get(key))}, this job's "
                f"is {_short(record[key])}; choose another --save"
            )
    ours, theirs = record["schedule"], first.get("schedule", {})
    changed = [key for key in ours if ours[key] != theirs.get(key) and key not in SCHEDULE_MAY_CHANGE]
    if changed:
        raise ValueError(
            f"{run_dir} was begun with "
            + ", ".join(f"{key} {theirs.get(key)} (now {ours[key]})" for key in changed)
            + ": a run keeps its schedule; use the same flags, or choose another --save"
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


def _model_of(args: Any) -> dict[str, Any]:
    """The model that is built, the same for a start from flags and a resume from `hf/` of the run."""
    return {**_pick(args, MODEL_ARGUMENTS), "num_query_groups": num_query_groups_of(args)}


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "megatron-exact": megatron_exact.__version__}
    for package in ("megatron-core", "torch", "transformer-engine", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of this checkout, with `-dirty` if tracked files differ; None outside a checkout."""
    root = Path(megatron_exact.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
