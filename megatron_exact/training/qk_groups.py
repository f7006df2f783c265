"""`--qk-timing` in Megatron's optimizer: parameter groups of their own, and their learning rate.

Megatron puts parameters that an override matches into separate groups, on all ranks alike. It keeps
`lr_mult` in them as part of a group's identity in checkpoints and asks the scheduler for each group's
learning rate; in 0.19.2 the scheduler ignores `lr_mult`. Here the timed parameters get `lr_mult`, and the
scheduler multiplies the learning rate of their groups. They are not `default_config` groups, so the
learning rate that Megatron logs remains that of all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import megatron.training.training as driver
import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    get_canonical_lr_for_logging,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.global_vars import get_tensorboard_writer

from megatron_exact.model.separate_qkv import SeparateQkvLinear
from megatron_exact.training.qk_timing import QkWindow, qk_timing_of, timed_layers

if TYPE_CHECKING:
    from megatron_exact.training.run import TrainingRun

MARK = "lr_mult"
TIMED_RATE = "upper_qk_learning_rate"
"""Key in losses.jsonl."""
MAIN_PARAMS = "fp32_from_fp16_params"
_stock_sharded_state = Float16OptimizerWithFloat16Params.sharded_state_dict
_stock_load_state = Float16OptimizerWithFloat16Params.load_state_dict


def install(run: TrainingRun) -> None:
    """Install the replacements for a job with `--qk-timing`, around earlier ones of the same names."""
    timing = qk_timing_of(run.args)
    if timing is None:
        return
    samples = run.args.train_samples or run.args.train_iters * run.args.global_batch_size
    get_optimizer, training_log = driver.get_megatron_optimizer, driver.training_log

    def get_megatron_optimizer(
        config: Any, model: list[Any], config_overrides: Any = None, **kwargs: Any
    ) -> Any:
        # With a factor of 1 the settings are those of the other parameters, so there is no group
        if timing.factor != 1:
            config_overrides = {**(config_overrides or {}), timed_key(model): {MARK: timing.factor}}
        return get_optimizer(config, model, config_overrides=config_overrides, **kwargs)

    def make_scheduler(*args: Any, **kwargs: Any) -> TimedScheduler:
        return TimedScheduler(*args, window=timing.window(samples), **kwargs)

    def log_with_timed_rate(
        losses: Any, totals: Any, rate: Any, iteration: int, *args: Any, **kw: Any
    ) -> Any:
        report(run, iteration)
        return training_log(losses, totals, rate, iteration, *args, **kw)

    driver.get_megatron_optimizer = get_megatron_optimizer
    driver.OptimizerParamScheduler = make_scheduler
    driver.training_log = log_with_timed_rate
    Float16OptimizerWithFloat16Params.sharded_state_dict = _sharded_state_dict
    Float16OptimizerWithFloat16Params.load_state_dict = _load_state_dict


def timed_parameters(model: Iterable[Any]) -> list[torch.nn.Parameter]:
    """Return the query and key weights and biases of the upper half of the layers, on this rank."""
    layers = [part for chunk in model for part in chunk.modules() if isinstance(part, TransformerLayer)]
    found: list[torch.nn.Parameter] = []
    for layer in layers:
        if layer.layer_number in timed_layers(layer.config.num_layers):
            projections = layer.self_attention.linear_qkv
            assert isinstance(projections, SeparateQkvLinear)
            found += [*projections.linear_q.parameters(), *projections.linear_k.parameters()]
    return found


def timed_key(model: Iterable[Any]) -> ParamKey:
    """Return the key by which Megatron's optimizer matches `timed_parameters`."""
    timed = {id(parameter) for parameter in timed_parameters(model)}
    return ParamKey(predicate=ParamPredicate(name="upper_qk", fn=lambda parameter: id(parameter) in timed))


class TimedScheduler(OptimizerParamScheduler):  # type: ignore[misc]
    """Megatron's scheduler, with the learning rate of timed groups multiplied by that of the window.

    Args:
        args: positional arguments of Megatron's scheduler.
        window: the window in samples, the unit of `num_steps`.
        kwargs: keyword arguments of Megatron's scheduler.
    """

    def __init__(self, *args: Any, window: QkWindow, **kwargs: Any) -> None:
        self.qk_window = asdict(window)  # plain, as in the checkpoint that a resume compares it with
        super().__init__(*args, **kwargs)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of a group after `num_steps` samples."""
        rate = float(super().get_lr(param_group))
        return rate * self.multiplier() if is_timed(param_group) else rate

    def multiplier(self) -> float:
        """Return the factor on the learning rate of timed groups after `num_steps` samples."""
        return QkWindow(**self.qk_window).multiplier(self.num_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return Megatron's state and the window."""
        return {**super().state_dict(), "qk_window": self.qk_window}


def is_timed(param_group: dict[str, Any]) -> bool:
    """Return whether a parameter group of the optimizer is timed."""
    return bool(param_group.get(MARK, 1.0) != 1.0)


def report(run: TrainingRun, iteration: int) -> None:
    """Record, draw and log the learning rate of the timed groups where Megatron logs that of the others."""
    rates = [float(group["lr"]) for group in run.step_groups if is_timed(group)]
    if not rates:
        return
    if run.records is not None:
        run.records.extra = {TIMED_RATE: rates[0]}
    writer = get_tensorboard_writer()
    if writer is not None and iteration % run.args.tensorboard_log_interval == 0:
        writer.add_scalar("learning-rate of upper q and k", rates[0], iteration)
    is_last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    others = float(get_canonical_lr_for_logging(run.step_groups) or 0.0)
    if is_last_rank and rates[0] != others and iteration % run.args.log_interval == 0:
        print(
            f"megatron_exact: learning rate of upper q and k {rates[0]:.6E}, "
            f"{rates[0] / others:.3g} of the others'",
            flush=True,
        )


def _sharded_state_dict(optimizer: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return Megatron's state without the groups that have no parameter on this pipeline stage.

    Megatron saves an empty list, which has no tensor, from rank 0 as common to all ranks. A load then
    cannot merge it with the groups of another stage, since the lists differ in length.
    """
    state: dict[str, Any] = _stock_sharded_state(optimizer, *args, **kwargs)
    state[MAIN_PARAMS] = [group for group in state[MAIN_PARAMS] if group]
    return state


def _load_state_dict(optimizer: Any, state: dict[str, Any]) -> None:
    """Load Megatron's state with the empty groups restored."""
    saved = iter(state[MAIN_PARAMS])
    state[MAIN_PARAMS] = [next(saved) if group else [] for group in optimizer.fp32_from_float16_groups]
    _stock_load_state(optimizer, state)
