"""Continue the pretraining of a Hugging Face model on a pack with transformers' Trainer.

torchrun --nproc-per-node 8 examples/integrations/transformers_trainer.py MODEL PACK OUTPUT
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megatron_exact.integrations.hf_trainer import ExactLossMixin, PaddingFreeCollator
from megatron_exact.integrations.packed_rows import PackedRows


class ExactTrainer(ExactLossMixin, Trainer):  # type: ignore[misc]
    """The Trainer with EXACT's weights in its training loss."""


def main(model: str, pack: str, output: str, **arguments: Any) -> Any:
    trainer = ExactTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        TrainingArguments(output, remove_unused_columns=False, **arguments),
        train_dataset=PackedRows(pack, rule="exact", alpha=0.15),
        data_collator=PaddingFreeCollator(),
    )
    return trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:], bf16=True, per_device_train_batch_size=1, gradient_accumulation_steps=8)
