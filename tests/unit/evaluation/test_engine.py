"""The model and how it is run: backend, dtype, device and tokenizer are settled before it is loaded."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from tokenizers import Tokenizer, pre_tokenizers

from megatron_exact.data.tokenizers import tokenizer_sha256
from megatron_exact.evaluation import engine
from megatron_exact.evaluation.engine import (
    GREEDY,
    Backend,
    ResolvedBackend,
    existing_device,
    installed_versions,
    load_model,
    load_tokenizer,
    require_eos,
    resolve,
    stored_dtype,
)
from megatron_exact.evaluation.prompts import Template
from tests.unit.data.tiny_tokenizers import END, write_huggingface

VLLM = {"torch": "2", "transformers": "5", "vllm": "1"}


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32"}, "float32"),
    ],
)
def test_auto_is_what_the_config_names(tmp_path: Path, config: dict[str, str], dtype: str) -> None:
    write_config(tmp_path, **config)
    assert resolve(Backend(device="cpu"), tmp_path).dtype == dtype
    assert resolve(Backend(device="cpu", dtype="float32"), tmp_path).dtype == "float32"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_name_auto_is_the_type_of_the_weights(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {"a.count": torch.zeros(1, dtype=torch.int64), "b.weight": torch.zeros(2, dtype=kind)}
    save_tensors(tensors, write_config(tmp_path) / "model.safetensors", metadata={"format": "pt"})
    assert f"torch.{stored_dtype(tmp_path)}" == str(kind)


def test_types_that_nothing_runs_in_are_refused(tmp_path: Path) -> None:
    import numpy as np

    write_config(tmp_path, dtype="float64")
    with pytest.raises(ValueError, match="is stored as float64: choose --dtype float32, bfloat16"):
        stored_dtype(tmp_path)
    save_file({"a": np.zeros(2, dtype=np.int64)}, write_config(tmp_path) / "model.safetensors")
    with pytest.raises(ValueError, match="is stored as no floating-point type"):
        stored_dtype(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]")
    with pytest.raises(ValueError, match=r"the header of .* contains a list"):
        stored_dtype(tmp_path)


@pytest.mark.parametrize(
    ("name", "count", "device"),
    [
        (None, 0, "cpu"),
        (None, 2, "cuda"),
        ("cpu:0", 0, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_devices_that_are_there(
    name: str | None, count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert existing_device(name) == device


def test_a_gpu_that_a_process_was_given_and_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Process 7 of a node with four GPUs would otherwise run on the CPU, for days."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for visible in ("", "-1", " ", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert existing_device(None) == "cpu"
    for visible in ("7", "GPU-8a1b", "4,5", "0,-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ValueError, match=f"is {visible}, but torch finds no such GPU: .*--device cpu"):
            existing_device(None)
        assert existing_device("cpu") == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert existing_device(None) == "cuda"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "--device cuda:2: torch finds 2 of these devices here, counted from 0: name one"),
        ("gpu", "--device gpu is not a device: give cpu, cuda or cuda:0"),
        ("meta", "--device meta: torch finds none of these devices here"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        existing_device(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mlx"}, "choose hf or vllm"),
        ({"dtype": "foo"}, "choose one of auto, float32, bfloat16, float16"),
        ({"tensor_parallel": 2}, "--tensor-parallel is for --backend vllm"),
        ({"name": "vllm", "device": "cuda:0"}, "set CUDA_VISIBLE_DEVICES"),
        ({"name": "vllm", "shares_prefixes": False}, "--no-shared-prefixes has no effect on vllm"),
        ({"name": "vllm", "batch_size": 4}, "--batch-size has no effect on vllm"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backend(**options)


def test_an_engine_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "vllm":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(engine, "version", version)
    assert installed_versions("hf") == {"torch": "1", "transformers": "1"}
    with pytest.raises(ValueError, match="vllm is not installed: install it, or take --backend hf"):
        installed_versions("vllm")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What lm-eval's class for vLLM is made with: a stand-in, since vLLM needs a GPU."""
    made: list[dict[str, Any]] = []

    class StandIn:
        def __init__(self, **options: Any) -> None:
            made.append(options)
            self.tokenizer = SimpleNamespace(chat_template="its own")
            self.hf_chat_template = "its own"

    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0")
    return made


def load_by_vllm(model: Path, template: Template, window: int) -> Any:
    how = ResolvedBackend(
        shares_prefixes=True,
        name="vllm",
        dtype="bfloat16",
        device=None,
        batch_size=1,
        tensor_parallel=4,
        versions=VLLM,
    )
    prompts: Any = SimpleNamespace(template=template)
    return load_model(model, prompts, how, window)


def test_vllm_gets_type_window_and_gpus(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    import os

    write_config(tmp_path, max_position_embeddings=1024)
    load_by_vllm(tmp_path, Template(kind="none", text=None), 1024)
    shared = {"pretrained": str(tmp_path), "dtype": "bfloat16", "tensor_parallel_size": 4}
    assert calls == [{**shared, "max_model_len": 1024}]
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "0"
    load_by_vllm(tmp_path, Template(kind="none", text=None), 2048)
    assert calls[1] == {**shared, "max_model_len": 2048}
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


def test_vllm_renders_the_given_template_and_not_the_tokenizers_own(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    write_config(tmp_path)
    loaded = load_by_vllm(tmp_path, Template(kind="file", text="given"), 64)
    assert (loaded.tokenizer.chat_template, loaded.hf_chat_template) == ("given", "given")
    loaded = load_by_vllm(tmp_path, Template(kind="none", text=None), 64)
    assert loaded.hf_chat_template == "its own"
    assert len(calls) == 2


def test_the_record_has_what_each_engine_reads() -> None:
    how = ResolvedBackend(
        shares_prefixes=True,
        name="vllm",
        dtype="bfloat16",
        device=None,
        batch_size=1,
        tensor_parallel=4,
        versions=VLLM,
    )
    assert how.record() == {
        "name": "vllm",
        "dtype": "bfloat16",
        "calls": [{"versions": VLLM, "generation": GREEDY, "tensor_parallel": 4}],
    }


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_text_is_cut_as_the_file_says_and_the_difference_is_said(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model", template=None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(
        folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token=END, chat_template="x"
    )
    with pytest.warns(UserWarning, match="as GPT2Tokenizer and makes other tokens of text"):
        loaded = load_tokenizer(folder)
    text = "two 2 readers"
    assert loaded.encode(text) == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.chat_template) == (END, "x")


def test_an_end_that_only_the_config_names(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model", eos=None)
    with pytest.raises(ValueError, match=r"neither the tokenizer nor the configs of .* name a token"):
        require_eos(load_tokenizer(folder), folder)
    edit(folder / "config.json", model_type="llama", eos_token_id=[1, 0])
    with pytest.warns(UserWarning, match=r"names no eos: <\\|end\\|>, as in config.json"):
        loaded = load_tokenizer(folder)
    require_eos(loaded, folder)
    assert loaded.eos_token_id == 1


def test_another_tokenizer_than_the_exported_one_is_refused(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model")
    edit(folder / "megatron_exact.json", tokenizer_sha256=tokenizer_sha256(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}")  # changes no token
    load_tokenizer(folder)
    edit(folder / "tokenizer.json", normalizer={"type": "NFKC"})
    with pytest.raises(ValueError, match="is not the tokenizer that the model was trained"):
        load_tokenizer(folder)
