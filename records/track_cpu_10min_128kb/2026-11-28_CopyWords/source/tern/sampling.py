"""Text from a model: what it sees of the tokens so far, which one comes next, and the text of tokens one by one."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tern.metric import hidden_last
from tern.shards import AuditError
from tern.tokenizers import ByteCounter


def next_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What the next token is drawn from, fp64 [vocab_size], by logits [vocab_size], of which some may be -inf.

    softmax(logits / temperature), of which the most likely tokens stay, as few as have a share of top_p together, at
    least one (nucleus sampling, Holtzman et al., arXiv 1904.09751). Temperature 0: the most likely token, of equals
    that of the lowest id. Raises AuditError unless there are finite logits and no NaN or +inf.
    """
    logits = logits.double()
    best = logits.max()  # NaN if any is
    if not best.isfinite():
        raise AuditError("the model's logits are not finite; the model is broken")
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probabilities = ((logits - best) / temperature).softmax(0)
    share, order = probabilities.sort(descending=True, stable=True)
    beyond = share.cumsum(0) - share >= top_p  # those before it have the share already
    beyond[0] = False
    probabilities[order[beyond]] = 0.0
    return probabilities / probabilities.sum()


class Context:
    """The tokens so far, of which a model sees the newest: all of them as long as `window` holds them.

    With one more, what is seen begins anew at the newest half window, and grows again. So logits are exactly those of
    a plain forward over `seen`, and a model with a cache (eval_bpb.Cached) has to fill it once in half a window.
    """

    def __init__(self, model, window: int):
        self.model, self.window = model, window
        self.seen: list[int] = []

    def add(self, ids: Sequence[int]) -> None:
        self.seen += ids
        if len(self.seen) > self.window:
            self.seen = self.seen[-max(self.window // 2, 1) :]

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of the token that follows, [vocab_size], on the CPU."""
        ids = torch.tensor([self.seen], device=next(self.model.parameters()).device)
        return self.model.head(hidden_last(self.model, ids, 1))[0, -1].cpu()


def continue_tokens(context: Context, forbidden: Tensor, count: int, temperature: float, top_p: float,
                    seed: int) -> Iterator[int]:
    """count tokens, one by one, after those of a context; the same seed gives the same ones on the same machine.

    forbidden: bool [vocab_size], tokens that do not come.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = context.logits().masked_fill(forbidden, -torch.inf)
        chosen = int(torch.multinomial(next_probabilities(logits, temperature, top_p), 1, generator=generator))
        yield chosen
        context.add([chosen])


class TextStream:
    """The text of tokens that come one at a time, as the tokenizer would decode all of them.

    A character may take several byte pieces: nothing of it is given out before its last. Bytes that are no character
    become U+FFFD, of which sentencepiece has one for each byte and Python one for each beginning of a character.
    """

    def __init__(self, counter: ByteCounter):
        self.counter = counter
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.before = counter.bos_id

    def bytes_of(self, token: int) -> bytes:
        """Those that counter counts."""
        counter, sp = self.counter, self.counter.tokenizer
        if counter.boundary[token]:
            return b""
        piece = sp.id_to_piece(token)
        if sp.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        if counter.leading_space[token] and counter.boundary[self.before]:
            piece = piece[1:]
        return piece.replace("▁", " ").encode()

    def add(self, token: int) -> str:
        """The text that is certain by now and was not before."""
        data, self.before = self.bytes_of(token), token
        return self.decoder.decode(data)

    def end(self) -> str:
        """What an unfinished character leaves."""
        return self.decoder.decode(b"", final=True)
