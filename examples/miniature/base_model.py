"""The base model: trained once by a committed command and shipped, so that the experiment is about arms.

Two stages through the same training entry as everything else. In the first, short documents drill recall
of two to four facts. In the second, documents look like those of the experiment, but none is longer than a
row of 128 tokens, so the model has never seen evidence at a greater distance.

What decides whether a model of two layers learns to recall at all within minutes is how it begins. With
one standard deviation for all weights (0.02, or 0.09) it stays for long on the plateau where it knows which
words are values but not which value; with the scales here it leaves the plateau within a few dozen steps.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.miniature.experiment import (
    CORPUS,
    ENVIRONMENT,
    IMPORT,
    LANGUAGE_CODE,
    PACKING,
    TRAINING,
    stage_options,
)
from examples.miniature.language import VOCABULARY, CorpusDesign, write_corpus, write_tokenizer
from examples.miniature.pipeline import (
    CONVERSION_CODE,
    TRAINING_CODE,
    Pipeline,
    StageSettings,
    Step,
    say,
)
from megatron_exact.files import atomic_folder, require_free_folder, write_json, write_text

CODE = (*LANGUAGE_CODE, "examples/miniature/base_model.py", *TRAINING_CODE, *CONVERSION_CODE)
SHIPPED = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_dropout": 0.0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,  # with 1e4 recall reaches four times the trained length by itself
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": len(VOCABULARY),
    "attention_bias": False,
    "mlp_bias": False,
}
EMBEDDING_STD = 1.0
RESIDUAL_SCALE = 0.5
"""Of what a layer adds to the residual stream, against 1 / sqrt(inputs) for every other matrix."""
OUTPUT_SCALE = 0.3
"""Of the output layer, against 1 / sqrt(inputs)."""
SPARE_TOKENS = 1.15
"""Tokens drawn for each one that is trained on: some are held out, and rows have some padding."""


@dataclass(frozen=True, kw_only=True)
class BaseStage:
    """One stage of the base model's training."""

    name: str
    """Short, also of its folder."""
    summary: str
    """Its documents, in words."""
    design: CorpusDesign
    """Its documents."""
    training: StageSettings
    """Its schedule."""


def _schedule(row_tokens: int) -> StageSettings:
    return StageSettings(
        row_tokens=row_tokens,
        rows_per_iteration=16,
        rows_per_micro_batch=16,
        iterations=400,
        warmup_iterations=50,
        learning_rate=3e-3,
        evaluation_batches=4,
    )


BASE_SEED = 1
BASE_STAGES = (
    BaseStage(
        name="drill",
        summary="16-32 words: two to four facts, then questions about them",
        design=CorpusDesign(evidence="drill", shortest=16, longest=32),
        training=_schedule(64),
    ),
    BaseStage(
        name="documents",
        summary="16-127 words, facts in the first quarter, each asked for once",
        design=CorpusDesign(evidence="distant", shortest=16, longest=127),
        training=_schedule(128),
    ),
)


def initial_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """Return the first weights by Hugging Face name, float32, matrices as [outputs, inputs]."""
    generator = np.random.default_rng(seed)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    vocabulary = (CONFIG["vocab_size"], hidden)

    def normal(size: tuple[int, int], std: float) -> NDArray[np.float32]:
        return np.asarray(generator.standard_normal(size) * std, dtype=np.float32)

    def matrix(outputs: int, inputs: int, scale: float = 1.0) -> NDArray[np.float32]:
        return normal((outputs, inputs), scale / float(np.sqrt(inputs)))

    weights = {
        "model.embed_tokens.weight": normal(vocabulary, EMBEDDING_STD),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(*vocabulary, OUTPUT_SCALE),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in "qkv":  # as many heads of keys and values as of queries
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(hidden, hidden)
        weights |= {
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, hidden, RESIDUAL_SCALE),
            f"{prefix}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, inner, RESIDUAL_SCALE),
            f"{prefix}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
    return weights


def write_initial_model(folder: Path, *, seed: int) -> None:
    """Write config, tokenizer and random weights as a Hugging Face folder."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_tokenizer(folder, window_tokens=CONFIG["max_position_embeddings"])
    save_file(initial_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})


def make_base(output: Path, work: Path, *, seed: int = BASE_SEED) -> None:
    """Train the base model from its first weights and write it as a Hugging Face folder with a model card.

    Args:
        output: folder to make; it must not exist.
        work: folder of the steps.
        seed: of the first weights, the documents and their order.

    Raises:
        ValueError: the output exists, or a step failed.
    """
    require_free_folder(output)
    pipeline = Pipeline(folder=work.resolve() / "work", shows_commands=False, environment=ENVIRONMENT)
    with pipeline.held():
        model = pipeline.step(
            "base-initial",
            lambda here: write_initial_model(here / "model", seed=seed),
            depends_on={"seed": seed},
            code=CODE,
        )
        for stage in BASE_STAGES:
            model = _stage_step(pipeline, stage, model, seed)
        with atomic_folder(output.resolve()) as folder:
            for name in SHIPPED:
                shutil.copyfile(model.folder / "model" / name, folder / name)
            write_text(folder / "README.md", model_card(seed))
    say(f"{output}: made")


def _stage_step(pipeline: Pipeline, stage: BaseStage, before: Step, seed: int) -> Step:
    """One stage: its documents, their pack, the model so far as a checkpoint, training, export."""
    name, tokens = f"base-{stage.name}", round(SPARE_TOKENS * stage.training.tokens)
    say(f"base, stage {stage.name}: {stage.training.iterations} iterations")
    return pipeline.step(
        name,
        lambda here: write_corpus(here / CORPUS, stage.design, seed=seed, tokens=tokens),
        *PACKING,
        IMPORT,
        *TRAINING,
        depends_on={"stage": repr(stage), "before": before.key, "seed": seed},
        code=CODE,
        values={
            "model": before.folder / "model",
            "row_tokens": stage.training.row_tokens,
            "validation_fraction": 0.02,
            "corpus": pipeline.folder / name,
            "base": pipeline.folder / name,
            "options": ["--token-weighting", "none", *stage_options(stage.training)],
            "seed": seed,
        },
    )


def model_card(seed: int) -> str:
    """Return the README.md of the shipped folder: what the model is and how it was made."""
    rows = "\n".join(
        f"| {stage.name} | {stage.training.row_tokens} | {stage.training.iterations:,} x "
        f"{stage.training.rows_per_iteration * stage.training.row_tokens:,} | "
        f"{stage.training.learning_rate:g} | {stage.summary} |"
        for stage in BASE_STAGES
    )
    return f"""---
license: apache-2.0
library_name: transformers
---

# The base model of the miniature

A Llama of two layers for a made-up language of 82 words (`examples/miniature/language.py`). It
answers `ask k07` with the value that the document gave to `k07`, from statements up to about 100 tokens
back, and hardly from farther ones: it was never trained on documents of more than 128 tokens. The
experiment of `docs/miniature.md` continues it on rows of 512 tokens.

Made by the command below, seed {seed}, from random weights (`examples/miniature/base_model.py`) on
documents that are drawn by chance (`examples/miniature/language.py`); no text of anybody went into it:

```
python tools/train_miniature_base.py --output OUTPUT
```

| stage | row (tokens) | steps x tokens | learning rate | documents |
|---|---|---|---|---|
{rows}

Another machine gives slightly other weights, as sums are rounded in another order.
"""
