"""What the losses of the edited micro-batches say: differences, bounds, and causes in plain words.

Three claims. (a) A token reaches nothing but later tokens of its own document: after a change of one token
every other loss is the same to the bit, since each place of a row is computed by the same operations on the
same numbers. (b) A document computes in the row what it computes on its own, within the rounding of the
dtype. (c) Both would be seen to fail: without boundaries the same measurements exceed the same bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_exact.training.masking_check.variants import Segment, Variant, segments_of

ALONE_BOUNDS = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.03, "fp8": 0.3}
"""(b) by dtype of the matrix products, nats. On CPUs less than a tenth of it is seen in fp32 and bf16
(tests/distributed/test_masking_check.py); on the kernels of a GPU, and in fp8, it was not tried."""
REPEAT_FACTOR = 4
"""(a) where two equal runs differ already: so many times their difference."""

NEIGHBOUR = "(a) one token changed: other documents"
EARLIER = "(a) one token changed: earlier tokens"
ALONE = "(b) a document in its row and alone"
OWN = "control: one token changed: its own loss"
NEIGHBOUR_CONTROL = "control of (a): the same without boundaries"
ALONE_CONTROL = "control of (b): the row without boundaries"
CONTROLS = (OWN, NEIGHBOUR_CONTROL, ALONE_CONTROL)
REPEATED = "repeated"
LEAK_SHARE = "leak share"
"""Of what neighbours change after a change of the first token, relative to the row without boundaries."""

NOT_CHECKED = (
    "Not checked: gradients, other rows than these, other layouts, and whether the pack's boundaries are "
    "those of the texts (pack_corpus.py --verify)."
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The largest of many differences, or for a control the one that was to be seen."""

    difference: float
    """|loss - loss|, nats; NaN if a loss is not finite."""
    where: str
    """Which tokens, in words."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    name: str
    """What was compared."""
    difference: float
    """Of all rows, nats."""
    bound: float
    """At most this, or for a control more than this."""
    is_control: bool
    """Whether the difference has to exceed the bound."""
    where: str
    """Where it was found."""

    @property
    def passed(self) -> bool:
        """Whether the difference is as it should be; never with NaN."""
        return self.difference > self.bound if self.is_control else self.difference <= self.bound


def measure(losses: Tensor, variants: Sequence[Variant]) -> dict[str, Measured]:
    """Differences of one micro-batch.

    Args:
        losses: [variants, T], nats.
        variants: of `make_variants`.
    """
    of_kind = {variant.kind: row for variant, row in zip(variants, losses, strict=True)}
    base, merged = of_kind["unchanged"], of_kind["merged"]
    segments = segments_of(variants[0].batch)
    size = variants[0].batch["tokens"].shape[1]
    found: dict[str, list[Measured]] = {REPEATED: [_largest(of_kind["repeated"] - base, 0, "")]}
    found[ALONE_CONTROL] = [_largest(merged - base, 0, "merged rows")]
    behind = slice(segments[0].end, size)
    pushed = (of_kind["merged-changed"] - merged)[behind]
    first = next(i for i, variant in enumerate(variants) if variant.kind == "changed" and not variant.place)
    kept = (losses[first] - base)[behind]
    share = float(kept.abs().sum() / pushed.abs().sum().clamp(min=1e-30))
    found[LEAK_SHARE] = [Measured(difference=share, where="")]
    found[NEIGHBOUR_CONTROL] = [_largest(pushed, behind.start, "merged rows, token 0 changed")]
    for variant, row in zip(variants, losses, strict=True):
        if variant.kind == "changed":
            for name, measured in _after_change(row - base, variant, segments).items():
                found.setdefault(name, []).append(measured)
        elif variant.kind == "alone":
            segment = segments[variant.segment]
            difference = row[: segment.end - segment.start] - base[segment.start : segment.end]
            words = f"document at tokens {segment.start} to {segment.end - 1}"
            found.setdefault(ALONE, []).append(_largest(difference, segment.start, words))
    return {name: extreme(name, measured) for name, measured in found.items()}


def _after_change(difference: Tensor, variant: Variant, segments: list[Segment]) -> dict[str, Measured]:
    segment, place = segments[variant.segment], variant.place
    words = f"token {place} changed, document at tokens {segment.start} to {segment.end - 1}"
    outside = difference.clone()
    outside[segment.start : segment.end] = 0
    return {
        NEIGHBOUR: _largest(outside, 0, words),
        EARLIER: _largest(difference[segment.start : place], segment.start, words),
        OWN: _largest(difference[place : place + 1], place, words),
    }


def _largest(difference: Tensor, start: int, words: str) -> Measured:
    if not difference.numel():
        return Measured(difference=0.0, where="")
    place = int(difference.abs().argmax())  # of NaN, if there is one
    if difference[place] == 0:
        return Measured(difference=0.0, where="")
    return Measured(
        difference=float(difference[place].abs()), where=f"{words}; seen at token {start + place}"
    )


def extreme(name: str, measured: Sequence[Measured]) -> Measured:
    """The one that decides: of a control the smallest difference, else the largest; NaN before all."""
    not_finite = [one for one in measured if one.difference != one.difference]
    if not_finite:
        return not_finite[0]
    choose = min if name in CONTROLS else max
    return choose(measured, key=lambda one: one.difference)


def judge(found: dict[str, Measured], dtype: str) -> list[Check]:
    """Hold the differences against their bounds.

    Args:
        found: of all micro-batches.
        dtype: fp32, bf16, fp16 or fp8.
    """
    alone = ALONE_BOUNDS[dtype]
    # In fp8 all tokens of a tensor share a scale, so that a change anywhere may change everything a little
    exact = alone if dtype == "fp8" else REPEAT_FACTOR * found[REPEATED].difference
    bounds = {
        NEIGHBOUR: exact,
        EARLIER: exact,
        ALONE: alone,
        OWN: exact,
        NEIGHBOUR_CONTROL: exact,
        ALONE_CONTROL: alone,
    }
    return [
        Check(
            name=name,
            difference=found[name].difference,
            bound=bound,
            is_control=name in CONTROLS,
            where=found[name].where,
        )
        for name, bound in bounds.items()
    ]


def explain(checks: Sequence[Check], leak_share: float) -> list[str]:
    """What the verdicts mean and what usually causes them.

    Args:
        checks: of `judge`.
        leak_share: difference of LEAK_SHARE.
    """
    failed = {check.name: check for check in checks if not check.passed}
    if not failed:
        return [
            "Every document is computed as if it were alone, and the controls show that a leak would show."
        ]
    if any(check.difference != check.difference for check in checks):
        return ["Losses are not finite, so nothing can be compared: look at the checkpoint and the dtype."]
    if OWN in failed:
        return [
            "A changed token does not even change its own loss: the model does not read its tokens, so the "
            "check proves nothing. Look at the checkpoint: weights of zero do this."
        ]
    told = []
    if NEIGHBOUR in failed and leak_share > 0.5:
        told.append(f"{IGNORED} Found with: {failed[NEIGHBOUR].where}.")
    elif NEIGHBOUR in failed:
        told.append(f"{WRONG_BOUNDARIES} Found with: {failed[NEIGHBOUR].where}.")
    if EARLIER in failed:
        told.append(f"{NOT_CAUSAL} Found with: {failed[EARLIER].where}.")
    if ALONE in failed and NEIGHBOUR not in failed:
        told.append(f"{POSITIONS} Found with: {failed[ALONE].where}.")
    weak = [name for name in (NEIGHBOUR_CONTROL, ALONE_CONTROL) if name in failed]
    if weak and NEIGHBOUR not in failed:
        told.append(NO_PROOF)
    return told


IGNORED = (
    "Documents see each other as much as with all boundaries taken away: the attention does not look at "
    "them. Usual causes: boundaries given as a dense attention mask, which Transformer Engine ignores "
    "in silence (it takes them from cu_seqlens alone); a layer spec, wrapper or patch that does not hand "
    "packed_seq_params on; --reset-attention-mask without a kernel that takes the mask."
)
WRONG_BOUNDARIES = (
    "Documents see each other although boundaries reach the model. Usual causes: cu_seqlens of another row "
    "or micro-batch, or shifted by one; rows of a micro-batch flattened without adding their offsets; "
    "boundaries scanned for EOD tokens, where a document has none or several; one kind of layer, pipeline "
    "stage or context-parallel rank that takes other boundaries than the rest."
)
NOT_CAUSAL = (
    "A token sees later tokens of its own document. Usual causes: a mask type without `causal` (padding "
    "instead of padding_causal), or boundaries for queries that differ from those for keys."
)
POSITIONS = (
    "Documents do not see each other, yet one computes something else in its row than alone. Usual causes: "
    "position ids that do not restart in each document (only learned positions notice it), or rotary "
    "angles that restart at other places than the attention; else state that outlives a document."
)
NO_PROOF = (
    "A control did not fail as it must: even without boundaries the losses hardly differ, so a pass of the "
    "other lines proves nothing. Weights near their random beginning can do this: give a trained "
    "checkpoint (--load or --pretrained-checkpoint), or drop --bf16 for tighter bounds. With trained "
    "weights it means that nothing looks at the boundaries."
)
