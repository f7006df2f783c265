"""The contenders of `tokenising.py` that are not this project's tool, each as a process of its own.

    python benchmarks/tokenizer_contenders.py encode-batch --text T.jsonl --tokenizer tokenizer.json ...

Only public interfaces of the libraries are used, as their own documentation shows them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import run_tool
from megatron_exact.data.indexed import IndexedWriter

CHUNK_BYTES = 1 << 20
DATATROVE_BATCH_DOCUMENTS = 1000  # its default of 10,000 needs gigabytes for long documents


class PlainEncoder:
    """What a pool worker of the plain pipeline holds, made once a process."""

    def __init__(self, tokenizer: str, eod_token: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(tokenizer)
        self.eod_id = self._tokenizer.token_to_id(eod_token)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, lines: list[bytes]) -> list[NDArray[np.int32]]:
        """Token ids of each line's text, and the EOD."""
        texts = [json.loads(line)["text"] for line in lines]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eod_id], np.int32) for encoding in encodings]


_encoder: PlainEncoder | None = None


def _start_worker(tokenizer: str, eod_token: str) -> None:
    global _encoder
    _encoder = PlainEncoder(tokenizer, eod_token)


def _encode_in_worker(lines: list[bytes]) -> list[NDArray[np.int32]]:
    assert _encoder is not None
    return _encoder.encode(lines)


def _chunks(text: str) -> Iterator[list[bytes]]:
    with open(text, "rb") as stream:
        while lines := stream.readlines(CHUNK_BYTES):
            yield lines


def encode_batch_processes(options: argparse.Namespace) -> None:
    """`multiprocessing.Pool.imap` over chunks of lines, `encode_batch` in each worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = PlainEncoder(options.tokenizer, options.eod_token)
    writer = IndexedWriter(options.output + ".bin", options.output + ".idx", encoder.vocab_size)
    with multiprocessing.Pool(
        options.workers, _start_worker, (options.tokenizer, options.eod_token)
    ) as pool:
        for documents in pool.imap(_encode_in_worker, _chunks(options.text)):
            for ids in documents:
                writer.add(ids)
    writer.close()


def encode_batch_threads(options: argparse.Namespace) -> None:
    """One process; the library's own threads share each batch of ten chunks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    encoder = PlainEncoder(options.tokenizer, options.eod_token)
    writer = IndexedWriter(options.output + ".bin", options.output + ".idx", encoder.vocab_size)
    lines: list[bytes] = []
    for number, chunk in enumerate(_chunks(options.text), start=1):
        lines += chunk
        if number % 10 == 0:
            for ids in encoder.encode(lines):
                writer.add(ids)
            lines = []
    for ids in encoder.encode(lines):
        writer.add(ids)
    writer.close()


def datatrove(options: argparse.Namespace) -> None:
    """Its JSON lines reader and Megatron writer, one task a part of the text (it never splits a file)."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    parts = Path(options.parts)
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(parts), glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(
                output_folder=options.output,
                tokenizer_name_or_path=options.tokenizer,
                eos_token=options.eod_token,
                batch_size=DATATROVE_BATCH_DOCUMENTS,
            ),
        ],
        tasks=len(list(parts.glob("*.jsonl"))),
        workers=options.workers,
        logging_dir=options.output + ".logs",
    ).run()


CONTENDERS = {
    "encode-batch": encode_batch_processes,
    "encode-batch-threads": encode_batch_threads,
    "datatrove": datatrove,
}


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    for name in ("text", "parts", "tokenizer", "eod-token", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    CONTENDERS[options.contender](options)


if __name__ == "__main__":
    run_tool(main)
