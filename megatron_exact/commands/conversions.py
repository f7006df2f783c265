"""The verbs of checkpoints: `import-hf`, `export-hf`, `verify-checkpoint` and `seal-checkpoint`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_exact.command_line import ArgumentError, ToolParser, command_parser, printable
from megatron_exact.model.families import FAMILIES, PRESETS

IMPORT_HF_EXAMPLES = f"""\
architectures: {", ".join(family.model_class for family in FAMILIES.values())}

example:

  %(prog)s --hf models/Qwen2.5-1.5B --output checkpoints/qwen2.5-1.5b
  megatron-exact verify-checkpoint --checkpoint checkpoints/qwen2.5-1.5b --hf models/Qwen2.5-1.5B
  megatron-exact train --nproc-per-node 2 --pack packs/long \\
      --token-weighting exact --pretrained-checkpoint checkpoints/qwen2.5-1.5b \\
      --load runs/exact --save runs/exact --tensor-model-parallel-size 2 ...
"""


def import_hf_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `import_hf`."""
    parser = command_parser(import_hf, prog, IMPORT_HF_EXAMPLES)
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="model folder: config.json, *.safetensors, tokenizer"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="checkpoint folder to make")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="type of the weights in the checkpoint (default: %(default)s); Megatron converts on --load",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="accept only this model, compared field by field; its max_position_embeddings may be "
        f"larger, as an export's: {', '.join(PRESETS)}",
    )
    return parser


def import_hf(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Convert a Hugging Face folder of a supported architecture to a checkpoint for --load.

    The checkpoint serves any tensor, pipeline and data parallel layout, with the local layers and with
    Transformer Engine's. Weights are streamed: it needs no GPU, no process group and not the model in
    memory. The output appears when it is complete; if this is killed, run it again.

    Other architectures, quantized weights, pickled weights (.bin, .pth), missing, unused or damaged
    tensors and values that are not finite are errors. Config, generation config and tokenizer are
    copied to OUTPUT/hf.
    """
    arguments = import_hf_parser(prog).parse_args(words)
    from megatron_exact.conversion.import_hf import import_hf

    found = import_hf(arguments.hf, arguments.output, dtype=arguments.dtype, preset_name=arguments.preset)
    print(
        f"{arguments.output}: {found.parameters:,} parameters, {', '.join(found.dtypes)}, "
        f"{found.num_bytes / 1e9:.2f} GB, {found.shape.architecture}, "
        + (f"preset {found.preset}" if found.preset else "no preset has this shape")
    )
    for warning in found.warnings:
        print(printable(f"warning: {arguments.hf}: {warning}"), file=sys.stderr)
    if found.nearly is not None:
        name, differences = found.nearly
        print(f"warning: almost {name}, but {'; '.join(differences)}", file=sys.stderr)
    if not found.has_tokenizer:
        print(
            f"warning: {arguments.hf} contains no tokenizer: an export will have none either",
            file=sys.stderr,
        )
    return 0


EXPORT_HF_EXAMPLES = """\
example:

  %(prog)s --checkpoint runs/exact --output models/exact
  %(prog)s --checkpoint runs/exact --iteration 500 --output models/exact-500 --dtype bfloat16
"""


SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "B": 1}


def size_in_bytes(text: str) -> int:
    """Parse a size for argparse: `5GB`, `500MB`, `2GiB`, or a number of bytes."""
    upper = text.strip().upper()
    unit = next((unit for unit in sorted(SIZE_UNITS, key=len, reverse=True) if upper.endswith(unit)), "")
    try:
        size = round(float(upper.removesuffix(unit)) * SIZE_UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise ArgumentError(f"{text!r} is not a size such as 5GB") from None
    if size < 1:
        raise ArgumentError(f"{text!r} is not above 0")
    return size


def export_hf_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `export_hf`."""
    parser = command_parser(export_hf, prog, EXPORT_HF_EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="folder of a run or an import")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the one the tracker names")
    parser.add_argument("--output", required=True, metavar="DIR", help="model folder to make")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="type of the weights (default: %(default)s, as the run trained them)",
    )
    parser.add_argument(
        "--shard-size",
        type=size_in_bytes,
        default="5GB",
        metavar="SIZE",
        help="largest weight file; several get an index (default: %(default)s)",
    )
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="window that the export's config promises to engines, at least the longest rows of training "
        "(default: those, or the imported window where it is longer)",
    )
    return parser


