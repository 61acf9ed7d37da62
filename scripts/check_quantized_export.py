#!/usr/bin/env python
"""Loads models that ``jaxserve convert --quantize --format safetensors`` wrote in transformers, with gptqmodel and
compressed-tensors, and compares their log-probabilities with ours:

    python scripts/check_quantized_export.py --peer /elsewhere/bin/python --record FILE

Two environments take part, because the peers want a PyTorch of their own: this one, with jaxserve, writes the folders
and computes ours; the peer's, with torch, transformers, optimum, gptqmodel and compressed-tensors, reads them. The
model is a random Qwen2 of widths that every kernel takes. gptqmodel unpacks, and computes in float32, which of itself
it would do in float16; compressed-tensors rounds activations with vLLM's scale, the largest over 127, where its own
divides by 127.5. Rounded activations: an element on the edge between two numbers may go either way, and moves all that
follow it, so there most tokens must agree, not all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "awq": {"method": "awq", "group_size": 32},
    "int4-rtn": {"method": "int4-rtn", "group_size": 32},
    "gptq": {"method": "gptq", "group_size": 32},
    "gptq symmetric": {"method": "gptq", "group_size": 32, "symmetric": True},
    "int4-rtn symmetric": {"method": "int4-rtn", "group_size": 32, "symmetric": True},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8"},
}
TOKENS = [(i * 37 + 5) % 250 for i in range(48)]
MOST = 4e-4  # largest difference of a log-probability, float32

PEER = """
import importlib.metadata as metadata, json, sys, torch
from compressed_tensors.quantization.lifecycle import forward
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

folder, tokens, out = sys.argv[1:4]
given = json.load(open(f"{folder}/config.json"))["quantization_config"]
own = forward.compute_dynamic_scales_and_zp


def as_vllm(**arguments):
    scale, zero = own(**arguments)
    return scale * 127.5 / 127, zero


forward.compute_dynamic_scales_and_zp = as_vllm
backend = {"gptq": lambda: GPTQConfig(bits=4, backend="torch"), "awq": lambda: AwqConfig(backend="torch_awq")}
chosen = backend.get(given["quant_method"])
options = {"quantization_config": chosen()} if chosen else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
for module in model.modules():
    if isinstance(getattr(module, "scales", None), torch.Tensor):
        module.scales = module.scales.float()
        if given["quant_method"] == "awq":
            w = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, given["group_size"])
            module.forward = lambda x, w=w, bias=module.bias: x @ w + (0 if bias is None else bias.float())
with torch.no_grad():
    logprobs = model(torch.tensor([json.loads(tokens)])).logits[0, :-1].float().log_softmax(-1)
kinds = sorted({type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj")})
names = ("torch", "transformers", "gptqmodel", "compressed-tensors")
versions = {name: metadata.version(name) for name in names}
json.dump({"logprobs": logprobs.tolist(), "modules": kinds, "versions": versions}, open(out, "w"))
"""
MAKE = """
import sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
config = Qwen2Config(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.08, tie_word_embeddings=False)
Qwen2ForCausalLM(config).to(torch.float32).save_pretrained(sys.argv[1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="an interpreter with torch, transformers and gptqmodel")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "plain"
        peer(args.peer, MAKE, str(source))
        plain = ours(source)
        rows = [compare(args.peer, name, options, source, plain, Path(folder)) for name, options in CASES.items()]
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "versions"}))
    if args.record:
        kept = [{key: value for key, value in row.items() if key != "versions"} for row in rows]
        record = {"versions": rows[0]["versions"], "limit": MOST, "rows": kept}
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    checked = {row["case"]: row["median_difference" if row["case"] == "w8a8" else "max_difference"] for row in rows}
    return 0 if all(difference <= MOST for difference in checked.values()) else 1


def compare(python: str, name: str, options: dict, source: Path, plain, folder: Path) -> dict:
    import numpy as np

    from jaxserve.checkpoint import open_checkpoint
    from jaxserve.checkpoint.convert import convert
    from jaxserve.quantization.calibrated import CalibratedSource
    from jaxserve.quantization.checkpoint import QuantizedCheckpoint, RoundedSource
    from jaxserve.quantization.recipe import CALIBRATED, quantized_config

    written, out = folder / name.replace(" ", "-"), folder / "peer.json"
    with open_checkpoint(source) as opened:
        config = quantized_config(
            opened.config, options["method"], options.get("group_size"), symmetric=options.get("symmetric", False)
        )
        ids = np.random.default_rng(1).integers(0, 256, (8, 128)).tolist()
        is_calibrated = options["method"] in CALIBRATED
        params = CalibratedSource(opened.read, config, ids) if is_calibrated else RoundedSource(opened.read, config)
        convert(QuantizedCheckpoint(opened, config, params, name), written, format="safetensors")
    mine = ours(written)
    peer(python, PEER, str(written), json.dumps(TOKENS), str(out))
    theirs = json.loads(out.read_text())
    logprobs = np.array(theirs["logprobs"])
    by_token = np.abs(logprobs - mine).max(-1)
    return {
        "case": name,
        "modules": theirs["modules"],
        "max_difference": float(by_token.max()),
        "median_difference": float(np.median(by_token)),
        "difference_from_plain": float(np.abs(mine - plain).max()),
        "versions": theirs["versions"],
    }


def ours(folder: Path):
    """Log-probabilities [tokens - 1, vocabulary] that the engine has of every token after each of ``TOKENS``."""
    import numpy as np

    from jaxserve import Engine, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    sizes = {"max_model_len": 64, "max_num_seqs": 1, "num_pages": 8, "page_size": 16, "prefill_sizes": (64,)}
    with Engine.from_pretrained(str(folder), max_prefill_rows=1, dtype="float32", **sizes) as engine:
        (completion,) = engine.generate([TOKENS], params)
    assert completion.prompt_logprobs is not None
    rows = [entry for entry in completion.prompt_logprobs if entry is not None]
    out = np.empty((len(rows), len(rows[0].top)))
    for row, entry in zip(out, rows, strict=True):
        for token, logprob in entry.top:
            row[token] = logprob
    return out


def peer(python: str, code: str, *arguments: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    subprocess.run([python, "-c", code, *arguments], check=True, env=environment, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
