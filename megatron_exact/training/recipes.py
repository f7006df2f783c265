"""Recipes: named training stages of the paper, each a function that returns its whole configuration.

A `Recipe` is one stage as a value that can be printed, compared and changed field by field
(`--recipe-set NAME=VALUE`). The text under a field is its help. It says what the paper (EXACT, arXiv
2605.10544) states about the field; where the paper states nothing, it says so and explains our default.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import math
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.blend import CorpusSlice
from megatron_exact.exposure import default_tau
from megatron_exact.model.families import preset as find_preset
from megatron_exact.training.layout import Layout

ALL_DOCUMENTS = "1/1"
Flag = tuple[str, str | None]
"""A flag and its value, None for a switch."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length and the learning rate of a stage. Amounts are in tokens, from which iterations follow.

    Raises:
        ValueError: a number out of range.
    """

    budget_tokens: int = 2**30
    """Tokens of the stage. The paper says that steps are derived from a budget; the budget is not stated in
    the paper. About 1 billion: published continuations to longer windows took 0.5 to 5 billion."""
    global_batch_tokens: int = 2**19
    """Tokens an iteration, the same in every stage of a chain. Not stated in the paper. Half a million
    gives 2,048 iterations a billion tokens, and still 32 rows of 16K, enough for 32 GPUs at TP4 x PP2."""
    learning_rate: float = 1e-5
    """After warm-up, constant (stated: linear warm-up, then constant). The value is not stated in the
    paper. Some ten times below the peak rates of pretraining, since nothing anneals it at the end."""
    warmup_tokens: int = 2**24
    """Tokens of linear warm-up. Not stated in the paper. 32 iterations of the default batch, enough for the
    second moments of Adam, which start from zero in every stage."""
    weight_decay: float = 0.1
    """Of AdamW (stated). The value is not stated in the paper; 0.1 is the usual one in pretraining."""
    gradient_clip: float = 1.0
    """Largest gradient norm (clipping is stated). The value is not stated in the paper; 1 is usual."""
    adam_beta1: float = 0.9
    """Decay of the first moment. Not stated in the paper; the usual value in pretraining."""
    adam_beta2: float = 0.95
    """Decay of the second moment. Not stated in the paper; the usual value in pretraining."""
    adam_epsilon: float = 1e-8
    """Guards Adam's division. Not stated in the paper; Megatron's default."""
    seed: int = 1234
    """Order of the rows, the same in both arms (stated: paired data stream). The value is not stated in the
    paper; Megatron's default. Repeat a pair with several seeds: the effect may lie near seed noise."""
    save_every_tokens: int = 2**27
    """Between two checkpoints. Not stated in the paper. An eighth of the budget: what a crash may cost."""
    keep_checkpoints: int = 2
    """Checkpoints kept, besides the one being written. Not stated in the paper. One to fall back on, should
    the newest be damaged; a checkpoint of an 8B model with its optimizer has over 100 GB."""
    evaluate_every_tokens: int = 2**27
    """Between two validation losses. Not stated in the paper. As often as a checkpoint is saved."""
    evaluation_tokens: int = 2**21
    """Of the validation split, in each evaluation. Not stated in the paper. 2 million, 64 times fewer than
    are trained between two; a pack with fewer validation rows needs a smaller number, or --eval-iters."""

    def __post_init__(self) -> None:
        for name in ("budget_tokens", "global_batch_tokens", "save_every_tokens", "evaluate_every_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more tokens")
        if self.warmup_tokens < 0 or self.evaluation_tokens < 0:
            raise ValueError("warmup_tokens and evaluation_tokens are 0 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: give a number above 0")

    def flags(self, row_tokens: int, batch_rows: int | None = None) -> list[Flag]:
        """Return Megatron's flags for rows of this length.

        Args:
            row_tokens: row length of the stage.
            batch_rows: rows of a batch if the user gives them; iterations follow from it.

        Raises:
            ValueError: a batch that is not a whole number of rows.
        """
        if batch_rows is None:
            batch_rows, rest = divmod(self.global_batch_tokens, row_tokens)
            if rest or not batch_rows:
                raise ValueError(
                    f"global_batch_tokens {self.global_batch_tokens} is not a multiple of the row of "
                    f"{row_tokens}: give a multiple"
                )
        step_tokens = batch_rows * row_tokens
        return [
            ("--global-batch-size", str(batch_rows)),
            ("--train-iters", str(math.ceil(self.budget_tokens / step_tokens))),
            ("--optimizer", "adam"),
            ("--lr", f"{self.learning_rate:g}"),
            ("--lr-decay-style", "constant"),
            ("--lr-warmup-iters", str(math.ceil(self.warmup_tokens / step_tokens))),
            ("--weight-decay", f"{self.weight_decay:g}"),
            ("--clip-grad", f"{self.gradient_clip:g}"),
            ("--adam-beta1", f"{self.adam_beta1:g}"),
            ("--adam-beta2", f"{self.adam_beta2:g}"),
            ("--adam-eps", f"{self.adam_epsilon:g}"),
            ("--seed", str(self.seed)),
            ("--save-interval", str(math.ceil(self.save_every_tokens / step_tokens))),
            ("--keep-last", str(self.keep_checkpoints)),
            ("--eval-interval", str(math.ceil(self.evaluate_every_tokens / step_tokens))),
            ("--eval-iters", str(math.ceil(self.evaluation_tokens / step_tokens))),
            ("--log-interval", "1"),
        ]


