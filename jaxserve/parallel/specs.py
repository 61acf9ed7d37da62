"""Logical axis -> mesh axis: the only PartitionSpecs."""

from jax.sharding import PartitionSpec as P

from jaxserve.config import ModelConfig

VOCABULARY = ("stage", "tensor")  # all devices share the rows of embedding and head, and so the columns of logits
MESH_AXIS: dict[str | None, str | tuple[str, ...] | None] = {
    "stage": "stage",
    "kv_heads": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": VOCABULARY,
    None: None,
}

REPLICATED = P()
LOGITS = P(None, VOCABULARY)  # [B, V], and whatever else has a column for each token
HIDDEN = P("stage")  # every stage's own output, [ST, TH, D]


def kv_pages_spec(config: ModelConfig) -> P:
    """Spec of one layer's pages of every stage, [ST, NP, K, 2, PS, H]. The latent of MLA is on every device."""
    return P("stage") if config.mla is not None else P("stage", None, "tensor")


def param_spec(axes: tuple[str | None, ...]) -> P:
    """Spec of a parameter with these logical axes."""
    return P(*(MESH_AXIS[a] for a in axes))
