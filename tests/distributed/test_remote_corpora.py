"""A job whose corpora lie at a URL has the losses of one that reads them from disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.data import remote, source_guards
from tests import forked
from tests.distributed import jobs, ranks
from tests.range_server import RangeServer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The URL of a server for `tmp_path/store`, in a process of its own: ranks are forked from this one."""
    (tmp_path / "store").mkdir()

    def serve() -> None:
        server = RangeServer(tmp_path / "store")
        print(server.server_address[1], flush=True)
        server.serve_forever()

    port = tmp_path / "port.txt"
    port.touch()
    child = forked.start(serve, port, tmp_path / "server.txt")
    try:
        while not port.read_text().endswith("\n"):
            assert forked.exit_code(child) is None, (tmp_path / "server.txt").read_text()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port.read_text().strip()}"
    finally:
        forked.kill(child)


@pytest.mark.filterwarnings("ignore:no source has a corpus record", "ignore:the validation split")
def test_training_from_a_url_has_the_losses_of_a_disk(
    tmp_path: Path, checkpoint: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "cache"))
    corpus = jobs.make_corpus(tmp_path / "docs")
    pack = jobs.make_pack(corpus, "concat")

    def losses(name: str, world: int, *flags: Any) -> list[dict[str, Any]]:
        start = ("--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / name)
        argv = jobs.command(pack, "exact", 3, *start, "--num-workers", 2, *flags)
        ranks.train(world, argv, tmp_path / f"{name} output").check()
        return [
            {key: line[key] for key in ("loss", "weighted_loss", "grad_norm", "bucket_targets")}
            for line in ranks.read_jsonl(tmp_path / name / "losses.jsonl")
        ]

    expected = losses("disk", 2)
    for path in tmp_path.glob("docs.*"):
        path.rename(tmp_path / "store" / path.name)
    assert losses("url", 2, "--source-root", store) == expected
    run = json.loads((tmp_path / "url" / "run.json").read_text())
    assert store in json.dumps(run)
    # Other tokens in the store, of the same size: without the checks of the start they would be trained on
    path = tmp_path / "store" / "docs.bin"
    tokens = np.fromfile(path, np.uint8)
    tokens[tokens.size // 2 :] ^= 1
    tokens.tofile(path)
    monkeypatch.setattr(remote, "FRESH_SECONDS", 0)
    argv = jobs.command(pack, "exact", 3, "--run-dir", tmp_path / "other", "--source-root", store)
    ended = ranks.train(2, argv, tmp_path / "other output")
    assert any(ended.codes)
    assert any("is not the file that was packed" in output for output in ended.outputs)


@pytest.mark.filterwarnings("ignore:no source has a corpus record", "ignore:the validation split")
def test_nodes_that_read_other_objects_do_not_train(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is another node: the stand-in in its cache is of an older object."""
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "cache"))
    pack = jobs.make_pack(jobs.make_corpus(tmp_path / "docs"), "concat")
    for path in tmp_path.glob("docs.*"):
        path.rename(tmp_path / "store" / path.name)

    def as_another_node() -> None:
        real = source_guards.remote_bin

        def older(path: Path) -> remote.RemoteObject | None:
            what = real(path)
            return what and remote.RemoteObject(url=what.url, size=what.size, identity={"ETag": "old"})

        if os.environ["RANK"] == "1":
            source_guards.remote_bin = older

    argv = jobs.command(pack, "none", 1, "--run-dir", tmp_path / "run", "--source-root", store)
    ended = ranks.train(2, argv, tmp_path / "output", as_another_node)
    assert any(ended.codes)
    assert "ranks [1] read other versions of objects below http://127.0.0.1" in "".join(ended.outputs)
