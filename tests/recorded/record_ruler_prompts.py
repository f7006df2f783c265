"""Record what NVIDIA's RULER generators make from made-up essays: `ruler_prompts.json` beside this file.

    python -m tests.recorded.record_ruler_prompts CHECKOUT

CHECKOUT is a copy of github.com/NVIDIA/RULER; the scripts of its `scripts/data/synthetic` run here as they
are, with the arguments of its `prepare.py`. Some things are replaced. Before each prompt Python's generator
gets a new seed, which is recorded with the size of the haystack, so that ours can be given the same draws;
numpy's integers come from it, too. Sentences are cut by this project's function, since NLTK's model is a
download. Lists of words are short for the needles, whose keys are pairs of them. Written are hashes, seeds,
sizes, lengths and a few whole prompts, none of their code or data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy
import wonderwords
import yaml

from megatron_exact.evaluation.prompts import sentences
from megatron_exact.evaluation.suites.ruler import TASKS
from tests.recorded.made_up_ruler import (
    CHAT_TASKS,
    LENGTHS,
    MORE_WORDS,
    SAMPLES,
    SHORT_LIST,
    essays,
    word_tokenizer,
)

OUTPUT = Path(__file__).with_name("ruler_prompts.json")
SHOWN = ("niah_multiquery", "vt", "cwe")
"""Tasks of which the first prompt of the shorter length is kept whole."""


class DrawnIntegers:
    """In the place of numpy's global generator: Python's."""

    @staticmethod
    def randint(low: int, high: int) -> int:
        return random.randrange(low, high)

    @staticmethod
    def seed(_: int) -> None:
        pass


class Numpy:
    """numpy, but for its generator."""

    random = DrawnIntegers

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


class Recording:
    """One of the scripts, loaded with arguments; each prompt it makes gets a seed."""

    def __init__(self, scripts: Path, config: dict[str, Any], words: list[str]) -> None:
        sys.argv = [f"{config['task']}.py", *words]
        path = scripts / "data" / "synthetic" / f"{config['task']}.py"
        spec = importlib.util.spec_from_file_location(f"recorded_{config['task']}", path)
        assert spec is not None
        assert spec.loader is not None
        self.script: ModuleType = importlib.util.module_from_spec(spec)
        whole = wonderwords.random_word._get_words_from_text_file
        if config["task"] == "niah":
            wonderwords.random_word._get_words_from_text_file = lambda name: whole(name)[:SHORT_LIST]
        spec.loader.exec_module(self.script)
        wonderwords.random_word._get_words_from_text_file = whole
        self.calls: list[tuple[int, int, str]] = []
        """Seed, size and text of each prompt that was tried."""
        self.seeds = itertools.count(1)
        self.make = self.script.generate_input_output
        for name, value in {
            "generate_input_output": self.noted,
            "np": Numpy(),
            "sent_tokenize": sentences,
        }.items():
            if hasattr(self.script, name):
                setattr(self.script, name, value)

    def noted(self, size: int, *rest: Any, **named: Any) -> Any:
        seed = next(self.seeds)
        random.seed(seed)
        made = self.make(size, *rest, **named)
        used = made[2] if len(made) == 3 else size  # fwe shrinks inside
        self.calls.append((seed, used, made[0]))
        return made

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        self.script.main()
        text = (folder / "recorded" / "validation.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


def group(scripts: Path, work: Path, task: str, length: int, template_type: str) -> dict[str, Any]:
    """The prompts of one cell."""
    sys.path[:0] = [str(scripts / "data" / "synthetic"), str(scripts / "data")]
    from constants import TASKS as BASES  # type: ignore[import-not-found]
    from template import Templates  # type: ignore[import-not-found]

    config = yaml.safe_load((scripts / "synthetic.yaml").read_text())[task]
    config.update(BASES[config["task"]])
    template = Templates[template_type].format(task_template=config["template"]) + config["answer_prefix"]
    words = ["--save_dir", str(work), "--save_name", "recorded", "--tokenizer_type", "hf"]
    words += ["--tokenizer_path", str(work / "tokenizer"), "--max_seq_length", str(length)]
    words += ["--tokens_to_generate", str(config["tokens_to_generate"])]
    words += ["--num_samples", str(SAMPLES), "--template", template]
    words += [word for key, value in config["args"].items() for word in (f"--{key}", str(value))]
    recording = Recording(scripts, config, words)
    rows = recording.rows(work)
    prompts = [row["input"] + row["answer_prefix"] for row in rows]
    draws = [
        next((seed, size) for seed, size, text in recording.calls if is_end_of(text, prompt, task))
        for prompt in prompts
    ]
    found = {
        "task": task,
        "length": length,
        "template": template_type,
        "generation_tokens": config["tokens_to_generate"],
        "draws": draws,
        "tokens": [row["length"] for row in rows],
        "prompts_sha256": hash_of(prompts),
        "answers_sha256": hash_of([row["outputs"] for row in rows]),
    }
    if task == "vt":  # the first prompt of all that was kept is the worked example
        example = next(
            place for place, (_, _, text) in enumerate(recording.calls) if is_example(text, recording.calls)
        )
        found["example"] = recording.calls[example][:2]
    if task in SHOWN and length == LENGTHS[0] and template_type == "base":
        found["prompt"] = prompts[0]
    return found


def is_end_of(text: str, prompt: str, task: str) -> bool:
    """Whether a prompt was made from a text, in which `vt` puts an example."""
    return prompt == text or (
        task == "vt" and prompt.endswith(text.removeprefix("[INST] ")) and " 12345" not in text
    )


def is_example(text: str, calls: list[tuple[int, int, str]]) -> bool:
    """Whether this is the last text with the example's value."""
    return text == [each for _, _, each in calls if " = 12345" in each][-1]


def record(checkout: Path) -> dict[str, Any]:
    """Every task at every length, some of them with a chat template as well."""
    sys.modules["tenacity"] = MagicMock()  # of clients of servers, which nothing here calls
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scripts = work / "scripts"
        shutil.copytree(checkout / "scripts", scripts)
        texts = scripts / "data" / "synthetic" / "json"
        (texts / "PaulGrahamEssays.json").write_text(json.dumps({"text": essays()}))
        (texts / "english_words.json").write_text(json.dumps(dict(enumerate(MORE_WORDS))))
        word_tokenizer().save_pretrained(work / "tokenizer")
        cells = [(task, length, "base") for length in LENGTHS for task in TASKS]
        cells += [(task, LENGTHS[0], "meta-chat") for task in CHAT_TASKS]
        groups = []
        for cell in cells:
            print(*cell, flush=True)
            groups.append(group(scripts, work, *cell))
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "code": "github.com/NVIDIA/RULER",
        "commit": commit.stdout.strip() or "not a git checkout",
        "wonderwords": version("wonderwords"),
        "groups": groups,
    }


def hash_of(value: Any) -> str:
    """sha256 of the JSON text of a list of texts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    content = record(Path(sys.argv[1]).resolve())
    OUTPUT.write_text(json.dumps(content) + "\n")
    print(f"{OUTPUT}: {SAMPLES * len(content['groups'])} prompts")
