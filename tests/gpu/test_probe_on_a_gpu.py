"""The evidence probe on a GPU. Not run where it was written: there was no GPU."""

from __future__ import annotations

import random

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    # not torch.cuda.is_available(), which the CPU runtime of other tests answers with yes
    pytest.mark.skipif(torch._C._cuda_getDeviceCount() == 0, reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.5)])
def test_scores_are_those_of_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_exact.evaluation.probe import score_items
    from megatron_exact.evaluation.probe_items import ProbeItem

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    draw = random.Random(0)
    lead = tuple(draw.randrange(97) for _ in range(300))
    items = [
        ProbeItem(
            id=str(number),
            kind="k",
            distance=1,
            context=309,
            prompt=(*lead, number, *range(8)),
            prompt_ablated=(*lead, 50 + number, *range(8)),
            gold=(3, 4),
            candidates=((3, 4), (5,)),
            competitor=(5,),
        )
        for number in range(5)
    ]
    plain = score_items(model, None, items)
    for batch_tokens in (100, 100_000):
        found = score_items(model.to("cuda", dtype), None, items, batch_tokens=batch_tokens)
        for one, other in zip(plain, found, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=tolerance)
            assert one.scores_ablated == pytest.approx(other.scores_ablated, abs=tolerance)
