"""What the export of a model tells a report: its shape, its trainings in order, and licences."""

from __future__ import annotations

from typing import Any

from megatron_exact.trainings import trained_corpora, trained_row_tokens, trainings


def training_history(provenance: dict[str, Any] | None) -> dict[str, Any]:
    """The part of a comparison's description of a run that says how the model came to be.

    Args:
        provenance: the `megatron_exact.json` of the model; None for one without.

    Returns:
        {`preset`: name or None, `training`: [{`rule`, `parameters`, `row_tokens`}], first stage first,
        `licences`: {`model`: of the model that training started from, or None, `corpora`: [{`name`,
        `licence`}]}}.
    """
    provenance = provenance or {}
    run = last_run(provenance)
    imported = provenance.get("import")
    return {
        "preset": provenance.get("preset"),
        "training": [
            {
                "rule": record["weighting"].get("rule"),
                "parameters": record["weighting"].get("parameters") or {},
                "row_tokens": record.get("row_tokens"),
            }
            for record in trainings(run)
            if isinstance(record.get("weighting"), dict)
        ],
        "licences": {
            "model": imported.get("licence") if isinstance(imported, dict) else None,
            "corpora": trained_corpora(run),
        },
    }


def trained_window(provenance: dict[str, Any] | None) -> int | None:
    """Tokens of the longest rows that a model was trained on; None where no record says so.

    The trainings before the last one count too: tuning on short rows follows training on long ones.
    """
    return trained_row_tokens(last_run(provenance))


def is_tuned_on_answers(provenance: dict[str, Any] | None) -> bool:
    """Whether a training of the model supervised the answers of question-answer records."""
    return any(record.get("supervision") for record in trainings(last_run(provenance)))


def last_run(provenance: dict[str, Any] | None) -> Any:
    """run.json of the last training, also where it stands alone; empty for a model without a record."""
    provenance = provenance or {}
    return provenance.get("run", provenance)
