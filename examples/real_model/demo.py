"""`make demo-real`: a trained model through the chain, on real long documents, with one page at the end.

SmolLM2-135M-Instruct (`make real-model`) is continued on rows of 2K tokens in both arms, for a few steps:
on two cores a step takes most of a minute. So the page shows what the tools measure on a real model, and
not whether EXACT helps; it says so.

The documents are four of Debian's documentation packages, fetched by apt and unpacked without installing
them, or the user's own files.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from examples.local_text import CorpusSummary, collect_corpus, find_sources
from examples.miniature.pipeline import (
    CONVERSION_CODE,
    DATA_CODE,
    EVALUATION_CODE,
    TRAINING_CODE,
    Pipeline,
    Step,
    say,
    time_since,
    unless_set,
)
from examples.real_model.documents import LICENCES, PACKAGES, collect_packages
from examples.real_model.make import DEFAULT_OUTPUT, is_made
from examples.real_model.page import DemoResults, write_demo_page
from megatron_exact.files import write_json
from megatron_exact.json_input import read_json_object

ARMS = {"standard": "none", "exact": "exact"}
"""Name of each arm and its token weighting."""
PROMPTS = (
    "Debian packages are maintained by volunteers. A maintainer",
    "The capital of France is",
    "To install a package from the command line, you",
)
"""Beginnings that both models continue."""
GENERATED_TOKENS = 40
LARGE_ROW = "16K"
"""Rows of the second pack, which is only measured: the paper's figure 1 is of 16K rows."""
DOCUMENTS_CODE = ("examples/real_model/documents.py", "examples/local_text.py")
REPORT_CODE = (*EVALUATION_CODE, "megatron_exact/report", "megatron_exact/exposure")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo."""

    takes: str
    """Expected time on two quiet cores, in words."""
    iterations: int
    """Optimizer steps of each arm, of one row."""
    evaluation_rows: int
    """Validation rows that both arms are scored on."""
    probe_items: int
    """Items of a cell of the probe."""
    probe_distances: str
    """Distances of the evidence."""
    probe_contexts: str
    """Contexts of the evidence field."""
    needle_lengths: str
    """Windows of RULER's niah_single_1."""
    chain_lengths: str
    """Windows of its vt, whose worked example alone takes half of 1K."""
    ruler_samples: int
    """Examples of a cell."""
    learning_rate: str = "2e-5"
    """Constant: a warm-up would make the first step one of rate 0."""
    row_tokens: str = "2K"
    """Rows of training."""
    seed: int = 7
    """Of packs, training and examples."""


FULL = DemoSettings(
    takes="About 25 minutes",
    iterations=8,
    evaluation_rows=8,
    probe_items=24,
    probe_distances="64,512",
    probe_contexts="256,768",
    needle_lengths="512,1K",
    chain_lengths="1.25K",
    ruler_samples=6,
)
QUICK = DemoSettings(
    takes="About eight minutes",
    iterations=2,
    evaluation_rows=2,
    probe_items=6,
    probe_distances="64,256",
    probe_contexts="256,512",
    needle_lengths="512",
    chain_lengths="1.25K",
    ruler_samples=2,
)


