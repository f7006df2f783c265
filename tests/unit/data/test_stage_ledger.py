"""The stage ledger against a reading of the packs token by token, without the package."""

from __future__ import annotations

import json
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import (
    Documents,
    ended_documents,
    heavy_tailed_lengths,
    plain_bucket,
    random_documents,
    read_rows_plainly,
    write_corpus,
)

from megatron_exact.data.manifest import fingerprint_of
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.stage_ledger import make_ledger
from tests import forked

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split", "ignore:.*taken whole"
)


class PlainChain:
    """What the stages of a chain read, document by document."""

    def __init__(self, packs: list[Path], corpora: dict[str, Documents]) -> None:
        """`corpora` by the name of their prefix."""
        self.packs, self.corpora = packs, corpora
        self.reads: dict[str, list[Counter[int]]] = {name: [Counter() for _ in packs] for name in corpora}
        self.tokens: dict[str, list[set[tuple[int, int]]]] = {
            name: [set() for _ in packs] for name in corpora
        }
        self.inputs = {name: [0] * len(packs) for name in corpora}
        self.held_out: dict[str, list[set[int]]] = {name: [set() for _ in packs] for name in corpora}
        self.targets: list[dict[tuple[str, int], Counter[int]]] = []
        for stage in range(len(packs)):
            self._read(stage)

    def _read(self, stage: int) -> None:
        pack = self.packs[stage]
        manifest = json.loads((pack / "manifest.json").read_text())
        names = [Path(source["prefix"]).name for source in manifest["sources"]]
        row_tokens = manifest["row_tokens"]
        for split in ("train", "validation"):
            columns = ("source", "document", "start", "tokens")
            arrays = [np.load(pack / split / f"segment_{column}.npy").tolist() for column in columns]
            for source, document, start, tokens in zip(*arrays, strict=True):
                if split == "validation":
                    self.held_out[names[source]][stage] |= {document} if start == 0 else set()
                    continue
                self.reads[names[source]][stage][document] += start == 0
                self.inputs[names[source]][stage] += tokens
                self.tokens[names[source]][stage] |= {(document, start + n) for n in range(tokens)}
        self.targets.append(defaultdict(Counter))
        rows = read_rows_plainly(pack, "train", [self.corpora[name] for name in names])
        columns = ("source", "document", "start", "tokens")
        arrays = [np.load(pack / "train" / f"segment_{column}.npy").tolist() for column in columns]
        segments = list(zip(*arrays, strict=True))
        offsets = np.load(pack / "train" / "row_offsets.npy").tolist()
        place = manifest["splits"]["train"]["next_token"]
        for number, row in enumerate(rows):
            owners = []  # of each input: the document of its target
            mine = segments[offsets[number] : offsets[number + 1]]
            for index, (source, document, start, tokens) in enumerate(mine):
                owners += [(names[source], document)] * tokens
                if start + tokens < len(self.corpora[names[source]][document]):
                    continue
                if index + 1 < len(mine):
                    after = mine[index + 1][:2]
                elif number + 1 < len(rows):
                    after = segments[offsets[number + 1]][:2]
                else:
                    after = (place["source"], place["document"]) if place else (source, document)
                owners[-1] = (names[after[0]], after[1])
            for owner, context, is_target in zip(owners, row.context, row.mask, strict=False):
                if is_target:
                    self.targets[-1][owner][plain_bucket(context, row_tokens)] += 1

    def compare(self, ledger: dict[str, Any]) -> None:
        """Every number of a ledger."""
        for source in ledger["sources"]:
            name = Path(source["prefix"]).name
            corpus = self.corpora[name]
            full = [number for number, document in enumerate(corpus) if document]
            total = sum(map(len, corpus))
            assert (source["documents"], source["tokens"]) == (len(full), total)
            assert source["empty_documents"] == len(corpus) - len(full)
            reads = self.reads[name]
            for stage, found in enumerate(source["stages"]):
                read = [number for number in full if reads[stage][number]]
                assert found["documents"] == len(read)
                assert found["documents_share"] == len(read) / len(full)
                assert found["tokens"] == len(self.tokens[name][stage])
                assert found["tokens_share"] == len(self.tokens[name][stage]) / total
                assert found["inputs"] == self.inputs[name][stage]
                assert found["held_out_documents"] == len(self.held_out[name][stage])
                self._compare_times(found["times"], reads[stage], corpus)
            in_all = sum(reads, Counter())
            self._compare_times(source["times"], in_all, corpus)
            for i, one in enumerate(reads):
                for j, other in enumerate(reads):
                    both = [number for number in full if one[number] and other[number]]
                    assert source["overlap"]["documents"][i][j] == len(both)
                    assert source["overlap"]["tokens"][i][j] == sum(len(corpus[number]) for number in both)
                    leaked = [number for number in self.held_out[name][i] if other[number]]
                    assert source["evaluated_and_trained"][i][j] == len(leaked)
            self._compare_groups(source["groups"], name)

    def _compare_times(self, found: list[dict[str, int]], reads: Counter[int], corpus: Documents) -> None:
        expected: dict[int, list[int]] = {0: [0, 0]}
        for number, document in enumerate(corpus):
            if document:
                one = expected.setdefault(reads[number], [0, 0])
                one[0] += 1
                one[1] += len(document)
        assert found == [
            {"reads": times, "documents": one[0], "tokens": one[1]}
            for times, one in sorted(expected.items())
        ]

    def _compare_groups(self, groups: list[dict[str, Any]], name: str) -> None:
        seen = []
        for group in groups:
            stages = set(group["stages"])
            members = {
                number
                for number, document in enumerate(self.corpora[name])
                if document and {s for s in range(len(self.packs)) if self.reads[name][s][number]} == stages
            }
            seen.append(members)
            assert group["documents"] == len(members)
            assert group["tokens"] == sum(len(self.corpora[name][number]) for number in members)
            for stage, targets in enumerate(group["targets"]):
                expected: Counter[int] = sum(
                    (self.targets[stage][name, number] for number in members), Counter()
                )
                assert dict(enumerate(targets or [])) == {n: expected[n] for n in range(len(targets or []))}
                assert sum(targets or []) == sum(expected.values())
        assert len(set.union(*seen)) == sum(map(len, seen)) == sum(map(bool, self.corpora[name]))


