"""Compares records (`run.json`): of one run before and after a resume, and of the arms of a pair.

A run is its whole configuration: every flag that differs from Megatron's default, ours among them, and the
environment variables that change numbers. FREEDOMS lists what may differ, with its reason, at a resume and
between the arms of a pair. Everything else is compared, so a flag that the table does not know counts as a
difference. `docs/configuration.md` is made from the table.

Two runs are a pair if pack, start checkpoint, seed and configuration agree and only the token weighting
differs. Where training started from a checkpoint of an earlier run of the same arm (a later stage,
instruction tuning), the start checkpoints necessarily differ. Then the records of these earlier runs,
`start_checkpoint.run`, are compared in the same way, back to the common start; `trainings` returns that
chain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

NEEDED = ("fingerprint", "start_checkpoint", "seed", "schedule")
"""Entries without which two runs cannot be shown to be a pair."""
COMPARED = ("fingerprint", "row_tokens", "seed", "model", "export_iteration")
SECTIONS = ("configuration", "environment")
"""Keys of run.json that together contain the whole configuration."""
OLD_SECTIONS = ("schedule", "layout")
"""Keys compared for runs of versions that did not record the whole configuration."""
SHOWN_CHARACTERS = 60
SHOWN_DIFFERENCES = 4
DEFAULT = None
"""Value of a setting that is not recorded: it had Megatron's default, or the variable was not set."""


