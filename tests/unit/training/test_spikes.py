from __future__ import annotations

import math
import random
from statistics import median

import pytest

from megatron_exact.training.records import SpikeDetector


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
