"""Hugging Face folders that somebody prepared to break their reader.

`FAULTS` maps the name of a fault to a function that spoils a whole model folder
(`small_models.write_model`) in place, and to a pattern that the one line of the refusal must contain.
`make_hostile` builds and spoils a folder in one call.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.conversion.small_models import LLAMA, write_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
ESCAPE = "\x1b]0;title\x07\nnext line"
"""Sets the title of a terminal and begins a second line where it is printed as it is."""
DEEP = 100_000
NESTED = '{"a": ' + "[" * DEEP + "]" * DEEP + "}"

Spoil = Callable[[Path], None]


def read_parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write_parts(file: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> None:
    """A safetensors file with this header and data; `length` is what it says of its header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def header_of(length: int) -> Spoil:
    """The file says that its header has `length` bytes."""
    return lambda folder: write_parts(folder / SINGLE, *read_parts(folder / SINGLE), length)


def header_text(text: str) -> Spoil:
    """The header is this text."""
    return lambda folder: write_parts(folder / SINGLE, text, b"")


def entry(change: Callable[[dict[str, Any]], object], name: str = UP_PROJ) -> Spoil:
    """Change what the header says of one tensor."""

    def spoil(folder: Path) -> None:
        header, data = read_parts(folder / SINGLE)
        change(header[name])
        write_parts(folder / SINGLE, header, data)

    return spoil


def shifted(begin: int, end: int) -> Spoil:
    """Move where a tensor begins and ends by so many bytes."""

    def change(found: dict[str, Any]) -> None:
        offsets = found["data_offsets"]
        found["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return entry(change)


def twice(folder: Path) -> None:
    """One tensor stands in the header twice, the second time over the data of another."""
    header, data = read_parts(folder / SINGLE)
    other = json.dumps(header["model.layers.0.mlp.up_proj.weight"])
    text = json.dumps(header)
    write_parts(folder / SINGLE, f'{text[:-1]}, "{UP_PROJ}": {other}}}', data)


def renamed(name: str) -> Spoil:
    """A tensor has another name."""

    def spoil(folder: Path) -> None:
        header, data = read_parts(folder / SINGLE)
        header[name] = header.pop(UP_PROJ)
        write_parts(folder / SINGLE, header, data)

    return spoil


def cut(bytes_left: int) -> Spoil:
    """The file ends after so many bytes, counted from its end where negative."""
    return lambda folder: (
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:bytes_left]) and None
    )


def index_naming(name: str, target: str | None = None) -> Spoil:
    """An index that names a file; `target`: what the name is a link to, from inside the folder."""

    def spoil(folder: Path) -> None:
        names = read_parts(folder / SINGLE)[0]
        outside = folder.parent / f"outside-{folder.name}.safetensors"
        (folder / SINGLE).rename(outside)
        if target is not None:
            (folder / name).symlink_to(outside if target == "outside" else target)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))

    return spoil


