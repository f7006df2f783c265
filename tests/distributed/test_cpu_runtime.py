"""What the CPU runtime leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import hf_models
from tests.distributed.test_hf_parity import long_document


@pytest.mark.parametrize("factory", ["empty", "zeros", "arange", "full", "tensor"])
def test_a_device_context_still_holds(factory: str) -> None:
    arguments = {"full": ((2,), 1.0), "tensor": ([1.0, 2.0],)}.get(factory, (2,))
    with torch.device("meta"):
        assert getattr(torch, factory)(*arguments).device.type == "meta"
    assert getattr(torch, factory)(*arguments).device.type == "cpu"
    assert getattr(torch, factory)(*arguments, device="cuda").device.type == "cpu"


def test_from_pretrained_gives_the_model(tmp_path: Path) -> None:
    """It builds on the meta device; buffers that are in no file would come out wrong otherwise."""
    import transformers

    name = "llama tied, factor 32, 2 groups"
    folder = hf_models.save_model(name, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        ours, theirs = (
            hf_models.document_logits(model, long_document()[:200])
            for model in (loaded.eval(), hf_models.make_model(name))
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
