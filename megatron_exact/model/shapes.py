"""The shape of a model, and the Megatron arguments that build a model of this shape.

A shape is everything about a dense decoder except its weights. It comes from a `config.json`, from a preset
or from Megatron's arguments (`families/`), and everything else follows from it: flags, tensors, memory.
Nothing heavy is imported: tools read shapes before torch or Megatron is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

COUNTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
LARGEST_COUNT = 2**31 - 1
MOST_LAYERS = 10_000
"""More than any model has: lists with an entry for each layer of a damaged config stay small."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's scaling of the rotary frequencies.

    megatron-core 0.19.2 has the last three values written into its code
    (core/models/common/embeddings/rotary_pos_embedding.py, `_apply_scaling`); only the factor is an option.
    """

    factor: float
    """Divisor of the lowest frequencies."""
    low_freq_factor: float = 1.0
    """Wavelengths above original length / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original length / this are unchanged; those between are interpolated."""
    original_max_position_embeddings: int = 8192
    """Window of the model before its own long-context training, tokens."""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's scaling of the rotary frequencies (`yarn.py`), with the factor of attention of its paper.

    Raises:
        ValueError: bounds in the wrong order, or an original window that is not a length.
    """

    factor: float
    """Divisor of the lowest frequencies."""
    original_max_position_embeddings: int
    """Window of the model before, tokens."""
    beta_fast: float = 32.0
    """Pairs that turn this often over the original window keep their frequency."""
    beta_slow: float = 1.0
    """Pairs that turn this often or less are divided by `factor`."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_slow < self.beta_fast < float("inf"):
            raise ValueError(f"beta_slow {self.beta_slow} is not between 0 and beta_fast {self.beta_fast}")
        if not 1 <= self.original_max_position_embeddings <= LARGEST_COUNT:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}, not a "
                "number of tokens"
            )

    @classmethod
    def parse(cls, text: str) -> YarnScaling:
        """Return the scaling that `FACTOR,ORIGINAL` means, such as `4,32768`.

        Raises:
            ValueError: another text, or numbers that are out of range.
        """
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?),([0-9]+)", text)
        if found is None:
            raise ValueError(f"{text!r} is not FACTOR,ORIGINAL, such as 4,32768")
        try:
            scaling = cls(factor=float(found[1]), original_max_position_embeddings=int(found[2]))
        except ValueError as error:
            raise ValueError(f"{text!r} is not FACTOR,ORIGINAL, such as 4,32768: {error}") from None
        if not 1 < scaling.factor < float("inf"):
            raise ValueError(f"{text!r} has a factor that is not above 1: nothing would be scaled")
        return scaling

    @property
    def text(self) -> str:
        """`FACTOR,ORIGINAL`, from which `parse` makes the same numbers; the bounds are not in it."""
        return f"{repr(self.factor).removesuffix('.0')},{self.original_max_position_embeddings}"

    @property
    def window(self) -> int:
        """Longest sequence that the scaling is made for, tokens."""
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def attention_factor(self) -> float:
        """Factor of sines and cosines: 0.1 ln(factor) + 1 (section 3.4, equation 22)."""
        return 0.1 * math.log(self.factor) + 1


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a model except its weights.

    The same in all families: RMSNorm before attention and before the gated SiLU MLP, no bias in linear
    layers except perhaps q, k and v, rotary embedding over the whole head.

    Raises:
        ValueError: a number that is out of range or does not divide.
    """

    architecture: str
    """Name of the family: Hugging Face's `model_type`."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of gate and up each."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads; each serves `num_attention_heads / num_query_groups` query heads."""
    head_dim: int
    """Width of one head; even."""
    vocab_size: int
    """Rows of the embedding, at least the ids of the tokenizer."""
    max_position_embeddings: int
    """Window that the published config states, tokens."""
    norm_epsilon: float
    """Added to the mean square in RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: Llama3Scaling | YarnScaling | None
    """Scaling of the rotary frequencies; None for plain rotary embedding."""
    tied_embeddings: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    """Whether q, k and v have a bias."""
    qk_norm: bool = False
    """Whether every query and key head passes an RMSNorm before it is rotated."""
    rotary_fraction: float = 1.0
    """Share of the values of a head that rotate, from the first on."""
    layers_without_rope: tuple[int, ...] = ()
    """Layers whose queries and keys are not rotated, counted from 0, ascending."""
    post_norm: bool = False
    """Whether the norms of a layer follow attention and MLP instead of preceding them, and those of queries
    and keys span all heads (OLMo 2)."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{name} is {value!r}, not an integer of 1 to {LARGEST_COUNT}")
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}, more than the {MOST_LAYERS} supported")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by num_query_groups "
                f"{self.num_query_groups}: every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction is {self.rotary_fraction}, not above 0 and at most 1")
        if not self.rotary_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of a head of {self.head_dim} is {self.rotary_dim} "
                "values, which cannot be turned in pairs"
            )
        if self.post_norm and not self.qk_norm:
            raise ValueError("post_norm without qk_norm is not supported: no model has it")
        known = sorted(set(self.layers_without_rope) & set(range(self.num_layers)))
        if tuple(known) != self.layers_without_rope:
            raise ValueError(
                f"layers_without_rope {self.layers_without_rope} are not ascending numbers of the "
                f"{self.num_layers} layers"
            )
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}, not between 0 and 1")
        if not 1 < self.rope_theta <= LARGEST_COUNT:
            raise ValueError(f"rope_theta is {self.rope_theta}, not between 1 and {LARGEST_COUNT}")
        if self.rope_scaling is not None and not 1 <= self.rope_scaling.factor < float("inf"):
            raise ValueError(
                f"rope_scaling.factor is {self.rope_scaling.factor}, not a number of 1 or more"
            )
        if isinstance(self.rope_scaling, YarnScaling) and (
            self.rotary_fraction != 1 or self.layers_without_rope
        ):
            raise ValueError(
                "rope_type yarn is not supported where a part of the heads or layers does not rotate: its "
                "factor of the rotated values is in the scale of the softmax here"
            )

    @property
    def rotary_dim(self) -> int:
        """Number of the values of a head that rotate, as transformers and Megatron round it."""
        return int(self.head_dim * self.rotary_fraction)


