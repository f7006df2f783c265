"""A cell of RULER or NoLiMa on a CPU: this project's tool against plain lm-eval, on the same prompts.

    python -m examples.real_model.make        # a trained model of 135 million parameters, .cache/real-model
    python benchmarks/evaluation.py --model .cache/real-model --dtype float32
    python benchmarks/evaluation.py --model .cache/real-model --suite nolima --task needle_set
    python benchmarks/evaluation.py --model .cache/real-model --parts
    python benchmarks/evaluation.py --model .cache/real-model --suite nolima --task needle_set --reading

Plain lm-eval is its `HFLM` as it comes, which gets the prompts that the tool writes with `--prompts-only`,
one prompt at a time, in the same dtype, with the same limit of generated tokens. Every contender is a whole
process: start-up, loading and, for the tool, hashing the model and drawing the examples are included.

Where a prompt of 1,024 tokens takes its time: reading it is one large product a layer; then each of up to
128 generated tokens reads all weights once (`--parts` measures both in one process). In bfloat16 on a CPU
without instructions for it, torch's own products make reading many times as slow as in float32; there the
tool multiplies in float32 (`low_precision.py`). Prompts in a batch share the weights that generating reads
(`--batch-size`). Prompts with a common beginning share its reading: `--reading` measures it for a cell,
`--unshared` adds the tool without it to the whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import REPOSITORY, Row, add_common_arguments, publish, time_interleaved, whole_number

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.evaluation.suites.suite import GeneratedSuite, find_suite

TOOL = str(REPOSITORY / "tools" / "evaluate_model.py")
PLAIN = "plain lm-eval, one prompt at a time"
NEEDLES = REPOSITORY / "examples" / "needles"
BOOK = NEEDLES / "haystack" / "rand_shuffle" / "rand_book_1.txt"
MORE_TOKENS = 2048
"""Room of plain lm-eval beyond the length, so that it cuts nothing."""
PART_TOKENS = 8
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
                    "max_gen_toks": generation_tokens(row["suite"], row["task"]),
                },
            ),
            idx=number,
        )
        for number, row in enumerate(rows)
    ]
    loaded = HFLM(
        pretrained=model,
        dtype=dtype,
        batch_size=1,
        device="cpu",
        max_length=rows[0]["length"] + MORE_TOKENS,
    )
    Path(answers).write_text(json.dumps(loaded.generate_until(requests)), encoding="utf-8")


def generation_tokens(suite: str, task: str) -> int:
    """Most tokens of an answer."""
    found = find_suite(suite)
    assert isinstance(found, GeneratedSuite)
    return found.generation_tokens(task)


def parts(options: argparse.Namespace, prompts: Path) -> list[Row]:
    """Reading one prompt and generating one token, with torch's own products and as the tool does it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_exact.low_precision import widen_products

    row = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])
    ids = AutoTokenizer.from_pretrained(options.model)(row["prompt"], return_tensors="pt")["input_ids"]
    rows: list[Row] = []
    for dtype, is_ours in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        changed = widen_products(model) if is_ours else 0
        with torch.inference_mode():
            model(input_ids=ids[:, :8])
            began = time.process_time()
            found = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            reading = time.process_time() - began
            began = time.process_time()
            for _ in range(PART_TOKENS):
                token = found.logits[:, -1:].argmax(-1)
                found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
            token_seconds = (time.process_time() - began) / PART_TOKENS
        answer = generation_tokens(options.suite, options.task)
        rows.append(
            {
                "products": f"{dtype}, {'widened (the tool)' if is_ours else 'as torch has them'}",
                "layers widened": changed,
                "reading the prompt, CPU s": reading,
                "one generated token, CPU s": token_seconds,
                f"an answer of {answer} tokens, CPU s": answer * token_seconds,
                "together, CPU s": reading + answer * token_seconds,
            }
        )
    return rows


