"""`make demo-text`: the whole chain on real text, on two processes of one machine, in minutes.

The model has 0.6 million parameters and sees about a million tokens; the paper's smallest model has
eight hundred times as many parameters. The shape of the experiment is the paper's: one base model,
one packed corpus, two arms that differ in the weights of their tokens alone, tau a quarter of the row.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from examples.local_text import CorpusSummary, collect_corpus, find_sources
from examples.miniature.pipeline import (
    DATA_CODE,
    TRAINING_CODE,
    Pipeline,
    StageSettings,
    Step,
    output_of,
    say,
    time_since,
    unless_set,
    words_of,
)
from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.files import atomic_file, write_json, write_text
from megatron_exact.json_input import parse_corpus_line, read_json_object
from megatron_exact.report.results import read_run
from megatron_exact.report.training_pair import PairedReport, write_paired_report

CODE = ("examples/demo_text.py", "examples/local_text.py", *DATA_CODE)
PROCESSES = 2
SEED = 20260
"""Of the packs, the initial weights and the order of rows."""
VALIDATION_FRACTION = 0.05
"""Share of the documents that is held out."""
QUERY_GROUPS = 2
INITIAL_STD = 0.08
"""Of the weights; wider than Megatron's 0.02, with which so narrow a model learns far more slowly."""
ARMS = {"standard": "none", "exact": "exact"}
"""Name of each arm and its token weighting."""
EXPOSURE_FIGURE = "exposure.png"
CHECKPOINT_TRACKER = "latest_checkpointed_iteration.txt"
SAVES_A_STAGE = 4


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the whole demo."""

    takes: str
    """For people: how long all steps take on two quiet cores."""
    vocabulary: int
    """Pieces of the SentencePiece model; divisible by the tensor parallel size."""
    tokenizer_sample_bytes: int
    """Text that the tokenizer is trained on."""
    layers: int
    """Transformer layers."""
    hidden: int
    """Width of the model."""
    feed_forward: int
    """Width inside the gated MLP."""
    heads: int
    """Query heads."""
    short: StageSettings
    """Stage 1, from scratch, on short rows."""
    long: StageSettings
    """Stage 2, continued pretraining on long rows, run once an arm."""


TRAINING = f"""
torchrun --standalone --nproc-per-node {PROCESSES} --max-restarts 0 --shutdown-timeout 5
    -m megatron_exact.training.pretrain --pack {{pack}} --token-weighting {{rule}}
    --tensor-model-parallel-size {PROCESSES} --pipeline-model-parallel-size 1
    --num-layers {{layers}} --hidden-size {{hidden}}
    --ffn-hidden-size {{feed_forward}} --num-attention-heads {{heads}}
    --group-query-attention --num-query-groups {QUERY_GROUPS} --init-method-std {INITIAL_STD}
    --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --max-position-embeddings {{positions}}
    {{schedule}} --eval-iters {{evaluations}} --weight-decay 0.1 --seed {SEED}
    --save {{save}} --save-interval {{saves}} --load {{save}} {{start}}
