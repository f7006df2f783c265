"""Which lengths a model was trained on and which lie beyond: the rows of the paper's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_exact.command_line import ArgumentError

K_TOKENS = 1024
"""What K means, as in the paper's windows."""
NOLIMA = "nolima"
"""The one suite whose authors count K in thousands."""
TRAINED, EXTRAPOLATED, ALL = "trained", "extrapolated", "all"


@dataclass(frozen=True, kw_only=True)
class TokenLength:
    """A length as a user writes it: `1536`, `1.5K`."""

    number: Fraction
    """Without its unit."""
    is_in_k: bool
    """Whether K follows."""

    def __str__(self) -> str:
        return f"{float(self.number):g}K" if self.is_in_k else str(self.number)

    def tokens(self, k_tokens: int) -> int:
        """The length in tokens. Raises ValueError if that is no whole number."""
        value = self.number * (k_tokens if self.is_in_k else 1)
        if value.denominator != 1:
            raise ValueError(f"{self} is no whole number of tokens where K means {k_tokens:,}")
        return int(value)


def token_lengths(text: str) -> tuple[TokenLength, ...]:
    """argparse type: `512,1K,1.5K`, each above 0 and a whole number of tokens."""
    lengths = []
    for word in text.split(","):
        is_in_k = word.strip().upper().endswith("K")
        try:
            length = TokenLength(number=Fraction(word.strip().rstrip("kK")), is_in_k=is_in_k)
            if length.tokens(K_TOKENS) <= 0:
                raise ValueError("not above 0")
        except (ValueError, ZeroDivisionError):
            raise ArgumentError(f"{word!r} is no length such as 1024 or 1.5K") from None
        lengths.append(length)
    return tuple(lengths)


@dataclass(frozen=True, kw_only=True)
class Regimes:
    """Lengths of both regimes; a length in neither counts in `all` only."""

    trained: Sequence[TokenLength] = field(default=())
    """Up to the window of training."""
    extrapolated: Sequence[TokenLength] = field(default=())
    """Beyond it."""
    nolima_k_tokens: int = K_TOKENS
    """What K means in these lengths for NoLiMa's cells."""

    def __post_init__(self) -> None:
        for suite in ("", NOLIMA):
            both = set(self.tokens(TRAINED, suite)) & set(self.tokens(EXTRAPOLATED, suite))
            if both:
                raise ValueError(
                    f"{min(both):,} tokens are among the trained and the extrapolated lengths: "
                    "give each length once"
                )

    def tokens(self, regime: str, suite: str) -> tuple[int, ...]:
        """Lengths of a regime in tokens, as a suite counts them."""
        lengths = self.trained if regime == TRAINED else self.extrapolated
        k_tokens = self.nolima_k_tokens if suite == NOLIMA else K_TOKENS
        return tuple(length.tokens(k_tokens) for length in lengths)

    def of(self, suite: str, length: int) -> tuple[str, ...]:
        """The regimes that a cell of this length counts in."""
        named = [regime for regime in (TRAINED, EXTRAPOLATED) if length in self.tokens(regime, suite)]
        return (*named, ALL)

    def require_evaluated(self, lengths: set[tuple[str, int]]) -> None:
        """Raise ValueError if a length was asked for that no suite was evaluated at.

        Args:
            lengths: (suite, tokens) of all cells.
        """
        named = [*self.trained, *self.extrapolated]
        if named and not lengths:
            raise ValueError(
                f"length {named[0]}: the folders hold no suite, only an evidence probe: leave out "
                "--trained-lengths and --extrapolated-lengths"
            )
        for name in (TRAINED, EXTRAPOLATED):
            for length in self.trained if name == TRAINED else self.extrapolated:
                suites = {suite for suite, _ in lengths}
                asked = {
                    (suite, length.tokens(self.nolima_k_tokens if suite == NOLIMA else K_TOKENS))
                    for suite in suites
                }
                if not asked & lengths:
                    there = ", ".join(str(tokens) for tokens in sorted({tokens for _, tokens in lengths}))
                    raise ValueError(
                        f"no suite was evaluated at the {name} length {length}, only at {there} tokens: "
                        "leave it out, or evaluate it"
                    )