@dataclass(frozen=True, kw_only=True)
class Freedom:
    """Settings that may differ."""

    subject: str
    """Heading for the settings."""
    names: tuple[str, ...]
    """Arguments as in the namespace, Megatron's and ours, or environment variables."""
    at_resume: bool
    """Whether a resumed job may have another value than the beginning of its run."""
    between_arms: bool
    """Whether the arms of a pair may differ in it, at the beginning or by a resume."""
    reason: str
    """The reason, for the documentation."""
    is_place: bool = False
    """Whether the values are paths, which exported models do not contain."""
    is_of_one_start: bool = False
    """Whether a value applies to one start alone, so that a resume is not compared with the beginning."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FREEDOMS = (
    Freedom(
        subject="inputs that are compared by content",
        names=_words(
            "pack source_root load pretrained_checkpoint ckpt_step tokenizer_model tokenizer_type "
            "vocab_file merge_file confidence_scores"
        ),
        at_resume=True,
        between_arms=True,
        reason="the pack is compared by its fingerprint, the start checkpoint and the scores by their "
        "hashes",
        is_place=True,
    ),
    Freedom(
        subject="outputs",
        names=_words(
            "save run_dir tensorboard_dir wandb_save_dir memory_snapshot_path "
            "flight_recorder_dump_path data_cache_path rl_profile_dir"
        ),
        at_resume=True,
        between_arms=True,
        reason="they say where something is written",
        is_place=True,
    ),
    Freedom(
        subject="the words of the command",
        names=_words("command_line recipe recipe_set preset print_arguments megatron_help local_rank"),
        at_resume=True,
        between_arms=True,
        reason="the flags that they stand for are compared one by one",
    ),
    Freedom(
        subject="token weighting",
        names=_words(
            "token_weighting exact_alpha exact_gamma exact_tau exact_cap exact_bucket_weights "
            "exact_evidence_nats match_mass confidence_lambda confidence_kappa confidence_cap "
            "confidence_s short_window short_stride short_border"
        ),
        at_resume=True,
        between_arms=True,
        reason="`weighting` of run.json, rule, parameters and table, may not change at a resume; arms "
        "differ in it by design",
    ),
    Freedom(
        subject="logs",
        names=_words(
            "log_interval log_params_norm log_throughput log_progress log_timers_to_tensorboard "
            "log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard "
            "log_memory_to_tensorboard log_memory_interval log_device_memory_used "
            "log_num_zeros_in_grad log_max_attention_logit log_world_size_to_tensorboard log_energy "
            "log_straggler log_row_ids logging_level timing_log_level timing_log_option "
            "barrier_with_L1_time tensorboard_log_interval tensorboard_queue_size wandb_project "
            "wandb_exp_name wandb_entity enable_one_logger one_logger_project one_logger_run_name "
            "one_logger_async app_tag_run_name app_tag_run_version peak_tflops spike_deviations "
            "spike_window profile profile_step_start profile_step_end profile_ranks "
            "use_pytorch_profiler pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack "
            "pytorch_profiler_collect_chakra record_memory_history record_shapes nvtx_ranges "
            "straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup "
            "flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout "
            "flight_recorder_include_stack_trace flight_recorder_include_only_active "
            "flight_recorder_extra_dump_on_exec run_workload_inspector_server"
        ),
        at_resume=True,
        between_arms=True,
        reason="they show what happens and change nothing",
    ),
    Freedom(
        subject="saving, and when a job ends",
        names=_words(
            "save_interval save_minutes keep_last keep_every async_save async_strategy "
            "use_persistent_ckpt_worker "
            "async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm "
            "ckpt_fully_parallel_save ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo "
            "ckpt_fully_parallel_save_process_group ckpt_fully_parallel_load_process_group "
            "ckpt_assume_constant_structure ckpt_load_validate_sharding_integrity dist_ckpt_workers "
            "verify_integrity skip_integrity_check verify_data exit_on_missing_checkpoint "
            "no_save_optim no_save_rng exit_interval exit_duration_in_mins exit_signal_handler exit_signal "
            "exit_signal_handler_for_dataloader exit_signal_handler_for_training adlr_autoresume "
            "adlr_autoresume_interval rank_timeout_seconds distributed_timeout_minutes "
            "distributed_timeout_seconds_after_init manual_gc manual_gc_interval manual_gc_eval"
        ),
        at_resume=True,
        between_arms=True,
        reason="a resumed run is bit-identical to one that was not interrupted; a job that cannot load "
        "what was not saved needs a flag of the next rows",
    ),
    Freedom(
        subject="validation",
        names=_words(
            "eval_iters eval_interval start_eval_at_iter eval_global_batch_size eval_micro_batch_size"
        ),
        at_resume=True,
        between_arms=True,
        reason="nothing of an evaluation enters the weights",
    ),
    Freedom(
        subject="reading rows",
        names=_words(
            "num_workers read_ahead_rows mmap_bin_files dataloader_fast_cache_load "
            "dataloader_defer_npy_index_mmap num_dataset_builder_threads object_storage_cache_path"
        ),
        at_resume=True,
        between_arms=True,
        reason="the order of rows follows from pack, seed and iteration",
    ),
    Freedom(
        subject="the length of the run",
        names=_words(
            "train_iters train_samples lr_decay_iters lr_decay_samples lr_wsd_decay_iters "
            "lr_wsd_decay_samples"
        ),
        at_resume=True,
        between_arms=False,
        reason="a run may be made longer; its checkpoint is loaded only if the learning rate's curve "
        "is the same over what was trained",
    ),
    Freedom(
        subject="what a start loads",
        names=_words("finetune no_load_optim no_load_rng load_main_params_from_ckpt"),
        at_resume=True,
        between_arms=False,
        reason="each resume that has one of them is recorded, and arms with other such resumes are no pair",
        is_of_one_start=True,
    ),
    Freedom(
        subject="another schedule from here on",
        names=_words("override_opt_param_scheduler use_checkpoint_opt_param_scheduler"),
        at_resume=True,
        between_arms=False,
        reason="they are given to change the schedule on purpose; the resume records it",
    ),
    Freedom(
        subject="a way past a bad batch",
        names=_words("iterations_to_skip on_nonfinite"),
        at_resume=True,
        between_arms=False,
        reason="the flags are made for a run that has met one; the resume records it",
    ),
    Freedom(
        subject="layout and kernels",
        names=_words(
            "world_size inprocess_active_world_size data_parallel_size "
            "tensor_model_parallel_size pipeline_model_parallel_size "
            "virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage "
            "num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage "
            "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
            "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
            "account_for_loss_in_pipeline_split pipeline_model_parallel_comm_backend "
            "context_parallel_size cp_comm_type sequence_parallel expert_tensor_parallel_size "
            "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards "
            "micro_batch_size moe_token_dispatcher_type use_distributed_optimizer overlap_grad_reduce "
            "overlap_param_gather overlap_param_gather_with_optimizer_step overlap_p2p_comm "
            "overlap_p2p_comm_warmup_flush align_param_gather align_grad_reduce ddp_num_buckets "
            "ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw recompute_granularity "
            "recompute_method recompute_num_layers recompute_modules recompute_activations "
            "distribute_saved_activations transformer_impl attention_backend flash_attention_version "
            "use_flash_attn loss_head loss_head_tokens loss_head_columns separate_qkv cpu "
            "distributed_backend fake_process_group use_gloo_process_groups lazy_mpu_init "
            "use_tp_pp_dp_mapping use_sharp sharp_enabled_group high_priority_stream_groups "
            "nccl_communicator_config_path nccl_ub create_all_gather_group use_ring_exchange_p2p "
            "defer_embedding_wgrad_compute wgrad_deferral_limit delay_wgrad_compute tp_comm_overlap "
            "tp_comm_overlap_cfg tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag "
            "tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs "
            "tp_comm_bootstrap_backend cross_entropy_loss_fusion cross_entropy_fusion_impl "
            "masked_softmax_fusion bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion "
            "apply_rope_fusion no_persist_layer_norm gradient_accumulation_fusion "
            "fused_residual_rmsnorm use_te_activation_func use_transformer_engine_op_fuser "
            "disable_jit_fuser cuda_graph_impl cuda_graph_modules cuda_graph_warmup_steps "
            "enable_cuda_graph external_cuda_graph optimizer_cpu_offload optimizer_offload_fraction "
            "use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads "
            "pin_cpu_params optimizer_cuda_graph cpu_offloading_num_layers "
            "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size "
            "use_cpu_initialization empty_unused_memory_level train_sync_interval balance_rows"
        ),
        at_resume=True,
        between_arms=False,
        reason="a run may move to other machines; sums are then taken in another order, so the arms of "
        "a pair keep one layout",
    ),
    Freedom(
        subject="kernels, chosen by the environment",
        names=_words(
            "NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN NCCL_ALGO NCCL_PROTO NCCL_NVLS_ENABLE "
            "NCCL_COLLNET_ENABLE CPU_THREADS ATEN_CPU_CAPABILITY TORCHDYNAMO_DISABLE "
            "TORCH_COMPILE_DISABLE"
        ),
        at_resume=True,
        between_arms=False,
        reason="as the layout; CPU_THREADS is torch's number of threads where a job runs on the CPU",
    ),
    Freedom(
        subject="variables without effect on numbers",
        names=_words(
            "NVTE_DEBUG NVTE_DEBUG_LEVEL NVTE_FRAMEWORK NVTE_CUDA_ARCHS NVTE_RELEASE_BUILD "
            "NVTE_BUILD_THREADS_PER_JOB CUBLAS_LOGINFO_DBG CUBLAS_LOGDEST_DBG CUBLASLT_LOG_LEVEL "
            "CUBLASLT_LOG_MASK CUBLASLT_LOG_FILE CUDNN_LOGINFO_DBG CUDNN_LOGDEST_DBG "
            "CUDNN_LOGLEVEL_DBG CUDNN_PATH CUDNN_HOME CUDNN_INCLUDE_DIR CUDNN_LIBRARY CUDNN_ROOT "
            "CUDNN_VERSION CUBLAS_VERSION TORCHINDUCTOR_CACHE_DIR"
        ),
        at_resume=True,
        between_arms=True,
        reason="logs, and how the libraries were built",
    ),
)
"""What may differ. Two names beside Megatron's and ours: `world_size` and `data_parallel_size`, which
torchrun decides."""
UNCOMPARED = (
    (
        "versions, git_commit",
        "updates that do not change numbers are the rule; each resume records its own",
    ),
    ("pack, corpora", "the fingerprint says what was trained on"),
)
"""Keys of run.json outside the configuration that are recorded and not compared, with the reason."""
_FREEDOM_OF = {name: freedom for freedom in FREEDOMS for name in freedom.names}
ENVIRONMENT_PREFIXES = (
    *("NVTE_", "CUBLAS", "CUDNN_", "TORCHINDUCTOR_", "PYTORCH_JIT", "PYTORCH_NVFUSER", "DNNL_", "ONEDNN_"),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "TORCH_ALLOW_TF32", "TORCH_CUDNN_"),
    *("NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"),
    *("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "FP4_RECIPE", "TORCH_BLAS_PREFER", "TORCH_FORCE_"),
)
"""Beginnings of the names of environment variables that can change numbers."""


def may_differ(name: str, *, at_resume: bool) -> bool:
    """Return whether a setting may differ between the beginning of a run and a resume, or between arms.

    Args:
        name: an argument of the namespace, or an environment variable.
        at_resume: True for a resume, False for the arms of a pair.
    """
    freedom = _FREEDOM_OF.get(name)
    return freedom is not None and (freedom.at_resume if at_resume else freedom.between_arms)


def is_place(name: str) -> bool:
    """Return whether the values of a setting are paths on the machine of the run."""
    return name in _FREEDOM_OF and _FREEDOM_OF[name].is_place


def can_change_numbers(variable: str) -> bool:
    """Return whether an environment variable belongs to the configuration of a run."""
    return variable.startswith(ENVIRONMENT_PREFIXES)


def has_whole_configuration(record: Mapping[str, Any]) -> bool:
    """Return whether a record contains the whole configuration, which earlier versions did not write."""
    return all(isinstance(record.get(key), dict) for key in SECTIONS)


def refused_at_resume(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that a resume changed without being allowed to: name -> (first value, value now).

    Args:
        first: run.json of the run.
        now: record of the resumed job; DEFAULT is the value of a setting that a record lacks.
    """
    if has_whole_configuration(first) and has_whole_configuration(now):
        differing = _differing(_settings(first), _settings(now))
    else:  # as before the whole configuration was recorded
        before, after = first.get("schedule", {}), now["schedule"]
        differing = {
            name: (before.get(name), value) for name, value in after.items() if value != before.get(name)
        }
    return {name: pair for name, pair in differing.items() if not may_differ(name, at_resume=True)}