"""


FULL = DemoSettings(
    takes="About six minutes",
    vocabulary=2048,
    tokenizer_sample_bytes=3_000_000,
    layers=4,
    hidden=96,
    feed_forward=256,
    heads=4,
    short=StageSettings(
        row_tokens=256,
        rows_per_iteration=16,
        rows_per_micro_batch=16,
        iterations=150,
        warmup_iterations=15,
        learning_rate=8e-3,
        evaluation_batches=8,
    ),
    long=StageSettings(
        row_tokens=1024,
        rows_per_iteration=4,
        rows_per_micro_batch=2,
        iterations=80,
        warmup_iterations=10,
        learning_rate=2e-3,
        evaluation_batches=16,
        evaluations=4,
    ),
)
QUICK = DemoSettings(
    takes="About two minutes",
    vocabulary=512,
    tokenizer_sample_bytes=300_000,
    layers=2,
    hidden=64,
    feed_forward=192,
    heads=2,
    short=StageSettings(
        row_tokens=128,
        rows_per_iteration=16,
        rows_per_micro_batch=8,
        iterations=12,
        warmup_iterations=2,
        learning_rate=3e-3,
        evaluation_batches=2,
    ),
    long=StageSettings(
        row_tokens=256,
        rows_per_iteration=8,
        rows_per_micro_batch=4,
        iterations=8,
        warmup_iterations=1,
        learning_rate=1e-3,
        evaluation_batches=2,
        evaluations=2,
    ),
)


def train_tokenizer(corpus: Path, output: Path, *, vocabulary: int, sample_bytes: int) -> None:
    """Train a byte-pair model on lines spread evenly over the corpus and write it to `output`.

    Whitespace is kept as it is (indentation has meaning in the default corpus), bytes that no piece covers
    are spelled out, and one thread trains on a fixed sample, so that equal text gives an equal model.

    Args:
        corpus: JSON lines with `text`.
        output: the `.model` file.
        vocabulary: number of pieces, of which 259 are unknown, begin, end and the bytes.
        sample_bytes: about how much text to train on.

    Raises:
        ValueError: text too uniform for that many pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample_lines(corpus, sample_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=0.999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4_000,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot make {vocabulary:,} pieces of this text ({error}): name more text"
        ) from error
    with atomic_file(output) as temporary:
        temporary.write_bytes(model.getvalue())


def sample_lines(corpus: Path, sample_bytes: int) -> Iterator[str]:
    """Yield every k-th line of the corpus' texts, k chosen such that about `sample_bytes` come out."""
    stride = max(1, round(corpus.stat().st_size / sample_bytes))
    number = 0
    with open(corpus, encoding="utf-8") as stream:
        for document in stream:
            for line in parse_corpus_line(document, "text")["text"].split("\n"):
                number += 1
                if number % stride == 0 and line and "\0" not in line:
                    yield line


