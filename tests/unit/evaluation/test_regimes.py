"""Lengths as users write them, and the regime of a cell."""

from __future__ import annotations

import pytest

from megatron_exact.evaluation.pairing import Regimes
from megatron_exact.evaluation.suites.suite import token_lengths


def test_k_is_1024_tokens_and_1000_for_nolima_on_request() -> None:
    lengths = token_lengths("0.5K,1k,1.5K,4096")
    assert [length.tokens(1024) for length in lengths] == [512, 1024, 1536, 4096]
    assert [str(length) for length in lengths] == ["0.5K", "1K", "1.5K", "4096"]
    regimes = Regimes(trained=lengths, k_tokens={"nolima": 1000})
    assert regimes.tokens("trained", "ruler") == (512, 1024, 1536, 4096)
    assert regimes.tokens("trained", "nolima") == (500, 1000, 1500, 4096)
    assert regimes.of("ruler", 1024) == regimes.of("nolima", 1000) == ("trained", "all")
    assert regimes.of("ruler", 1000) == regimes.of("nolima", 1024) == ("all",)
    assert Regimes(extrapolated=lengths).of("nolima", 512) == ("extrapolated", "all")


@pytest.mark.parametrize("text", ["", "1K,", "K", "0", "-1K", "1.5", "0.3K", "1/0", "nan", "4M", "KK"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no length such as 1024 or 1\.5K"):
        token_lengths(text)


def test_a_length_is_in_one_regime() -> None:
    with pytest.raises(ValueError, match="1,024 tokens are among the trained and the extrapolated lengths"):
        Regimes(trained=token_lengths("1K"), extrapolated=token_lengths("1024,2K"))
    with pytest.raises(ValueError, match="1,000 tokens are among"):
        Regimes(trained=token_lengths("1K"), extrapolated=token_lengths("1000"), k_tokens={"nolima": 1000})


def test_a_length_that_was_never_evaluated_is_refused() -> None:
    regimes = Regimes(trained=token_lengths("512,1K"), extrapolated=token_lengths("8K"))
    there = {("ruler", 1024), ("nolima", 512), ("nolima", 1024), ("ruler", 8192), ("nolima", 8192)}
    regimes.require_evaluated(there)
    with pytest.raises(
        ValueError, match=r"evaluated at the extrapolated length 8K, only at 512, 1024 tokens"
    ):
        regimes.require_evaluated({cell for cell in there if cell[1] < 8192})


def test_lengths_have_no_meaning_without_a_suite() -> None:
    Regimes().require_evaluated(set())
    with pytest.raises(ValueError, match=r"length 1K: the folders hold no suite, only an evidence probe"):
        Regimes(extrapolated=token_lengths("1K")).require_evaluated(set())