def changes_at_resume(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a resume records: settings that differ from the beginning and matter between arms.

    Args:
        first: run.json of the run, with its whole configuration.
        now: record of the resumed job.

    Returns:
        Name -> value of the resumed job, DEFAULT where it has none. A setting that applies to one start
        alone is included whenever the resumed job gives it, whatever the beginning had.
    """
    before, after = _settings(first), _settings(now)
    changes: dict[str, Any] = {}
    for name in sorted(before.keys() | after.keys()):
        freedom = _FREEDOM_OF.get(name)
        if freedom is not None and freedom.between_arms:
            continue
        once = freedom is not None and freedom.is_of_one_start
        expected = DEFAULT if once else before.get(name)
        if after.get(name) != expected:
            changes[name] = after.get(name)
    return changes


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole configuration in one dictionary; environment variables are in capitals."""
    return {name: value for key in SECTIONS for name, value in record[key].items()}


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted(before.keys() | after.keys())
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Describe the first difference between the records of two arms, or return None.

    Records with the whole configuration are compared in all of it. Where one is of an earlier version,
    model, schedule and layout are compared, without the keys that one of them lacks.
    """
    for key in COMPARED:
        if key in before and key in after and before[key] != after[key]:
            return _in_words(key, before[key], after[key])
    if has_whole_configuration(before) and has_whole_configuration(after):
        difference = _configuration_difference(before, after)
        if difference is not None:
            return difference
    else:
        for key in OLD_SECTIONS:
            if key in before and key in after:
                one, other = _history(before, key), _history(after, key)
                if not _agree(one, other):
                    return _changed(key, one, other)
    if "start_checkpoint" in before and "start_checkpoint" in after:
        return _start_difference(before["start_checkpoint"], after["start_checkpoint"])
    return None


def compares_whole_configuration(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether two records, and those of their earlier trainings, have the whole configuration."""
    if not (has_whole_configuration(before) and has_whole_configuration(after)):
        return False
    one, other = before.get("start_checkpoint") or {}, after.get("start_checkpoint") or {}
    if _identity(one) == _identity(other):
        return True  # one checkpoint, however it came to be
    return compares_whole_configuration(one.get("run") or {}, other.get("run") or {})


def _configuration_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Describe the settings in which two runs differ at their beginnings or by a resume, or return None."""
    differing = _differing(_settings(before), _settings(after))
    names = [name for name in differing if not may_differ(name, at_resume=False)]
    if names:
        shown = [
            f"{_full(name)} is {' and '.join(_setting(name, value) for value in differing[name])}"
            for name in names[:SHOWN_DIFFERENCES]
        ]
        rest = len(names) - len(shown)
        return ", ".join(shown) + (f", and {rest} more settings differ" if rest else "")
    one, other = _changes(before), _changes(after)
    differing_changes = (pair for pair in zip_longest(one, other) if pair[0] != pair[1])
    mine, its = next(differing_changes, (None, None))
    if mine is None and its is None:
        return None
    return f"a resume changed the configuration of one: {_change(mine)}; of the other: {_change(its)}"


def _changes(record: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return [(first iteration, settings that differ from the run's beginning)].

    A resume that changed nothing is left out, and one whose work was dropped for an earlier checkpoint.
    """
    history: list[tuple[int, dict[str, Any]]] = []
    for resume in record.get("resumes") or []:
        if not isinstance(resume, dict):
            raise ValueError(f"a resume of a run is {resume!r}, not an object: the run's record was edited")
        iteration, changes = resume.get("iteration", 0), resume.get("changes") or {}
        changes = {name: value for name, value in changes.items() if not may_differ(name, at_resume=False)}
        while history and history[-1][0] >= iteration:
            history.pop()
        lasting = {name: value for name, value in changes.items() if not _is_of_one_start(name)}
        held = history[-1][1] if history else {}
        held = {name: value for name, value in held.items() if not _is_of_one_start(name)}
        if lasting != held or lasting != changes:
            history.append((iteration, changes))
    return history


def _is_of_one_start(name: str) -> bool:
    return name in _FREEDOM_OF and _FREEDOM_OF[name].is_of_one_start


def _change(entry: tuple[int, dict[str, Any]] | None) -> str:
    if entry is None:
        return "nothing"
    iteration, changes = entry
    values = ", ".join(f"{_full(name)} to {_setting(name, value)}" for name, value in changes.items())
    return f"at iteration {iteration} {values or 'back to the beginning'}"


def _setting(name: str, value: Any) -> str:
    if value is DEFAULT:
        return "not set" if name.isupper() else "the default"
    return _short(value)


def _full(name: str) -> str:
    return f"{SECTIONS[1] if name.isupper() else SECTIONS[0]}.{name}"


def _start_difference(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str | None:
    """Describe the difference between two start checkpoints, of which None is random weights."""
    if before is None or after is None:
        if before is after:
            return None
        return _in_words("start_checkpoint", _identity(before), _identity(after))
    if _identity(before) == _identity(after):
        return None
    earlier, other = before.get("run"), after.get("run")
    if earlier and other and before.get("iteration") == after.get("iteration"):
        difference = first_difference(earlier, other)
        return f"in the training before, {difference}" if difference is not None else None
    return _in_words("start_checkpoint", _identity(before), _identity(after))


def _identity(start: dict[str, Any] | None) -> Any:
    return None if start is None else {key: start.get(key) for key in ("iteration", "sha256")}


def unproved_pair(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Explain why two records without a difference do not prove a pair, or return None if they do."""
    if any(key not in record for record in (before, after) for key in NEEDED):
        return f"the records do not both name {', '.join(NEEDED)}"
    return _unproved_start(before, after)


def _unproved_start(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Explain why start checkpoints without a difference prove nothing, or return None if they do."""
    one, other = before.get("start_checkpoint"), after.get("start_checkpoint")
    if one is None or other is None:
        return None  # both from the random weights of one seed
    if one.get("sha256") is None:
        return "their start checkpoints have no hash"
    if one.get("sha256") == other.get("sha256"):
        return None
    earlier = one["run"], other["run"]
    if any(key not in record for record in earlier for key in NEEDED):
        return "the records of the training before are not complete"
    return _unproved_start(*earlier)


def _history(record: dict[str, Any], key: str) -> list[tuple[int, Any]]:
    """Return [(first iteration, value)] of a section; a resume that changed nothing is left out."""
    history: list[tuple[int, Any]] = [(0, _without(record[key], _is_free))]
    for resume in record.get("resumes") or []:
        if not isinstance(resume, dict):
            raise ValueError(f"a resume of a run is {resume!r}, not an object: the run's record was edited")
        now = _without(resume.get(key, record[key]), _is_free)
        if _without(now, _is_of_one_start) != _without(history[-1][1], _is_of_one_start):
            history.append((resume.get("iteration", 0), now))
    return history


def _agree(one: list[tuple[int, Any]], other: list[tuple[int, Any]]) -> bool:
    if [iteration for iteration, _ in one] != [iteration for iteration, _ in other]:
        return False
    return all(not _disagreeing(mine, its) for (_, mine), (_, its) in zip(one, other, strict=True))


def _disagreeing(before: Any, after: Any) -> list[str]:
    """Return the names in which two dictionaries differ, without names that one of them lacks."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [""]
    return [name for name in before if name in after and before[name] != after[name]]


def _without(value: Any, is_left_out: Callable[[str], bool]) -> Any:
    """Return a dictionary without the names that are left out; any other value as it is."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if not is_left_out(name)}


def _is_free(name: str) -> bool:
    return may_differ(name, at_resume=False)


def _changed(key: str, one: list[tuple[int, Any]], other: list[tuple[int, Any]]) -> str:
    (_, before), (_, after) = one[0], other[0]
    names = _disagreeing(before, after)
    if not names:
        return f"their {key} was changed at other iterations, or to something else, by a resume"
    if not names[0]:
        return _in_words(key, before, after)
    return _in_words(f"{key}.{names[0]}", before[names[0]], after[names[0]])


def _in_words(key: str, before: Any, after: Any) -> str:
    return f"{key} is {_short(before)} and {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def trainings(run: Any) -> list[dict[str, Any]]:
    """Return run.json of every training of a model, the first training first.

    A later stage, or instruction tuning, starts from a checkpoint of an earlier run, whose record its own
    run.json contains as `start_checkpoint.run`.

    Args:
        run: run.json of the last training; None, or any value that is not a record, for an import.
    """
    found: list[dict[str, Any]] = []
    while isinstance(run, dict) and run:
        found.append(run)
        start = run.get("start_checkpoint")
        run = start.get("run") if isinstance(start, dict) else None
    return found[::-1]


def trained_row_tokens(run: Any) -> int | None:
    """Return the tokens of the longest rows that a model was trained on, or None where no record says so.

    Earlier trainings count: instruction tuning on short rows follows training on long ones.

    Args:
        run: as for `trainings`.
    """
    rows = [record.get("row_tokens") for record in trainings(run)]
    return max((tokens for tokens in rows if isinstance(tokens, int)), default=None)


def trained_corpora(run: Any) -> list[dict[str, Any]]:
    """Return the corpora of all trainings, each name and licence once, in the order of first use.

    Args:
        run: as for `trainings`.

    Returns:
        [{`name`: text, `licence`: text, or None where it is not recorded}].
    """
    pairs = dict.fromkeys(
        (str(corpus.get("name")), corpus.get("licence"))
        for record in trainings(run)
        for corpus in record.get("corpora") or []
        if isinstance(corpus, dict)
    )
    return [{"name": name, "licence": licence} for name, licence in pairs]


PAGE_HEAD = """\
# The configuration of a run

Made by `python -m megatron_exact.lineage > docs/configuration.md`.

`run.json` records the whole configuration of a run:

| entry | content |
|---|---|
| `configuration` | every flag of Megatron and of ours whose value in force differs from its default |
| `environment` | variables that can change numbers: {prefixes}; on a CPU the number of threads |
| `places` | paths; exported models do not carry them |
| `resumes` | one entry a resume; `changes` are the settings in which it differed from the beginning |
| `restarts` | one entry for each start that a batch script began again: why, from where, at what cost |

All of it is compared: at a resume with the beginning of the run, and between the arms of a pair (by
`megatron-exact compare`, from the `megatron_exact.json` of exported models, by `megatron-exact stages`
and by `megatron-exact fine-tune`). What may differ is listed below; any other flag, also one that this
list does not know, is a difference. A resumed job with a difference stops with the flag, the recorded
value and the value now. Arms with a difference are no pair, and the first differences are named.

A `run.json` of an earlier version has no `configuration`: its model, seed, weighting, schedule and layout
are compared, and one line says so.

| what may differ | at a resume | between arms | why | names |
|---|---|---|---|---|
"""
PAGE_TAIL = """
Recorded and not compared: {uncompared}.

Names of flags are those of the command line where they follow from the name of the argument. A resume
that changes a setting of a row with "no" in the third column is recorded in `resumes`, and the run is a
pair only with one that changed the same setting at the same iteration.
"""


def configuration_page() -> str:
    """Return the documentation page of what may differ, as Markdown."""
    prefixes = ", ".join(f"`{prefix}*`" for prefix in ENVIRONMENT_PREFIXES)
    rows = [
        f"| {freedom.subject} | {_yes(freedom.at_resume)} | {_yes(freedom.between_arms)} | "
        f"{freedom.reason} | {', '.join(map(_as_given, freedom.names))} |"
        for freedom in FREEDOMS
    ]
    uncompared = "; ".join(f"`{names}` ({reason})" for names, reason in UNCOMPARED)
    head, tail = PAGE_HEAD.format(prefixes=prefixes), PAGE_TAIL.format(uncompared=uncompared)
    return head + "\n".join(rows) + "\n" + tail


def _yes(is_allowed: bool) -> str:
    return "yes" if is_allowed else "no"


def _as_given(name: str) -> str:
    return f"`{name}`" if name.isupper() else f"`--{name.replace('_', '-')}`"


if __name__ == "__main__":
    print(configuration_page(), end="")
