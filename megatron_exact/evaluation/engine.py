"""The evaluated model and lm-eval, which runs it: a folder is loaded once, and each cell is one call.

Two scores are comparable if both models ran in one dtype on one engine, so both are determined and recorded
before the model is loaded: `auto` means the dtype in which the weights are stored, for either engine. A
missing device is an error, where lm-eval would run on the CPU instead.

lm-eval builds the prompts, batches them, runs the model and returns each example. Two of its defaults are
unsafe here. It truncates the beginning of a prompt that is too long and only logs it; so every request is
measured first, and one that does not fit its window together with the generated tokens is an error. And its
windows default to 2,048 or 4,096 tokens; so the window is always given.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_exact.command_line import TimeLeft, progress_bar
from megatron_exact.data.hf_tokenizer import load_for_rendering, model_ends
from megatron_exact.data.tokenizers import made_by
from megatron_exact.evaluation.prompts import Document, Prompts, Template
from megatron_exact.files import sha256_file
from megatron_exact.json_input import parse_json_object, read_json_object
from megatron_exact.shares import Share, default_device
from megatron_exact.tokenizer_files import TOKENIZER_JSON

BACKENDS = ("hf", "vllm")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""How answers are generated, whatever a model's generation_config.json says."""
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of floating-point types in safetensors files."""
PACKAGES = {"hf": ("torch", "transformers"), "vllm": ("torch", "transformers", "vllm")}
HEADER_LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000
"""Size limit of the header, set by the format."""
EXPORT_RECORD = "megatron_exact.json"
"""Written by `tools/export_hf.py` beside the weights."""
HASHED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Files of a tokenizer, in the order in which `tokenizer_sha256` joins their hashes for the results."""
FEWSHOT_SEED = 1234
"""lm-eval's default seed, which decides which worked examples a prompt shows."""
INSTALL = "install the extra: pip install 'megatron-exact[eval]'"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """How to run the model, independent of the questions."""

    name: str = "hf"
    """`hf`: transformers on CPU or GPU; `vllm`, where it is installed."""
    device: str | None = None
    """Device such as `cpu` or `cuda:0` (hf); None for a GPU where there is one."""
    dtype: str = AUTO
    """dtype of the weights, one of DTYPES; `auto` for the stored one."""
    batch_size: int | None = None
    """Prompts in a batch (hf); None for 1."""
    tensor_parallel: int | None = None
    """GPUs that share one model (vllm); None for 1."""
    shares_prefixes: bool = True
    """Whether common beginnings of prompts are read once (hf); vllm decides by itself."""

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise ValueError(f"--backend {self.name}: choose {' or '.join(BACKENDS)}")
        if self.dtype not in (AUTO, *DTYPES):
            raise ValueError(f"--dtype {self.dtype}: choose one of {', '.join((AUTO, *DTYPES))}")
        if self.name == "hf" and self.tensor_parallel is not None:
            raise ValueError("--tensor-parallel is for --backend vllm: leave it out")
        if self.name == "vllm" and self.device is not None:
            raise ValueError("--device has no effect on vllm: set CUDA_VISIBLE_DEVICES instead")
        if self.name == "vllm" and not self.shares_prefixes:
            raise ValueError("--no-shared-prefixes has no effect on vllm: leave it out")
        if self.name == "vllm" and self.batch_size is not None:
            raise ValueError(
                "--batch-size has no effect on vllm, which forms its own batches: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedBackend:
    """A backend on this machine, for one model."""

    name: str
    """`hf` or `vllm`."""
    dtype: str
    """dtype of the weights, one of DTYPES."""
    device: str | None
    """Device for hf; None for vllm, which chooses its own."""
    batch_size: int
    """Prompts in a batch (hf)."""
    tensor_parallel: int
    """GPUs that share one model (vllm)."""
    shares_prefixes: bool
    """Whether common beginnings of prompts are read once (hf)."""
    versions: dict[str, str]
    """Versions of the packages that compute."""

    def record(self) -> dict[str, Any]:
        """For results.json: `name` and `dtype` hold for a folder, `calls` has the rest for each call."""
        call: dict[str, Any] = {"versions": self.versions, "generation": GREEDY}
        if self.name == "hf":
            call |= {"device": self.device, "batch_size": self.batch_size}
            call["shares_prefixes"] = self.shares_prefixes
        else:
            call["tensor_parallel"] = self.tensor_parallel
        return {"name": self.name, "dtype": self.dtype, "calls": [call]}


def resolve(backend: Backend, model: Path) -> ResolvedBackend:
    """Settle everything that `backend` leaves open.

    Args:
        backend: as a user asks for it.
        model: Hugging Face folder.

    Raises:
        ValueError: an engine that is not installed, a device that is not there, or weights of a type that
            is not among DTYPES.
    """
    return ResolvedBackend(
        name=backend.name,
        dtype=stored_dtype(model) if backend.dtype == AUTO else backend.dtype,
        device=None if backend.name == "vllm" else existing_device(backend.device),
        batch_size=backend.batch_size or 1,
        tensor_parallel=backend.tensor_parallel or 1,
        shares_prefixes=backend.shares_prefixes,
        versions=installed_versions(backend.name),
    )


def installed_versions(name: str) -> dict[str, str]:
    """Versions of the packages that run a model. Raises ValueError if one is not installed."""
    try:
        return {package: version(package) for package in PACKAGES[name]}
    except PackageNotFoundError as error:
        remedy = ", or take --backend hf" if name == "vllm" else ""
        raise ValueError(f"{error.name} is not installed: install it{remedy}") from error


def existing_device(name: str | None) -> str:
    """The device of this name, or without one a GPU where there is one, as torch spells it.

    Raises:
        ValueError: no device, or one that this machine has not.
    """
    import torch

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device: give cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return "cpu"
    kind = getattr(torch, device.type, None)
    count = 0 if kind is None or not hasattr(kind, "device_count") else kind.device_count()
    if (device.index or 0) >= count:
        there = f"{count} of these devices here, counted from 0" if count else "none of these devices here"
        raise ValueError(f"--device {name}: torch finds {there}: name one that is there, or cpu")
    return name


def stored_dtype(model: Path) -> str:
    """The type that a model folder's config names, or else that of its first weights.

    Raises:
        ValueError: it is none of DTYPES.
    """
    config = read_json_object(model / "config.json", "copy the model again", wide_integers=True)
    named = config.get("dtype") or config.get("torch_dtype")
    found: str = str(named).removeprefix("torch.") if named else _type_of_first_weights(model)
    if found not in DTYPES:
        raise ValueError(f"{model} is stored as {found}: choose --dtype {', '.join(DTYPES)}")
    return found


def _type_of_first_weights(model: Path) -> str:
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            header_bytes = stream.read(min(length, LARGEST_HEADER_BYTES))
        header = parse_json_object(header_bytes, f"the header of {path}", "copy the model again")
        try:
            kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has no safetensors header: copy the model again") from error
        floating: list[str] = [STORED_TYPES.get(kind, kind) for kind in kinds if "F" in kind]
        if floating:
            return floating[0]
    return "no floating-point type"


def require_model_folder(model: Path) -> list[Path]:
    """The files with the weights of a model folder, in order. Raises ValueError if it is none."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: name a Hugging Face model folder")
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{model} has no *.safetensors: export the model with megatron-exact export-hf")
    return weights


def model_identity(model: Path) -> dict[str, Any]:
    """Name, sizes and hashes of a model folder; no path, so that a copy is the same model.

    Raises:
        ValueError: no model folder.
    """
    weights = require_model_folder(model)
    total = sum(path.stat().st_size for path in weights)
    with progress_bar(f"hashing {model.name}", total, "B") as bar:
        hashes = {path.name: sha256_file(path, bar.update) for path in weights}
    return {
        "name": model.resolve().name,
        "config_sha256": sha256_file(model / "config.json"),
        "tokenizer_sha256": tokenizer_sha256(model),
        "weights_sha256": hashes,
    }


def tokenizer_sha256(model: Path) -> str:
    """One hash for the tokenizer files of a model folder.

    Raises:
        ValueError: a folder without a tokenizer.
    """
    found = [model / name for name in HASHED_FILES if (model / name).is_file()]
    if not found:
        raise ValueError(f"{model} has no tokenizer: copy tokenizer.json beside the weights")
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in found)
    return hashlib.sha256(lines.encode()).hexdigest()


def max_positions(model: Path) -> int | None:
    """`max_position_embeddings` of the config, if it has one."""
    config = read_json_object(model / "config.json", "copy the model again", wide_integers=True)
    value = config.get("max_position_embeddings")
    return int(value) if isinstance(value, int) else None


def read_provenance(model: Path) -> dict[str, Any] | None:
    """The record of the run that made this model; None for a model that nobody exported with our tool.

    Raises:
        ValueError: a record that cannot be read.
    """
    path = model / EXPORT_RECORD
    if not path.is_file():
        return None
    return read_json_object(path, "export the model again")


class PromptLengthError(ValueError):
    """A prompt that does not fit into its window together with what is generated."""


def require_lm_eval() -> str:
    """Version of lm-eval.

    Raises:
        ValueError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise ValueError(f"lm-eval is not installed: {INSTALL}") from None


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model folder, as an object of transformers; its code, if any, is not run.

    It cuts text as `tokenizer.json` says, as corpora are, where transformers would do otherwise, and warns.
    Its eos, where it names none, is the one that the model's configs name.

    Raises:
        ValueError: no tokenizer, one that transformers cannot load, or one that is not the trained one.
    """
    _require_trained_tokenizer(model)
    tokenizer, doubt = load_for_rendering(model)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=2)
    if tokenizer.eos_token_id is None:
        for name, ids in model_ends(model).items():
            token = tokenizer.convert_ids_to_tokens(ids[0])
            if token is not None:
                tokenizer.eos_token = token
                warnings.warn(f"the tokenizer of {model} names no eos: {token}, as in {name}", stacklevel=2)
                break
    return tokenizer


def _require_trained_tokenizer(model: Path) -> None:
    """An export records the tokenizer that its corpus was made with."""
    recorded = (read_provenance(model) or {}).get("tokenizer_sha256")
    path = model / TOKENIZER_JSON
    if isinstance(recorded, str) and path.is_file() and not made_by(recorded, path):
        raise ValueError(
            f"{path} is not the tokenizer that the model was trained and exported with: its ids mean other "
            "tokens; copy the exported one back"
        )


def require_eos(tokenizer: Any, model: Path) -> None:
    """Raise ValueError unless the tokenizer of a model says where an answer ends."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"neither the tokenizer nor the configs of {model} name a token that ends a text, so no answer "
            "would end: add eos_token to its tokenizer_config.json"
        )


