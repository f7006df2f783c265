"""`hf/megatron_exact_import.json`: what an imported model was."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from megatron_exact.conversion.safetensors_files import SafetensorsFolder
from megatron_exact.model.hf_folder import CONFIG, HfFolder
from megatron_exact.model.licence import stated_licence
from megatron_exact.model.presets import matching_preset


def import_record(
    folder: HfFolder, weights: SafetensorsFolder, dtypes: dict[str, str], hashes: dict[str, str]
) -> dict[str, Any]:
    """Shape, licence, dtypes and source of a model.

    Args:
        folder: the Hugging Face folder that is imported.
        weights: its files of weights.
        dtypes: name of the dtype of each parameter.
        hashes: of the files of the checkpoint that was written.
    """
    return {
        "format_version": 1,
        "preset": matching_preset(folder.shape),
        "licence": stated_licence(folder.path),
        "shape": dataclasses.asdict(folder.shape),
        "dtypes": dtypes,
        "source": {
            "config_sha256": hashlib.sha256((folder.path / CONFIG).read_bytes()).hexdigest(),
            "weights": [dataclasses.asdict(file) for file in weights.files],
        },
        "checkpoint": hashes,
    }
