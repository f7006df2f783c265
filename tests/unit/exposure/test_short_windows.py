"""Short windows against a plain definition, target by target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.exposure import effective_context
from megatron_exact.exposure.confidence import BORDERS, ShortWindows, default_windows

RECORDED = Path(__file__).parents[2] / "recorded" / "confidence_weights.json"


def short_contexts(windows: ShortWindows, row_tokens: int) -> list[int]:
    """Tokens before each target of a row of one document, in the window that scores it."""
    found = np.arange(1, row_tokens + 1)
    scored = windows.scored(found, np.ones(row_tokens, bool))
    for part in windows.place(np.array([0, row_tokens]), scored):
        targets = np.arange(part.first_scored, part.stop)
        targets = targets[scored[targets]]
        found[targets] = targets - part.start + 1
    return list(found.tolist())


@pytest.mark.parametrize("recorded", json.loads(RECORDED.read_text())["short_contexts"])
def test_short_contexts_are_those_of_the_authors_code(recorded: dict[str, Any]) -> None:
    window, stride, row_tokens = (recorded[name] for name in ("window", "stride", "row_tokens"))
    theirs = recorded["in_training"]
    ours = short_contexts(ShortWindows(window=window, stride=stride), row_tokens)
    assert ours[:-1] == theirs  # the last target of a row is not one of theirs
    borders = range(window + stride - 1, row_tokens - 1, stride)
    assert [theirs[target] for target in borders] == [window - stride] * len(borders)
    other = short_contexts(ShortWindows(window=window, stride=stride, border="input"), row_tokens)
    assert [target for target, context in enumerate(theirs) if context != other[target]] == [*borders]
    assert {other[target] for target in borders} == {window}
    # what they score beforehand differs from what they score in training in the border of the first window
    beforehand = recorded["beforehand"]
    assert beforehand[window - 1] == window - stride
    assert [*beforehand[: window - 1], window, *beforehand[window:]] == theirs


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    window=st.integers(8, 40),
    stride_share=st.floats(0.05, 1),
    last_continues=st.booleans(),
    border=st.sampled_from(BORDERS),
)
@settings(max_examples=150, deadline=None)
def test_every_target_beyond_the_window_is_scored_once_with_a_short_context_of_its_own(
    lengths: list[int], window: int, stride_share: float, last_continues: bool, border: str
) -> None:
    lead = int(border == "target")
    stride = max(1, int((window - lead) * stride_share))
    windows = ShortWindows(window=window, stride=stride, border=border)
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
        assert part.first_scored - part.start == window - stride - lead
        assert (part.start - cu_seqlens[segment_of[part.start]]) % stride == 0
        times[part.first_scored : part.stop] += 1
    assert (times[scored] == 1).all()
    assert times.max(initial=0) <= 1


@pytest.mark.parametrize(("border", "lead"), [("input", 0), ("target", 1)])
def test_the_papers_row(border: str, lead: int) -> None:
    windows = default_windows(32_768, border=border)
    assert (windows.window, windows.stride) == (8192, 6144)
    places = windows.place(np.array([0, 32_768]), np.arange(32_768) >= 8192)
    assert [(part.start, part.first_scored + lead, part.stop) for part in places] == [
        (6144, 8192, 14_336 - lead),
        (12_288, 14_336, 20_480 - lead),
        (18_432, 20_480, 26_624 - lead),
        (24_576, 26_624, 32_768),
    ]


def test_nothing_is_computed_where_nothing_is_scored() -> None:
    windows = ShortWindows(window=8, stride=6)
    assert windows.place(np.array([0, 8, 40]), np.zeros(40, bool)) == []  # padding, or masked targets


@pytest.mark.parametrize(
    ("window", "stride", "border", "match"),
    [
        (7, 4, "target", "below 8"),
        (16, 0, "input", r"not in \[1, 16\]"),
        (16, 17, "input", "not in"),
        (16, 16, "target", r"not in \[1, 15\]"),
        (16, 12, "label", "unknown short border 'label'"),
    ],
)
def test_windows_that_cannot_be_are_refused(window: int, stride: int, border: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ShortWindows(window=window, stride=stride, border=border)


def test_a_window_as_long_as_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="scores nothing"):
        default_windows(64, window=64)
