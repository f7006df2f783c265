from __future__ import annotations

import pytest
import torch

from megatron_exact.training.checkpoint_integrity import detached, share_out


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 32])
def test_shares_cover_every_file_once_and_evenly(num_ranks: int) -> None:
    sizes = {f"__{rank}_{part}.distcp": 1000 + 37 * rank for rank in range(16) for part in range(2)}
    sizes |= {".metadata": 10, "metadata.json": 1}
    shares = share_out(sizes, num_ranks)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(sizes.values()) / num_ranks + max(sizes.values())


def test_files_without_content_are_shared_out_too() -> None:
    assert [len(share) for share in share_out(dict.fromkeys("abcd", 0), 2)] == [2, 2]


def test_background_work_holds_copies() -> None:
    """Upstream's holds the parameters themselves, which the optimizer changes meanwhile."""
    parameter = torch.arange(4.0)
    (copied,) = detached([("file", "key", (["object"], [("item", parameter)]))])
    parameter += 1
    path, key, (objects, ((item, tensor),)) = copied
    assert (path, key, objects, item) == ("file", "key", ["object"], "item")
    assert tensor.tolist() == [0, 1, 2, 3]
