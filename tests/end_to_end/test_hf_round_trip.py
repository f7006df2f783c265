"""Hugging Face folder > import > training on TP2 x PP2 > export > from_pretrained > same loss."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.tokenizers import tokenizer_sha256
from tests.distributed import hf_models, ranks
from tests.unit.data.tiny_tokenizers import SENTENCES, write_huggingface

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAME = "qwen2 tied, 2 groups"
VOCABULARY = 404  # more rows than the tokenizer has ids, as in Qwen2.5; not a multiple of 128
ROW_TOKENS = 64
BATCH = 4
ITERATIONS = 20
END_ID = 1  # of write_huggingface
LOSS_BOUND = 2e-6


def tool(name: str, *arguments: Any) -> str:
    """Run a tool as a user does; its output."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Chain:
    """What the steps before training leave."""

    hf: Path
    pack: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    ranks.import_megatron_once()
    folder = tmp_path_factory.mktemp("chain")
    hf = write_huggingface(folder / "model")
    hf_models.make_model(NAME, vocab_size=VOCABULARY).save_pretrained(hf)
    (hf / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 0.8}))
    documents = [" ".join(SENTENCES[i % 7 : i % 7 + 1 + i % 19]) for i in range(240)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tool(
        "tokenize_corpus",
        *("--input", folder / "text.jsonl", "--tokenizer", hf, "--output-prefix", folder / "corpus"),
    )
    options = PackOptions(row_tokens=ROW_TOKENS, policy="best-fit", seed=3, validation_fraction=0.2)
    pack_corpora([str(folder / "corpus")], folder / "pack", options)
    tool("import_hf", "--hf", hf, "--output", folder / "checkpoint")
    return Chain(hf, folder / "pack", folder / "checkpoint")


def command(chain: Chain, run: Path, checkpoint: Path | None = None) -> list[Any]:
    """A job of which nothing but the checkpoint says what the model is."""
    return [
        *("--pack", chain.pack, "--token-weighting", "exact"),
        *("--load", checkpoint or chain.checkpoint, "--save", run, "--save-interval", ITERATIONS),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        *("--global-batch-size", BATCH, "--train-iters", ITERATIONS, "--lr", "1e-3"),
        *("--lr-decay-style", "constant", "--eval-interval", ITERATIONS),
        *("--eval-iters", read_manifest(chain.pack).splits["validation"].rows // BATCH),
    ]


def losses_of(pack: Path, rows: int, *folders: Path) -> list[float]:
    """Loss of each folder over the first validation rows, in a process of its own (`hf_loss.py`)."""
    command = [sys.executable, "-m", "tests.end_to_end.hf_loss", str(pack), str(rows), *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    losses: list[float] = json.loads(done.stdout)
    return losses


def test_the_exported_model_has_the_loss_that_megatron_reported(chain: Chain, tmp_path: Path) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    ended = ranks.train(4, command(chain, run), tmp_path / "output").check()
    assert f"the model is that of {chain.checkpoint / 'hf' / 'config.json'}" in ended.outputs[0]
    tool("export_hf", "--checkpoint", run, "--output", exported)

    (line,) = ranks.read_jsonl(run / "evaluations.jsonl")
    assert line["iteration"] == ITERATIONS
    split = read_manifest(chain.pack).splits["validation"]
    rows = split.rows // BATCH * BATCH
    assert 0 < line["targets"] <= split.supervised_targets
    before, loss = losses_of(chain.pack, rows, chain.hf, exported)
    assert line["loss"] == pytest.approx(loss, rel=LOSS_BOUND)
    assert before - loss > 0.1, "nothing was learnt: the comparison would not see an export of the start"

    # Everything else of the folder is as it was, but for the end of the corpus's documents
    assert tokenizer_sha256(exported) == tokenizer_sha256(chain.hf)
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (exported, chain.hf))
        ends, before = ours.pop("eos_token_id"), theirs.pop("eos_token_id", None)
        assert ends == ([END_ID, before] if before is not None else END_ID), name
        assert ours == {"bos_token_id": ours["bos_token_id"], **theirs}, name


def test_a_model_with_another_tokenizer_is_refused(chain: Chain, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(chain.checkpoint, other)
    path = other / "hf" / "tokenizer.json"
    path.write_text(path.read_text().replace("Ġpages", "Ġpagez"))
    ended = ranks.train(1, command(chain, tmp_path / "run", other), tmp_path / "output")
    assert ended.codes == [1]
    (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
    assert f"which is not the tokenizer in {other / 'hf'}" in error
    assert not (tmp_path / "run").exists()
