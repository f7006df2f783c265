"""Standard question answering, by lm-eval's own tasks: likelihood of the choices, GSM8K by generation.

Without a network the data sets come from local copies, one folder a task:

    DIR/arc_challenge/test.jsonl        splits as JSON lines (or .parquet), named as on the Hub
    DIR/mmlu/anatomy/dev.jsonl          MMLU: one folder a subject

with the fields of the Hub's data sets. Metrics (METRICS) are what is usual; the paper does not say.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.engine import FEWSHOT_SEED, Engine, PromptLengthError
from megatron_exact.evaluation.prompts import Prompts
from megatron_exact.evaluation.result_folders import Example, text_sha256
from megatron_exact.evaluation.suites.suite import Documents, Suite, SuiteOption, SuiteOptions, register
from megatron_exact.files import sha256_file

METRICS = {
    "mmlu": "acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "piqa": "acc_norm",
    "gsm8k": "exact_match",
}
TASKS = tuple(METRICS)
FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
GSM8K_FILTER = "flexible-extract"
GSM8K_TOKENS = 256
NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
WORKING = re.compile(r"(?s).*#### ")
FULL_STOP = re.compile(r"\.$")
"""How lm-eval's configuration of GSM8K finds the number of an answer, and what it ignores beside it."""
SPLITS = ("train", "validation", "dev", "test")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _unusable(
    data: Path | None, task: str, name: str, config: dict[str, Any], error: Exception
) -> ValueError:
    """What to tell a user whose records or number of worked examples lm-eval cannot use."""
    place = "the data set of the Hub" if data is None else str(_local_folder(data, task, name))
    shown = config["num_fewshot"]
    enough = f" and that there are {shown} to show (--shots)" if shown else ""
    return ValueError(
        f"{name}: lm-eval cannot make its examples from {place} ({type(error).__name__}: {error}): check "
        f"that the records have the fields of the Hub's{enough}"
    )