def corpora_of(root: Path) -> dict[str, Documents]:
    """Two corpora, one with empty documents."""
    one = ended_documents(random_documents(heavy_tailed_lengths(120, 1), 1))
    two = [part for n in range(60) for part in (random_documents([5 + n * n % 90], n)[0], [])]
    corpora = {"one": one, "two": two}
    for name, documents in corpora.items():
        write_corpus(root / name, documents)
    return corpora


CHAINS: dict[str, list[tuple[list[str], dict[str, Any]]]] = {
    "slices": [
        (["one", "two"], {"row_tokens": 16, "policy": "concat", "corpus_slice": "1/3"}),
        (["one", "two"], {"row_tokens": 32, "policy": "concat", "corpus_slice": "2/3"}),
        (["one", "two"], {"row_tokens": 64, "policy": "best-fit", "corpus_slice": "3/3"}),
    ],
    "the same documents": [
        (["one"], {"row_tokens": 16, "policy": "concat"}),
        (["one"], {"row_tokens": 64, "policy": "best-fit"}),
    ],
    "repeats and weights": [
        (
            ["3:one", "1:two"],
            {"row_tokens": 16, "policy": "best-fit", "train_tokens": 12_000, "allow_repeats": True},
        ),
        (
            ["1:two", "1:one"],
            {"row_tokens": 32, "policy": "concat", "train_tokens": 9_000, "allow_repeats": True},
        ),
    ],
    "masked": [
        (["two", "one"], {"row_tokens": 48, "policy": "concat", "mask_cross_document_targets": True}),
        (["one"], {"row_tokens": 48, "policy": "best-fit", "mask_cross_document_targets": True}),
    ],
    "other seeds": [
        (
            ["one"],
            {"row_tokens": 32, "policy": "concat", "corpus_slice": "1/2", "validation_fraction": 0.3},
        ),
        (["one"], {"row_tokens": 64, "policy": "concat", "seed": 2, "validation_fraction": 0.3}),
    ],
}


def pack_chain(root: Path, name: str) -> tuple[list[Path], dict[str, Documents]]:
    corpora = corpora_of(root)
    packs = []
    for number, (sources, options) in enumerate(CHAINS[name]):
        pack = root / f"pack{number}"
        texts = [
            source.replace(source.split(":")[-1], str(root / source.split(":")[-1])) for source in sources
        ]
        pack_corpora(texts, pack, PackOptions(**{"seed": 1, "validation_fraction": 0.1, **options}))
        packs.append(pack)
    return packs, corpora


