"""A job before Megatron is imported: its recipe expanded, its model, pack and start chosen and compared.

`prepare_job` imports torch only once the machine is chosen, so most errors appear within a second.

A command line with `--recipe NAME` becomes the recipe's flags followed by the user's, which win. A flag of
the recipe is left out where the user gives it or another flag that decides the same thing, and where the
weighting rule does not read it.

The model comes from the checkpoint that the job starts from, from `--preset`, or from the user's flags. A
checkpoint made by `megatron-exact import-hf`, and every run, has a folder `hf/` whose config.json describes
the model. User flags that repeat this shape are compared with it and must agree: otherwise Megatron would
silently use, say, other rotary frequencies than the checkpoint was trained with. `--change-rotary-base`
and `--change-rope-yarn` change them on purpose: the run's own `hf/` and its record then say so.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.data.hf_tokenizer import eos_of, token_text
from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.data.pack_arrays import verify_arrays
from megatron_exact.data.score_files import check_shards
from megatron_exact.data.source_guards import check_sources
from megatron_exact.data.tokenizers import made_by
from megatron_exact.exposure import Weighting
from megatron_exact.files import atomic_folder, write_json, write_text
from megatron_exact.model.families import (
    family_of,
    hf_config_of_shape,
    matching_preset,
    preset,
    shape_of_megatron_arguments,
)
from megatron_exact.model.hf_folder import (
    CONFIG,
    COPIED_TOKENIZER_FILES,
    HfFolder,
    carry_document_end,
    copy_files,
    copy_hf_folder,
    has_hf_folder,
    hf_folder_of,
    read_hf_folder,
)
from megatron_exact.model.shapes import (
    SPELLED_IN_WAYS,
    SWITCHES,
    Llama3Scaling,
    ModelShape,
    YarnScaling,
    compare_shapes,
    flag_of,
    megatron_arguments_of,
    megatron_flags,
)
from megatron_exact.tokenizer_files import CHAT_TEMPLATE
from megatron_exact.training import job_flags, refusals
from megatron_exact.training.arguments import build_parser, settle_tiles, show_megatron_help
from megatron_exact.training.checkpoint_start import Start, choose_start, is_own_folder, require_free_run
from megatron_exact.training.flag_classes import (
    GivenFlags,
    flags_without_effect,
    read_flags,
    refuse_flags,
)
from megatron_exact.training.job_flags import flag_value, has_flag
from megatron_exact.training.recipes import Flag, Recipe, change_fields, find_recipe
from megatron_exact.training.run_record import read_run_record
from megatron_exact.training.runtime import activate_runtime, rank, say
from megatron_exact.training.weighting_options import refuse_unread, unread_flags, weighting_of

RECOMPUTE = ("granularity", "method", "num-layers", "modules")
INTERLEAVING = ("num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage")
ALTERNATIVES: tuple[frozenset[str], ...] = (
    frozenset(("--train-iters", "--train-samples")),
    frozenset(("--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction")),
    frozenset(("--bf16", "--fp16")),
    frozenset(("--recompute-activations", *(f"--recompute-{word}" for word in RECOMPUTE))),
    frozenset(("--pipeline-model-parallel-layout", *(f"--{word}" for word in INTERLEAVING))),
)
"""Groups of flags: one of a group in the user's words replaces all of the recipe's flags of that group."""
OWN_OPTIONS = frozenset(("--recipe", "--recipe-set"))


def chosen_recipe(argv: Sequence[str]) -> Recipe | None:
    """Return the recipe that a command line names, with its `--recipe-set` changes, or None.

    Raises:
        ValueError: an unknown recipe or field, or changes without a recipe.
    """
    options, _ = build_parser().parse_known_args(list(argv))
    if options.recipe is None:
        if options.recipe_set:
            raise ValueError("--recipe-set changes a field of a recipe: name one with --recipe")
        return None
    return change_fields(find_recipe(options.recipe), options.recipe_set)


def expand_recipe(argv: Sequence[str]) -> list[str]:
    """Return the command line with `--recipe` replaced by the recipe's flags.

    Raises:
        ValueError: an unknown recipe, field or rule.
    """
    recipe = chosen_recipe(argv)
    if recipe is None:
        return list(argv)
    user = [word for group in flag_groups(argv) if group[0] not in OWN_OPTIONS for word in group]
    batch = flag_value(user, "--global-batch-size")
    flags = recipe.flags(batch_rows=positive_int(batch) if batch is not None else None)
    unread = unread_flags(flag_value(user, "--token-weighting") or dict(flags)["--token-weighting"] or "")
    return with_defaults([flag for flag in flags if flag[0] not in unread], user)


def with_defaults(defaults: Sequence[Flag], user: Sequence[str]) -> list[str]:
    """Return those defaults that the user's words do not decide, followed by the user's words."""
    given = {group[0] for group in flag_groups(user)}
    for flags in ALTERNATIVES:
        if given & flags:
            given |= flags
    words = []
    for flag, value in defaults:
        if flag not in given:
            words += [flag] if value is None else [flag, value]
    return [*words, *user]


def flag_groups(argv: Sequence[str]) -> list[list[str]]:
    """Split a command line into one list for each flag and its values; `--flag=value` becomes two words."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append([flag, value] if equals else [flag])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"{word!r} is not a flag: flags begin with --")
    return groups


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """The model of a job, as far as it is known before Megatron is imported."""

    shape: ModelShape | None
    """Its shape; None where the user's flags alone describe the model."""
    source: str
    """Where the shape comes from, for messages."""
    folder: HfFolder | None
    """The folder `hf/` of the checkpoint that the job loads, if there is one."""
    unchanged: ModelShape | None = None
    """The shape in `source`, where `--change-rotary-base` or `--change-rope-yarn` changed it."""

    @property
    def description(self) -> str | None:
        """One line for the log; None where the flags alone describe the model."""
        if self.shape is None:
            return None
        name = matching_preset(self.shape)
        line = f"the model is that of {self.source}" + (f" ({name})" if name and self.folder else "")
        changes = [
            f"{name} {change['to']} instead of {change['from']}" for name, change in self.changes.items()
        ]
        return f"{line}, with {' and '.join(changes)}" if changes else line

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """What the job changes of the model that it starts from, for run.json; empty as a rule."""
        if self.shape is None or self.unchanged is None:
            return {}
        before, after = asdict(self.unchanged), asdict(self.shape)
        return {
            name: {"from": before[name], "to": after[name]}
            for name in ("rope_theta", "rope_scaling")
            if before[name] != after[name]
        }

    @property
    def yarn(self) -> YarnScaling | None:
        """YaRN's scaling, which Megatron's own flags cannot describe."""
        scaling = None if self.shape is None else self.shape.rope_scaling
        return scaling if isinstance(scaling, YarnScaling) else None

    def flags(self, argv: Sequence[str]) -> list[str]:
        """Return the Megatron flags of the shape, without those that the user gives.

        Args:
            argv: the user's flags.

        Raises:
            ValueError: names every flag that contradicts the shape, or one that Megatron would not read.
        """
        if self.shape is None:
            groups = flag_value(argv, "--num-query-groups")
            # The run would begin and could not resume: its `hf/` would describe another model
            if groups is not None and not has_flag(argv, "--group-query-attention"):
                raise ValueError(
                    f"--num-query-groups {groups} without --group-query-attention has no effect: add that "
                    "flag, or drop this one for as many groups as heads"
                )
            return []
        expected = megatron_arguments_of(self.shape)
        wrong = [line for name, value in expected.items() if (line := _contradiction(argv, name, value))]
        if wrong:
            base = flag_value(argv, "--rotary-base")
            is_base = any(line.startswith("--rotary-base ") for line in wrong)
            raise ValueError(
                f"{'; '.join(wrong)}, says {self.source}: drop these flags"
                + (f", or change the model on purpose with --change-rotary-base {base}" if is_base else "")
            )
        return megatron_flags(
            self.shape, without=[flag for flag in map(flag_of, expected) if has_flag(argv, flag)]
        )

    def post_norm(self, given: bool) -> bool:
        """Return whether the norms follow attention and MLP, which is an option of ours.

        Args:
            given: whether `--post-norm` is.

        Raises:
            ValueError: it contradicts the shape.
        """
        if self.shape is None:
            return given
        if given and not self.shape.post_norm:
            raise ValueError(f"--post-norm is given but the model has none, says {self.source}: drop it")
        return self.shape.post_norm

    def check_arguments(self, args: Any) -> None:
        """Compare the model that Megatron is about to build with the shape, whichever flags describe it.

        Args:
            args: Megatron's validated namespace.

        Raises:
            ValueError: names every field that differs.
        """
        if self.shape is None:
            return
        found = shape_of_megatron_arguments(args, like=self.shape)
        window = self.shape.max_position_embeddings  # says nothing about the weights
        lines = compare_shapes(replace(found, max_position_embeddings=window), self.shape)
        if lines:
            raise ValueError(f"the flags describe another model than {self.source}: {'; '.join(lines)}")


