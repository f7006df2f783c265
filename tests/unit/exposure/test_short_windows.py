"""Short windows against a plain definition, target by target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.exposure import effective_context
from megatron_exact.exposure.confidence import ShortWindows, default_windows


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    window=st.integers(8, 40),
    stride_share=st.floats(0.05, 1),
    last_continues=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_target_beyond_the_window_is_scored_once_with_a_short_context_of_its_own(
    lengths: list[int], window: int, stride_share: float, last_continues: bool
) -> None:
    stride = max(1, int(window * stride_share))
    windows = ShortWindows(window=window, stride=stride)
    cu_seqlens = np.cumsum([0, *lengths])
    context = effective_context(cu_seqlens, last_continues=last_continues)
    supervised = np.random.default_rng(sum(lengths)).random(context.size) < 0.8
    scored = windows.scored(context, supervised)
    assert scored.tolist() == [bool(s) and c > window for s, c in zip(supervised, context, strict=True)]
    segment_of = np.repeat(np.arange(len(lengths)), lengths)
    times = np.zeros(context.size, dtype=int)
    for part in windows.place(cu_seqlens, scored):
        assert part.stop - part.start <= window
        assert len(set(segment_of[part.start : part.stop])) == 1
        assert part.first_scored - part.start == window - stride
        assert (part.start - cu_seqlens[segment_of[part.start]]) % stride == 0
        times[part.first_scored : part.stop] += 1
    assert (times[scored] == 1).all()
    assert times.max(initial=0) <= 1


def test_the_papers_row() -> None:
    windows = default_windows(32_768)
    assert (windows.window, windows.stride) == (8192, 6144)
    places = windows.place(np.array([0, 32_768]), np.arange(32_768) >= 8192)
    assert [(part.start, part.first_scored, part.stop) for part in places] == [
        (6144, 8192, 14_336),
        (12_288, 14_336, 20_480),
        (18_432, 20_480, 26_624),
        (24_576, 26_624, 32_768),
    ]


def test_nothing_is_computed_where_nothing_is_scored() -> None:
    windows = ShortWindows(window=8, stride=6)
    assert windows.place(np.array([0, 8, 40]), np.zeros(40, bool)) == []  # padding, or masked targets


@pytest.mark.parametrize(
    ("window", "stride", "match"), [(7, 4, "below 8"), (16, 0, r"not in \[1, 16\]"), (16, 17, "not in")]
)
def test_windows_that_cannot_be_are_refused(window: int, stride: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ShortWindows(window=window, stride=stride)


def test_a_window_as_long_as_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="scores nothing"):
        default_windows(64, window=64)
