"""Cost of converting: peak memory above a bare interpreter with torch, and CPU seconds a GB.

Random weights in the shapes of a model go Hugging Face -> Megatron -> Hugging Face, each step by its tool
in a process of its own, beside two plain loops: one reads the same bytes and writes them (8 MiB at a time,
fsync at the end), the other also hashes them, as an import has to. `verify` is `verify_checkpoint.py` of
the import, which reads each byte once for sha256, CRC-32 and values; `read and hash loop` reads and hashes
the same bytes. `in shards` writes files of an eighth of the model, and `from shards` imports
those. `export, TP2` starts from a checkpoint that is cut as two tensor-parallel ranks save it, whole halves
of a matrix as one record; `TP2xPP2, states` from the four files of two pipeline stages of two ranks, with
the states of the distributed optimizer beside the weights (`parallel_checkpoint.py`). Every export is
compared with the source, byte for byte, and the second import with the first. CPU seconds a GB are without
starting the interpreter and importing torch; a GB is one of weights, without states.

Memory depends on the widths of a model, not on its depth: `--layers` takes fewer than the model has.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import math
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import REPOSITORY, Row, add_common_arguments, publish, whole_number
from parallel_checkpoint import write_as_ranks
from tool_runs import run_tool_process

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.conversion.checkpoint_layout import BLOCK_BYTES, RELEASE, hf_shapes
from megatron_exact.conversion.tensors import WeightValues
from megatron_exact.model.families import PRESETS, hf_config_of_shape
from megatron_exact.model.shapes import ModelShape

EPILOG = """examples:
  python benchmarks/conversion.py --model qwen2.5-1.5b                    # 3.1 GB, needs 16 GB of disk
  python benchmarks/conversion.py --model llama-3.1-8b --layers 2         # the widths of 8B
"""
SHARDS = 8
LAYOUTS = (("TP2", 2, 1, False), ("TP2xPP2, states", 2, 2, True))
"""Name, tensor-parallel ranks, pipeline-parallel ranks, with states of the distributed optimizer."""
BARE = "import torch"
START = "import megatron_exact.conversion.import_hf, megatron_exact.conversion.export_hf"
# Runs a script and reports its peak resident memory above that of the interpreter with torch.
MEASURED = """
import runpy, sys, torch
def resident(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
report, *sys.argv = sys.argv[1:]
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = resident("VmRSS")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    open(report, "w").write(str(resident("VmHWM") - before))
"""
COPY = """
import hashlib, os, sys
import torch
buffer = memoryview(bytearray(8 << 20))
source, target, *hashing = sys.argv[1:]  # of the script; without a target nothing is written
if target:
    os.mkdir(target)
for name in sorted(os.listdir(source)):
    digest = hashlib.sha256()
    written = f"{target}/{name}" if target else os.devnull
    with open(f"{source}/{name}", "rb", buffering=0) as a, open(written, "wb", buffering=0) as b:
        while count := a.readinto(buffer):
            if hashing:
                digest.update(buffer[:count])
            if target:
                b.write(buffer[:count])
        if target:
            os.fsync(b.fileno())
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this benchmark."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen2.5-0.5b", help="%(default)s")
    parser.add_argument("--layers", type=whole_number, help="layers to make; default: all of the model's")
    parser.add_argument("--folder", metavar="DIR", help="where to work; default: a temporary folder")
    add_common_arguments(parser)
    return parser


def main() -> int:
    """Run the benchmark."""
    arguments = build_parser().parse_args()
    shape = PRESETS[arguments.model]
    if arguments.layers is not None:
        shape = dataclasses.replace(shape, num_layers=arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write_random_model(Path(folder) / "hf", shape, arguments.seed) / 1e9
        rounds = [measure_steps(shape, Path(folder), size) for _ in range(arguments.rounds)]
        rows = [medians(runs) for runs in zip(*rounds, strict=True)]
        for row in rows:
            row["x read and write"] = round(row["CPU s a GB"] / rows[0]["CPU s a GB"], 2)
            row["x read, hash and write"] = round(row["CPU s a GB"] / rows[1]["CPU s a GB"], 2)
        kind = file_system(Path(folder))
        look = look_seconds(Path(folder) / "hf" / "model.safetensors")
    publish(
        "conversion",
        rows,
        title=f"Conversion of {arguments.model}, {shape.num_layers} layers, {size:.2f} GB in bfloat16",
        notes=(
            "Peak MB: resident memory above that of a bare interpreter with torch. CPU seconds a GB: "
            "without those of the start, imports included. MB and GB are powers of ten. Medians of "
            f"{arguments.rounds} rounds; files on {kind}.",
            f"Of every import and export, the look at the values takes {look:.2f} CPU seconds a GB.",
        ),
        file=arguments.json,
    )
    return 0


def medians(runs: Sequence[Row]) -> Row:
    """One step of several rounds."""
    numbers = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "step"}
    return {"step": runs[0]["step"], **numbers}


