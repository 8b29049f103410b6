"""What a token stands for: the bytes of each piece, and the tests that a tokenizer has to pass."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from tern.shards import AuditError, DataError, DataFolder

# What must come back from a tokenizer letter by letter: no Unicode normalization in use changes it.
EXACT_PROBES = (
    "The quick brown fox jumps over the lazy dog, and THE END is near.",
    "".join(map(chr, range(0x21, 0x7F))),
    "a b c 1 2 3 ? !",
    "café naïve Über ñ česky Жук αβγ אב مر 漢字 かな 한구",
    "🤖 😀 — “quoted” € √",
)

# What normalization may change: white space and control characters, and letters to those that NFKC makes of them.
LOOSE_PROBES = (
    "a  b   c", " lead", "trail ", "a\tb", "a\nb\n\nc", "a\r\nb", "\u00a0x\u2003y", "x\u200by\ufeffz", "a\u2028b\x85c",
    "\x00a\x07", "e\u0301 n\u0303", "\u2460 \ufb01 \uff21 \u3371 \u00bd \u017f", "<s></s><unk><0x41>",
    "def f(x):\n    return  x\n", "\u1e9b\u0323", "\U0001d518\U0001d52b\U0001d526",
)

def letters(text: str) -> str:
    """Text after NFKC without white space, control, format and unassigned characters: what no tokenizer may change."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "ZC")


def protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of the fields of a protocol buffer message: integers, and the bytes of strings and messages.

    protobuf.dev/programming-guides/encoding; a .model file is a ModelProto of sentencepiece_model.proto.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            yield number, data[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


# Field numbers of sentencepiece_model.proto: of a ModelProto, of its normalizers, of its TrainerSpec, of a piece.
PIECES, TRAINER, NORMALIZER, DENORMALIZER, CHARSMAP, MODEL_TYPE, TEXT, KIND = 1, 2, 3, 5, 2, 3, 1, 3

BPE, NORMAL, USER_DEFINED = 2, 1, 4

# sha256, first 16 digits, of the rules that are sentencepiece's own: nmt_nfkc (that of the official tokenizers, and of
# sentencepiece 0.2.3) and nfkc. Rules that fold case change letters, so they are none of these.
KNOWN_RULES = {"79372c41389c2b9b": "nmt_nfkc", "1e2c7b43d3ee9755": "nmt_nfkc", "7e46d9e08af4b6a3": "nfkc"}

@dataclass(frozen=True)
class TokenizerFile:
    """What a .model file says that sentencepiece does not tell."""

    is_bpe: bool
    pieces: dict[str, int]  # text -> kind
    normalizer: bytes  # precompiled rules; empty where text is left as it is
    denormalizer: bytes

    def unmergeable_pieces(self) -> list[str]:
        """The pieces of a BPE model that no two of its pieces make. Training gives none such, an edited file may."""
        known = {text for text, kind in self.pieces.items() if kind in (NORMAL, USER_DEFINED)}
        return [text for text in known if self.is_bpe and len(text) > 1 and self.pieces[text] == NORMAL
                and not any(text[:i] in known and text[i:] in known for i in range(1, len(text)))]

    def why_unproven(self) -> str:
        """Why the file does not show that its pieces are those of training; empty for a plain BPE model."""
        if not self.is_bpe:
            return "is no BPE model"
        return "has user-defined pieces" if USER_DEFINED in self.pieces.values() else ""


def read_tokenizer_file(model: bytes, where: str | Path) -> TokenizerFile:
    """The bytes of a .model file, which sentencepiece has opened. Raises DataError where they hold something odd."""
    try:
        fields: list[tuple[int, dict[int, Any]]] = []
        for number, message in protobuf_fields(model):
            if number in (PIECES, TRAINER, NORMALIZER, DENORMALIZER):
                if not isinstance(message, bytes):
                    raise TypeError(f"field {number} is a number")
                fields.append((number, dict(protobuf_fields(message))))
        return TokenizerFile(
            any(number == TRAINER and part.get(MODEL_TYPE) == BPE for number, part in fields),
            {part[TEXT].decode(): part.get(KIND, NORMAL) for number, part in fields if number == PIECES},
            *(b"".join(part.get(CHARSMAP, b"") for number, part in fields if number == spec)
              for spec in (NORMALIZER, DENORMALIZER)))
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"{where}: not a file that sentencepiece wrote ({e!r}); use another tokenizer") from None


def check_provable(data: DataFolder) -> None:
    """Raises AuditError where neither a manifest nor the tokenizer itself vouches for what its pieces stand for."""
    if data.manifest is not None:
        return
    why = read_tokenizer_file(data.tokenizer.read_bytes(), data.tokenizer).why_unproven()
    if why:
        raise AuditError(f"{data.tokenizer}: {why}, and no manifest.json says that it made the shards, so nobody knows "
                         "what text its pieces stand for; prepare the text with data/prepare.py --tokenizer")


