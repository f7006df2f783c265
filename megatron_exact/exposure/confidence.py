"""Confidence-based token weighting (arXiv 2503.09202): weights from what long context changes.

`d = CE_long - CE_short` of each supervised target is below 0 where long context makes the target likelier.
With n supervised targets in a row and L1(v) = v * n / sum(v), which has mean 1 over them:

| rule | weight |
|---|---|
| dense | `lambda + (1 - lambda) * L1(abs(d))` |
| sparse | L1 of 1 for the top-kappa fraction of abs(d), 0 for the rest |
| longce | `min(exp(-d), cap)`, whose mean is free |
| ppmi | `L1(v)`, `v = max(-d - log s, 0)`; with kappa L1 of 1 for the top-kappa fraction of v, else 0 |
| npmi | the same of `v = max(d - log s, 0)` |
| ppmi-values, npmi-values | with kappa L1 of the values of the top-kappa fraction, 0 for the rest |

The first five are those of the authors' code (UKPLab/naacl2025-token-weighting): the fraction is
floor(kappa * n) targets. Where it is less than one target, theirs keeps all, ours one. Targets that tie at
its edge share what is left of it equally, so neither order nor position decides; theirs takes the later
ones, and of zeros random ones. In a row of zeros every weight is 1; a row without a supervised target has
nothing to weigh.

numpy, float64. `confidence_torch.py` computes the same on the device of a training step. `ShortWindows`
gives the windows of a row at which CE_short is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DEFAULT_SPARSE_KAPPA = 0.2  # not stated in the paper
MIN_WINDOW_TOKENS = 8
BORDERS = ("target", "input")
"""Where a target belongs past a window: to the first window that has its target token, as in the authors'
code, or to the first that has its input."""
OLD_BORDER = "input"
"""The border of scores and runs whose records name none."""
ROW_FRACTION = 4  # with a stride of 3/4 of the window: 8,192 and 6,144 in rows of 32,768, as in the paper


@dataclass(frozen=True, kw_only=True)
class ConfidenceParameters:
    """Parameters of the confidence rules. The paper states no values for them; the defaults are ours.

    Raises:
        ValueError: a value out of range.
    """

    lam: float = 0.5
    """lambda of `dense`, the part of the weight that every target has, in [0, 1]."""
    kappa: float | None = None
    """Fraction of a row's targets that `sparse` (None: DEFAULT_SPARSE_KAPPA) and the rules that read `s`
    (None: all) keep, in (0, 1]."""
    cap: float = 5.0
    """Largest weight of `longce`, above 0."""
    s: float = 1.0
    """`ppmi` and `npmi` keep a target whose likelihood changes by more than this factor, above 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"--confidence-lambda {self.lam:g} is not in [0, 1]: 1 weighs nothing")
        if self.kappa is not None and not 0 < self.kappa <= 1:
            raise ValueError(f"--confidence-kappa {self.kappa:g} is not in (0, 1]: 1 keeps every target")
        for name, value in (("cap", self.cap), ("s", self.s)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--confidence-{name} {value:g} is not a finite number above 0: change it")


@dataclass(frozen=True, kw_only=True)
class ConfidenceRule:
    """One row of the table of confidence rules."""

    weigh: Callable[[Floats, Bools, ConfidenceParameters], Floats]
    """(d [S], supervised [S], parameters) -> weights [S]."""
    parameters: tuple[str, ...]
    """Fields of ConfidenceParameters that it reads."""
    summary: str
    """One line for `--help`."""


def confidence_weights(
    rule: str, differences: ArrayLike, supervised: ArrayLike, parameters: ConfidenceParameters
) -> Floats:
    """Compute the weights of the targets of one row.

    Args:
        rule: a name in CONFIDENCE_RULES.
        differences: floats [S], `CE_long - CE_short` in nats; read where supervised.
        supervised: booleans [S].
        parameters: of the rule.

    Returns:
        float64 [S], >= 0, and 1 where unsupervised.

    Raises:
        ValueError: an unknown rule, shapes that differ, or a supervised target whose score is not finite.
    """
    if rule not in CONFIDENCE_RULES:
        raise ValueError(f"{rule!r} is not a confidence rule: choose one of {', '.join(CONFIDENCE_RULES)}")
    d = np.asarray(differences, dtype=np.float64)
    mask = np.asarray(supervised, dtype=np.bool_)
    if d.shape != mask.shape or d.ndim != 1:
        raise ValueError(f"{d.shape} scores for {mask.shape} targets: one score for each is needed")
    d = np.where(mask, d, 0.0)
    if not np.isfinite(d).all():
        place = int(np.flatnonzero(~np.isfinite(d))[0])
        raise ValueError(
            f"the score of target {place} of a row is {d[place]}: score the pack again with a model whose "
            "losses are finite"
        )
    if not mask.any():
        return np.ones(d.shape)
    return np.where(mask, CONFIDENCE_RULES[rule].weigh(d, mask, parameters), 1.0)


def _dense(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    return parameters.lam + (1 - parameters.lam) * _mean_one(np.abs(d), mask)


def _sparse(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    kappa = DEFAULT_SPARSE_KAPPA if parameters.kappa is None else parameters.kappa
    return _mean_one(_top_share(np.abs(d), mask, kappa), mask)


def _longce(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    return np.exp(np.minimum(-d, math.log(parameters.cap)))  # no overflow where -d is large


def _ppmi(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    return _beyond_s(-d, mask, parameters)


def _npmi(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    return _beyond_s(d, mask, parameters)


def _ppmi_values(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    return _beyond_s(-d, mask, parameters, keeps_values=True)


def _npmi_values(d: Floats, mask: Bools, parameters: ConfidenceParameters) -> Floats:
    return _beyond_s(d, mask, parameters, keeps_values=True)


CONFIDENCE_RULES: dict[str, ConfidenceRule] = {
    "dense": ConfidenceRule(
        weigh=_dense,
        parameters=("lam",),
        summary="by how much long context changes the loss of a target, mixed with 1",
    ),
    "sparse": ConfidenceRule(
        weigh=_sparse,
        parameters=("kappa",),
        summary="only the targets that long context changes most, all alike",
    ),
    "longce": ConfidenceRule(
        weigh=_longce,
        parameters=("cap",),
        summary="by how much long context lowers the loss of a target, exponentially, capped",
    ),
    "ppmi": ConfidenceRule(
        weigh=_ppmi,
        parameters=("s", "kappa"),
        summary="by how much long context lowers the loss of a target, others 0",
    ),
    "npmi": ConfidenceRule(
        weigh=_npmi,
        parameters=("s", "kappa"),
        summary="by how much long context raises the loss of a target, others 0",
    ),
    "ppmi-values": ConfidenceRule(
        weigh=_ppmi_values,
        parameters=("s", "kappa"),
        summary="as ppmi, but with kappa the kept targets keep their values",
    ),
    "npmi-values": ConfidenceRule(
        weigh=_npmi_values,
        parameters=("s", "kappa"),
        summary="as npmi, but with kappa the kept targets keep their values",
    ),
}


def _beyond_s(
    change: Floats, mask: Bools, parameters: ConfidenceParameters, *, keeps_values: bool = False
) -> Floats:
    values = np.where(mask, np.maximum(change - math.log(parameters.s), 0.0), 0.0)
    if parameters.kappa is not None and values.any():
        share = _top_share(values, mask, parameters.kappa)
        values = values * share if keeps_values else share
    return _mean_one(values, mask)


def _top_share(values: Floats, mask: Bools, kappa: float) -> Floats:
    """Return how much of each target is in the top-kappa fraction: 1, 0, or its share of the edge."""
    kept = max(1, int(kappa * int(mask.sum())))
    chosen = values[mask]
    edge = np.partition(chosen, chosen.size - kept)[chosen.size - kept]
    above, ties = values > edge, values == edge
    room = kept - (above & mask).sum()
    return np.where(mask, above + ties * (room / (ties & mask).sum()), 0.0)


def _mean_one(values: Floats, mask: Bools) -> Floats:
    """Rescale values >= 0 to mean 1 over the mask (L1); where all are zero, return 1."""
    total = values.sum(where=mask)
    return values / total * mask.sum() if total > 0 else np.ones(values.shape)


@dataclass(frozen=True, kw_only=True)
class ShortWindows:
    """The short windows of a row: the short context of confidence-based weighting.

    A segment of n inputs is covered by windows [k * stride, k * stride + window), k = 0, 1, ... The overlap
    of two windows is context only. Under the border `target` a target is scored by the first window that
    contains the predicted token, so it has window - stride to window - 1 tokens of context; under `input`
    by the first window that contains its input, with window - stride + 1 to window tokens. The two differ
    in the first target past each window. The last target of a segment predicts a token outside of it and
    stays in the window of its input.

    The first window of a segment would give every target the context that it has anyway, so it is never
    computed: there CE_short is CE_long and d = 0, as in the source (arXiv 2503.09202: window 8,192 and
    stride 6,144 in rows of 32,768). Windows stay inside their segment. The first token of a document is
    predicted without context of its own, so its d is 0.

    So exactly the supervised targets with an effective context above `window` are scored.

    Raises:
        ValueError: a window that is too short, a stride that leaves gaps, or an unknown border.
    """

    window: int
    """Tokens of a window."""
    stride: int
    """Tokens from the start of one to that of the next."""
    border: str = BORDERS[0]
    """One of BORDERS."""

    def __post_init__(self) -> None:
        if self.border not in BORDERS:
            raise ValueError(f"unknown short border {self.border!r}: choose one of {', '.join(BORDERS)}")
        if self.window < MIN_WINDOW_TOKENS:
            raise ValueError(
                f"a short window of {self.window} tokens is below {MIN_WINDOW_TOKENS}: give a longer "
                "--short-window, or pack longer rows"
            )
        longest = self.window - self._lead
        if not 0 < self.stride <= longest:
            raise ValueError(
                f"a stride of {self.stride} tokens is not in [1, {longest}], for a short window of "
                f"{self.window} and the border {self.border!r}: targets would have no window or no "
                "context; give another --short-stride"
            )

    @property
    def _lead(self) -> int:
        """Inputs by which a window's first scored input precedes the first one that only it contains."""
        return 1 if self.border == "target" else 0

    def scored(self, context: NDArray[np.int64], supervised: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which targets are scored, [S]; the others have d = 0.

        Args:
            context: [S], effective context of each target, or anything in [0, 8) for 0.
            supervised: [S].
        """
        return supervised & (context > self.window)

    def place(self, cu_seqlens: NDArray[np.int64], scored: NDArray[np.bool_]) -> list[Window]:
        """Return the windows of a row, in its order; one that would score nothing is left out.

        Args:
            cu_seqlens: [segments + 1], from 0 to S.
            scored: [S], from `scored`.
        """
        windows = []
        for begin, end in pairwise(cu_seqlens.tolist()):
            for first in range(begin + self.window - self._lead, end - self._lead, self.stride):
                start = first + self._lead - self.window + self.stride
                stop = start + self.window - self._lead
                if end - stop <= self._lead:  # the last target has no window of its own
                    stop = end
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


def border_record(border: str) -> dict[str, str]:
    """Return the entry that names a border in a record; empty for the one of records without an entry."""
    return {} if border == OLD_BORDER else {"short_border": border}


def default_windows(
    row_tokens: int, *, window: int | None = None, stride: int | None = None, border: str = BORDERS[0]
) -> ShortWindows:
    """Return windows of a quarter of the row with a stride of three quarters of that, unless given.

    Raises:
        ValueError: see ShortWindows; or a window as long as the row, whose scores would all be 0.
    """
    window = row_tokens // ROW_FRACTION if window is None else window
    if window >= row_tokens:
        raise ValueError(
            f"a short window of {window} tokens in rows of {row_tokens} scores nothing: give a shorter "
            "--short-window"
        )
    stride = max(1, window * 3 // 4) if stride is None else stride
    return ShortWindows(window=window, stride=stride, border=border)
