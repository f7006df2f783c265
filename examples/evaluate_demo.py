"""`make evaluate-demo`: from random weights over tuning and all suites to the report, in five minutes.

Nothing is downloaded: the text is Python's own, tokenizer and model are made here, the records and the QA
data sets are invented (where people live and what they carry). The model is too small to know anything, so
that every step takes seconds; the windows are the shortest into which every RULER task fits with its
tokenizer.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from examples.local_text import Sources, collect_corpus, find_sources
from examples.miniature.pipeline import (
    CONVERSION_CODE,
    DATA_CODE,
    EVALUATION_CODE,
    ROOT,
    TRAINING_CODE,
    Pipeline,
    Step,
    say,
    time_since,
    unless_set,
)
from megatron_exact.evaluation.suites.qa import mmlu_subjects
from megatron_exact.files import write_text
from megatron_exact.json_input import parse_corpus_line

NEEDLES = ROOT / "examples" / "needles"
BOOK = NEEDLES / "haystack" / "rand_shuffle" / "rand_book_1.txt"
INPUTS_CODE = ("examples/evaluate_demo.py", "examples/local_text.py")
REPORT_CODE = (*EVALUATION_CODE, "megatron_exact/report", "megatron_exact/exposure")
ARMS = {"standard": "none", "exact": "exact"}
"""Name of each arm and its token weighting."""
TRAINING_FLAGS = (
    *("--cpu", "--nproc-per-node", "1", "--global-batch-size", "2", "--micro-batch-size", "1"),
    *("--lr", "3e-3", "--clip-grad", "1.0", "--weight-decay", "0.1", "--eval-iters", "0"),
)

NAMES = ("Ilse", "Bruno", "Tamsin", "Oskar", "Perpetua", "Jolyon", "Wanda", "Casimir", "Odette", "Ludovic")
TOWNS = ("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Perth", "Tallinn", "Dakar")
THINGS = ("a lantern", "two letters", "a red umbrella", "an old map", "a basket of pears")
TRADES = ("baker", "sailor", "tailor", "miller", "teacher")
EVERY = 12  # file of the standard library: a few megabytes of text
BEGIN, END = "<|begin|>", "<|endoftext|>"  # the latter is what transformers gives to every Qwen2

NOTE = """\
# What this is

Two arms of a model of random weights, trained for a few steps, tuned, exported, evaluated on every suite
with a few examples, probed and compared, by the same tools and commands as a real experiment. It shows that
they work together. The model knows nothing: the scores mean nothing.

