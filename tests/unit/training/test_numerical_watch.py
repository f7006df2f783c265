from __future__ import annotations

import math
import random
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_exact.data.attention_work import StepLayout
from megatron_exact.training.batch import Targets
from megatron_exact.training.loss import TargetStatistics, weighted_token_loss
from megatron_exact.training.numerical_watch import (
    NumericalWatch,
    SpikeDetector,
    balanced_steps,
    first_damage,
    stream_position,
)


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


def noise(seed: int, count: int) -> list[float]:
    generator = random.Random(seed)
    return [3 + 0.05 * generator.gauss(0, 1) for _ in range(count)]


def test_the_rule_against_its_definition() -> None:
    losses = noise(1, 60)
    losses[40] += 0.5
    detector, found = SpikeDetector(6.0, 20), {}
    for index, loss in enumerate(losses):
        spike = detector.add(loss)
        if spike is not None:
            found[index] = spike
    assert list(found) == [40]
    before = losses[20:40]
    deviation = 1.4826 * median(abs(loss - median(before)) for loss in before)
    assert found[40].median == pytest.approx(median(before))
    assert found[40].deviation == pytest.approx(deviation)
    assert losses[40] > median(before) + 6 * deviation


def test_a_resumed_run_finds_what_the_unbroken_one_finds() -> None:
    losses = noise(2, 40)
    losses[25] += 1
    whole, first = SpikeDetector(8.0, 16), SpikeDetector(8.0, 16)
    expected = [whole.add(loss) for loss in losses]
    found = [first.add(loss) for loss in losses[:24]]
    second = SpikeDetector(8.0, 16, losses[:24])
    assert found + [second.add(loss) for loss in losses[24:]] == expected
    assert expected[25] is not None


def test_no_spike_without_half_a_window_or_for_a_still_or_falling_loss() -> None:
    detector = SpikeDetector(8.0, 20)
    assert [detector.add(loss) for loss in (*noise(3, 9), 50.0)] == [None] * 10
    still = SpikeDetector(8.0, 4)
    assert [still.add(2.0 + 1e-6 * step) for step in range(20)] == [None] * 20
    falling = SpikeDetector(8.0, 8)
    assert [falling.add(10 * 0.9**step) for step in range(40)] == [None] * 40


def test_what_is_not_finite_is_left_out_and_zero_finds_nothing() -> None:
    detector = SpikeDetector(8.0, 8, [2.0, None, 2.01, 1.99, 2.0])
    assert detector.add(math.nan) is None
    assert detector.add(9.0) is not None
    assert SpikeDetector(0, 8, [2.0] * 8).add(1e9) is None


def test_balanced_steps_begin_at_whole_steps() -> None:
    """A step that began inside another would mix the rows of two steps."""
    sizes = {"global_batch_size": 8, "data_parallel_size": 2, "micro_batch_size": 2}
    args = SimpleNamespace(balance_rows=True, consumed_train_samples=24, **sizes)
    assert balanced_steps(args) == StepLayout(rows=8, ranks=2, micro_batch_rows=2)
    args.consumed_train_samples = 20
    with pytest.raises(ValueError, match=r"--balance-rows with 20 consumed samples.*whole steps of 8 rows"):
        balanced_steps(args)
    args.balance_rows = False
    assert balanced_steps(args) is None
