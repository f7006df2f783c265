"""lm-eval as the engine: a model folder is loaded once, then every cell is one call.

lm-eval builds the prompts, batches them, runs the model and hands back each example. Two of its habits are
answered here. A prompt that is too long loses its beginning with a line in the log: every request is
measured first, and one that does not fit its window together with what is generated is an error. And its
windows default to 2,048 or 4,096 tokens: here the window is always given.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_exact.data.hf_tokenizer import TOKENIZER_JSON, load_for_rendering, model_ends
from megatron_exact.data.tokenizers import made_by
from megatron_exact.evaluation.backend import ResolvedBackend
from megatron_exact.evaluation.examples import Example, text_sha256
from megatron_exact.evaluation.model_identity import max_positions, read_provenance
from megatron_exact.evaluation.prompts import Prompts, Template
from megatron_exact.evaluation.sample_cache import Document

FEWSHOT_SEED = 1234
"""lm-eval's own: which worked examples a prompt shows."""
INSTALL = "install the extra: pip install 'megatron-exact[eval]'"


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
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(model),
        tokenizer=prompts.tokenizer,
        backend="causal",
        dtype=backend.dtype,
        batch_size=backend.batch_size,
        max_length=max_length,
        trust_remote_code=False,
        device=backend.device,
    )


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


@contextlib.contextmanager
def guarded(loaded: Any, prompts: Prompts, window: int) -> Iterator[None]:
    """Measure every request before the model sees it.

    Raises (inside):
        ValueError: a prompt that does not fit into `window` tokens together with what is generated.
    """
    generate, likelihood = loaded.generate_until, loaded.loglikelihood

    def checked_generate(requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
        for request in requests:
            prompt, options = request.args
            _require_room(prompts.count(prompt), int(options["max_gen_toks"]), window)
        return generate(requests, *rest, **named)

    def checked_likelihood(requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
        for request in requests:
            _require_room(prompts.count("".join(request.args)), 0, window)
        return likelihood(requests, *rest, **named)

    loaded.generate_until, loaded.loglikelihood = checked_generate, checked_likelihood
    try:
        yield
    finally:
        loaded.generate_until, loaded.loglikelihood = generate, likelihood


def _require_room(prompt: int, generation: int, window: int) -> None:
    if prompt + generation > window:
        raise PromptLengthError(
            f"a prompt of {prompt:,} tokens and {generation:,} generated ones do not fit into {window:,}: "
            "lm-eval would cut its beginning; choose a longer window or fewer examples in the prompt"
        )


def run_lm_eval(
    loaded: Any, tasks: Sequence[Any], prompts: Prompts, window: int, *, limit: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Task name -> lm-eval's record of each example."""
    from lm_eval.evaluator import evaluate

    for task in tasks:
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    # not simple_evaluate: it reads thousands of YAML files and lists all packages at each call
    with guarded(loaded, prompts, window), _bars_for_people_only():
        results = evaluate(
            lm=loaded,
            task_dict={"tasks": {task.task_name: task for task in tasks}},
            limit=limit,
            apply_chat_template=prompts.template.text is not None,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            log_samples=True,
        )
    if results is None:  # not the first of several processes
        raise ValueError(
            "evaluate in one process: several GPUs are vllm's business (--backend vllm --tensor-parallel N)"
        )
    return results["samples"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _bars_for_people_only() -> Iterator[None]:
    """Progress bars of lm-eval stay out of logs."""
    import sys

    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            before = sys.stderr
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(null))
            assert sys.stderr is not before
        yield


def generate_answers(
    loaded: Any,
    name: str,
    documents: Sequence[Document],
    *,
    generation_tokens: int,
    delimiter: str,
    prompts: Prompts,
    window: int,
) -> list[tuple[str, str]]:
    """Greedy answers to documents with `input` and `prefix`, run as a task of lm-eval.

    Returns:
        (prompt as lm-eval made it, answer) of each document, in their order.

    Raises:
        ValueError: a prompt that does not fit into `window` tokens.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    with _bars_for_people_only():
        rows = datasets.Dataset.from_list([{"input": d["input"], "prefix": d["prefix"]} for d in documents])
        has_prefix = any(document["prefix"] for document in documents)
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
                "process_results": _no_score,
                "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    records = run_lm_eval(loaded, [task], prompts, window)[name]
    records = sorted(records, key=lambda record: record["doc_id"])
    assert [record["doc_id"] for record in records] == list(range(len(documents)))
    return [(record["arguments"][0][0], record["resps"][0][0]) for record in records]


def _input_of(document: Mapping[str, Any]) -> str:
    """A function, not a template: Jinja would interpret braces of the text and drop its last newline."""
    return str(document["input"])


def _no_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores are computed by the suites."""
    return {"score": 0.0}


def scored_example(
    document: Document, prompt: str, prediction: str, score: float, prompts: Prompts
) -> Example:
    """The example of a generated answer."""
    return Example(
        id=document["id"],
        prompt_sha256=text_sha256(prompt),
        prompt_tokens=prompts.count(prompt),
        prediction=prediction,
        references=tuple(document["outputs"]),
        score=score,
        depth=document.get("depth"),
    )
