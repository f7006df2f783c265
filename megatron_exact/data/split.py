"""Which documents of a source are held out for validation.

A document's hash depends on the run's seed, on the content of the source's index and on the document's
number, not on paths, row length, policy or the other sources: two packs of one corpus with one seed and
fraction (a short stage and a long one) hold out the same documents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.shuffle import derive_key, random_bits


def validation_documents(
    num_documents: int, fraction: float, *, seed: int, idx_sha256: str
) -> NDArray[np.bool_]:
    """Mark the documents of one source that belong to the validation split.

    The `fraction * num_documents` documents (rounded, at least one and never all if the fraction is
    above 0 and there are two) with the smallest hashes.

    Args:
        num_documents: of the source.
        fraction: in [0, 1).
        seed: of the pack.
        idx_sha256: of the source's `.idx`.

    Returns:
        bool [documents].
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction {fraction} is not in [0, 1)")
    if fraction == 0 or num_documents < 2:
        return np.zeros(num_documents, dtype=np.bool_)
    held_out = min(max(1, int(fraction * num_documents + 0.5)), num_documents - 1)
    key = derive_key("validation split", seed, idx_sha256)
    hashes = random_bits(key, np.arange(num_documents, dtype=np.int64))
    # Hashes of distinct documents are distinct, so exactly `held_out` lie at or below the threshold.
    threshold = np.partition(hashes, held_out - 1)[held_out - 1]
    return np.asarray(hashes <= threshold)
