"""Loss of Hugging Face folders on a pack, as a user computes it: in a process that knows no Megatron.

python -m tests.end_to_end.hf_loss PACK ROWS FOLDER... prints one number a folder: the mean cross-entropy of
`AutoModelForCausalLM.from_pretrained(FOLDER)` over the first ROWS validation rows, document by document.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

from tests.distributed import hf_models


def main() -> None:
    pack, rows, *folders = sys.argv[1:]
    losses = []
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        with torch.no_grad():
            losses.append(
                float(hf_models.mean_loss(model.double(), Path(pack), "validation", list(range(int(rows)))))
            )
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
