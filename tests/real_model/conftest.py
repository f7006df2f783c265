"""The real model, its checkpoint and packs of real text, made once for all tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from examples.real_model.make import DEFAULT_OUTPUT, is_made
from tests.distributed import ranks
from tests.real_model.chain import ROW_TOKENS, tool


@dataclass(frozen=True)
class Prepared:
    """What every test of this folder starts from."""

    hf: Path
    """Hugging Face folder of SmolLM2-135M-Instruct."""
    checkpoint: Path
    """The same model in Megatron's format."""
    pack: Path
    """The language reference of Python, 79 documents, in rows of ROW_TOKENS."""
    text: Path
    """The documents of the pack as JSON lines."""


@pytest.fixture(scope="session")
def hf() -> Path:
    if not is_made(DEFAULT_OUTPUT):
        pytest.fail(f"{DEFAULT_OUTPUT} is not there: `make test-real` makes it first")
    return DEFAULT_OUTPUT


@pytest.fixture(scope="session")
def prepared(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    ranks.import_megatron_once()
    ranks.TIMEOUT_SECONDS = 3000  # an iteration takes a minute of one core
    folder = tmp_path_factory.mktemp("real")
    text = folder / "reference.jsonl"
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    tool("tokenize_corpus", "--input", text, "--tokenizer", hf, "--output-prefix", folder / "corpus")
    tool(
        *("pack_corpus", "--source", folder / "corpus", "--row-tokens", ROW_TOKENS, "--policy", "concat"),
        *("--validation-fraction", 0.05, "--seed", 1, "--output", folder / "pack"),
    )
    tool("import_hf", "--hf", hf, "--output", folder / "checkpoint")
    return Prepared(hf, folder / "checkpoint", folder / "pack", text)