def export_hf(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Convert a checkpoint of a run, or of an import, to a Hugging Face folder for from_pretrained.

    Any layout, with or without optimizer states, local or Transformer Engine layers. Only the folder of
    the run is needed: its hf/ contains config and tokenizer. Weights are streamed: it needs no GPU, no
    process group and not the model in memory. The output appears when it is complete; if this is
    killed, run it again.
    """
    arguments = export_hf_parser(prog).parse_args(words)
    from megatron_exact.conversion.export_hf import export_hf

    found = export_hf(
        arguments.checkpoint,
        arguments.output,
        iteration=arguments.iteration,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
        window=arguments.max_position_embeddings,
    )
    origin = "imported weights" if found.iteration is None else f"iteration {found.iteration}"
    print(
        f"{arguments.output}: {origin}, {found.parameters:,} parameters, {', '.join(found.dtypes)}, "
        f"{found.num_bytes / 1e9:.2f} GB in {len(found.files)} files"
    )
    if found.window != found.imported_window:
        asked = arguments.max_position_embeddings is not None
        print(
            f"max_position_embeddings is {found.window} instead of the imported {found.imported_window}: "
            + ("--max-position-embeddings asks for it" if asked else "the longest rows it was trained on")
        )
    for limit in found.raised:
        print(f"{limit} is raised to {found.window} as well")
    if found.sampling:
        fields = ", ".join(f"{name} {value}" for name, value in found.sampling.items())
        print(f"generation_config.json goes along with {fields}: the defaults of generate()")
    for warning in found.warnings:
        print(f"warning: {arguments.checkpoint}: {warning}", file=sys.stderr)
    if not found.has_tokenizer:
        print(
            f"warning: {arguments.checkpoint}/hf contains no tokenizer: {arguments.output} has none",
            file=sys.stderr,
        )
    return 0


VERIFY_CHECKPOINT_EXAMPLES = """\
example:

  %(prog)s --checkpoint checkpoints/qwen2.5-1.5b --hf models/Qwen2.5-1.5B
  %(prog)s --checkpoint runs/exact --iteration 500
  %(prog)s --checkpoint runs/exact --hf models/exact     # an export against its run
"""


NAME_WIDTH = 52


def verify_checkpoint_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `verify_checkpoint`."""
    parser = command_parser(verify_checkpoint, prog, VERIFY_CHECKPOINT_EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="folder of a run or an import")
    parser.add_argument("--hf", metavar="DIR", help="the Hugging Face model that it must equal")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the one the tracker names")
    parser.add_argument("--no-logits", action="store_true", help="compare weights only")
    return parser


def verify_checkpoint(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Verify that a checkpoint is whole, or that it equals a Hugging Face model.

    With --hf: config against config, every tensor bit for bit after the mapping, and the logits of
    Megatron's model against transformers' in float32 at short, middle and long positions. Without:
    hashes of the files against integrity.json, keys and shapes against hf/config.json, every record and
    every value.

    Where import or export rounded the weights (--dtype bfloat16), the rounded values are compared bit
    for bit and the line says "rounded" instead of "ok". An export of this checkpoint is recognized by
    its record, megatron_exact.json. Any other folder is taken for the checkpoint's source: float32
    imported from bfloat16 is compared with all its bits.

    The exit code is 0 if no line says FAILED. Logits take the model in float32 in memory (4 bytes a
    parameter), one of the two at a time; --no-logits leaves them out.
    """
    arguments = verify_checkpoint_parser(prog).parse_args(words)
    from megatron_exact.conversion.verify_checkpoint import table_header, verify_checkpoint

    checks = verify_checkpoint(
        arguments.checkpoint,
        hf=arguments.hf,
        iteration=arguments.iteration,
        with_logits=not arguments.no_logits,
    )
    print(table_header(NAME_WIDTH))
    failures = rounded = count = 0
    for check in checks:
        print(check.line(NAME_WIDTH), flush=True)
        failures += not check.passed
        rounded += check.is_rounded
        count += 1
    print(
        f"{arguments.checkpoint}: "
        + (f"{failures} of {count} checks failed" if failures else f"all {count} checks passed")
        + (f", {rounded} of them on values rounded to another type" if rounded and not failures else "")
    )
    return 1 if failures else 0


SEAL_CHECKPOINT_EXAMPLES = """\
example:

  %(prog)s runs/old                  # every iteration of a run
  %(prog)s runs/old/iter_0000500     # one
"""


def seal_checkpoint_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `seal_checkpoint`."""
    parser = command_parser(seal_checkpoint, prog, SEAL_CHECKPOINT_EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run, an import or one iteration")
    return parser


def seal_checkpoint(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Write the integrity.json of checkpoints that were saved without one, after a check of their
    structure.

    Training loads sealed checkpoints only: it compares the sha256 of every file with integrity.json.
    Saves of megatron_exact end with one; checkpoints of stock Megatron, or of older versions, need this
    command once.

    It first checks that the index can be read, that chunks cover every tensor, and that every record of
    the index is there, whole, and agrees with its CRC-32. A seal cannot show that the records contain
    what the run computed, or that all files belong to one save. From now on, no byte changes unnoticed.

    A folder with integrity.json is left as it is: sealing again would hide damage. The exit code is 0
    if every checkpoint of the folder has one in the end.
    """
    arguments = seal_checkpoint_parser(prog).parse_args(words)
    from megatron_exact.conversion.seal import seal_checkpoints

    failures = 0
    for sealing in seal_checkpoints(arguments.folder):
        print(printable(f"{sealing.name}: {sealing.detail}"), flush=True)
        failures += not sealing.is_sealed
    return 1 if failures else 0
