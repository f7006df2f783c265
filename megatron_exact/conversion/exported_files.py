"""The files of an exported folder beside the weights: configs, tokenizer, model card, provenance.

`README.md` describes where the weights come from, and `megatron_exact.json` does so for tools.

Engines read the longest prompt that they accept from `max_position_embeddings`, so an export says there the
longest rows that its weights were trained on, and at least what was imported. Other fields limit the length
as well (`LENGTH_LIMITS`): one that is below those rows is raised with the window. Nothing that the model
computes depends on them: `model/family.py` supports plain rotary embedding, Llama 3's scaling and YaRN,
both with a factor and an original length of their own, and not what may read the window (transformers'
modeling_rope_utils: dynamic, longrope, and yarn without these numbers). The product of YaRN's two numbers
is what vLLM takes as the window instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import megatron_exact
from megatron_exact.conversion.checkpoint_layout import iteration_of
from megatron_exact.data.tokenizers import tokenizer_sha256
from megatron_exact.files import fsync_path, write_json, write_text
from megatron_exact.integrity import content_digest, read_integrity
from megatron_exact.lineage import trained_corpora, trained_row_tokens, trainings
from megatron_exact.model.families import family_of, matching_preset
from megatron_exact.model.hf_folder import CARRIED_FILES, CONFIG, HfFolder, copy_files, read_json_object
from megatron_exact.model.shapes import Llama3Scaling, ModelShape, YarnScaling
from megatron_exact.tokenizer_files import TOKENIZER_JSON

SUMMARY = "megatron_exact.json"
RUN_RECORD = "run.json"
PLACES = ("pack", "path", "places")
"""Keys of run.json with paths on the machine of the run."""
TOKENIZER_SHA256 = "tokenizer_sha256"
"""Key of an export's record with the identity of its `tokenizer.json`: evaluation compares it."""
GENERATION_CONFIG = "generation_config.json"
LENGTH_LIMITS = {
    # names under which engines look for the window; vLLM takes the smallest of those that are there
    CONFIG: (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "model_max_length",
        "max_target_positions",
        "max_sequence_length",
        "max_seq_length",
        "seq_len",
        "max_length",  # of generate(), from before there was a generation_config.json
    ),
    "tokenizer_config.json": ("model_max_length", "max_len"),
    GENERATION_CONFIG: ("max_length",),  # of prompt and answer together
}
"""File -> fields that limit the number of tokens, where they are numbers."""
TRUNCATION = re.compile(r'("truncation"\s*:\s*\{[^{}]*?"max_length"\s*:\s*)(\d+)')
"""The truncation length in tokenizer.json, which is too large to be parsed for one number."""
SAMPLING = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "max_new_tokens",
)
"""Fields of generation_config.json that change what `generate()` answers; an export leaves them alone."""
ORIGIN = "checkpoint"
"""Key of an export's record for the value of `origin_of`."""


