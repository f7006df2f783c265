"""Faults of models and checkpoints that are converted."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import matrix
from tests.faults.data import (
    DEEP,
    Damage,
    Work,
    _fifo,
    _flip,
    _link,
    _replace,
    _text,
    _truncate,
    full_disk,
    on_tmpfs,
    signalled,
    two_at_once,
    wait_for,
)
from tests.faults.kit import Kit
from tests.faults.matrix import Row, refused

ADAPTER = "adapter_config.json"
SHARD = "model-00001-of-00001.safetensors"
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def _import(_: Kit, folder: Path) -> Sequence[Any]:
    return ("import_hf.py", "--hf", folder, "--output", folder / "new")


def import_row(name: str, fault: str, words: str, damage: Damage) -> Row:
    """A damaged Hugging Face folder that is imported."""
    return refused(name, fault, words, _import, damage=damage, material=lambda kit: kit.hf)


# -- safetensors -----------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights; data stays in place behind it."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def _tensor(**fields: Any) -> Damage:
    return _header(lambda header: header[QUERY].update(fields))


def _weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Save the tensors again after a change of them."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _plant(name: str, value: float) -> Damage:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[5] = value

    return _weights(change)


def _overlap(header: dict[str, Any]) -> None:
    names = sorted(name for name in header if name != "__metadata__")
    same = [name for name in names if header[name]["shape"] == header[names[-1]]["shape"]]
    header[same[0]]["data_offsets"] = header[same[-1]]["data_offsets"]


def _twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(QUERY)}: {json.dumps(header[QUERY])}}}").encode()


def _index(weight_map: Any) -> Damage:
    """Give the weights the name of a shard, and write an index of it."""

    def damage(folder: Path) -> None:
        from safetensors import safe_open

        (folder / WEIGHTS).rename(folder / SHARD)
        with safe_open(folder / SHARD, "pt") as stored:
            names = dict.fromkeys(stored.keys(), SHARD)
        content = {"metadata": {}, "weight_map": weight_map(names) if callable(weight_map) else weight_map}
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def _linked_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def _weights_beside_shards(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    _index(lambda names: names)(folder)
    (folder / WEIGHTS).write_bytes(data)


TENSORS = [
    import_row(
        "header-2-60",
        "safetensors header of 2^60 bytes",
        "announces a header of 1,152,921,504,606,846,976 bytes",
        lambda folder: (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", 1 << 60) + (folder / WEIGHTS).read_bytes()[8:]
        ),
    ),
    import_row("header-deep", "safetensors header nested 100,000 deep", WEIGHTS, _header(lambda _: DEEP)),
    import_row("header-list", "safetensors header that is a list", WEIGHTS, _header(lambda _: b"[]")),
    import_row(
        "header-junk", "safetensors header of binary junk", WEIGHTS, _header(lambda _: bytes(range(200)))
    ),
    import_row("header-twice", "safetensors header with a tensor twice", WEIGHTS, _header(_twice)),
    import_row("header-overlap", "two tensors at one place", WEIGHTS, _header(_overlap)),
    import_row(
        "offsets-outside",
        "a tensor outside of the file",
        WEIGHTS,
        _tensor(data_offsets=[1 << 40, (1 << 40) + 16384]),
    ),
    import_row("offsets-negative", "a tensor at -16384", WEIGHTS, _tensor(data_offsets=[-16384, 0])),
    import_row(
        "offsets-backwards",
        "a tensor that ends before it begins",
        WEIGHTS,
        _tensor(data_offsets=[16384, 0]),
    ),
    import_row("offsets-float", "offsets that are floats", WEIGHTS, _tensor(data_offsets=[0.0, 16384.0])),
    import_row("shape-negative", "a shape of -64 x -64", WEIGHTS, _tensor(shape=[-64, -64])),
    import_row("shape-float", "a shape of 64.0 x 64", WEIGHTS, _tensor(shape=[64.0, 64])),
    import_row("shape-huge", "a shape of 2^62 x 4", WEIGHTS, _tensor(shape=[1 << 62, 4])),
    import_row("shape-true", "a shape of true x 4096", WEIGHTS, _tensor(shape=[True, 4096])),
    import_row("dtype-unknown", "a dtype that does not exist", WEIGHTS, _tensor(dtype="F17")),
    import_row("dtype-int", "weights of int64", WEIGHTS, _tensor(dtype="I64", shape=[64, 32])),
    import_row("weights-cut", "weights cut by one byte", WEIGHTS, _truncate(WEIGHTS, -1)),
    import_row("weights-empty", "empty weights", WEIGHTS, _truncate(WEIGHTS, 0)),
    import_row("weights-fifo", "a FIFO in place of the weights", WEIGHTS, _fifo(WEIGHTS)),
    import_row("weights-device", "weights that link to /dev/zero", WEIGHTS, _link(WEIGHTS, "/dev/zero")),
    import_row(
        "embedding-nan",
        "NaN in the embedding of an unused token",
        "embed_tokens",
        _plant("model.embed_tokens.weight", float("nan")),
    ),
    import_row(
        "weight-missing", "a missing tensor", "q_proj", _weights(lambda tensors: tensors.pop(QUERY))
    ),
    import_row(
        "weight-extra",
        "a tensor too many",
        "evil",
        _weights(lambda tensors: tensors.update(evil=tensors[QUERY].clone())),
    ),
    import_row(
        "weight-nan", "a NaN in one weight", "q_proj.weight contains 1 NaN", _plant(QUERY, math.nan)
    ),
    import_row(
        "weight-inf",
        "-Inf in the embedding",
        "embed_tokens.weight contains 1 infinite",
        _plant("model.embed_tokens.weight", -math.inf),
    ),
    import_row(
        "weight-link",
        "weights that link to a file outside the folder",
        "outside the folder",
        _linked_weights,
    ),
    import_row(
        "weight-two-models",
        "one file of weights beside an index of shards that are there",
        "remove the one that is not the model",
        _weights_beside_shards,
    ),
    import_row(
        "weight-adapter", "an adapter beside the weights", "adapter_config.json", _replace(ADAPTER, b"{}")
    ),
    import_row(
        "weight-shape",
        "a tensor of another shape",
        "q_proj",
        _weights(lambda tensors: tensors.update({QUERY: tensors[QUERY][:, :32].contiguous()})),
    ),
    import_row(
        "index-traversal",
        "index that names `../../etc/passwd`",
        INDEX,
        _index(lambda names: {**names, QUERY: "../../etc/passwd"}),
    ),
    import_row(
        "index-absolute",
        "index that names `/etc/passwd`",
        INDEX,
        _index(lambda names: {**names, QUERY: "/etc/passwd"}),
    ),
    import_row(
        "index-missing",
        "index that names a missing file",
        "gone.safetensors",
        _index(lambda names: {**names, QUERY: "gone.safetensors"}),
    ),
    import_row(
        "index-number", "index that names a number", INDEX, _index(lambda names: {**names, QUERY: 5})
    ),
    import_row("index-list", "index whose map is a list", INDEX, _index([1])),
    import_row(
        "index-unknown",
        "index that names a tensor that is nowhere",
        "ghost",
        _index(lambda names: {**names, "ghost": SHARD}),
    ),
]


# -- config.json and the tokenizer's files ---------------------------------------------------------


def _config(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


CONFIGS = [
    import_row("config-negative", "hidden_size of -64", "hidden_size", _config(hidden_size=-64)),
    import_row(
        "config-zero", "num_attention_heads of 0", "num_attention_heads", _config(num_attention_heads=0)
    ),
    import_row("config-float", "hidden_size of 64.5", "hidden_size", _config(hidden_size=64.5)),
    import_row("config-text", 'hidden_size of "64"', "hidden_size", _config(hidden_size="64")),
    import_row(
        "config-true", "num_hidden_layers of true", "num_hidden_layers", _config(num_hidden_layers=True)
    ),
    import_row("config-huge", "vocab_size of 10^12", "vocab_size", _config(vocab_size=10**12)),
    import_row("config-layers", "num_hidden_layers of 10^9", "", _config(num_hidden_layers=10**9)),
    import_row(
        "config-400-digits", "rms_norm_eps of 400 digits", "rms_norm_eps", _config(rms_norm_eps=10**400)
    ),
    import_row(
        "config-theta",
        "rope_theta of -1",
        "rope",
        _config(rope_parameters={"rope_type": "default", "rope_theta": -1}),
    ),
    import_row(
        "config-nan",
        "rms_norm_eps of NaN",
        CONFIG,
        _text(CONFIG, '"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'),
    ),
    import_row(
        "config-twice",
        "hidden_size twice",
        "hidden_size",
        _text(CONFIG, '"hidden_size": 64', '"hidden_size": 32, "hidden_size": 64'),
    ),
    import_row("config-deep", "config nested 100,000 deep", CONFIG, _replace(CONFIG, DEEP)),
    import_row("config-junk", "config of binary junk", CONFIG, _replace(CONFIG, bytes(range(256)))),
    import_row("config-gone", "config deleted", CONFIG, lambda folder: (folder / CONFIG).unlink()),
    import_row("config-fifo", "a FIFO in place of the config", CONFIG, _fifo(CONFIG)),
    import_row(
        "config-code",
        "config that wants its own code run (`auto_map`)",
        "",
        _config(auto_map={"AutoModelForCausalLM": "evil.Evil"}, architectures=["Evil"], model_type="evil"),
    ),
    import_row(
        "pickle-only",
        "weights as a pickle",
        "pytorch_model.bin",
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    ),
]

EVIL_TEMPLATES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr-filter": "{{ messages|attr('__class__')|attr('__base__') }}",
}


def template_row(name: str, template: str) -> Row:
    """A chat template that reaches for Python, rendered by pack_qa.py."""

    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(template)
        record = {"question": "who", "answer": "me", "context": "text"}
        (folder / "qa.jsonl").write_text(json.dumps(record) + "\n")

    def command(_: Kit, folder: Path) -> Sequence[Any]:
        return (
            "pack_qa.py",
            *("--input", folder / "qa.jsonl", "--tokenizer", folder, "--template", "model"),
            *("--row-tokens", 128, "--seed", 1, "--output", folder / "new"),
        )

    return refused(
        f"template-{name}",
        f"chat template `{template}`",
        "template",
        command,
        damage=damage,
        material=lambda kit: kit.hf,
    )


# -- checkpoints -----------------------------------------------------------------------------------


def _release(folder: Path) -> Path:
    (found,) = [path for path in folder.iterdir() if (path / ".metadata").exists()]
    return found


def _data_file(folder: Path) -> str:
    return str(sorted(_release(folder).glob("*.distcp"))[0].relative_to(folder))


def _in_release(name: str, damage: Callable[[str], Damage]) -> Damage:
    return lambda folder: damage(str((_release(folder) / name).relative_to(folder)))(folder)


def _to_data(damage: Callable[[str], Damage]) -> Damage:
    return lambda folder: damage(_data_file(folder))(folder)


def _evil_pickle(folder: Path) -> bytes:
    import pickle

    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {folder / 'EXECUTED'}",))

    return pickle.dumps(Planted())


def _evil_metadata(folder: Path) -> None:
    (_release(folder) / ".metadata").write_bytes(_evil_pickle(folder))


def _evil_common(folder: Path) -> None:
    (_release(folder) / "common.pt").write_bytes(_evil_pickle(folder))


def _nan_in_checkpoint(folder: Path) -> None:
    """A NaN that was saved, with records and hashes that agree."""
    from megatron_exact.model.hf_folder import read_hf_folder
    from tests.unit.conversion.small_models import read_checkpoint, write_checkpoint

    tensors = read_checkpoint(folder)
    tensors["decoder.final_layernorm.weight"][0] = math.nan
    shutil.rmtree(_release(folder))
    write_checkpoint(folder, tensors, read_hf_folder(folder / "hf").shape.num_layers)


def _linked_data(folder: Path) -> None:
    path = folder / _data_file(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def _export(_: Kit, folder: Path) -> Sequence[Any]:
    return ("export_hf.py", "--checkpoint", folder, "--output", folder / "new")


def _verify_checkpoint(kit: Kit, folder: Path) -> Sequence[Any]:
    return ("verify_checkpoint.py", "--checkpoint", folder, "--hf", kit.hf)


def export_row(name: str, fault: str, words: str, damage: Damage, command: Any = _export) -> Row:
    """A damaged checkpoint that is exported."""
    return refused(name, fault, words, command, damage=damage, material=lambda kit: kit.checkpoint)


CHECKPOINTS = [
    export_row(
        "data-flipped",
        "a flipped bit in a file of the checkpoint",
        "CRC-32 differs",
        _to_data(lambda name: _flip(name, 300_000)),
    ),
    export_row("data-nan", "a NaN in a checkpoint", "model.norm.weight contains 1 NaN", _nan_in_checkpoint),
    export_row(
        "data-cut", "a file of the checkpoint cut", "distcp", _to_data(lambda name: _truncate(name, -300))
    ),
    export_row(
        "data-gone",
        "a file of the checkpoint deleted",
        "distcp",
        lambda folder: (folder / _data_file(folder)).unlink(),
    ),
    export_row("data-fifo", "a FIFO in place of a file of the checkpoint", "distcp", _to_data(_fifo)),
    export_row(
        "metadata-gone",
        "`.metadata` deleted",
        ".metadata",
        lambda folder: (_release(folder) / ".metadata").unlink(),
    ),
    export_row(
        "metadata-code", "`.metadata` that runs a program when it is unpickled", ".metadata", _evil_metadata
    ),
    export_row(
        "metadata-cut",
        "`.metadata` cut",
        ".metadata",
        _in_release(".metadata", lambda name: _truncate(name, 100)),
    ),
    export_row(
        "record-deep",
        "the record of the import nested 100,000 deep",
        "",
        _in_release("integrity.json", lambda name: _replace(name, DEEP)),
    ),
    export_row(
        "tracker-junk",
        "a tracker of binary junk",
        "latest_checkpointed_iteration.txt",
        _replace("latest_checkpointed_iteration.txt", bytes(range(256))),
    ),
    export_row(
        "tracker-traversal",
        "a tracker that says `../../etc`",
        "latest_checkpointed_iteration.txt",
        _replace("latest_checkpointed_iteration.txt", b"../../etc"),
    ),
]


# -- what happens to the tools ---------------------------------------------------------------------


def _slow_importer(folder: Path) -> Callable[[], None]:
    def first() -> None:
        from megatron_exact.conversion import import_hf

        stock = import_hf.write_torch_dist

        def write_torch_dist(*arguments: Any, **options: Any) -> Any:
            found = stock(*arguments, **options)
            (folder / "there").touch()
            wait_for(folder / "go")
            return found

        import_hf.write_torch_dist = write_torch_dist

    return first


def _slow_exporter(folder: Path) -> Callable[[], None]:
    def first() -> None:
        from megatron_exact.conversion import export_hf

        stock = export_hf.write_files_beside_weights

        def write_files_beside_weights(*arguments: Any, **options: Any) -> Any:
            (folder / "there").touch()
            wait_for(folder / "go")
            return stock(*arguments, **options)

        export_hf.write_files_beside_weights = write_files_beside_weights

    return first


def _same_tree(wanted: Callable[[Kit], Path], pattern: str, kit: Kit, folder: Path) -> None:
    paths = sorted(path.relative_to(wanted(kit)) for path in wanted(kit).rglob(pattern))
    assert paths
    for path in paths:
        assert (folder / "new" / path).read_bytes() == (wanted(kit) / path).read_bytes(), path


IMPORTER = Work(
    name="importer",
    command=lambda kit, folder: ("import_hf.py", "--hf", kit.hf, "--output", folder / "new"),
    slow=_slow_importer,
    same=partial(_same_tree, lambda kit: kit.checkpoint, "*.distcp"),
    leaves=("new",),
)
EXPORTER = Work(
    name="exporter",
    command=lambda kit, folder: (
        "export_hf.py",
        "--checkpoint",
        kit.checkpoint,
        "--output",
        folder / "new",
    ),
    slow=_slow_exporter,
    same=partial(_same_tree, lambda kit: kit.exported, "*.safetensors"),
    leaves=("new",),
)
TOOLS = [
    *(
        signalled(work, name, code, leaves)
        for work, leaves in ((IMPORTER, "no checkpoint"), (EXPORTER, "no model"))
        for name, code in (("SIGKILL", -9), ("SIGTERM", 143))
    ),
    two_at_once(IMPORTER),
    two_at_once(EXPORTER),
    full_disk(IMPORTER, 20_000),
    full_disk(EXPORTER, 20_000),
    on_tmpfs(IMPORTER, "size=64k", "a file system of 64 KiB", "No space left on device"),
    on_tmpfs(EXPORTER, "ro", "a read-only file system", "Read-only file system"),
]

ROWS = [
    *matrix.quick(TENSORS),
    *CONFIGS,
    *(template_row(name, template) for name, template in EVIL_TEMPLATES.items()),
    *CHECKPOINTS,
    *TOOLS,
]