def training_command(
    settings: DemoSettings,
    stage: StageSettings,
    *,
    pack: Path,
    validation_rows: int,
    rule: str,
    save: Path,
    base: Path | None,
) -> tuple[str, ...]:
    """Return the command that starts a run, or resumes it once it has a checkpoint of its own.

    Args:
        settings: of the demo.
        stage: of the run.
        pack: packed dataset.
        validation_rows: rows of its validation split.
        rule: token weighting.
        save: folder of the run.
        base: folder of the run whose weights it starts from, with a fresh optimizer; None for scratch.
    """
    values = {
        **vars(settings),
        "pack": pack,
        "rule": rule,
        "positions": settings.long.row_tokens,
        "schedule": stage.schedule_flags(),
        "evaluations": min(stage.evaluation_batches, validation_rows // stage.rows_per_iteration),
        "save": save,
        "saves": max(1, stage.iterations // SAVES_A_STAGE),
        "start": [] if base is None else ["--pretrained-checkpoint", base],
    }
    return words_of(TRAINING, values)


def remove_half_saved_run(run_dir: Path) -> bool:
    """Remove a run that was interrupted before its first checkpoint was whole; return whether it was.

    The training refuses a folder whose only checkpoint is damaged, for good reasons; here nothing can be
    lost yet, so the run simply starts again. Megatron writes the tracker after the rest of a checkpoint.
    """
    if not run_dir.exists() or (run_dir / CHECKPOINT_TRACKER).exists():
        return False
    shutil.rmtree(run_dir)
    return True


def read_summary(corpus: Step) -> CorpusSummary:
    """Read what the corpus step wrote about itself."""
    return CorpusSummary(**read_json_object(corpus.folder / "summary.json", "remove the demo's folder"))


def require_enough_rows(manifest: Manifest, stage: StageSettings) -> None:
    """Raise ValueError unless both splits fill one global batch."""
    for split in ("train", "validation"):
        rows = manifest.splits[split].rows
        if rows < stage.rows_per_iteration:
            raise ValueError(
                f"the {split} split has {rows} rows of {stage.row_tokens:,} tokens, fewer than one batch "
                f"of {stage.rows_per_iteration}: name more text, in more documents (DEMO_TEXT)"
            )


def require_held_out(short: Path, long: Path) -> None:
    """Both stages must hold out the same documents, and train on none of them.

    Raises:
        ValueError: they do not; nothing that is measured later would mean anything.
    """
    held_out = {}
    for pack in (short, long):
        held_out[pack] = documents_of(pack, "validation")
        if held_out[pack] & documents_of(pack, "train"):
            raise ValueError(f"{pack} trains on documents that it holds out: this is a fault of packing")
    for pack, other in ((short, long), (long, short)):
        if documents_of(pack, "train") & held_out[other]:
            raise ValueError(f"{pack} trains on documents that {other} holds out: give both one seed")
    say(f"Held out, and trained on in no stage: {len(held_out[long])} documents.")


def documents_of(pack: Path, split: str) -> set[int]:
    """Return the numbers of the documents in a split of a pack with one source."""
    return set(np.unique(np.load(pack / split / "segment_document.npy", allow_pickle=False)).tolist())


def run_demo(output: Path, *, text: Path | None, settings: DemoSettings) -> Path:
    """Run all steps that are not done yet, write the report and return its path.

    Args:
        output: folder of the report; `work/` in it contains the steps.
        text: a file or a folder of text files; None takes the standard library's sources.
        settings: sizes.

    Raises:
        ValueError: text is missing or too little, or a step failed.
    """
    clock, output = time.monotonic(), output.expanduser().resolve()
    say(f"{settings.takes} on two quiet cores; {output / 'report.md'} at the end")
    threads = max(1, min(4, len(os.sched_getaffinity(0)) // PROCESSES))
    environment = unless_set(OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME="lo")
    pipeline = Pipeline(folder=output / "work", environment=environment)
    with pipeline.held():
        for path in (output / "report.md", *output.glob("*.png")):  # must not pass for those of this run
            path.unlink(missing_ok=True)
        corpus = corpus_step(pipeline, None if text is None else text.expanduser())
        content = paired_runs(pipeline, corpus, settings)
        say("\n== Report")
        shutil.copyfile(pipeline.folder / "exposure" / EXPOSURE_FIGURE, output / EXPOSURE_FIGURE)
        report = write_paired_report(output, content)
    say(f"\n{report.read_text(encoding='utf-8')}")
    say(f"The report is {report} ({time_since(clock)}); its figures lie beside it.")
    return report


def corpus_step(pipeline: Pipeline, text: Path | None) -> Step:
    """Collect the text into one JSON lines file."""
    say("\n== 1/7  Corpus: real text of this machine")
    sources = find_sources(text)

    def build(folder: Path) -> None:
        write_json(folder / "summary.json", asdict(collect_corpus(sources, folder / "corpus.jsonl")))

    step = pipeline.step("corpus", build, depends_on=sources.identity(), code=CODE)
    say(str(read_summary(step)))
    return step


def paired_runs(pipeline: Pipeline, corpus: Step, settings: DemoSettings) -> PairedReport:
    """Run everything from the text to both arms, and return what the report is made from."""
    sizes = {"vocabulary": settings.vocabulary, "sample_bytes": settings.tokenizer_sample_bytes}
    text = corpus.folder / "corpus.jsonl"
    tokenizer = pipeline.step(
        "tokenizer",
        lambda here: train_tokenizer(text, here / "tokenizer.model", **sizes),
        depends_on={"corpus": corpus.key, **sizes},
        code=CODE,
        heading=f"2/7  Tokenizer: SentencePiece, {settings.vocabulary:,} pieces",
    )
    tokens = pipeline.step(
        "tokens",
        "python tools/tokenize_corpus.py --input {corpus}/corpus.jsonl "
        "--tokenizer {tokenizer}/tokenizer.model --output-prefix {here}/corpus --workers 2",
        code=DATA_CODE,
        heading="3/7  Tokenise: tools/tokenize_corpus.py",
        log=None,
        values={"corpus": corpus, "tokenizer": tokenizer},
    )
    packs = {}
    for name, stage in (("pack_short", settings.short), ("pack_long", settings.long)):
        packs[name] = pipeline.step(
            name,
            "python tools/pack_corpus.py --source {tokens}/corpus --row-tokens {row_tokens} "
            f"--policy concat --seed {SEED} --validation-fraction {VALIDATION_FRACTION} "
            "--output {here}/pack",
            code=DATA_CODE,
            heading=f"4/7  Pack rows of {stage.row_tokens:,} tokens: tools/pack_corpus.py",
            log=None,
            values={"tokens": tokens, "row_tokens": stage.row_tokens},
        )
        require_enough_rows(read_manifest(packs[name].folder / "pack"), stage)
    short, long = packs.values()
    require_held_out(short.folder / "pack", long.folder / "pack")
    exposure = exposure_step(pipeline, long)
    base = training_step(pipeline, "base", "none", settings, pack=short, base=None)
    arms = {
        arm: training_step(pipeline, arm, rule, settings, pack=long, base=base)
        for arm, rule in ARMS.items()
    }
    train = read_manifest(long.folder / "pack").splits["train"]
    seen = settings.long.iterations * settings.long.rows_per_iteration
    steps = pipeline.finished
    return PairedReport(
        title="Standard continued pretraining against EXACT, one pair of runs",
        introduction=(
            f"A Llama-style model of {settings.layers} layers and width {settings.hidden} was trained "
            f"from scratch on rows of {settings.short.row_tokens:,} tokens, then continued on rows of "
            f"{settings.long.row_tokens:,} tokens twice from that one checkpoint: once with all token "
            "weights 1 (standard), once with EXACT weights. Everything else is the same. Two processes "
            "of one machine, tensor parallel, NVIDIA's `megatron.training.pretrain`."
        ),
        base=read_run(base.folder / "run"),
        baseline=read_run(arms["standard"].folder / "run"),
        treatment=read_run(arms["exact"].folder / "run"),
        exposure=read_json_object(exposure.folder / "exposure.json", "remove the demo's folder"),
        exposure_figure=EXPOSURE_FIGURE,
        facts=[
            ("text", str(read_summary(corpus))),
            ("tokens", f"{train.tokens:,} for training, in {train.rows:,} rows"),
            ("rows trained on", f"{seen:,} an arm, {seen / train.rows:.2f} epochs"),
        ],
        seconds=[(s.name, f"{s.seconds:.1f}" + (" (earlier run)" if s.reused else "")) for s in steps],
        commands=[line for step in steps for line in step.commands],
    )


def exposure_step(pipeline: Pipeline, pack: Step) -> Step:
    """The exposure table of the long rows before and after weighting."""

    def write_table(here: Path) -> None:
        inspect = words_of("python tools/inspect_pack.py {pack}/pack --json", {"pack": pack})
        write_text(here / "exposure.json", output_of(inspect))

    return pipeline.step(
        "exposure",
        "python tools/inspect_pack.py {pack}/pack --plot {here}/exposure.png",
        write_table,
        code=(*DATA_CODE, "megatron_exact/report"),
        heading="5/7  Exposure: tools/inspect_pack.py",
        log=None,
        values={"pack": pack},
    )


def training_step(
    pipeline: Pipeline, name: str, rule: str, settings: DemoSettings, *, pack: Step, base: Step | None
) -> Step:
    """One training run on two processes; a run that was interrupted resumes from its last checkpoint."""
    stage, what = settings.long, "from the base checkpoint"
    if base is None:
        stage, what = settings.short, "from scratch"
    command = training_command(
        settings,
        stage,
        pack=pack.folder / "pack",
        validation_rows=read_manifest(pack.folder / "pack").splits["validation"].rows,
        rule=rule,
        save=pipeline.folder / name / "run",
        base=None if base is None else base.folder / "run",
    )

    def restart(folder: Path) -> None:
        if remove_half_saved_run(folder / "run"):
            say(f"{name}: it had no whole checkpoint yet, so it begins at its start")

    number = 6 if base is None else 7
    return pipeline.step(
        name,
        restart,
        command,
        depends_on=[pack.key, None if base is None else base.key],
        code=TRAINING_CODE,
        resumable=True,
        heading=f"{number}/7  Train {name}: rule {rule}, {stage.iterations} iterations {what}",
        log="run/log.txt",
        iterations=stage.iterations,
    )
