"""What the export of a model tells a report: its shape, its trainings in order, and licences."""

from __future__ import annotations

from typing import Any


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
    records = _records(provenance.get("run", provenance))
    corpora = {
        str(corpus.get("name")): corpus.get("licence")
        for record in records
        for corpus in record.get("corpora") or []
    }
    imported = provenance.get("import")
    return {
        "preset": provenance.get("preset"),
        "training": [
            {
                "rule": record["weighting"].get("rule"),
                "parameters": record["weighting"].get("parameters") or {},
                "row_tokens": record.get("row_tokens"),
            }
            for record in records
            if isinstance(record.get("weighting"), dict)
        ],
        "licences": {
            "model": imported.get("licence") if isinstance(imported, dict) else None,
            "corpora": [{"name": name, "licence": licence} for name, licence in corpora.items()],
        },
    }


def _records(run: Any) -> list[dict[str, Any]]:
    """run.json of every training of the model, first one first."""
    found: list[dict[str, Any]] = []
    while isinstance(run, dict) and run:
        found.append(run)
        start = run.get("start_checkpoint")
        run = start.get("run") if isinstance(start, dict) else None
    return found[::-1]
