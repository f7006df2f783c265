"""The licence of a model folder, from the front matter of its card."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.model.hf_folder import stated_licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Model", "apache-2.0"),
        ('---\r\nlicense: "llama3.1"\r\n---\r\n', "llama3.1"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: mit # as ever\n---", "mit"),
        ("---\ntags:\n- x\n---\nlicense: mit", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_licences_of_cards(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert stated_licence(tmp_path) == licence


def test_a_folder_without_a_card(tmp_path: Path) -> None:
    assert stated_licence(tmp_path) is None
