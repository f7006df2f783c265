"""A cell of RULER on a CPU: this project's tool against plain lm-eval, on the same prompts.

    python -m examples.real_model.make        # a trained model of 135 million parameters, .cache/real-model
    python benchmarks/evaluation.py --model .cache/real-model --dtype bfloat16

Plain lm-eval is its `HFLM` as it comes, which gets the prompts that the tool writes with `--prompts-only`,
one prompt at a time, in the same dtype, with the same limit of generated tokens. Every contender is a whole
process: start-up, loading and, for the tool, hashing the model and drawing the examples are included.

Where a prompt of 1,024 tokens takes its time: reading it is one large product a layer; then each of up to
128 generated tokens reads all weights once. In bfloat16 on a CPU without instructions for it, reading takes
most, and the tool multiplies in float32 there (`low_precision.py`). Prompts in a batch share the weights
that generating reads (`--batch-size`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import REPOSITORY, Row, add_common_arguments, publish, time_interleaved, whole_number

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.evaluation.suites.ruler import TASKS

TOOL = str(REPOSITORY / "tools" / "evaluate_model.py")
PLAIN = "plain lm-eval, one prompt at a time"
EXAMPLE = """example:
  python benchmarks/evaluation.py --model .cache/real-model --dtype bfloat16 --samples 4 --batch-size 4
"""


def answer_plainly(model: str, dtype: str, prompts: str, answers: str) -> None:
    """Answer prompts with lm-eval's own model object; runs in a process of its own."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    rows = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    requests = [
        Instance(
            request_type="generate_until",
            doc=row,
            arguments=(
                row["prompt"],
                {
                    "until": [],
                    "do_sample": False,
                    "max_gen_toks": TASKS[row["task"]].generation_tokens,
                },
            ),
            idx=number,
        )
        for number, row in enumerate(rows)
    ]
    loaded = HFLM(pretrained=model, dtype=dtype, batch_size=1, device="cpu", max_length=rows[0]["length"])
    Path(answers).write_text(json.dumps(loaded.generate_until(requests)), encoding="utf-8")


def run(command: list[str]) -> None:
    """Run a contender. Raises ValueError with the end of what it wrote, if it fails."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise ValueError(f"{Path(command[1]).name} failed: {(done.stdout + done.stderr)[-2000:]}")


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """One row a contender, plain lm-eval first."""
    prompts = folder / "prompts.jsonl"
    chosen = ["--suite", "ruler", "--tasks", options.task, "--lengths", str(options.length)]
    chosen += ["--samples", str(options.samples)]
    run([sys.executable, TOOL, "--model", options.model, *chosen, "--prompts-only", str(prompts)])
    script, plain = str(Path(__file__).resolve()), folder / "plain.json"
    commands = {
        PLAIN: [
            *(sys.executable, script, "--model", options.model, "--dtype", options.dtype),
            *("--plain", str(prompts), str(plain)),
        ]
    }
    results: dict[str, Path] = {}
    for batch in sorted({1, options.batch_size}):
        name = f"megatron_exact: tools/evaluate_model.py, --batch-size {batch}"
        results[name] = folder / f"results-{batch}"
        commands[name] = [
            *(sys.executable, TOOL, "--model", options.model, *chosen, "--dtype", options.dtype),
            *("--device", "cpu", "--batch-size", str(batch), "--output", str(results[name])),
            *("--example-cache", str(folder / "examples")),
        ]

    def work_of(name: str) -> Callable[[], None]:
        def work() -> None:
            for path in results.values():  # a finished cell would be skipped
                shutil.rmtree(path, ignore_errors=True)
            run(commands[name])
            if name in results:
                answers[name] = predictions(results[name], options.task, options.length)

        return work

    answers: dict[str, list[str]] = {}
    timings = time_interleaved({name: work_of(name) for name in commands}, options.rounds)
    expected = json.loads(plain.read_text(encoding="utf-8"))
    rows: list[Row] = []
    for name, timing in timings.items():
        equal = sum(a == b for a, b in zip(answers.get(name, expected), expected, strict=True))
        rows.append(
            {
                "contender": name,
                "seconds": timing.wall_seconds,
                "CPU seconds": timing.cpu_seconds,
                "CPU s an example": timing.cpu_seconds / options.samples,
                "times as fast, CPU": timings[PLAIN].cpu_seconds / timing.cpu_seconds,
                "equal answers": f"{equal} of {len(expected)}",
            }
        )
    return rows


def predictions(results: Path, task: str, length: int) -> list[str]:
    """Answers of a finished cell, in the order of its examples."""
    lines = (results / "ruler" / task / f"{length}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def main() -> None:
    """Measure, or be the plain contender."""
    parser = ToolParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights; default: %(default)s")
    parser.add_argument(
        "--task", choices=sorted(TASKS), default="niah_single_1", help="default: %(default)s"
    )
    parser.add_argument("--length", type=whole_number, default=1024, help="window; default: %(default)s")
    parser.add_argument("--samples", type=whole_number, default=4, help="examples; default: %(default)s")
    parser.add_argument("--batch-size", type=whole_number, default=4, help="default: %(default)s")
    parser.add_argument("--plain", nargs=2, metavar=("PROMPTS", "ANSWERS"), help=argparse.SUPPRESS)
    add_common_arguments(parser)
    options = parser.parse_args()
    if options.plain is not None:
        answer_plainly(options.model, options.dtype, *options.plain)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    publish(
        "evaluation",
        rows,
        title=f"RULER {options.task}, {options.length:,} tokens, {options.samples} examples in "
        f"{options.dtype}",
        notes=["Whole processes, one thread; medians."],
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
