"""Time packing and counting on a synthetic corpus: `make bench`, or with other sizes by hand.

    python benchmarks/packing.py --documents 200000 --row-tokens 4096

Lengths are lognormal (median 700 tokens, sigma 1.3), a shape near that of web text. CPU seconds of one
process, best of some repeats; the counts in closed form are checked against a count token by token.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

import numpy as np

from megatron_exact.command_line import positive_int, run_tool
from megatron_exact.data.plan import ChosenDocuments, Plan
from megatron_exact.data.plan_best_fit import plan_best_fit
from megatron_exact.data.plan_concat import plan_concat
from megatron_exact.data.shuffle import KeyedPermutation, derive_key
from megatron_exact.exposure import bucket_index, exposure_counts

MEDIAN_TOKENS = 700
SIGMA = 1.3
TOKENS_A_CHUNK = 1 << 22


def synthetic_documents(documents: int, seed: int) -> ChosenDocuments:
    """Documents of one source with lognormal lengths, in a shuffled order."""
    lengths = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SIGMA, documents)
    order = KeyedPermutation(documents, derive_key("benchmark", seed)).all().astype(np.int64)
    return ChosenDocuments(
        source=np.zeros(documents, np.uint16),
        document=order,
        tokens=np.maximum(1, lengths).astype(np.int64)[order],
    )


def closed_form_counts(plan: Plan, row_tokens: int) -> np.ndarray:
    """Targets per bucket from the lengths of the segments, those that end a segment left out."""
    return exposure_counts(plan.segment_tokens, row_tokens)


def token_by_token_counts(plan: Plan, row_tokens: int) -> np.ndarray:
    """The same, with one array element a token, in chunks."""
    counts = np.zeros(bucket_index(row_tokens, row_tokens) + 1, np.int64)
    totals = np.concatenate(([0], np.cumsum(plan.segment_tokens, dtype=np.int64)))
    first = 0
    while first < plan.segments:
        last = max(first + 1, int(np.searchsorted(totals, totals[first] + TOKENS_A_CHUNK)))
        lengths = plan.segment_tokens[first:last].astype(np.int64)
        context = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = context[context > 0]  # the target of input 0 has context 1, ...
        counts += np.bincount(bucket_index(inside, row_tokens), minlength=counts.size)
        first = last
    return counts


def best_cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Least CPU time of some calls."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=positive_int, default=200_000, help="default: %(default)s")
    parser.add_argument("--row-tokens", type=positive_int, default=4096, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive_int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    row_tokens = options.row_tokens
    chosen = synthetic_documents(options.documents, options.seed)
    tokens = int(chosen.tokens.sum())
    print(f"{options.documents:,} documents, {tokens:,} tokens, rows of {row_tokens:,}")
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores\n")
    plan = plan_concat(chosen, row_tokens)
    if not np.array_equal(closed_form_counts(plan, row_tokens), token_by_token_counts(plan, row_tokens)):
        raise ValueError("the two ways of counting disagree: one of them is wrong")
    work: dict[str, Callable[[], object]] = {
        "plan, concat": lambda: plan_concat(chosen, row_tokens),
        "plan, best-fit": lambda: plan_best_fit(chosen, row_tokens, seed=1, split="train"),
        "exposure, closed form": lambda: closed_form_counts(plan, row_tokens),
        "exposure, token by token": lambda: token_by_token_counts(plan, row_tokens),
    }
    print(f"{'':26}{'CPU s':>9}{'million tokens/s':>19}")
    for name, function in work.items():
        seconds = best_cpu_seconds(function, options.repeats)
        print(f"{name:26}{seconds:9.4f}{tokens / seconds / 1e6:19,.0f}")
    return 0


if __name__ == "__main__":
    run_tool(main)