def shape_record(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of a shape as an import records them.

    Fields that have their default are left out: models without them keep the records that they had before
    the field existed.
    """
    defaults = {field.name: field.default for field in fields(shape)}
    return {name: value for name, value in asdict(shape).items() if value != defaults[name]}


def compare_shapes(found: ModelShape, expected: ModelShape) -> list[str]:
    """Return one line for each field that differs, such as `num_layers is 24, expected 28`; empty if
    equal."""
    theirs = dict(_flat(expected))
    ours = dict(_flat(found))
    names = list(dict.fromkeys((*ours, *theirs)))
    return [
        f"{name} is {ours.get(name)}, expected {theirs.get(name)}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _flat(shape: ModelShape) -> Iterator[tuple[str, Any]]:
    for field in fields(shape):
        value = getattr(shape, field.name)
        if isinstance(value, Llama3Scaling | YarnScaling):
            for inner in fields(value):
                yield f"{field.name}.{inner.name}", getattr(value, inner.name)
        else:
            yield field.name, value


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How many logits exist at a time in the tiled loss head (`loss_head.py`).

    Raises:
        ValueError: a size below 1.
    """

    tokens: int = 2048
    """T, tokens of a tile."""
    columns: int = 2048
    """B, vocabulary columns of a tile."""

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("columns", self.columns)):
            if value < 1:
                raise ValueError(f"a tile of the loss head has {value} {name}: give 1 or more")


GPU_TILES = Tiles(tokens=4096, columns=8192)
"""On a GPU: so large that the forty kernels of a tile take longer to run than to launch; 400 MB."""


def megatron_arguments_of(shape: ModelShape) -> dict[str, Any]:
    """Return what the flags of a shape set in Megatron's namespace: name -> value.

    Raises:
        ValueError: a shape that megatron-core 0.19.2 cannot express.
    """
    check_megatron_can_build(shape)
    scaling = shape.rope_scaling if isinstance(shape.rope_scaling, Llama3Scaling) else None  # ours: YaRN
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "position_embedding_type": "rope",
        "rotary_base": int(shape.rope_theta),
        "rotary_percent": shape.rotary_fraction,
        "no_rope_freq": _no_rope_freq(shape),
        "use_rope_scaling": scaling is not None,
        **({"rope_scaling_factor": scaling.factor} if scaling is not None else {}),
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
    }


