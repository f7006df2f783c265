"""The steps of the demo: each calls one tool, or one training run, in a folder of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

import megatron_exact
from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.demo.corpus import CorpusSummary, collect_corpus, find_sources
from megatron_exact.demo.processes import run_child
from megatron_exact.demo.settings import DemoSettings, StageSettings
from megatron_exact.demo.tokenizer import train_tokenizer
from megatron_exact.demo.training import remove_half_saved_run, train, training_command
from megatron_exact.demo.workspace import Step, Workspace, hash_of_code
from megatron_exact.files import write_json, write_text
from megatron_exact.json_input import read_json_object

PACKAGE = Path(megatron_exact.__file__).resolve().parent
TOOLS = PACKAGE.parent / "tools"
DATA_CODE = ("data", "exposure", "files.py")
TRAINING_CODE = (*DATA_CODE, "model", "training")
EXPOSURE_FIGURE = "exposure.png"


@dataclass(kw_only=True)
class Demo:
    """One run of the demo: its options, and what the steps so far have left."""

    output: Path
    """Receives the report; `work/` in it holds everything else."""
    text: Path | None
    """The user's text, None for the standard library's sources."""
    settings: DemoSettings
    """Sizes."""
    workspace: Workspace
    """Folder of the steps."""
    commands: list[str] = field(default_factory=list)
    """Every command that makes the results, for the report."""
    timings: list[tuple[str, str]] = field(default_factory=list)
    """Step and its wall time."""

    def add(self, step: Step) -> Step:
        """Note a finished step for the report."""
        self.timings.append((step.name, f"{step.seconds:.1f}" + (" (earlier run)" if step.reused else "")))
        return step

    def call(self, command: list[str]) -> None:
        """Run a tool with its output visible."""
        say(f"$ {shown(command)}")
        run_child(command)


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def shown(command: list[str]) -> str:
    """A command as a user of this checkout would type it, relative to the present folder."""
    words = ["python" if word == sys.executable else word for word in command]
    here = f"{Path.cwd()}/"
    return shlex.join(word.removeprefix(here) for word in words).replace(
        "python -m torch.distributed.run", "torchrun"
    )


def corpus_step(demo: Demo) -> Step:
    """Collect the text into one JSON lines file."""
    say("\n== 1/7  Corpus: real text of this machine")
    sources = find_sources(demo.text)

    def build(folder: Path) -> None:
        summary = collect_corpus(sources, folder / "corpus.jsonl")
        write_json(folder / "summary.json", asdict(summary))

    code = hash_of_code(PACKAGE, ("demo/corpus.py", "data/documents.py"))
    step = demo.add(demo.workspace.step("corpus", {"sources": sources.identity(), "code": code}, build))
    say(describe_corpus(read_summary(step)))
    return step


def read_summary(corpus: Step) -> CorpusSummary:
    """What the corpus step wrote about itself."""
    return CorpusSummary(**read_json_object(corpus.folder / "summary.json", "remove the demo's folder"))


def describe_corpus(summary: CorpusSummary) -> str:
    """One line for people."""
    skipped = f"; {summary.skipped()}" if summary.skipped_files else ""
    return f"{summary.description}: {summary.documents:,} documents, {summary.text_bytes:,} bytes{skipped}"


def tokenizer_step(demo: Demo, corpus: Step) -> Step:
    """Train a small SentencePiece model."""
    settings = demo.settings
    say(f"\n== 2/7  Tokenizer: SentencePiece, {settings.vocabulary:,} pieces")

    def build(folder: Path) -> None:
        train_tokenizer(
            corpus.folder / "corpus.jsonl",
            folder / "tokenizer.model",
            vocabulary=settings.vocabulary,
            sample_bytes=settings.tokenizer_sample_bytes,
        )

    depends_on = {
        "corpus": corpus.key,
        "vocabulary": settings.vocabulary,
        "sample_bytes": settings.tokenizer_sample_bytes,
        "code": hash_of_code(PACKAGE, ("demo/tokenizer.py",)),
        "sentencepiece": version("sentencepiece"),
    }
    return demo.add(demo.workspace.step("tokenizer", depends_on, build))


def tool_step(
    demo: Demo,
    name: str,
    inputs: list[Step],
    command_for: Callable[[Path], list[str]],
) -> Step:
    """A step that is one call of a tool of ours."""
    command = command_for(demo.workspace.folder / name)
    demo.commands.append(shown(command))

    depends_on = {
        "inputs": [step.key for step in inputs],
        "command": command,
        "code": hash_of_code(PACKAGE, DATA_CODE),
    }
    return demo.add(demo.workspace.step(name, depends_on, lambda folder: demo.call(command)))


def tokens_step(demo: Demo, corpus: Step, tokenizer: Step) -> Step:
    """Text to token files."""
    say("\n== 3/7  Tokenise: tools/tokenize_corpus.py")

    def command(folder: Path) -> list[str]:
        return [
            *(sys.executable, str(TOOLS / "tokenize_corpus.py")),
            *("--input", str(corpus.folder / "corpus.jsonl")),
            *("--tokenizer", str(tokenizer.folder / "tokenizer.model")),
            *("--output-prefix", str(folder / "corpus"), "--workers", "2"),
        ]

    return tool_step(demo, "tokens", [corpus, tokenizer], command)


def pack_step(demo: Demo, name: str, tokens: Step, tokenizer: Step, stage: StageSettings) -> Step:
    """Token files to packed rows."""
    say(f"\n== 4/7  Pack rows of {stage.row_tokens:,} tokens: tools/pack_corpus.py")

    def command(folder: Path) -> list[str]:
        return [
            *(sys.executable, str(TOOLS / "pack_corpus.py")),
            *("--source", str(tokens.folder / "corpus"), "--row-tokens", str(stage.row_tokens)),
            *("--policy", "concat", "--seed", str(demo.settings.seed)),
            *("--validation-fraction", str(demo.settings.validation_fraction)),
            *("--output", str(folder / "pack")),
        ]

    step = tool_step(demo, name, [tokens, tokenizer], command)
    require_enough_rows(read_manifest(step.folder / "pack"), stage)
    return step


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
    """Numbers of the documents in a split of a pack with one source."""
    return set(np.unique(np.load(pack / split / "segment_document.npy", allow_pickle=False)).tolist())


def exposure_step(demo: Demo, long: Step) -> Step:
    """The exposure table of the long rows before and after weighting."""
    say("\n== 5/7  Exposure: tools/inspect_pack.py")
    folder = demo.workspace.folder / "exposure"
    inspect = [sys.executable, str(TOOLS / "inspect_pack.py"), str(long.folder / "pack")]
    plot = [*inspect, "--plot", str(folder / EXPOSURE_FIGURE)]
    demo.commands.append(shown(plot))

    def build(folder: Path) -> None:
        demo.call(plot)
        table = subprocess.run([*inspect, "--json"], stdout=subprocess.PIPE, text=True, check=True).stdout
        write_text(folder / "exposure.json", table)

    depends_on = {
        "pack": long.key,
        "code": hash_of_code(PACKAGE, ("exposure", "report/exposure_figure.py")),
    }
    return demo.add(demo.workspace.step("exposure", depends_on, build))


def training_step(
    demo: Demo, name: str, pack: Step, stage: StageSettings, *, rule: str, base: Step | None
) -> Step:
    """One training run on two processes; a run that was interrupted goes on from its last checkpoint."""
    what = "from scratch" if base is None else "from the base checkpoint"
    number = 6 if base is None else 7
    say(f"\n== {number}/7  Train {name}: rule {rule}, {stage.iterations} iterations {what}")
    run_dir = demo.workspace.folder / name / "run"
    manifest = read_manifest(pack.folder / "pack")

    command = training_command(
        demo.settings,
        stage,
        pack=pack.folder / "pack",
        validation_rows=manifest.splits["validation"].rows,
        rule=rule,
        save=run_dir,
        base=None if base is None else base.folder / "run",
    )

    def build(folder: Path) -> None:
        if remove_half_saved_run(run_dir):
            say(f"{name}: it had no whole checkpoint yet, so it begins at its start")
        say(f"$ {shown(command)}")
        say(f"  its output goes to {run_dir / 'log.txt'}")
        train(command, name=name, run_dir=run_dir, iterations=stage.iterations)

    demo.commands.append(shown(command))
    depends_on = {
        "pack": pack.key,
        "base": None if base is None else base.key,
        "command": command,
        "code": hash_of_code(PACKAGE, TRAINING_CODE),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "numpy")},
    }
    return demo.add(demo.workspace.step(name, depends_on, build, resumable=True))
