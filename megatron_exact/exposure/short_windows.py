"""Which short windows of a row are scored: the short context of confidence-based weighting.

A segment of n inputs is covered by windows [k * stride, k * stride + window), k = 0, 1, ... A target is
scored by the first window that holds its input, so it has between window - stride + 1 and window tokens of
context; the overlap of two windows is context only. The first window of a segment would give every target
the context that it has anyway, so it is never computed: there CE_short is CE_long and d = 0, as in the
source (arXiv 2503.09202: window 8,192 and stride 6,144 in rows of 32,768). No window leaves its segment.
The first token of a document is predicted without context of its own, wherever it stands: d = 0.

So exactly the supervised targets with an effective context above `window` are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_WINDOW_TOKENS = 8
ROW_FRACTION = 4  # of the row, and three quarters of the window: 8,192 and 6,144 at 32,768, as the source


@dataclass(frozen=True, kw_only=True)
class ShortWindows:
    """Lengths of the windows.

    Raises:
        ValueError: a window that is too short, or a stride that leaves gaps.
    """

    window: int
    """Tokens of a window."""
    stride: int
    """Tokens from the start of one to that of the next."""

    def __post_init__(self) -> None:
        if self.window < MIN_WINDOW_TOKENS:
            raise ValueError(
                f"a short window of {self.window} tokens is below {MIN_WINDOW_TOKENS}: give a longer "
                "--short-window, or pack longer rows"
            )
        if not 0 < self.stride <= self.window:
            raise ValueError(
                f"a stride of {self.stride} tokens is not in [1, {self.window}], the short window: targets "
                "would have no window; give another --short-stride"
            )

    def scored(self, context: NDArray[np.int64], supervised: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which targets are scored, [S]; the others have d = 0.

        Args:
            context: [S], effective context of each target, or anything in [0, 8) for 0.
            supervised: [S].
        """
        return supervised & (context > self.window)

    def place(self, cu_seqlens: NDArray[np.int64], scored: NDArray[np.bool_]) -> list[Window]:
        """The windows of a row, in its order; one that would score nothing is left out.

        Args:
            cu_seqlens: [segments + 1], from 0 to S.
            scored: [S], from `scored`.
        """
        windows = []
        for begin, end in pairwise(cu_seqlens.tolist()):
            for first in range(begin + self.window, end, self.stride):
                start = first - self.window + self.stride
                stop = min(start + self.window, end)
                if scored[first:stop].any():
                    windows.append(Window(start=start, first_scored=first, stop=stop))
        return windows


@dataclass(frozen=True, kw_only=True)
class Window:
    """One window, in positions of the row."""

    start: int
    """First input."""
    first_scored: int
    """First input whose target is scored; those before it are context."""
    stop: int
    """After the last input."""


def default_windows(
    row_tokens: int, *, window: int | None = None, stride: int | None = None
) -> ShortWindows:
    """A quarter of the row, and three quarters of the window, unless given.

    Raises:
        ValueError: see ShortWindows; or a window as long as the row, whose scores would all be 0.
    """
    window = row_tokens // ROW_FRACTION if window is None else window
    if window >= row_tokens:
        raise ValueError(
            f"a short window of {window} tokens in rows of {row_tokens} scores nothing: give a shorter "
            "--short-window"
        )
    return ShortWindows(window=window, stride=max(1, window * 3 // 4) if stride is None else stride)
