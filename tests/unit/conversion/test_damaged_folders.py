"""Folders damaged at random or on purpose: an import ends in one line and nothing, or in whole weights."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.integrity import check_integrity
from tests.unit.conversion.hostile_folders import FAULTS, make_hostile
from tests.unit.conversion.small_models import LLAMA, read_checkpoint, write_model

JUNK = (
    None,
    True,
    0,
    -1,
    0.5,
    1e300,
    2**70,
    "",
    "x",
    "../x.safetensors",
    "\ud800",
    [],
    [0, 1],
    {},
    {"a": 1},
)
GENERATION_CONFIG = "generation_config.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("good") / "hf", LLAMA, num_files=2)
    (folder / GENERATION_CONFIG).write_text(json.dumps({"do_sample": True, "top_p": 0.9}))
    return folder


@pytest.fixture(scope="module")
def imported(source: Path) -> dict[str, torch.Tensor]:
    import_hf(source, source.parent / "checkpoint")
    return read_checkpoint(source.parent / "checkpoint")


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    pairs = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [place for key, inner in pairs for place in ((value, key), *places(inner))]


def damage_json(text: bytes, data: st.DataObject) -> bytes:
    """Exchange or remove one value anywhere."""
    value = json.loads(text)
    container, key = data.draw(st.sampled_from(places(value)))
    if data.draw(st.booleans()):
        container[key] = data.draw(st.sampled_from(JUNK))
    else:
        del container[key]
    return json.dumps(value).encode()


def damage_bytes(content: bytes, data: st.DataObject) -> bytes:
    """Change, insert or cut somewhere, in the header of a weight file most often."""
    header = 8 + int.from_bytes(content[:8], "little") if content[8:9] == b"{" else len(content)
    place = data.draw(st.integers(0, min(header, len(content)) - 1))
    kind = data.draw(st.sampled_from(("change", "insert", "cut")))
    rest = {"change": content[place + 1 :], "insert": content[place:], "cut": b""}[kind]
    return content[:place] + (b"" if kind == "cut" else data.draw(st.binary(min_size=1, max_size=9))) + rest


def damage(content: bytes, name: str, data: st.DataObject) -> bytes:
    """Damage a file of the folder: its text or what the text says."""
    if data.draw(st.booleans()):
        return damage_bytes(content, data)
    if name.endswith(".json"):
        return damage_json(content, data)
    size = 8 + int.from_bytes(content[:8], "little")
    header = damage_json(content[8:size], data)
    return len(header).to_bytes(8, "little") + header + content[size:]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(
    source: Path, imported: dict[str, torch.Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    hf, output = tmp_path / "hf", tmp_path / "checkpoint"
    for folder in (hf, output):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, hf)
    file = data.draw(st.sampled_from(sorted(hf.iterdir())))
    file.write_bytes(damage(file.read_bytes(), file.name, data))
    refusal = ""
    try:
        import_hf(hf, output)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
        return
    found = read_checkpoint(output)
    assert found.keys() == imported.keys()
    for key, tensor in found.items():
        assert tensor.shape == imported[key].shape, key
        if tensor.dtype == imported[key].dtype:
            assert torch.equal(tensor, imported[key]), key


def test_the_undamaged_folder_is_imported(source: Path, imported: dict[str, torch.Tensor]) -> None:
    """Without this a test of refusals could pass on a folder that nothing accepts."""
    assert imported
    assert (source.parent / "checkpoint" / "hf" / GENERATION_CONFIG).is_file()


@pytest.mark.parametrize("text", ["{", "[]", "x"])
def test_a_damaged_generation_config_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / GENERATION_CONFIG).write_text(text)
    with pytest.raises(ValueError, match=rf"{GENERATION_CONFIG} .*copy it again"):
        import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder: give the folder of a Hugging Face model"):
        import_hf(tmp_path / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_prepared_folder_is_refused_in_one_printable_line(
    single: Path, tmp_path: Path, fault: str
) -> None:
    """Cheaply too: no header or count makes the reader reserve memory or take long."""
    hf = tmp_path / "hf"
    pattern = make_hostile(hf, fault, single)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=pattern) as error:
        import_hf(hf, tmp_path / "out" / "checkpoint")
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000, "kB"
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1500
    assert str(tmp_path) in str(error.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("single") / "hf", LLAMA)


def run_and_kill(work: Callable[[], object], seconds: float) -> bool:
    """Do some work in a child and kill it after that time; whether it was still at work."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_any_moment_and_called_again(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", replace(LLAMA, num_layers=16, hidden_size=256), num_files=3)
    begin = time.monotonic()
    import_hf(hf, tmp_path / "whole")
    lasted = time.monotonic() - begin
    expected = (tmp_path / "whole" / "release" / "integrity.json").read_bytes()
    moments = random.Random(13)
    kills = 0
    for trial in range(40):
        if trial >= 8 and kills >= 3:
            break
        output = tmp_path / "out" / "checkpoint"
        kills += run_and_kill(lambda: import_hf(hf, output), moments.uniform(0, lasted))  # noqa: B023
        if not output.exists():  # whole or absent: it appears by one rename
            import_hf(hf, output)
        assert [entry.name for entry in output.parent.iterdir()] == ["checkpoint"]
        assert (output / "release" / "integrity.json").read_bytes() == expected
        assert all(
            fault is None for _, fault in check_integrity(output / "release") or [("none", "missing")]
        )
        shutil.rmtree(output.parent)
    assert kills >= 3, "too few of the kills came before the end"


ESCAPING = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__init__.__globals__ }}"


def test_a_prepared_chat_template_is_carried_and_never_run(source: Path, tmp_path: Path) -> None:
    """Packing and evaluation render it by transformers, which sandboxes it; conversion does not render."""
    hf = tmp_path / "hf"
    shutil.copytree(source, hf)
    (hf / "chat_template.jinja").write_text(ESCAPING)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == ESCAPING
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    template = chat_template_utils._compile_jinja_template(ESCAPING)
    assert type(template.environment) is ImmutableSandboxedEnvironment
    with pytest.raises(SecurityError):
        template.render(messages=[])
