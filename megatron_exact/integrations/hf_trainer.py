"""EXACT in transformers' `Trainer` and TRL's `SFTTrainer`: a mix-in for the loss, a padding-free collator.

```python
class ExactTrainer(ExactLossMixin, Trainer): ...        # or SFTTrainer

ExactTrainer(model, args, train_dataset=rows, data_collator=PaddingFreeCollator(),
             target_weights=TargetWeights("exposure_table.json")).train()
```

The trainer keeps its own normalization: it counts the supervised targets of all micro-batches and, with
`average_tokens_across_devices` (the default), of all ranks, and its `num_items_in_batch` divides the sum of
weighted losses. That is Megatron's objective. Evaluation is not weighted. Nothing of transformers is
imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_exact.integrations.target_weights import IGNORE_INDEX, TargetWeights, weighted_loss_sum


class ExactLossMixin:
    """Weigh the training loss of a `Trainer`; stands before the trainer's class among the bases.

    A batch has `input_ids`, `labels` (transformers' convention, shifted by the loss), perhaps
    `shift_labels` (the target of each input), and `position_ids` or `target_weights`.

    Args:
        args: positional arguments of the trainer.
        target_weights: turns the `position_ids` of batches into weights; None takes the weights that the
            batches bring along (`PackedRows` with a rule).
        divides_by_mass: with `target_weights=None`: divide by the sum of weights (`exact-normalized`).
        kwargs: keyword arguments of the trainer.

    Raises:
        ValueError: an option of the trainer that computes another loss, or would divide it otherwise.
    """

    def __init__(
        self,
        *args: Any,
        target_weights: TargetWeights | None = None,
        divides_by_mass: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if target_weights is not None and target_weights.labels != "row":
            raise ValueError('transformers shifts labels over the whole row: TargetWeights(labels="row")')
        self.target_weights = target_weights
        self.divides_by_mass = divides_by_mass if target_weights is None else target_weights.divides_by_mass
        trainer: Any = self
        for is_set, option, remedy in (
            (trainer.label_smoother is not None, "label_smoothing_factor", "set it to 0"),
            (trainer.compute_loss_func is not None, "compute_loss_func", "leave it out"),
            (
                trainer.args.use_liger_kernel,
                "use_liger_kernel",
                "set it to False, it gives no token losses",
            ),
            (getattr(trainer.args, "loss_type", "nll") != "nll", "loss_type", 'set it to "nll"'),
            (trainer.args.n_gpu > 1, "DataParallel", "start one process a GPU (torchrun)"),
            (
                trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices,
                "average_tokens_across_devices=False",
                "set it to True, so that the targets of all ranks are counted",
            ),
            (
                getattr(trainer.accelerator, "parallelism_config", None) is not None
                and (trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1),
                "context or sequence parallelism",
                "a rank must have whole rows",
            ),
        ):
            if is_set:
                raise ValueError(f"weighted losses do not support {option}: {remedy}")
        # The trainer then counts targets, passes their number on and scales the loss by the number of ranks
        trainer.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch: weighted in training, the trainer's own in evaluation."""
        given = inputs.pop("target_weights", None)
        trainer: Any = super()
        if not self.model.training:  # type: ignore[attr-defined]
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise ValueError("num_items_in_batch is missing: batches need labels, so that targets count")
        weighted = _WeightedModel(model, self._weights(given, inputs))
        return trainer.compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the micro-batches of a step and what divides their loss."""
        trainer: Any = super()
        samples, num_items = trainer.get_batch_samples(epoch_iterator, num_batches, device)
        if not self.divides_by_mass or num_items is None:
            return samples, num_items
        mass = torch.zeros((), dtype=torch.float64)
        for batch in samples:
            weights = self._weights(batch.get("target_weights"), batch)
            mass += (weights.double() * (_targets(batch) != IGNORE_INDEX)).sum().cpu()
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        return samples, accelerator.gather(mass.float().to(device)).sum()

    def _weights(self, given: Tensor | None, batch: dict[str, Any]) -> Tensor:
        if self.target_weights is None:
            if given is not None:
                return given
            raise ValueError(
                "the batch has no target_weights: give the trainer target_weights=TargetWeights(TABLE), or "
                "rows of PackedRows with a rule, PaddingFreeCollator, and remove_unused_columns=False"
            )
        return self.target_weights(batch.get("position_ids"))  # type: ignore[arg-type]


class _WeightedModel:
    """Calls a model and puts weights into the losses that the trainer takes from its outputs."""

    def __init__(self, model: Any, weights: Tensor) -> None:
        self._model = model
        self._weights = weights

    def __call__(self, **inputs: Any) -> Any:
        if inputs.get("fused_lm_head"):  # SFTTrainer sums these log probabilities, and counts its metrics
            outputs = self._model(**inputs)
            outputs.log_probs = outputs.log_probs * self._weights[..., : outputs.log_probs.shape[-1]]
            return outputs
        targets = _targets(inputs)
        num_items = inputs.pop("num_items_in_batch")
        del inputs["labels"]
        inputs.pop("shift_labels", None)
        # Without a cache: with one, transformers lets packed documents attend to each other
        outputs = self._model(**{**inputs, "use_cache": False})
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError("weighted losses do not support output_router_logits: set it to False")
        outputs["loss"] = weighted_loss_sum(outputs.logits, targets, self._weights) / num_items
        return outputs


def _targets(batch: dict[str, Any]) -> Tensor:
    """Return the target of each input, [..., T]."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]  # type: ignore[no-any-return]
    return F.pad(batch["labels"][..., 1:], (0, 1), value=IGNORE_INDEX)


class PaddingFreeCollator:
    """Lay documents, or rows of a pack, end to end in one sequence [1, T] whose position ids restart.

    As `DataCollatorWithFlattening` does for documents. Rows of `PackedRows`, or of `hf_dataset`, keep what
    only a pack knows: the target of a row's last input, and the weights of its rule.

    A feature is either a document, `input_ids` and perhaps `labels` (-100 where unsupervised; the first
    token of a document is no target), or a row with `position_ids` and `shift_labels` or `tokens`.

    Args:
        flash_attention: also give `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, the
            arguments of flash attention.
    """

    def __init__(self, *, flash_attention: bool = False) -> None:
        self.flash_attention = flash_attention

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `labels`, `shift_labels`, `position_ids` [1, T], int64, and, where all
        features have weights, `target_weights` [1, T], float32.

        Raises:
            ValueError: rows without positions or targets, weights for some features only.
        """
        parts = [_feature(feature) for feature in features]
        if len({tuple(part) for part in parts}) > 1:
            raise ValueError("some features of the batch have target_weights and some have not")
        batch: dict[str, Any] = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
        labels = torch.full_like(batch["shift_labels"], IGNORE_INDEX)
        labels[..., 1:] = batch["shift_labels"][..., :-1]
        batch["labels"] = labels
        if self.flash_attention:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten()
            end = torch.tensor([labels.numel()])
            boundaries = torch.cat([starts, end]).to(torch.int32)
            longest = int(boundaries.diff().max())
            batch |= {f"cu_seq_lens_{side}": boundaries for side in "qk"}
            batch |= {f"max_length_{side}": longest for side in "qk"}
        return batch


def _feature(feature: dict[str, Any]) -> dict[str, Tensor]:
    """Return inputs, targets, positions and perhaps weights of a feature, [tokens] each."""
    if "tokens" in feature:  # a row of PackedRows
        feature = {**feature, "input_ids": feature["tokens"], "shift_labels": feature["labels"]}
    if "input_ids" not in feature:
        raise ValueError(
            f"a feature has {', '.join(feature) or 'no fields'} and no input_ids: for rows of PackedRows "
            "set remove_unused_columns=False, otherwise the trainer removes them"
        )
    inputs = torch.as_tensor(feature["input_ids"])
    if "position_ids" not in feature:
        targets = torch.full_like(inputs, IGNORE_INDEX)
        targets[:-1] = torch.as_tensor(feature.get("labels", inputs))[1:]
        return {"input_ids": inputs, "shift_labels": targets, "position_ids": torch.arange(inputs.numel())}
    if "shift_labels" not in feature:
        raise ValueError(
            "a row has position_ids and no shift_labels, the target of each input: set "
            "remove_unused_columns=False, otherwise the trainer removes them"
        )
    row = {
        "input_ids": inputs,
        "shift_labels": torch.as_tensor(feature["shift_labels"]),
        "position_ids": torch.as_tensor(feature["position_ids"]),
    }
    if feature.get("target_weights") is not None:
        row["target_weights"] = torch.as_tensor(feature["target_weights"], dtype=torch.float32)
    return row
