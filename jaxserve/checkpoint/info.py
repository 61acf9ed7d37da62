"""What a checkpoint is, in numbers: read from its header alone, without jax."""

import math
from dataclasses import dataclass

from jaxserve.checkpoint.gguf import GGUFCheckpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Sizes are bytes unless their name says otherwise."""

    model_name: str
    path: str
    architecture: str
    license: str | None
    num_params: int  # elements of all tensors; a tied embedding counts once
    num_bytes: int  # of the file
    tensor_bytes: dict[str, int]  # by ggml tensor type, most first
    kv_bytes_per_token_f32: int
    kv_bytes_per_token_bf16: int
    context_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


def checkpoint_info(checkpoint: GGUFCheckpoint) -> CheckpointInfo:
    """The facts about an open checkpoint; ``jaxserve info`` prints them before the fields of its config."""
    config = checkpoint.config
    return CheckpointInfo(
        model_name=checkpoint.model_name,
        path=str(checkpoint.path),
        architecture=checkpoint.architecture,
        license=checkpoint.license,
        num_params=sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        num_bytes=checkpoint.num_bytes,
        tensor_bytes=checkpoint.tensor_types(),
        kv_bytes_per_token_f32=config.kv_bytes_per_token(4),
        kv_bytes_per_token_bf16=config.kv_bytes_per_token(2),
        context_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        has_chat_template=bool(checkpoint.metadata.get("tokenizer.chat_template")),
    )
