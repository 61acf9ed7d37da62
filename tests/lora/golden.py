"""Golden adapters: what ``scripts/make_golden_adapters.py`` recorded with `peft`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.families import golden as models

FOLDER = models.FOLDER.parent / "adapters"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/golden.json"))
assert NAMES, f"{FOLDER} has no adapters"


@dataclass(frozen=True)
class GoldenAdapter(models.Golden):
    """As ``Golden``, of a base model (``folder``) with an adapter."""

    adapter: Path


def load(name: str) -> GoldenAdapter:
    record = json.loads((FOLDER / name / "golden.json").read_text())
    with np.load(FOLDER / name / "golden.npz") as arrays:
        logits = arrays["logits"]
    return GoldenAdapter(
        models.FOLDER / record["base"],
        record["prompt_token_ids"],
        record["new_token_ids"],
        logits,
        record["max_model_len"],
        FOLDER / name,
    )