EIGHT_BIT_FORMATS = {"tensorwise": "hybrid"}
"""`--fp8-recipe` -> `--fp8-format`: e4m3 in forward, for gradients e5m2 with its larger range."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training stage of one model; `--token-weighting` says which arm.

    Raises:
        ValueError: an unknown preset, or sizes that do not divide.
    """

    preset: str
    """The model (stated); `megatron_exact.model.families` has its shape."""
    row_tokens: int
    """The window of the stage (stated: 4K, 8K, 16K; longer ones are ours); the pack must have rows of this
    length."""
    corpus_mix: tuple[tuple[str, float], ...]
    """Corpora and their weights (stated for a model's whole chain; whether the stages differ is not stated
    in the paper). Weights are taken as shares of tokens, which is what pack_corpus.py does."""
    corpus_slice: str = ALL_DOCUMENTS
    """The part of the corpora's documents that the stage reads, one of several disjoint ones. Our choice:
    whether the paper's stages share documents is not stated. With 1/1 in every stage, one seed and one
    budget, the stages are passes over the same documents."""
    previous: str | None = None
    """Recipe of the stage before, whose weights this one starts from (stated: staged training)."""
    nodes: int = 1
    """Machines. The paper states 8 H100 GPUs in all."""
    gpus_per_node: int = 8
    """GPUs of a machine (stated: 8 H100)."""
    layout: Layout = field(default_factory=Layout)
    """How the model is spread over the GPUs. Not stated in the paper, and without influence on the result:
    the loss is the same on every layout. Ours are the fastest that leave room in 80 GB (preflight)."""
    eight_bit: str = "none"
    """How matrix products of the layers are in 8 bits: `none`, or with `tensorwise` scales
    (`--fp8-recipe`, Transformer Engine's layers). Not stated in the paper. None: with it the loss
    depends on the layout, and no GPU kernel has run."""
    schedule: Schedule = field(default_factory=Schedule)
    """The length and the learning rate of the stage."""

    def __post_init__(self) -> None:
        find_preset(self.preset)
        if self.eight_bit not in ("none", *EIGHT_BIT_FORMATS):
            raise ValueError(
                f"eight_bit is {self.eight_bit!r}: choose none or {' or '.join(EIGHT_BIT_FORMATS)}"
            )
        CorpusSlice.parse(self.corpus_slice)
        if self.row_tokens < 1 or self.nodes < 1 or self.gpus_per_node < 1:
            raise ValueError("row_tokens, nodes and gpus_per_node are 1 or more")
        if self.world_size % self.layout.model_parallel:
            raise ValueError(
                f"{self.world_size} GPUs do not divide by TP x PP x CP = {self.layout.model_parallel}: "
                "change nodes or the sizes of the layout"
            )

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def tau(self) -> int:
        """First effective context of the tail, tokens (stated: 1K, 2K, 4K, a quarter of the window)."""
        return default_tau(self.row_tokens)

    def flags(self, *, batch_rows: int | None = None) -> list[Flag]:
        """Return the expansion, except for the model's shape, which follows from `--preset`.

        Args:
            batch_rows: the user's `--global-batch-size`; iterations follow from it.
        """
        return [
            ("--preset", self.preset),
            ("--seq-length", str(self.row_tokens)),
            ("--token-weighting", "none"),
            ("--exact-tau", str(self.tau)),
            *self.layout.flags(),
            ("--bf16", None),
            *self._eight_bit_flags(),
            *self.schedule.flags(self.row_tokens, batch_rows),
        ]

    def _eight_bit_flags(self) -> list[Flag]:
        if self.eight_bit == "none":
            return []
        return [("--fp8-format", EIGHT_BIT_FORMATS[self.eight_bit]), ("--fp8-recipe", self.eight_bit)]

    def pack_command(self) -> list[str]:
        """Return the command line that packs the corpus of this stage; its folders are examples."""
        sources = [f"{weight:g}:tokens/{name}" for name, weight in self.corpus_mix]
        if len(sources) == 1:
            sources = [f"tokens/{self.corpus_mix[0][0]}"]
        part = [] if self.corpus_slice == ALL_DOCUMENTS else ["--corpus-slice", self.corpus_slice]
        return [
            *("python", "tools/pack_corpus.py"),
            *(word for source in sources for word in ("--source", source)),
            *("--row-tokens", str(self.row_tokens), "--policy", "concat"),
            *("--validation-fraction", "0.005", "--seed", str(self.schedule.seed)),
            *("--train-tokens", str(self.schedule.budget_tokens)),
            *part,
            *("--output", f"packs/{self.row_tokens // 1024}k"),
        ]