def choose_model(
    preset_name: str | None,
    load: Path | None,
    save: str | None,
    *,
    rotary_base: int | None = None,
    yarn: str | None = None,
) -> JobModel:
    """Choose the model of a job from its preset and the checkpoint that it loads.

    Args:
        preset_name: value of `--preset`.
        load: folder that the job loads from (`Start.load`).
        save: folder that the job saves to.
        rotary_base: value of `--change-rotary-base`, which replaces the base of preset and checkpoint.
        yarn: value of `--change-rope-yarn`, which replaces their scaling.

    Raises:
        ValueError: preset and checkpoint, or checkpoint and output folder, disagree, or a change of RoPE
            that the model cannot have.
    """

    def with_changes(model: JobModel) -> JobModel:
        return replace(model, **_changed_rope(model.shape, rotary_base, yarn, model.source))

    named = preset(preset_name) if preset_name is not None else None
    if load is None or not has_hf_folder(load):
        return with_changes(JobModel(shape=named, source=f"--preset {preset_name}", folder=None))
    folder = read_hf_folder(hf_folder_of(load))
    source = str(folder.path / CONFIG)
    model = with_changes(JobModel(shape=folder.shape, source=source, folder=folder))
    shape = model.shape
    assert shape is not None
    if named is not None:
        named = with_changes(JobModel(shape=named, source=source, folder=None)).shape
    if named is not None and named != shape:
        raise ValueError(
            f"{source} is not --preset {preset_name}: {'; '.join(compare_shapes(shape, named))}"
            + _how_to_keep_rope(shape, named)
        )
    if save is not None and has_hf_folder(save):
        saved = read_hf_folder(hf_folder_of(save)).shape
        if saved != shape:
            changed = "" if model.unchanged is None else " with the given change of RoPE"
            raise ValueError(
                f"{hf_folder_of(save)} describes another model than {source}{changed}: "
                f"{'; '.join(compare_shapes(saved, shape))}; choose another --save"
            )
    return model


