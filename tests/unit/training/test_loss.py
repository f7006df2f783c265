from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_exact.training.batch import Targets
from megatron_exact.training.loss import (
    LARGEST_LOSS,
    TargetStatistics,
    sums_by_bucket,
    totals_of,
    weighted_token_loss,
)

BUCKETS = 4


def random_targets(seed: int, *, weighted: bool) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(1, 300, generator=generator) * 9
    mask = (torch.rand(1, 300, generator=generator) > 0.2).float()
    weights = 10 ** (torch.rand(1, 300, generator=generator) * 4 - 3) if weighted else torch.ones(1, 300)
    if weighted:
        weights[0, :20] = 0  # legal, and no reason to leave a target out of the count
    buckets = torch.randint(0, BUCKETS, (1, 300), generator=generator)
    return losses, Targets(loss_mask=mask, weights=weights, buckets=buckets)


@pytest.mark.parametrize("seed", range(5))
def test_unit_weights_are_the_stock_loss_to_the_bit(seed: int) -> None:
    losses, targets = random_targets(seed, weighted=False)
    ours, stock = losses.clone().requires_grad_(), losses.clone().requires_grad_()
    loss, count, report = weighted_token_loss(ours, targets, TargetStatistics(BUCKETS))
    mask = targets.loss_mask.view(-1).float()
    expected = torch.sum(stock.view(-1).float() * mask)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert ours.grad is not None
    assert stock.grad is not None
    assert torch.equal(ours.grad, stock.grad)
    assert (count.dtype, int(count)) == (torch.int32, int(mask.sum()))
    assert torch.equal(report["lm loss"], report["weighted loss"])


@pytest.mark.parametrize("divides_by_mass", [False, True])
def test_weighted_loss_against_float64(divides_by_mass: bool) -> None:
    losses, targets = random_targets(7, weighted=True)
    variable = losses.clone().requires_grad_()
    statistics = TargetStatistics(BUCKETS)
    loss, count, report = weighted_token_loss(
        variable, targets, statistics, divides_by_mass=divides_by_mass
    )
    loss.backward()
    w, m, ce = (x.double().view(-1) for x in (targets.weights, targets.loss_mask, losses))
    assert loss.item() == pytest.approx(float((w * m * ce).sum()), rel=1e-6)
    assert variable.grad is not None
    torch.testing.assert_close(variable.grad.view(-1).double(), w * m, rtol=1e-7, atol=0)
    assert int(count) == int(m.sum()) != round(float((w * m).sum()))
    divisor = (w * m).sum() if divides_by_mass else m.sum()
    numerator, denominator = report["weighted loss"].tolist()
    assert numerator / denominator == pytest.approx(float((w * m * ce).sum() / divisor), rel=1e-5)
    totals = totals_of(statistics.take())
    assert totals.weight_mass == pytest.approx(float((w * m).sum()), rel=1e-12)
    assert totals.objective(divides_by_mass=divides_by_mass) == pytest.approx(
        float((w * m * ce).sum() / divisor), rel=1e-12
    )


def test_statistics_by_bucket_over_micro_batches() -> None:
    statistics = TargetStatistics(BUCKETS)
    sums, counts = [0.0] * BUCKETS, [0] * BUCKETS
    for seed in range(3):
        losses, targets = random_targets(seed, weighted=True)
        statistics.add(losses.view(-1), targets)
        for loss, mask, bucket in zip(
            losses.view(-1).tolist(),
            targets.loss_mask.view(-1).tolist(),
            targets.buckets.view(-1).tolist(),
            strict=True,
        ):
            sums[bucket] += loss * mask
            counts[bucket] += int(mask)
    totals = totals_of(statistics.take())
    assert totals.bucket_targets == counts
    assert totals.bucket_loss_sums == pytest.approx(sums, rel=1e-12)
    assert totals.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-12)


def test_a_batch_without_targets_has_no_loss() -> None:
    targets = Targets(
        loss_mask=torch.zeros(1, 5), weights=torch.ones(1, 5), buckets=torch.zeros(1, 5, dtype=torch.int64)
    )
    statistics = TargetStatistics(BUCKETS)
    loss, count, _ = weighted_token_loss(torch.ones(1, 5, requires_grad=True), targets, statistics)
    assert (float(loss), int(count)) == (0.0, 0)
    totals = totals_of(statistics.take())
    assert totals.targets == 0
    assert totals.loss != totals.loss  # NaN


def float64_sums(losses: Tensor, mask: Tensor, buckets: Tensor) -> np.ndarray:
    """Sums by bucket with numpy, in one order."""
    return np.bincount(
        buckets.numpy(), weights=losses.double().numpy() * mask.double().numpy(), minlength=BUCKETS
    )


@pytest.mark.parametrize("largest", [1e-3, 12.0, 5e4, LARGEST_LOSS / 2])
def test_sums_by_bucket_against_float64(largest: float) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = 1 << 14
    losses = torch.rand(tokens, generator=generator) ** 4 * largest
    mask = (torch.rand(tokens, generator=generator) > 0.1).float()
    buckets = torch.randint(0, BUCKETS, (tokens,), generator=generator)
    sums, counts = sums_by_bucket(losses, mask, buckets, BUCKETS)
    expected = float64_sums(losses, mask, buckets)
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-14, atol=tokens * 2.0**-50)
    assert counts.tolist() == np.bincount(buckets.numpy(), weights=mask.numpy(), minlength=BUCKETS).tolist()
    # sums in float32 would be seen
    plain = torch.zeros(BUCKETS).index_add_(0, buckets, losses * mask)
    assert np.abs(plain.double().numpy() / expected - 1).max() > 1e-9


def test_sums_by_bucket_do_not_depend_on_the_order() -> None:
    losses, targets = random_targets(5, weighted=False)
    flat = [part.view(-1) for part in (losses, targets.loss_mask, targets.buckets)]
    order = torch.randperm(flat[0].numel(), generator=torch.Generator().manual_seed(1))
    here = sums_by_bucket(*flat, BUCKETS)
    there = sums_by_bucket(*(part[order] for part in flat), BUCKETS)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_sums_of_many_large_losses_are_right_or_not_finite() -> None:
    """An int64 that wraps around would be a finite, wrong sum."""
    tokens = 1 << 19
    ones, buckets = torch.ones(tokens), torch.zeros(tokens, dtype=torch.int64)
    for exponent in range(28, 37):
        sums, counts = sums_by_bucket(ones * 2.0**exponent, ones, buckets, 1)
        assert counts.item() == tokens
        assert sums.isnan().item() or sums.item() == tokens * 2.0**exponent
    assert sums.isnan().item()
    assert sums_by_bucket(ones * 2.0**28, ones, buckets, 1)[0].item() == tokens * 2.0**28


def test_a_loss_that_does_not_count_may_be_of_any_size() -> None:
    losses, mask = torch.tensor([1.0, 2.0**40]), torch.tensor([1.0, 0.0])
    sums, _ = sums_by_bucket(losses, mask, torch.tensor([0, 1]), 2)
    assert sums.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf, 2 * LARGEST_LOSS])
def test_a_loss_that_is_not_finite_shows_in_the_sums(damage: float) -> None:
    losses, targets = random_targets(5, weighted=False)
    losses[0, 17] = damage
    statistics = TargetStatistics(BUCKETS)
    statistics.add(losses.view(-1), targets)
    totals = totals_of(statistics.take())
    assert totals.loss != totals.loss  # NaN
    assert totals.targets == int(targets.loss_mask.sum())
