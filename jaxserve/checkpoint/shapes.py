"""Models known by their shapes alone, for engines with random weights: a ``config.json``, or a name of the table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.checkpoint.hf.scheme import read_scheme
from jaxserve.checkpoint.json_file import read_json
from jaxserve.checkpoint.resolve import HF_CONFIG
from jaxserve.config import ModelConfig, QuantizationConfig, QuantizedMatrices

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": None,  # random weights end nothing
}
_LLAMA_3_8B = _LLAMA_3 | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_LLAMA_3_70B = _LLAMA_3 | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_AWQ = {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
}
# name -> the keys of a Hugging Face config.json that give the model's shapes.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3_8B,
    "llama-3.1-8b-awq": _LLAMA_3_8B | _AWQ,
    "llama-3.3-70b": _LLAMA_3_70B,
    "llama-3.3-70b-awq": _LLAMA_3_70B | _AWQ,
}


def read_shape(name_or_path: str | Path) -> ModelConfig:
    """The config of a name of ``SHAPES``, of a ``config.json``, or of a folder with one. With a ``quantization_config``
    every matrix of the layers that can be is taken to be quantized so: which are, only tensors would say.

    Raises:
        CheckpointError: there is nothing of that name, or the file cannot be used; names the key.
    """
    name = str(name_or_path)
    values = SHAPES.get(name)
    if values is None:
        path = Path(name_or_path)
        path = path / HF_CONFIG if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"{name}: no {HF_CONFIG}, nor one of {', '.join(SHAPES)}")
        name, values = path.name, read_json(path)
    config = read_hf_config(values, name)
    scheme = read_scheme(values)
    if scheme is None:
        return config
    from jaxserve.model.params import named_leaves, param_specs
    from jaxserve.model.quantized import QUANTIZABLE

    names = [name for name, _ in named_leaves(param_specs(config)) if name.rpartition(".")[2] in QUANTIZABLE]
    matrices = QuantizedMatrices(
        format=scheme.matrix_format(), parameters=tuple(name for name in names if name.startswith("layers."))
    )
    return replace(config, quantization=QuantizationConfig(method=scheme.method, matrices=(matrices,)))
