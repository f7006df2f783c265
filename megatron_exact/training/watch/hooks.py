"""Where the watches over numbers and ranks meet upstream's driver; listed in substitutions.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import megatron.training.training as driver
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

if TYPE_CHECKING:
    from megatron_exact.training.run import TrainingRun

_stock_get_optimizer = driver.get_megatron_optimizer
_stock_save = driver.save_checkpoint_and_time


def install(run: TrainingRun) -> None:
    """Put the replacements in place for this job."""

    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = _stock_get_optimizer(*args, **kwargs)
        run.numbers.guard(optimizer)
        run.optimizer = optimizer
        return optimizer

    def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
        run.rank_watch.mark("saving a checkpoint", is_slow=True)
        with run.throughput.aside("save"):
            result = _stock_save(*args, **kwargs)
        run.rank_watch.mark("ending the save")
        return result

    driver.get_megatron_optimizer = get_megatron_optimizer
    driver.save_checkpoint_and_time = save_checkpoint_and_time
    _ParamAndGradBucketGroup.check_grads = lambda group, **_: run.numbers.check_grads(group)
