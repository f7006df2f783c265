"""Cost of converting: peak memory above a bare interpreter with torch, and CPU seconds a GB.

Random weights in the shapes of a model go Hugging Face -> Megatron -> Hugging Face, each step by its tool
in a process of its own, beside a plain loop that reads the same bytes and writes them (8 MiB at a time,
fsync at the end). `export, TP2` starts from a checkpoint that is cut as two tensor-parallel ranks save it,
whole halves of a matrix as one record. Every export is compared with the source, byte for byte. CPU
seconds a GB are without starting the interpreter and importing torch.

Memory depends on the widths of a model, not on its depth: `--layers` takes fewer than the model has.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import functools
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import REPOSITORY, Row, add_common_arguments, publish, whole_number
from tool_runs import run_tool_process

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.conversion.export_hf import open_checkpoint
from megatron_exact.conversion.names import hf_shapes
from megatron_exact.conversion.tensors import as_tensor
from megatron_exact.conversion.torch_dist_writer import Block, objects_of_release, write_torch_dist
from megatron_exact.model.hf_config import hf_config_of_shape
from megatron_exact.model.presets import PRESETS, ModelShape

EPILOG = """examples:
  python benchmarks/conversion.py --model qwen2.5-1.5b                    # 3.1 GB, needs 16 GB of disk
  python benchmarks/conversion.py --model llama-3.1-8b --layers 2         # the widths of 8B
"""
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
import os, sys
import torch
buffer = memoryview(bytearray(8 << 20))
source, target = sys.argv[1:]  # of the script
os.mkdir(target)
for name in sorted(os.listdir(source)):
    with open(f"{source}/{name}", "rb", buffering=0) as a, open(f"{target}/{name}", "wb", buffering=0) as b:
        while count := a.readinto(buffer):
            b.write(buffer[:count])
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
        rows = measure_steps(shape, Path(folder), arguments.seed)
    size = rows[-1]["GB"]
    publish(
        "conversion",
        rows,
        title=f"Conversion of {arguments.model}, {shape.num_layers} layers, {size} GB in bfloat16",
        notes=(
            "Peak MB: resident memory above that of a bare interpreter with torch. CPU seconds a GB: "
            "without those of the start, imports included. MB and GB are powers of ten.",
        ),
        file=arguments.json,
    )
    return 0


def measure_steps(shape: ModelShape, folder: Path, seed: int) -> list[Row]:
    """One row a step; folders are removed as soon as they are no longer needed."""
    source = folder / "hf"
    size = write_random_model(source, shape, seed)
    report, loop = folder / "peak", folder / "copy.py"
    loop.write_text(COPY)
    rows = []
    for code in (START, BARE):  # once for the bytecode, then BARE counts
        bare = run_tool_process(["-c", code], REPOSITORY)
    start = run_tool_process(["-c", START], REPOSITORY)

    def step(name: str, *words: str) -> None:
        run = run_tool_process(["-c", MEASURED, str(report), *words], REPOSITORY)
        begin = bare if words[0] == str(loop) else start
        rows.append(
            {
                "step": name,
                "GB": round(size / 1e9, 2),
                "peak MB": round(int(report.read_text()) / 1e6),
                "CPU s": round(run.cpu_seconds, 1),
                "CPU s a GB": round((run.cpu_seconds - begin.cpu_seconds) / (size / 1e9), 2),
                "wall s": round(run.wall_seconds, 1),
            }
        )

    step("read and write loop", str(loop), str(source), str(folder / "copy"))
    remove(folder / "copy")
    step("import", "tools/import_hf.py", "--hf", str(source), "--output", str(folder / "imported"))
    for name, checkpoint in (("export", "imported"), ("export, TP2", "cut")):
        if checkpoint == "cut":
            cut_in_two(folder / "imported", folder / "cut", shape)
            remove(folder / "imported")
        exported = folder / "exported"
        words = ("--checkpoint", str(folder / checkpoint), "--output", str(exported), "--shard-size", "1TB")
        step(name, "tools/export_hf.py", *words)
        if not filecmp.cmp(source / "model.safetensors", exported / "model.safetensors", shallow=False):
            raise ValueError(f"{name}: the weights differ from the source's")
        remove(exported)
    return rows


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


def cut_in_two(source: Path, target: Path, shape: ModelShape) -> None:
    """The same checkpoint in the records that two tensor-parallel ranks write."""
    folder = target / "release"
    folder.mkdir(parents=True)
    (target / "latest_checkpointed_iteration.txt").write_text("release")
    (source / "hf").rename(target / "hf")
    with open_checkpoint(source / "release", shape) as stored:
        blocks = [
            Block(
                key=key,
                global_shape=tensor.shape,
                offsets=(*lead, *starts),
                shape=(*(1 for _ in lead), *piece),
                dtype=tensor.dtype,
                read=functools.partial(read_piece, stored, key, lead, starts, piece),
            )
            for key, tensor in stored.tensors.items()
            for lead in ([(i,) for i in range(shape.num_layers)] if is_layered(key) else [()])
            for starts, piece in halves(key, tensor.shape[len(lead) :])
        ]
        write_torch_dist(folder, blocks, objects_of_release(shape.num_layers))


def is_layered(key: str) -> bool:
    """Whether a tensor has a leading axis of layers."""
    return key.startswith("decoder.layers.")


def read_piece(
    stored: Any, key: str, lead: tuple[int, ...], starts: tuple[int, ...], piece: tuple[int, ...]
) -> Any:
    """One record's tensor: whole rows are read, then the columns of the rank are taken."""
    lengths = stored.tensors[key].shape[len(lead) :]
    data = np.empty(piece[0] * math.prod(lengths[1:]) * 2, np.uint8)
    stored.read_rows(key, lead[0] if lead else None, starts[0], piece[0], data)
    rows = as_tensor(data, stored.tensors[key].dtype).view(piece[0], *lengths[1:])
    if len(piece) > 1:
        rows = rows[:, starts[1] : starts[1] + piece[1]].contiguous()
    return rows.view(*(1 for _ in lead), *piece)


def halves(key: str, lengths: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of the records of one layer on two tensor-parallel ranks."""
    if "norm" in key:
        yield (0,) * len(lengths), lengths
        return
    row_parallel = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
    pieces = 4 if key.endswith("linear_fc1.weight") else 2  # gate and up are halved one by one
    axis = 1 if row_parallel else 0
    step = lengths[axis] // pieces
    for piece in range(pieces):
        starts = tuple(piece * step if a == axis else 0 for a in range(len(lengths)))
        yield starts, tuple(step if a == axis else length for a, length in enumerate(lengths))


if __name__ == "__main__":
    run_tool(main)
