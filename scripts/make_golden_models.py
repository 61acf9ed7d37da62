#!/usr/bin/env python
"""Tiny random models of every family as transformers saves them, and the float32 logits that it computes for them.

Runs where torch, transformers and safetensors are installed and shares no code with jaxserve:

    python scripts/make_golden_models.py tests/data/golden            # all of them
    python scripts/make_golden_models.py tests/data/golden llama phi3_long

Each model's folder gets what ``save_pretrained`` writes and:

* ``golden.json``: a prompt, its greedy continuation, the log-probability gaps of that, and how it was made;
* ``golden.npz``: ``logits`` [prompt + new - 1, V] f32, of every position of one pass over prompt and continuation;
* ``config_old_keys.json``: the config as transformers 4 would have written it.

Every weight is random, also norms, biases, sinks and routers, so that none can be forgotten without being seen: the
script raises if some tensor, expert or listed config value could be left out without changing the logits, if a greedy
choice or a router's choice is nearly a tie, or if cached and uncached logits differ.
"""

import argparse
import copy
import json
import math
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (not a dependency of this project)
import transformers  # pyright: ignore[reportMissingImports]
from golden_models import GOLDENS, Golden  # beside this script
from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
from transformers.pytorch_utils import Conv1D  # pyright: ignore[reportMissingImports]

NUM_NEW = 8
TOLERANCE = 2e-4  # of our engine, relative to the largest logit; what must be seen has to change logits 10 times that
MIN_GAP = 0.02  # between the two best log-probabilities of a greedy choice
MIN_MARGIN = 5e-4  # between the last score that a router takes and the first that it leaves


# Weights.


def tensors(model: Any) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """(module, full name, tensor) of every parameter and stored buffer; a tied one once."""
    seen: set[int] = set()
    stored = model.state_dict(keep_vars=True)
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, tensor in own.items():
            full = f"{module_name}.{name}"
            if full in stored and id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, full, tensor


def neutral(module: Any, name: str) -> float | None:
    """The value at which a norm's weight does nothing; None for every other tensor."""
    is_norm = "norm" in type(module).__name__.lower() and name.endswith("weight")
    return (0.0 if type(module).__name__.startswith("Gemma") else 1.0) if is_norm else None


@torch.no_grad()
def fill(model: Any, golden: Golden, seed: int) -> None:
    """Random weights, rounded to what is stored: outputs of order 1 everywhere, logits of order 1 to 5."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    head_std = 2 * model.config.hidden_size**-0.5
    for module, name, tensor in tensors(model):
        noise = torch.randn(tensor.shape, generator=generator)
        at_rest = neutral(module, name)
        if at_rest is not None:
            value = at_rest + 0.3 * noise
        elif name.endswith("correction_bias"):
            value = 0.1 * noise
        elif name.endswith("sinks"):
            value = noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "lm_head" in name:
            value = head_std * noise
        elif isinstance(module, torch.nn.Embedding):
            value = (head_std if tied else 1.0) * noise
        else:
            transposed = isinstance(module, Conv1D) or type(module).__name__ == "GptOssExperts"
            gain = 2.0 if "down_proj" in name or "mlp.c_proj" in name else 1.5
            value = gain * noise * tensor.shape[-2 if transposed else -1] ** -0.5
        value *= next((g for part, g in golden.gains.items() if part in name), 1.0)
        keep_f32 = name.endswith("correction_bias")  # as the makers do
        tensor.copy_(value if keep_f32 else value.to(getattr(torch, golden.dtype)).float())


# Running.


@torch.inference_mode()
def all_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[T, V] of one pass without a cache."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[float], torch.Tensor]:
    """New tokens, log-probability gaps, and logits [NUM_NEW, V]: one token at a time with a cache."""
    new: list[int] = []
    gaps: list[float] = []
    logits: list[torch.Tensor] = []
    inputs, cache = torch.tensor([prompt]), None
    for _ in range(NUM_NEW):
        out = model(input_ids=inputs, cache=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
        best = torch.log_softmax(logits[-1].double(), dim=-1).topk(2)
        new.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        inputs = torch.tensor([new[-1:]])
    return new, gaps, torch.stack(logits)


@contextmanager
def router_choices() -> Iterator[list[tuple[float, int]]]:
    """Collects, of each choice of a router (``torch.topk`` over scores [T, E]), how far it was from being another one
    in its closest token, and how many experts (or groups of them) no token chose."""
    choices: list[tuple[float, int]] = []
    topk = torch.topk

    def watched(scores: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        result = topk(scores, k, *args, **kwargs)
        if k < scores.shape[-1]:
            best = scores.sort(dim=-1, descending=True).values
            margin = float((best[..., k - 1] - best[..., k]).min())
            choices.append((margin, scores.shape[-1] - len(result.indices.unique())))
        return result

    torch.topk = watched
    try:
        yield choices
    finally:
        torch.topk = topk


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest, relative to the largest of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


# Configs.


def changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of a ``config.json`` with other values at dotted keys."""
    config = copy.deepcopy(config)
    for path, value in change.items():
        *parents, key = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[key] = value
    return config