def _changed_rope(
    shape: ModelShape | None, rotary_base: int | None, yarn: str | None, source: str
) -> dict[str, Any]:
    """Return `shape` and `unchanged` of a model with other rotary frequencies; empty where it has them.

    Raises:
        ValueError: flags describe the model, or it cannot have YaRN.
    """
    wanted: dict[str, Any] = {} if rotary_base is None else {"rope_theta": float(rotary_base)}
    if yarn is not None:
        wanted["rope_scaling"] = scaling = YarnScaling.parse(yarn)
    if not wanted:
        return {}
    if shape is None:
        option = "--change-rotary-base" if rotary_base is not None else "--change-rope-yarn"
        raise ValueError(
            f"{option} changes the model of a checkpoint (megatron-exact import-hf) or preset, but flags "
            "alone describe this one: give --rotary-base, or name a preset"
        )
    if yarn is not None and isinstance(shape.rope_scaling, Llama3Scaling):
        raise ValueError(
            f"--change-rope-yarn {yarn} would replace Llama 3's scaling, says {source}: leave it out; "
            "--change-rotary-base changes the base under that scaling"
        )
    if yarn is not None and scaling.original_max_position_embeddings > shape.max_position_embeddings:
        raise ValueError(
            f"--change-rope-yarn {yarn}: ORIGINAL is the window of the model before YaRN, but {source} has "
            f"max_position_embeddings {shape.max_position_embeddings}: give that or less"
        )
    try:
        changed = replace(shape, **wanted)
        family_of(changed).check_scaling(changed.rope_scaling)
    except ValueError as error:
        raise ValueError(f"--change-rope-yarn {yarn}: {error}") from None
    return {} if changed == shape else {"shape": changed, "unchanged": shape}


