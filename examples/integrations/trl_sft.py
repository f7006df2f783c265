"""Tune on whole documents with TRL's SFTTrainer and its own packing; exposure is counted on the fly.

python examples/integrations/trl_sft.py MODEL DOCUMENTS.jsonl OUTPUT       (one {"text": ...} a line)
"""

import sys
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from megatron_exact.integrations.exposure_table import ExposureCounter
from megatron_exact.integrations.hf_trainer import ExactLossMixin
from megatron_exact.integrations.target_weights import TargetWeights

WINDOW = 16_384


class ExactSFTTrainer(ExactLossMixin, SFTTrainer):  # type: ignore[misc]
    """The SFTTrainer with EXACT's weights in its training loss."""


def main(model: str, documents: str, output: str, *, window: int = WINDOW, **arguments: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_dataset("json", data_files=documents, split="train")
    rows = texts.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"][:window]})
    counter = ExposureCounter(window)
    counter.add_lengths(len(tokens) for tokens in rows["input_ids"])
    return ExactSFTTrainer(
        model,
        SFTConfig(output, packing=True, packing_strategy="bfd", max_length=window, **arguments),
        train_dataset=rows.select_columns(["input_ids"]),
        processing_class=tokenizer,
        target_weights=TargetWeights(counter.table(), padding_free=True),
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
