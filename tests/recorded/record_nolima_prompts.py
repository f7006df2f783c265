"""Record what the authors' NoLiMa code sends, for made-up data, as `nolima_prompts.json` beside this file.

    python -m tests.recorded.record_nolima_prompts CHECKOUT

CHECKOUT is a copy of github.com/adobe-research/NoLiMa; its `evaluation/run_tests.py` runs here as it is.
What talks to a server is replaced: the client notes each message and answers nothing. The books come in the
order of their names, where the authors' code takes the order of the file system. Written are hashes and a
few whole prompts of made-up texts, none of the authors' code or data.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from argparse import Action, ArgumentParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from tests.recorded.made_up_nolima import LENGTHS, needle_sets, tokenizer, write_data

OUTPUT = Path(__file__).with_name("nolima_prompts.json")
ABSENT = (
    *("openai", "tiktoken", "vertexai", "vertexai.preview", "vertexai.preview.tokenization"),
    *("vertexai.preview.generative_models", "langchain_aws", "google", "google.genai"),
    *("google.genai.types", "google.genai.errors", "tenacity", "jsonargparse"),
)
"""Packages that the authors' code imports and this recording does not need."""
SHOWN = (0, 9, 25)
"""Depths whose prompts are kept whole, for the shorter length and the first question of each set."""


class Recorder:
    """In the place of the client of a server."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.groups: list[tuple[str, str, int]] = []

    async def create(self, **request: Any) -> Any:
        self.sent.append(request)
        message = SimpleNamespace(content="nothing")
        usage = SimpleNamespace(prompt_tokens=1, completion_tokens=1, total_tokens=2)
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=usage
        )


def stub_packages(recorder: Recorder) -> None:
    """Make the imports of the authors' code succeed without their packages."""
    for name in ABSENT:
        sys.modules[name] = MagicMock()
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=recorder.create)))
    sys.modules["openai"] = types.ModuleType("openai")
    for name in ("AsyncAzureOpenAI", "AsyncOpenAI"):
        setattr(sys.modules["openai"], name, lambda **_: client)
    sys.modules["openai"].RateLimitError = RuntimeError  # type: ignore[attr-defined]
    sys.modules["tenacity"].retry = lambda **_: lambda function: function  # type: ignore[attr-defined]
    sys.modules["jsonargparse"].ArgumentParser = ArgumentParser  # type: ignore[attr-defined]
    sys.modules["jsonargparse"].ActionConfigFile = Action  # type: ignore[attr-defined]


def run(checkout: Path, data: Path, work: Path, task: str, length: int) -> None:
    """One set at one length by the authors' own script, with the settings of their configurations."""
    sys.argv = [
        "run_tests.py", "--model_name", "recorded", "--model_configs_dir", str(work),
        "--needle_set_path", str(data / "needlesets" / f"{task}.json"),
        "--haystack_dir", str(data / "haystack" / "rand_shuffle"),
        "--parent_results_dir", str(work / f"{task}-{length}"), "--context_length", str(length),
        "--document_depth_percent_intervals", "26", "--metric", "contains",
        "--use_default_system_prompt", "true",
    ]  # fmt: skip
    runpy.run_path(str(checkout / "evaluation" / "run_tests.py"), run_name="__main__")


def record(checkout: Path) -> dict[str, Any]:
    """Everything that is sent, by set, length, question and book."""
    recorder = Recorder()
    stub_packages(recorder)
    sys.path[:0] = [str(checkout / "evaluation"), str(checkout)]
    listed = os.listdir
    os.listdir = lambda *rest: sorted(listed(*rest))  # type: ignore[assignment]
    asyncio.set_event_loop(asyncio.new_event_loop())
    import async_evaluate  # type: ignore[import-not-found]

    seconds = itertools.count(1)
    async_evaluate.time = SimpleNamespace(time=lambda: next(seconds))  # names of their result files
    evaluate = async_evaluate.NoLiMa_Tester.evaluate

    def noted(tester: Any) -> None:
        recorder.groups.append((tester.test_name, Path(tester.haystack_path).name, len(recorder.sent)))
        evaluate(tester)

    async_evaluate.NoLiMa_Tester.evaluate = noted
    groups, shown = [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.chdir(
            work
        )  # their code looks for "o1" in the model's name, so that it must not be a random path
        data = write_data(work / "data")
        tokenizer().save_pretrained(work / "tokenizer")
        config = {"model": "tokenizer", "api_key": "", "api_url": "", "api_provider": "vllm"}
        config |= {"max_tokens": 192, "temperature": 0.0, "top_p": 1.0, "timeout": 1, "max_retries": 1}
        (work / "recorded.json").write_text(json.dumps(config))
        for length, task in itertools.product(LENGTHS, needle_sets()):
            recorder.sent, recorder.groups = [], []
            run(checkout, data, work, task, length)
            for place, (question, book, start) in enumerate(recorder.groups):
                requests = recorder.sent[start : start + 26]
                users = [request["messages"][-1]["content"] for request in requests]
                answers = answers_of(work / f"{task}-{length}" / question, book)
                groups.append(
                    {
                        "task": task,
                        "length": length,
                        "question": question,
                        "book": book,
                        "prompts_sha256": hash_of(users),
                        "answers_sha256": hash_of(answers),
                        "system": sorted({request["messages"][0]["content"] for request in requests}),
                        "roles": sorted({message["role"] for r in requests for message in r["messages"]}),
                        "max_tokens": sorted({request["max_tokens"] for request in requests}),
                    }
                )
                if place == 0 and length == LENGTHS[0]:
                    shown += [
                        {"task": task, "length": length, "question": question, "book": book}
                        | {"depth": 4 * depth, "prompt": users[depth]}
                        for depth in SHOWN
                    ]
    template = runpy.run_path(str(checkout / "evaluation" / "run_tests.py"))["DEFAULT_TASK_TEMPLATE"]
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "code": "github.com/adobe-research/NoLiMa",
        "commit": commit.stdout.strip() or "not a git checkout",
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "groups": groups,
        "shown": shown,
    }


def answers_of(folder: Path, book: str) -> list[list[str]]:
    """The answers that the authors' code compares with, in the order of the depths."""
    for path in sorted(folder.iterdir()):
        content = json.loads(path.read_text())
        if Path(content["haystack_path"]).name == book:
            return [
                [result["selected_character"]]
                if "selected_character" in result
                else content["gold_answers"]
                for result in content["results"]
            ]
    raise FileNotFoundError(f"{folder} has no result of {book}")


def hash_of(value: Any) -> str:
    """sha256 of the JSON text of a list of texts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    content = record(Path(sys.argv[1]).resolve())
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{OUTPUT}: {26 * len(content['groups'])} prompts")
