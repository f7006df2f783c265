"""The distributed optimizer around torch's Adam, corrected so that its checkpoints load.

megatron-core 0.19.2 shards optimizer states over the data-parallel ranks for the Adam of Transformer Engine
and Apex. With torch's Adam, its fallback where neither is installed, it saves the same files but cannot
load them, for three reasons (megatron/core/optimizer/distrib_optimizer.py):

1. `state_dict` asks the states for their common step, also before the first step, when there are none. The
   load, which begins with it, ends in an assertion.
2. `_set_main_param_and_optimizer_states` writes into parameters while autograd records, which fp32
   parameters do not allow, and takes `step` from tensors that never contain the saved one.
3. `load_state_dict` gives all states the same `step` tensor, and torch adds 1 to it once for each
   parameter, so that Adam's bias correction runs away. There is no error, but the second iteration after a
   resume differs.

`TorchAdamDistributedOptimizer` overrides these three methods. It is not used with Transformer Engine or
Apex. `tests/distributed/test_distributed_optimizer.py` resumes without each of the corrections.

With any Adam, states of this optimizer load only into buckets of the same parameters; `check_states_load`
reports that before Megatron fails on keys or shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


class TorchAdamDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Megatron's distributed optimizer around `torch.optim.Adam` or `AdamW`."""

    def state_dict(self) -> dict[str, Any]:
        """Return Megatron's state without tensors; missing states count as zero steps."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        **{key: torch.zeros_like(parameter) for key in self.optimizer_state_keys},
                    }
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as Megatron does, then give every state a step counter of its own."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Any]) -> None:
        """Copy a parameter and its moments in place; `step` stays as `load_state_dict` set it.

        Args:
            model_param: parameter of the model; its shard on this rank is set.
            tensors: "param", "exp_avg" and "exp_avg_sq" of that shard, each [elements of the shard].
        """
        group, position = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][position]
        step = self.optimizer.state[main_param]["step"]
        with torch.no_grad():
            super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": step})


def check_states_load(args: Any, saved: Any, sharding: dict[str, Any] | None) -> None:
    """Raise where the optimizer states of a checkpoint do not fit this job's optimizer.

    Args:
        args: Megatron's namespace of this job.
        saved: the namespace in the checkpoint.
        sharding: content metadata of the checkpoint, which name the form of its optimizer states.

    Raises:
        ValueError: names the difference, and how to load or leave out the states.
    """
    if args.carry_optimizer:
        _require_same_rates(args, saved)
    was_distributed = getattr(saved, "use_distributed_optimizer", None)
    if was_distributed is None or args.finetune or args.no_load_optim or saved.no_save_optim:
        return
    leave_out = "or add --no-load-optim: the weights load and the optimizer begins with fresh states"
    _require_same_groups(args, saved, leave_out)
    if args.use_distributed_optimizer != was_distributed:
        with_or_without, remedy = ("with", "add") if was_distributed else ("without", "drop")
        raise ValueError(
            f"the checkpoint was saved {with_or_without} --use-distributed-optimizer, whose states have "
            f"another form: {remedy} the flag, {leave_out}"
        )
    if (sharding or {}).get("distrib_optim_sharding_type") != "dp_reshardable":
        return
    for flag in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        there, here = getattr(saved, flag), getattr(args, flag)
        if there != here:
            raise ValueError(
                f"states of the distributed optimizer load on another number of data-parallel ranks, but "
                f"the checkpoint was saved with --{flag.replace('_', '-')} {there}, this job has {here}: "
                f"use {there}, {leave_out}"
            )
    there, here = bucket_size(saved), bucket_size(args)
    if there != here:
        raise ValueError(
            f"the optimizer states to load lie in buckets of {there}, this job's in buckets of {here}: "
            "use the same --overlap-grad-reduce, --ddp-bucket-size and --ddp-num-buckets (with overlap, "
            f"more than 40 data-parallel ranks also make larger buckets), {leave_out}"
        )


def _require_same_rates(args: Any, saved: Any) -> None:
    """Compare the learning rates, by which Megatron finds the states of a group, and which it restores."""
    for name in ("lr", "min_lr"):
        there, here = getattr(saved, name, None), getattr(args, name)
        if there != here:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--carry-optimizer needs the {flag} {there} of the stage before, this job has {here}: "
                "give the same, or begin with fresh states"
            )


def _require_same_groups(args: Any, saved: Any, leave_out: str) -> None:
    """Compare the options that change the optimizer's parameters and groups."""
    for name, default in (("separate_qkv", False), ("qk_timing", False), ("qk_timing_factor", None)):
        there, here = getattr(saved, name, default), getattr(args, name)
        if there != here and not (name == "qk_timing_factor" and not args.qk_timing):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"the checkpoint's optimizer states were saved with {flag} {there}, this job has {here}, "
                f"which makes other parameters or groups of them: use {there}, {leave_out}"
            )


def bucket_size(args: Any) -> str:
    """Describe the gradient buckets of a job, as Megatron's `resolve_ddp_bucket_size` cuts them."""
    if not args.overlap_grad_reduce:
        return "all parameters"
    if args.ddp_num_buckets is not None:
        return f"1/{args.ddp_num_buckets} of the parameters"
    ranks = args.data_parallel_size * args.context_parallel_size
    return f"{args.ddp_bucket_size or max(40_000_000, 1_000_000 * ranks):,} parameters"