@pytest.mark.parametrize("name", CHAINS)
def test_every_number_is_that_of_a_plain_reading(tmp_path: Path, name: str) -> None:
    packs, corpora = pack_chain(tmp_path, name)
    ledger = make_ledger(packs)
    PlainChain(packs, corpora).compare(ledger)
    for number, stage in enumerate(ledger["stages"]):
        counted = np.zeros(len(stage["counts"]), dtype=np.int64)
        for source in ledger["sources"]:
            for group in source["groups"]:
                if group["targets"][number] is not None:
                    counted += group["targets"][number]
        assert counted.tolist() == stage["counts"]


def test_the_comparison_sees_one_document_read_elsewhere(tmp_path: Path) -> None:
    """The control: one segment of a pack names another document of the same length."""
    packs, corpora = pack_chain(tmp_path, "the same documents")
    ledger = make_ledger(packs)
    path = packs[1] / "train" / "segment_document.npy"
    documents, starts = np.load(path), np.load(packs[1] / "train" / "segment_start.npy")
    lengths = [len(corpora["one"][number]) for number in documents]
    place, other = next(
        (i, j)
        for i in range(len(documents))
        for j in range(i)
        if lengths[i] == lengths[j] and documents[i] != documents[j] and starts[i] == starts[j] == 0
    )
    documents[place] = documents[other]
    np.save(path, documents)
    with pytest.raises(AssertionError):
        PlainChain(packs, corpora).compare(ledger)
    PlainChain(packs, corpora).compare(make_ledger(packs))


def test_leaks_between_stages_are_named(tmp_path: Path) -> None:
    packs, _ = pack_chain(tmp_path, "other seeds")
    (source,) = make_ledger(packs)["sources"]
    leaks = source["evaluated_and_trained"]
    assert leaks[0][0] == leaks[1][1] == 0
    assert leaks[0][1] > 0
    assert leaks[1][0] > 0
    done = run_tool(*packs, "--ledger")
    assert f"WARNING: 32 evaluates on {leaks[0][1]} documents that 64 trains on" in done.stdout


def test_it_needs_no_tokens_and_says_which_index_is_missing(tmp_path: Path) -> None:
    packs, _ = pack_chain(tmp_path, "slices")
    expected = make_ledger(packs)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    assert make_ledger(packs) == expected
    index = (tmp_path / "two.idx").read_bytes()
    (tmp_path / "two.idx").write_bytes(index[:-1] + b"x")
    with pytest.raises(ValueError, match=r"two\.idx is not the index that was packed"):
        make_ledger(packs)
    (tmp_path / "two.idx").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.idx is missing.*--source-root"):
        make_ledger(packs)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "two.idx").write_bytes(index)
    (tmp_path / "one.idx").rename(tmp_path / "moved" / "one.idx")
    assert make_ledger(packs, source_root=tmp_path / "moved") == expected


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool("inspect_pack.py", *arguments)


def test_the_tool(tmp_path: Path) -> None:
    packs, _ = pack_chain(tmp_path, "slices")
    ledger = make_ledger(packs)
    assert json.loads(run_tool(*packs, "--ledger", "--json").stdout) == ledger
    text = run_tool(*packs, "--ledger").stdout
    source = ledger["sources"][0]
    assert f"{source['documents']} documents, {source['tokens']:,} tokens" in text
    assert text.count("no document") == 6  # two sources, three pairs of stages
    assert "targets of the documents read by 16 " in text
    assert "1/3" in text
    for arguments, message in (
        (packs, "3 packs: name one, or several with --ledger"),
        ([*packs, "--ledger", "--alpha", "0.2"], "--alpha with --ledger"),
        ([tmp_path, "--ledger"], "manifest.json is missing"),
    ):
        done = run_tool(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr


def test_a_document_outside_its_source_is_one_line(tmp_path: Path) -> None:
    packs, _ = pack_chain(tmp_path, "the same documents")
    path = packs[0] / "train" / "segment_document.npy"
    documents = np.load(path)
    documents[3] = 10**9
    np.save(path, documents)
    with pytest.raises(ValueError, match="names a document that does not exist"):
        make_ledger(packs)
    assert fingerprint_of(json.loads((packs[0] / "manifest.json").read_text()))
