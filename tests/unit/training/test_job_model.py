"""Which model a job trains, and what is refused before Megatron is imported."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron_exact.data.manifest import DocumentTokens, TokenizerIdentity
from megatron_exact.data.tokenizers import tokenizer_sha256
from megatron_exact.model.families import (
    PRESETS,
    hf_config_of_shape,
    shape_of_hf_config,
    shape_of_megatron_arguments,
)
from megatron_exact.model.shapes import FIXED_ARGUMENTS, ModelShape, YarnScaling, megatron_arguments_of
from megatron_exact.training.job import JobModel, check_against_pack, choose_model, write_hf_folder
from megatron_exact.training.job_flags import require_ids_in_embedding
from megatron_exact.training.refusals import check_layers, check_layers_without_rope
from tests.unit.data.tiny_tokenizers import BEGIN, END, write_huggingface, write_sentencepiece

QWEN, LLAMA = PRESETS["qwen2.5-0.5b"], PRESETS["llama-3.2-1b"]


def model_of(shape: ModelShape) -> JobModel:
    return JobModel(shape=shape, source="base/hf/config.json", folder=None)


def checkpoint(folder: Path, shape: ModelShape, **tokenizer: str) -> Path:
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text(json.dumps(hf_config_of_shape(shape)))
    for name, text in tokenizer.items():
        (folder / "hf" / name.replace("_json", ".json")).write_text(text)
    return folder


def manifest(vocab_size: int = 100, sha256: str = "0" * 64) -> Any:
    identity = TokenizerIdentity(path="../tok", kind="huggingface", vocab_size=vocab_size, sha256=sha256)
    return SimpleNamespace(tokenizer=identity, row_tokens=64)


def namespace(shape: ModelShape, **changes: Any) -> Any:
    values = {
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_scaling_factor": 8.0,
        "post_norm": shape.post_norm,
        **FIXED_ARGUMENTS,
        **megatron_arguments_of(shape),
        **changes,
    }
    return SimpleNamespace(**values)


def test_missing_flags_are_filled_in_and_agreeing_ones_left_alone() -> None:
    flags = model_of(LLAMA).flags(
        [
            "--num-layers",
            "16",
            "--norm-epsilon=0.00001",
            "--rope-scaling-factor",
            "32",
            "--swiglu",
            "--lr",
            "1",
        ]
    )
    assert "--num-layers" not in flags
    assert "--norm-epsilon" not in flags
    assert "--rope-scaling-factor" not in flags
    assert "--swiglu" not in flags
    assert flags[flags.index("--hidden-size") + 1] == "2048"
    assert "--use-rope-scaling" in flags
    assert JobModel(shape=None, source="", folder=None).flags(["--num-layers", "3"]) == []


@pytest.mark.parametrize(
    ("shape", "argv", "words"),
    [
        (LLAMA, ["--num-layers", "17"], "--num-layers 17 is given but the model has 16"),
        (LLAMA, ["--num-layers=x"], "--num-layers x is given"),
        (LLAMA, ["--add-qkv-bias"], "--add-qkv-bias is given but the model has add_qkv_bias False"),
        (QWEN, ["--use-rope-scaling"], "--use-rope-scaling is given"),
        (QWEN, ["--untie-embeddings-and-output-weights"], "--untie-embeddings"),
        (LLAMA, ["--rope-scaling-factor", "8"], "--rope-scaling-factor 8 is given but the model has 32.0"),
        (LLAMA, ["--vocab-size", "128000"], "--vocab-size 128000"),
        (LLAMA, ["--normalization", "LayerNorm"], "--normalization LayerNorm"),
        (
            LLAMA,
            ["--hidden-size", "1", "--kv-channels", "2"],
            "--hidden-size 1 is given but the model has 2048; --kv-channels 2 is given but the model has "
            "64, says base/hf/config.json: drop these flags",
        ),
    ],
)
def test_contradicting_flags_are_named_one_by_one(shape: ModelShape, argv: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_of(shape).flags(argv)


def test_norms_after_the_layer_come_from_the_shape_or_the_option() -> None:
    assert model_of(PRESETS["olmo2-1b"]).post_norm(False)
    assert JobModel(shape=None, source="", folder=None).post_norm(True)
    assert not model_of(LLAMA).post_norm(False)
    with pytest.raises(ValueError, match=r"--post-norm is given but the model has none, says base/hf"):
        model_of(LLAMA).post_norm(True)


def test_norms_after_the_layer_have_layers_and_ranks_that_they_support() -> None:
    def check(ranks: int, *, post_norm: bool = True, layers: str = "local") -> None:
        sizes = {"group_query_attention": True, "num_query_groups": 2, "num_attention_heads": 8}
        sizes |= {"no_rope_freq": None, "num_layers": 2}
        check_layers(
            SimpleNamespace(
                post_norm=post_norm, transformer_impl=layers, tensor_model_parallel_size=ranks, **sizes
            )
        )

    check(2)
    check(4, post_norm=False, layers="transformer_engine")
    with pytest.raises(ValueError, match=r"Engine's layers: add --transformer-impl local"):
        check(2, layers="transformer_engine")
    # Megatron would give two ranks the same keys
    with pytest.raises(ValueError, match=r"-size 4 with 2 key/value groups .* choose at most 2"):
        check(4)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (2, ""),
        ([0, 1, 1, 0], ""),
        (None, ""),
        (3, "--no-rope-freq 3 does not divide the 4 layers of the model: give one of 1, 2, 4, or a list"),
        (0, "--no-rope-freq 0 does not divide the 4 layers"),
        (-2, "--no-rope-freq -2 does not divide the 4 layers"),
        ([0, 1], "--no-rope-freq .0, 1. with 2 entries does not describe the 4 layers"),
        ([0, 1, 2, 0], "--no-rope-freq .0, 1, 2, 0. with 4 entries does not describe"),
        ([], "--no-rope-freq .. with 0 entries does not describe"),
    ],
)
def test_layers_without_rotary_embedding_are_those_of_the_model(pattern: Any, words: str) -> None:
    args = SimpleNamespace(no_rope_freq=pattern, num_layers=4)
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        check_layers_without_rope(args)


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_survives_megatrons_arguments(name: str) -> None:
    assert shape_of_megatron_arguments(namespace(PRESETS[name]), like=PRESETS[name]) == PRESETS[name]
    model_of(PRESETS[name]).check_arguments(namespace(PRESETS[name], max_position_embeddings=2**20))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved is True, expected False"),
        ({"num_layers": 5}, "num_layers is 5, expected 16"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling.factor is 8.0, expected 32.0"),
        ({"layernorm_epsilon": 1e-6}, "norm_epsilon is 1e-06, expected 1e-05"),
        ({"group_query_attention": False}, "num_query_groups is 32, expected 8"),
        ({"qk_layernorm": True, "post_norm": True}, "is olmo2, .* qk_norm is True, .* post_norm is True"),
        ({"post_norm": True}, "no supported model family has .* and post_norm True"),
        (
            {"no_rope_freq": 4},
            "architecture is smollm3, expected llama; layers_without_rope is .3, 7, 11, 15.",
        ),
        ({"rotary_percent": 0.5}, "no supported model family has .* and rotary_percent 0.5"),
        ({"qk_layernorm": True}, "architecture is qwen3, expected llama; qk_norm is True, expected False"),
    ],
)
def test_whatever_megatron_parsed_is_compared(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_of(LLAMA).check_arguments(namespace(LLAMA, **changes))


def test_a_model_that_megatron_builds_like_another_keeps_its_family() -> None:
    mistral = replace(LLAMA, architecture="mistral", rope_scaling=None)
    model_of(mistral).check_arguments(namespace(mistral))
    assert shape_of_megatron_arguments(namespace(mistral)).architecture == "llama"
    with pytest.raises(ValueError, match=r"hidden_size is 64, expected 2048$"):
        model_of(mistral).check_arguments(namespace(mistral, hidden_size=64))


def test_fixed_arguments_are_upstreams_names_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["job"])
    defaults = parse_args()
    needs_a_flag = {"normalization", "swiglu", "add_bias_linear", "position_embedding_type"}
    differs = {name for name, value in FIXED_ARGUMENTS.items() if getattr(defaults, name) != value}
    assert differs == needs_a_flag


def test_the_shape_comes_from_the_checkpoint_or_the_preset(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", QWEN)
    model = choose_model(None, base, str(tmp_path / "run"))
    assert model.shape == QWEN
    assert model.description == f"the model is that of {base / 'hf' / 'config.json'} (qwen2.5-0.5b)"
    assert choose_model("qwen2.5-0.5b", base, None).folder is not None
    assert choose_model("llama-3.2-1b", None, None).shape == LLAMA
    assert choose_model(None, None, None).shape is None
    assert choose_model(None, tmp_path / "without", None).description is None
    with pytest.raises(
        ValueError, match=r"is not --preset qwen2.5-3b: num_layers is 24, expected 36; hidden"
    ):
        choose_model("qwen2.5-3b", base, None)
    with pytest.raises(ValueError, match="preset 'gpt' is unknown"):
        choose_model("gpt", None, None)
    other = checkpoint(tmp_path / "other", LLAMA)
    with pytest.raises(ValueError, match="describes another model"):
        choose_model(None, base, str(other))


def test_one_option_changes_the_rotary_base(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", QWEN)
    model = choose_model("qwen2.5-0.5b", base, str(tmp_path / "run"), rotary_base=8_000_000)
    assert model.shape == replace(QWEN, rope_theta=8e6)
    assert model.changes == {"rope_theta": {"from": 1e6, "to": 8e6}}
    assert "with rope_theta 8000000.0 instead of 1000000.0" in (model.description or "")
    flags = model.flags(["--rotary-base", "8000000"])
    assert "--rotary-base" not in flags
    with pytest.raises(ValueError, match=r"given but the model has 8000000.*--change-rotary-base 1000000$"):
        model.flags(["--rotary-base", "1000000"])
    with pytest.raises(ValueError, match=r"but the model has 24, .* drop these flags$"):
        model.flags(["--num-layers", "23"])
    # of a preset, and of a model that has the base already
    assert choose_model("qwen2.5-0.5b", None, None, rotary_base=8_000_000).shape == model.shape
    same = choose_model(None, base, None, rotary_base=1_000_000)
    assert (same.shape, same.changes) == (QWEN, {})
    with pytest.raises(ValueError, match="but flags alone describe this one: give --rotary-base"):
        choose_model(None, None, None, rotary_base=8_000_000)
    # a later stage of a recipe, and a run that was begun with the other base
    other = checkpoint(tmp_path / "other", replace(QWEN, rope_theta=8e6))
    with pytest.raises(
        ValueError, match=r"expected 1000000.0; to keep it, add --change-rotary-base 8000000$"
    ):
        choose_model("qwen2.5-0.5b", other, None)
    assert choose_model("qwen2.5-0.5b", other, None, rotary_base=8_000_000).changes == {}
    with pytest.raises(ValueError, match=r"expected 36; hidden_size is [^-]*$"):
        choose_model("qwen2.5-3b", other, None, rotary_base=8_000_000)
    with pytest.raises(ValueError, match=r"rope_theta is 8000000.0, expected 1000000.0; choose another"):
        choose_model(None, base, str(other))


def test_one_option_changes_the_scaling_to_yarn(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", QWEN)
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=32_768)
    model = choose_model("qwen2.5-0.5b", base, None, yarn="4,32768")
    assert model.shape == replace(QWEN, rope_scaling=yarn)
    assert model.yarn == yarn
    assert model.changes == {"rope_scaling": {"from": None, "to": asdict(yarn)}}
    assert "--use-rope-scaling" not in model.flags([])
    # the window alone says nothing about the weights; of the namespace `yarn` counts
    model.check_arguments(namespace(QWEN, yarn=asdict(yarn)))
    with pytest.raises(ValueError, match=r"rope_scaling.factor is None, expected 4.0"):
        model.check_arguments(namespace(QWEN))
    other = checkpoint(tmp_path / "other", replace(QWEN, rope_scaling=yarn))
    assert choose_model(None, other, None, yarn="4,32768").changes == {}
    assert choose_model(None, other, None, yarn="8,32768").changes["rope_scaling"]["from"] == asdict(yarn)
    with pytest.raises(ValueError, match=r"; to keep it, add --change-rope-yarn 4,32768$"):
        choose_model("qwen2.5-0.5b", other, None)
    with pytest.raises(ValueError, match=r"would replace Llama 3's scaling, says --preset llama-3.2-1b"):
        choose_model("llama-3.2-1b", None, None, yarn="4,8192")
    with pytest.raises(ValueError, match=r"^--change-rope-yarn 4,8192: rope_type yarn is not supported"):
        choose_model("smollm3-3b", None, None, yarn="4,8192")
    with pytest.raises(ValueError, match=r"^--change-rope-yarn changes the model of a checkpoint"):
        choose_model(None, None, None, yarn="4,8192")
    with pytest.raises(
        ValueError, match=r"ORIGINAL is the window .* max_position_embeddings 32768: give that or less"
    ):
        choose_model("qwen2.5-0.5b", None, None, yarn="4,32769")


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_with_yarn_is_read_again_or_refused_at_once(name: str) -> None:
    """A config.json that this package wrote and cannot read would end the run at its first resume."""
    if PRESETS[name].architecture in ("phi3", "smollm3"):
        with pytest.raises(
            ValueError, match=r"^--change-rope-yarn 2.3456789,2048: .*yarn is not supported"
        ):
            choose_model(name, None, None, yarn="2.3456789,2048")
        return
    if PRESETS[name].rope_scaling is not None:
        with pytest.raises(ValueError, match="would replace Llama 3's scaling"):
            choose_model(name, None, None, yarn="2.3456789,2048")
        return
    shape = choose_model(name, None, None, yarn="2.3456789,2048").shape
    assert shape is not None
    assert shape_of_hf_config(hf_config_of_shape(shape), "config.json") == shape


def test_an_option_is_proposed_only_where_it_keeps_the_model(tmp_path: Path) -> None:
    exact = YarnScaling(factor=2.3456789, original_max_position_embeddings=8192)
    for number, (name, scaling) in enumerate(
        [
            ("qwen2.5-0.5b", exact),
            ("qwen2.5-0.5b", replace(exact, beta_fast=16.0)),
            ("llama-3.2-1b", exact),  # the option does not replace Llama 3's scaling
            ("llama-3.2-1b", None),
        ]
    ):
        start = checkpoint(tmp_path / f"{number}", replace(PRESETS[name], rope_scaling=scaling))
        with pytest.raises(ValueError, match="; to keep it, ") as caught:
            choose_model(name, start, None)
        remedy = str(caught.value).rpartition("; to keep it, ")[2]
        if number:
            assert remedy == "leave --preset out"
            assert choose_model(None, start, None).shape is not None
        else:
            assert remedy == "add --change-rope-yarn 2.3456789,8192"
            kept = choose_model(name, start, None, yarn=remedy.split()[-1])
            assert kept.shape is not None
            assert (kept.shape.rope_scaling, kept.changes) == (exact, {})


def test_ids_beyond_the_embedding_are_refused() -> None:
    small = replace(QWEN, vocab_size=99)
    assert check_against_pack(model_of(QWEN), manifest()) == []
    with pytest.raises(
        ValueError, match=r"has 100 ids but base/hf/config\.json has an embedding of 99 rows"
    ):
        check_against_pack(model_of(small), manifest())
    nameless: Any = SimpleNamespace(tokenizer=None, row_tokens=64)
    assert "names no tokenizer" in str(check_against_pack(model_of(small), nameless))


def test_the_packs_tokenizer_is_the_models(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", QWEN, tokenizer_json="{}", tokenizer_config_json="{}")
    (base / "hf" / "chat_template.jinja").write_text("changes no token")
    model = choose_model(None, base, None)
    # tokenized with the folder, or with the file in it
    for path in (base / "hf", base / "hf" / "tokenizer.json"):
        assert check_against_pack(model, manifest(sha256=tokenizer_sha256(path))) == []
    with pytest.raises(ValueError, match=r"tokenized with ../tok .*not the tokenizer in .*hf"):
        check_against_pack(model, manifest())
    bare = choose_model(None, checkpoint(tmp_path / "bare", QWEN), None)
    assert "contains no tokenizer" in str(check_against_pack(bare, manifest()))


def test_a_run_gets_a_config_and_the_packs_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    pack: Any = SimpleNamespace(tokenizer_path=lambda pack: file, supervision=None, document_tokens=None)
    args = namespace(LLAMA, save=str(tmp_path / "run"), pack="pack", bf16=True, fp16=False)
    nothing = JobModel(shape=None, source="", folder=None)
    assert write_hf_folder(nothing, args, pack) is None
    assert choose_model(None, tmp_path / "run", None).shape == LLAMA
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "run" / "hf" / "tokenizer.json").read_text() == "{}"
    args = namespace(
        LLAMA, save=str(tmp_path / "normed"), pack="pack", bf16=True, fp16=False, qk_layernorm=True
    )
    assert write_hf_folder(nothing, args, pack) is None
    normed = replace(LLAMA, architecture="qwen3", qk_norm=True)
    assert choose_model(None, tmp_path / "normed", None).shape == normed
    args = namespace(
        LLAMA, save=str(tmp_path / "both"), pack="pack", bf16=True, add_qkv_bias=True, qk_layernorm=True
    )
    assert "no supported model family has add_qkv_bias True and qk_layernorm True" in str(
        write_hf_folder(nothing, args, pack)
    )
    args = namespace(LLAMA, save=str(tmp_path / "strange"), pack="pack", bf16=True, rotary_interleaved=True)
    assert "cannot be exported" in str(write_hf_folder(nothing, args, pack))
    assert not (tmp_path / "strange").exists()
    assert write_hf_folder(nothing, SimpleNamespace(save=None), pack) is None


def test_rows_beyond_the_promised_window_are_said() -> None:
    long: Any = SimpleNamespace(tokenizer=manifest().tokenizer, row_tokens=65_536)
    (doubt,) = check_against_pack(model_of(QWEN), long)
    assert "rows of 65536 tokens are longer than the window of 32768" in doubt
    # YaRN's window counts instead, whichever is the longer one
    wide = replace(QWEN, rope_scaling=YarnScaling(factor=2.0, original_max_position_embeddings=32_768))
    assert check_against_pack(model_of(wide), long) == []
    narrow = replace(wide, rope_scaling=YarnScaling(factor=2.0, original_max_position_embeddings=8192))
    short: Any = SimpleNamespace(tokenizer=manifest().tokenizer, row_tokens=16_385)
    (doubt,) = check_against_pack(model_of(narrow), short)
    assert "rows of 16385 tokens are longer than the 16384 (FACTOR times ORIGINAL)" in doubt


def ends_of(folder: Path) -> dict[str, Any]:
    """What transformers makes of the end of a text, from each file of a folder."""
    config = AutoConfig.from_pretrained(folder)
    return {
        "config": config.eos_token_id,
        "bos": config.bos_token_id,
        "generation": GenerationConfig.from_pretrained(folder).eos_token_id,
        "tokenizer": AutoTokenizer.from_pretrained(folder).eos_token_id,
    }


@pytest.mark.parametrize("kind", ["file", "folder", "model"])
def test_a_run_names_the_end_of_its_documents(tmp_path: Path, kind: str) -> None:
    """From a bare tokenizer.json, a folder without eos, and a SentencePiece model."""
    if kind == "model":
        path = write_sentencepiece(tmp_path / "tiny.model")
        tokens = DocumentTokens(prefix_ids=(1,), eod_id=2, eod_token="</s>")
    else:
        folder = write_huggingface(tmp_path / "tok", eos=None)
        path = folder / "tokenizer.json" if kind == "file" else folder
        tokens = DocumentTokens(prefix_ids=(0,), eod_id=1, eod_token=END)
    pack: Any = SimpleNamespace(tokenizer_path=lambda pack: path, supervision=None, document_tokens=tokens)
    args = namespace(LLAMA, save=str(tmp_path / "run"), pack="pack", bf16=True, fp16=False)
    write_hf_folder(JobModel(shape=None, source="", folder=None), args, pack)
    hf = tmp_path / "run" / "hf"
    end, begin = tokens.eod_id, tokens.prefix_ids[0]
    assert ends_of(hf) == {"config": end, "bos": begin, "generation": end, "tokenizer": end}
    loaded = AutoTokenizer.from_pretrained(hf)
    assert loaded.encode("The quick fox reads")[0] == begin
    before = {file.name: file.read_bytes() for file in hf.iterdir()}
    write_hf_folder(JobModel(shape=None, source="", folder=None), args, pack)  # a resumed run
    assert {file.name: file.read_bytes() for file in hf.iterdir()} == before


def test_the_ends_that_a_model_had_stay_beside_the_one_of_its_corpus(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", LLAMA)
    hf = base / "hf"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = tmp_path / "tok" / name
        if not source.exists():
            write_huggingface(tmp_path / "tok", eos=BEGIN)
        (hf / name).write_bytes(source.read_bytes())
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "eos_token_id": 0, "bos_token_id": None}))
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "top_p": 0.5}))
    model = choose_model(None, base, None)
    tokens = DocumentTokens(prefix_ids=(), eod_id=1, eod_token=END)
    pack: Any = SimpleNamespace(tokenizer_path=lambda pack: hf, supervision=None, document_tokens=tokens)
    write_hf_folder(model, SimpleNamespace(save=str(tmp_path / "run"), pack="pack"), pack)
    found = ends_of(tmp_path / "run" / "hf")
    assert found == {"config": [1, 0], "bos": None, "generation": [1, 0, 5], "tokenizer": 1}
    assert json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text())["top_p"] == 0.5
    assert ends_of(hf)["config"] == 0  # the import stays as it was


def test_ids_without_a_row_are_named() -> None:
    pack: Any = SimpleNamespace(
        sources=[SimpleNamespace(prefix="a", largest_id=None), SimpleNamespace(prefix="b", largest_id=99)]
    )
    require_ids_in_embedding(pack, 100, "the model")
    with pytest.raises(ValueError, match=r"corpus b .* token id 99, but the embedding of .* has 99 rows"):
        require_ids_in_embedding(pack, 99, "the model")