def _no_rope_freq(shape: ModelShape) -> int | list[int] | None:
    """Return Megatron's pattern of the layers without RoPE: N for every N-th layer, or a 1 for each."""
    skipped, layers = shape.layers_without_rope, shape.num_layers
    if not skipped:
        return None
    every = skipped[0] + 1
    if layers % every == 0 and skipped == tuple(range(every - 1, layers, every)):
        return every
    return [int(layer in skipped) for layer in range(layers)]


def layers_without_rope_of(args: Any) -> tuple[int, ...]:
    """Return the layers that Megatron will build without RoPE, counted from 0.

    Args:
        args: Megatron's namespace.
    """
    pattern = args.no_rope_freq
    if not pattern:
        return ()
    if isinstance(pattern, int):
        return tuple(range(pattern - 1, args.num_layers, pattern))
    return tuple(layer for layer, is_skipped in enumerate(pattern) if is_skipped)


MEGATRON_DEFAULTS: dict[str, Any] = {"rotary_percent": 1.0, "no_rope_freq": None}
"""Arguments whose flag is given only to models that have another value."""

SPELLED_IN_WAYS = ("no_rope_freq",)
"""Arguments whose flag can be written in several ways, which Megatron's parser alone reads."""

SWITCHES = {
    "group_query_attention": ("--group-query-attention", True),
    "swiglu": ("--swiglu", True),
    "add_bias_linear": ("--disable-bias-linear", False),
    "add_qkv_bias": ("--add-qkv-bias", True),
    "qk_layernorm": ("--qk-layernorm", True),
    "use_rope_scaling": ("--use-rope-scaling", True),
    "untie_embeddings_and_output_weights": ("--untie-embeddings-and-output-weights", True),
}
"""Megatron argument -> (flag without a value, what giving it means)."""


def flag_of(argument: str) -> str:
    """Return the flag that sets an argument of `megatron_arguments_of`."""
    if argument in SWITCHES:
        return SWITCHES[argument][0]
    return {"layernorm_epsilon": "--norm-epsilon"}.get(argument, f"--{argument.replace('_', '-')}")


def megatron_flags(shape: ModelShape, *, without: Iterable[str] = ()) -> list[str]:
    """Return the flags that make Megatron build this shape.

    The window is not among them: rotary embedding needs no table, so `--max-position-embeddings` only has
    to be at least the row length.

    Args:
        shape: the model.
        without: flags to leave out because they are given elsewhere.

    Raises:
        ValueError: a shape that megatron-core 0.19.2 cannot express.
    """
    given = set(without)
    words: list[str] = []
    for argument, value in megatron_arguments_of(shape).items():
        flag = flag_of(argument)
        if flag in given or (argument in MEGATRON_DEFAULTS and value == MEGATRON_DEFAULTS[argument]):
            continue
        if argument not in SWITCHES:
            words += [flag, str(value).replace(" ", "")]  # a list is one word
        elif value == SWITCHES[argument][1]:
            words.append(flag)
    return words


def check_megatron_can_build(shape: ModelShape) -> None:
    """Check for values that megatron-core 0.19.2 would silently replace by its own.

    Raises:
        ValueError: a value that it cannot express; names what Megatron has instead.
    """
    if shape.rope_theta != int(shape.rope_theta):
        raise ValueError(f"rope_theta is {shape.rope_theta}, but Megatron's --rotary-base is an integer")
    scaling = shape.rope_scaling
    if not isinstance(scaling, Llama3Scaling):
        return
    built_in = Llama3Scaling(factor=scaling.factor)
    for field in fields(scaling):
        value, megatron_value = getattr(scaling, field.name), getattr(built_in, field.name)
        if value != megatron_value:
            raise ValueError(
                f"rope_scaling.{field.name} is {value}, but Megatron has {megatron_value} written into its "
                "code: this model would get other rotary frequencies"
            )


FIXED_ARGUMENTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "qk_l2_norm": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "spec": None,
    "use_mup": False,
}
"""Megatron arguments that have one value in all families."""


def num_query_groups_of(args: Any) -> int:
    """Return the key/value heads of the model; Megatron's own value is unset without grouped queries.

    Args:
        args: Megatron's validated namespace.
    """
    return int(args.num_query_groups if args.group_query_attention else args.num_attention_heads)
