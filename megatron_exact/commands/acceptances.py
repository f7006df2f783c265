"""The verb `accept`: does this machine compute what it should?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_exact.command_line import ToolParser, command_parser, positive_int

ACCEPT_EXAMPLES = """\
examples:

  %(prog)s --output accepted
  %(prog)s --hf models/Llama-3.1-8B --recipe llama3.1_8b_16k --output accepted/llama
  %(prog)s --cpu --output accepted/cpu
"""


def accept_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `accept`."""
    parser = command_parser(accept, prog, ACCEPT_EXAMPLES)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new folder for accept.json and all logs"
    )
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs alone and run on the CPU")
    parser.add_argument(
        "--ranks",
        type=positive_int,
        metavar="N",
        help="ranks of the largest job (default: all GPUs, 2 on a CPU)",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="a Hugging Face model for the leak test and the comparison with transformers (default: a tiny "
        "random one); it has to fit on one GPU twice, in bfloat16 and in float32",
    )
    parser.add_argument(
        "--recipe",
        default="llama3.1_8b_16k",
        metavar="NAME",
        help="whose layers are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--stack-layers",
        type=positive_int,
        default=4,
        metavar="N",
        help="how many of them (default: %(default)s)",
    )
    parser.add_argument(
        "--rehearsal",
        type=Path,
        metavar="FILE",
        help="JSON of `rehearse` on the arguments of the timed job, to compare memory with",
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="GROUP", help="run these groups of checks alone"
    )
    return parser


def accept(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Check a machine and its image before any run: does it compute what it should, and how fast?

    Needs GPUs and the image, no data and no weights; it takes minutes. It checks versions, each kernel
    against a plain formula in float64, that documents of a packed row do not see each other, the loss of
    every target against transformers, loss and gradient norm on every layout that the GPUs allow, resuming
    from a checkpoint, and the values of collectives. It measures tokens a second and MFU of some layers of
    a recipe, memory against the forecast, the speed of checkpoints, and the bandwidth of collectives.

    Each check passes, fails, or is not run, with the reason. `accept.json` has all numbers. On a machine
    without a GPU, and with --cpu, the checks whose result would mean nothing are not run.

    The exit code is 0 if no check failed.
    """
    arguments = accept_parser(prog).parse_args(words)
    from megatron_exact.acceptance.accept import Options
    from megatron_exact.acceptance.accept import accept as run_checks
    from megatron_exact.acceptance.verdicts import Check, table

    def on_check(check: Check) -> None:
        print(f"{check.verdict:<8}  {check.name}  {check.value or check.reason}", flush=True)

    options = Options(
        output=arguments.output,
        cpu=arguments.cpu,
        ranks=arguments.ranks,
        hf=arguments.hf,
        recipe=arguments.recipe,
        stack_layers=arguments.stack_layers,
        rehearsal=arguments.rehearsal,
        only=tuple(arguments.only),
    )
    checks = run_checks(options, on_check=on_check)
    print(f"\n{table(checks)}\n\n{arguments.output / 'accept.json'} has all numbers")
    return 1 if any(check.verdict == "fail" for check in checks) else 0
