#!/usr/bin/env python
"""Makes tests/data/spm_*.model and spm_expected.json: two tiny SentencePiece vocabularies, and what the `sentencepiece`
package (pip install sentencepiece) makes of hard texts with them.

    python scripts/make_sentencepiece_fixtures.py
"""

import io
import json
from pathlib import Path

import sentencepiece  # pyright: ignore[reportMissingImports]  (not a dependency of this project)

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x): return x ** 2  # the square of x",
    "Straße und Größe, naïve café, señor",
    "日本語のテキスト 한국어 텍스트 текст на русском",
    "3.14159 1,234,567 2024-01-31 https://example.org/a?b=c",
    "she sells sea shells by the sea shore, the shells she sells",
    "<table> A to Z </table> & x0",
    "    indented code and    runs of spaces",
] * 4

TEXTS = [
    "", " ", "  ", "hello", " hello", "  hello  ", "the quick brown fox", "the  shells   she sells", "x = f(2)\n\ty",
    "\n\n\n", "\x00\x7f", "café e\u0301", "日本語 한국어", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0010ffff",
    "a\u00a0b", "<0x0A>", "▁", "▁▁the", "the ▁ fox", "1234567", "\r\n",
    "مرحبا", "naïve—“quotes”…", "the" * 50, " ." * 20,
]  # fmt: skip


def train(model_type: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<user>"],  # text around it: the package puts no space after it, transformers does
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    expected = {}
    for model_type in ("bpe", "unigram"):
        data = train(model_type)
        (DATA / f"spm_{model_type}.model").write_bytes(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        expected[model_type] = [[text, ids, processor.decode(ids)] for text in TEXTS for ids in [processor.encode(text)]]
    lines = [f'"{name}": [\n{",\n".join(map(json.dumps, rows))}\n]' for name, rows in expected.items()]
    (DATA / "spm_expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
