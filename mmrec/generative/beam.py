"""Beam search for semantic IDs, held to the products of a trie, with each user's history computed once.

The beams of a user are so many queries of one row of the batch, all at the same position: they share the
keys and values of the history, and a mask lets each see its own codes alone among those that beams have
added. So nothing in the cache is copied or reordered, whatever the number of beams.
Shape letters: B users, T positions of the prompt, Q queries, S keys, W beams, V those after a level, E codes
of an ID, D width of the decoder, K codes of a level, M the most children of a node, N numbers of a beam.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmrec.generative.trie import Trie


@runtime_checkable
class Decoder(Protocol):
    """What beam search asks of a model that generates IDs."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""
        ...

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        ...

    def hidden(
        self,
        inputs: Float[Tensor, "B Q D"],
        *,
        mask: Float[Tensor, "B 1 Q S"],
        positions: Int64[Tensor, "B Q"],
        cache: Any,
    ) -> Float[Tensor, "B Q D"]:
        """The last layer's states; keys and values are added to the cache."""
        ...

    def embed_codes(self, codes: Int64[Tensor, "B Q"], level: int) -> Float[Tensor, "B Q D"]:
        """Inputs for codes of a level."""
        ...

    def logits(self, hidden: Float[Tensor, "*B D"], level: int) -> Float[Tensor, "*B K"]:
        """Scores of the codes of a level alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Beams:
    """The IDs found for each user, best first."""

    codes: Int64[Tensor, "B W E"]
    scores: Float[Tensor, "B W"]
    """Log probability of the ID; -inf where there were fewer IDs than beams."""
    products: Int64[Tensor, "B W"] | None
    """The row of each ID's product, -1 where there is none; None without a trie."""


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    prompt: Float[Tensor, "B T D"],
    present: Bool[Tensor, "B T"],
    *,
    trie: Trie | None,
    num_beams: int,
) -> Beams:
    """The most probable IDs after each prompt, which is padded on its left.

        score(ID) = sum over levels of log softmax(logits of that level)[code]

    The softmax is over all codes of a level, so that a score is the model's own probability of the product,
    and does not depend on what else is in stock. Without a trie any codes may follow. With as many beams as
    there are products the result is exact; with fewer, a product is lost where its first codes are not among
    the beams.
    """
    users, length, _ = prompt.shape
    device = prompt.device
    positions = (present.long().cumsum(1) - 1).clamp(min=0)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen = causal & present[:, None, :]  # (B, T, T)
    cache = decoder.new_cache()
    states = decoder.hidden(prompt, mask=_additive(seen, prompt), positions=positions, cache=cache)
    hidden = states[:, -1:]  # (B, 1, D)
    place = positions[:, -1:]
    scores = torch.zeros(users, 1, device=device)
    nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
    path = torch.zeros(users, 1, 0, dtype=torch.int64, device=device)
    # Where each beam's own codes lie among those that beams have added to the cache.
    own = path
    added = 0
    for level in range(len(decoder.sizes)):
        logits = decoder.logits(hidden, level).float()  # (B, W, K)
        codes, nodes, scores, parents = _best(logits, scores, nodes, trie, level, num_beams)
        path = torch.cat([_take(path, parents), codes[..., None]], dim=2)
        if level + 1 == len(decoder.sizes):
            break
        beams = codes.shape[1]
        slots = torch.arange(added, added + beams, device=device).expand(users, beams)
        own = torch.cat([_take(own, parents), slots[..., None]], dim=2)
        added += beams
        branch = torch.zeros(users, beams, added, dtype=torch.bool, device=device)
        branch.scatter_(2, own, True)
        seen = torch.cat([present[:, None, :].expand(-1, beams, -1), branch], dim=2)
        hidden = decoder.hidden(
            decoder.embed_codes(codes, level),
            mask=_additive(seen, prompt),
            positions=(place + level + 1).expand(-1, beams),
            cache=cache,
        )
    products = None
    if trie is not None:
        products = torch.where(scores.isfinite(), trie.products[nodes], -1)
    return Beams(codes=path, scores=scores, products=products)


def _best(
    logits: Float[Tensor, "B W K"],
    scores: Float[Tensor, "B W"],
    nodes: Int64[Tensor, "B W"],
    trie: Trie | None,
    level: int,
    num_beams: int,
) -> tuple[Int64[Tensor, "B V"], Int64[Tensor, "B V"], Float[Tensor, "B V"], Int64[Tensor, "B V"]]:
    """The best continuations of all beams of a user: codes, nodes of the trie, scores, and whose they are."""
    rest = scores - logits.logsumexp(-1)  # (B, W)
    if trie is None:
        width = logits.shape[-1]
        candidates = (logits + rest[..., None]).flatten(1)  # (B, W K)
        best, found = candidates.topk(min(num_beams, candidates.shape[1]))
        return found % width, torch.zeros_like(found), best, found // width
    children, exists = trie.children(level, nodes)  # (B, W, M)
    codes = trie.tokens[level][children]
    values = logits.gather(2, codes) + rest[..., None]
    candidates = values.masked_fill_(~exists, -torch.inf).flatten(1)  # (B, W M)
    best, found = candidates.topk(min(num_beams, candidates.shape[1]))
    width = children.shape[2]
    return (
        codes.flatten(1).gather(1, found),
        children.flatten(1).gather(1, found),
        best,
        found // width,
    )


def _take(rows: Int64[Tensor, "B W N"], parents: Int64[Tensor, "B V"]) -> Int64[Tensor, "B V N"]:
    """What each continuation has from its beam."""
    return rows.gather(1, parents[..., None].expand(-1, -1, rows.shape[2]))


def _additive(seen: Bool[Tensor, "B Q S"], like: Tensor) -> Float[Tensor, "B 1 Q S"]:
    """0 where a query sees a key, else the least number: padding sees nothing, and must not be NaN."""
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~seen, torch.finfo(like.dtype).min)[:, None]