`report.html` and `report.md` are the report; `comparison/` is what they were made from.
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Sizes of the whole demo."""

    seed: int = 7
    """Of the model, the packs, the training and the examples."""
    vocabulary: int = 4096
    """Ids of the tokenizer."""
    hidden: int = 64
    """Width of the model, two layers."""
    row_tokens: int = 2048
    """Of continued pretraining."""
    iterations: int = 12
    """Of continued pretraining, each arm."""
    records: int = 240
    """Question-answer records."""
    qa_row_tokens: int = 512
    """Of QA-SFT."""
    qa_iterations: int = 24
    """Of QA-SFT; 600 in the paper."""
    trained_lengths: tuple[int, ...] = (2048,)
    """Windows of RULER and NoLiMa up to the rows of training."""
    extrapolated_lengths: tuple[int, ...] = (2560,)
    """Windows beyond."""
    samples: int = 4
    """Examples of a cell of RULER and NoLiMa."""
    qa_samples: int = 4
    """Examples of a QA task; of MMLU, one of each subject."""
    probe_distances: tuple[int, ...] = (64, 256, 1024)
    """Of the evidence probe."""
    probe_contexts: tuple[int, ...] = (512, 1536)
    """Of its field."""
    probe_items: int = 24
    """Of a cell of the probe."""


FULL = EvaluateSettings()
QUICK = EvaluateSettings(
    vocabulary=3072,
    iterations=4,
    records=60,
    qa_iterations=4,
    samples=2,
    qa_samples=2,
    probe_distances=(64, 256),
    probe_contexts=(512,),
    probe_items=2,
)


def run_evaluate_demo(output: Path, settings: EvaluateSettings) -> Path:
    """Run all steps that are not done yet in `output/work`, and return the report in `output`.

    Raises:
        ValueError: a step failed.
    """
    clock, output = time.monotonic(), output.expanduser().resolve()
    say(f"Four to five minutes on two quiet cores; {output / 'report.md'} at the end")
    work = output / "work"
    environment = {
        "HF_HOME": str(work / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **unless_set(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"),
    }
    pipeline = Pipeline(folder=work, environment=environment)
    with pipeline.held():
        for old in (*output.glob("report.*"), *output.glob("*.png")):
            old.unlink()
        made = run_steps(pipeline, settings)
        shutil.copytree(made["report"].folder / "report", output, dirs_exist_ok=True)
        shutil.copytree(made["comparison"].folder / "comparison", output / "comparison", dirs_exist_ok=True)
        table = ["", "| step | seconds |", "|---|---|"]
        table += [f"| {step.name} | {step.seconds:.0f} |" for step in pipeline.finished]
        commands = [line for step in pipeline.finished for line in step.commands]
        write_text(output / "README.md", NOTE + "\n".join([*table, "", "```bash", *commands, "```", ""]))
    say(f"\nThe report is {output / 'report.md'} ({time_since(clock)}); README.md says what it is.")
    return output / "report.md"


def evaluations(arm: str) -> list[str]:
    """Return the commands that run all suites and the probe on the model of an arm."""
    common = f"--model {{models}}/{arm} --output {{here}}/results --seed {{seed}} --device cpu"
    evaluate = f"{common} --template model --example-cache {{examples}}"
    generated = f"{evaluate} --lengths {{lengths}} --samples {{samples}}"
    return [
        f"python tools/evaluate_model.py --suite ruler {generated} --essays {{book}}",
        f"python tools/evaluate_model.py --suite nolima {generated} --nolima-data {{needles}} "
        "--nolima-protocol window",
        f"python tools/evaluate_model.py --suite qa {evaluate} --qa-data {{inputs}}/qa_data",
        f"python tools/probe_evidence.py {common} --distances {{probe_distances}} "
        "--contexts {probe_contexts} --items-per-cell {probe_items}",
    ]


STARTS = " ".join(f"--arm {arm}={{pretraining}}/runs/{rule}/{{window}}" for arm, rule in ARMS.items())
STEPS: dict[str, tuple[Any, ...]] = {
    "base": (CONVERSION_CODE, "python tools/import_hf.py --hf {inputs}/model --output {here}/checkpoint"),
    "tokens": (
        DATA_CODE,
        "python tools/tokenize_corpus.py --input {inputs}/corpus.jsonl --tokenizer {inputs}/model "
        "--output-prefix {here}/library --workers 2 --licence PSF-2.0",
    ),
    "pack": (
        DATA_CODE,
        "python tools/pack_corpus.py --source {tokens}/library --row-tokens {row_tokens} "
        "--policy concat --validation-fraction 0 --seed {seed} --output {here}/rows",
    ),
    "pretraining": (
        TRAINING_CODE,
        "python tools/run_stages.py --pack {pack}/rows --start {base}/checkpoint --output {here}/runs "
        "--arms {rules} {training} --seed {seed} --train-iters {iterations} "
        "--lr-decay-style constant --save-interval {iterations}",
    ),
    "records": (
        DATA_CODE,
        "python tools/pack_qa.py --input {inputs}/invented-qa.jsonl --licence CC0-1.0 "
        "--tokenizer {inputs}/model --row-tokens {qa_row_tokens} --seed {seed} --output {here}/rows",
    ),
    "fine_tuning": (
        TRAINING_CODE,
        f"python tools/fine_tune_qa.py --pack {{records}}/rows {STARTS} --output {{here}}/runs "
        "{training} --seed {seed} --train-iters {qa_iterations} --save-interval {qa_iterations}",
    ),
    "models": (
        CONVERSION_CODE,
        *(
            f"python tools/export_hf.py --checkpoint {{fine_tuning}}/runs/{arm} --output {{here}}/{arm}"
            for arm in ARMS
        ),
    ),
    **{f"results_{arm}": (EVALUATION_CODE, *evaluations(arm)) for arm in ARMS},
    "comparison": (
        REPORT_CODE,
        "python tools/compare_runs.py --baseline {results_standard}/results "
        "--treatment {results_exact}/results --trained-lengths {trained_lengths} "
        "--extrapolated-lengths {extrapolated_lengths} --output {here}/comparison",
    ),
    "report": (
        REPORT_CODE,
        "python tools/write_report.py --comparison demo={comparison}/comparison --pack {pack}/rows "
        "--output {here}/report",
    ),
}
"""Name of each step, the code that it runs and its commands; names in braces are earlier steps or sizes."""
TRAININGS = ("pretraining", "fine_tuning")
RESUMABLE = (*TRAININGS, *(f"results_{arm}" for arm in ARMS))


def run_steps(pipeline: Pipeline, settings: EvaluateSettings) -> dict[str, Step]:
    """Make the inputs and all other steps, and return them by name."""
    rows, rest = divmod(settings.row_tokens, 1024)
    values: dict[str, object] = {
        name: ",".join(map(str, size)) if isinstance(size, tuple) else size
        for name, size in vars(settings).items()
    }
    values |= {
        "lengths": ",".join(map(str, settings.trained_lengths + settings.extrapolated_lengths)),
        "window": str(settings.row_tokens) if rest else f"{rows}k",  # where run_stages.py puts a run
        "training": TRAINING_FLAGS,
        "rules": list(ARMS.values()),
        "examples": pipeline.folder / "examples",
        "needles": NEEDLES,
        "book": BOOK,
    }
    made = {"inputs": inputs_step(pipeline, settings)}
    for name, (code, *commands) in STEPS.items():
        made[name] = pipeline.step(
            name,
            *commands,
            code=code,
            resumable=name in RESUMABLE,
            heading=name,
            shown_lines=0 if name in TRAININGS else 3,  # their last lines are Megatron's timers
            values={**values, **made},
        )
    return made


def inputs_step(pipeline: Pipeline, settings: EvaluateSettings) -> Step:
    """Text, model and tokenizer, records, QA data sets."""
    sources = demo_sources()
    seed, records = settings.seed, settings.records
    return pipeline.step(
        "inputs",
        lambda here: collect_corpus(sources, here / "corpus.jsonl"),
        lambda here: write_model(here / "model", here / "corpus.jsonl", settings),
        lambda here: write_rows(here / "invented-qa.jsonl", qa_records(records, seed)),
        lambda here: write_qa_data(here / "qa_data", settings.qa_samples, seed),
        depends_on={"sources": sources.identity(), "settings": asdict(settings)},
        code=INPUTS_CODE,
        heading="inputs: text of this machine, a model of random weights, invented records and data sets",
    )


def demo_sources() -> Sources:
    """Return a part of the standard library's text, spread over all of it."""
    sources = find_sources(None)
    return replace(sources, files=sources.files[::EVERY])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, corpus: Path, settings: EvaluateSettings) -> None:
    """Write a Qwen2 model of random weights and a byte-level tokenizer as a Hugging Face folder.

    Args:
        folder: to fill.
        corpus: JSON lines with `text`; the tokenizer also sees the haystack of NoLiMa, so that its words
            are short in tokens too.
        settings: sizes.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = corpus.read_text(encoding="utf-8").splitlines()
    texts = [parse_corpus_line(line, "text")["text"] for line in lines[:: max(1, len(lines) // 200)]]
    tokenizer.train_from_iterator([*texts, BOOK.read_text(encoding="utf-8")], trainer)
    begin = [(BEGIN, 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=begin)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)
    config = Qwen2Config(
        vocab_size=len(whole),
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(settings.seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    whole.save_pretrained(folder)


def qa_records(count: int, seed: int) -> list[dict[str, str]]:
    """Return records like those of Dolly-15K: every other with a context that contains the answer."""
    draw = Random(seed)
    records = []
    for number in range(count):
        people, homes = draw.sample(NAMES, 3), draw.sample(TOWNS, 3)
        facts = [f"{name} lives in {town}." for name, town in zip(people, homes, strict=True)]
        instruction, context, response = f"Who lives in {homes[1]}?", " ".join(facts), people[1]
        if number % 2 == 1:
            instruction = f"What does a {draw.choice(TRADES)} called {people[0]} carry?"
            context, response = "", f"{people[0]} carries {draw.choice(THINGS)}."
        records.append({"instruction": instruction, "context": context, "response": response})
    return records


def write_qa_data(folder: Path, count: int, seed: int) -> None:
    """Write local copies of the six QA data sets in their own fields, invented (docs/evaluation.md).

    Args:
        folder: to fill.
        count: examples of a task.
        seed: of the examples.
    """
    draw = Random(seed)
    pairs = [draw.sample(TOWNS, 4) for _ in range(count)]
    arc = [
        {
            "id": str(number),
            "question": f"{NAMES[number % 10]} lives in {towns[0]}. Where does this person live?",
            "choices": {"text": towns, "label": list("ABCD")},
            "answerKey": "A",
        }
        for number, towns in enumerate(pairs)
    ]
    piqa = [
        {"goal": f"Travel to {a}.", "sol1": f"Take the train to {a}.", "sol2": f"Paint {b}.", "label": 0}
        for a, b, *_ in pairs
    ]
    hellaswag = [
        {
            "ind": number,
            "activity_label": "Travel",
            "ctx_a": f"A {TRADES[number % 5]} goes to {towns[0]}",
            "ctx_b": "and",
            "endings": [f"stays in {town}." for town in towns],
            "label": "0",
        }
        for number, towns in enumerate(pairs)
    ]
    larger = "{} is larger than {}, so _ has more streets."
    winogrande = [
        {"sentence": larger.format(a, b), "option1": a, "option2": b, "answer": "1"} for a, b, *_ in pairs
    ]
    sums = [
        {"question": f"What is {n} + {n + 1}?", "answer": f"It is {2 * n + 1}.\n#### {2 * n + 1}"}
        for n in range(count + 5)
    ]
    write_rows(folder / "arc_challenge" / "test.jsonl", arc)
    write_rows(folder / "piqa" / "validation.jsonl", piqa)
    write_rows(folder / "hellaswag" / "validation.jsonl", hellaswag)
    write_rows(folder / "winogrande" / "validation.jsonl", winogrande)
    write_rows(folder / "gsm8k" / "train.jsonl", sums[count:])
    write_rows(folder / "gsm8k" / "test.jsonl", sums[:count])
    for number, subject in enumerate(mmlu_subjects()):
        row = {"question": f"Which town is number {number}?", "choices": draw.sample(TOWNS, 4)}
        for split in ("dev", "test"):
            write_rows(folder / "mmlu" / subject / f"{split}.jsonl", [{**row, "answer": number % 4}])
