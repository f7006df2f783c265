from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_exact.training.batch import Targets
from megatron_exact.training.loss import TargetStatistics, weighted_token_loss
from megatron_exact.training.monitor import NumericalWatch, first_damage, stream_position


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [1, 4], ids=["supervised", "unsupervised"])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float, place: int) -> None:
    losses = torch.ones(1, 6)
    losses[0, place] = value
    losses.requires_grad_()
    mask = torch.tensor([[1.0, 1, 1, 1, 0, 1]])
    targets = Targets(loss_mask=mask, weights=mask, buckets=torch.zeros(1, 6, dtype=torch.int64))
    statistics = TargetStatistics(1)
    loss, _, _ = weighted_token_loss(losses, targets, statistics)
    loss.backward()
    assert losses.grad is not None
    assert torch.isnan(losses.grad).all()
    (held,) = statistics.losses
    found = first_damage(held)
    assert found is not None
    assert found[0] == place
    statistics.take()
    assert statistics.losses == []
    stock = losses.detach().clone().requires_grad_()  # negative control: the plain sum has one
    (stock * mask).sum().backward()
    assert stock.grad is not None
    assert torch.isfinite(stock.grad).all()


@pytest.mark.parametrize("size", [2, 4])
def test_positions_of_context_parallel_ranks(size: int) -> None:
    tokens = 16 * size
    spans = torch.arange(tokens).view(2 * size, -1)
    for rank in range(size):
        own = torch.cat([spans[rank], spans[2 * size - 1 - rank]]).tolist()
        found = [stream_position(place, tokens=tokens, size=size, rank=rank) for place in range(len(own))]
        assert found == own


class Optimizer:
    """Upstream's order of calls: norm, clipping, step."""

    def __init__(self, norm: float, clip: float) -> None:
        self.norm, self.clip, self.steps = norm, clip, 0

    def get_grad_norm(self) -> float:
        return self.norm

    def clip_grad_norm(self, clip: float) -> float:
        return self.norm

    def step_with_ready_grads(self) -> bool:
        self.steps += 1
        return True

    def step(self) -> tuple[bool, float]:
        norm = self.clip_grad_norm(self.clip) if self.clip else 0.0
        return self.step_with_ready_grads(), norm


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(("norm", "is_taken"), [(2.0, True), (math.nan, False), (math.inf, False)])
def test_a_step_is_refused_if_its_gradient_is_not_finite(norm: float, is_taken: bool, clip: float) -> None:
    watch, optimizer = NumericalWatch(), Optimizer(norm, clip)
    watch.guard(optimizer)
    assert optimizer.step()[0] is is_taken
    assert (optimizer.steps, watch.refused) == (int(is_taken), not is_taken)


def test_damaged_buckets_name_their_parameters() -> None:
    class Bucket:
        def __init__(self, values: list[float], parameters: list[Any]) -> None:
            self.grad_data, self.params_list = torch.tensor(values), parameters

    class Group:
        def __init__(self, *buckets: Bucket) -> None:
            self.buckets = buckets

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    first, second = list(model[0].parameters()), list(model[1].parameters())
    watch = NumericalWatch()
    watch.check_grads(Group(Bucket([1.0, math.nan], second), Bucket([1.0], first)))
    assert watch.damaged_parameters([model]) == ["1.weight", "1.bias"]
    watch.begin_step()
    assert watch.damaged_parameters([model]) == []
