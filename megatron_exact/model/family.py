"""A model family: its `config.json` in and out, the names of its tensors, and what is not supported.

A family is one file of `families/` that makes one `Family`. What sets families apart is data there, and no
other module asks which family a model is of. All families are dense decoders that Megatron's GPTModel
builds: RMSNorm, rotary embedding, grouped-query attention, a gated SiLU MLP, and optionally a bias of q, k
and v or an RMSNorm of every query and key head.

Both spellings of the rotary parameters are read: `rope_parameters` (transformers 5) and `rope_theta` with
`rope_scaling` (before). A config may have both if they agree. The second is written, because both old and
new versions of transformers read it. Null counts as absent where transformers takes it so. Keys that do not
change the forward pass (token ids, dropout, `use_cache`, ...) are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from megatron_exact.model.shapes import (
    FIXED_ARGUMENTS,
    Llama3Scaling,
    ModelShape,
    YarnScaling,
    check_megatron_can_build,
    layers_without_rope_of,
    num_query_groups_of,
)

Fusion = Literal["stacked", "by_group"]

LAYERS = "decoder.layers."
"""Prefix of a Megatron tensor that stacks the layers of a model on its leading axis."""
DEFAULT_EPSILON = 1e-6
DEFAULT_THETA = 10_000.0
LONGROPE = ("longrope", "su")
"""LongRoPE (Ding et al. 2024, arXiv 2402.13753), and its name in older configs of Phi-3."""


@dataclass(frozen=True, kw_only=True)
class NotSupported:
    """A key of `config.json` that would change the model in a way that cannot be kept."""

    key: str
    """Name of the key."""
    harmless: tuple[Any, ...]
    """Values that change nothing."""
    reason: str
    """Why any other value is an error, for the message."""


NOT_SUPPORTED = (
    NotSupported(
        key="quantization_config",
        harmless=(None,),
        reason="quantized weights cannot be trained: take the original model",
    ),
    NotSupported(
        key="compression_config",
        harmless=(None,),
        reason="compressed weights cannot be trained: take the original model",
    ),
    NotSupported(
        key="auto_map",
        harmless=(None, {}),
        reason="the model brings code of its own, which is never run here",
    ),
    NotSupported(
        key="per_layer_config",
        harmless=(None, {}),
        reason="layers that differ from one another are not supported",
    ),
    NotSupported(
        key="transformers_weights",
        harmless=(None,),
        reason="weights under another name are not supported: call the file model.safetensors, remove "
        "the key",
    ),
    NotSupported(
        key="hidden_act", harmless=("silu", "swish"), reason="only the gated SiLU MLP is supported"
    ),
    NotSupported(
        key="use_sliding_window",
        harmless=(None, False),
        reason="sliding-window layers would hide the context that is weighted",
    ),
    NotSupported(
        key="use_mrope", harmless=(None, False), reason="multimodal rotary embedding is not supported"
    ),
    NotSupported(key="mlp_bias", harmless=(None, False), reason="a bias in the MLP is not supported"),
)
"""Keys that no family supports; a family adds its own."""


@dataclass(frozen=True, kw_only=True)
class HfNames:
    """Modules of a Hugging Face model, as its tensors are named without `.weight` or `.bias`.

    `{layer}` stands for the number of the layer. The defaults are Llama's, which most families took over.
    """

    embedding: str = "model.embed_tokens"
    """Token embedding."""
    attention_norm: str = "model.layers.{layer}.input_layernorm"
    """RMSNorm before attention, or after it where the shape has `post_norm`."""
    query: str = "model.layers.{layer}.self_attn.q_proj"
    """Query projection."""
    key: str = "model.layers.{layer}.self_attn.k_proj"
    """Key projection."""
    value: str = "model.layers.{layer}.self_attn.v_proj"
    """Value projection."""
    query_key_value: str | None = None
    """One projection in place of these three, all query rows first, then all of keys, then of values."""
    query_norm: str = "model.layers.{layer}.self_attn.q_norm"
    """RMSNorm of every query head; read only where the shape has `qk_norm`."""
    key_norm: str = "model.layers.{layer}.self_attn.k_norm"
    """RMSNorm of every key head; read only where the shape has `qk_norm`."""
    attention_output: str = "model.layers.{layer}.self_attn.o_proj"
    """Projection after attention."""
    mlp_norm: str = "model.layers.{layer}.post_attention_layernorm"
    """RMSNorm before the MLP, or after it where the shape has `post_norm`."""
    gate: str = "model.layers.{layer}.mlp.gate_proj"
    """First half of the gated MLP, which passes the SiLU."""
    up: str = "model.layers.{layer}.mlp.up_proj"
    """Second half of the gated MLP."""
    gate_up: str | None = None
    """One projection in place of these two, the rows of the gate first."""
    down: str = "model.layers.{layer}.mlp.down_proj"
    """Projection back to the residual stream."""
    final_norm: str = "model.norm"
    """RMSNorm after the last layer."""
    head: str = "lm_head"
    """Output layer; a tied model may store it or the embedding or both, and both must be equal."""
    base_prefix: str = "model."
    """Prefix that the names of the model with an output layer have before those of the model without
    one."""

    @property
    def embedding_weight(self) -> str:
        """Name of the tensor of the embedding."""
        return f"{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        """Name of the tensor of the output layer."""
        return f"{self.head}.weight"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Hugging Face tensor, or one for each layer."""

    name: str
    """Name of the tensor, with `{layer}` in tensors of a layer."""
    lengths: tuple[int, ...]
    """Shape of the tensor; the first axis counts the rows."""
    sections: tuple[int, ...] = ()
    """Rows of query, key and value in a tensor that has all three; else empty."""


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """Which tensors of a Hugging Face model make up one tensor of a Megatron checkpoint.

    Megatron's keys and shapes are those that a GPTModel of megatron-core 0.19.2 asks for, with the local
    layer spec as with Transformer Engine's.
    """

    megatron: str
    """Key in a torch_dist checkpoint."""
    parts: tuple[Part, ...]
    """Tensors that it is made of, in this order."""
    fusion: Fusion = "stacked"
    """`stacked`: one part after the other. `by_group`: for each key/value group the query rows of its
    heads, then its key rows, then its value rows."""

    @property
    def per_layer(self) -> bool:
        """Whether the Megatron tensor has a leading axis of layers."""
        return self.megatron.startswith(LAYERS)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Shape of one layer of the Megatron tensor: the rows of all parts, then their other axes."""
        return (sum(part.lengths[0] for part in self.parts), *self.parts[0].lengths[1:])


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets the models of one family apart."""

    model_type: str
    """Hugging Face's `model_type`, and the `architecture` of the family's shapes."""
    model_class: str
    """Class of transformers, as `architectures` names it."""
    base_class: str
    """Class of transformers without an output layer; a tied model saved by it is complete."""
    defaults: Mapping[str, Any]
    """Values that transformers takes for missing keys of `config.json`; `max_position_embeddings` is always
    there. Without `num_key_value_heads` there are as many as query heads; without `head_dim` the heads
    divide `hidden_size`; without `rms_norm_eps`, `rope_theta` and `tie_word_embeddings` the values are
    `DEFAULT_EPSILON`, `DEFAULT_THETA` and false."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys of this family alone in a `config.json` that is written for a model that never had one."""
    read_fields: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None
    """Given a `config.json` and its path, returns fields of the shape that only this family states."""
    write_keys: Callable[[ModelShape], Mapping[str, Any]] | None = None
    """The way back: given a shape, returns those keys of its `config.json`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Llama's name of a key of `config.json` -> the family's, where they differ."""
    not_supported: tuple[NotSupported, ...] = ()
    """Keys beyond `NOT_SUPPORTED`; a missing key has the value of `defaults`."""
    qkv_bias: bool = False
    """Whether q, k and v have a bias (Megatron's `--add-qkv-bias`)."""
    qk_norm: bool = False
    """Whether query and key heads have an RMSNorm (Megatron's `--qk-layernorm`)."""
    post_norm: bool = False
    """Whether the norms follow attention and MLP, and those of queries and keys span all heads (our
    `--post-norm`)."""
    may_skip_rope: bool = False
    """Whether layers may be without rotary embedding (Megatron's `--no-rope-freq`)."""
    may_rotate_part: bool = False
    """Whether a part of each head may stay as it is (`partial_rotary_factor`, `--rotary-percent`)."""
    may_scale_rope: bool = True
    """Whether transformers knows Llama 3's scaling in this family."""
    names: HfNames = HfNames()
    """Names of the tensors in Hugging Face's files."""
    presets: Mapping[str, ModelShape] = field(default_factory=dict)
    """Names of published models; a preset is a name for a shape, not a condition."""

    def shape_of_config(self, config: Mapping[str, Any], where: str) -> ModelShape:
        """Return the shape that a `config.json` of this family describes.

        Args:
            config: its content.
            where: its path, for messages.

        Raises:
            ValueError: anything that would change the model and cannot be kept.
        """
        own = config
        config = {**own, **{llama: own[key] for llama, key in self.keys.items() if key in own}}
        self._check_supported(config, where)

        def integer(name: str) -> int:
            return _integer(own, self.key(name), where)

        heads, hidden = integer("num_attention_heads"), integer("hidden_size")
        groups = config.get("num_key_value_heads", self.defaults.get("num_key_value_heads"))
        head_dim = config.get("head_dim", self.defaults.get("head_dim"))
        if head_dim is None:
            if heads < 1 or hidden % heads:
                raise ValueError(
                    f"{where}: {self.key('hidden_size')} {hidden} does not divide by "
                    f"{self.key('num_attention_heads')} {heads}"
                )
            head_dim = hidden // heads
        theta, scaling, fraction = _rope(config, where, self.defaults.get("rope_theta", DEFAULT_THETA))
        if fraction != 1 and not self.may_rotate_part:
            raise ValueError(
                f"{where}: partial_rotary_factor is {fraction}: rotary embedding over part of a head is "
                f"not supported for {self.model_type}"
            )
        try:
            self.check_scaling(scaling)
        except ValueError as error:
            raise ValueError(f"{where}: {error}: remove it") from None
        window = config.get("max_position_embeddings", self.defaults["max_position_embeddings"])
        values: dict[str, Any] = {
            "num_layers": integer("num_hidden_layers"),
            "ffn_hidden_size": integer("intermediate_size"),
            "vocab_size": integer("vocab_size"),
            "max_position_embeddings": window,
            "norm_epsilon": _number(
                own, self.key("rms_norm_eps"), where, self.defaults.get("rms_norm_eps", DEFAULT_EPSILON)
            ),
            "tied_embeddings": _boolean(
                own, self.key("tie_word_embeddings"), where, self.defaults.get("tie_word_embeddings", False)
            ),
        }
        try:
            shape = ModelShape(
                architecture=self.model_type,
                hidden_size=hidden,
                num_attention_heads=heads,
                num_query_groups=heads if groups is None else groups,
                head_dim=head_dim,
                rope_theta=theta,
                rope_scaling=scaling,
                rotary_fraction=fraction,
                qkv_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
                post_norm=self.post_norm,
                **values,
            )
            check_megatron_can_build(shape)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # after the counts were checked, which it may take from the config
        return shape if self.read_fields is None else replace(shape, **self.read_fields(config, where))

    def config_of_shape(self, shape: ModelShape, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return a `config.json` for a model of this shape that never had one.

        Args:
            shape: the model.
            dtype: dtype of the weights, as torch spells it.
        """
        config: dict[str, Any] = {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "attention_dropout": 0.0,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.ffn_hidden_size,
            "max_position_embeddings": shape.max_position_embeddings,
            "num_attention_heads": shape.num_attention_heads,
            "num_hidden_layers": shape.num_layers,
            "num_key_value_heads": shape.num_query_groups,
            "rms_norm_eps": shape.norm_epsilon,
            "rope_theta": shape.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": shape.tied_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": shape.vocab_size,
            **self.written,
            **(self.write_keys(shape) if self.write_keys is not None else {}),
        }
        if shape.rotary_fraction != 1:
            config["partial_rotary_factor"] = shape.rotary_fraction
        if shape.rope_scaling is not None:
            config["rope_scaling"] = _config_of_scaling(shape.rope_scaling)
        return {self.key(name): value for name, value in config.items()}

    def config_with_rope(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
        """Return a copy of a `config.json` of this family with the rotary frequencies of a shape.

        Every place that states a value states the new one, because contradicting places are an error.

        Args:
            config: content that `shape_of_config` reads without an error.
            shape: the model with its new base; with YaRN, or else with the scaling of the config.
        """
        changed, key = dict(config), self.key("rope_theta")
        places = [name for name in ("rope_scaling", "rope_parameters") if config.get(name)]
        inside = [name for name in places if config[name].get("rope_theta") is not None]
        changed |= {name: {**config[name], "rope_theta": shape.rope_theta} for name in inside}
        if key in config or not inside:
            changed[key] = shape.rope_theta
        if isinstance(shape.rope_scaling, YarnScaling):
            yarn = _config_of_scaling(shape.rope_scaling)
            for name in places or ["rope_scaling"]:
                kept = {"rope_theta": shape.rope_theta} if name in inside else {}
                changed[name] = {**kept, **yarn}
            beside = "original_max_position_embeddings"
            changed |= {beside: yarn[beside]} if beside in config else {}
        return changed

    def key(self, name: str) -> str:
        """Return the family's name of a key of `config.json` that Llama calls `name`."""
        return self.keys.get(name, name)

    def check_scaling(self, scaling: Llama3Scaling | YarnScaling | None) -> None:
        """Check that models of this family may have a scaling of their rotary frequencies.

        Raises:
            ValueError: a scaling that a config.json of this family cannot have.
        """
        if isinstance(scaling, YarnScaling):
            if self.may_skip_rope or self.may_rotate_part:
                raise ValueError(
                    f"rope_type yarn is not supported for {self.model_type}, where a part of the heads or "
                    "layers may not rotate"
                )
        elif scaling is not None and not self.may_scale_rope:
            raise ValueError(f"rope_type llama3 is not supported for {self.model_type}")

    def is_built_by(self, args: Any) -> bool:
        """Whether Megatron's validated namespace has the modules of this family."""
        return bool(
            args.add_qkv_bias == self.qkv_bias
            and args.qk_layernorm == self.qk_norm
            and getattr(args, "post_norm", False) == self.post_norm  # ours: not in Megatron's parser
            and (self.may_skip_rope or not layers_without_rope_of(args))
            and (self.may_rotate_part or args.rotary_percent == 1)
            and (self.may_scale_rope or not args.use_rope_scaling)
        )

    @property
    def switches(self) -> tuple[str, ...]:
        """Flags that every model of this family needs beside those of all families."""
        needed = {
            "--add-qkv-bias": self.qkv_bias,
            "--qk-layernorm": self.qk_norm,
            "--post-norm": self.post_norm,
        }
        return tuple(flag for flag, is_needed in needed.items() if is_needed)

    def shape_of_arguments(self, args: Any) -> ModelShape:
        """Return the shape that Megatron will build from its validated namespace.

        Raises:
            ValueError: an argument that no family has at that value; names all of them.
        """
        strange = [
            f"{name} is {getattr(args, name)}, expected {value}"
            for name, value in FIXED_ARGUMENTS.items()
            if getattr(args, name) != value
        ]
        if strange:
            raise ValueError(f"no supported model family: {'; '.join(strange)}")
        return ModelShape(
            architecture=self.model_type,
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=num_query_groups_of(args),
            head_dim=args.kv_channels,
            vocab_size=args.vocab_size,
            max_position_embeddings=args.max_position_embeddings,
            norm_epsilon=args.layernorm_epsilon,
            rope_theta=float(args.rotary_base),
            rope_scaling=_scaling_of(args),
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            qkv_bias=args.add_qkv_bias,
            qk_norm=args.qk_layernorm,
            rotary_fraction=args.rotary_percent,
            layers_without_rope=layers_without_rope_of(args),
            post_norm=getattr(args, "post_norm", False),
        )

    def tensors_of(self, shape: ModelShape) -> tuple[TensorName, ...]:
        """Return every tensor of a model of this shape in the order in which a checkpoint has them."""
        names, hidden, ffn = self.names, shape.hidden_size, shape.ffn_hidden_size
        queries, keys = (
            heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_query_groups)
        )

        def fused_qkv(kind: str, *tail: int) -> TensorName:
            rows = ((names.query, queries), (names.key, keys), (names.value, keys))
            parts = tuple(Part(name=f"{module}.{kind}", lengths=(length, *tail)) for module, length in rows)
            if names.query_key_value is not None:
                sections = (queries, keys, keys)
                name = f"{names.query_key_value}.{kind}"
                parts = (Part(name=name, lengths=(sum(sections), *tail), sections=sections),)
            return TensorName(
                megatron=f"{LAYERS}self_attention.linear_qkv.{kind}", parts=parts, fusion="by_group"
            )

        def weight(megatron: str, *parts: tuple[str, tuple[int, ...]]) -> TensorName:
            return TensorName(
                megatron=f"{megatron}.weight",
                parts=tuple(Part(name=f"{module}.weight", lengths=lengths) for module, lengths in parts),
            )

        def norm(megatron: str, module: str, width: int) -> TensorName:
            return TensorName(megatron=megatron, parts=(Part(name=f"{module}.weight", lengths=(width,)),))

        attention, mlp = f"{LAYERS}self_attention.", f"{LAYERS}mlp."
        halves = ((names.gate, (ffn, hidden)), (names.up, (ffn, hidden)))
        gate_up = halves if names.gate_up is None else ((names.gate_up, (2 * ffn, hidden)),)
        # where a layer has its norms, and how wide those of queries and keys are
        before = (f"{attention}linear_qkv.layer_norm_weight", f"{mlp}linear_fc1.layer_norm_weight")
        after = (f"{attention}linear_proj.output_norm.weight", f"{mlp}linear_fc2.output_norm.weight")
        attention_norm, mlp_norm = after if shape.post_norm else before
        widths = (queries, keys) if shape.post_norm else (shape.head_dim, shape.head_dim)
        lines = [
            weight("embedding.word_embeddings", (names.embedding, (shape.vocab_size, hidden))),
            norm(attention_norm, names.attention_norm, hidden),
            fused_qkv("weight", hidden),
        ]
        if shape.qkv_bias:
            lines.append(fused_qkv("bias"))
        if shape.qk_norm:
            lines += [
                norm(f"{attention}q_layernorm.weight", names.query_norm, widths[0]),
                norm(f"{attention}k_layernorm.weight", names.key_norm, widths[1]),
            ]
        lines += [
            weight(f"{attention}linear_proj", (names.attention_output, (hidden, queries))),
            norm(mlp_norm, names.mlp_norm, hidden),
            weight(f"{mlp}linear_fc1", *gate_up),
            weight(f"{mlp}linear_fc2", (names.down, (hidden, ffn))),
            norm("decoder.final_layernorm.weight", names.final_norm, hidden),
        ]
        if not shape.tied_embeddings:
            lines.append(weight("output_layer", (names.head, (shape.vocab_size, hidden))))
        return tuple(lines)

    def _check_supported(self, config: Mapping[str, Any], where: str) -> None:
        known = {**self.defaults, **config}
        for one in (*NOT_SUPPORTED, *self.not_supported):
            if one.key in known and known[one.key] not in one.harmless:
                what = "is" if one.key in config else "is missing, which means"
                raise ValueError(
                    f"{where}: {self.key(one.key)} {what} {short(known[one.key])}: {one.reason}"
                )
        kinds = config.get("layer_types")
        if kinds is not None and (
            not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
        ):
            raise ValueError(
                f"{where}: layer_types are not all full_attention: sliding windows are not supported"
            )


