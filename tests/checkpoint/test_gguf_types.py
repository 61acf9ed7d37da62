"""Every tensor type, read back whole and in parts, against the `gguf` package's dequantizer."""

import gguf
import numpy as np
import pytest

from jaxserve.checkpoint import GGUFCheckpoint
from jaxserve.checkpoint.gguf.checkpoint import CHUNK_ELEMENTS
from tests.checkpoint.tiny_gguf import GENERAL_KEYS, write

V, D, F, N, K, H = 266, 512, 768, 8, 4, 64
G = N // K
KEYS = {
    **GENERAL_KEYS,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TYPES = (
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "IQ3_S", "IQ2_XXS", "TQ2_0", "MXFP4",
)  # fmt: skip


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Rows of random bytes whose every block has finite values: ``[rows, bytes of a row]`` u8."""
    block_size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block_size, num_bytes), np.uint8)
    with np.errstate(all="ignore"):
        while (bad := ~np.isfinite(gguf.quants.dequantize(blocks, kind)).all(axis=1)).any():
            blocks[bad] = rng.integers(0, 256, (int(bad.sum()), num_bytes), np.uint8)
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("name", TYPES)
def test_parameters_are_what_gguf_dequantizes(tmp_path, name):
    kind, rng = gguf.GGMLQuantizationType[name], np.random.default_rng(0)
    shapes = {
        "token_embd": (V, D), "blk.0.attn_q": (N * H, D), "blk.0.attn_k": (K * H, D), "blk.0.attn_v": (K * H, D),
        "blk.0.attn_output": (D, N * H), "blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F),
    }  # fmt: skip
    raw: dict[str, np.ndarray] = {}
    for tensor, shape in shapes.items():
        try:
            raw[f"{tensor}.weight"] = gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
        except NotImplementedError:
            raw[f"{tensor}.weight"] = random_blocks(shape, kind, rng)
    vectors = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors = {**raw, **{f"{v}.weight": rng.standard_normal(D, np.float32) for v in vectors}}
    if name in ("F16", "BF16"):  # of which gguf's writer takes the bytes
        tensors |= {n: a.view(np.uint8) for n, a in raw.items()}
    path = write(tmp_path / "m.gguf", arch_keys=KEYS, tensors=tensors, types={n: kind for n in raw})
    del tensors
    whole = {n.removesuffix(".weight").removeprefix("blk.0."): gguf.quants.dequantize(a, kind) for n, a in raw.items()}
    assert all(np.isfinite(a).all() and a.any() for a in whole.values())

    def half_split(x: np.ndarray, heads: int) -> np.ndarray:
        return x.reshape(heads, H // 2, 2, D).swapaxes(1, 2).reshape(heads, H, D)

    qkv = np.concatenate(
        [
            half_split(whole["attn_q"], N).reshape(K, G, H, D),
            half_split(whole["attn_k"], K)[:, None],
            whole["attn_v"].reshape(K, 1, H, D),
        ],
        axis=1,
    )
    with GGUFCheckpoint(path) as checkpoint:
        assert set(checkpoint.tensor_types()) == {name, "F32"}

        def check(parameter: str, want: np.ndarray, *ends: tuple[int, int]) -> None:
            for part in (tuple(slice(0, n) for n in want.shape), tuple(slice(*e) for e in ends)):
                got = checkpoint.read(parameter, part)
                assert got.dtype == np.float32
                np.testing.assert_array_equal(got, want[part], err_msg=f"{parameter} {part}")

        check("embed", whole["token_embd"], (100, 203), (0, D))
        check("embed", whole["token_embd"], (7, 9), (33, 291))  # columns inside blocks
        check("layers.0.qkv", qkv, (1, 3), (0, G + 2), (0, H), (0, D))
        check("layers.0.qkv", qkv, (1, 4), (1, G + 1), (5, 44), (256, 511))
        check("layers.0.gate_up", np.stack([whole["ffn_gate"], whole["ffn_up"]]), (0, 2), (192, 384), (0, D))
        check("layers.0.attn_out", whole["attn_output"], (0, D), (128, 384))
        check("layers.0.down", whole["ffn_down"], (0, D), (192, 576))


def test_more_than_a_chunk_is_read_whole(tmp_path):
    """A tensor larger than what is dequantized at once, whose rows do not divide a chunk."""
    rows = CHUNK_ELEMENTS // D + 37
    kind, rng = gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(0)
    shapes = {
        "token_embd": (rows, D), "blk.0.attn_q": (D, D), "blk.0.attn_k": (K * H, D), "blk.0.attn_v": (K * H, D),
        "blk.0.attn_output": (D, D), "blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F),
        "output_norm": (D,), "blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,),
    }  # fmt: skip
    tensors = {f"{n}.weight": rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    path = write(tmp_path / "m.gguf", arch_keys=KEYS, tensors=tensors, types={"token_embd.weight": kind})
    want = gguf.quants.dequantize(gguf.quants.quantize(tensors["token_embd.weight"], kind), kind)
    with GGUFCheckpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("embed", (slice(0, rows), slice(0, D))), want)
        np.testing.assert_array_equal(checkpoint.load_tensor("token_embd.weight"), want)
