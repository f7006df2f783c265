"""EXACT's weights in other training stacks: torch alone, no Megatron.

An `ExposureTable` says how many training targets see how much of their own document. `TargetWeights` turns
it, and the position ids of a batch, into one weight for each target. The other modules put these weights
into the loss of one stack each:

| module | stack |
|---|---|
| `hf_trainer` | transformers' `Trainer`, TRL's `SFTTrainer` |
| `torchtitan_loss` | torchtitan |
| `olmo_train_module` | OLMo-core |
| `bridge_step` | Megatron-Bridge, NeMo |
| `packed_rows` | any loop: a pack as a map-style torch dataset, or as a Hugging Face dataset |

The rules are those of `megatron_exact.exposure`. Everywhere the objective is Megatron's:
`sum_i m_i w_i CE_i / sum_i m_i` over the supervised targets of the global batch.
"""
