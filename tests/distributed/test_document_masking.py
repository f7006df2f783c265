"""No document sees another: on the model as the driver builds it, with a control that must fail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import jobs, ranks
from tests.distributed.logits import logits_of

LENGTHS = (9, 1, 23, 14, 17)
ALONE_BOUND = 2e-5  # float32 logits of another shape of matrix product


def attend_across_documents(*args: Any) -> Tensor:
    """The control: one causal segment over the whole row, whatever cu_seqlens says."""
    from megatron_exact.model import packed_attention

    query, key, value, packing, scale = args
    whole = type(packing)(cu_seqlens_q=torch.tensor([0, query.shape[0]]))
    return packed_attention.attend_by_segment(query, key, value, whole, scale)


def measure(model: Any) -> dict[str, float]:
    """Largest change of other documents' logits, and difference from each document alone."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, jobs.VOCABULARY, (sum(LENGTHS),), generator=generator)
    base = logits_of(model, tokens, LENGTHS)
    leak = alone = own = 0.0
    start = 0
    for length in LENGTHS:
        changed = tokens.clone()
        changed[start] = (changed[start] + 1) % jobs.VOCABULARY
        difference = (logits_of(model, changed, LENGTHS) - base).abs()
        inside = slice(start, start + length)
        own = max(own, float(difference[inside].max()))
        difference[inside] = 0
        leak = max(leak, float(difference.max()))
        single = logits_of(model, tokens[inside], (length,))
        alone = max(alone, float((single - base[inside]).abs().max()))
        start += length
    return {"leak": leak, "alone": alone, "own": own}


def measure_in_job(folder: Path, *, masked: bool) -> Callable[[], None]:
    """A patch that measures on the driver's model at the end of the first iteration."""

    def patch() -> None:
        from megatron.core import parallel_state

        from megatron_exact.model import packed_attention
        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.finalize_grads

        def finalize(self: Any, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
            stock(self, model, num_tokens, **kwargs)
            honest = packed_attention.attend_by_segment
            if not masked:
                packed_attention._attend = attend_across_documents
            result = measure(model[0].module)
            packed_attention._attend = honest
            if parallel_state.is_pipeline_last_stage():
                (folder / f"measured{os.environ['RANK']}.json").write_text(json.dumps(result))

        TrainingRun.finalize_grads = finalize  # type: ignore[method-assign]

    return patch


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ()),
        (2, ("--tensor-model-parallel-size", 2)),
        (2, ("--pipeline-model-parallel-size", 2)),
    ],
    ids=["tp1", "tp2", "pp2"],
)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "control"])
def test_no_document_sees_another(
    world: int, flags: tuple[Any, ...], masked: bool, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    argv = jobs.command(pack, "none", 1, "--pretrained-checkpoint", checkpoint, *flags)
    ranks.train(world, argv, tmp_path, measure_in_job(tmp_path, masked=masked)).check()
    results = [json.loads(path.read_text()) for path in tmp_path.glob("measured*.json")]
    assert results
    for result in results:
        assert result["own"] > 1e-3, "the change was not seen at all: the test measures nothing"
        if masked:
            assert result["leak"] == 0
            assert result["alone"] <= ALONE_BOUND
        else:
            assert result["leak"] > 1e-3
            assert result["alone"] > 100 * ALONE_BOUND
