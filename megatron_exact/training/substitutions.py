"""Every run-time substitution in upstream's driver, in one place.

`megatron.core.datasets.utils.compile_helpers`
    runs `make` in a folder that has no Makefile in the wheel, and exits; the compiled helper is in the
    wheel already. Replaced by nothing.
`megatron.training.training.training_log`
    prints a mean over several iterations; the true values of each are recorded before it runs.
`megatron.training.training.evaluate_and_print_results`
    knows no buckets; their sums are recorded around it, and the last iteration, which upstream
    evaluates twice, is evaluated once.

All of it answers megatron-core 0.19.2. On a machine without a GPU `cpu_runtime.py` adds its own list.
Official hooks (layer spec, gradient finalisation, dataset provider, forward step) are no substitutions
and stand in `run.py`.
"""

from __future__ import annotations

from typing import Any

import megatron.core.datasets.utils
import megatron.training.training as driver

from megatron_exact.training.run import TrainingRun

_stock_training_log = driver.training_log
_stock_evaluate_and_print_results = driver.evaluate_and_print_results


def install(run: TrainingRun) -> None:
    """Put the substitutions in place for this job."""
    megatron.core.datasets.utils.compile_helpers = lambda: None

    def training_log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: float | None,
        iteration: int,
        loss_scale: Any,
        report_memory_flag: Any,
        skipped_iter: Any,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run.record_iteration(iteration, grad_norm=grad_norm, learning_rate=learning_rate)
        return _stock_training_log(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *args,
            **kwargs,
        )

    def evaluate_and_print_results(
        prefix: str, forward_step: Any, iterator: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> None:
        if run.was_evaluated(iteration):
            return
        run.begin_evaluation()
        _stock_evaluate_and_print_results(prefix, forward_step, iterator, model, iteration, *args, **kwargs)
        run.record_evaluation(iteration)

    driver.training_log = training_log
    driver.evaluate_and_print_results = evaluate_and_print_results
