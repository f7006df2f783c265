"""Our own options of a training job beside Megatron's flags, and `--megatron-help` for those."""

from __future__ import annotations

import argparse
import sys

from megatron_exact.command_line import ToolParser, non_negative, positive_int
from megatron_exact.model.families import PRESETS
from megatron_exact.model.shapes import GPU_TILES, LARGEST_COUNT, Tiles, YarnScaling
from megatron_exact.training.qk_timing import add_qk_timing_options
from megatron_exact.training.weighting_options import add_weighting_options

EXAMPLE = """\
example, two processes on one machine, tensor parallel:

  torchrun --nproc-per-node 2 -m megatron_exact.training.pretrain \\
      --pack packs/long --token-weighting exact \\
      --tensor-model-parallel-size 2 --global-batch-size 8 --train-iters 100 --lr 1e-5 \\
      --save-interval 50 --load runs/exact --save runs/exact --pretrained-checkpoint base

It starts from the weights and the model of base (megatron-exact import-hf makes it from a Hugging Face
folder); called again, it resumes from its own last checkpoint. Without a checkpoint, --preset or
Megatron's own flags (--num-layers, ...) say what the model is.
Every other flag is Megatron's own and is passed on; --megatron-help lists them.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our own options; Megatron parses its own."""
    parser = ToolParser(
        prog="python -m megatron_exact.training.pretrain",
        description="Continue pretraining on a packed dataset with effective-context weighting.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    add_entry_options(parser)
    return parser


def add_entry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are answered or expanded before Megatron parses anything."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="begin with the flags of a named training stage; flags given here win "
        "(list: python -m megatron_exact.training.recipes)",
    )
    parser.add_argument(
        "--recipe-set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe: budget_tokens=2G, nodes=2, recompute=full; repeatable",
    )
    parser.add_argument(
        "--print-arguments",
        action="store_true",
        help="print the whole command with the recipe expanded, for a shell, and exit",
    )
    parser.add_argument("--megatron-help", action="store_true", help="list Megatron's own flags")


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that Megatron's parser has to know as well."""
    group = parser.add_argument_group("megatron_exact")
    _add_input_options(group)
    add_weighting_options(group)
    _add_record_options(group)
    _add_loss_head_options(group)
    _add_checkpoint_options(group)
    _add_watch_options(group)
    add_qk_timing_options(group)
    group.add_argument("--log-row-ids", action="store_true", help="write the row numbers of each iteration")
    group.add_argument(
        "--cpu", action="store_true", help="run on the CPU even where a GPU exists (gloo, local spec)"
    )
    return parser


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    """Add pack, corpora and model."""
    group.add_argument("--pack", metavar="DIR", help="packed dataset (megatron-exact pack)")
    group.add_argument(
        "--source-root",
        metavar="DIR_OR_URL",
        help="where the .bin/.idx files are, if they were moved: a folder, or a URL of fsspec (s3://, "
        "gs://, https://) from which rows are read by range through a cache on each node (docs/data.md)",
    )
    group.add_argument(
        "--read-ahead-rows",
        type=int,
        metavar="ROWS",
        help="rows whose tokens each data worker asks for in advance (default: 16 from a URL, else 0)",
    )
    group.add_argument(
        "--verify-data",
        action="store_true",
        help="read every byte of the corpora at the start and compare it with what was packed (default: "
        "sizes, indices, a sample of each .bin and 16 blocks of 64 MB)",
    )
    group.add_argument(
        "--balance-rows",
        action="store_true",
        help="deal the rows of each step to the data-parallel ranks so that all have nearly equal "
        "attention to compute; a step's rows stay the same (megatron-exact inspect --data-parallel says "
        "what it gains)",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"the model: {', '.join(PRESETS)} (default: that of the checkpoint, or Megatron's flags)",
    )
    group.add_argument(
        "--change-rotary-base",
        type=_rotary_base,
        metavar="N",
        help="train the model of the checkpoint or preset with another base of its rotary frequencies "
        "(rope_theta) than it has. run.json records the change, and exports have it in config.json "
        "(default: the model's own base, and another --rotary-base is an error)",
    )
    group.add_argument(
        "--change-rope-yarn",
        type=_yarn,
        metavar="FACTOR,ORIGINAL",
        help="train the model of the checkpoint or preset with YaRN's frequencies for windows of FACTOR "
        "times ORIGINAL tokens, such as 4,32768, where it has no scaling or YaRN's; recorded and exported "
        "likewise",
    )
    group.add_argument(
        "--post-norm",
        action="store_true",
        help="the model that the flags describe has its norms after attention and MLP, and one over all "
        "queries and one over all keys (OLMo 2); a checkpoint or preset says so itself. Local layers only",
    )


