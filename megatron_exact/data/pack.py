"""Pack corpora into rows: check the sources, choose and order documents, plan rows, write the pack.

Tokens are never copied. A pack takes 22 bytes per segment, so a corpus of a billion documents of ordinary
length needs a plan of about 25 GB, whatever its number of tokens. Packing keeps in memory two bytes of each
document's length, not the plan. `best-fit` also needs a number of 4 bytes for each piece of a document, and
two of them for a piece that fills a row; they lie in scratch files in the new folder. A number of 4 bytes
more is needed in memory only where a blend of weighted sources, a slice or a large validation split chooses
the documents.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.data.blend import (
    CorpusSlice,
    IndexedDocuments,
    choose_documents,
    hold_out,
    split_members,
)
from megatron_exact.data.document_pool import SCRATCH_BYTES, ChosenDocuments, DocumentPool
from megatron_exact.data.manifest import (
    FIRST_TARGET,
    POLICIES,
    SPLITS,
    WEIGHT_UNITS,
    Exposure,
    Manifest,
    Source,
    SourceUse,
    Split,
    TokenizerIdentity,
    finish_manifest,
    write_manifest,
)
from megatron_exact.data.pack_arrays import ARRAY_DTYPES, FIRST_TARGET_DTYPE, NpyWriter
from megatron_exact.data.plan import (
    BestFitPlan,
    ConcatPlan,
    Plan,
    PlanBlock,
    PlanMeasure,
)
from megatron_exact.data.sources import (
    agree_on_document_tokens,
    agree_on_tokenizer,
    describe_sources,
    load_pool,
    open_sources,
    parse_sources,
    require_ids_in_vocabulary,
    require_whole_records,
    supervise_answers,
)
from megatron_exact.exposure import bucket_lower_bounds
from megatron_exact.files import atomic_folder, free_bytes, require_free_folder, sha256_file

HASHING_THREADS = 4  # hashing releases Python's lock


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Everything that decides a plan besides the sources; all of it is in the fingerprint."""

    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    seed: int
    """Seed of the split, of the choice of documents and of their order."""
    validation_fraction: float = 0.0
    """Fraction of each source's documents in the validation split, in [0, 1)."""
    train_tokens: int | None = None
    """Tokens wanted in the train split; None means as many as there are."""
    allow_repeats: bool = False
    """Repeat a source that is shorter than its share."""
    weight_unit: str = "tokens"
    """What weights are shares of: `tokens` or `documents`."""
    mask_cross_document_targets: bool = False
    """Do not supervise the first token of a document."""
    corpus_slice: str | None = None
    """`I/N`: take the I-th of N disjoint parts of every source's training documents; None takes all."""

    def __post_init__(self) -> None:
        if self.corpus_slice is not None:
            part = CorpusSlice.parse(self.corpus_slice)
            # 1/1 means all documents, so it must have the same fingerprint as no slice
            object.__setattr__(self, "corpus_slice", None if part.slices == 1 else str(part))
        if self.row_tokens < 1:
            raise ValueError(f"row length {self.row_tokens}: --row-tokens must be at least 1")
        if self.row_tokens >= 1 << 31:
            raise ValueError(f"row length {self.row_tokens}: --row-tokens must be below 2^31")
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.weight_unit not in WEIGHT_UNITS:
            raise ValueError(f"unknown weight unit {self.weight_unit!r}: {' or '.join(WEIGHT_UNITS)}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"--validation-fraction {self.validation_fraction} is not in [0, 1)")
        if self.train_tokens is not None and self.train_tokens < 1:
            raise ValueError(f"--train-tokens {self.train_tokens} must be at least 1")
        if self.allow_repeats and self.train_tokens is None:
            raise ValueError("--allow-repeats needs --train-tokens, which says how many tokens are wanted")

    @classmethod
    def of(cls, manifest: Manifest) -> PackOptions:
        """Return the options that a pack was made with."""
        return cls(**{name: getattr(manifest, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    """One split, ready to be planned; its rows are computed while its plan is read."""

    name: str
    """Name of the split."""
    plan: Plan
    """Rows of the split."""
    uses: tuple[SourceUse, ...]
    """What the split takes from each source."""

    def describe(self, options: PackOptions, measure: PlanMeasure, arrays: dict[str, str]) -> Split:
        """Return the manifest's entry; call this after the plan was read to its end."""
        counts = measure.counts(
            policy=options.policy, mask_cross_document_targets=options.mask_cross_document_targets
        )
        return Split(
            rows=measure.rows,
            segments=measure.segments,
            tokens=measure.tokens,
            padding_tokens=measure.padding_tokens,
            left_out_tokens=self.plan.left_out_tokens,
            supervised_targets=int(counts.sum()),
            exposure=Exposure(
                lower=tuple(bucket_lower_bounds(options.row_tokens).tolist()), counts=tuple(counts.tolist())
            ),
            next_token=self.plan.next_token,
            sources=self.uses,
            arrays=arrays,
        )


def pack_corpora(
    sources: Sequence[str],
    output: str | Path,
    options: PackOptions,
    *,
    tokenizer: TokenizerIdentity | None = None,
    in_place: bool = False,
) -> Manifest:
    """Pack corpora into a new folder.

    Args:
        sources: `[WEIGHT:]PREFIX` each, PREFIX being that of a `.bin`/`.idx` pair or a folder of pairs.
        output: folder that does not exist yet, or is empty.
        options: see PackOptions.
        tokenizer: tokenizer that made the tokens; None means the one in the corpus records.
        in_place: `output` exists and contains the corpora; the caller makes it atomically.

    Raises:
        ValueError: options, sources or amounts that cannot be packed, or too little room on the disk;
            nothing is left then.
        FileNotFoundError: a source is missing.
        OSError: the disk is full or not writable; what was written is removed.
    """
    output = Path(output)
    if not in_place:
        require_free_folder(output)
    weights, prefixes = parse_sources(sources, options.weight_unit)
    corpora, parts = open_sources(prefixes)
    pool, supervision = supervise_answers(load_pool(corpora), corpora)
    if supervision is not None:
        require_whole_records(pool, options.row_tokens, options.policy, options.mask_cross_document_targets)
    require_long_enough(pool, options)
    described = describe_sources(corpora, parts, weights, output, pool)
    everything = [part for mine in parts for part in mine]
    identity = agree_on_tokenizer(everything, tokenizer, output)
    document_tokens = agree_on_document_tokens(everything)
    require_ids_in_vocabulary(parts, described, identity)
    names = [str(prefix) for prefix in prefixes]
    with contextlib.nullcontext(output) if in_place else atomic_folder(output) as folder:
        entries = {}
        for planned in plan_splits(pool, described, options, names=names, scratch=folder):
            require_room(planned.plan, folder, output)
            measure, arrays = write_plan(planned.plan, folder / planned.name, planned.name)
            entries[planned.name] = planned.describe(options, measure, arrays)
        manifest = finish_manifest(
            **asdict(options),
            tokenizer=identity,
            sources=tuple(described),
            splits=entries,
            supervision=supervision,
            document_tokens=document_tokens,
        )
        write_manifest(manifest, folder)
    return manifest


def require_room(plan: Plan, folder: Path, output: Path) -> None:
    """Check that a split and its scratch file fit on the disk, before hours are spent on them.

    Args:
        plan: plan of the split.
        folder: folder that is being built.
        output: its name in the end, for the message.

    Raises:
        ValueError: they do not fit.
    """
    dtypes = _dtypes_of(plan)
    rows = np.dtype(dtypes.pop("row_offsets")).itemsize * (plan.rows + 1)
    arrays = rows + plan.least_segments * sum(np.dtype(dtype).itemsize for dtype in dtypes.values())
    scratch = plan.scratch_bytes if plan.scratch_bytes >= SCRATCH_BYTES else 0
    free = free_bytes(folder)
    if arrays + scratch > free:
        raise ValueError(
            f"{output} needs {arrays:,} bytes and {scratch:,} for a while, but the disk of "
            f"{folder.parent} has {free:,} free: free {arrays + scratch - free:,} bytes there, or give "
            "--output on another disk"
        )


def write_plan(plan: Plan, folder: Path, name: str) -> tuple[PlanMeasure, dict[str, str]]:
    """Write the arrays of a split into a new folder.

    Args:
        plan: plan of the split.
        folder: folder to make.
        name: name of the split, for the progress bar.

    Returns:
        What the plan contains; sha256 by file name.
    """
    folder.mkdir()
    measure = PlanMeasure(row_tokens=plan.row_tokens, first_target=plan.pool.first_target)
    writers = {
        array: NpyWriter(folder / f"{array}.npy", dtype) for array, dtype in _dtypes_of(plan).items()
    }
    try:
        writers["row_offsets"].append(np.zeros(1, dtype=np.int64))
        with progress_bar(f"packing {name}", plan.rows, " rows") as bar:
            for block in plan.blocks():
                for array, values in block_arrays(block, plan.pool, measure.segments).items():
                    writers[array].append(values)
                measure.add(block)
                bar.update(measure.rows - bar.n)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abort()
    paths = [writer.path for writer in writers.values()]
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return measure, dict(
            zip((path.name for path in paths), threads.map(sha256_file, paths), strict=True)
        )


def _dtypes_of(plan: Plan) -> dict[str, str]:
    answers = {} if plan.pool.first_target is None else {FIRST_TARGET: FIRST_TARGET_DTYPE}
    return {**ARRAY_DTYPES, **answers}


def block_arrays(block: PlanBlock, pool: DocumentPool, segments_before: int) -> dict[str, np.ndarray]:
    """Return the stored arrays of one block by name; of `row_offsets` the ends of rows inside the block."""
    source, document = pool.locate(block.number)
    answers = {} if pool.first_target is None else {FIRST_TARGET: pool.first_target[block.number]}
    return {
        **answers,
        "row_offsets": np.flatnonzero(block.ends_row) + (segments_before + 1),
        "segment_source": source,
        "segment_document": document,
        "segment_start": block.start,
        "segment_tokens": block.tokens,
    }


def plan_splits(
    pool: DocumentPool,
    sources: Sequence[Source],
    options: PackOptions,
    *,
    names: Sequence[str],
    scratch: Path | None = None,
) -> Iterator[PlannedSplit]:
    """Plan the splits, one after the other; `--verify` and the forecast plan with the same function.

    Args:
        pool: lengths of all documents of all sources.
        sources: their manifest entries: weights, and index hashes for the validation split.
        options: see PackOptions.
        names: names of the sources, for messages.
        scratch: folder with room for 4 bytes a piece of a document, 8 if the piece fills a row, see
            `scratch_array`; None keeps them in memory.

    Raises:
        ValueError: amounts that cannot be packed, before the train split is yielded.
    """
    require_long_enough(pool, options)
    # one bit a document: the whole train split is planned before the validation split is chosen
    held_bits = [
        np.packbits(held)
        for held in hold_out(sources, pool, options.validation_fraction, seed=options.seed)
    ]
    weights = [source.weight for source in sources]
    for name in SPLITS:
        held_out = [
            np.unpackbits(bits, count=source.documents).view(np.bool_)
            for bits, source in zip(held_bits, sources, strict=True)
        ]
        chosen, uses = choose_split(name, pool, sources, names, weights, held_out, options)
        del held_out
        plan: Plan
        if options.policy == "concat":
            plan = ConcatPlan(chosen, options.row_tokens)
        else:
            plan = BestFitPlan(chosen, options.row_tokens, seed=options.seed, split=name, scratch=scratch)
        available = sum(use.tokens for use in uses)
        if name == "train":
            if plan.rows == 0 or available < options.row_tokens:
                raise ValueError(_no_row_message(f"{available}", options))
        elif options.validation_fraction and plan.rows == 0:
            warnings.warn(
                f"the validation split has {available} tokens, too few for one row of "
                f"{options.row_tokens}: it has no rows; raise --validation-fraction to evaluate on it",
                stacklevel=3,
            )
        yield PlannedSplit(name=name, plan=plan, uses=uses)
        del plan, chosen  # or both splits would be in memory while the second is planned


def choose_split(
    name: str,
    pool: DocumentPool,
    sources: Sequence[IndexedDocuments],
    names: Sequence[str],
    weights: Sequence[float | None],
    held_out: Sequence[NDArray[np.bool_]],
    options: PackOptions,
) -> tuple[ChosenDocuments, tuple[SourceUse, ...]]:
    """Choose the documents of one split, in packing order, and count what each source gives.

    Args:
        name: name of the split.
        pool: lengths of all documents of all sources.
        sources: the sources; the hashes of their indices decide on slices.
        names: names of the sources, for messages.
        weights: weights of the sources.
        held_out: from `hold_out`.
        options: see PackOptions; row length and policy are not read.

    Raises:
        ValueError: amounts that cannot be packed.
    """
    is_train = name == "train"
    is_sliced = is_train and options.corpus_slice is not None
    keep = None
    if is_sliced:
        names = [f"{source} (slice {options.corpus_slice})" for source in names]
        part = CorpusSlice.parse(str(options.corpus_slice))

        def keep(index: int, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
            return part.holds(documents, seed=options.seed, idx_sha256=sources[index].idx_sha256)

    members = split_members(pool, names, weights, held_out, train=is_train, keep=keep)
    empty = [source.name for source in members if not source.documents]
    if is_sliced and empty:
        raise ValueError(
            f"{', '.join(empty)}: this slice contains no training document: use fewer slices, add "
            "data, or leave --corpus-slice out"
        )
    return choose_documents(
        pool,
        members,
        split=name,
        seed=options.seed,
        target_tokens=options.train_tokens if is_train else None,
        allow_repeats=options.allow_repeats,
        weight_unit=options.weight_unit,
    )


def require_long_enough(pool: DocumentPool, options: PackOptions) -> None:
    """Check that the train split can fill a row, before planning takes gigabytes for nothing.

    Raises:
        ValueError: no row can be filled, however the documents are chosen.
    """
    available = pool.total_tokens()
    if options.train_tokens is not None:
        # Each source may exceed its share by its last document
        num_sources = pool.first.size - 1
        last = sum(max(int(block.max()) for block in pool.lengths_of(one)) for one in range(num_sources))
        wanted = options.train_tokens + last
        available = wanted if options.allow_repeats else min(available, wanted)
    if available < options.row_tokens:
        raise ValueError(_no_row_message(f"at most {available}", options))


def _no_row_message(available: str, options: PackOptions) -> str:
    remedy = "" if options.train_tokens is None else ", raise --train-tokens"
    if options.corpus_slice is not None:
        remedy += f", use fewer slices than in --corpus-slice {options.corpus_slice}"
    return (
        f"the {available} train tokens do not fill one row of {options.row_tokens} (and the label of its "
        f"last input): choose a smaller --row-tokens{remedy} or add data"
    )
