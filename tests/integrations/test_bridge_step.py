"""The wrapped forward step around Megatron's own model and schedule, and around Megatron-Bridge's loss.

Megatron-Bridge as a whole needs Transformer Engine, mamba-ssm and an older megatron-core, and was not run.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.integrations import megatron_bridge_pretrain
from megatron_exact.integrations.bridge_step import exact_forward_step
from megatron_exact.integrations.exposure_table import make_table, write_table
from megatron_exact.integrations.target_weights import TargetWeights
from tests.distributed import jobs, ranks
from tests.distributed.test_gradients import dump_first_gradients, whole_parameters
from tests.integrations.conftest import BOUND, Reference, hf_names


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_table(make_table(64, [100, 50, 30, 10]), tmp_path / "table.json")
    return tmp_path / "table.json"


def test_a_job_on_megatron(
    start: Path, step_on_megatron: Callable[[str, str], Reference], tmp_path: Path
) -> None:
    """A job without weights, whose forward step is wrapped, is the job with weights."""
    reference = step_on_megatron("best-fit", "exact")

    def wrap_the_step(rule: str, folder: Path) -> Callable[[], None]:
        def patch() -> None:
            from megatron_exact.training.run import TrainingRun

            stock = TrainingRun.forward_step
            weigh = TargetWeights(reference.table, rule)

            def forward_step(run: Any, iterator: Any, model: Any) -> Any:
                def step(data_iterator: Any, model: Any) -> Any:
                    return stock(run, data_iterator, model)

                return exact_forward_step(step, weigh)(iterator, model)

            TrainingRun.forward_step = forward_step  # type: ignore[method-assign]
            dump_first_gradients(folder)()

        return patch

    def job(rule: str) -> tuple[float, dict[str, Tensor]]:
        folder = tmp_path / rule
        argv = [
            *("--pack", reference.pack, "--load", start / "checkpoint", "--run-dir", folder / "run"),
            *("--token-weighting", "none", *jobs.SCHEDULE, "--train-iters", 1, "--micro-batch-size", 2),
        ]
        ranks.train(1, argv, folder, wrap_the_step(rule, folder)).check()
        (line,) = ranks.read_jsonl(folder / "run" / "losses.jsonl")
        gradients = {name: grad for name, (_, grad) in whole_parameters(folder, 1).items()}
        return line["loss"], hf_names(gradients)

    reference.check(*job("exact"))
    _, unweighted = job("none")
    assert max(reference.difference(unweighted).values()) > 1000 * BOUND


def bridge_step(state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
    """The arguments and the shape of results of Megatron-Bridge's `gpt_step.forward_step`."""
    batch = next(data_iterator)
    return model(batch), functools.partial(state, batch["loss_mask"])


def masked_sum(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The masked sum and count that the loss function of a plain step returns."""
    total, count = (losses * loss_mask).sum(), loss_mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count])}


def batch_and_losses() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None]
    mask = (torch.rand(1, 64, generator=generator) > 0.2).float()
    return {"position_ids": positions, "loss_mask": mask}, torch.rand(1, 64, generator=generator)


def test_weights_change_the_sum_alone(table: Path) -> None:
    batch, values = batch_and_losses()
    weigh = TargetWeights(table, alpha=0.9)
    step = exact_forward_step(bridge_step, weigh)
    assert list(inspect.signature(step).parameters)[:2] == [
        "state",
        "data_iterator",
    ]  # what Bridge looks at
    losses = values.clone().requires_grad_()
    output, loss_function = step(masked_sum, iter([batch]), lambda _: losses)
    total, count, _ = loss_function(output)
    weights = weigh(batch["position_ids"]) * batch["loss_mask"]
    assert total.item() == pytest.approx((values * weights).sum().item(), rel=1e-6)
    assert int(count) == int(batch["loss_mask"].sum())
    total.backward()
    assert torch.equal(losses.grad, weights)
    assert not torch.equal(weights, batch["loss_mask"])
    with torch.no_grad():
        assert loss_function(output)[0] == masked_sum(batch["loss_mask"], values)[0]


def test_what_is_refused(table: Path) -> None:
    batch, values = batch_and_losses()
    weigh = TargetWeights(table)
    with pytest.raises(ValueError, match="sum of weights"):
        exact_forward_step(bridge_step, TargetWeights(table, "exact-normalized"))
    with pytest.raises(ValueError, match="no data_iterator"):
        exact_forward_step(lambda model: model, weigh)
    for changed, losses, message in (
        ({"loss_mask": batch["loss_mask"]}, values, "position_ids that restart"),
        (batch, values[:, :32], "context parallelism"),
    ):
        output, function = exact_forward_step(bridge_step, weigh)(
            lambda mask, found: (found.sum(), mask.sum(), {}),
            iter([changed]),
            lambda _, found=losses: found,
        )
        with pytest.raises(ValueError, match=message):
            function(output)
    output, function = exact_forward_step(bridge_step, weigh)(
        lambda mask, found: (found.sum(), {}), iter([batch]), lambda _: values
    )
    with pytest.raises(ValueError, match="calculate_per_token_loss"):
        function(output)


def test_the_example_wraps_the_step(table: Path) -> None:
    calls: list[Any] = []
    config = SimpleNamespace(dataset=SimpleNamespace(), model=SimpleNamespace(), ddp=SimpleNamespace())
    megatron_bridge_pretrain.main(
        str(table), config, lambda given, step: calls.append((given, step)), bridge_step
    )
    ((given, step),) = calls
    assert given.model.calculate_per_token_loss
    assert given.dataset.reset_position_ids
    assert step.__wrapped__ is bridge_step


@pytest.mark.integrations
def test_the_loss_of_megatron_bridge(table: Path) -> None:
    """Its loss function by itself: the package around it does not import without Transformer Engine."""
    import megatron

    paths = [Path(place) / "bridge" / "training" / "losses.py" for place in megatron.__path__]
    (path,) = [path for path in paths if path.is_file()]
    spec = importlib.util.spec_from_file_location("bridge_losses", path)
    assert spec is not None
    assert spec.loader is not None
    losses_of_bridge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses_of_bridge)
    batch, values = batch_and_losses()
    weigh = TargetWeights(table, alpha=0.9)

    def loss(mask: Tensor, output: Tensor) -> Any:
        return losses_of_bridge.masked_next_token_loss(mask, output, check_for_nan_in_loss=False)

    losses = values.clone().requires_grad_()
    output, function = exact_forward_step(bridge_step, weigh)(loss, iter([batch]), lambda _: losses)
    total, count, _ = function(output)
    total.backward()
    assert torch.equal(losses.grad, weigh(batch["position_ids"]) * batch["loss_mask"])
    assert int(count) == int(batch["loss_mask"].sum())