def _rope(
    config: Mapping[str, Any], where: str, default_theta: float
) -> tuple[float, Llama3Scaling | YarnScaling | None, float]:
    """Return rope_theta, scaling and rotary fraction, read from the keys that transformers 5.23 reads.

    `rope_scaling` takes precedence over `rope_parameters`; a `rope_theta` inside over the one beside it,
    and an `original_max_position_embeddings` beside over the one inside
    (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`). A value that would be ignored must agree.
    """
    inside: dict[str, Mapping[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key) or {}
        if not isinstance(parameters, Mapping) or any(isinstance(v, Mapping) for v in parameters.values()):
            raise ValueError(f"{where}: {key} {short(parameters)} is not one set for all layers")
        if parameters:
            inside[key] = {**parameters, "rope_type": _rope_type(parameters, f"{where}: {key}")}
    first = next(iter(inside), "")

    def value_of(key: str, *order: str, default: Any = None) -> Any:
        """Return the value that counts: that of the first place in `order` that has one."""
        places = {**inside, **({"": config} if "" in order else {})}
        said = {place: values[key] for place, values in places.items() if values.get(key) is not None}
        winner = next((place for place in order if place in said), None)
        counts = default if winner is None else said[winner]
        for place, value in said.items():
            if value != counts and short(value) != short(
                counts
            ):  # two NaN, which differ, are reported below
                taken = f"{key} defaults to" if winner is None else f"{_path(winner, key)} is"
                raise ValueError(
                    f"{where}: {taken} {short(counts)}, but {_path(place, key)} is {short(value)}: they "
                    "contradict each other, keep the one that the model was trained with"
                )
        return counts

    # transformers does not replace a null by the default
    is_null = any(values.get("rope_theta", 0) is None for values in (config, *inside.values()))
    theta = value_of("rope_theta", first, "", default=None if is_null else default_theta)
    theta = _number({"rope_theta": theta}, "rope_theta", where)
    key = "partial_rotary_factor"
    fraction = _number({key: value_of(key, first, "", default=1.0)}, key, where)
    kind = value_of("rope_type", first, default="default")
    if kind == "default":
        return theta, None, fraction
    if kind in LONGROPE:
        raise ValueError(
            f"{where}: rope_type {short(kind)} is not supported: it divides every frequency by a number of "
            "its own, which Megatron's RotaryEmbedding cannot; take a version of the model without it"
        )
    if kind not in ("llama3", "yarn"):
        raise ValueError(
            f"{where}: rope_type {short(kind)} is not supported, only default, llama3 and yarn: remove it "
            "to train with the model's own frequencies"
        )
    original = value_of("original_max_position_embeddings", "", first)
    if original is None:
        raise ValueError(f"{where}: rope_type {kind} needs original_max_position_embeddings")
    if kind == "yarn":
        return theta, _yarn(value_of, first, original, where), fraction
    numbers = {
        key: _number({key: value_of(key, first)}, key, where)
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    key = "original_max_position_embeddings"
    scaling = Llama3Scaling(
        **numbers, original_max_position_embeddings=_integer({key: original}, key, where)
    )
    return theta, scaling, fraction


def _yarn(value_of: Callable[..., Any], first: str, original: Any, where: str) -> YarnScaling:
    """Return YaRN's scaling of a config.

    Args:
        value_of: given a key and the place that counts, returns the value or None.
        first: the place.
        original: window before the scaling.
        where: path of the config, for messages.
    """
    # vLLM reads the last three, transformers does not: an exported model would not be the trained one
    for key, harmless in (
        *(("attention_factor", None), ("mscale", None), ("mscale_all_dim", None)),
        *(("attn_factor", 1), ("apply_yarn_scaling", True), ("extrapolation_factor", 1)),
    ):
        if (value := value_of(key, first)) is not None and value != harmless:
            raise ValueError(
                f"{where}: {key} is {short(value)}: only YaRN's own factor of attention is supported, "
                "0.1 ln(factor) + 1"
            )
    if value_of("truncate", first) not in (None, True):
        raise ValueError(f"{where}: truncate is not true: other ramps of YaRN are not supported")
    numbers = {"factor": _number({"factor": value_of("factor", first)}, "factor", where)}
    for key in ("beta_fast", "beta_slow"):
        if (value := value_of(key, first)) is not None:
            numbers[key] = _number({key: value}, key, where)
    key = "original_max_position_embeddings"
    try:
        return YarnScaling(
            **numbers, original_max_position_embeddings=_integer({key: original}, key, where)
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


def _scaling_of(args: Any) -> Llama3Scaling | YarnScaling | None:
    """Return the scaling of Megatron's namespace; `yarn` is ours, not in Megatron's parser."""
    if args.use_rope_scaling:
        return Llama3Scaling(factor=args.rope_scaling_factor)
    yarn = getattr(args, "yarn", None)
    return None if yarn is None else YarnScaling(**yarn)


def _config_of_scaling(scaling: Llama3Scaling | YarnScaling) -> dict[str, Any]:
    """Return a scaling as `rope_scaling` of a config.json."""
    return {"rope_type": "llama3" if isinstance(scaling, Llama3Scaling) else "yarn", **asdict(scaling)}


def _rope_type(parameters: Mapping[str, Any], where: str) -> Any:
    """Return `rope_type`, or `type`, its name before transformers 4.43; None where both are missing."""
    new, old = parameters.get("rope_type"), parameters.get("type")
    if new is not None and old is not None and new != old:
        raise ValueError(
            f"{where}.rope_type is {short(new)}, but its type is {short(old)}: they contradict each "
            "other, keep the one that the model was trained with"
        )
    return old if new is None else new


def _path(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _integer(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key} is {short(value)}, not an integer")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} is {short(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{where}: {key} is {short(value)}, too large for a float") from None
    if not math.isfinite(number):
        raise ValueError(f"{where}: {key} is {number}, not a finite number: copy the config.json again")
    return number


def _boolean(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {short(value)}, not true or false: write which it is")
    return value


def short(value: Any) -> str:
    """Return a value as Python writes it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
