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

    The softmax is over all codes of a level, so that it is the model's own probability. That of the appended
    code, which only tells products of one cell apart, is over the available products of the cell: it is asked
    for where there are several, and else costs nothing. Without a trie any codes may follow. With as many
    beams as there are products the result is exact; with fewer, a product is lost where its first codes are
    not among the beams.
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
    last = len(decoder.sizes) - 1
    scores = torch.zeros(users, 1, device=device)
    nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
    path = torch.zeros(users, 1, 0, dtype=torch.int64, device=device)
    # Where each beam's own codes lie among those that beams have added to the cache.
    own = path
    added = 0

    def extend(chosen: Int64[Tensor, "B n"] | None, level: int) -> Float[Tensor, "B n D"]:
        """The states after the last codes of all beams, or of chosen ones, whose keys the cache gets."""
        nonlocal own, added
        codes = path[:, :, -1]
        lines = own
        if chosen is not None:
            codes, lines = codes.gather(1, chosen), _take(own, chosen)
        slots = torch.arange(added, added + codes.shape[1], device=device).expand_as(codes)
        lines = torch.cat([lines, slots[..., None]], dim=2)
        added += codes.shape[1]
        branch = torch.zeros(*codes.shape, added, dtype=torch.bool, device=device)
        branch.scatter_(2, lines, True)
        visible = torch.cat([present[:, None, :].expand(-1, codes.shape[1], -1), branch], dim=2)
        if chosen is None:
            own = lines
        return decoder.hidden(
            decoder.embed_codes(codes, level - 1),
            mask=_additive(visible, prompt),
            positions=(place + level).expand_as(codes),
            cache=cache,
        )

    for level in range(len(decoder.sizes)):
        if trie is None:
            hidden = extend(None, level) if level else hidden
            values = _log_softmax(decoder.logits(hidden, level))  # (B, W, K)
            codes = torch.arange(values.shape[2], device=device).expand_as(values)
            children = torch.zeros_like(codes)
        else:
            children, exists = trie.children(level, nodes)  # (B, W, M)
            codes = trie.tokens[level][children]
            if level < last or not level:
                hidden = extend(None, level) if level else hidden
                values = _log_softmax(decoder.logits(hidden, level)).gather(2, codes)
            else:
                chosen = _with_choice(exists)
                states = extend(chosen, level) if chosen.shape[1] else None
                values = _of_siblings(decoder, states, chosen, codes, exists, level)
            values = values.masked_fill(~exists, -torch.inf)
        candidates = (values + scores[..., None]).flatten(1)  # (B, W M)
        scores, found = candidates.topk(min(num_beams, candidates.shape[1]))  # (B, V)
        parents = found // values.shape[2]
        nodes = children.flatten(1).gather(1, found)
        path = torch.cat([_take(path, parents), codes.flatten(1).gather(1, found)[..., None]], 2)
        own = _take(own, parents) if level < last else own
    products = None
    if trie is not None:
        products = torch.where(scores.isfinite(), trie.products[nodes], -1)
    return Beams(codes=path, scores=scores, products=products)


def _log_softmax(logits: Float[Tensor, "B W K"]) -> Float[Tensor, "B W K"]:
    return logits.float().log_softmax(-1)


def _with_choice(exists: Bool[Tensor, "B W M"]) -> Int64[Tensor, "B n"]:
    """The beams of each user with several children, filled up with others to the most that a user has."""
    several = exists.sum(2) > 1
    most = int(several.sum(1).max())
    return several.int().argsort(dim=1, descending=True, stable=True)[:, :most]


def _of_siblings(
    decoder: Decoder,
    states: Float[Tensor, "B n D"] | None,
    chosen: Int64[Tensor, "B n"],
    codes: Int64[Tensor, "B W M"],
    exists: Bool[Tensor, "B W M"],
    level: int,
) -> Float[Tensor, "B W M"]:
    """Log probabilities of children among their siblings alone: 0 for an only one."""
    values = torch.zeros(codes.shape, device=codes.device)
    if states is None:
        return values
    wide = chosen[..., None].expand(-1, -1, codes.shape[2])
    logits = decoder.logits(states, level).float().gather(2, codes.gather(1, wide))
    lowest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(~exists.gather(1, wide), lowest)
    return values.scatter_(1, wide, logits.log_softmax(-1))


def _take(rows: Int64[Tensor, "B W N"], parents: Int64[Tensor, "B V"]) -> Int64[Tensor, "B V N"]:
    """What each continuation has from its beam."""
    return rows.gather(1, parents[..., None].expand(-1, -1, rows.shape[2]))


def _additive(seen: Bool[Tensor, "B Q S"], like: Tensor) -> Float[Tensor, "B 1 Q S"]:
    """0 where a query sees a key, else the least number: padding sees nothing, and must not be NaN."""
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~seen, torch.finfo(like.dtype).min)[:, None]
