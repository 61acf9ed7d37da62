"""What a checkpoint is, in numbers: read from its headers alone."""

from dataclasses import dataclass
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.protocol import Checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Sizes are bytes unless their name says otherwise."""

    model_name: str
    path: str
    architecture: str
    license: str | None
    num_params: int  # elements of all tensors; a tied embedding counts once
    num_bytes: int  # of the files; 0 where there are no tensors
    tensor_bytes: dict[str, int]  # by the format's own element type, most first
    kv_bytes_per_token_f32: int
    kv_bytes_per_token_bf16: int
    kv_context_len: int  # tokens of each of ``kv_batch`` sequences, which the next two are for
    kv_batch: int
    kv_bytes_f32: int
    kv_bytes_bf16: int
    context_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, Any]
    has_chat_template: bool
    tokenizer_error: str | None  # why the tokenizer cannot be used


def checkpoint_info(checkpoint: Checkpoint, *, context_len: int | None = None, batch: int = 1) -> CheckpointInfo:
    """The facts about an open checkpoint; ``jaxserve info`` prints them before the fields of its config.

    Args:
        context_len: tokens of a sequence to count the KV cache for; None is the model's longest.
        batch: such sequences.

    Raises:
        ValueError: one of them is less than 1.
    """
    config = checkpoint.config
    context_len = config.max_position_embeddings if context_len is None else context_len
    if context_len < 1 or batch < 1:
        raise ValueError(f"{context_len=} and {batch=} must be at least 1")
    try:
        tokenizer, tokenizer_error = checkpoint.tokenizer(), None
    except CheckpointError as e:  # the rest of the facts stand
        tokenizer, tokenizer_error = None, str(e)
    return CheckpointInfo(
        model_name=checkpoint.model_name,
        path=str(checkpoint.path),
        architecture=checkpoint.architecture,
        license=checkpoint.license,
        num_params=checkpoint.num_params,
        num_bytes=checkpoint.num_bytes,
        tensor_bytes=checkpoint.tensor_types(),
        kv_bytes_per_token_f32=config.kv_bytes_per_token(4),
        kv_bytes_per_token_bf16=config.kv_bytes_per_token(2),
        kv_context_len=context_len,
        kv_batch=batch,
        kv_bytes_f32=config.kv_bytes_per_token(4) * context_len * batch,
        kv_bytes_bf16=config.kv_bytes_per_token(2) * context_len * batch,
        context_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        sampling_defaults=checkpoint.sampling_defaults,
        has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
        tokenizer_error=tokenizer_error,
    )
