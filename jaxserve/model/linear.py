"""What attention, MLP and experts share: the matrix product, the activations, the sum over the tensor axis."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.model import quantized
from jaxserve.model.quantized import QuantizedMatrix

OAI_LIMIT, OAI_ALPHA = 7.0, 1.702  # GPT-OSS's clamped SwiGLU


def linear(x: jax.Array, w: jax.Array | QuantizedMatrix, bias: jax.Array | None = None) -> jax.Array:
    """``x`` [..., in] times ``w`` [out, in] transposed plus ``bias`` [out], accumulated in f32, in x's dtype."""
    if isinstance(w, QuantizedMatrix):
        if bias is None:
            return quantized.matmul(x, w)
        return (quantized.matmul(x, w, jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    # Without a bias the product's own end rounds: asked for f32, cuBLAS writes f32 and another kernel rounds it.
    preferred = x.dtype if bias is None else jnp.float32
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    out = lax.dot_general(x, w, dims, precision=precision, preferred_element_type=preferred)
    return out if bias is None else (out + bias.astype(jnp.float32)).astype(x.dtype)


def activate(hidden: jax.Array, activation: str) -> jax.Array:
    """[T, F] of ``hidden`` [T, 2, F], gate and up, or [T, 1, F], which has no gate."""
    gate = hidden[:, 0]
    match activation:
        case "silu":
            activated = jax.nn.silu(gate)
        case "gelu":
            activated = jax.nn.gelu(gate, approximate=False)
        case "gelu_tanh":
            activated = jax.nn.gelu(gate, approximate=True)
        case "relu":
            activated = jax.nn.relu(gate)
        case "swiglu_oai":
            gate = jnp.minimum(gate, OAI_LIMIT)
            up = jnp.clip(hidden[:, 1], -OAI_LIMIT, OAI_LIMIT)
            return gate * jax.nn.sigmoid(gate * OAI_ALPHA) * (up + 1)
        case _:
            raise ValueError(f"activation={activation!r} is not known")
    return activated * hidden[:, 1] if hidden.shape[1] == 2 else activated


def psum_tensor(x: jax.Array) -> jax.Array:
    """Sum over the tensor axis; nothing where it has one device."""
    return lax.psum(x, "tensor") if lax.axis_size("tensor") > 1 else x
