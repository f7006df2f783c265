"""Scoring, probe and evaluation on the null device, against the same on the CPU."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.conftest import Device
from tests.distributed.hf_models import VOCABULARY, make_model
from tests.unit.evaluation.probe_models import write_model

ROWS = [0, 1, 2]
MODEL = "qwen2 tied, 2 groups"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    make_model(MODEL).save_pretrained(folder)
    return folder


def test_scores_of_a_pack_are_those_of_the_cpu(
    device: Device, model: Path, pack: Path, tmp_path: Path
) -> None:
    from megatron_exact.data.rows import RowReader
    from megatron_exact.exposure.confidence import ShortWindows
    from megatron_exact.scoring import Scorer, score_rows

    seen = device.see(tmp_path, "score_tokens", model=model, pack=pack, rows=ROWS)
    assert seen["device"] == "cuda:0"
    assert seen["mixed_devices"] == seen["refused"] == seen["not_computed"] == {}
    reader = RowReader(pack, "train")
    scorer = Scorer(model, reader.row_tokens, device="cpu", dtype="float32")
    here = score_rows(reader, ROWS, ShortWindows(window=16, stride=12), scorer)
    for name, array in here.items():
        np.testing.assert_allclose(seen[name], array, rtol=0, atol=1e-4, err_msg=name)
    assert np.abs(here["difference"]).max() > 0.1  # scores of the long context alone would be seen


def test_scores_of_the_probe_are_those_of_the_cpu(device: Device, model: Path, tmp_path: Path) -> None:
    from megatron_exact.evaluation.probe import score_items
    from megatron_exact.evaluation.probe_items import ProbeItem

    draw = random.Random(0)
    lead = tuple(draw.randrange(VOCABULARY) for _ in range(60))
    items = [
        ProbeItem(
            id=str(number),
            kind="k",
            distance=1,
            context=69,
            prompt=(*lead, number, *range(8)),
            prompt_ablated=(*lead, 50 + number, *range(8)),
            gold=(3, 4),
            candidates=((3, 4), (5,)),
            competitor=(5,),
        )
        for number in range(3)
    ]
    seen = device.see(tmp_path, "probe", model=model, items=[asdict(item) for item in items])
    assert seen["device"] == "cuda"
    assert seen["mixed_devices"] == seen["refused"] == seen["not_computed"] == {}
    here = [[*one.scores, *one.scores_ablated] for one in score_items(make_model(MODEL), None, items)]
    np.testing.assert_allclose(seen["scores"], here, rtol=0, atol=1e-4)
    assert np.abs(np.diff(here, axis=0)).max() > 1e-2  # the items differ


@pytest.mark.slow
def test_answers_of_the_evaluation_are_those_of_the_cpu(device: Device, tmp_path: Path) -> None:
    texts = ["Who wrote the letter?", "When did the train leave?"]
    folder = write_model(tmp_path / "hf")
    found = {
        place: device.see(tmp_path / str(place), "answers", model=folder, texts=texts, device=place)
        for place in ("cpu", None)
    }
    assert (found["cpu"]["device"], found[None]["device"]) == ("cpu", "cuda:0")
    assert found[None]["answers"] == found["cpu"]["answers"]
    assert len({answer for _, answer in found["cpu"]["answers"]}) > 1
    assert found[None]["mixed_devices"] == found[None]["refused"] == {}
