"""``tokenizer.model``: SentencePiece's ModelProto, of which the fields that decide about ids and text are read.

The message is declared here by the numbers of its fields, so that neither the `sentencepiece` package nor generated
code is needed; fields not named here are skipped by protobuf.
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto)
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from jaxserve.text.decoding import TokenizerError
from jaxserve.text.sentencepiece import Normalization, PieceType, sentencepiece_backend

_FIELD = descriptor_pb2.FieldDescriptorProto
_STRING, _BYTES, _FLOAT, _INT, _BOOL = (
    _FIELD.TYPE_STRING,
    _FIELD.TYPE_BYTES,
    _FIELD.TYPE_FLOAT,
    _FIELD.TYPE_INT32,  # enumerations too: the wire is the same
    _FIELD.TYPE_BOOL,
)
_MESSAGES: dict[str, dict[str, tuple[int, Any, str]]] = {
    "Piece": {"piece": (1, _STRING, ""), "score": (2, _FLOAT, ""), "type": (3, _INT, "1")},
    "TrainerSpec": {
        "model_type": (3, _INT, "1"),
        "treat_whitespace_as_suffix": (24, _BOOL, "false"),
        "unk_id": (40, _INT, "0"),
        "bos_id": (41, _INT, "1"),
        "eos_id": (42, _INT, "2"),
        "pad_id": (43, _INT, "-1"),
    },
    "NormalizerSpec": {
        "precompiled_charsmap": (2, _BYTES, ""),
        "add_dummy_prefix": (3, _BOOL, "true"),
        "remove_extra_whitespaces": (4, _BOOL, "true"),
        "escape_whitespaces": (5, _BOOL, "true"),
        "normalization_rule_tsv": (6, _STRING, ""),
    },
    "ModelProto": {
        "pieces": (1, "Piece", ""),
        "trainer_spec": (2, "TrainerSpec", ""),
        "normalizer_spec": (3, "NormalizerSpec", ""),
        "denormalizer_spec": (5, "NormalizerSpec", ""),
    },
}  # message -> field -> number, type, default

_UNIGRAM, _BPE = 1, 2


class SentencePieceModel(NamedTuple):
    """What a ``tokenizer.model`` holds. Ids are None where the model has none."""

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Reads the file, unigram or BPE.

    Raises:
        TokenizerError: naming the file, and the field or piece that is malformed or not supported.
    """
    proto = _message_class()()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as e:
        raise TokenizerError(f"{path}: not a SentencePiece model: {e}") from None
    if not proto.pieces:
        raise TokenizerError(f"{path}: not a SentencePiece model: it has no pieces")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for is_refused, field in (
        (trainer.model_type not in (_UNIGRAM, _BPE), f"model_type={trainer.model_type} (only unigram and BPE are)"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix=true"),
        (not normalizer.escape_whitespaces, "escape_whitespaces=false"),
        (proto.denormalizer_spec.precompiled_charsmap, "denormalizer_spec"),
    ):
        if is_refused:
            raise TokenizerError(f"{path}: {field} is not supported")
    pieces = [p.piece for p in proto.pieces]
    types = [p.type for p in proto.pieces]
    normalization = Normalization(
        charsmap=normalizer.precompiled_charsmap,
        adds_space=normalizer.add_dummy_prefix,
        joins_spaces=normalizer.remove_extra_whitespaces,
    )
    try:
        backend = sentencepiece_backend(
            pieces, [p.score for p in proto.pieces], types, normalization, is_bpe=trainer.model_type == _BPE
        )
    except TokenizerError as e:
        raise TokenizerError(f"{path}: {e}") from e
    of_type = {PieceType.CONTROL: ("bos_id", "eos_id", "pad_id"), PieceType.UNKNOWN: ("unk_id",)}
    ids: dict[str, int | None] = {}
    for kind, names in of_type.items():
        for name in names:
            i = getattr(trainer, name)
            ids[name] = i if 0 <= i < len(types) and types[i] == kind else None
    return SentencePieceModel(backend, ids["bos_id"], ids["eos_id"], ids["pad_id"], ids["unk_id"])


@cache
def _message_class() -> Any:
    """The generated class of ModelProto, in a pool of its own: another package may bring the real one."""
    file = descriptor_pb2.FileDescriptorProto(name="sentencepiece_model.proto", package="sp", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, default) in fields.items():
            label = _FIELD.LABEL_REPEATED if field == "pieces" else _FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                message.field.add(
                    name=field, number=number, label=label, type=_FIELD.TYPE_MESSAGE, type_name=f".sp.{kind}"
                )
            else:
                message.field.add(name=field, number=number, label=label, type=kind, default_value=default or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sp.ModelProto"))
