"""The paper's corpora on the Hugging Face Hub: their names, the field of their text, and their mixes.

Table 4 of the paper mixes FineWeb-Edu : SlimPajama-6B : OpenWebMath as 6:24:32 and 1:3:6 and does not say
whether these are shares of tokens or of documents. Weights here are token shares, as in every pack of this
project; the option `--weight-unit documents` of `tools/pack_corpus.py` takes them as shares of documents.
The paper names neither revisions nor the FineWeb-Edu subset; `sample-100BT` is a random sample over all
crawls, so that its beginning is one too.

Text is read through `datasets` as a stream: nothing is stored and code of a repository is never run. Or it
is read from downloaded parquet files, for which a definition gives the text field and the licence. The
state of a stream is kept in the journal, so that a resumed run does not fetch the finished part again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_exact.data.documents import Cursor, Input, PartsWithCursors, RawPart

PART_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """One corpus on the Hub."""

    name: str
    """Name of the corpus in this project."""
    repo: str
    """Repository of the data set."""
    config: str | None
    """Configuration (subset) of the data set; None where it has only one."""
    split: str
    """Split of the data set."""
    text_field: str
    """Column that contains the text."""
    licence: str
    """Licence as the data set's card states it."""


HUB_SOURCES = {
    source.name: source
    for source in (
        HubSource(
            name="fineweb-edu",
            repo="HuggingFaceFW/fineweb-edu",
            config="sample-100BT",
            split="train",
            text_field="text",
            licence="odc-by",
        ),
        HubSource(
            name="slimpajama-6b",
            repo="DKYoon/SlimPajama-6B",
            config=None,
            split="train",
            text_field="text",
            licence="none stated",
        ),
        HubSource(
            name="open-web-math",
            repo="open-web-math/open-web-math",
            config=None,
            split="train",
            text_field="text",
            licence="odc-by",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class HubMix:
    """A row of table 4: how much of which source."""

    name: str
    """The ratio, as the paper writes it."""
    weights: dict[str, int]
    """Weight of each source."""
    used_for: str
    """Backbones and stages that the paper trained with it."""


HUB_MIXES = (
    HubMix(name="1", weights={"fineweb-edu": 1}, used_for="4K: Qwen2.5-0.5B, Llama-3.2-1B"),
    HubMix(
        name="6:24:32",
        weights={"fineweb-edu": 6, "slimpajama-6b": 24, "open-web-math": 32},
        used_for="4K>8K: Qwen2.5-1.5B, Qwen2.5-3B, Llama-3.2-3B",
    ),
    HubMix(
        name="1:3:6",
        weights={"fineweb-edu": 1, "slimpajama-6b": 3, "open-web-math": 6},
        used_for="4K>8K>16K: Qwen2.5-7B, Llama-3.1-8B",
    ),
)


def describe_hub_sources() -> str:
    """Return the text for `--list-hub`: sources, mixes and the packing arguments of each mix."""
    lines = ["sources (--hub NAME):"]
    for source in HUB_SOURCES.values():
        config = "" if source.config is None else f", config {source.config}"
        lines.append(f"  {source.name}: {source.repo}{config}, split {source.split}")
        lines.append(f"    text in {source.text_field!r}; licence by its card: {source.licence}")
    lines += ["", "mixes of the paper (table 4), with the arguments of megatron-exact pack:"]
    for mix in HUB_MIXES:
        arguments = [f"{weight}:tokens/{name}" for name, weight in mix.weights.items()]
        if len(arguments) == 1:
            arguments = [f"tokens/{name}" for name in mix.weights]
        lines.append(f"  {mix.name}  ({mix.used_for})")
        lines.append(f"    --source {' '.join(arguments)}")
    lines += [
        "",
        "The paper does not state the unit of its ratios: a weight is a share of tokens, or of documents",
        "with --weight-unit documents.",
    ]
    return "\n".join(lines)


def find_hub_source(name: str) -> HubSource:
    """Return the source of that name; ValueError for an unknown name."""
    if name not in HUB_SOURCES:
        raise ValueError(f"no Hub source {name!r}: there are {', '.join(HUB_SOURCES)} (see --list-hub)")
    return HUB_SOURCES[name]


class HubStream:
    """A streamed data set as the only input of a corpus.

    Args:
        source: definition of the data set.
        revision: commit of the repository, recorded.
        open_dataset: returns a new `datasets.IterableDataset` at its beginning.
        max_documents: most rows to read; None reads all.
    """

    def __init__(
        self,
        source: HubSource,
        *,
        revision: str | None,
        open_dataset: Callable[[], Any],
        max_documents: int | None = None,
    ) -> None:
        self.text_key = source.text_field
        self._source, self._revision = source, revision
        self._open_dataset, self._max_documents = open_dataset, max_documents

    def readers(self) -> Sequence[Input]:
        return [self]

    def sizes(self) -> Sequence[int]:
        return [0]

    def names(self) -> list[str]:
        return [self._source.repo]

    def identity(self) -> list[Any]:
        return [self.hub()]

    def raw_files(self) -> list[dict[str, Any]]:
        """Return no files: the revision identifies what was read."""
        return []

    def hub(self) -> dict[str, Any]:
        return {**describe_origin(self._source, self._revision), "max_documents": self._max_documents}

    def read(self, start: Cursor, part_bytes: int) -> PartsWithCursors:
        """Yield the rows after `start`, see `FileInput.read`.

        Rows are taken one by one: a state between batches of `IterableDataset.iter` names a row of the file
        and not of the batch, so that resuming from it would lose rows (datasets 5.2).
        """
        dataset = self._open_dataset()
        _check_column(dataset, self._source)
        dataset = dataset.select_columns([self.text_key])
        if start.stream is not None:
            dataset.load_state_dict(start.stream)
        contents: list[bytes | None] = []
        records, size = start.records, 0

        def part() -> tuple[RawPart, Cursor]:
            cursor = Cursor(records=records + len(contents), stream=dataset.state_dict())
            raw = RawPart(name=self._source.repo, kind="row", first=records + 1, contents=contents)
            return raw, cursor

        if records == self._max_documents:
            return
        for row in self._rows(dataset):
            contents.append(_utf8(row[self.text_key]))
            size += len(contents[-1] or b"")
            is_last = records + len(contents) == self._max_documents
            if is_last or size >= part_bytes or len(contents) == PART_ROWS:
                yield part()
                records, contents, size = records + len(contents), [], 0
            if is_last:
                return
        if contents:
            yield part()

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except (ValueError, OSError):
            raise
        except Exception as error:  # aiohttp, httpx and other libraries raise their own types
            raise ValueError(
                f"reading {self._source.repo} failed ({type(error).__name__}: {error}): run it again"
            ) from error


def describe_origin(source: HubSource, revision: str | None) -> dict[str, Any]:
    """Return what a corpus record states about a Hub data set."""
    return {
        "repo": source.repo,
        "config": source.config,
        "split": source.split,
        "revision": revision,
        "text_field": source.text_field,
    }


def open_hub(
    source: HubSource, *, revision: str | None = None, max_documents: int | None = None
) -> HubStream:
    """Open the stream of a source on the Hub, pinned to one commit.

    Args:
        source: definition of the data set.
        revision: branch, tag or commit; None means the newest. The commit that it refers to is recorded.
        max_documents: most rows to read.

    Raises:
        ValueError: `datasets` is not installed, or the Hub cannot be reached.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise ValueError("reading from the Hub needs the package datasets: pip install datasets") from error
    try:
        commit = huggingface_hub.HfApi().dataset_info(source.repo, revision=revision).sha
    except Exception as error:  # the library and those below it raise many types
        raise ValueError(
            f"{source.repo} at {revision or 'its newest revision'} cannot be reached "
            f"({type(error).__name__}: {error}): check the network, or download its parquet files and name "
            f"them by --hub {source.name} --input FILE..."
        ) from error

    def open_dataset() -> Any:
        return datasets.load_dataset(
            source.repo, source.config, split=source.split, revision=commit, streaming=True
        )

    return HubStream(source, revision=commit, open_dataset=open_dataset, max_documents=max_documents)


def _check_column(dataset: Any, source: HubSource) -> None:
    names = dataset.column_names
    if names is not None and source.text_field not in names:
        raise ValueError(
            f"{source.repo} has no column {source.text_field!r}, only {', '.join(names)}: its layout has "
            "changed, use an earlier --revision"
        )


def _utf8(value: object) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"the text column contains a {type(value).__name__}: name the right --revision")
    return value.encode("utf-8", "surrogatepass")  # a lone surrogate is found, and named, when decoded
