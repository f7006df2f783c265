"""Convert a Hugging Face folder (Llama or Qwen2, safetensors) to a checkpoint for --load.

The checkpoint serves any tensor, pipeline and data parallel layout, with the local layers and with
Transformer Engine's. Weights are streamed: no GPU, no model in memory, no process group. The output appears
when it is complete; if this is killed, call it again.

Refused with a reason: other architectures, quantised weights, pickled weights (.bin, .pth), missing, unused
or damaged tensors, values that are not finite. Config, generation config and tokenizer go along into
OUTPUT/hf.
"""

from __future__ import annotations

import argparse
import sys

from megatron_exact.command_line import ToolParser, printable, run_tool
from megatron_exact.model.presets import PRESETS

EPILOG = """\
example:

  import_hf.py --hf models/Qwen2.5-1.5B --output checkpoints/qwen2.5-1.5b
  verify_checkpoint.py --checkpoint checkpoints/qwen2.5-1.5b --hf models/Qwen2.5-1.5B
  torchrun --nproc-per-node 2 -m megatron_exact.training.pretrain --pack packs/long \\
      --token-weighting exact --pretrained-checkpoint checkpoints/qwen2.5-1.5b \\
      --load runs/exact --save runs/exact --tensor-model-parallel-size 2 ...
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        help="refuse a folder that is not this model, field by field; its max_position_embeddings may be "
        f"larger, as an export's: {', '.join(PRESETS)}",
    )
    return parser


def main() -> int:
    """Run the tool."""
    arguments = build_parser().parse_args()
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
            f"warning: {arguments.hf} holds no tokenizer: an export will have none either", file=sys.stderr
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
