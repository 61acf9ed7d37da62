"""Peak resident memory of a conversion: below the largest tensor x 4 + 1 GiB, whatever the model's size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve.checkpoint.open import open_checkpoint
from tests.architecture.imports import ROOT

D, F, V, N, H = 1024, 16384, 32768, 8, 128
LARGEST = 2 * V * D  # bytes: the embedding

# VmHWM and not ru_maxrss: that begins with the peak of the process that started this one.
MEASURED = """
import re, sys
from pathlib import Path
from jaxserve.checkpoint.convert import convert
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], dtype=sys.argv[4] or None)
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


def sparse_model(folder: Path, num_layers: int) -> Path:
    """A Llama in bfloat16 whose file takes no room on the disk: all its tensors are zeros that were never written."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(num_layers):
        layer = {
            "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (N * H, D), "self_attn.v_proj": (N * H, D),
            "self_attn.o_proj": (D, N * H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
            "input_layernorm": (D,), "post_attention_layernorm": (D,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    folder.mkdir()
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F,
        "vocab_size": V, "num_hidden_layers": num_layers, "num_attention_heads": N, "num_key_value_heads": N,
        "head_dim": H, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("num_layers", "format", "dtype"),
    [(9, "orbax", ""), pytest.param(24, "orbax", "float16", marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_the_model(num_layers: int, format: str, dtype: str, tmp_path: Path):
    source, out = sparse_model(tmp_path / "source", num_layers), tmp_path / "out"
    try:
        command = [sys.executable, "-c", MEASURED, source, out, format, dtype]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        with open_checkpoint(out) as checkpoint:
            num_bytes = checkpoint.num_bytes
    finally:
        shutil.rmtree(out, ignore_errors=True)  # pytest would keep it
    peak, bound = int(done.stdout), 4 * LARGEST + 2**30
    assert num_bytes > (2 * bound if num_layers == 24 else 1e9)
    # In little time: what does not grow with the model is far below the bound.
    assert peak < (bound if num_layers == 24 else 2**29 + 4 * LARGEST), (peak, bound)
