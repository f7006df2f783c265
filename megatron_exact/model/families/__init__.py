"""The supported model families, and the functions for models whose family is not known yet.

A new family is one file here and one line in `FAMILIES`. A model that only Megatron's flags describe
belongs to the first family that has its modules; a family that Megatron builds like another comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_exact.model.families import llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3
from megatron_exact.model.family import Family, short
from megatron_exact.model.shapes import MEGATRON_DEFAULTS, ModelShape, compare_shapes

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        qwen2.FAMILY,
        llama.FAMILY,
        qwen3.FAMILY,
        mistral.FAMILY,
        smollm3.FAMILY,
        phi3.FAMILY,
        olmo2.FAMILY,
    )
}
"""`model_type` -> family."""

PRESETS: dict[str, ModelShape] = {
    name: shape for family in FAMILIES.values() for name, shape in family.presets.items()
}
"""Shapes of the published base models; an instruct model with another window has no preset."""


def family_of(shape: ModelShape) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: a shape that belongs to no family.
    """
    if shape.architecture not in FAMILIES:
        raise ValueError(
            f"architecture {short(shape.architecture)} is not supported: choose one of "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[shape.architecture]


def shape_of_hf_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape that a `config.json` describes.

    Args:
        config: its content.
        where: its path, for messages.

    Raises:
        ValueError: an unknown architecture, or anything that would change the model and cannot be kept.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{where} contains a {type(config).__name__}, not an object: it is not a model config"
        )
    model_type = config.get("model_type")
    names = config.get("architectures") or []
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not (
        isinstance(names, list) and all(name in (family.model_class, family.base_class) for name in names)
    ):
        supported = ", ".join(known.model_class for known in FAMILIES.values())
        raise ValueError(
            f"{where} describes model_type {short(model_type)}, architectures {short(names or None)}, "
            f"which is not supported: only {supported} are"
        )
    return family.shape_of_config(config, where)


def hf_config_of_shape(shape: ModelShape, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return a `config.json` for a model of this shape that never had one.

    Args:
        shape: the model.
        dtype: dtype of the weights, as torch spells it.
    """
    return family_of(shape).config_of_shape(shape, dtype=dtype)


def shape_of_megatron_arguments(args: Any, *, like: ModelShape | None = None) -> ModelShape:
    """Return the shape that Megatron will build.

    Args:
        args: Megatron's validated namespace.
        like: a shape whose family is preferred, where Megatron builds models of several families alike.

    Raises:
        ValueError: a model that belongs to no family; names the arguments.
    """
    fitting = [family for family in FAMILIES.values() if family.is_built_by(args)]
    if not fitting:
        names = ["add_qkv_bias", "qk_layernorm"]
        names += [name for name, default in MEGATRON_DEFAULTS.items() if getattr(args, name) != default]
        names += ["post_norm"] if getattr(args, "post_norm", False) else []
        found = " and ".join(f"{name} {getattr(args, name)}" for name in names)
        raise ValueError(f"no supported model family has {found}")
    same = [family for family in fitting if like is not None and family.model_type == like.architecture]
    return (*same, *fitting)[0].shape_of_arguments(args)


def preset(name: str) -> ModelShape:
    """Return the shape of a preset.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def matching_preset(shape: ModelShape) -> str | None:
    """Return the name of the preset with exactly this shape, or None."""
    return next((name for name, known in PRESETS.items() if known == shape), None)


def require_preset(shape: ModelShape, name: str, *, of: str) -> None:
    """Check that a model is the named preset.

    Args:
        shape: what was found.
        name: name of the preset.
        of: where the shape was found.

    Raises:
        ValueError: an unknown name, or every field that differs.
    """
    differences = compare_shapes(shape, preset(name))
    if differences:
        raise ValueError(
            f"{of} is not {name}: {'; '.join(differences)}. Name another folder or preset, or leave "
            "--preset out to import it as it is"
        )


def nearest_preset(shape: ModelShape, *, at_most: int = 2) -> tuple[str, list[str]] | None:
    """Return the preset that differs in few fields, with the lines of `compare_shapes`, or None.

    For a message: a config that is almost a known model was perhaps edited by mistake.
    """
    differences = {name: compare_shapes(shape, known) for name, known in PRESETS.items()}
    name = min(differences, key=lambda name: len(differences[name]))
    return (name, differences[name]) if 0 < len(differences[name]) <= at_most else None
