"""A trie of semantic IDs in tensors: which codes may follow a prefix, for a whole batch of prefixes at once.

Compressed sparse rows, a level at a time: the nodes of a depth lie in the order of their codes, the children
of a node side by side at the next depth. A catalogue's changes are a new trie, built in about a second
for a million products: nothing is trained, and a product that is not in the trie cannot be generated.
Shape letters: N products, E codes of an ID, P prefixes, M the most children of a node at that depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from mmrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trie:
    """The IDs of the products that may be generated. A node is a number among those of its depth."""

    starts: tuple[Int64[Tensor, " _"], ...]
    """By depth: where the children of each node begin at the next depth; one more for the end."""
    tokens: tuple[Int64[Tensor, " _"], ...]
    """By depth from 1: the last code of each node's prefix."""
    products: Int64[Tensor, " N"]
    """The row of each leaf's product in the table of IDs."""
    fan_out: tuple[int, ...]
    """By depth: the most children that a node has."""

    def __len__(self) -> int:
        return len(self.products)

    @property
    def depth(self) -> int:
        """Codes of an ID, E."""
        return len(self.starts)

    def to(self, device: torch.device | str) -> "Trie":
        """The same on another device."""
        return Trie(
            starts=tuple(part.to(device) for part in self.starts),
            tokens=tuple(part.to(device) for part in self.tokens),
            products=self.products.to(device),
            fan_out=self.fan_out,
        )

    def children(
        self, depth: int, nodes: Int64[Tensor, "*P"]
    ) -> tuple[Int64[Tensor, "*P M"], Bool[Tensor, "*P M"]]:
        """The children of nodes at a depth, as nodes of the next, and which of the M places hold one."""
        first, end = self.starts[depth][nodes], self.starts[depth][nodes + 1]
        places = torch.arange(self.fan_out[depth], device=nodes.device)
        children = first[..., None] + places
        exists = children < end[..., None]
        return torch.where(exists, children, 0), exists

    def allowed(
        self, prefixes: Int[Tensor, "P depth"], num_codes: int
    ) -> Bool[Tensor, "P num_codes"]:
        """Which codes may follow each prefix of equal length; none where no product begins so."""
        nodes, known = self.find(prefixes)
        children, exists = self.children(prefixes.shape[1], nodes)
        exists &= known[:, None]
        codes = self.tokens[prefixes.shape[1]][children]
        mask = torch.zeros(len(prefixes), num_codes, dtype=torch.int64, device=codes.device)
        return mask.scatter_add_(1, codes, exists.long()) > 0

    def find(
        self, prefixes: Int[Tensor, "P depth"]
    ) -> tuple[Int64[Tensor, " P"], Bool[Tensor, " P"]]:
        """The node of each prefix, and whether there is one; where there is none the node is any."""
        nodes = torch.zeros(len(prefixes), dtype=torch.int64, device=self.products.device)
        known = torch.ones_like(nodes, dtype=torch.bool)
        for depth in range(prefixes.shape[1]):
            children, exists = self.children(depth, nodes)
            fits = exists & (self.tokens[depth][children] == prefixes[:, depth, None])
            known &= fits.any(1)
            nodes = children.gather(1, fits.long().argmax(1, keepdim=True))[:, 0]
        return nodes, known


def build_trie(
    codes: Int[np.ndarray, "N E"],
    *,
    available: Bool[np.ndarray, " N"] | Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Trie:
    """A trie of a table of IDs, or of the rows of it that are available: a mask, or their numbers.

    Raises `UserError` where no product is available, or two have the same ID.
    """
    rows = np.arange(len(codes))
    if available is not None:
        given = np.asarray(available)
        rows = np.flatnonzero(given) if given.dtype == bool else np.unique(given.astype(np.int64))
    if not len(rows):
        raise UserError("no product is available, so there is nothing to generate")
    own = codes if len(rows) == len(codes) else codes[rows]
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in own.T]
    order = torch.arange(len(rows))
    # A stable sort by each code from the last to the first is one by all of them.
    for column in reversed(columns):
        order = order[column[order].argsort(stable=True)]
    starts, tokens = [], []
    fresh = torch.zeros(len(rows), dtype=torch.bool)
    fresh[0] = True
    parents = torch.zeros(
        len(rows), dtype=torch.int64
    )  # the node above each product, at this depth
    for column in columns:
        codes_here = column[order].long()
        fresh = fresh.clone()
        fresh[1:] |= codes_here[1:] != codes_here[:-1]
        first = fresh.nonzero()[:, 0]
        above = parents[first]
        starts.append(torch.searchsorted(above, torch.arange(int(above[-1]) + 2)))
        tokens.append(codes_here[first])
        parents = fresh.cumsum(0) - 1
    if len(tokens[-1]) < len(rows):
        raise UserError("two products have the same semantic ID; make the IDs anew")
    trie = Trie(
        starts=tuple(starts),
        tokens=tuple(tokens),
        products=torch.from_numpy(rows)[order],
        fan_out=tuple(int(part.diff().max()) for part in starts),
    )
    return trie.to(device)