def load_model(model: Path, prompts: Prompts, backend: ResolvedBackend, max_length: int) -> Any:
    """An lm-eval model that takes prompts of up to `max_length` tokens, generation included."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if backend.name == "vllm":
        return _load_vllm(model, prompts.template, backend, max_length)
    from megatron_exact.evaluation.prefix_sharing_model import PrefixSharingModel
    from megatron_exact.low_precision import widen_products

    loaded = PrefixSharingModel(
        pretrained=str(model),
        tokenizer=prompts.tokenizer,
        backend="causal",
        dtype=backend.dtype,
        batch_size=backend.batch_size,
        max_length=max_length,
        trust_remote_code=False,
        device=backend.device,
        shares_prefixes=backend.shares_prefixes,
    )
    make_greedy(loaded.model)
    widen_products(loaded.model)
    return loaded


def make_greedy(model: Any) -> None:
    """Replace a model's generation settings by plain greedy ones; its special tokens stay.

    Exports carry the generation_config.json of their base model, whose repetition_penalty, for one, lm-eval
    would apply: at 1.3 it changed 8 of 8 answers.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    ids = {name: getattr(kept, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False)


def _load_vllm(model: Path, template: Template, backend: ResolvedBackend, max_length: int) -> Any:
    positions = max_positions(model)
    if positions is not None and max_length > positions:  # the user has allowed it, vLLM has not yet
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from lm_eval.models.vllm_causallms import VLLM

    loaded = VLLM(
        pretrained=str(model),
        dtype=backend.dtype,
        max_model_len=max_length,
        tensor_parallel_size=backend.tensor_parallel,
    )
    if template.text is not None:
        loaded.tokenizer.chat_template = template.text
        loaded.hf_chat_template = template.text  # the tokenizer's own, found when it was loaded, goes first
    return loaded


@dataclass(kw_only=True)
class Engine:
    """A model behind lm-eval, which is loaded when the first cell needs it."""

    load: Callable[[], Any]
    """Like `load_model` without its arguments."""
    prompts: Prompts
    """Template and tokenizer."""
    window: int
    """Tokens that the model takes, generation included."""
    share: Share = field(default_factory=Share)
    """The examples that this process answers; every process builds the prompts of all."""
    keep_prompts: bool = False
    """Whether results contain the prompts besides their hashes."""
    examples: int = field(default=0, init=False)
    """Examples of the cell so far, those of other processes included; shares go by this count."""

    def begin_cell(self) -> None:
        """Count the examples of a cell from 0."""
        self.examples = 0

    @cached_property
    def loaded(self) -> Any:
        """The model of lm-eval."""
        return self.load()

    def run(
        self,
        task: Any,
        *,
        limit: int | None = None,
        window: int | None = None,
        system: str = "",
        is_rendered: bool = False,
    ) -> Records:
        """Run a task of lm-eval.

        Args:
            task: lm-eval's object.
            limit: the first so many examples; None: all.
            window: tokens of each prompt with what is generated; None: what the model takes.
            system: message before the user's text, where there is a chat template.
            is_rendered: whether the task's texts are prompts already, so that no template is applied.

        Returns:
            lm-eval's record of each example of this process's share.

        Raises:
            PromptLengthError: a prompt that does not fit into the window.
        """
        from lm_eval.evaluator import evaluate

        has_template = self.prompts.template.text is not None and not is_rendered
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        # not simple_evaluate: it reads thousands of YAML files and lists all packages at each call
        with self._guarded(window or self.window), _bars_for_people_only():
            results = evaluate(
                lm=self.loaded,
                task_dict={"tasks": {task.task_name: task}},
                limit=limit,
                apply_chat_template=has_template,
                system_instruction=system if system and has_template else None,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
                log_samples=True,
            )
        if results is None:  # not the first of several processes
            raise ValueError(
                "evaluate in one process: several GPUs are vllm's business "
                "(--backend vllm --tensor-parallel N)"
            )
        records: Records = results["samples"][task.task_name]
        first = self.examples
        self.examples += len({record["doc_id"] for record in records})
        return [record for record in records if self.share.has(first + int(record["doc_id"]))]

    @contextlib.contextmanager
    def _guarded(self, window: int) -> Iterator[None]:
        """Measure every request before the model sees it, which answers those of this process alone.

        lm-eval gets an empty answer to the others, whose records are dropped: drawing worked examples for
        a part of the documents alone would draw others.
        """
        generate, likelihood = self.loaded.generate_until, self.loaded.loglikelihood
        first, left = self.examples, TimeLeft("this cell", None)
        plan = getattr(self.loaded, "plan_cell", None)  # of load_model's own; vLLM caches beginnings itself

        def answered(requests: Sequence[Any], answer: Callable[[list[Any]], Any], nothing: Any) -> Any:
            own = [
                index for index, request in enumerate(requests) if self.share.has(first + request.doc_id)
            ]
            if plan is not None:  # from all requests, so that a share's answers are those of the whole cell
                plan(requests)
            if len(own) == len(requests):
                return answer(list(requests))
            answers = [nothing] * len(requests)
            found = answer([requests[index] for index in own]) if own else []
            for index, one in zip(own, found, strict=True):
                answers[index] = one
            return answers

        def checked_generate(requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
            for request in requests:
                prompt, options = request.args
                _require_room(self.prompts.count(prompt), int(options["max_gen_toks"]), window)
            left.total = sum(self.share.has(first + request.doc_id) for request in requests)
            return answered(requests, lambda own: generate(own, *rest, **named), "")

        def counted(context: Any, *rest: Any, **named: Any) -> Any:
            assert step is not None, "replaced only where there is one"
            found = step(context, *rest, **named)
            left.add(len(context))
            return found

        def checked_likelihood(requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
            for request in requests:
                _require_room(self.prompts.count("".join(request.args)), 0, window)
            return answered(requests, lambda own: likelihood(own, *rest, **named), (0.0, False))

        self.loaded.generate_until, self.loaded.loglikelihood = checked_generate, checked_likelihood
        step = getattr(self.loaded, "_model_generate", None)
        if step is not None and not sys.stderr.isatty():  # lm-eval's own bar is for terminals
            self.loaded._model_generate = counted
        try:
            yield
        finally:
            self.loaded.generate_until, self.loaded.loglikelihood = generate, likelihood
            if step is not None:
                self.loaded._model_generate = step

    def answers(
        self,
        name: str,
        documents: Sequence[Document],
        *,
        generation_tokens: int,
        delimiter: str,
        window: int,
        system: str = "",
        starts_are_raw: bool = False,
    ) -> list[tuple[str, str]]:
        """Generate greedy answers to documents with `input` and `prefix`, as a task of lm-eval.

        With `starts_are_raw` the prefix follows the rendered prompt as it is.

        Returns:
            (prompt as lm-eval made it, answer) of each document of this process's share, in their order.

        Raises:
            ValueError: a prompt that does not fit into `window` tokens.
        """
        import datasets
        from lm_eval.api.task import ConfigurableTask

        texts = [{"input": document["input"], "prefix": document["prefix"]} for document in documents]
        if starts_are_raw:
            texts = [
                {"input": self.prompts.render(text["input"], system=system) + text["prefix"], "prefix": ""}
                for text in texts
            ]
        with _bars_for_people_only():
            rows = datasets.Dataset.from_list(texts)
            has_prefix = any(text["prefix"] for text in texts)
            task = ConfigurableTask(
                config={
                    "task": name,
                    "custom_dataset": lambda **_: {"test": rows},
                    "output_type": "generate_until",
                    "test_split": "test",
                    "num_fewshot": 0,
                    "doc_to_text": _input_of,
                    "doc_to_target": "",
                    "target_delimiter": delimiter,
                    **({"gen_prefix": "prefix"} if has_prefix else {}),
                    "generation_kwargs": {
                        "do_sample": False,
                        "temperature": 0.0,
                        "max_gen_toks": generation_tokens,
                        "until": [],
                    },
                    "process_results": lambda *_: {"score": 0.0},  # the suites score
                    "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
                }
            )
        expected = [number for number in range(len(documents)) if self.share.has(self.examples + number)]
        found = self.run(task, window=window, system=system, is_rendered=starts_are_raw)
        records = sorted(found, key=lambda record: record["doc_id"])
        assert [record["doc_id"] for record in records] == expected
        return [(record["arguments"][0][0], record["resps"][0][0]) for record in records]


Records = list[dict[str, Any]]
"""lm-eval's records of the examples of a task."""


def _input_of(document: Mapping[str, Any]) -> str:
    """A function, not a template: Jinja would interpret braces of the text and drop its last newline."""
    return str(document["input"])


def _require_room(prompt: int, generation: int, window: int) -> None:
    if prompt + generation > window:
        raise PromptLengthError(
            f"a prompt of {prompt:,} tokens and {generation:,} generated ones do not fit into {window:,}: "
            "lm-eval would cut its beginning; choose a longer window or fewer examples in the prompt"
        )


@contextlib.contextmanager
def _bars_for_people_only() -> Iterator[None]:
    """Keep progress bars of lm-eval out of logs."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield
