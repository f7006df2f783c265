"""The base model: trained once by a committed command and shipped, so that the experiment is about arms.

Two stages through the same training entry as everything else. In the first, short documents drill recall
of two to four facts. In the second, documents look like those of the experiment, but none is longer than a
row of 128 tokens, so the model has never seen evidence at a greater distance.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_exact.demo.workspace import Step
from megatron_exact.files import atomic_folder, write_text
from megatron_exact.miniature.chain import Chain, import_model, pack_corpus, train_and_export
from megatron_exact.miniature.corpus import write_corpus
from megatron_exact.miniature.initial_model import write_initial_model
from megatron_exact.miniature.settings import BASE_SEED, BASE_STAGES, BaseStage, stage_options

CODE = ("miniature/corpus.py", "miniature/language.py", "miniature/initial_model.py", "training", "model")
SHIPPED = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
SPARE_TOKENS = 1.15
"""Tokens drawn for each one that is trained on: some are held out, and rows have some padding."""


def train_base(chain: Chain, output: Path, *, seed: int = BASE_SEED) -> None:
    """Train the base model from its first weights and write it as a Hugging Face folder with a model card.

    Args:
        chain: runs the steps.
        output: folder to make; it must not exist.
        seed: of the first weights, the documents and their order.
    """
    before = chain.step(
        "base-initial", {"seed": seed}, CODE, lambda folder: _write_initial(folder / "model", seed)
    )
    for stage in BASE_STAGES:
        before = _stage_step(chain, stage, before, seed)
    with atomic_folder(output) as folder:
        for name in SHIPPED:
            shutil.copyfile(before.folder / "model" / name, folder / name)
        write_text(folder / "README.md", model_card(seed))


def _write_initial(folder: Path, seed: int) -> None:
    folder.mkdir()
    write_initial_model(folder, seed=seed)


def _stage_step(chain: Chain, stage: BaseStage, before: Step, seed: int) -> Step:
    """One stage: its documents, their pack, the model so far as a checkpoint, training, export."""
    start = before.folder / "model"

    def build(folder: Path) -> None:
        tokens = round(SPARE_TOKENS * stage.training.tokens)
        write_corpus(folder / "corpus.jsonl", stage.design, seed=seed, tokens=tokens)
        pack_corpus(
            chain,
            folder,
            tokenizer=start,
            row_tokens=stage.training.row_tokens,
            validation_fraction=0.02,
            seed=seed,
        )
        import_model(chain, folder, start)
        train_and_export(
            chain,
            folder,
            pack=folder / "pack",
            start=folder / "checkpoint",
            options=["--token-weighting", "none", *stage_options(stage.training)],
            seed=seed,
        )

    depends_on = {"stage": repr(stage), "before": before.key, "seed": seed}
    chain.say(f"base, stage {stage.name}: {stage.training.iterations} iterations")
    return chain.step(f"base-{stage.name}", depends_on, CODE, build)


def model_card(seed: int) -> str:
    """The README.md of the shipped folder: what the model is and how it was made."""
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

A Llama of two layers for a made-up language of 82 words (`megatron_exact/miniature/language.py`). It
answers `ask k07` with the value that the document gave to `k07`, from statements up to about 100 tokens
back, and hardly from farther ones: it was never trained on documents of more than 128 tokens. The
experiment of `docs/miniature.md` continues it on rows of 512 tokens.

Made by the command below, seed {seed}, from random weights
(`megatron_exact/miniature/initial_model.py`) on documents that are drawn by chance
(`megatron_exact/miniature/corpus.py`); no text of anybody went into it:

```
python tools/train_miniature_base.py --output OUTPUT
```

| stage | row (tokens) | steps x tokens | learning rate | documents |
|---|---|---|---|---|
{rows}

Another machine gives slightly other weights, as sums are rounded in another order.
"""
