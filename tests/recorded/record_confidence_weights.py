"""Record the weights of the authors' ShortLongLoss and the short context of each of their targets.

    python -m tests.recorded.record_confidence_weights CHECKOUT

CHECKOUT is a copy of github.com/UKPLab/naacl2025-token-weighting; `ShortLongLoss` of its `src/trainer.py`
runs here as it is, on made-up losses without ties. Its constructor refuses the transform "shift" that its
method knows, so that transforms are set afterwards. `compute_loss` and `calculate_base_loss` run with a
model whose loss depends only on the number of tokens before the target, so that each short loss shows its
context. `confidence_weights.json` beside this file contains weights and numbers of tokens, none of the
authors' code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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


WINDOWS = ((8, 6, 32), (16, 12, 64))
"""Window, stride and row, tokens; their code needs rows that windows fill."""


def telling_model(input_ids: Any) -> Any:
    """Two-way logits [n, S, 2] whose loss for label 0 falls with each token before it."""
    import torch

    before = torch.arange(1, input_ids.shape[1] + 1, dtype=torch.float32) / 8
    logits = torch.stack([before, torch.zeros_like(before)], dim=-1)
    return SimpleNamespace(logits=logits.expand(input_ids.shape[0], -1, -1))


def contexts(losses: Any) -> list[int]:
    """The number of tokens before each target, from its loss under `telling_model`."""
    return [round(-8 * float(np.log(np.expm1(loss)))) for loss in losses.double().tolist()]


def record_contexts(trainer: Any) -> list[dict[str, Any]]:
    """The short context of the S - 1 targets of a row, scored in training and beforehand."""
    import torch

    found = []
    for window, stride, row_tokens in WINDOWS:
        batch = torch.zeros((1, row_tokens), dtype=torch.long)
        seen: list[Any] = []
        rule = trainer.ShortLongLoss(base_length=window, base_stride=stride)
        rule.calculate_weights = lambda loss, short, seen=seen: seen.append(short) or torch.ones_like(loss)
        job = SimpleNamespace(
            custom_loss=rule,
            use_frozen_base=False,
            tokenizer=None,
            scoring_minibatch=1,
            loss_func=torch.nn.CrossEntropyLoss(reduction="none"),
            log_perplexity=False,
            vanilla_loss_for_logging=0,
            std_for_logging=0,
            forward_pass_counter=0,
            args=SimpleNamespace(gradient_accumulation_steps=2),
        )
        trainer.CustomTrainer.compute_loss(
            job,
            lambda ids=None, input_ids=None: telling_model(ids if input_ids is None else input_ids),
            {"input_ids": batch},
        )
        beforehand = trainer.calculate_base_loss(
            telling_model, batch, window, stride, None, use_first_chunk=True
        )
        found.append(
            {
                "window": window,
                "stride": stride,
                "row_tokens": row_tokens,
                "in_training": contexts(seen[0][0]),
                "beforehand": contexts(beforehand[0]),
            }
        )
    return found


def record(checkout: Path) -> dict[str, Any]:
    """The weights of every case."""
    import torch

    sys.modules["logger_setup"] = MagicMock()
    sys.path.insert(0, str(checkout / "src"))
    import trainer  # type: ignore[import-not-found]

    long, short = (torch.from_numpy(values) for values in losses())
    found = []
    for rule, parameters, theirs in CASES:
        transforms = theirs.pop("transforms")
        made = trainer.ShortLongLoss(base_length=8, base_stride=6, **theirs)
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
        "short_contexts": record_contexts(trainer),
    }


if __name__ == "__main__":
    content = record(Path(sys.argv[1]).resolve())
    OUTPUT.write_text(json.dumps(content) + "\n")
    print(f"{OUTPUT}: {len(content['weights'])} cases")
