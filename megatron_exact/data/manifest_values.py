"""What the values of a manifest must be, beyond their types."""

from __future__ import annotations

from megatron_exact.data.manifest_entries import FIRST_TARGET, Manifest


def check_values(manifest: Manifest, where: str) -> None:
    """Refuse values that no pack can have.

    Args:
        manifest: with every field of the right type.
        where: its file, for messages.

    Raises:
        ValueError: no source, weights on some sources only or not above 0, rows of no token, or lists of
            different lengths.
    """
    problem = _problem(manifest)
    if problem is not None:
        raise ValueError(f"{where} {problem}: it was edited or damaged, pack the corpus again")


def _problem(manifest: Manifest) -> str | None:
    if manifest.row_tokens < 1:
        return f"has row_tokens {manifest.row_tokens}, which must be at least 1"
    if not manifest.sources:
        return "names no source"
    weights = [source.weight for source in manifest.sources]
    if None in weights and any(weight is not None for weight in weights):
        return f"gives a weight to some sources only ({weights})"
    if any(weight is not None and weight <= 0 for weight in weights):
        return f"has weights {weights}, which must be above 0"
    answers = manifest.supervision is not None
    if answers and not (manifest.policy == "best-fit" and manifest.mask_cross_document_targets):
        return "supervises answers, but documents may be cut or predict each other"
    for name, split in manifest.splits.items():
        if (f"{FIRST_TARGET}.npy" in split.arrays) != answers:
            return f"says in one place only that the {name} split supervises answers alone"
        if len(split.sources) != len(manifest.sources):
            return f"has {len(manifest.sources)} sources but the {name} split says {len(split.sources)}"
        if len(split.exposure.lower) != len(split.exposure.counts) or not split.exposure.lower:
            return (
                f"has {len(split.exposure.counts)} counts for {len(split.exposure.lower)} buckets in {name}"
            )
    return None
