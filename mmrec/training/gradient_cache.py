"""Gradient caching: contrastive batches larger than memory (GradCache: Gao et al. 2021).

The loss needs the vectors of the whole batch, but their gradients are small. So the towers run once in
chunks without a graph; the loss is taken of their outputs and gives each output's gradient; then the
towers run again, a chunk at a time, and each chunk passes its part of those gradients on. The result is
the gradient of the uncached step, for a second forward pass of the towers.

A chunk draws the same random numbers in both passes. Batch normalisation is another matter: it sees a
chunk where it would have seen the batch, so its gradients differ from the uncached step's; its running
statistics are updated once a chunk, in the second pass alone.

Shape letters: N pictures or titles, D embedding width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.model.encoder import Encoder, Side, TowerOutputs, Views
from mmrec.ranges import CountOrZero

Losses = dict[str, Float[Tensor, ""]]
_SIDES: tuple[Side, ...] = ("content", "product")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Gradient caching: what goes through a tower at once; with all at 0 there is no caching.

    What is 0 goes through its tower in one piece and only once, which is faster where it fits.
    """

    frames: CountOrZero = 0
    """Frames of contents in a chunk, on each rank."""
    images: CountOrZero = 0
    """Images of products in a chunk."""
    texts: CountOrZero = 0
    """Titles in a chunk, of either side."""

    @property
    def on(self) -> bool:
        """Whether anything is cached."""
        return bool(self.frames or self.images or self.texts)


def cached_backward(
    encoder: Encoder,
    batch: PairBatch,
    loss_of: Callable[[Views, Float[Tensor, ""]], Losses],
    *,
    config: CacheConfig,
    model: nn.Module | None = None,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Losses:
    """Add a batch's gradients to the encoder's parameters in chunks; returns its losses without a graph.

    `loss_of` takes every view and the scale to losses by name, of which "loss" is differentiated by
    `backward`. `model` is the encoder inside DDP (with `find_unused_parameters`): ranks exchange
    gradients once, after the last chunk, and not at all under its `no_sync`.
    """
    sides = dict(zip(_SIDES, (batch.content, batch.product), strict=True))
    parts = [part for side, items in sides.items() for part in _parts_of(side, items, config)]
    with torch.no_grad(), _held_statistics(encoder), autocast():
        for part in parts:
            part.run(encoder)
    with autocast():
        views = encoder.views_of(sides, _outputs(encoder, sides, parts))
        losses = loss_of(views, encoder.scale)
    backward(losses["loss"])
    for part in parts:
        part.backward(encoder, autocast)
    if model is not None and model is not encoder:
        # Gradients have been added up behind DDP's back; a pass that uses the scale alone makes it
        # reduce all of them, and its own gradient of zero changes nothing.
        _, scale = model(None)
        (0 * scale).backward()
    return {name: loss.detach() for name, loss in losses.items()}


class _Part:
    """One side's pictures or titles, which go through their tower in chunks."""

    def __init__(
        self, side: Side, kind: Literal["pictures", "titles"], rows: Tensor, size: int
    ) -> None:
        self.side: Side = side
        self.kind = kind
        self.features: Tensor | None = None
        self._chunks = rows.split(size)
        self._states: list[_RandomState] = []

    def run(self, encoder: Encoder) -> None:
        """The first pass: features that ask for a gradient, as a leaf."""
        found = []
        for chunk in self._chunks:
            self._states.append(_RandomState(chunk.device))
            found.append(self._forward(encoder, chunk))
        self.features = torch.cat(found).requires_grad_()

    def backward(
        self, encoder: Encoder, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """The second pass: each chunk again, with a graph, and its gradients through it."""
        assert self.features is not None
        gradient = self.features.grad
        if gradient is None:  # no objective looks at these
            return
        sizes = [len(chunk) for chunk in self._chunks]
        for chunk, state, part in zip(
            self._chunks, self._states, gradient.split(sizes), strict=True
        ):
            with state.replayed(), autocast():
                features = self._forward(encoder, chunk)
            if not features.requires_grad:  # the tower is frozen
                return
            torch.autograd.backward(features, part)

    def _forward(self, encoder: Encoder, chunk: Tensor) -> Float[Tensor, "N D"]:
        run = encoder.picture_features if self.kind == "pictures" else encoder.title_features
        return run(chunk, self.side)


def _parts_of(side: Side, items: ItemBatch, config: CacheConfig) -> list[_Part]:
    parts = []
    size = config.frames if side == "content" else config.images
    if size and items.image_mask.any():
        parts.append(_Part(side, "pictures", items.pictures(), size))
    if config.texts and items.text_mask.any():
        parts.append(_Part(side, "titles", items.tokens[items.text_mask], config.texts))
    return parts


def _outputs(encoder: Encoder, sides: Mapping[Side, ItemBatch], parts: list[_Part]) -> TowerOutputs:
    """The cached features, and those of all else with a graph of their own."""
    found = {(part.side, part.kind): part.features for part in parts}
    outputs: TowerOutputs = {}
    for side, items in sides.items():
        pictures, titles = found.get((side, "pictures")), found.get((side, "titles"))
        if pictures is None:
            pictures = encoder.picture_features(items.pictures(), side)
        if titles is None:
            titles = encoder.title_features(items.tokens[items.text_mask], side)
        outputs[side] = (pictures, titles)
    return outputs


class _RandomState:
    """Where the random generators of the CPU and of a device stood."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu, self._cuda = self._now()

    def _now(self) -> tuple[Tensor, Tensor | None]:
        on_gpu = self._device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers again, and leave the generators as they are now."""
        now = self._now()
        _set_random_state(self._device, self._cpu, self._cuda)
        try:
            yield
        finally:
            _set_random_state(self._device, *now)


def _set_random_state(device: torch.device, cpu: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


@contextmanager
def _held_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalisation as they are."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    seen = [
        None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, seen, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
