"""What an exported folder says about itself: `README.md` for people, `megatron_exact.json` for tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_exact
from megatron_exact.model.hf_folder import HfFolder, read_json_object
from megatron_exact.model.presets import matching_preset

SUMMARY = "megatron_exact.json"
RUN_RECORD = "run.json"
PLACES = ("pack", "path")
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
    """A README.md with what is known and nothing else."""
    shape = hf.shape
    rows = [
        ("architecture", f"{shape.architecture}, {matching_preset(shape) or 'no preset'}"),
        ("layers, width", f"{shape.num_layers}, {shape.hidden_size}"),
        ("weights", ", ".join(dtypes)),
        ("iteration", "none: the weights are those that were imported" if run is None else iteration),
    ]
    if run is not None:
        weighting = run.get("weighting") or {}
        parameters = weighting.get("parameters") or {}
        options = ", ".join(f"{name} {value}" for name, value in parameters.items())
        rows += [
            ("token weighting", f"{weighting.get('rule')}" + (f" ({options})" if options else "")),
            ("row length", run.get("row_tokens")),
            ("pack fingerprint", run.get("fingerprint")),
            ("corpora (licence)", _corpora(run)),
            ("start checkpoint", (run.get("start_checkpoint") or {}).get("sha256")),
            ("seed", run.get("seed")),
            ("code", run.get("git_commit")),
        ]
    if hf.import_record is not None:
        rows.append(("licence of the imported model", hf.import_record.get("licence")))
    table = "\n".join(f"| {name} | {'unknown' if value is None else value} |" for name, value in rows)
    title = "Continued pretraining with megatron_exact" if run else "Exported by megatron_exact"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {title}\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"`{SUMMARY}` holds the whole record of the run. The licence of the model that training started "
        "from still applies; its files are here if they were in its folder.\n"
    )


def _corpora(run: dict[str, Any]) -> str | None:
    """`web (odc-by), books (unknown)` of the last training; None where the run does not say."""
    corpora = run.get("corpora")
    if not corpora:
        return None
    return ", ".join(f"{corpus['name']} ({corpus['licence'] or 'unknown'})" for corpus in corpora)
