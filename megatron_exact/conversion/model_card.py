"""What an exported folder says about itself: `README.md` for people, `megatron_exact.json` for tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_exact
from megatron_exact.model.hf_folder import HfFolder, read_json_object
from megatron_exact.model.presets import matching_preset
from megatron_exact.trainings import trained_corpora, trainings

SUMMARY = "megatron_exact.json"
RUN_RECORD = "run.json"
PLACES = ("pack", "path", "places")
"""Keys of run.json that say where something lay on the machine of the run."""


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """The run.json of a folder without what names a place; None for a checkpoint that was never trained."""
    path = checkpoint / RUN_RECORD
    if not path.is_file():
        return None
    run: dict[str, Any] = without_places(read_json_object(path))
    return run


def without_places(value: Any) -> Any:
    """The same record without the keys of PLACES, at any depth."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items() if key not in PLACES}
    return [without_places(inner) for inner in value] if isinstance(value, list) else value


def check_run_against_config(run: dict[str, Any], hf: HfFolder) -> None:
    """A run may have changed the rotary frequencies by flags; its export must not forget them.

    Raises:
        ValueError: names both values and what to write into hf/config.json.
    """
    model = run.get("model")
    if not isinstance(model, dict):
        return
    shape = hf.shape
    scaling = shape.rope_scaling
    expected: dict[str, Any] = {
        "rotary_base": shape.rope_theta,
        "layernorm_epsilon": shape.norm_epsilon,
        "use_rope_scaling": scaling is not None,
        **({"rope_scaling_factor": scaling.factor} if scaling is not None else {}),
    }
    for name, value in expected.items():
        if name in model and model[name] != value:
            raise ValueError(
                f"{RUN_RECORD} says {name} {model[name]}, but {hf.path / 'config.json'} means {value}: "
                "write the run's value into that file, so that the exported model computes what was trained"
            )


def summary(
    hf: HfFolder, run: dict[str, Any] | None, iteration: int | None, dtypes: list[str]
) -> dict[str, Any]:
    """Content of megatron_exact.json."""
    return {
        "format_version": 1,
        "exported_by": f"megatron-exact {megatron_exact.__version__}",
        "iteration": iteration,
        "preset": matching_preset(hf.shape),
        "dtypes": dtypes,
        "import": hf.import_record,
        "run": run,
    }


def model_card(hf: HfFolder, run: dict[str, Any] | None, iteration: int | None, dtypes: list[str]) -> str:
    """A README.md with what is known and nothing else: the model, then every training behind it."""
    shape = hf.shape
    rows: list[tuple[str, Any]] = [
        ("architecture", f"{shape.architecture}, {matching_preset(shape) or 'no preset'}"),
        ("layers, width", f"{shape.num_layers}, {shape.hidden_size}"),
        ("weights", ", ".join(dtypes)),
    ]
    if run is None:
        rows.append(("iteration", "none: the weights are those that were imported"))
    else:
        rows.append(("corpora (licence)", _with_licences(trained_corpora(run))))
    if hf.import_record is not None:
        rows.append(("licence of the imported model", hf.import_record.get("licence")))
    title = "Trained with megatron_exact" if run else "Exported by megatron_exact"
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {title}",
        _table(["", ""], [[name, value] for name, value in rows]),
        *([] if run is None else [_trainings_section(run, iteration)]),
        f"`{SUMMARY}` holds the whole record. The licence of the model that training started from still "
        "applies; its files are here if they were in its folder.",
    ]
    return "\n\n".join(sections) + "\n"


def _trainings_section(run: dict[str, Any], iteration: int | None) -> str:
    """A table with a column for each training, first one first."""
    records = trainings(run)
    starts = [record.get("start_checkpoint") or {} for record in records]
    # where the next training started is where this one ended, as far as this model knows it
    ends = [start.get("iteration") for start in starts[1:]] + [iteration]
    hashes = [
        "none: random weights" if _is_from_random(record) else start.get("sha256")
        for record, start in zip(records, starts, strict=True)
    ]
    corpora = [_with_licences(record.get("corpora") or []) for record in records]
    rows: list[tuple[str, list[Any]]] = [
        ("what", [_kind(record) for record in records]),
        ("token weighting", [_weighting(record) for record in records]),
        ("row length", [record.get("row_tokens") for record in records]),
        ("iteration", ends),
        ("corpora (licence)", corpora),
        ("pack fingerprint", [record.get("fingerprint") for record in records]),
        ("start checkpoint", hashes),
        ("seed", [record.get("seed") for record in records]),
        ("code", [record.get("git_commit") for record in records]),
    ]
    head = ["", *(f"training {number}" for number in range(1, len(records) + 1))]
    return "## Trainings, first one first\n\n" + _table(head, [[name, *values] for name, values in rows])


def _kind(record: dict[str, Any]) -> str:
    """What a training was, as far as its record tells: only question-answer packs have a supervision."""
    if record.get("supervision"):
        return "question-answer tuning"
    is_weighted = (record.get("weighting") or {}).get("rule") not in (None, "none")
    if not is_weighted and "supervision" not in record:
        return "not recorded"  # an old record of either kind, as tuning is never weighted
    return "pretraining from random weights" if _is_from_random(record) else "continued pretraining"


def _is_from_random(record: dict[str, Any]) -> bool:
    return "start_checkpoint" in record and record["start_checkpoint"] is None


def _weighting(record: dict[str, Any]) -> str | None:
    """`exact (alpha 0.15, gamma 0.5, tau 1024.0)`; None where the record does not say."""
    weighting = record.get("weighting") or {}
    options = ", ".join(f"{name} {value}" for name, value in (weighting.get("parameters") or {}).items())
    return f"{weighting['rule']}" + (f" ({options})" if options else "") if "rule" in weighting else None


def _with_licences(corpora: list[dict[str, Any]]) -> str | None:
    """`web (odc-by), books (unknown)`; None for no corpora."""
    named = [f"{corpus.get('name')} ({corpus.get('licence') or 'unknown'})" for corpus in corpora]
    return ", ".join(named) or None


def _table(head: list[str], body: list[list[Any]]) -> str:
    """Markdown; whatever comes from files stays in its cell."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in body)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    return "unknown" if value is None else " ".join(str(value).split()).replace("|", "\\|")
