"""Exported folders in vLLM: its greedy tokens and log-probabilities against those of transformers.

Skipped where it is not installed; `make vllm-setup` installs its build for the CPU, `make test-vllm` runs
this.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from tests.distributed import hf_models
from tests.unit.data.tiny_tokenizers import write_huggingface

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (make test-vllm)"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VOCABULARY = 404
WINDOW = 128
NEW_TOKENS = 24
LARGEST_DIFFERENCE = 1e-4
"""Of a log-probability in float32, nats."""
LEAST_CHANGE = 0.1
"""By which one of another model's is off."""
WIDE_ENOUGH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
}  # its attention on CPUs has heads of 32 or more


def export(name: str, folder: Path, **changes: Any) -> Path:
    """A random model as a Hugging Face folder that was imported and exported."""
    heads = {"head_dim": 32} if "head_dim" in hf_models.CONFIGS[name] else {}
    hf = write_huggingface(folder / "hf")
    hf_models.make_model(name, **{**WIDE_ENOUGH, **heads, **changes}).save_pretrained(hf)
    import_hf(hf, folder / "checkpoint")
    export_hf(folder / "checkpoint", folder / "exported")
    return folder / "exported"


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def by_vllm(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens after each prompt, and the log-probability of each."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(
        model=str(folder), dtype="float32", max_model_len=WINDOW, enforce_eager=True, max_num_seqs=4
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    found = []
    for request in engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False):
        (answer,) = request.outputs
        tokens = list(answer.token_ids)
        found.append(
            (tokens, [at[token].logprob for at, token in zip(answer.logprobs, tokens, strict=True)])
        )
    del engine
    cleanup_dist_env_and_memory()
    return found


def by_transformers(folder: Path, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest token at each place of an answer, and the log-probability of the answer's."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return logits.argmax(-1).tolist(), chosen.tolist()


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", hf_models.CONFIGS)
def test_an_exported_folder_answers_as_in_transformers(name: str, tmp_path: Path) -> None:
    folder = export(name, tmp_path)
    other = export(name, tmp_path / "other", seed=12)
    prompts = [torch.arange(3 + i, VOCABULARY, 7 + i).tolist()[: 5 + 20 * i] for i in range(3)]
    differences, controls = [], []
    for prompt, (tokens, seen) in zip(prompts, by_vllm(folder, prompts), strict=True):
        likeliest, expected = by_transformers(folder, prompt, tokens)
        assert tokens == likeliest
        differences.append(max(abs(a - b) for a, b in zip(seen, expected, strict=True)))
        _, of_other = by_transformers(other, prompt, tokens)
        controls.append(max(abs(a - b) for a, b in zip(seen, of_other, strict=True)))
    print(f"{name}: differ by {max(differences):.1e}, from another model's by {min(controls):.1e}")
    assert max(differences) < LARGEST_DIFFERENCE
    assert min(controls) > LEAST_CHANGE


def evaluate(folder: Path, output: Path, backend: str, cache: Path) -> dict[str, Any]:
    """A cell of RULER by the tool; its examples by id."""
    words = ["--model", folder, "--suite", "ruler", "--tasks", "niah_single_1", "--lengths", 512]
    words += ["--samples", 2, "--backend", backend, "--example-cache", cache, "--output", output]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "evaluate_model.py", *map(str, words)],
        env={**os.environ, **VARIABLES},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (output / "ruler" / "niah_single_1" / "512.jsonl").read_text().splitlines()
    return {example["id"]: example for example in map(json.loads, lines)}


def test_evaluate_model_has_the_same_answers_on_both_backends(tmp_path: Path) -> None:
    folder = export("qwen2 tied, 2 groups", tmp_path)
    by_hf, ours = (evaluate(folder, tmp_path / name, name, tmp_path / "cache") for name in ("hf", "vllm"))
    assert len(by_hf) == 2
    assert ours == by_hf  # prompts, predictions, scores
    assert all(example["prediction"] for example in ours.values())
    backend = json.loads((tmp_path / "vllm" / "results.json").read_text())["backend"]
    assert (backend["name"], backend["dtype"]) == ("vllm", "float32")
    assert backend["calls"][0]["versions"]["vllm"]
