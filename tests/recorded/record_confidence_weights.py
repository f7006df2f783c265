"""Record the weights of the authors' ShortLongLoss, as `confidence_weights.json` beside this file.

    python -m tests.recorded.record_confidence_weights CHECKOUT

CHECKOUT is a copy of github.com/UKPLab/naacl2025-token-weighting; `ShortLongLoss` of its `src/trainer.py`
runs here as it is, on made-up losses without ties. Its constructor refuses the transform "shift" that its
method knows, so that transforms are set afterwards. Written are weights, none of the authors' code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from numpy.typing import NDArray

OUTPUT = Path(__file__).with_name("confidence_weights.json")
ROWS, TARGETS = 3, 40


def losses() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Long and short losses [ROWS, TARGETS], multiples of 1/1024 that no two targets of a row share."""
    draw = np.random.RandomState(5)
    short = draw.randint(1, 6000, size=(ROWS, TARGETS)) / 1024
    changes = np.array([draw.permutation(4000)[:TARGETS] - 2100 for _ in range(ROWS)]) / 1024
    return short + changes, short


L1 = {"normalization": "L1"}
CASES: list[tuple[str, dict[str, float], dict[str, Any]]] = [
    ("dense", {"lam": 0.5}, {"transforms": ["absolute"], **L1, "interpolation": 0.5}),
    ("dense", {"lam": 0.2}, {"transforms": ["absolute"], **L1, "interpolation": 0.2}),
    ("sparse", {"kappa": 0.2}, {"transforms": ["absolute"], **L1, "sparsification": 0.2}),
    (
        "sparse",
        {"kappa": 0.39},
        {"transforms": ["absolute"], **L1, "sparsification": 0.39},
    ),
    ("longce", {"cap": 5.0}, {"transforms": ["minus", "exp"], "truncation": 5.0}),
    ("ppmi", {"s": 1.5}, {"transforms": ["minus", "shift 1.5", "max"], **L1}),
    ("npmi", {"s": 1.5}, {"transforms": ["shift 1.5", "max"], **L1}),
    (
        "ppmi",
        {"s": 1.5, "kappa": 0.24},
        {"transforms": ["minus", "shift 1.5", "max"], **L1, "sparsification": 0.24},
    ),
    (
        "npmi",
        {"s": 1.0, "kappa": 0.1},
        {"transforms": ["shift 1", "max"], **L1, "sparsification": 0.1},
    ),
]
"""Rule and parameters here, and theirs."""


def record(checkout: Path) -> dict[str, Any]:
    """The weights of every case."""
    import torch

    sys.modules["logger_setup"] = MagicMock()
    sys.path.insert(0, str(checkout / "src"))
    from trainer import ShortLongLoss  # type: ignore[import-not-found]

    long, short = (torch.from_numpy(values) for values in losses())
    found = []
    for rule, parameters, theirs in CASES:
        transforms = theirs.pop("transforms")
        made = ShortLongLoss(base_length=8, base_stride=6, **theirs)
        made.transforms = transforms
        rows = made.calculate_weights(long.clone(), short.clone()).tolist()
        found.append({"rule": rule, "parameters": parameters, "rows": rows})
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "code": "github.com/UKPLab/naacl2025-token-weighting",
        "commit": commit.stdout.strip() or "not a git checkout",
        "weights": found,
    }


if __name__ == "__main__":
    content = record(Path(sys.argv[1]).resolve())
    OUTPUT.write_text(json.dumps(content) + "\n")
    print(f"{OUTPUT}: {len(content['weights'])} cases")