def _how_to_keep_rope(shape: ModelShape, named: ModelShape) -> str:
    """Return the options that keep the RoPE of a checkpoint that differs from a preset in it alone."""
    if replace(named, rope_theta=shape.rope_theta, rope_scaling=shape.rope_scaling) != shape:
        return ""
    options = []
    if shape.rope_theta != named.rope_theta:
        options.append(f"--change-rotary-base {shape.rope_theta:.0f}")
    scaling = shape.rope_scaling
    if scaling != named.rope_scaling:
        # the option has the bounds of the paper, and does not replace Llama 3's scaling
        if not isinstance(scaling, YarnScaling) or isinstance(named.rope_scaling, Llama3Scaling):
            return "; to keep it, leave --preset out"
        if scaling != YarnScaling.parse(scaling.text):
            return "; to keep it, leave --preset out"
        options.append(f"--change-rope-yarn {scaling.text}")
    return f"; to keep it, add {' '.join(options)}" if options else ""


def check_against_pack(model: JobModel, manifest: Manifest) -> list[str]:
    """Compare the pack's tokenizer with the model's, its ids with the embedding, its rows with the window.

    Returns:
        Lines for the log: what could not be compared, and whether the rows exceed the model's window.

    Raises:
        ValueError: another tokenizer, or ids beyond the embedding.
    """
    if model.shape is None:
        return []
    doubts = []
    if model.yarn is not None:
        if manifest.row_tokens > model.yarn.window:
            doubts.append(
                f"rows of {manifest.row_tokens} tokens are longer than the {model.yarn.window} (FACTOR "
                "times ORIGINAL) that YaRN is made for; vLLM will reject prompts of that length"
            )
    elif manifest.row_tokens > model.shape.max_position_embeddings:
        doubts.append(
            f"rows of {manifest.row_tokens} tokens are longer than the window of "
            f"{model.shape.max_position_embeddings} that {model.source} promises"
        )
    if manifest.tokenizer is None:
        return [*doubts, "the pack names no tokenizer: whether it is the model's cannot be checked"]
    if manifest.tokenizer.vocab_size > model.shape.vocab_size:
        raise ValueError(
            f"the pack's tokenizer has {manifest.tokenizer.vocab_size} ids but {model.source} has an "
            f"embedding of {model.shape.vocab_size} rows: tokenize the corpus with the model's tokenizer"
        )
    if model.folder is None:
        return doubts
    path = model.folder.path
    if not model.folder.has_tokenizer:
        return [
            *doubts,
            f"{path} contains no tokenizer: whether the pack's is the model's cannot be checked",
        ]
    if not made_by(manifest.tokenizer.sha256, path):
        raise ValueError(
            f"the pack was tokenized with {manifest.tokenizer.path} (sha256 "
            f"{manifest.tokenizer.sha256[:12]}...), which is not the tokenizer in {path}: tokenize the "
            "corpus with that one"
        )
    return doubts


def write_hf_folder(model: JobModel, args: Any, manifest: Manifest) -> str | None:
    """Write `hf/` into the folder of `--save`, so that an export needs that folder alone.

    An existing `hf/` stays. The folder names the token that ends the documents of the corpus
    (`carry_document_end`); after tuning on question-answer records it contains their chat template.

    Args:
        model: of the job.
        args: Megatron's validated namespace, with our options.
        manifest: of the pack.

    Returns:
        A line for the log where the model cannot be exported, else None.
    """
    if args.save is None:
        return None
    if has_hf_folder(args.save):
        _leave_document_end(hf_folder_of(args.save), args.pack, manifest)  # a start may have been killed
        return None
    if model.folder is not None:
        config = None
        if model.shape is not None and model.unchanged is not None:
            config = family_of(model.shape).config_with_rope(model.folder.config, model.shape)
        copy_hf_folder(model.folder.path.parent, args.save, config)
        _leave_template(hf_folder_of(args.save), manifest)
        _leave_document_end(hf_folder_of(args.save), args.pack, manifest)
        return None
    try:
        shape = model.shape or shape_of_megatron_arguments(args)
    except ValueError as error:
        return f"no hf folder is written, this run cannot be exported: {error}"
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    with atomic_folder(hf_folder_of(args.save)) as building:
        write_json(building / CONFIG, hf_config_of_shape(shape, dtype=dtype))
        tokenizer = manifest.tokenizer_path(args.pack)
        if tokenizer is not None and tokenizer.is_dir():
            copy_files(tokenizer, building, COPIED_TOKENIZER_FILES)
        elif tokenizer is not None and tokenizer.is_file():
            name = f"tokenizer{tokenizer.suffix}"  # .json or .model
            (building / name).write_bytes(tokenizer.read_bytes())
        _leave_document_end(building, args.pack, manifest)
    _leave_template(hf_folder_of(args.save), manifest)
    return None


