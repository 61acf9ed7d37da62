#!/usr/bin/env python
"""Tiny random LoRA adapters of the golden models as `peft` saves them, and the float32 logits that it computes.

Runs where torch, transformers, peft and safetensors are installed and shares no code with jaxserve:

    python scripts/make_golden_adapters.py tests/data/golden tests/data/adapters

Each adapter's folder gets what ``save_pretrained`` writes and:

* ``golden.json``: the base model's name and prompt, the greedy continuation, its log-probability gaps, how it was made;
* ``golden.npz``: ``logits`` [prompt + new - 1, V] f32, of every position of one pass over prompt and continuation.

The script raises if a tensor could be left out without changing the logits, if a greedy choice is nearly a tie, if the
adapter leaves the base model's tokens as they are, or if merged weights give other logits.
"""

import argparse
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (not a dependency of this project)
import transformers  # pyright: ignore[reportMissingImports]
from make_golden_models import MIN_GAP, TOLERANCE, all_logits, difference, greedy  # beside this script
from peft import LoraConfig, PeftModel, get_peft_model  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_all": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
    ),
    "llama_some": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"layers.2.self_attn.q_proj": 5},
        },
    ),
    "phi3_fused": (
        "phi3_partial",
        {"r": 3, "lora_alpha": 6, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    ),
    "gpt2_fused": (
        "gpt2",
        {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
}  # name -> golden model, peft's LoraConfig


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def adapter_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name]


@torch.no_grad()
def fill(model: Any, seed: int) -> None:
    """Random A and B whose product changes a matrix by about a third of what it does."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter_tensors(model):
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise * (tensor.shape[1] ** -0.5 if ".lora_A." in name else 0.4))


def find_seed(model: Any, prompt: list[int], base_tokens: list[int]) -> int:
    """Fills the adapter from the first seed whose greedy choices are no ties and not those of the base model."""
    for seed in range(2000):
        fill(model, seed)
        new, gaps, _ = greedy(model, prompt)
        if min(gaps) >= MIN_GAP and len(set(new)) >= len(new) - 3 and new != base_tokens:
            return seed
    raise SystemExit("no seed gives clear choices")


@torch.no_grad()
def check_all_is_seen(model: Any, tokens: list[int], logits: torch.Tensor) -> None:
    for name, tensor in adapter_tensors(model):
        before = tensor.clone()
        tensor.zero_()
        seen = difference(all_logits(model, tokens), logits)
        tensor.copy_(before)
        if seen < 10 * TOLERANCE:
            raise SystemExit(f"{name}: without it the logits change by {seen:.1e} only")


def make(base: Path, config: dict[str, Any], folder: Path) -> None:
    record = json.loads((base / "golden.json").read_text())
    prompt = record["prompt_token_ids"]
    model = get_peft_model(base_model(base), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    seed = find_seed(model, prompt, record["new_token_ids"])
    model.peft_config["default"].base_model_name_or_path = base.name  # not where it lay
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a model card to fill in

    # What is recorded comes from the folder, not from the model that was saved into it.
    model = PeftModel.from_pretrained(base_model(base), folder).eval()
    new, gaps, _ = greedy(model, prompt)
    tokens = prompt + new[:-1]
    logits = all_logits(model, tokens)
    check_all_is_seen(model, tokens, logits)
    merged = difference(all_logits(model.merge_and_unload(), tokens), logits)
    if merged > TOLERANCE / 10:
        raise SystemExit(f"merged weights give other logits, by {merged:.1e}")
    np.savez_compressed(folder / "golden.npz", logits=logits.numpy())
    record = {
        "base": base.name,
        "prompt_token_ids": prompt,
        "new_token_ids": new,
        "gaps": [round(g, 4) for g in gaps],
        "max_model_len": record["max_model_len"],
        "seed": seed,
        "merged_minus_unmerged": float(f"{merged:.1e}"),
        "made_with": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "peft", "safetensors", "numpy")},
        },
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (folder / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(
        f"{folder.name}: seed {seed}, {size // 1024} KiB, smallest gap {min(gaps):.3f}, merged {merged:.1e}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, help="the folder of make_golden_models.py")
    parser.add_argument("folder", type=Path, help="where each adapter gets a folder")
    parser.add_argument("names", nargs="*", help=f"some of {' '.join(ADAPTERS)}; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.names or ADAPTERS:
        base, config = ADAPTERS[name]
        make(args.models / base, config, args.folder / name)


if __name__ == "__main__":
    main()