def special(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else stands where a file should."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def linked_to_a_private_file(name: str) -> Spoil:
    """A file that goes along with the weights is a link out of the folder."""

    def spoil(folder: Path) -> None:
        private = folder.parent / f"private-{folder.name}"
        private.write_text("{}")
        (folder / name).symlink_to(private)

    return spoil


def text_of(name: str, text: str) -> Spoil:
    """A file has this text."""
    return lambda folder: (folder / name).write_text(text) and None


def field(key: str, value: Any) -> Spoil:
    """A field of config.json has another value."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, key: value}))

    return spoil


def repeated_field(key: str, value: Any) -> Spoil:
    """config.json gives one field twice."""

    def spoil(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(f"{text.rstrip()[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}")

    return spoil


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields of config.json that count something."""
BAD_SIZES: dict[str, Any] = {
    "negative": -4,
    "zero": 0,
    "a fraction": 2.5,
    "a float": 2.0,
    "true": True,
    "text": "2",
    "a list": [2],
    "of 64 bits": 2**63 - 1,
    "of 400 digits": 10**400,
}
IN_SHAPE = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
}
"""Names under which a refusal may speak of a field."""
_SIZE = f"gives tensor '{UP_PROJ}' 10,752 bytes where"
_PLACE = f"places tensor '{UP_PROJ}'"
FAULTS: dict[str, tuple[Spoil, str]] = {
    "header of 2^60 bytes": (header_of(1 << 60), f"{SINGLE} announces a header of 1,152,921"),
    "header of 2^64 - 1 bytes": (header_of((1 << 64) - 1), f"{SINGLE} announces a header"),
    "header of 0 bytes": (header_of(0), SINGLE),
    "header shorter than it is": (header_of(100), SINGLE),
    "lists 100,000 deep": (header_text("[" * DEEP + "]" * DEEP), f"{SINGLE} is nested"),
    "objects 100,000 deep": (header_text('{"a":' * DEEP + "1" + "}" * DEEP), f"{SINGLE} is nested"),
    "entry 100,000 deep": (header_text(NESTED), f"{SINGLE} is nested"),
    "header of an array": (header_text("[]"), f"{SINGLE} contains a list"),
    "header of NaN": (header_text('{"a": NaN}'), f"{SINGLE}: a is NaN"),
    "header of a huge number": (header_text('{"a": 1' + "0" * 5000 + "}"), f"{SINGLE}: a is an integer of"),
    "tensor named twice": (twice, f"{SINGLE}: it gives the key 'model.*twice"),
    "overlapping tensors": (shifted(-64, -64), f"{SINGLE} has tensor .*overlaps"),
    "gap between tensors": (shifted(64, 64), f"{SINGLE} has tensor .*(gap|overlaps)"),
    "negative offset": (entry(lambda e: e.update(data_offsets=[-8, 0])), _PLACE),
    "offset of 2^62": (shifted(1 << 62, 1 << 62), f"{SINGLE} has tensor .*leaves a gap"),
    "offset of a float": (entry(lambda e: e.update(data_offsets=[0.0, 8.0])), _PLACE),
    "offsets of one number": (entry(lambda e: e.update(data_offsets=[0])), _PLACE),
    "dtype of half the size": (entry(lambda e: e.update(dtype="BF16")), _SIZE),
    "unknown dtype": (entry(lambda e: e.update(dtype="F4")), f"gives tensor '{UP_PROJ}' the unknown dtype"),
    "dtype of integers": (entry(lambda e: e.update(dtype="I32")), f"tensor '{UP_PROJ}' is I32"),
    "shape of more rows": (entry(lambda e: e.update(shape=[57, 48])), _SIZE),
    "shape turned": (entry(lambda e: e.update(shape=[48, 56])), rf"{UP_PROJ} is \[48, 56\] where config"),
    "shape of no axes": (entry(lambda e: e.update(shape=[])), _SIZE),
    "shape of 2^62": (entry(lambda e: e.update(shape=[1 << 62, 1 << 62])), _SIZE),
    "shape of a million axes": (entry(lambda e: e.update(shape=[1] * 10**6)), "the shape"),
    "name with control characters": (renamed(ESCAPE), f"lacks {UP_PROJ}"),
    "buffer of control characters": (renamed(f"{ESCAPE}.weight"), f"lacks {UP_PROJ}"),
    "file cut in its data": (cut(-1), f"{SINGLE} has .* bytes where its header asks for"),
    "file cut in its header": (cut(100), f"{SINGLE} announces a header"),
    "file of 7 bytes": (cut(7), f"{SINGLE} has 7 bytes, no header"),
    "empty file": (cut(0), f"{SINGLE} has 0 bytes, no header"),
    "index above the folder": (index_naming("../../x.safetensors"), f"{INDEX} names '../../x"),
    "index of an absolute path": (index_naming("/etc/passwd"), f"{INDEX} names '/etc/passwd'"),
    "index of a hidden file": (index_naming(".x.safetensors"), f"{INDEX} names '.x.safetensors'"),
    "index of a folder": (index_naming(".."), f"{INDEX} names '..'"),
    "index with backslashes": (index_naming("..\\x.safetensors"), f"{INDEX} names"),
    "index with a null byte": (index_naming("x\0.safetensors"), f"{INDEX} names"),
    "index with control characters": (index_naming(f"{ESCAPE}.safetensors"), rf"{INDEX} names '\\x1b\]0"),
    "index of a link out of the folder": (index_naming("x.safetensors", "outside"), "is a link to '"),
    "index of a link to a device": (index_naming("x.safetensors", "/dev/zero"), "lacks x.safetensors"),
    "index of a link to itself": (index_naming("x.safetensors", "x.safetensors"), "lacks x.safetensors"),
    "index 100,000 deep": (text_of(INDEX, "[" * DEEP), f"{INDEX} is (nested|not JSON)"),
    "index of a list": (text_of(INDEX, "[]"), f"{INDEX} contains a list"),
    "index of numbers": (text_of(INDEX, '{"weight_map": {"a": 1}}'), f"{INDEX} names '1'"),
    "weights that are a pipe": (special(SINGLE, os.mkfifo), f"{SINGLE} is not a regular file"),
    "weights that are a folder": (special(SINGLE, os.mkdir), f"{SINGLE} is not a regular file"),
    "config that is a pipe": (special(CONFIG, os.mkfifo), f"contains no {CONFIG}"),
    "config that is a link": (linked_to_a_private_file("LICENSE"), "LICENSE is a link to"),
    "tokenizer that is a link": (linked_to_a_private_file("tokenizer.json"), "tokenizer.json is a link to"),
    "config 100,000 deep": (text_of(CONFIG, NESTED), f"{CONFIG} is nested"),
    "config of NaN": (text_of(CONFIG, '{"rms_norm_eps": NaN}'), f"{CONFIG}: rms_norm_eps is NaN"),
    "field given twice": (repeated_field("hidden_size", 48), "it gives the key 'hidden_size' twice"),
    "rope theta of 400 digits": (field("rope_theta", 10**400), "rope_theta is an integer of 401"),
    "more layers than tensors": (field("num_hidden_layers", 9_999), "num_hidden_layers 9999"),
    "more layers than any model": (field("num_hidden_layers", 2**31 - 1), "num_layers is 2147483647, more"),
    "generation config 100,000 deep": (
        text_of(GENERATION_CONFIG, NESTED),
        f"{GENERATION_CONFIG} is nested",
    ),
    **{
        f"{key} {name}": (field(key, value), f"{CONFIG}.*({key}|{IN_SHAPE.get(key, key)})")
        for key in SIZES
        for name, value in BAD_SIZES.items()
    },
}  # fmt: skip


def make_hostile(folder: Path, fault: str, source: Path | None = None) -> str:
    """A model folder with one of FAULTS; returns the pattern of the refusal.

    Args:
        folder: to make.
        fault: key of FAULTS.
        source: a whole folder to copy; None makes one.
    """
    spoil, pattern = FAULTS[fault]
    if source is None:
        write_model(folder, LLAMA)
    else:
        shutil.copytree(source, folder)
    spoil(folder)
    return pattern
