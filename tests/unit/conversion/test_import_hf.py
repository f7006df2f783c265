from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_exact.command_line import describe
from megatron_exact.conversion.checkpoint_layout import names_of
from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.model.families import PRESETS, family_of
from megatron_exact.model.hf_folder import (
    CARRIED_FILES,
    copy_hf_folder,
    has_hf_folder,
    hf_folder_of,
    read_hf_folder,
)
from megatron_exact.tokenizer_files import TOKENIZER_FILES
from tests import forked
from tests.unit.conversion.small_models import (
    LLAMA,
    QWEN,
    SHAPES,
    random_weights,
    read_checkpoint,
    write_model,
)
from tests.unit.data.tiny_tokenizers import END, train_bpe, write_huggingface


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_files", [1, 4])
def test_every_element_stands_where_megatron_wants_it(tmp_path: Path, name: str, num_files: int) -> None:
    shape = SHAPES[name]
    weights = random_weights(shape)
    write_model(tmp_path / "hf", shape, weights, num_files=num_files)
    summary = import_hf(tmp_path / "hf", tmp_path / "c")
    tensors = read_checkpoint(tmp_path / "c")
    assert set(tensors) == {line.megatron for line in names_of(shape)}
    assert summary.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert summary.dtypes == ("float32",)
    heads, groups, dim = shape.num_attention_heads, shape.num_query_groups, shape.head_dim
    for layer in range(shape.num_layers):
        hf = f"model.layers.{layer}."
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            if family_of(shape).names.query_key_value is None:
                q, k, v = (weights[f"{hf}self_attn.{x}_proj.{kind}"] for x in "qkv")
            else:
                sizes = [count * dim for count in (heads, groups, groups)]
                q, k, v = weights[f"{hf}self_attn.qkv_proj.{kind}"].split(sizes)
            fused = tensors[f"decoder.layers.self_attention.linear_qkv.{kind}"][layer]
            q, k, v = (
                q.view(groups, heads // groups, dim, -1),
                k.view(groups, dim, -1),
                v.view(groups, dim, -1),
            )
            fused = fused.view(groups, heads // groups + 2, dim, -1)
            assert torch.equal(fused[:, :-2], q)
            assert torch.equal(fused[:, -2], k)
            assert torch.equal(fused[:, -1], v)
        gate, up = tensors["decoder.layers.mlp.linear_fc1.weight"][layer].chunk(2)
        if family_of(shape).names.gate_up is None:
            assert torch.equal(gate, weights[hf + "mlp.gate_proj.weight"])
            assert torch.equal(up, weights[hf + "mlp.up_proj.weight"])
    for line in names_of(shape):
        if len(line.parts) == 1 and line.fusion == "stacked":
            parts = [
                weights[line.parts[0].name.format(layer=layer)]
                for layer in (range(shape.num_layers) if line.per_layer else (None,))
            ]
            expected = torch.stack(parts) if line.per_layer else parts[0]
            assert torch.equal(tensors[line.megatron], expected), line.megatron


@pytest.mark.parametrize("block_bytes", [1, 700, 5000])
def test_blocks_of_any_size_give_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    write_model(tmp_path / "hf", QWEN)
    import_hf(tmp_path / "hf", tmp_path / "whole")
    monkeypatch.setattr("megatron_exact.conversion.checkpoint_layout.BLOCK_BYTES", block_bytes)
    import_hf(tmp_path / "hf", tmp_path / "cut")
    whole, cut = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_dtypes(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    write_model(tmp_path / "hf", LLAMA, weights)
    import_hf(tmp_path / "hf", tmp_path / "half", dtype="bfloat16")
    half = read_checkpoint(tmp_path / "half")
    assert torch.equal(
        half["embedding.word_embeddings.weight"], weights["model.embed_tokens.weight"].bfloat16()
    )
    write_model(tmp_path / "hf16", LLAMA, dtype=torch.bfloat16)
    import_hf(tmp_path / "hf16", tmp_path / "full", dtype="float32")
    full = read_checkpoint(tmp_path / "full")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(full[key], half[key].float()) for key in half)
    mixed = {**weights, "model.norm.weight": weights["model.norm.weight"].bfloat16()}
    write_model(tmp_path / "mixed", LLAMA, mixed)
    import_hf(tmp_path / "mixed", tmp_path / "kept")
    assert read_checkpoint(tmp_path / "kept")["decoder.final_layernorm.weight"].dtype == torch.bfloat16
    name = "model.layers.1.self_attn.k_proj.weight"
    write_model(tmp_path / "torn", LLAMA, {**weights, name: weights[name].bfloat16()})
    with pytest.raises(ValueError, match="bfloat16 and float32, but it can have only one dtype"):
        import_hf(tmp_path / "torn", tmp_path / "no")
    import_hf(tmp_path / "torn", tmp_path / "yes", dtype="float32")


def test_the_folder_of_an_import(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", LLAMA)
    for name in ("generation_config.json", "tokenizer.json", "LICENSE"):
        (hf / name).write_text('{"a": 1}')
    (hf / "modeling_custom.py").write_text("raise SystemExit")
    assert import_hf(hf, tmp_path / "c").has_tokenizer
    assert names(tmp_path / "c") == ["hf", "latest_checkpointed_iteration.txt", "release"]
    assert (tmp_path / "c" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert names(tmp_path / "c" / "hf") == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "megatron_exact_import.json",
        "tokenizer.json",
    ]
    folder = read_hf_folder(hf_folder_of(tmp_path / "c"))
    assert folder.shape == LLAMA
    assert folder.import_record is not None
    assert folder.import_record["dtypes"]["output_layer.weight"] == "float32"
    assert (folder.path / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert str(tmp_path) not in json.dumps(folder.import_record)


def test_hf_folders_are_copied_whole_and_never_mixed(tmp_path: Path) -> None:
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c")
    import_hf(write_model(tmp_path / "hf2", QWEN), tmp_path / "c2")
    run = tmp_path / "runs" / "a"
    assert not has_hf_folder(run)
    assert copy_hf_folder(tmp_path / "c", run) == run / "hf"
    assert names(run / "hf") == names(tmp_path / "c" / "hf")
    assert copy_hf_folder(tmp_path / "c", run) == run / "hf"
    assert copy_hf_folder(run, run) == run / "hf"
    with pytest.raises(ValueError, match="belongs to another model"):
        copy_hf_folder(tmp_path / "c2", run)
    assert copy_hf_folder(tmp_path / "hf", tmp_path / "other") is None


def test_every_file_that_can_change_a_token_is_carried() -> None:
    assert set(TOKENIZER_FILES) <= set(CARRIED_FILES)


def refused(tmp_path: Path, hf: Path, message: str) -> None:
    before = names(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        import_hf(hf, tmp_path / "out" / "c")
    assert "\n" not in str(error.value)
    assert names(tmp_path) == before


def test_missing_unused_and_misshapen_tensors(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    hf = write_model(tmp_path / "a", LLAMA, {key: weights[key] for key in weights if key != name})
    refused(tmp_path, hf, f"lacks {name}")
    hf = write_model(
        tmp_path / "b", LLAMA, {**weights, "model.extra": weights["model.norm.weight"].clone()}
    )
    refused(tmp_path, hf, "contains model.extra, which its config has no place for")
    hf = write_model(tmp_path / "c", LLAMA, {**weights, name: weights[name][1:].contiguous()})
    refused(tmp_path, hf, rf"{name} is \[55, 48\] where config.json asks for \[56, 48\]")
    hf = write_model(tmp_path / "d", LLAMA, {**weights, name: weights[name].to(torch.int8)})
    refused(tmp_path, hf, "quantized")
    (hf / "config.json").unlink()
    refused(tmp_path, hf, "contains no config.json")
    (hf / "config.json").write_text('{"model_type": "mamba"}')
    refused(tmp_path, hf, "mamba")
    (hf / "config.json").write_bytes(b" " * (5 << 20))
    refused(tmp_path, hf, "more than the 4,194,304 that are read")


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path: Path) -> None:
    weights = random_weights(QWEN)
    head = weights["model.embed_tokens.weight"].clone()
    hf = write_model(tmp_path / "same", QWEN, {**weights, "lm_head.weight": head})
    import_hf(hf, tmp_path / "c")
    assert "output_layer.weight" not in read_checkpoint(tmp_path / "c")
    changed = head.clone()
    changed[3, 3] += 1
    hf = write_model(tmp_path / "other", QWEN, {**weights, "lm_head.weight": changed})
    refused(tmp_path, hf, "ties the output layer")
    hf = write_model(tmp_path / "half", QWEN, {**weights, "lm_head.weight": head.half()})
    refused(tmp_path, hf, "ties the output layer")


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", LLAMA)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").touch()
    with pytest.raises(ValueError, match="exists already"):
        import_hf(hf, tmp_path / "c")
    assert names(tmp_path / "c") == ["x"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_model(tmp_path / "hf", LLAMA)
    stock, calls = os.preadv, []

    def fail_later(*arguments: object) -> int:
        calls.append(1)
        if len(calls) == 12:
            raise OSError(5, "Input/output error")
        return stock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("os.preadv", fail_later)
    with pytest.raises(OSError, match="Input/output"):
        import_hf(hf, tmp_path / "c")
    assert names(tmp_path) == ["hf"]
    import_hf(hf, tmp_path / "c")
    assert set(read_checkpoint(tmp_path / "c")) == {name.megatron for name in names_of(LLAMA)}


def test_a_full_disk_is_reported_with_the_output_that_found_no_room(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does: in `write`, whose error names no file."""
    hf, checkpoint, exported = (tmp_path / name for name in ("hf", "c", "out"))
    write_model(hf, LLAMA)

    def convert_twice() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for convert, source, target in ((import_hf, hf, checkpoint), (export_hf, checkpoint, exported)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            with pytest.raises(OSError, match="too large") as failed:
                convert(source, target)
            print(describe(failed.value))
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            convert(source, target)

    output, errors = tmp_path / "output.txt", tmp_path / "errors.txt"
    assert forked.wait(forked.start(convert_twice, output, errors)) == 0, errors.read_text()
    assert output.read_text().splitlines() == [
        f"{checkpoint}: File too large",
        f"{exported}: File too large",
    ]
    assert names(tmp_path) == ["c", "errors.txt", "hf", "out", "output.txt"]


def test_a_folder_that_is_not_the_named_preset_is_refused_field_by_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "hf", LLAMA, random_weights(LLAMA))
    monkeypatch.setitem(PRESETS, "small", LLAMA)
    assert import_hf(tmp_path / "hf", tmp_path / "a", preset_name="small").nearly is None
    other = replace(LLAMA, rope_theta=10_000.0, tied_embeddings=True)
    monkeypatch.setitem(PRESETS, "small", other)
    with pytest.raises(
        ValueError, match=r"rope_theta is 500000.0, expected 10000.0; tied_embeddings is False"
    ):
        import_hf(tmp_path / "hf", tmp_path / "b", preset_name="small")
    assert names(tmp_path) == ["a", "hf"]
    name, differences = import_hf(tmp_path / "hf", tmp_path / "b").nearly or ("", [])
    assert name == "small"
    assert len(differences) == 2
    with pytest.raises(ValueError, match="'nobody' is unknown: choose one of"):
        import_hf(tmp_path / "hf", tmp_path / "c", preset_name="nobody")


def test_a_preset_may_have_a_longer_window_but_no_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export promises the rows of its training; nothing that the model computes depends on it."""
    monkeypatch.setitem(PRESETS, "small", LLAMA)
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c", preset_name="small")
    window = 2 * LLAMA.max_position_embeddings
    export_hf(tmp_path / "c", tmp_path / "long", window=window)
    found = import_hf(tmp_path / "long", tmp_path / "again", preset_name="small")
    assert found.shape == replace(LLAMA, max_position_embeddings=window)
    assert (found.preset, found.nearly) == ("small", None)
    assert read_hf_folder(hf_folder_of(tmp_path / "again")).shape == found.shape
    export_hf(tmp_path / "c", tmp_path / "short", window=LLAMA.max_position_embeddings - 1)
    with pytest.raises(ValueError, match="is not small: max_position_embeddings is 32767, expected 32768"):
        import_hf(tmp_path / "short", tmp_path / "no", preset_name="small")


def test_a_tokenizer_with_ids_that_have_no_row_is_refused(tmp_path: Path) -> None:
    """Both numbers and the first such id; files that name the tokens differ."""
    tokenizer = write_huggingface(tmp_path / "tok")
    ids = train_bpe().get_vocab_size()
    for rows in (ids - 1, ids, ids + 5):
        shape = replace(LLAMA, vocab_size=rows)
        hf = write_model(tmp_path / f"hf{rows}", shape)
        for file in tokenizer.iterdir():
            (hf / file.name).write_bytes(file.read_bytes())
        if rows < ids:
            match = rf"the tokenizer has {ids} ids but the embedding {rows} rows, and {rows} \("
            with pytest.raises(ValueError, match=match):
                import_hf(hf, tmp_path / "refused")
            assert not (tmp_path / "refused").exists()
            continue
        assert import_hf(hf, tmp_path / f"ok{rows}").warnings == ()
        decoder = {str(rows): {"content": "<|tool|>", "special": True}}
        config = json.loads((hf / "tokenizer_config.json").read_text())
        (hf / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
        if rows == ids:  # a token that only the config declares
            with pytest.raises(ValueError, match=rf"{rows} \('<\|tool\|>'\) is the first id without one"):
                import_hf(hf, tmp_path / "refused")
    legacy = write_model(tmp_path / "legacy", replace(LLAMA, vocab_size=30))
    (legacy / "vocab.json").write_text(json.dumps({f"t{number}": number for number in range(31)}))
    with pytest.raises(ValueError, match=r"31 ids but the embedding 30 rows, and 30 \('t30'\)"):
        import_hf(legacy, tmp_path / "refused")


def test_an_end_that_nobody_names_or_two_name_differently_is_said(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", replace(LLAMA, vocab_size=400))
    for file in write_huggingface(tmp_path / "tok", eos=None).iterdir():
        (hf / file.name).write_bytes(file.read_bytes())
    (said,) = import_hf(hf, tmp_path / "none").warnings
    assert "neither the tokenizer nor config.json names a token that ends a text" in said
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    assert import_hf(hf, tmp_path / "config").warnings == ()
    named = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps({**named, "eos_token": END}))
    (said,) = import_hf(hf, tmp_path / "both").warnings
    assert "ends with 1 (<|end|>), the tokenizer's eos, but config.json names 0 (<|begin|>)" in said
