"""What the faults are done to: a corpus, a pack, models and results, made once by our own tools."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from functools import cached_property
from pathlib import Path

from tests.faults.matrix import run_tool

WORDS = (
    "the a model window of long text is was and with rows token loss data rank for in to by".split()  # noqa: SIM905
)
DOCUMENTS = 200
VOCABULARY = 512


class Kit:
    """Folders that no fault touches: rows get copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def copy(source: Path, target: Path) -> None:
        """Copy a folder."""
        shutil.copytree(source, target, symlinks=True)

    def _run(self, tool: str, *arguments: object) -> None:
        place = self.folder / f"log-{len(list(self.folder.iterdir()))}"
        place.mkdir()
        ended = run_tool(tool, arguments, place)
        assert ended.code == 0, ended.output[-3000:]

    @cached_property
    def hf(self) -> Path:
        """A Llama of two layers with random weights, its tokenizer beside it."""
        import torch
        import transformers
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        folder = self.folder / "hf"
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(self.texts, trainer)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=128
        )
        fast.save_pretrained(folder)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=0,
        )
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    @cached_property
    def texts(self) -> list[str]:
        """Documents of random words."""
        generator = random.Random(1)
        return [
            " ".join(
                generator.choice(WORDS)
                for _ in range(int(min(400, generator.lognormvariate(3.2, 1.1)) + 1))
            )
            for _ in range(DOCUMENTS)
        ]

    @cached_property
    def text(self) -> Path:
        """A folder with `a.jsonl`."""
        folder = self.folder / "text"
        folder.mkdir()
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts))
        return folder

    @cached_property
    def corpus(self) -> Path:
        """A folder with the corpus `c`: .bin, .idx and record."""
        folder = self.folder / "corpus"
        folder.mkdir()
        self._run(
            "tokenize_corpus.py",
            *("--input", self.text / "a.jsonl", "--tokenizer", self.hf, "--workers", 1),
            *("--output-prefix", folder / "c"),
        )
        return folder

    @cached_property
    def packed(self) -> Path:
        """A folder with the corpus `c` and its pack `pack`."""
        folder = self.folder / "packed"
        shutil.copytree(self.corpus, folder)
        self._run("pack_corpus.py", *PACKING, "--source", folder / "c", "--output", folder / "pack")
        return folder

    @cached_property
    def checkpoint(self) -> Path:
        """The model `hf` as a Megatron checkpoint."""
        folder = self.folder / "checkpoint"
        self._run("import_hf.py", "--hf", self.hf, "--output", folder)
        return folder

    @cached_property
    def exported(self) -> Path:
        """The checkpoint as a Hugging Face folder again."""
        folder = self.folder / "exported"
        self._run("export_hf.py", "--checkpoint", self.checkpoint, "--output", folder)
        return folder

    @cached_property
    def results(self) -> Path:
        """Result folders `a` and `b` of two models that answered the same examples."""
        from tests.unit.evaluation.written_results import provenance, sign_cells, write_results

        folder = self.folder / "results"
        backend = {"name": "hf", "dtype": "float32", "calls": []}
        for name, scores in (("a", [0, 0, 1, 1]), ("b", [1, 0, 1, 1])):
            cells = {("ruler", task, length): scores for task in ("vt", "cwe") for length in (1024, 2048)}
            about = {"provenance": provenance(), "backend": backend, "format_version": 1}
            write_results(folder / name, {**cells, ("qa", "piqa", 0): [1, 0]}, **about)
            sign_cells(folder / name)
        return folder

    @cached_property
    def comparison(self) -> Path:
        """A folder with the comparison of the results."""
        folder = self.folder / "comparison"
        sides = ("--baseline", self.results / "a", "--treatment", self.results / "b")
        self._run("compare_runs.py", *sides, "--resamples", 200, "--output", folder)
        return folder


PACKING = (
    *("--row-tokens", 64, "--policy", "concat"),
    *("--validation-fraction", 0.2, "--seed", 1),
)


def settle() -> None:
    """What every process of this folder's tests has in its environment."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