def continue_texts(folder: Path, models: dict[str, Path]) -> None:
    """Write `texts.json`: how each model continues `PROMPTS`, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: dict[str, list[str]] = {}
    for name, path in models.items():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        ).eval()
        found[name] = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            with torch.inference_mode():
                tokens = model.generate(**ids, max_new_tokens=GENERATED_TOKENS, do_sample=False)
            new = tokens[0, ids.input_ids.shape[1] :]
            found[name].append(tokenizer.decode(new, skip_special_tokens=True))
        del model
    write_json(folder / "texts.json", {"prompts": list(PROMPTS), "continuations": found})


TRAINING = (
    "--cpu --nproc-per-node 1 --global-batch-size 1 --micro-batch-size 1 --lr {learning_rate} "
    "--lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95 "
    "--train-iters {iterations} --save-interval {iterations} --eval-interval {iterations} "
    "--eval-iters {evaluation_rows} --seed {seed}"
)
PACK = (
    "python tools/pack_corpus.py --source {tokens}/documents --policy concat --validation-fraction 0.05 "
    "--seed {seed} --row-tokens"
)
RULER = (
    "python tools/evaluate_model.py --model {models}/MODEL --suite ruler --output {here}/results "
    "--samples {ruler_samples} --template model --device cpu --seed {seed} --example-cache {here}/examples"
)
STEPS: dict[str, tuple[Any, ...]] = {
    "base": (CONVERSION_CODE, "python tools/import_hf.py --hf {hf} --output {here}/checkpoint"),
    "tokens": (
        DATA_CODE,
        "python tools/tokenize_corpus.py --input {documents}/corpus.jsonl --tokenizer {hf} "
        "--output-prefix {here}/documents --workers 2 --licence {licence}",
    ),
    "pack": (DATA_CODE, f"{PACK} {{row_tokens}} --output {{here}}/rows-2k"),
    "pack_16k": (DATA_CODE, f"{PACK} {LARGE_ROW} --output {{here}}/rows-16k"),
    "training": (
        TRAINING_CODE,
        "python tools/run_stages.py --pack {pack}/rows-2k --start {base}/checkpoint --output {here}/runs "
        f"--arms {{rules}} {TRAINING}",
    ),
    "models": (
        CONVERSION_CODE,
        *(
            f"python tools/export_hf.py --checkpoint {{training}}/runs/{rule}/2k --output {{here}}/{arm}"
            for arm, rule in ARMS.items()
        ),
    ),
    **{
        f"results_{arm}": (
            EVALUATION_CODE,
            f"python tools/probe_evidence.py --model {{models}}/{arm} --output {{here}}/results "
            "--seed {seed} --device cpu --distances {probe_distances} --contexts {probe_contexts} "
            "--items-per-cell {probe_items}",
            f"{RULER.replace('MODEL', arm)} --tasks niah_single_1 --lengths {{needle_lengths}}",
            f"{RULER.replace('MODEL', arm)} --tasks vt --lengths {{chain_lengths}}",
        )
        for arm in ARMS
    },
    "comparison": (
        REPORT_CODE,
        "python tools/compare_runs.py --baseline {results_standard}/results "
        "--treatment {results_exact}/results --trained-lengths {needle_lengths},{chain_lengths} "
        "--output {here}/comparison",
    ),
}
"""Name of each step, the code that it runs and its commands; names in braces are earlier steps or sizes."""
RESULTS = tuple(f"results_{arm}" for arm in ARMS)


def run_demo(output: Path, *, text: Path | None, settings: DemoSettings, hf: Path = DEFAULT_OUTPUT) -> Path:
    """Run all steps that are not done yet, write the page and return its path.

    Args:
        output: folder of the page; `work/` in it contains the steps.
        text: a file or a folder of text files; None fetches Debian's documents.
        settings: sizes.
        hf: the model's folder.

    Raises:
        ValueError: the model or the text is missing, or a step failed.
    """
    clock, output = time.monotonic(), output.expanduser().resolve()
    if not is_made(hf):
        raise ValueError(f"{hf} is not there: `make real-model` makes it, and `make demo-real` calls that")
    say(f"{settings.takes} on two quiet cores; {output / 'report.html'} at the end")
    threads = max(1, len(os.sched_getaffinity(0)))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **unless_set(OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME="lo"),
    }
    pipeline = Pipeline(folder=output / "work", environment=environment)
    with pipeline.held():
        for old in (*output.glob("report.*"), *output.glob("*.png")):  # must not pass for those of this run
            old.unlink()
        made = run_steps(pipeline, settings, text, hf)
        steps = pipeline.finished
        report, html = write_demo_page(
            output,
            DemoResults(
                corpus=str(read_summary(made["documents"])),
                packs=[made["pack"].folder / "rows-2k", made["pack_16k"].folder / "rows-16k"],
                runs={arm: made["training"].folder / "runs" / rule / "2k" for arm, rule in ARMS.items()},
                texts=made["texts"].folder / "texts.json",
                comparison=made["comparison"].folder / "comparison",
                seconds=[(step.name, step.seconds) for step in steps],
                commands=[line for step in steps for line in step.commands],
            ),
        )
    say(f"\nThe page is {html}, the same for a repository is {report} ({time_since(clock)}).")
    return html


def run_steps(pipeline: Pipeline, settings: DemoSettings, text: Path | None, hf: Path) -> dict[str, Step]:
    """Make the documents and all other steps, and return them by name."""
    values: dict[str, object] = {
        **vars(settings),
        "hf": hf,
        "rules": list(ARMS.values()),
        "licence": LICENCES if text is None else "unknown",
    }
    made = {"documents": documents_step(pipeline, text)}
    total = len(STEPS) + 2

    def make(name: str) -> Step:
        code, *commands = STEPS[name]
        return pipeline.step(
            name,
            *(command.replace(TRAINING, TRAINING.format_map(vars(settings))) for command in commands),
            code=code,
            resumable=name == "training" or name.startswith("results"),
            heading=f"{list(STEPS).index(name) + 2}/{total}  {name}",
            shown_lines=0 if name == "training" else 3,  # its last lines are Megatron's timers
            values={**values, **made},
        )

    for name in STEPS:
        if name == RESULTS[0]:  # both arms at a time, a core for each
            found = pipeline.side_by_side(len(RESULTS), [partial(make, arm) for arm in RESULTS])
            made |= dict(zip(RESULTS, found, strict=True))
        elif name not in RESULTS:
            made[name] = make(name)
    models = {"before": hf, **{arm: made["models"].folder / arm for arm in ARMS}}
    made["texts"] = pipeline.step(
        "texts",
        lambda here: continue_texts(here, models),
        depends_on={"models": made["models"].key, "prompts": PROMPTS},
        heading=f"{total}/{total}  texts: each model continues {len(PROMPTS)} beginnings",
    )
    return made


def read_summary(documents: Step) -> CorpusSummary:
    """Read what the documents step wrote about itself."""
    return CorpusSummary(**read_json_object(documents.folder / "summary.json", "run the demo again"))


def documents_step(pipeline: Pipeline, text: Path | None) -> Step:
    """Collect the user's text, or Debian's documents."""
    sources = None if text is None else find_sources(text.expanduser())

    def build(folder: Path) -> None:
        if sources is None:
            summary = collect_packages(folder)
        else:
            summary = collect_corpus(sources, folder / "corpus.jsonl")
        write_json(folder / "summary.json", asdict(summary))

    return pipeline.step(
        "documents",
        build,
        depends_on=list(PACKAGES) if sources is None else sources.identity(),
        code=DOCUMENTS_CODE,
        heading=f"1/{len(STEPS) + 2}  documents",
    )