def check_tokenizer(sp: spm.SentencePieceProcessor, where: str | Path) -> list[str]:
    """What a score must say of this tokenizer; empty for one that gives every text back unchanged.

    The byte audit compares the counter with what the tokenizer decodes, so it proves nothing if decoding itself is not
    the text. Here hard texts must come back. Raises DataError, naming where, on a tokenizer whose pieces do not stand
    for the bytes of the text.
    """
    def refuse(what: str) -> DataError:
        return DataError(f"{where}: {what}, so bytes would be counted wrongly; use another tokenizer")

    size, bos, space = sp.vocab_size(), sp.bos_id(), sp.piece_to_id("▁")
    if not 0 <= bos < size or not sp.is_control(bos):
        raise refuse("no BOS token, which every document begins with")
    if sp.is_unknown(space) or sp.is_control(space) or sp.is_unused(space) or sp.id_to_piece(space) != "▁":
        raise refuse('no standalone "▁" piece (a lone space)')
    pieces = {sp.id_to_piece(i) for i in range(size) if sp.is_byte(i)}
    if pieces not in (set(), {f"<0x{byte:02X}>" for byte in range(256)}):
        raise refuse(f"{len(pieces)} of the 256 byte pieces")
    file = read_tokenizer_file(sp.serialized_model_proto(), where)
    if file.denormalizer:
        raise refuse("it changes text when it decodes (a denormalizer)")
    odd = file.unmergeable_pieces()
    if odd:
        raise refuse(f"its piece {min(odd)!a} is not made of other pieces of it, as in a file that was edited")

    counter, notes = ByteCounter(sp), []
    if not pieces:
        notes.append("no byte pieces: text with characters outside its vocabulary cannot be scored")
    for text in EXACT_PROBES + LOOSE_PROBES:
        ids = sp.encode(text)
        if any(sp.is_unknown(i) for i in ids):
            if pieces:
                raise refuse(f"{text!a} becomes <unk> in spite of byte pieces")
            continue
        back = sp.decode(ids)
        counted = int(counter.count([bos, *ids[:-1]], ids).sum()) if ids else 0
        if counted != len(back.encode()):
            raise refuse(f"the pieces of {text!a} count {counted} bytes, their text {back!a} has {len(back.encode())}")
        if back == text:
            continue
        if text in EXACT_PROBES or letters(back) != letters(text) or "▁" in back:
            raise refuse(f"{text!a} comes back as {back!a}")
        if not any(note.startswith("normalizes") for note in notes):
            notes.append("normalizes: bytes are those of its decoded text, as the competition counts them "
                         f"({text!a} is {back!a})")
    if file.normalizer and hashlib.sha256(file.normalizer).hexdigest()[:16] not in KNOWN_RULES:
        notes.append("WARNING: normalizes by rules that are none of sentencepiece's nmt_nfkc and nfkc, so nobody knows "
                     "what else it changes")
    return notes


def open_tokenizer(path: str | Path) -> spm.SentencePieceProcessor:
    """A sound tokenizer. Raises DataError on anything else."""
    try:
        open(path, "rb").close()
    except OSError as e:
        raise DataError(f"{path}: the tokenizer cannot be read ({e.strerror}); check name and permissions") from None
    try:
        sp = spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
        why = " ".join(str(e).split())
        raise DataError(f"{path}: not a SentencePiece model ({why}); give one, or make one with data/prepare.py"
                        ) from None
    check_tokenizer(sp, path)
    return sp


class ByteCounter:
    """UTF-8 bytes that each token stands for, by the competition's rule.

    A token's bytes are those of its piece without the leading "▁", plus one for that space unless the previous token
    is a control, unknown or unused token (BOS); a byte-fallback token counts 1; control, unknown and unused count 0.
    (openai/parameter-golf train_gpt.py, build_sentencepiece_luts.) A "▁" inside a piece is a space too: one byte.
    """

    def __init__(self, tokenizer: str | Path | spm.SentencePieceProcessor):
        sp = tokenizer if isinstance(tokenizer, spm.SentencePieceProcessor) else open_tokenizer(tokenizer)
        self.tokenizer, self.vocab_size, self.bos_id = sp, sp.vocab_size(), sp.bos_id()
        self.base_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        self.leading_space = np.zeros(self.vocab_size, dtype=bool)
        self.boundary = np.zeros(self.vocab_size, dtype=bool)
        self.unknown = np.zeros(self.vocab_size, dtype=bool)
        for i in range(self.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.boundary[i] = True
                self.unknown[i] = sp.is_unknown(i)
            elif sp.is_byte(i):
                self.base_bytes[i] = 1
            else:
                piece = sp.id_to_piece(i)
                self.leading_space[i] = piece.startswith("▁")
                self.base_bytes[i] = len(piece.removeprefix("▁").replace("▁", " ").encode())

    def count(self, prev_ids, ids) -> np.ndarray:
        """Bytes of each token of ids [n] that follows prev_ids [n], int64 [n]. Raises DataError on an id too large."""
        prev_ids, ids = np.asarray(prev_ids, dtype=np.int64), np.asarray(ids, dtype=np.int64)
        for array in (prev_ids, ids):
            if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
                raise DataError(f"token ids up to {array.max()} with a tokenizer of {self.vocab_size}: not its shards")
        return self.base_bytes[ids] + (self.leading_space[ids] & ~self.boundary[prev_ids])

    def count_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every token of a stream [n], int64 [n]; the first token stands as if after a boundary."""
        tokens = np.asarray(tokens)
        if not tokens.size:
            return np.zeros(0, dtype=np.int64)
        first = int(np.argmax(self.boundary))
        return self.count(np.concatenate(([first], tokens[:-1])), tokens)
