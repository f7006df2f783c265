"""Pretrain with Megatron-Bridge (or NeMo, which trains through it) and EXACT's loss.

torchrun --nproc-per-node 8 examples/integrations/megatron_bridge_pretrain.py exposure_table.json
"""

import sys
from typing import Any

from megatron_exact.integrations.bridge_step import exact_forward_step
from megatron_exact.integrations.target_weights import TargetWeights


def main(table: str, config: Any, pretrain: Any, forward_step: Any) -> None:
    config.dataset.reset_position_ids = True  # positions restart in every document
    config.model.calculate_per_token_loss = True  # the number of targets of the global batch divides
    config.ddp.average_in_collective = False
    pretrain(config, exact_forward_step(forward_step, TargetWeights(table, alpha=0.15)))


if __name__ == "__main__":
    from megatron.bridge.recipes.llama import llama3_8b_16k_pretrain_config
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    main(sys.argv[1], llama3_8b_16k_pretrain_config(), pretrain, forward_step)
