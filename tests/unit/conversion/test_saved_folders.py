"""Folders as savers write them: each is imported as transformers loads it, or refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.verify_checkpoint import verify_checkpoint
from megatron_exact.model.shapes import ModelShape
from tests.unit.conversion.small_models import LLAMA, QWEN, random_weights, read_weights, write_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = replace(QWEN, num_layers=1)
UNTIED = replace(LLAMA, num_layers=1, rope_scaling=None)
FREQUENCIES = UNTIED.rope_theta ** (-torch.arange(0, UNTIED.head_dim, 2) / UNTIED.head_dim)
STALE = "model-00003-of-00003.safetensors"


def save(folder: Path, weights: dict[str, Tensor], name: str = SINGLE) -> None:
    save_file(weights, folder / name, {"format": "pt"})


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def add_tensors(folder: Path, added: dict[str, Tensor]) -> None:
    save(folder, {**load_file(folder / SINGLE), **added})


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    save(folder, {new_name(name): tensor for name, tensor in load_file(folder / SINGLE).items()})


def split_off(folder: Path, other: str, index: bool = True) -> None:
    """Move the final norm to a second file."""
    weights = load_file(folder / SINGLE)
    norm = {"model.norm.weight": weights.pop("model.norm.weight")}
    save(folder, weights)
    save(folder, norm, other)
    if index:
        write_index(folder, {**dict.fromkeys(weights, SINGLE), **dict.fromkeys(norm, other)})


def frequencies_of_every_layer(folder: Path) -> None:
    add_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES})


def frequencies_of_the_model_rounded(folder: Path) -> None:
    add_tensors(folder, {"model.rotary_emb.inv_freq": FREQUENCIES.bfloat16()})


def tables_and_masks(folder: Path) -> None:
    layer = "model.layers.0.self_attn."
    add_tensors(
        folder,
        {
            f"{layer}rotary_emb.cos_cached": torch.ones(1, 1, 8, 16),
            f"{layer}rotary_emb.sin_cached": torch.ones(1, 1, 8, 16, dtype=torch.float64),
            f"{layer}bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
            f"{layer}masked_bias": torch.tensor(-1e9),
            "model.causal_mask": torch.ones(8, 8, dtype=torch.uint8),
            "model.position_ids": torch.arange(8)[None],
        },
    )


def index_of_the_one_file(folder: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / SINGLE), SINGLE))


def index_left_by_an_earlier_save(folder: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / SINGLE), STALE))


def one_shard_with_its_index(folder: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    (folder / SINGLE).rename(folder / name)
    write_index(folder, dict.fromkeys(load_file(folder / name), name))


def shards_beside_stale_ones(folder: Path) -> None:
    one_shard_with_its_index(folder)
    save(folder, {"model.norm.weight": torch.zeros(48)}, STALE)


def index_with_a_buffer_that_no_file_has(folder: Path) -> None:
    one_shard_with_its_index(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_index(folder, {**weight_map, name: "model-00001-of-00001.safetensors"})


def index_that_leaves_a_buffer_out(folder: Path) -> None:
    frequencies_of_every_layer(folder)
    names = [name for name in load_file(folder / SINGLE) if "inv_freq" not in name]
    write_index(folder, dict.fromkeys(names, SINGLE))


def one_prefix_too_many(folder: Path) -> None:
    rename(folder, lambda name: f"model.{name}")


def links_of_the_hub_cache(folder: Path) -> None:
    blobs = folder.parent / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder.rmdir()
    folder.symlink_to(snapshot)


def links_inside_the_folder(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "weights-of-step-9.safetensors")
    (folder / SINGLE).symlink_to("weights-of-step-9.safetensors")


def saved_from_the_base_model(folder: Path) -> None:
    rename(folder, lambda name: name.removeprefix("model."))
    set_config(folder, architectures=["Qwen2Model"])


def head_beside_the_embedding(folder: Path) -> None:
    add_tensors(folder, {HEAD: load_file(folder / SINGLE)[EMBEDDING].clone()})


def head_instead_of_the_embedding(folder: Path) -> None:
    rename(folder, lambda name: HEAD if name == EMBEDDING else name)


def head_in_a_narrower_type(folder: Path) -> None:
    rounded = load_file(folder / SINGLE)[EMBEDDING].bfloat16()
    add_tensors(folder, {EMBEDDING: rounded.float(), HEAD: rounded})


def index_with_a_head_that_no_file_has(folder: Path) -> None:
    one_shard_with_its_index(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**weight_map, HEAD: "model-00001-of-00001.safetensors"})


ACCEPTED: list[tuple[ModelShape, Callable[[Path], None]]] = [
    *((UNTIED, change) for change in (
        frequencies_of_every_layer,
        frequencies_of_the_model_rounded,
        tables_and_masks,
        index_of_the_one_file,
        index_left_by_an_earlier_save,
        one_shard_with_its_index,
        shards_beside_stale_ones,
        index_with_a_buffer_that_no_file_has,
        index_that_leaves_a_buffer_out,
        one_prefix_too_many,
        links_of_the_hub_cache,
        links_inside_the_folder,
    )),
    *((TIED, change) for change in (
        saved_from_the_base_model,
        head_beside_the_embedding,
        head_instead_of_the_embedding,
        head_in_a_narrower_type,
        index_with_a_head_that_no_file_has,
    )),
]  # fmt: skip
WITH_WARNING = {index_left_by_an_earlier_save: f"names {STALE}, which is gone"}


def read_by_transformers(folder: Path) -> dict[str, Tensor]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = model.state_dict()
    return found


@pytest.mark.parametrize(("shape", "change"), ACCEPTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_is_imported_as_transformers_loads_it(
    tmp_path: Path, shape: ModelShape, change: Callable[[Path], None]
) -> None:
    hf = write_model(tmp_path / "hf", shape)
    change(hf)
    expected = read_by_transformers(hf)
    found = import_hf(hf, tmp_path / "c")
    assert len(found.warnings) == (change in WITH_WARNING)
    assert all(WITH_WARNING[change] in warning for warning in found.warnings)
    checks = list(verify_checkpoint(tmp_path / "c", hf=hf, with_logits=False))
    assert all(check.passed for check in checks), [check.line(40) for check in checks]
    export_hf(tmp_path / "c", tmp_path / "out")
    ours = read_weights(tmp_path / "out")
    assert set(ours) == set(expected) - ({HEAD} if shape.tied_embeddings else set())
    assert all(torch.equal(ours[name].float(), expected[name]) for name in ours)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [
        {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[shape.architecture]
    ]


def test_a_model_saved_by_safetensors_itself(tmp_path: Path) -> None:
    """`save_model` keeps one name for memory that two parameters share."""
    import transformers

    hf = write_model(tmp_path / "hf", TIED)
    expected = load_file(hf / SINGLE)[EMBEDDING]
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    save_model(model, str(hf / SINGLE))
    assert (HEAD in load_file(hf / SINGLE)) != (EMBEDDING in load_file(hf / SINGLE))
    import_hf(hf, tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out")
    assert torch.equal(read_weights(tmp_path / "out")[EMBEDDING], expected)


@pytest.mark.parametrize(
    ("head_dim", "theta", "message"),
    [
        (16, 500_000.0, None),
        (16, 10_000.0, "made with rope_theta 10000, where config.json says 500000"),
        (8, 500_000.0, r"\[4\] where head_dim 16 asks for 8"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotary_table_that_the_config_would_not_give_is_named(
    tmp_path: Path, head_dim: int, theta: float, message: str | None, dtype: torch.dtype
) -> None:
    hf = write_model(tmp_path / "hf", LLAMA)  # Llama 3's scaling changes the second half of a table
    frequencies = (theta ** (-torch.arange(0, head_dim, 2) / head_dim)).to(dtype)
    add_tensors(hf, {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies})
    warnings = import_hf(hf, tmp_path / "c").warnings
    if message is None:
        assert warnings == ()
    else:
        (warning,) = warnings
        assert warning.startswith("model.layers.1.self_attn.rotary_emb.inv_freq is ignored")
        if dtype == torch.float32:
            assert re.search(message, warning)


def single_beside_shards_that_exist(folder: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / SINGLE), STALE))
    save(folder, load_file(folder / SINGLE), STALE)


def index_with_a_missing_shard(folder: Path) -> None:
    split_off(folder, "extra.safetensors")
    (folder / "extra.safetensors").unlink()


def second_file_without_index(folder: Path) -> None:
    split_off(folder, "extra.safetensors", index=False)


def shard_without_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")


def variant_of_another_name(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model.fp16.safetensors")


def adapter_beside_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def base_model_without_its_head(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    save(folder, {name.removeprefix("model."): weights[name] for name in weights if name != HEAD})
    set_config(folder, architectures=["LlamaModel"])


def tensor_with_and_without_prefix(folder: Path) -> None:
    add_tensors(folder, {"norm.weight": torch.ones(48)})


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def only_a_gguf(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-q8.gguf")


def value_head(folder: Path) -> None:
    add_tensors(folder, {"v_head.summary.weight": torch.ones(1, 48)})


def mask_of_a_learned_name(folder: Path) -> None:
    add_tensors(folder, {"model.layers.0.self_attn.o_proj.bias": torch.ones(48)})


def quantized_layer(folder: Path) -> None:
    add_tensors(folder, {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)})


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (single_beside_shards_that_exist, f"names {STALE}, which is there as well: remove the one"),
    (index_with_a_missing_shard, "lacks extra.safetensors, which .* names: copy the missing shard"),
    (second_file_without_index, "lacks model.norm.weight"),
    (shard_without_index, "neither model.safetensors nor .*index.json: copy the index"),
    (variant_of_another_name, "model.fp16.safetensors but .* call the file model.safetensors"),
    (adapter_beside_the_model, "adapter_config.json: .* merge it"),
    (base_model_without_its_head, "lacks lm_head.weight.* set tie_word_embeddings to true"),
    (tensor_with_and_without_prefix, "'model.norm.weight' and 'norm.weight', which are one tensor"),
    (only_a_pickle, "pytorch_model.bin and no safetensors: such files can run code"),
    (only_a_gguf, "model-q8.gguf and no safetensors: take the safetensors"),
    (value_head, "contains v_head.summary.weight, which its config has no place for"),
    (
        mask_of_a_learned_name,
        "contains model.layers.0.self_attn.o_proj.bias, which its config has no",
    ),
    (quantized_layer, "qweight' is I32: .* quantized"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_could_be_two_models_or_none_is_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    hf = write_model(tmp_path / "hf", UNTIED)
    change(hf)
    with pytest.raises(ValueError, match=message) as error:
        import_hf(hf, tmp_path / "c")
    assert "\n" not in str(error.value)
    assert str(hf) in str(error.value)
    assert os.listdir(tmp_path) == ["hf"]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", UNTIED)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (hf / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    import_hf(hf, tmp_path / "c")
    (hf / SINGLE).unlink()
    with pytest.raises(ValueError, match="not read here"):
        import_hf(hf, tmp_path / "d")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))  # noqa: S301 - the negative control
    assert (tmp_path / "ran").exists(), "the file would have been noticed"


@pytest.mark.parametrize("spellings", [("torch_dtype",), ("dtype",), ("dtype", "torch_dtype"), ()])
def test_every_spelling_of_the_dtype_is_updated(tmp_path: Path, spellings: tuple[str, ...]) -> None:
    hf = write_model(tmp_path / "hf", UNTIED)
    config = json.loads((hf / "config.json").read_text())
    del config["torch_dtype"]
    (hf / "config.json").write_text(json.dumps({**config, **dict.fromkeys(spellings, "float32")}))
    import_hf(hf, tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out", dtype="bfloat16")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported == {**config, **dict.fromkeys(spellings or ("torch_dtype",), "bfloat16")}


def test_weights_of_all_three_types(tmp_path: Path) -> None:
    weights = random_weights(UNTIED)
    for name in weights:
        weights[name] = weights[name].to(torch.float16 if "mlp" in name else torch.bfloat16)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    hf = write_model(tmp_path / "hf", UNTIED, weights, dtype=torch.bfloat16)
    assert import_hf(hf, tmp_path / "c").dtypes == ("bfloat16", "float16", "float32")
    export_hf(tmp_path / "c", tmp_path / "out")
    ours = read_weights(tmp_path / "out")
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "out"))
    assert before == after, "a file of several types keeps the type that its config names"