def write_files_beside_weights(
    target: Path,
    hf: HfFolder,
    run: dict[str, Any] | None,
    *,
    origin: dict[str, Any],
    dtypes: list[str],
    window: int,
) -> tuple[LengthLimit, ...]:
    """Write config, tokenizer, licences, record and model card.

    Args:
        target: folder of the export.
        hf: the imported folder.
        run: run.json, None for an import that was not trained.
        origin: from `origin_of`.
        dtypes: names of the dtypes of the weights.
        window: from `exported_window`.

    Returns:
        The limits of length that were raised to the window, with the values that they had.
    """
    copy_files(hf.path, target, tuple(name for name in CARRIED_FILES if name != CONFIG))
    config = dict(hf.config)
    # a base model's file names a class without the output layer that is here
    family = family_of(hf.shape)
    config["architectures"] = [family.model_class]
    if len(dtypes) == 1:
        # transformers 5 writes dtype, older versions torch_dtype; some files have both
        config |= dict.fromkeys({"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}, dtypes[0])
    if window != hf.shape.max_position_embeddings:
        config[family.key("max_position_embeddings")] = window
    raised = _raise_limits(target, config, reached_tokens(hf.shape, run, window), window)
    if config == hf.config:
        copy_files(hf.path, target, (CONFIG,))
    else:
        write_json(target / CONFIG, config)
    fsync_path(target / CONFIG)
    iteration = origin["iteration"]
    summary = run_summary(hf, run, iteration, dtypes)
    tokenizer = target / TOKENIZER_JSON
    identity = {TOKENIZER_SHA256: tokenizer_sha256(tokenizer)} if tokenizer.is_file() else {}
    write_json(target / SUMMARY, {**summary, ORIGIN: origin, **identity})
    write_text(target / "README.md", model_card(hf, run, iteration, dtypes))
    return tuple(raised)


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """Return the run.json of a folder without its paths; None for a checkpoint that was never trained."""
    path = checkpoint / RUN_RECORD
    if not path.is_file():
        return None
    run: dict[str, Any] = without_places(read_json_object(path))
    return run


def without_places(value: Any) -> Any:
    """Return the same record without the keys of PLACES, at any depth."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items() if key not in PLACES}
    return [without_places(inner) for inner in value] if isinstance(value, list) else value


def check_run_against_config(run: dict[str, Any], hf: HfFolder) -> None:
    """Check that hf/config.json has the rotary frequencies of the run, which flags may have changed.

    Raises:
        ValueError: both values, and what to write into hf/config.json.
    """
    model = run.get("model")
    if not isinstance(model, dict):
        return
    shape = hf.shape
    scaling = shape.rope_scaling if isinstance(shape.rope_scaling, Llama3Scaling) else None
    yarn = asdict(shape.rope_scaling) if isinstance(shape.rope_scaling, YarnScaling) else None
    expected: dict[str, Any] = {
        "rotary_base": shape.rope_theta,
        "layernorm_epsilon": shape.norm_epsilon,
        "use_rope_scaling": scaling is not None,
        **({"rope_scaling_factor": scaling.factor} if scaling is not None else {}),
    }
    known = {"yarn": None, **model}  # absent from the records of models without it
    for name, value in {**expected, "yarn": yarn}.items():
        if name in known and known[name] != value:
            raise ValueError(
                f"{RUN_RECORD} says {name} {known[name]}, but {hf.path / 'config.json'} means {value}: "
                "write the run's value into that file, so that the exported model computes what was trained"
            )


def run_summary(
    hf: HfFolder, run: dict[str, Any] | None, iteration: int | None, dtypes: list[str]
) -> dict[str, Any]:
    """Return the content of megatron_exact.json."""
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
    """Return a README.md with what is recorded: the model, then each of its trainings."""
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
        _use_section(),
        f"`{SUMMARY}` contains the whole record. The licence of the model that training started from still "
        "applies; its files are here if they were in its folder.",
    ]
    return "\n\n".join(sections) + "\n"


def _use_section() -> str:
    """Return the commands that open the folder in other programs."""
    commands = (
        "lm_eval --model hf --model_args pretrained=FOLDER --tasks arc_easy",
        "vllm serve FOLDER",
        "python convert_hf_to_gguf.py FOLDER --outfile model.gguf  # llama.cpp",
    )
    return (
        "## Use\n\nA folder in the format of transformers, which other programs open by its path, here "
        "`FOLDER`:\n\n```\n" + "\n".join(commands) + "\n```\n\n"
        "Folders of this kind were opened with lm-eval 0.4.13, vLLM 0.32.0 (its build for CPUs) and the "
        "converter in llama-cpp-python 0.3.36."
    )


def _trainings_section(run: dict[str, Any], iteration: int | None) -> str:
    """Return a table with a column for each training, in order."""
    records = trainings(run)
    starts = [record.get("start_checkpoint") or {} for record in records]
    # this model's share of a training ended where the next training started
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
        ("rotary base, scaling", [_rotary_base(record) for record in records]),
        ("iteration", ends),
        ("corpora (licence)", corpora),
        ("pack fingerprint", [record.get("fingerprint") for record in records]),
        ("start checkpoint", hashes),
        ("seed", [record.get("seed") for record in records]),
        ("code", [record.get("git_commit") for record in records]),
    ]
    head = ["", *(f"training {number}" for number in range(1, len(records) + 1))]
    return "## Trainings, first one first\n\n" + _table(head, [[name, *values] for name, values in rows])


def _rotary_base(record: dict[str, Any]) -> str | None:
    """Return `1000000`, with YaRN's numbers and what the training changed, or None."""
    model, changes = record.get("model") or {}, record.get("model_changes") or {}
    if model.get("rotary_base") is None:
        return None
    base, yarn = f"{model['rotary_base']}", model.get("yarn")
    if old := (changes.get("rope_theta") or {}).get("from"):
        base += f", changed from {old:.0f}"
    if model.get("use_rope_scaling"):
        factor = model.get("rope_scaling_factor")  # not in the records of older versions
        base += ", Llama 3's scaling" + (f" by {factor:g}" if factor is not None else "")
    if yarn:
        scaling = YarnScaling(**yarn)
        base += f", YaRN {scaling.text.replace(',', ' x ')}"
        if scaling != YarnScaling.parse(scaling.text):
            base += f" (bounds {scaling.beta_fast:g} and {scaling.beta_slow:g})"
        base += " from here on" if "rope_scaling" in changes else ""
    return base


def _kind(record: dict[str, Any]) -> str:
    """Return the kind of a training by its record: only question-answer packs have a supervision."""
    if record.get("supervision"):
        return "question-answer tuning"
    is_weighted = (record.get("weighting") or {}).get("rule") not in (None, "none")
    if not is_weighted and "supervision" not in record:
        return "not recorded"  # an old record of either kind, as tuning is never weighted
    return "pretraining from random weights" if _is_from_random(record) else "continued pretraining"


def _is_from_random(record: dict[str, Any]) -> bool:
    return "start_checkpoint" in record and record["start_checkpoint"] is None


def _weighting(record: dict[str, Any]) -> str | None:
    """Return `exact (alpha 0.15, gamma 0.5, tau 1024.0)`, or None if it is not recorded."""
    weighting = record.get("weighting") or {}
    options = ", ".join(f"{name} {value}" for name, value in (weighting.get("parameters") or {}).items())
    return f"{weighting['rule']}" + (f" ({options})" if options else "") if "rule" in weighting else None


def _with_licences(corpora: list[dict[str, Any]]) -> str | None:
    """Return `web (odc-by), books (unknown)`, or None without corpora."""
    named = [f"{corpus.get('name')} ({corpus.get('licence') or 'unknown'})" for corpus in corpora]
    return ", ".join(named) or None


def _table(head: list[str], body: list[list[Any]]) -> str:
    """Return a Markdown table; text from files cannot leave its cell."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in body)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    return "unknown" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def exported_window(shape: ModelShape, run: dict[str, Any] | None, wanted: int | None = None) -> int:
    """Return `max_position_embeddings` of an export, tokens.

    Args:
        shape: shape of the imported config.
        run: as for `trained_row_tokens`.
        wanted: the user's choice, if any.

    Raises:
        ValueError: a choice below the rows of training, or one that no config can have.
    """
    trained = trained_row_tokens(run)
    if wanted is None:
        return max(shape.max_position_embeddings, trained or 0)
    if trained is not None and wanted < trained:
        raise ValueError(
            f"--max-position-embeddings {wanted} is below the {trained} tokens of the rows that the model "
            f"was trained on, so engines would reject prompts that it knows: give {trained} or more"
        )
    return replace(shape, max_position_embeddings=wanted).max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """A field that limits the number of tokens."""

    file: str
    """Name of the file."""
    field: str
    """Name of the field."""
    tokens: float
    """Value of the field."""

    def __str__(self) -> str:
        """Return file, field and value, such as `tokenizer_config.json: model_max_length 32768`."""
        tokens = f"{self.tokens:.0f}" if self.tokens < 1 << 53 else f"{self.tokens:g}"
        return f"{self.file}: {self.field} {tokens}"


def length_limits(folder: Path, config: dict[str, Any]) -> Iterator[LengthLimit]:
    """Yield every field of a model folder that limits the number of tokens.

    Args:
        folder: the model folder.
        config: content of config.json.

    Raises:
        ValueError: a file that cannot be read.
    """
    for file, fields in LENGTH_LIMITS.items():
        if file != CONFIG and not (folder / file).is_file():
            continue
        content = config if file == CONFIG else read_json_object(folder / file)
        for field in fields:
            value = content.get(field)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield LengthLimit(file=file, field=field, tokens=value)
    if (folder / TOKENIZER_JSON).is_file():
        text = (folder / TOKENIZER_JSON).read_text(encoding="utf-8", errors="replace")
        if found := TRUNCATION.search(text):
            yield LengthLimit(
                file=TOKENIZER_JSON, field="truncation.max_length", tokens=float(found[2][:300])
            )


def reached_tokens(shape: ModelShape, run: dict[str, Any] | None, window: int) -> int:
    """Return the tokens that every file of an export must allow: longest trained rows or extended window.

    Args:
        shape: shape of the imported config.
        run: as for `trained_row_tokens`.
        window: from `exported_window`.
    """
    extended = window if window > shape.max_position_embeddings else 0
    return max(trained_row_tokens(run) or 0, extended)


def sampling_fields(hf: HfFolder) -> dict[str, Any]:
    """Return the fields of generation_config.json that change the answers of `generate()`."""
    if GENERATION_CONFIG not in hf.files:
        return {}
    content = read_json_object(hf.path / GENERATION_CONFIG)
    return {field: content[field] for field in SAMPLING if isinstance(content.get(field), int | float)}


def _raise_limits(target: Path, config: dict[str, Any], reached: int, window: int) -> list[LengthLimit]:
    """Set every limit below `reached` to the window, `config` in place, and return the old limits."""
    raised = [limit for limit in length_limits(target, config) if limit.tokens < reached]
    for limit in raised:
        if limit.file == CONFIG:
            config[limit.field] = window
        elif limit.file == TOKENIZER_JSON:
            text = (target / limit.file).read_bytes().decode("utf-8")
            write_text(target / limit.file, TRUNCATION.sub(rf"\g<1>{window}", text, count=1))
        else:
            content = read_json_object(target / limit.file)
            write_json(target / limit.file, {**content, limit.field: window})
    return raised


def origin_of(folder: Path) -> dict[str, Any]:
    """Return the identity of a checkpoint by its content, which a copy keeps and a change does not.

    Args:
        folder: folder of one iteration.

    Returns:
        `iteration`, None for an import, and `sha256` over the hashes of the files, None without an
        integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read.
    """
    files = read_integrity(folder)
    return {"iteration": iteration_of(folder), "sha256": None if files is None else content_digest(files)}


def is_export_of(hf: str | Path, folder: Path) -> bool:
    """Return whether a Hugging Face folder was exported from this checkpoint as it is now.

    Args:
        hf: the Hugging Face folder.
        folder: folder of one iteration.

    Raises:
        ValueError: a record or an integrity.json that cannot be read.
    """
    record = Path(hf) / SUMMARY
    return record.is_file() and read_json_object(record).get(ORIGIN) == origin_of(folder)