def _leave_template(folder: Path, manifest: Manifest) -> None:
    if manifest.supervision is not None:
        write_text(folder / CHAT_TEMPLATE, manifest.supervision.template)


def _leave_document_end(folder: Path, pack: str, manifest: Manifest) -> None:
    """Write the token that ends documents into `hf/`.

    A pack without document tokens (a corpus without a record) falls back to the eos of the tokenizer; where
    the tokenizer has none or is missing, nothing is written.
    """
    path = manifest.tokenizer_path(pack)
    tokens = manifest.document_tokens
    if path is None or not path.exists():
        path = folder
    if tokens is None:
        eos = eos_of(path)
        if eos is not None:
            carry_document_end(folder, *eos, bos=None)
        return
    first = tokens.prefix_ids[0] if len(tokens.prefix_ids) == 1 else None
    text = None if first is None else token_text(path, first)
    bos = None if first is None or text is None else (first, text)
    carry_document_end(folder, tokens.eod_id, tokens.eod_token, bos)


def _contradiction(argv: Sequence[str], argument: str, value: Any) -> str | None:
    """Describe how the user's flag for an argument contradicts the model's value, or return None."""
    flag = flag_of(argument)
    if argument in SPELLED_IN_WAYS:
        return None  # JobModel.check_arguments compares what Megatron makes of it
    if argument in SWITCHES:
        wrong = has_flag(argv, flag) and value != SWITCHES[argument][1]
        return f"{flag} is given but the model has {argument} {value}" if wrong else None
    text = flag_value(argv, flag)
    if text is None:
        return None
    try:
        agrees = type(value)(text) == value
    except ValueError:
        agrees = False
    return None if agrees else f"{flag} {text} is given but the model has {value}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is decided before Megatron is imported."""

    options: argparse.Namespace
    """Our own options."""
    manifest: Manifest
    """The manifest of the pack."""
    weighting: Weighting
    """The weighting rule, applied to the pack."""
    start: Start
    """The checkpoint that the job starts from or resumes."""
    model: JobModel
    """The model."""
    run_dir: Path | None
    """The folder of the run's records; None where nothing is recorded."""
    argv: list[str]
    """The whole Megatron command line."""


def prepare_job(
    argv: Sequence[str],
    *,
    choose_runtime: Callable[[argparse.Namespace], tuple[str, ...]] = activate_runtime,
    hold: Callable[[Sequence[Path]], None] = lambda _: None,
    trains: bool = True,
    reads_data: bool = True,
) -> Job:
    """Read and check everything that needs neither Megatron nor torch, then choose the runtime.

    Args:
        argv: the command line of the job.
        choose_runtime: returns, from our options, the Megatron flags that the machine dictates.
        hold: takes the leases of the folders that the job will write, before their content is read.
        trains: whether the job will train; if so, its schedule is checked.
        reads_data: whether rank 0 verifies the pack's arrays, scores and corpora. Launchers and preflight
            leave that to the job.

    Raises:
        ValueError: cause, value and remedy.
    """
    words = expand_recipe(argv)
    options, megatron_argv, given = read_command_line(words)
    options.command_line = list(argv)  # for records: the same words start the job again
    if options.megatron_help:
        choose_runtime(options)
        show_megatron_help()
    refuse_flags(given)
    refuse_unread(words, [options.token_weighting])
    if options.pack is None:
        raise ValueError("--pack is missing: name a packed dataset (megatron-exact pack makes one)")
    manifest = read_manifest(options.pack)
    job_flags.compare_with_pack(megatron_argv, manifest)
    refusals.check_supervision(options.token_weighting, manifest)
    weighting = weighting_of(options, manifest)
    written = [name for name in (flag_value(megatron_argv, "--save"), options.run_dir) if name is not None]
    hold(list({Path(name).resolve(): Path(name) for name in written}.values()))
    start, run_dir = _choose_start(megatron_argv, options)
    save = flag_value(megatron_argv, "--save")
    model = choose_model(
        options.preset,
        start.load,
        save,
        rotary_base=options.change_rotary_base,
        yarn=options.change_rope_yarn,
    )
    model_flags = model.flags(megatron_argv)
    options.post_norm = model.post_norm(options.post_norm)
    refusals.check_model_given(read_flags([*model_flags, *megatron_argv]), load=start.load)

    def whole_command_line(runtime_arguments: Sequence[str]) -> list[str]:
        return job_flags.megatron_arguments(
            megatron_argv,
            manifest,
            runtime_arguments=runtime_arguments,
            start=start.arguments(),
            run_dir=run_dir,
            model_flags=model_flags,
            window=model.shape.max_position_embeddings if model.shape is not None else 0,
            eval_iters=_recorded_eval_iters(run_dir) if start.is_resume else None,
        )

    refusals.check_pack_has_rows(manifest)
    settled = read_flags(whole_command_line(()))
    refusals.check_combinations(settled)
    if trains:
        refusals.check_training(settled, manifest)
    doubts = check_against_pack(model, manifest)
    for line in filter(None, (start.message, model.description, *doubts)):
        say(line)
    if rank() == 0 and reads_data:  # once a job; the other ranks wait for rank 0 at start-up
        verify_arrays(options.pack, manifest)
        if options.confidence_scores is not None:
            check_shards(options.confidence_scores, "train")
        notes = check_sources(
            Path(options.pack), manifest, options.source_root, verify_data=options.verify_data
        )
        for line in notes:
            say(line)
    if run_dir is None:
        say("neither --save nor --run-dir is given: no run.json and no losses.jsonl")
    runtime_arguments = choose_runtime(options)
    full_argv = whole_command_line(runtime_arguments)
    refusals.check_machine(read_flags(full_argv), is_cpu="gloo" in runtime_arguments)
    settle_tiles(options, on_cpu="gloo" in runtime_arguments)
    if trains:
        for line in _announcements(argv, read_flags(full_argv), manifest):
            say(line)
    return Job(
        options=options,
        manifest=manifest,
        weighting=weighting,
        start=start,
        model=model,
        run_dir=run_dir,
        argv=full_argv,
    )


