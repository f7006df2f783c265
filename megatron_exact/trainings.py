"""The trainings behind a model: run.json of the last one holds that of the one before, and so on.

A later stage, or instruction tuning, starts from a checkpoint of an earlier run and keeps that run's record
as `start_checkpoint.run`.
"""

from __future__ import annotations

from typing import Any


def trainings(run: Any) -> list[dict[str, Any]]:
    """run.json of every training of a model, first one first.

    Args:
        run: run.json of the last training; None, or anything that is no record, for an import.
    """
    found: list[dict[str, Any]] = []
    while isinstance(run, dict) and run:
        found.append(run)
        start = run.get("start_checkpoint")
        run = start.get("run") if isinstance(start, dict) else None
    return found[::-1]


def trained_row_tokens(run: Any) -> int | None:
    """Tokens of the longest rows that the weights were trained on; None where no record says so.

    The trainings before count too: instruction tuning on short rows follows training on long ones.

    Args:
        run: as for `trainings`.
    """
    rows = [record.get("row_tokens") for record in trainings(run)]
    return max((tokens for tokens in rows if isinstance(tokens, int)), default=None)


def trained_corpora(run: Any) -> list[dict[str, Any]]:
    """Corpora of all trainings, each name and licence once, in the order of their first use.

    Args:
        run: as for `trainings`.

    Returns:
        [{`name`: text, `licence`: text, or None where nobody said it}].
    """
    pairs = dict.fromkeys(
        (str(corpus.get("name")), corpus.get("licence"))
        for record in trainings(run)
        for corpus in record.get("corpora") or []
        if isinstance(corpus, dict)
    )
    return [{"name": name, "licence": licence} for name, licence in pairs]
