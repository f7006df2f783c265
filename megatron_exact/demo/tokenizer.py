"""A small SentencePiece model of the demo's corpus, the same at every run.

Whitespace is kept as it is (indentation has meaning in the default corpus), bytes that no piece covers
are spelled out, and one thread trains on a fixed sample, so that equal text gives an equal model.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from megatron_exact.files import atomic_file
from megatron_exact.json_input import parse_corpus_line

MAX_LINE_BYTES = 4_000


def train_tokenizer(corpus: Path, output: Path, *, vocabulary: int, sample_bytes: int) -> None:
    """Train a byte-pair model on lines spread evenly over the corpus and write it to `output`.

    Args:
        corpus: JSON lines with `text`.
        output: the `.model` file.
        vocabulary: number of pieces, of which 259 are unknown, begin, end and the bytes.
        sample_bytes: about how much text to train on.

    Raises:
        ValueError: text too uniform for that many pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample_lines(corpus, sample_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=0.999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot make {vocabulary:,} pieces of this text ({error}): name more text"
        ) from error
    with atomic_file(output) as temporary:
        temporary.write_bytes(model.getvalue())


def sample_lines(corpus: Path, sample_bytes: int) -> Iterator[str]:
    """Every k-th line of the corpus' texts, k chosen such that about `sample_bytes` come out."""
    stride = max(1, round(corpus.stat().st_size / sample_bytes))
    number = 0
    with open(corpus, encoding="utf-8") as stream:
        for document in stream:
            for line in parse_corpus_line(document, "text")["text"].split("\n"):
                number += 1
                if number % stride == 0 and line and "\0" not in line:
                    yield line
