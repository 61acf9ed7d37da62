"""GGUF tokenizer metadata of a tiny byte-level vocabulary, and Unicode that is hard to stream."""

from typing import Any

from hypothesis import strategies as st
from tokenizers import pre_tokenizers

EOS, BOS, USER, SPACED = "<|end|>", "<|begin|>", "<user>", "  ⁂  "
MERGES = ["a b", "ab c", "Ġ a", "1 2", "Ã ©"]  # the last is the two bytes of é
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

HARD_PIECES = (
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family: four people joined
    "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd",  # rainbow flag, thumb with a skin tone
    "é", "e\u0301", "\u0301", "\ufffd", "\ufffd\ufffd", "\ufeff", "\x00", "\r\n", "\u2028", "\U0001d518", "\U0010ffff",
    "日本語", "한국어", "नमस्ते", "שלום", "مرحبا", "ß", "½²", "١٢٣", "1234567", "   ", "\t", "'re", "don't",
    EOS, BOS, USER, SPACED,
)  # fmt: skip

TEXTS = st.lists(st.one_of(st.text(), st.sampled_from(HARD_PIECES)), max_size=8).map("".join)


def gguf_metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """Ids: 0 to 255 the bytes' characters, then the merged tokens, four added ones and an unused one.

    ``changes`` replace keys (``__`` for a dot, after ``tokenizer.ggml.``); None removes one.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    normal = [*alphabet, *(m.replace(" ", "") for m in MERGES)]
    added = {EOS: CONTROL, BOS: CONTROL, USER: USER_DEFINED, SPACED: USER_DEFINED, "[PAD]": UNUSED}
    tokens = [*normal, *added]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [NORMAL] * len(normal) + list(added.values()),
        "merges": MERGES,
        "bos_token_id": tokens.index(BOS),
        "eos_token_id": tokens.index(EOS),
        "add_bos_token": False,
    }
    values |= changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