def old_keys(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of transformers 5 as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype."""
    new = ("rope_parameters", "dtype", "_sliding_window_pattern", "rope_interleave", "qk_head_dim", "swiglu_alpha")
    old = {k: v for k, v in config.items() if k not in new}
    if config["model_type"].startswith("deepseek"):
        old.pop("head_dim")  # of the rotary part
    if config["model_type"] not in ("gpt_oss", "smollm3"):
        old.pop("layer_types", None)  # the layers went by rules
    old["torch_dtype"] = config["dtype"]
    old["transformers_version"] = "4.51.3"
    ropes = config.get("rope_parameters")
    if ropes:
        if "full_attention" in ropes:
            old["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
            ropes = ropes["full_attention"]
        scaling = {k: v for k, v in ropes.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if config["model_type"] == "phi3":
            scaling.pop("original_max_position_embeddings", None)
        if config["model_type"] in ("phi3", "deepseek_v2", "deepseek_v3"):
            scaling["type"] = scaling.pop("rope_type")
        is_default = "default" in (scaling.get("type"), scaling.get("rope_type"))
        old |= {"rope_theta": ropes["rope_theta"], "rope_scaling": None if is_default else scaling}
        if "partial_rotary_factor" in ropes:
            old["partial_rotary_factor"] = ropes["partial_rotary_factor"]
    return dict(sorted((old | extra).items()))


def with_config(model: Any, config: dict[str, Any]) -> Any:
    """The same weights under another config."""
    config = copy.deepcopy(config)  # reading takes keys out
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
    )
    other.load_state_dict(model.state_dict())
    return other.eval()


# Checks.


@torch.no_grad()
def check_all_is_seen(model: Any, tokens: list[int], logits: torch.Tensor) -> None:
    """Raises if a tensor (of stacked experts: one of them) can be left out without changing the logits."""
    for module, name, tensor in tensors(model):
        stacked = ("experts" in name and tensor.dim() == 3) or name.endswith("proj_bias")
        for part in tensor if stacked else [tensor]:
            before = part.clone()
            part.fill_(neutral(module, name) or 0.0)
            seen = difference(all_logits(model, tokens), logits)
            part.copy_(before)
            if seen < 10 * TOLERANCE:
                raise SystemExit(f"{name}: without it (or one of its experts) the logits change by {seen:.1e} only")


def check_config_is_seen(model: Any, golden: Golden, config: dict[str, Any], tokens: list[int], logits: Any) -> None:
    """Raises if a value of ``matters``, or the epsilon of the norms, makes no difference."""
    eps = [{key: 1e-6} for key in config if key.endswith(("norm_eps", "norm_epsilon")) and config[key] > 1e-4]
    for change in (*golden.matters, *eps):
        seen = difference(all_logits(with_config(model, changed(config, change)), tokens), logits)
        if seen < 10 * TOLERANCE:
            raise SystemExit(f"{change}: the logits change by {seen:.1e} only")


def find_seed(model: Any, golden: Golden) -> tuple[int, list[int]]:
    """Fills the model from the first seed whose choices, of tokens and of experts, are no ties and leave no expert
    out; returns it and the prompt."""
    for seed in range(2000):
        fill(model, golden, seed)
        rng = np.random.default_rng(seed)
        prompt = [int(t) for t in rng.integers(3, model.config.vocab_size, golden.prompt_len)]
        new, gaps, logits = greedy(model, prompt)
        varied = len(set(new)) >= NUM_NEW - 3
        if min(gaps) < MIN_GAP or not varied or not 1 < logits.abs().max() < 12:
            continue
        with router_choices() as choices:
            all_logits(model, prompt + new[:-1])
        if all(margin > MIN_MARGIN and not unused for margin, unused in choices):
            return seed, prompt
    raise SystemExit("no seed gives clear choices")


def make(name: str, golden: Golden, folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, golden.config)(**golden.values), attn_implementation="eager", dtype=torch.float32
    ).eval()
    seed, prompt = find_seed(model, golden)
    stored = copy.deepcopy(model)
    for _, tensor_name, tensor in tensors(stored):
        if not tensor_name.endswith("correction_bias"):
            tensor.data = tensor.data.to(getattr(torch, golden.dtype))
    stored.config.dtype = golden.dtype
    shutil.rmtree(folder, ignore_errors=True)
    stored.save_pretrained(folder, max_shard_size=golden.max_shard_size)

    # What is recorded comes from the folder, not from the model that was saved into it.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    new, gaps, cached = greedy(model, prompt)
    tokens = prompt + new[:-1]
    with router_choices() as choices:
        logits = all_logits(model, tokens)
    margin = min((m for m, _ in choices), default=None)
    noise = difference(cached, logits[len(prompt) - 1 :])
    if noise > TOLERANCE / 20:
        raise SystemExit(f"cached and uncached logits differ by {noise:.1e}")
    config = json.loads((folder / "config.json").read_text())
    old = old_keys(config, golden.old)
    if not torch.equal(all_logits(with_config(model, old), tokens), logits):
        raise SystemExit("the config with old keys is another model")
    check_config_is_seen(model, golden, config, tokens, logits)
    check_all_is_seen(model, tokens, logits)

    (folder / "config_old_keys.json").write_text(json.dumps(old, indent=2) + "\n")
    np.savez_compressed(folder / "golden.npz", logits=logits.numpy())
    record = {
        "prompt_token_ids": prompt,
        "new_token_ids": new,
        "gaps": [round(g, 4) for g in gaps],
        "max_model_len": golden.max_model_len,
        "seed": seed,
        "smallest_router_margin": margin and round(margin, 6),
        "cached_minus_uncached": float(f"{noise:.1e}"),
        "made_with": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "safetensors", "numpy")},
        },
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (folder / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(
        f"{name}: seed {seed}, {size // 1024} KiB, logits to {logits.abs().max():.1f}, smallest gap {min(gaps):.3f}, "
        f"router margin {margin or math.inf:.1e}, cached - uncached {noise:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where each model gets a folder")
    parser.add_argument("names", nargs="*", help=f"some of {' '.join(GOLDENS)}; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.names or GOLDENS:
        make(name, GOLDENS[name], args.folder / name)


if __name__ == "__main__":
    main()
