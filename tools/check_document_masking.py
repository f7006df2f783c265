"""Prove on a job's own arguments that no document of a packed row sees another.

Builds the model exactly as the job would (layout, layer implementation, checkpoint, CPU or GPU), reads real
rows of the pack, and compares the loss of every target:

  (a) one token of one document is changed: no loss of another document, and no earlier loss of the same
      one, may change by a single bit (where two equal runs differ: by more than four times as much);
  (b) each document alone gives the losses that it gave in its row (1e-4 nats in fp32, 0.03 in bf16);
  (c) controls: with the boundaries taken away both measurements must exceed their bounds, or the check
      itself proves nothing.

Exit code 0 if all lines are ok, else 1. Nothing is trained and nothing written to the run's folder.
"""

from __future__ import annotations

import argparse
import sys

from megatron_exact.command_line import ToolParser, positive_int, run_tool

EPILOG = """\
all other arguments are those of the job (python -m megatron_exact.training.pretrain --help); examples:

  check_document_masking.py --pack packs/long --preset qwen2.5-0.5b
  torchrun --nproc-per-node 4 tools/check_document_masking.py --pack packs/long \\
      --token-weighting exact --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \\
      --global-batch-size 8 --bf16 --pretrained-checkpoint checkpoints/qwen2.5-1.5b

Weights that were never trained mix documents less: give a checkpoint where there is one.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool alone."""
    parser = ToolParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--documents",
        type=positive_int,
        default=3,
        metavar="N",
        help="documents of a micro-batch to change and to isolate: first, longest, last, shortest, then "
        "the others; three forward passes each (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main() -> int:
    """Run the tool; under torchrun on every rank."""
    arguments, job_argv = build_parser().parse_known_args()
    from megatron_exact.training.masking_check import run
    from megatron_exact.training.monitor import leave

    sys.argv = sys.argv[:1]
    leave(run(job_argv, num_documents=arguments.documents, as_json=arguments.json))


if __name__ == "__main__":
    run_tool(main)
