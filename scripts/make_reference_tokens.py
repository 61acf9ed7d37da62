#!/usr/bin/env python
"""Greedy tokens of a GGUF model by transformers on torch (CPU, float32): the reference that our engine must reproduce.

Runs where transformers, torch, gguf and accelerate are installed and shares no code with jaxserve:

    python scripts/make_reference_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf tests/data/smollm2_greedy.json

Generation never stops at end-of-sequence. Each new token is recorded with the gap between the two best
log-probabilities: where it is small, another precision may rightly choose the other token. Every step is computed
twice, with a KV cache one token at a time and without one in a single pass; they must agree. Chat prompts are left out
for a model without a chat template; ``--new-tokens`` bounds what is generated for each prompt.
"""

import argparse
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  (not a dependency of this project)
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

Prompt = str | list[dict[str, str]]  # raw text, or chat messages

LONG = """\
The lighthouse stood on a spit of black rock at the edge of the northern sea. For a hundred and forty years its \
lamp had been lit at dusk and put out at dawn, first with whale oil, then with paraffin, and at last with \
electricity that came down a thin wire from the village on the hill. The keepers wrote everything in a book: the \
wind, the height of the waves, the names of ships that passed, the birds that struck the glass in autumn. When \
the last keeper left, the book was closed and put on a shelf in the town hall, between the tax records and a \
history of the herring trade.

One winter a student came to the town to write about the weather of the past. She read the book from the first \
page to the last, and copied the numbers into a table. After three weeks she noticed something odd. On the ninth \
of every month, in every year, the keepers had written the same four words, and nothing else: "The lamp was \
answered." No ship was named. No wind was given. She asked the old people of the town, and they looked at their \
hands. She asked the harbour master, and he told her that there was nothing out there but water, as far as \
Greenland. So on the ninth of January she borrowed a boat, a flask of tea and a good coat, and rowed out to the \
rock before dark. The door was not locked. She climbed the stairs, sat down beside the dead lamp, and waited. At \
ten minutes past nine, far away across the water,"""

LIST = """\
Things in the drawer of the harbour office, counted on a rainy Tuesday: two brass compasses, one of them cracked; a \
ball of tarred string; eleven letters in French, unopened; a tide table for 1931; the left glove of a diver; a \
photograph of a dog called Admiral; 37 Danish coins; a whistle that nobody could hear; three maps of the same \
island, each with a different name; a jar of green sand; half a ticket for the ferry to Bergen; a key with the \
number 9; a wooden seal with a ship on it; the rules of a card game that needs five players; a recipe for fish \
soup, in pencil; and a note that said, in four words, what the keepers had written every month. The clerk copied \
the list into his own book, and put everything back in the order in which he had found it. Then he read, from the \
first page:

"""

CODE = '''import heapq


def dijkstra(graph: dict[str, dict[str, float]], start: str) -> dict[str, float]:
    """Shortest distance from ``start`` to every node that it reaches."""
'''

PROMPTS: dict[str, tuple[Prompt, int]] = {  # name -> prompt, new tokens
    "chat_question": ([{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}], 128),
    "chat_system_turns": (
        [
            {"role": "system", "content": "You are a terse assistant. You answer in lists."},
            {"role": "user", "content": "Name three planets."},
            {"role": "assistant", "content": "- Mercury\n- Venus\n- Mars"},
            {"role": "user", "content": "Now three rivers, each with the continent it is on."},
        ],
        96,
    ),
    "chat_code": ([{"role": "user", "content": "Write a Python function that reverses a linked list."}], 256),
    "raw_english": ("The capital of France is", 64),
    "raw_code": (CODE, 128),
    "raw_multilingual": (
        "Привет, мир! 你好，世界。こんにちは 👩‍👩‍👧‍👦🏳️‍🌈 ¿Qué tal? Ça va très bien, naïve Zürich — ",  # noqa: RUF001
        96,
    ),
    "raw_digits": ("3.14159 26535 89793\n1024 * 768 = 786432\n2048 * 2 =", 64),
    "raw_long": (LONG, 96),
    "raw_one_token": ("The", 128),
    "raw_longer_than_a_window": (CODE + LIST + LONG, 96),  # Gemma 3 sees 512 tokens in most layers
}


@torch.inference_mode()
def greedy(model: Any, prompt_ids: list[int], num_new: int) -> tuple[list[int], list[float]]:
    """New token ids and log-probability gaps, ``num_new`` of each, one token at a time with a KV cache."""
    new_ids: list[int] = []
    gaps: list[float] = []
    inputs, cache = torch.tensor([prompt_ids]), None
    for _ in range(num_new):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = torch.log_softmax(out.logits[0, -1].double(), dim=-1).topk(2)
        new_ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        inputs = torch.tensor([new_ids[-1:]])
    return new_ids, gaps


@torch.inference_mode()
def check_uncached(model: Any, prompt_ids: list[int], new_ids: list[int]) -> None:
    """Raises unless one pass over the whole sequence, without a cache, prefers the same tokens."""
    logits = model(input_ids=torch.tensor([prompt_ids + new_ids[:-1]]), use_cache=False).logits
    preferred = logits[0, len(prompt_ids) - 1 :].argmax(dim=-1).tolist()
    if preferred != new_ids:
        raise SystemExit(f"cached and uncached tokens differ: {new_ids} {preferred}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path, help="model file")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--new-tokens", type=int, default=256, help="at most this many for each prompt")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; spare cores help little at batch 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name)
    model = AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32)
    model.eval()
    prompts = []
    for name, (prompt, most_new) in PROMPTS.items():
        num_new = min(most_new, args.new_tokens)
        if isinstance(prompt, str):  # with the beginning-of-sequence token of a model that has one
            text, prompt_ids = prompt, tokenizer(prompt).input_ids
        elif tokenizer.chat_template is None:
            continue
        else:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            prompt_ids = tokenizer(text, add_special_tokens=False).input_ids
        new_ids, gaps = greedy(model, prompt_ids, num_new)
        check_uncached(model, prompt_ids, new_ids)
        print(f"{name}: {len(prompt_ids)} + {num_new} tokens, smallest gap {min(gaps):.4f}", flush=True)
        prompts.append(
            {
                "name": name,
                "messages": None if isinstance(prompt, str) else prompt,
                "text": text,
                "prompt_token_ids": prompt_ids,
                "new_token_ids": new_ids,
                "gaps": [round(g, 5) for g in gaps],
                "new_text": tokenizer.decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            }
        )
    reference = {
        "model_file": args.gguf.name,
        "model_sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
        "dtype": "float32",
        "made_with": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "gguf", "tokenizers", "numpy")},
        },
        "prompts": prompts,
    }
    args.output.write_text(dump(reference))


def dump(reference: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers, so that a change can be read in a diff."""
    lines: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (int, float)):
            lines.append(json.dumps(value))
            return f"@{len(lines) - 1}@"
        if isinstance(value, dict):
            return {k: mark(v) for k, v in value.items()}
        return [mark(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(mark(reference), indent=1, ensure_ascii=False)
    for i, line in enumerate(lines):
        text = text.replace(f'"@{i}@"', line)
    return text + "\n"


if __name__ == "__main__":
    main()