def reading(options: argparse.Namespace, prompts: Path) -> list[Row]:
    """Reading the prompts of a cell, each from its start and with common beginnings once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_exact.evaluation.shared_prefixes import PrefixCache, PrefixPlan, read
    from megatron_exact.low_precision import widen_products

    encode = AutoTokenizer.from_pretrained(options.model).encode
    lines = prompts.read_text(encoding="utf-8").splitlines()
    texts = [tuple(encode(json.loads(line)["prompt"])) for line in lines]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    widen_products(model)
    plan, prefixes = PrefixPlan(texts), PrefixCache(model)
    order = plan.order(texts)

    def alone() -> list[torch.Tensor]:
        return [read(model, [texts[place]], None, len(texts[place]))[0] for place in order]

    def shared() -> list[torch.Tensor]:
        found = []
        for place in order:
            cuts = plan.cuts(texts[place])
            rest = texts[place][max(cuts, default=0) :]
            found.append(read(model, [rest], prefixes.of(texts[place], cuts), len(rest))[0])
        prefixes.forget()
        return found

    last: dict[str, list[torch.Tensor]] = {}
    work = {"each from its start": alone, "common beginnings once": shared}
    with torch.inference_mode():
        timings = time_interleaved(work, options.rounds, inspect=last.__setitem__)
    first = last["each from its start"]
    rows: list[Row] = []
    for name, tokens in zip(work, (sum(map(len, texts)), plan.tokens_read(texts)), strict=True):
        rows.append(
            {
                "reading": name,
                "tokens": tokens,
                "CPU seconds": timings[name].cpu_seconds,
                "times as fast, CPU": timings["each from its start"].cpu_seconds
                / timings[name].cpu_seconds,
                "largest difference of a last logit": max(
                    float((one - other).abs().max()) for one, other in zip(first, last[name], strict=True)
                ),
                "greedy tokens alike": sum(
                    bool(one.argmax() == other.argmax())
                    for one, other in zip(first, last[name], strict=True)
                ),
            }
        )
    return rows


def run(command: list[str]) -> None:
    """Run a contender. Raises ValueError with the end of what it wrote, if it fails."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise ValueError(f"{Path(command[1]).name} failed: {(done.stdout + done.stderr)[-2000:]}")


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """One row a contender, plain lm-eval first."""
    prompts = folder / "prompts.jsonl"
    chosen = write_prompts(options, prompts)
    script, plain = str(Path(__file__).resolve()), folder / "plain.json"
    commands = {
        PLAIN: [
            *(sys.executable, script, "--model", options.model, "--dtype", options.dtype),
            *("--plain", str(prompts), str(plain)),
        ]
    }
    results: dict[str, Path] = {}
    contenders = [(batch, []) for batch in sorted({1, options.batch_size})]
    if options.unshared:
        contenders.insert(0, (1, ["--no-shared-prefixes"]))
    for batch, more in contenders:
        name = " ".join(["megatron_exact: tools/evaluate_model.py, --batch-size", str(batch), *more])
        results[name] = folder / f"results-{len(results)}"
        commands[name] = [
            *(sys.executable, TOOL, "--model", options.model, *chosen, "--dtype", options.dtype),
            *("--device", "cpu", "--batch-size", str(batch), "--output", str(results[name])),
            *("--example-cache", str(folder / "examples"), *more),
        ]

    def work_of(name: str) -> Callable[[], None]:
        def work() -> None:
            for path in results.values():  # a finished cell would be skipped
                shutil.rmtree(path, ignore_errors=True)
            run(commands[name])
            if name in results:
                answers[name] = predictions(
                    results[name] / options.suite / options.task / f"{options.length}.jsonl"
                )

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


def predictions(cell: Path) -> list[str]:
    """Answers of a finished cell, in the order of its examples."""
    return [json.loads(line)["prediction"] for line in cell.read_text(encoding="utf-8").splitlines()]


def write_prompts(options: argparse.Namespace, prompts: Path) -> list[str]:
    """Write the prompts, and return the options of the tool that choose them."""
    chosen = ["--suite", options.suite, "--tasks", options.task, "--lengths", str(options.length)]
    chosen += ["--samples", str(options.samples)]
    if options.suite == "nolima":
        chosen += ["--nolima-data", str(NEEDLES), "--placements", str(options.placements)]
    else:
        chosen += ["--essays", str(BOOK)]
    run([sys.executable, TOOL, "--model", options.model, *chosen, "--prompts-only", str(prompts)])
    return chosen


def main() -> None:
    """Measure, or be the plain contender."""
    parser = ToolParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights; default: %(default)s")
    parser.add_argument(
        "--suite", choices=("ruler", "nolima"), default="ruler", help="default: %(default)s"
    )
    parser.add_argument("--task", default="niah_single_1", help="default: %(default)s")
    parser.add_argument(
        "--placements", type=whole_number, default=26, help="NoLiMa: depths; default: %(default)s"
    )
    parser.add_argument("--length", type=whole_number, default=1024, help="window; default: %(default)s")
    parser.add_argument("--samples", type=whole_number, default=4, help="examples; default: %(default)s")
    parser.add_argument("--batch-size", type=whole_number, default=4, help="default: %(default)s")
    parser.add_argument("--unshared", action="store_true", help="also the tool with --no-shared-prefixes")
    parser.add_argument("--parts", action="store_true", help="reading and generating, in one process")
    parser.add_argument(
        "--reading", action="store_true", help="reading the prompts of a cell alone, in one process"
    )
    parser.add_argument("--plain", nargs=2, metavar=("PROMPTS", "ANSWERS"), help=argparse.SUPPRESS)
    add_common_arguments(parser)
    options = parser.parse_args()
    if options.plain is not None:
        answer_plainly(options.model, options.dtype, *options.plain)
        return
    cell = f"{find_suite(options.suite).title} {options.task}, {options.length:,} tokens"
    with tempfile.TemporaryDirectory() as folder:
        if options.parts:
            prompts = Path(folder) / "prompts.jsonl"
            write_prompts(options, prompts)
            rows, title = parts(options, prompts), f"{cell}: where one prompt takes its time"
            notes = ["One process, one thread, one prompt."]
        elif options.reading:
            prompts = Path(folder) / "prompts.jsonl"
            write_prompts(options, prompts)
            rows = reading(options, prompts)
            title = f"{cell}: reading {options.samples} prompts in {options.dtype}"
            notes = ["One process, one thread; medians. Answers are not generated."]
        else:
            rows = measure(options, Path(folder))
            title = f"{cell}, {options.samples} examples in {options.dtype}"
            notes = ["Whole processes, one thread; medians."]
    publish(
        "evaluation",
        rows,
        title=title,
        notes=notes,
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
