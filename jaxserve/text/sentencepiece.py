"""SentencePiece vocabularies: pieces with scores, as GGUF files and ``tokenizer.model`` files carry them.

The pieces become a `tokenizers` model. That of a BPE vocabulary merges by a list of pairs where SentencePiece merges
the pair whose result has the best score: the list is all pairs of pieces that join to a piece, best result first. (What
`transformers` does to make a ``tokenizer.json`` of such a vocabulary.)
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxserve.text.decoding import TokenizerError
from jaxserve.text.tokenizer import without_panic

SPACE = "\u2581"  # ▁
MAX_PIECE_LEN = 512  # characters; the time to find its pairs is quadratic


class PieceType(IntEnum):
    """Types of pieces, the same numbers in ``tokenizer.ggml.token_type`` and in SentencePiece's ModelProto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: matched in text, skipped when decoding
    USER_DEFINED = 4  # matched in text, decoded like text
    UNUSED = 5  # has an id, never produced by encoding
    BYTE = 6


class Normalization(NamedTuple):
    """What happens to text before it is cut.

    Args:
        charsmap: SentencePiece's compiled table of replacements; empty for none.
        adds_space: a space goes in front of a text, and of what follows a special token.
        joins_spaces: runs of spaces become one, and those at both ends go.
    """

    charsmap: bytes = b""
    adds_space: bool = True
    joins_spaces: bool = False


def sentencepiece_backend(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    normalization: Normalization,
    *,
    is_bpe: bool,
) -> tokenizers.Tokenizer:
    """A `tokenizers` object of a SentencePiece vocabulary; piece ``i`` has id ``i``.

    Raises:
        TokenizerError: naming the piece that is empty, repeated, too long or of an unknown type.
    """
    vocab: dict[str, int] = {}
    added: list[AddedToken] = []
    unknown_id = None
    has_bytes = False
    for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if not piece:
            raise TokenizerError(f"piece {i} is empty")
        if len(piece) > MAX_PIECE_LEN:
            raise TokenizerError(f"piece {i} has {len(piece)} characters, at most {MAX_PIECE_LEN} are supported")
        if kind == PieceType.USER_DEFINED:
            # Found whole in the normalised text, so that a run of spaces is one too. Not where normalising puts a space
            # in front, which it would do to the piece: there it is found in the text as it came.
            piece = piece.replace(SPACE, " ") if normalization.adds_space else piece.replace(" ", SPACE)
            added.append(AddedToken(piece, special=False, normalized=not normalization.adds_space))
        elif kind in (PieceType.CONTROL, PieceType.UNKNOWN):
            added.append(AddedToken(piece, special=True, normalized=False))
            unknown_id = i if kind == PieceType.UNKNOWN else unknown_id
        elif kind == PieceType.BYTE:
            has_bytes = True
        elif kind not in (PieceType.NORMAL, PieceType.UNUSED):
            raise TokenizerError(f"piece {i} {piece!r} has type {kind}, which is not a SentencePiece type")
        if vocab.setdefault(piece, i) != i:
            raise TokenizerError(f"piece {i} {piece!r} is also piece {vocab[piece]}")
    if is_bpe:
        unk_token = None if unknown_id is None else pieces[unknown_id]
        merges = _merges(vocab, scores, types)
        model = models.BPE(
            vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=has_bytes, dropout=None
        )
    else:
        # The library takes every piece for text: these are not, so no path through them may be the best one.
        avoided = min(scores, default=0.0) - 1000.0
        scored = [
            (piece, avoided if types[i] in (PieceType.UNUSED, PieceType.BYTE) else scores[i])
            for piece, i in vocab.items()
        ]
        model = without_panic(lambda: models.Unigram(scored, unknown_id, has_bytes))
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if normalization.charsmap:
        steps.append(without_panic(lambda: normalizers.Precompiled(normalization.charsmap)))
    if normalization.joins_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalization.adds_space:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not is_bpe:  # SentencePiece cuts a unigram text at spaces first, as training did
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True)
    strip = [decoders.Strip(" ", 1, 0)] if normalization.adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_tokens(added)
    return backend


def _merges(vocab: dict[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a normal piece: of the best first, of one result in order of their ids."""
    ranked: list[tuple[float, int, int, int, str, str]] = []
    get = vocab.get
    for piece, i in vocab.items():
        if len(piece) < 2 or types[i] != PieceType.NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            left_id = get(left)
            if left_id is None:
                continue
            right_id = get(right)
            if right_id is not None:
                ranked.append((-scores[i], i, left_id, right_id, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
