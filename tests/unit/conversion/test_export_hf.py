from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.torch_dist_writer import object_record
from megatron_exact.model.hf_folder import hf_folder_of
from tests.unit.conversion.small_models import (
    LLAMA,
    QWEN,
    SHAPES,
    as_ranks,
    changed_checkpoint,
    flip_bit,
    random_weights,
    read_checkpoint,
    read_weights,
    write_checkpoint,
    write_model,
)

RUN = {
    "fingerprint": "f00d",
    "pack": "/somewhere/pack",
    "row_tokens": 4096,
    "weighting": {"rule": "exact", "parameters": {"alpha": 0.15}},
    "start_checkpoint": {"path": "/somewhere/start", "iteration": None, "sha256": "beef"},
    "seed": 7,
    "model": {"rotary_base": 500000, "layernorm_epsilon": 1e-5, "use_rope_scaling": True},
    "resumes": [],
}


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["import", "ranks"])
def test_round_trip_is_bitwise(tmp_path: Path, name: str, dtype: torch.dtype, layout: str) -> None:
    weights = random_weights(SHAPES[name], dtype)
    write_model(tmp_path / "hf", SHAPES[name], weights, dtype=dtype, num_files=2)
    import_hf(tmp_path / "hf", tmp_path / "c")
    checkpoint = tmp_path / "c"
    if layout == "ranks":
        checkpoint = changed_checkpoint(checkpoint, tmp_path / "ranks", lambda _: None, cut=as_ranks)
    summary = export_hf(checkpoint, tmp_path / "out")
    assert summary.files == ("model.safetensors",)
    assert summary.iteration is None
    found = read_weights(tmp_path / "out")
    assert set(found) == set(weights)
    for key, tensor in weights.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor), key
    ours, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "hf"))
    assert ours == theirs


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_opens_an_export(tmp_path: Path, name: str) -> None:
    import transformers

    weights = random_weights(SHAPES[name])
    import_hf(write_model(tmp_path / "hf", SHAPES[name], weights), tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out", shard_bytes=20_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[key]), key


@pytest.mark.parametrize("block_bytes", [1, 900])
def test_blocks_of_any_size_give_the_same_file(
    tmp_path: Path, imported: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    ranks = changed_checkpoint(imported, tmp_path / "ranks", lambda _: None, cut=as_ranks)
    export_hf(imported, tmp_path / "a")
    monkeypatch.setattr("megatron_exact.conversion.checkpoint_layout.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("megatron_exact.conversion.torch_dist_reader.BLOCK_BYTES", block_bytes)
    export_hf(ranks, tmp_path / "b")
    ours, theirs = ((tmp_path / f / "model.safetensors").read_bytes() for f in "ab")
    assert ours == theirs


def test_shards_and_index(tmp_path: Path, imported: Path) -> None:
    limit = 30_000
    summary = export_hf(imported, tmp_path / "out", shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weights = read_weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values()) == summary.num_bytes
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == set(summary.files)
    assert len(summary.files) > 2
    for file in summary.files:
        members = [name for name, place in index["weight_map"].items() if place == file]
        assert len(members) == 1 or sum(weights[name].nbytes for name in members) <= limit
    with pytest.raises(ValueError, match="has no room for a tensor"):
        export_hf(imported, tmp_path / "none", shard_bytes=0)


def test_dtype_and_config_follow(tmp_path: Path, imported: Path) -> None:
    export_hf(imported, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    original = read_weights(tmp_path / "hf")
    for name, tensor in read_weights(tmp_path / "out").items():
        assert torch.equal(tensor, original[name].bfloat16())


def make_run(tmp_path: Path, imported: Path, run: dict[str, Any] | None = None) -> Path:
    """A folder as training leaves it: iterations 3 and 6 with optimizer states, run.json, hf."""
    tensors = read_checkpoint(imported)
    objects = {
        key: object_record({"x": 1})
        for key in ("rng_state/shard_0.0_1.1", "rerun_state_machine_state/shard_0_1")
    }
    for iteration in (3, 6):
        scaled = {key: tensor * iteration for key, tensor in tensors.items()}
        moments = {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in tensors.items()}
        write_checkpoint(
            tmp_path / "run",
            {**scaled, **moments},
            LLAMA.num_layers,
            cut=lambda key, shape: as_ranks(key.removeprefix("optimizer.state.exp_avg."), shape),
            objects=objects,
            iteration=iteration,
        )
    shutil.copytree(hf_folder_of(imported), hf_folder_of(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text(json.dumps(RUN if run is None else run))
    return tmp_path / "run"


def test_a_run_is_exported_from_its_folder_alone(tmp_path: Path, imported: Path) -> None:
    run = make_run(tmp_path, imported)
    original = read_weights(tmp_path / "hf")
    shutil.rmtree(imported)
    for iteration, chosen in ((None, 6), (3, 3)):
        out = tmp_path / f"out{chosen}"
        assert export_hf(run, out, iteration=iteration).iteration == chosen
        for name, tensor in read_weights(out).items():
            assert torch.equal(tensor, original[name] * chosen), name
    summary = json.loads((tmp_path / "out6" / "megatron_exact.json").read_text())
    assert summary["iteration"] == 6
    assert summary["run"]["fingerprint"] == "f00d"
    assert summary["run"]["start_checkpoint"] == {"iteration": None, "sha256": "beef"}
    assert "somewhere" not in json.dumps(summary)
    card = (tmp_path / "out6" / "README.md").read_text()
    assert "exact (alpha 0.15)" in card
    assert "f00d" in card
    with pytest.raises(ValueError, match="contains no iter_0000004; there are iter_0000003, iter_0000006"):
        export_hf(run, tmp_path / "no", iteration=4)
    (run / "iter_0000003").rename(run / "iter_0000005")
    with pytest.raises(ValueError, match=r"iter_0000005 was renamed: its integrity.json says iteration 3"):
        export_hf(run, tmp_path / "no", iteration=5)
    assert not (tmp_path / "no").exists()


def test_licences_go_along_from_card_and_pack_to_record_and_card(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", LLAMA)
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    import_hf(folder, tmp_path / "c")
    corpora = [{"name": "web", "licence": "odc-by"}, {"name": "books", "licence": None}]
    export_hf(make_run(tmp_path, tmp_path / "c", {**RUN, "corpora": corpora}), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "megatron_exact.json").read_text())
    assert summary["import"]["licence"] == "llama3.1"
    assert summary["run"]["corpora"] == corpora
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| corpora (licence) | web (odc-by), books (unknown) |" in card
    assert "| licence of the imported model | llama3.1 |" in card


def test_other_rotary_frequencies_than_the_config_are_refused(tmp_path: Path, imported: Path) -> None:
    model = {**RUN["model"], "rotary_base": 1_000_000}  # type: ignore[dict-item]
    run = make_run(tmp_path, imported, {**RUN, "model": model})
    with pytest.raises(ValueError, match="rotary_base 1000000, but"):
        export_hf(run, tmp_path / "out")
    model = {**RUN["model"], "yarn": {"factor": 4.0}}  # type: ignore[dict-item]
    run = make_run(tmp_path / "yarn", imported, {**RUN, "model": model})
    with pytest.raises(ValueError, match=r"says yarn .'factor': 4.0., but .* means None"):
        export_hf(run, tmp_path / "out")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["decoder.layers.mlp.linear_fc2.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.layers.mlp.router.weight"] = torch.zeros(2, 4)


def pad(tensors: dict[str, torch.Tensor]) -> None:
    key = "embedding.word_embeddings.weight"
    tensors[key] = torch.cat([tensors[key], torch.zeros(58, tensors[key].shape[1])])


def integers(tensors: dict[str, torch.Tensor]) -> None:
    key = "decoder.final_layernorm.weight"
    tensors[key] = tensors[key].double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "lacks decoder.layers.mlp.linear_fc2.weight"),
        (add, "contains decoder.layers.mlp.router.weight, which"),
        (pad, r"embedding.word_embeddings.weight is \[128, 48\] where hf/config.json asks for \[70, 48\]"),
        (integers, "float64, which is not a dtype of weights"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, imported: Path, change: Any, message: str) -> None:
    bad = changed_checkpoint(imported, tmp_path / "bad", change)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        export_hf(bad, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_tied_and_untied_are_not_exchanged(tmp_path: Path) -> None:
    untied = dataclasses.replace(QWEN, tied_embeddings=False)
    import_hf(write_model(tmp_path / "tied", QWEN), tmp_path / "c")
    import_hf(write_model(tmp_path / "untied", untied), tmp_path / "c2")
    for one, other, message in (("c", "c2", "lacks output_layer"), ("c2", "c", "contains output_layer")):
        mixed = tmp_path / f"{one}-{other}"
        shutil.copytree(tmp_path / one, mixed)
        shutil.rmtree(mixed / "hf")
        shutil.copytree(tmp_path / other / "hf", mixed / "hf")
        with pytest.raises(ValueError, match=message):
            export_hf(mixed, tmp_path / "out")


def test_unknown_objects_and_damage_are_refused(tmp_path: Path, imported: Path) -> None:
    tensors = read_checkpoint(imported)
    strange = write_checkpoint(tmp_path / "s", tensors, 2, objects={"adapter/shard_0_1": object_record(1)})
    shutil.copytree(imported / "hf", strange / "hf")
    with pytest.raises(ValueError, match="contains adapter/shard_0_1"):
        export_hf(strange, tmp_path / "out")
    file = imported / "release" / "__0_0.distcp"
    needle = tensors["output_layer.weight"].numpy().tobytes()
    flip_bit(file, file.read_bytes().index(needle) + 100)
    with pytest.raises(ValueError, match="CRC-32 differs"):
        export_hf(imported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_checkpoint(tmp_path: Path, imported: Path) -> None:
    cases = [
        (tmp_path / "missing", "is not a folder"),
        (tmp_path / "hf", "contains no latest_checkpointed"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            export_hf(folder, tmp_path / "out")
    (imported / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(ValueError, match="'soon'"):
        export_hf(imported, tmp_path / "out")
    (imported / "latest_checkpointed_iteration.txt").write_text("release")
    shutil.rmtree(imported / "hf")
    with pytest.raises(ValueError, match=r"hf is not a folder.*import-hf"):
        export_hf(imported, tmp_path / "out")
