"""An OLMo-core train module with EXACT's loss, for a script that builds its own model and data loader.

The dataset (`NumpyPackedFSLDatasetConfig` packs instances) needs `generate_doc_lengths=True`. Count the
exposure table of the same loader first:

    counter = ExposureCounter(sequence_length)
    for batch in islice(loader, 1000):
        labels = get_labels(batch)
        counter.add(positions_of_lengths(batch["doc_lens"].flatten()).view_as(labels), labels != -100)
    write_table(counter.table(), "exposure_table.json")
"""

from typing import Any

from olmo_core.nn.transformer import Transformer
from olmo_core.optim import AdamWConfig

from megatron_exact.integrations.olmo_train_module import ExactTransformerTrainModule
from megatron_exact.integrations.target_weights import TargetWeights


def train_module(
    model: Transformer, window: int, table: str = "exposure_table.json", **options: Any
) -> ExactTransformerTrainModule:
    return ExactTransformerTrainModule(
        model,
        AdamWConfig(lr=1e-5),
        target_weights=TargetWeights(table, alpha=0.15),
        max_sequence_length=window,
        **{"rank_microbatch_size": window, "max_grad_norm": 1.0, **options},
    )