def read_command_line(words: Sequence[str]) -> tuple[argparse.Namespace, list[str], GivenFlags]:
    """Split a command line into our options and Megatron's flags, the latter as words and parsed.

    Args:
        words: a command line, recipes expanded.

    Raises:
        ValueError: an unknown flag, or a value of another kind than the flag takes.
    """
    parser = build_parser()
    options, megatron_argv = parser.parse_known_args(words)
    ours = [spelling for action in parser._actions for spelling in action.option_strings]
    return options, megatron_argv, read_flags(megatron_argv, ours=ours)


def _announcements(argv: Sequence[str], job: GivenFlags, manifest: Manifest) -> Iterator[str]:
    """Yield the lines that the log begins with: flags without effect, and the cost of the evaluations."""
    _, _, user = read_command_line(argv)  # without a recipe's flags, which the user did not choose
    idle = flags_without_effect(user, job)
    if idle:
        yield f"without effect here: {'; '.join(idle)}"
    yield job_flags.describe_evaluations(job, refusals.length_of(job), manifest)


def _recorded_eval_iters(run_dir: Path | None) -> int | None:
    """Return --eval-iters of the run's beginning: every evaluation of a run reads the same rows."""
    record = read_run_record(run_dir) if run_dir is not None else None
    schedule = record.get("schedule") if isinstance(record, dict) else None
    recorded = schedule.get("eval_iters") if isinstance(schedule, dict) else None
    return recorded if isinstance(recorded, int) and recorded >= 0 else None


def _choose_start(argv: Sequence[str], options: argparse.Namespace) -> tuple[Start, Path | None]:
    """Return where the job starts, and the folder of the run's records.

    Raises:
        ValueError: no intact checkpoint where one is required, or another run in the output folder.
    """
    load, save, step = (flag_value(argv, flag) for flag in ("--load", "--save", "--ckpt-step"))
    start = choose_start(
        load,
        save,
        flag_value(argv, "--pretrained-checkpoint"),
        _iteration(step),
        needs_integrity=not options.skip_integrity_check,
        run_dir=options.run_dir,
    )
    if options.carry_optimizer:
        start = start.carrying_optimizer()
    if start.is_resume and has_flag(argv, "--finetune"):
        raise ValueError(
            f"--finetune with --load equal to --save would begin the run of {save} again: drop --finetune "
            "to resume it, or choose another --save"
        )
    folder = options.run_dir or save
    require_free_run(save, folder, start, is_own=is_own_folder(load, save))
    return start, Path(folder) if folder is not None else None


def _iteration(step: str | None) -> int | None:
    if step is not None and re.fullmatch(r"[0-9]{1,18}", step) is None:
        raise ValueError(f"--ckpt-step {step[:40]!r} is not an iteration: give the number of a checkpoint")
    return None if step is None else int(step)