# The stages of the paper (section 4 and table 4). Models, windows, chains and corpora are the paper's.
# Layouts are for 80 GB cards, 8 a node; a test puts every recipe through the memory forecast of preflight.

SMALL_MIX = (("fineweb-edu", 1.0),)
MEDIUM_MIX = (("fineweb-edu", 6.0), ("slimpajama-6b", 24.0), ("open-web-math", 32.0))
LARGE_MIX = (("fineweb-edu", 1.0), ("slimpajama-6b", 3.0), ("open-web-math", 6.0))

RECIPES: dict[str, Callable[[], Recipe]] = {}
"""Name of a recipe -> the function that makes it."""


def recipe(name: str) -> Callable[[Callable[[], Recipe]], Callable[[], Recipe]]:
    """Return a decorator that enters a function into RECIPES."""

    def enter(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
        assert name not in RECIPES
        RECIPES[name] = make
        return make

    return enter


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        ValueError: an unknown name; the nearest ones are shown.
    """
    if name not in RECIPES:
        near = ", ".join(difflib.get_close_matches(name, RECIPES, n=3))
        suggestion = f"did you mean {near}? " if near else ""
        raise ValueError(
            f"recipe {name!r} is unknown: {suggestion}`python -m megatron_exact.training.recipes` lists all"
        )
    return RECIPES[name]()


def chain_of(name: str) -> list[str]:
    """Return the names of a recipe and of the stages before it, first stage first.

    Raises:
        ValueError: an unknown name.
    """
    previous = find_recipe(name).previous
    return [*(chain_of(previous) if previous is not None else []), name]


@recipe("qwen2.5_0.5b_4k")
def qwen2_5_0_5b_4k() -> Recipe:
    """Only stage of Qwen2.5-0.5B."""
    return Recipe(preset="qwen2.5-0.5b", row_tokens=4096, corpus_mix=SMALL_MIX)


@recipe("llama3.2_1b_4k")
def llama3_2_1b_4k() -> Recipe:
    """Only stage of Llama-3.2-1B."""
    return Recipe(preset="llama-3.2-1b", row_tokens=4096, corpus_mix=SMALL_MIX)


@recipe("qwen2.5_1.5b_4k")
def qwen2_5_1_5b_4k() -> Recipe:
    """First of two stages of Qwen2.5-1.5B."""
    return Recipe(preset="qwen2.5-1.5b", row_tokens=4096, corpus_mix=MEDIUM_MIX, corpus_slice="1/2")


@recipe("qwen2.5_1.5b_8k")
def qwen2_5_1_5b_8k() -> Recipe:
    """Second stage of Qwen2.5-1.5B."""
    return replace(qwen2_5_1_5b_4k(), row_tokens=8192, previous="qwen2.5_1.5b_4k", corpus_slice="2/2")


@recipe("qwen2.5_3b_4k")
def qwen2_5_3b_4k() -> Recipe:
    """First of two stages of Qwen2.5-3B."""
    return Recipe(preset="qwen2.5-3b", row_tokens=4096, corpus_mix=MEDIUM_MIX, corpus_slice="1/2")


@recipe("qwen2.5_3b_8k")
def qwen2_5_3b_8k() -> Recipe:
    """Second stage of Qwen2.5-3B."""
    return replace(qwen2_5_3b_4k(), row_tokens=8192, previous="qwen2.5_3b_4k", corpus_slice="2/2")


@recipe("llama3.2_3b_4k")
def llama3_2_3b_4k() -> Recipe:
    """First of two stages of Llama-3.2-3B."""
    return Recipe(preset="llama-3.2-3b", row_tokens=4096, corpus_mix=MEDIUM_MIX, corpus_slice="1/2")


@recipe("llama3.2_3b_8k")
def llama3_2_3b_8k() -> Recipe:
    """Second stage of Llama-3.2-3B."""
    return replace(llama3_2_3b_4k(), row_tokens=8192, previous="llama3.2_3b_4k", corpus_slice="2/2")


TP2 = Layout(tensor_parallel=2, sequence_parallel=True)
TP4 = Layout(tensor_parallel=4, sequence_parallel=True)
TP4_PP2 = Layout(tensor_parallel=4, sequence_parallel=True, pipeline_parallel=2)


@recipe("qwen2.5_7b_4k")
def qwen2_5_7b_4k() -> Recipe:
    """First of three stages of Qwen2.5-7B."""
    return Recipe(
        preset="qwen2.5-7b", row_tokens=4096, corpus_mix=LARGE_MIX, corpus_slice="1/3", layout=TP2
    )


@recipe("qwen2.5_7b_8k")
def qwen2_5_7b_8k() -> Recipe:
    """Second stage of Qwen2.5-7B."""
    return replace(qwen2_5_7b_4k(), row_tokens=8192, previous="qwen2.5_7b_4k", corpus_slice="2/3")


@recipe("qwen2.5_7b_16k")
def qwen2_5_7b_16k() -> Recipe:
    """Third stage of Qwen2.5-7B."""
    return replace(
        qwen2_5_7b_8k(), row_tokens=16_384, previous="qwen2.5_7b_8k", corpus_slice="3/3", layout=TP4
    )


@recipe("qwen2.5_7b_16k_2nodes")
def qwen2_5_7b_16k_2nodes() -> Recipe:
    """Third stage of Qwen2.5-7B, TP4 x PP2 x DP2."""
    return replace(qwen2_5_7b_16k(), nodes=2, layout=TP4_PP2)


@recipe("qwen2.5_7b_16k_4nodes")
def qwen2_5_7b_16k_4nodes() -> Recipe:
    """Third stage of Qwen2.5-7B, TP4 x PP2 x DP4."""
    return replace(qwen2_5_7b_16k(), nodes=4, layout=TP4_PP2)


@recipe("llama3.1_8b_4k")
def llama3_1_8b_4k() -> Recipe:
    """First of three stages of Llama-3.1-8B."""
    return Recipe(
        preset="llama-3.1-8b", row_tokens=4096, corpus_mix=LARGE_MIX, corpus_slice="1/3", layout=TP2
    )


@recipe("llama3.1_8b_8k")
def llama3_1_8b_8k() -> Recipe:
    """Second stage of Llama-3.1-8B."""
    return replace(llama3_1_8b_4k(), row_tokens=8192, previous="llama3.1_8b_4k", corpus_slice="2/3")


@recipe("llama3.1_8b_16k")
def llama3_1_8b_16k() -> Recipe:
    """Third stage of Llama-3.1-8B."""
    return replace(
        llama3_1_8b_8k(), row_tokens=16_384, previous="llama3.1_8b_8k", corpus_slice="3/3", layout=TP4
    )


@recipe("llama3.1_8b_16k_2nodes")
def llama3_1_8b_16k_2nodes() -> Recipe:
    """Third stage of Llama-3.1-8B, TP4 x PP2 x DP2."""
    return replace(llama3_1_8b_16k(), nodes=2, layout=TP4_PP2)


@recipe("llama3.1_8b_16k_4nodes")
def llama3_1_8b_16k_4nodes() -> Recipe:
    """Third stage of Llama-3.1-8B, TP4 x PP2 x DP4."""
    return replace(llama3_1_8b_16k(), nodes=4, layout=TP4_PP2)


# Beyond the paper: windows up to 128K of the two large models, whose configs define RoPE that far. Every
# document of the corpora was read by one of the three stages before, so these read all of them again: a
# corpus of longer documents is worth more there.

TP4_CP2 = Layout(tensor_parallel=4, sequence_parallel=True, context_parallel=2)
TP4_CP4 = Layout(tensor_parallel=4, sequence_parallel=True, context_parallel=4)


def beyond_16k(before: Recipe, name: str, row_tokens: int, layout: Layout, nodes: int = 1) -> Recipe:
    """Return the stage after `before`, which has this name, with longer rows and all documents."""
    return replace(
        before,
        row_tokens=row_tokens,
        previous=name,
        corpus_slice=ALL_DOCUMENTS,
        layout=layout,
        nodes=nodes,
    )


@recipe("qwen2.5_7b_32k")
def qwen2_5_7b_32k() -> Recipe:
    """Qwen2.5-7B after the paper's last stage, TP4 x CP2."""
    return beyond_16k(qwen2_5_7b_16k(), "qwen2.5_7b_16k", 32_768, TP4_CP2)


@recipe("qwen2.5_7b_64k")
def qwen2_5_7b_64k() -> Recipe:
    """Qwen2.5-7B after the stage of 32K, TP4 x CP2."""
    return beyond_16k(qwen2_5_7b_32k(), "qwen2.5_7b_32k", 65_536, TP4_CP2)


@recipe("qwen2.5_7b_128k")
def qwen2_5_7b_128k() -> Recipe:
    """Qwen2.5-7B after the stage of 64K, TP4 x CP4 on two nodes."""
    return beyond_16k(qwen2_5_7b_64k(), "qwen2.5_7b_64k", 131_072, TP4_CP4, nodes=2)


@recipe("llama3.1_8b_32k")
def llama3_1_8b_32k() -> Recipe:
    """Llama-3.1-8B after the paper's last stage, TP4 x CP2."""
    return beyond_16k(llama3_1_8b_16k(), "llama3.1_8b_16k", 32_768, TP4_CP2)


@recipe("llama3.1_8b_64k")
def llama3_1_8b_64k() -> Recipe:
    """Llama-3.1-8B after the stage of 32K, TP4 x CP2."""
    return beyond_16k(llama3_1_8b_32k(), "llama3.1_8b_32k", 65_536, TP4_CP2)


@recipe("llama3.1_8b_128k")
def llama3_1_8b_128k() -> Recipe:
    """Llama-3.1-8B after the stage of 64K, TP4 x CP4 on two nodes."""
    return beyond_16k(llama3_1_8b_64k(), "llama3.1_8b_64k", 131_072, TP4_CP4, nodes=2)


@dataclass(frozen=True, kw_only=True)
class QaSchedule:
    """The schedule of QA-SFT; every field is a Megatron flag that the user may give instead.

    The paper tunes both arms for 600 steps on Dolly-15K before evaluations that generate text; it states
    nothing else about the tuning.
    """

    iterations: int = 600
    """Steps (stated)."""
    batch_rows: int = 8
    """Rows of an iteration. Not stated in the paper. With rows of 2,048 tokens 600 steps read 9.8 million
    tokens, and each of eight GPUs has one row."""
    learning_rate: float = 1e-5
    """Peak. Not stated in the paper; that of our recipes of continued pretraining."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the rate rises. Not stated in the paper; usual in fine-tuning."""
    weight_decay: float = 0.0
    """Of AdamW. Not stated in the paper; none is usual in fine-tuning."""
    gradient_clip: float = 1.0
    """Largest gradient norm. Not stated in the paper; 1 is usual."""
    adam_beta1: float = 0.9
    """Decay of the first moment. Not stated in the paper."""
    adam_beta2: float = 0.95
    """Decay of the second moment. Not stated in the paper; as in pretraining."""
    seed: int = 1234
    """Order of the rows, the same in every arm. The value is not stated in the paper."""
    save_every: int = 200
    """Iterations between two checkpoints. Not stated in the paper."""
    evaluate_every: int = 100
    """Iterations between two validation losses. Not stated in the paper."""

    def flags(self) -> list[Flag]:
        """Return Megatron's flags. The rate falls to 0 as a cosine (not stated in the paper)."""
        return [
            ("--train-iters", str(self.iterations)),
            ("--global-batch-size", str(self.batch_rows)),
            ("--optimizer", "adam"),
            ("--lr", f"{self.learning_rate:g}"),
            ("--min-lr", "0"),
            ("--lr-decay-style", "cosine"),
            ("--lr-warmup-fraction", f"{self.warmup_fraction:g}"),
            ("--weight-decay", f"{self.weight_decay:g}"),
            ("--clip-grad", f"{self.gradient_clip:g}"),
            ("--adam-beta1", f"{self.adam_beta1:g}"),
            ("--adam-beta2", f"{self.adam_beta2:g}"),
            ("--seed", str(self.seed)),
            ("--save-interval", str(self.save_every)),
            ("--eval-interval", str(self.evaluate_every)),
            ("--log-interval", "1"),
        ]


@functools.cache
def field_help(owner: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(text.value.value).split())
    return texts


def flat_fields(value: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, value, help) of every field, with those of layout and schedule in their place.

    Names are unique over a recipe, its layout and its schedule, so `tensor_parallel=2` needs no prefix.
    """
    kind: Any = type(value)
    for entry in fields(value):
        inner = getattr(value, entry.name)
        if is_dataclass(inner) and not isinstance(inner, type):
            yield from flat_fields(inner)
        else:
            yield entry.name, inner, field_help(kind)[entry.name]


def change_fields(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Return a recipe with some fields changed.

    Args:
        recipe: the recipe to start from.
        changes: `NAME=VALUE` each; tokens and counts understand K, M and G (x 1,024).

    Raises:
        ValueError: an unknown field, a field that is a list, or a value of another type.
    """
    wanted: dict[str, Any] = {}
    known = {name: value for name, value, _ in flat_fields(recipe)}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is not a change of a field: write NAME=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or list(known)
            raise ValueError(f"a recipe has no field {name!r}: did you mean {', '.join(near)}?")
        wanted[name] = _convert(name, text, known[name])
    parts = {}
    for part in ("layout", "schedule"):
        inner = getattr(recipe, part)
        names = {field.name for field in fields(inner)} & set(wanted)
        parts[part] = replace(inner, **{name: wanted.pop(name) for name in names})
    return replace(recipe, **parts, **wanted)


def _convert(name: str, text: str, current: Any) -> Any:
    if isinstance(current, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{name}={text}: write true or false")
        return text == "true"
    if isinstance(current, int):
        return 0 if text == "0" else positive_int(text)
    if isinstance(current, float):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name}={text}: {text!r} is not a number") from None
    if isinstance(current, str):
        return text
    raise ValueError(f"{name} cannot be changed on the command line: write a recipe in recipes.py")


EPILOG = """\
examples:

  python -m megatron_exact.training.recipes
  python -m megatron_exact.training.recipes llama3.1_8b_16k
  python -m megatron_exact.training.pretrain --recipe llama3.1_8b_16k --print-arguments
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m megatron_exact.training.recipes`."""
    parser = ToolParser(
        prog="python -m megatron_exact.training.recipes",
        description="List the recipes, or show one: every field, its value and what the paper states.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="the recipe to show (default: list all)")
    return parser


def recipe_table() -> list[str]:
    """Return a table with one line for each recipe."""
    lines = [f"{'recipe':<24}{'rows':>7}{'GPUs':>6}{'iterations':>12}{'tokens':>10}  layout"]
    for name in RECIPES:
        recipe = find_recipe(name)
        flags = dict(recipe.flags())
        lines.append(
            f"{name:<24}{recipe.row_tokens:>7}{recipe.world_size:>6}{flags['--train-iters']:>12}"
            f"{recipe.schedule.budget_tokens / 1e9:>9.2f}B  {recipe.layout.describe()}"
        )
    return lines


def recipe_text(name: str) -> list[str]:
    """Describe one recipe: every field with its help, and the commands that pack its chain.

    Raises:
        ValueError: an unknown name.
    """
    recipe = find_recipe(name)
    lines = [f"{name}: {(RECIPES[name].__doc__ or '').strip()}", f"chain: {' > '.join(chain_of(name))}", ""]
    for entry, value, text in flat_fields(recipe):
        lines.append(f"{entry} = {value}")
        lines += textwrap.wrap(text, width=100, initial_indent="    ", subsequent_indent="    ")
    packs = [shlex.join(find_recipe(stage).pack_command()) for stage in chain_of(name)]
    return [*lines, "", "the packs of its chain:", *(f"    {command}" for command in packs)]


def main() -> None:
    """List the recipes, or show the one that the command line names."""
    name = build_parser().parse_args().recipe
    print("\n".join(recipe_table() if name is None else recipe_text(name)))


if __name__ == "__main__":
    run_tool(main)