def file_system(folder: Path) -> str:
    """Type of the file system of a folder: memory (tmpfs) has no cost of a disk."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    path = folder.resolve()
    return max((len(at), kind) for at, kind in mounts if path.is_relative_to(at))[1]


def measure_steps(shape: ModelShape, folder: Path, size: float) -> list[Row]:
    """One row a step; folders are removed as soon as they are no longer needed.

    Args:
        shape: of the model.
        folder: contains it as `hf`.
        size: its GB.
    """
    source = folder / "hf"
    report, loop = folder / "peak", folder / "copy.py"
    loop.write_text(COPY)
    rows = []
    for code in (START, BARE):  # once for the bytecode, then BARE counts
        bare = run_tool_process(["-c", code], REPOSITORY)
    start = run_tool_process(["-c", START], REPOSITORY)

    def step(name: str, *words: str) -> None:
        os.sync()  # a step would pay for what the one before it has left to write
        run = run_tool_process(["-c", MEASURED, str(report), *words], REPOSITORY)
        begin = bare if words[0] == str(loop) else start
        rows.append(
            {
                "step": name,
                "GB": round(size, 2),
                "peak MB": round(int(report.read_text()) / 1e6),
                "CPU s": round(run.cpu_seconds, 1),
                "CPU s a GB": round((run.cpu_seconds - begin.cpu_seconds) / size, 2),
                "wall s": round(run.wall_seconds, 1),
            }
        )

    def export(name: str, checkpoint: Path) -> None:
        exported = folder / "exported"
        words = ("--checkpoint", str(checkpoint), "--output", str(exported), "--shard-size", "1TB")
        step(name, "tools/export_hf.py", *words)
        require_same_files(name, source, exported, "*.safetensors")
        remove(exported)

    imported, sharded, again = folder / "imported", folder / "sharded", folder / "again"
    step("read and write loop", str(loop), str(source), str(folder / "copy"))
    remove(folder / "copy")
    step("read, hash and write loop", str(loop), str(source), str(folder / "copy"), "hash")
    remove(folder / "copy")
    step("import", "tools/import_hf.py", "--hf", str(source), "--output", str(imported))
    step("read and hash loop", str(loop), str(imported / RELEASE), "", "hash")
    step("verify", "tools/verify_checkpoint.py", "--checkpoint", str(imported))
    export("export", imported)
    words = (
        "--checkpoint",
        str(imported),
        "--output",
        str(sharded),
        "--shard-size",
        str(int(size * 1e9) // SHARDS),
    )
    step("export, in shards", "tools/export_hf.py", *words)
    step("import, from shards", "tools/import_hf.py", "--hf", str(sharded), "--output", str(again))
    require_same_files("import, from shards", imported / RELEASE, again / RELEASE, "*")
    remove(sharded)
    remove(again)
    for name, tensor, pipeline, has_states in LAYOUTS:
        cut = folder / "cut"
        write_as_ranks(imported, cut, shape, tensor=tensor, pipeline=pipeline, has_states=has_states)
        export(f"export, {name}", cut)
        remove(cut)
    remove(imported)
    return rows


def look_seconds(file: Path) -> float:
    """CPU seconds a GB that the check of the values takes, in blocks as large as a conversion's."""
    buffer = bytearray(BLOCK_BYTES)
    values = WeightValues()
    seconds = size = 0.0
    with open(file, "rb", buffering=0) as stream:
        stream.seek(8 + struct.unpack("<Q", stream.read(8))[0])
        while count := stream.readinto(buffer):
            block = torch.frombuffer(buffer, dtype=torch.bfloat16, count=count // 2)
            begin = time.process_time()
            values.look("weights", block)
            seconds += time.process_time() - begin
            size += count
    if values.not_finite() is not None:
        raise ValueError(f"{file}: {values.not_finite()}: the random weights are finite")
    return seconds / (size / 1e9)


def require_same_files(step: str, expected: Path, found: Path, pattern: str) -> None:
    """Raise ValueError unless both folders hold the same files of a pattern, byte for byte."""
    names = [sorted(path.name for path in folder.glob(pattern)) for folder in (expected, found)]
    if names[0] != names[1] or filecmp.cmpfiles(expected, found, names[0], shallow=False)[0] != names[0]:
        raise ValueError(f"{step}: the weights differ from the source's")


def remove(folder: Path) -> None:
    """Delete a folder of ours."""
    shutil.rmtree(folder)


def write_random_model(folder: Path, shape: ModelShape, seed: int) -> int:
    """A Hugging Face folder with finite random bfloat16 weights in one file; returns their bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config_of_shape(shape)))
    header, end = {}, 0
    for name, lengths in hf_shapes(shape).items():
        size = 2 * math.prod(lengths)
        header[name] = {"dtype": "BF16", "shape": lengths, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, 64 << 20):
            bits = generator.integers(0, 1 << 16, min(64 << 20, end - start) // 2, dtype=np.uint16)
            stream.write(bits & 0xBFFF)  # an exponent below the largest: no infinity, no NaN
    return end


if __name__ == "__main__":
    run_tool(main)