@contextlib.contextmanager
def _explained(task: str, name: str, config: dict[str, Any], options: SuiteOptions) -> Iterator[None]:
    """Name the subset in errors of lm-eval about a user's records or number of worked examples."""
    from jinja2 import TemplateError

    data: Path | None = options["qa_data"]
    try:
        yield
    except PromptLengthError as error:
        raise PromptLengthError(f"{name}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, SyntaxError, TemplateError) as error:
        if data is None and options["shots"] is None:
            raise
        raise _unusable(data, task, name, config, error) from error


def mmlu_subjects() -> list[str]:
    """Names of the folders that a local copy of MMLU has."""
    return [name.removeprefix("mmlu_") for name, _ in _configs("mmlu")]


def _configs(task: str, shots: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, lm-eval's configuration) of a task, or of each subject of MMLU, with so many shots."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    if task != "mmlu":
        files = [root / FILES[task]]
    else:
        files = sorted(path for path in (root / "mmlu" / "default").glob("mmlu_*.yaml"))
    for file in files:
        config = {k: v for k, v in load_yaml(file).items() if k not in ("tag", "group", "task_alias")}
        config |= {} if shots is None else {"num_fewshot": shots}
        config.setdefault("num_fewshot", 0)
        yield config["task"], config


def _local_folder(data: Path, task: str, name: str) -> Path:
    return data / task / name.removeprefix("mmlu_") if task == "mmlu" else data / task


def _local_data(data: Path, task: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What to change in a configuration: the files, and no split that is not among them."""
    folder = _local_folder(data, task, name)
    found = {
        split: path
        for split in SPLITS
        for path in [folder / f"{split}{suffix}" for suffix in SUFFIXES]
        if path.is_file()
    }
    evaluated = config.get("test_split") or config["validation_split"]
    shown = config.get("fewshot_split") or config.get("training_split") or evaluated
    for split in [evaluated, *([shown] if config["num_fewshot"] else [])]:
        if split not in found:
            raise ValueError(f"{folder} holds no {split}.jsonl or .parquet: see docs/evaluation.md")
    kinds = {SUFFIXES[path.suffix] for path in found.values()}
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds JSON and parquet files: keep one kind")
    return {
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        **{key: None for key in SPLIT_KEYS if config.get(key) not in found},
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in found.items()}},
    }


def _chosen(task: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record an example: GSM8K has one for each way to find the number in the answer."""
    if task == "gsm8k":
        records = [record for record in records if record["filter"] == GSM8K_FILTER]
    return sorted(records, key=lambda record: int(record["doc_id"]))


def _example(task: str, name: str, record: dict[str, Any], made: Any, engine: Engine) -> Example:
    if task == "gsm8k":
        prediction = str(record["resps"][0][0])
        references = [WORKING.sub("", str(record["target"]))]
        requests = [record["arguments"][0][0]]
    else:
        choices = [str(choice) for choice in made.doc_to_choice(record["doc"])]
        likelihoods = [response[0][0] for response in record["resps"]]
        if METRICS[task] == "acc_norm":  # by character, as lm-eval normalises
            likelihoods = [
                value / max(1, len(choice)) for value, choice in zip(likelihoods, choices, strict=True)
            ]
        best = max(range(len(choices)), key=lambda index: likelihoods[index])
        prediction, references = choices[best], [choices[_gold(record, made, choices)]]
        requests = ["".join(arguments) for arguments in record["arguments"]]
    return Example(
        id=f"{name}-{record['doc_id']:05d}",
        prompt_sha256=text_sha256(*requests),
        prompt_tokens=max(engine.prompts.count(request) for request in requests),
        prediction=prediction,
        references=tuple(references),
        score=float(record[METRICS[task]]),
        prompts=tuple(requests) if engine.keep_prompts else None,
    )


def _gold(record: dict[str, Any], made: Any, choices: Sequence[str]) -> int:
    """Index of the right choice, which lm-eval gives as a number, a text, or (WinoGrande) in the prompt."""
    if made.multiple_input:
        return int(made.doc_to_text(record["doc"]))
    target = record["target"]
    return int(target) if isinstance(target, int) or str(target).isdigit() else list(choices).index(target)


def _last_number(answer: str) -> str:
    """Return the last number of an answer, as lm-eval's filter `flexible-extract` finds it."""
    found = NUMBER.findall(answer)
    return next(filter(None, found[-1])).strip() if found else "[invalid]"


def _comparable(text: str) -> str:
    """Return what lm-eval's exact match of GSM8K compares of a number or a worked answer."""
    text = WORKING.sub("", text.replace(",", "").replace("$", ""))
    return FULL_STOP.sub("", text).lower()


class StandardQA(Suite):
    """The six tasks as a suite."""

    name = "qa"
    title = "standard QA"
    tasks = TASKS
    options = (
        SuiteOption(flag="--qa-data", parse=Path, metavar="DIR", help="QA: local copies of the data sets"),
        SuiteOption(
            flag="--shots", parse=int, help="QA: worked examples in a prompt (each task's own number)"
        ),
    )
    has_lengths = False

    def check(self, options: SuiteOptions) -> None:
        """Raise ValueError for a number of worked examples below 0."""
        if options["shots"] is not None and options["shots"] < 0:
            raise ValueError(f"--shots {options['shots']}: give 0 or more worked examples")

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Samples, worked examples, metrics."""
        return {"samples": options.samples, "shots": options["shots"], "metrics": METRICS}

    def sources(self, task: str, options: SuiteOptions) -> dict[str, str]:
        """The local copies; of the Hub's data sets the hash of each prompt tells."""
        data: Path | None = options["qa_data"]
        if data is None:
            return {}
        for name, config in _configs(task, options["shots"]):
            _local_data(data, task, name, config)
        files = sorted(path for path in (data / task).rglob("*") if path.suffix in SUFFIXES)
        return {str(file.relative_to(data)): sha256_file(file) for file in files}

    def evaluate(
        self, task: str, length: int, options: SuiteOptions, engine: Engine, documents: Documents
    ) -> list[Example]:
        """Evaluate one task by lm-eval's own configuration."""
        examples = []
        for name, config, made in self._tasks(task, options):
            with _explained(task, name, config, options):
                records = engine.run(made, limit=options.samples)
            examples += [_example(task, name, record, made, engine) for record in _chosen(task, records)]
        return examples

    def score_by_record(
        self, task: str, prediction: str, references: Sequence[str], record: Mapping[str, Any]
    ) -> float | None:
        """GSM8K's metric; of other tasks 0 for another choice than the right one.

        Two choices may have one text, so that a right text has no known score.
        """
        if task == "gsm8k":
            return float(_comparable(_last_number(prediction)) == _comparable(references[0]))
        return 0.0 if prediction != references[0] else None

    def prompt_rows(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts, documents: Documents
    ) -> list[dict[str, Any]]:
        """One row a prompt, `continuations` beside it where likelihoods are compared.

        WinoGrande's choices stand in the prompt, so that an example has two rows.
        """
        rows = []
        for name, config, made in self._tasks(task, options):
            with _explained(task, name, config, options):
                made.set_fewshot_seed(seed=FEWSHOT_SEED)
                made.build_all_requests(limit=options.samples, rank=0, world_size=1)
            found: dict[tuple[int, str], list[Any]] = {}
            for instance in made.instances:
                found.setdefault((instance.doc_id, instance.args[0]), []).append(instance)
            for (number, prompt), instances in found.items():
                record = {"doc": instances[0].doc, "target": made.doc_to_target(instances[0].doc)}
                row: dict[str, Any] = {"id": f"{name}-{number:05d}", "prompt": prompt}
                if task == "gsm8k":
                    row["references"] = [WORKING.sub("", str(record["target"]))]
                else:
                    choices = [str(choice) for choice in made.doc_to_choice(record["doc"])]
                    row["references"] = [choices[_gold(record, made, choices)]]
                    row["continuations"] = [instance.args[1] for instance in instances]
                rows.append(row)
        return rows

    def _tasks(self, task: str, options: SuiteOptions) -> Iterator[tuple[str, dict[str, Any], Any]]:
        """(name, configuration, lm-eval's task) of a task, or of each subject of MMLU."""
        from lm_eval.api.task import ConfigurableTask

        data: Path | None = options["qa_data"]
        for name, config in _configs(task, options["shots"]):
            if data is not None:
                config |= _local_data(data, task, name, config)
            if task == "gsm8k":
                config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": GSM8K_TOKENS}
            try:
                made = ConfigurableTask(config=config)
            except (OSError, ConnectionError) as error:
                raise ValueError(
                    f"{name}: the data set cannot be loaded ({error}): name local copies with --qa-data"
                ) from error
            except Exception as error:  # whatever datasets and lm-eval's own code make of a user's files
                if data is None:
                    raise
                raise _unusable(data, task, name, config, error) from error
            yield name, config, made


register(StandardQA())