def _rotary_base(text: str) -> int:
    """Parse a base of rotary frequencies, whose K would not be 1,024."""
    if not text.isdecimal() or not 1 < int(text) <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 2 to {LARGEST_COUNT}")
    return int(text)


def _yarn(text: str) -> str:
    """Check YaRN's numbers, and return them in the form in which run.json records them."""
    try:
        return YarnScaling.parse(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_record_options(group: argparse._ArgumentGroup) -> None:
    """Add what a run records."""
    group.add_argument(
        "--run-dir", metavar="DIR", help="where run.json and losses.jsonl go (default: --save)"
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="N",
        help="peak of one device, for the MFU in the log (default: known for NVIDIA's data-center GPUs)",
    )


def _add_loss_head_options(group: argparse._ArgumentGroup) -> None:
    """Add how the loss is computed."""
    group.add_argument(
        "--loss-head",
        choices=("tiled", "stock"),
        default="tiled",
        help="tiled: logits a tile at a time, recomputed in backward, a few percent of the memory; "
        "stock: Megatron's, whose logits of all tokens exist at once (default: %(default)s)",
    )
    for side in ("tokens", "columns"):
        sizes = (getattr(Tiles(), side), getattr(GPU_TILES, side))
        group.add_argument(
            f"--loss-head-{side}",
            type=positive_int,
            metavar="N",
            help=f"{side} of a tile of the tiled loss head (default: {sizes[0]} on a CPU, {sizes[1]} on "
            "a GPU)",
        )


def settle_tiles(options: argparse.Namespace, *, on_cpu: bool) -> None:
    """Set the tile sizes that were not given to those of the machine."""
    tiles = Tiles() if on_cpu else GPU_TILES
    options.loss_head_tokens = options.loss_head_tokens or tiles.tokens
    options.loss_head_columns = options.loss_head_columns or tiles.columns


def _add_checkpoint_options(group: argparse._ArgumentGroup) -> None:
    """Add what is loaded and what is kept."""
    group.add_argument(
        "--carry-optimizer",
        action="store_true",
        help="load the optimizer's states from --pretrained-checkpoint, not the weights alone; "
        "iteration, data and learning rate start from the beginning",
    )
    group.add_argument(
        "--skip-integrity-check",
        action="store_true",
        help="load a checkpoint without comparing its files with integrity.json; nothing of it is executed "
        "either way",
    )
    group.add_argument(
        "--keep-last",
        type=positive_int,
        metavar="N",
        help="keep the newest N complete checkpoints; older ones are removed once the step after a save "
        "has shown that it is good, so there is one more for a while (default: keep all)",
    )
    group.add_argument(
        "--keep-every",
        type=positive_int,
        metavar="M",
        help="with --keep-last: iterations divisible by M stay (default: none)",
    )
    group.add_argument(
        "--save-minutes",
        type=non_negative,
        metavar="N",
        help="also save when N minutes have passed since the last save; 0: only each --save-interval "
        "(default: by Young's formula, from the time of a save and one failure in 50,000 GPU hours)",
    )


def _add_watch_options(group: argparse._ArgumentGroup) -> None:
    """Add what the watches log, and when they end a job."""
    group.add_argument(
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="a loss or gradient of NaN or Inf: stop the job, or skip the step; both log rank, row and "
        "segment (default: %(default)s)",
    )
    group.add_argument(
        "--spike-deviations",
        type=non_negative,
        default=8.0,
        metavar="K",
        help="log a loss K robust deviations above the median of the iterations before it, with its "
        "rows; 0: never (default: %(default)s)",
    )
    group.add_argument(
        "--spike-window",
        type=positive_int,
        default=64,
        metavar="N",
        help="iterations that a spike is measured by (default: %(default)s)",
    )
    group.add_argument(
        "--rank-timeout-seconds",
        type=non_negative,
        default=300.0,
        metavar="T",
        help="end the job, and name the rank, when one makes no progress for T seconds; start-up, the "
        "first iteration, saves and evaluations have 6 T; 0: never (default: %(default)g)",
    )


def show_megatron_help() -> None:
    """Print Megatron's help and exit with code 0.

    Some of its texts contain a bare %, which argparse takes for a format: those are printed as they are.
    """
    from megatron.training.arguments import parse_args

    stock = argparse.HelpFormatter._expand_help

    def expand(self: argparse.HelpFormatter, action: argparse.Action) -> str:
        try:
            return stock(self, action)
        except (KeyError, TypeError, ValueError):
            return action.help or ""

    argparse.HelpFormatter._expand_help = expand  # type: ignore[method-assign]
    try:
        sys.argv = [sys.argv[0], "--help"]
        parse_args()
    finally:
        argparse.HelpFormatter._expand_help = stock  # type: ignore[method-assign]
