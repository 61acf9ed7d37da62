"""A Hugging Face folder of a known shape with random bfloat16 weights: what a start from disk is measured with.

PYTHONPATH=. python benchmarks/random_checkpoint.py FOLDER [--shape llama-3.1-8b]
"""

import argparse
import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.shapes import SHAPES

FILE_BYTES = 5 << 30  # of tensors in a file, as the hub's have
BLOCK = 1 << 25  # random numbers; tensors are pieces of them, each from another place on


def tensors(shape: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a Llama's tensors, in a checkpoint's order."""
    d, f, h = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * h, shape["num_key_value_heads"] * h
    found = {"model.embed_tokens.weight": (shape["vocab_size"], d)}
    for i in range(shape["num_hidden_layers"]):
        matrices = {
            "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
            "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": size for name, size in matrices.items()}
    return found | {"model.norm.weight": (d,), "lm_head.weight": (shape["vocab_size"], d)}


def num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def write(folder: Path, shape: dict) -> int:
    """Returns the bytes of all tensors."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * 0.02
    block = np.tile(numbers.astype(jnp.bfloat16), 2).view(np.uint8)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in tensors(shape).items():
        if files[-1] and sum(map(num_bytes, files[-1].values())) + num_bytes(size) > FILE_BYTES:
            files.append({})
        files[-1][name] = size
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file, held in zip(names, files, strict=True):
        header, start = {}, 0
        for name, size in held.items():
            header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, start + num_bytes(size)]}
            start += num_bytes(size)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for number, size in enumerate(held.values()):
                left, place = num_bytes(size), number * 4096 % BLOCK
                while left:
                    part = block[2 * place : 2 * place + min(left, 2 * BLOCK)]
                    out.write(part)
                    left -= len(part)
    total = sum(num_bytes(size) for held in files for size in held.values())
    weight_map = {name: file for file, held in zip(names, files, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"} | shape)
    )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    plain = sorted(name for name, shape in SHAPES.items() if "quantization_config" not in shape)
    parser.add_argument("--shape", choices=plain, default="llama-3.1-8b")
    args = parser.parse_args()
    start = time.perf_counter()
    total = write(args.folder, SHAPES[args.shape])
    print(f"{total / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
