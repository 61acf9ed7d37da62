#!/usr/bin/env python
"""A server of its own process under 10,000 clients of all kinds over gRPC and HTTP: many check every token, the others
cancel, time out, stall, break off, or send what is no request. Exit status 1 if afterwards it has more files, threads,
memory or held pages than after a warm-up of 5,000, or if any client got a wrong answer.

    python scripts/soak.py                    # a tiny model with a pool of pages too small for its clients
    python scripts/soak.py MODEL --clients 2000 --num-pages 200
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.bench.report import print_rows
from jaxserve.loadtest import soak
from jaxserve.loadtest.faults.known import WrongAnswerError

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model that `jaxserve serve` takes (default: a tiny one, made here)")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=5_000, help="clients before those that are counted")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rows", type=int, default=5, help="of the table, besides that of the warm-up")
    parser.add_argument("--max-growth-mib", type=float, default=4.0, help="memory that may come after the warm-up")
    parser.add_argument("--num-pages", type=int, default=60, help="of 4 tokens")
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--platform", help="for jax (default: what it finds)")
    parser.add_argument("--output", type=Path, help="a file for the rows")
    args = parser.parse_args()
    options = {"max_model_len": 112, "page_size": 4, "num_pages": args.num_pages, "max_num_seqs": args.max_num_seqs}
    options |= {"prefill_sizes": (64,)}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = str(make_tiny(Path(folder) / "tiny"))
        try:
            rows = soak.run(
                model,
                warm_up=args.warm_up,
                num_clients=args.clients,
                num_at_once=args.at_once,
                num_rows=args.rows,
                seed=args.seed,
                platform=args.platform,
                output=args.output,
                on_row=lambda row: print(json.dumps({key: row[key] for _, key in soak.FIGURES}), file=sys.stderr),
                **options,
            )
        except (WrongAnswerError, RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    words = [f"{name}={value}" for name, value in vars(args).items() if name != "output"]
    print_rows([row | {"command": f"scripts/soak.py ({', '.join(words)})"} for row in rows], soak.FIGURES)
    for end, count in rows[-1]["outcomes"].items():
        print(f"{count:6d}  {end}")
    found = soak.complaints(rows, args.max_growth_mib)
    for line in found:
        print(f"not flat: {line}", file=sys.stderr)
    return 1 if found else 0


def make_tiny(folder: Path) -> Path:
    """A folder with a model of random weights, whose tokens are bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "model.safetensors").write_bytes(safetensors(tiny_weights()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={"<eos>": 0, "<ctl>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def tiny_weights() -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    size, ffn, head = TINY["hidden_size"], TINY["intermediate_size"], TINY["hidden_size"] // TINY["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"model.embed_tokens": (TINY["vocab_size"], size), "lm_head": (TINY["vocab_size"], size)}
    for i in range(TINY["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (size, size) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (TINY["num_key_value_heads"] * head, size) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (ffn, size) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (size, ffn)}
        shapes |= {f"{layer}.{name}_layernorm": (size,) for name in ("input", "post_attention")}
    shapes["model.norm"] = (size,)
    weights = {name: r.normal(size=shape, scale=0.3) for name, shape in shapes.items()}
    return {f"{name}.weight": (w + (w.ndim == 1)).astype(np.float32) for name, w in weights.items()}


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        begin, data = len(data), data + tensor.tobytes()
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (begin, len(data))}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


if __name__ == "__main__":
    sys.exit(main())
