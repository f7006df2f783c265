"""One training step on Megatron, and the same model and rows for other stacks to repeat it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.integrations.exposure_table import table_of_pack, write_table
from megatron_exact.integrations.packed_rows import PackedRows
from tests.distributed import hf_models, jobs, ranks
from tests.distributed.test_gradients import dump_first_gradients, whole_parameters

BOUND = 1e-6
SEED = 1234  # Megatron's default --seed
HEADS, GROUPS = hf_models.SIZES["num_attention_heads"], 2
LLAMA = {
    "num_key_value_heads": GROUPS,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def make_llama() -> Any:
    """The model of every test, untied; float64, so that Megatron's rounding alone is seen.

    Its weights are small: with those of `hf_models` Megatron's float32 gradients are off by 2.6e-6.
    """
    model = hf_models.make_model("llama untied, factor 8, all groups, wide heads", **LLAMA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.3)
    return model.double()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The first step of a job on Megatron."""

    pack: Path
    """Pack of the job."""
    table: Path
    """Exposure table of the pack."""
    loss: float
    """Objective of the step, the weighted loss."""
    gradients: dict[str, Tensor]
    """Gradient of each parameter, by its Hugging Face name."""

    def rows(self, rule: str | None = None) -> list[dict[str, Tensor]]:
        """The rows of the step, in their order."""
        rows = PackedRows(self.pack, rule=rule, order_seed=SEED)
        return [rows[index] for index in range(jobs.GLOBAL_BATCH)]

    def check(self, loss: float, gradients: dict[str, Tensor]) -> None:
        """Fail unless loss and gradients are Megatron's."""
        worst = self.difference(gradients)
        assert max(worst.values()) <= BOUND, max(worst.items(), key=lambda item: item[1])
        assert loss == pytest.approx(self.loss, rel=BOUND)

    def difference(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """Relative difference of the gradient of each parameter."""
        assert set(gradients) == set(self.gradients)
        return {
            name: float((gradients[name].double() - wanted.double()).norm() / wanted.double().norm())
            for name, wanted in self.gradients.items()
        }


def hf_names(megatron: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of Megatron's Llama under the names, and in the layout, of transformers'."""
    found = {
        "model.embed_tokens.weight": megatron["embedding.word_embeddings.weight"],
        "model.norm.weight": megatron["decoder.final_layernorm.weight"],
        "lm_head.weight": megatron["output_layer.weight"],
    }
    for layer in range(hf_models.SIZES["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = megatron[f"{ours}self_attention.linear_qkv.weight"]
        size, per_group = LLAMA["head_dim"], HEADS // GROUPS
        grouped = qkv.view(GROUPS, per_group + 2, size, -1)
        gate, up = megatron[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        found |= {
            f"{theirs}self_attn.q_proj.weight": grouped[:, :per_group].reshape(HEADS * size, -1),
            f"{theirs}self_attn.k_proj.weight": grouped[:, per_group].reshape(GROUPS * size, -1),
            f"{theirs}self_attn.v_proj.weight": grouped[:, per_group + 1].reshape(GROUPS * size, -1),
            f"{theirs}self_attn.o_proj.weight": megatron[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}input_layernorm.weight": megatron[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": megatron[f"{ours}pre_mlp_layernorm.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": megatron[f"{ours}mlp.linear_fc2.weight"],
        }
    return found


@pytest.fixture(scope="session", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the model (`hf`) and its checkpoint (`checkpoint`)."""
    folder = tmp_path_factory.mktemp("start")
    make_llama().float().save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "checkpoint")
    return folder


@pytest.fixture(scope="session")
def step_on_megatron(
    start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Reference]:
    """Runs the first step of a job on Megatron, once for each policy and rule."""
    corpus = jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs")
    packs = {policy: jobs.make_pack(corpus, policy) for policy in ("concat", "best-fit")}
    known: dict[tuple[str, str], Reference] = {}

    def run(policy: str, rule: str) -> Reference:
        if (policy, rule) in known:
            return known[policy, rule]
        folder, pack = tmp_path_factory.mktemp("step"), packs[policy]
        argv = [
            *("--pack", pack, "--load", start / "checkpoint", "--run-dir", folder / "run"),
            *("--token-weighting", rule, *jobs.SCHEDULE, "--train-iters", 1),
        ]
        ranks.train(1, argv, folder, dump_first_gradients(folder)).check()
        (line,) = ranks.read_jsonl(folder / "run" / "losses.jsonl")
        parameters = whole_parameters(folder, 1)
        values = hf_names({name: value for name, (value, _) in parameters.items()})
        loaded = dict(make_llama().named_parameters())
        assert all(torch.equal(values[name].double(), loaded[name]) for name in loaded), (
            "names are mixed up"
        )
        write_table(table_of_pack(pack), folder / "exposure_table.json")
        known[policy, rule] = Reference(
            pack=pack,
            table=folder / "exposure_table.json",
            loss=line["weighted_loss"],
            gradients=hf_names({name: gradient for name, (_, gradient) in parameters.items()}),
        )
        return known[policy, rule]

    return run
