"""Logical axis -> mesh axis: the only PartitionSpecs."""

from jax.sharding import PartitionSpec as P

MESH_AXIS = {"kv_heads": "tensor", "heads": "tensor", "ffn": "tensor", "vocab": "tensor", None: None}

REPLICATED = P()
# One layer of every stage: [ST, NP, K, 2, PS, H].
KV_PAGES = P("stage", None, "tensor")


def param_spec(axes: tuple[str | None, ...]) -> P:
    """Spec of a parameter that every stage holds."""
    return P(*(MESH_AXIS[a] for a in axes))


def layer_param_spec(axes: tuple[str | None, ...]) -> P:
    """Spec of one layer's parameter of every stage, stacked on a leading ``ST`` axis."""
    return P("stage", *(MESH_AXIS[a] for a in axes))
