"""A torchtitan configuration with EXACT's loss: use it where torchtitan takes `llama3_8b`.

Count the exposure table of the same loader first, for instance over a thousand batches:

    counter = ExposureCounter(seq_len, labels="document")
    for batch, labels in islice(loader, 1000):
        counter.add(batch["positions"], labels != -100)
    write_table(counter.table(), "exposure_table.json")
"""

from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

from megatron_exact.integrations.torchtitan_loss import ExactChunkedLoss, ExactCrossEntropyLoss


def llama3_8b_exact(table: str = "exposure_table.json") -> Trainer.Config:
    config = config_registry.llama3_8b()
    config.loss = ExactChunkedLoss.Config(loss_fn=ExactCrossEntropyLoss.Config(exposure_table=table))
    return config
