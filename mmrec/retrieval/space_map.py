"""A map of the joint space: contents and products in two dimensions, and how far the two sides lie apart.

Shape letters: N items, D embedding width.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32

from mmrec.data.batches import ItemBatch, item_loader
from mmrec.data.media import encode_jpeg, read_image, resize_shorter
from mmrec.data.shards import ShardReader, frame_name, image_name
from mmrec.data.storage import Place, place
from mmrec.errors import MediaError, UserError
from mmrec.model.encoder import VIEWS, Encoder, Side
from mmrec.retrieval.embed import Split, open_split
from mmrec.retrieval.match_gallery import new_figure, picture

if TYPE_CHECKING:
    import matplotlib.figure

Method = Literal["auto", "pca", "umap"]
_PICTURE = 64
# Of middle lightness, so that they stand out from a light and from a dark page.
_COLORS = ("#3f7fd9", "#d9772f", "#3a9e6b", "#a862c4")


@dataclass(frozen=True, kw_only=True)
class Points:
    """Some contents or products, or one view of them, in the joint space."""

    name: str
    """What the legend says: contents, products."""
    ids: list[str]
    titles: list[str | None]
    vectors: Float32[np.ndarray, "N D"]
    """Of unit length; zero where an item lacks what is looked at."""
    pictures: list[bytes | None] = field(repr=False)
    """A small JPEG of each."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, repr=False)
class SpaceMap:
    """Points in two dimensions; a notebook shows them with pictures under the pointer."""

    groups: list[Points]
    places: list[Float32[np.ndarray, "_N 2"]]
    """Where the points of each group lie."""
    method: str
    explained: float | None
    """The share of the variance that the two axes of a PCA hold; None for other maps."""

    @property
    def summary(self) -> str:
        """What the map shows, in a sentence."""
        counts = " and ".join(f"{len(group):,} {group.name}" for group in self.groups)
        share = f", {self.explained:.0%} of the variance" if self.explained is not None else ""
        return f"{counts}, by {self.method.upper()}{share}"

    def plot(self) -> "matplotlib.figure.Figure":
        """The map as a matplotlib figure, without pictures. Needs `pip install 'mmrec[notebook]'`."""
        figure = new_figure(7.0, 5.5)
        axes = figure.add_subplot()
        for number, (group, places) in enumerate(zip(self.groups, self.places, strict=True)):
            color, marker = _COLORS[number % len(_COLORS)], "os^v"[number % 4]
            axes.scatter(*places.T, s=14, c=color, marker=marker, alpha=0.75, label=group.name)
        axes.set_title(self.summary, fontsize=10)
        axes.legend()
        return figure

    def __repr__(self) -> str:
        return f"map of {self.summary}"

    def _repr_html_(self) -> str:
        scaled = _scaled(self.places)
        body = "".join(
            _mark(number, x, y, group.ids[row], group.titles[row], group.pictures[row])
            for number, (group, places) in enumerate(zip(self.groups, scaled, strict=True))
            for row, (x, y) in enumerate(places.tolist())
        )
        # Notebooks put all outputs on one page: the name keeps this map's style to itself.
        name = f"map{hashlib.sha256(body.encode()).hexdigest()[:10]}"
        legend = " ".join(
            f"<span><i class='g{number}'></i> {escape(group.name)}</span>"
            for number, group in enumerate(self.groups)
        )
        spoken = escape(f"Map of {self.summary}", quote=True)
        return (
            f"<div class='{name}'><style>{_style(name, len(self.groups))}</style>"
            f"<div class='legend'>{legend}</div>"
            f"<div class='field' role='group' aria-label='{spoken}'>{body}</div>"
            f"<div class='note'>{escape(self.summary)}. Point at a mark, or go to it by Tab, "
            "to see its picture.</div></div>"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class ModalityGap:
    """How far two kinds of embeddings lie apart as wholes (Liang et al. 2022, "Mind the gap").

    What is trained to meet often lies in two cones of the space all the same: each product nearest to its
    own contents, and yet nearer to other products than to any content.
    """

    distance: float
    """Between the two means of unit vectors: 0 where the kinds lie alike, at most 2."""
    spread: float
    """Root mean square distance of a point to its own kind's mean: what `distance` is to be held against."""
    told_apart: float
    """The share of points that lie nearer to their own kind's mean; about 0.5 where there is no gap."""

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value:.3f}" for name, value in vars(self).items())
        return f"ModalityGap({figures})"


def points_of(
    encoder: Encoder,
    shards: Place | str,
    split: Split,
    *,
    view: str | None = None,
    most: int = 400,
    seed: int = 0,
    batch_size: int = 64,
) -> Points:
    """Embed the contents of a split, or the products ("catalog"): a random sample of at most so many.

    `view` takes one view of `Encoder.views` instead of the whole, such as "image" or "product_title"; items
    without it are left out. Raises `UserError` for a split that is not there and a view that is of the other
    side.
    """
    reader = open_split(place(shards), split)
    side: Side = "content" if reader.family == "contents" else "product"
    view = view or VIEWS[side][0]
    if view not in VIEWS[side]:
        raise UserError(f"view '{view}': {split} has {', '.join(VIEWS[side])}")
    if most < 2:
        raise UserError(f"most is {most}; expected at least 2")
    rows = np.sort(np.random.default_rng(seed).permutation(len(reader))[:most]).tolist()
    loader = item_loader(
        reader,
        rows,
        preprocess=encoder.preprocess,
        tokenizer=encoder.tokenizer,
        num_frames=encoder.config.num_frames,
        batch_size=batch_size,
        num_workers=0,
    )
    vectors, there = _embedded(encoder, loader, side, view)
    rows = [row for row, has_view in zip(rows, there.tolist(), strict=True) if has_view]
    if not rows:
        raise UserError(f"{shards}: nothing in {split} has a {view}")
    name = reader.family if view == VIEWS[side][0] else f"{view.replace('_', ' ')}s"
    return Points(
        name=name,
        ids=[_id_of(reader, row) for row in rows],
        titles=[reader.meta(row)["title"] for row in rows],
        vectors=vectors[there],
        pictures=[_small_picture(reader, row) for row in rows],
    )


def map_of(groups: Sequence[Points], *, method: Method = "auto", seed: int = 0) -> SpaceMap:
    """Lay all groups into one plane: by UMAP where it is installed, else by PCA.

    Raises `UserError` where UMAP is asked for and is not installed, and for fewer than three points.
    """
    together = np.concatenate([group.vectors for group in groups])
    if len(together) < 3:
        raise UserError(f"{len(together)} points make no map; expected at least 3")
    umap = None
    if method != "pca":
        try:
            import umap  # pyright: ignore[reportMissingImports]
        except ImportError:
            if method == "umap":
                raise UserError("UMAP is not installed: pip install umap-learn") from None
    explained = None
    if umap is None:
        places, explained = principal_components(together)
    else:
        places = umap.UMAP(metric="cosine", random_state=seed).fit_transform(together)
        places = np.asarray(places, np.float32)
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return SpaceMap(
        groups=list(groups),
        places=np.split(places, ends),
        method="pca" if umap is None else "umap",
        explained=explained,
    )


def principal_components(
    vectors: Float[np.ndarray, "N D"],
) -> tuple[Float32[np.ndarray, "N 2"], float]:
    """The two directions of most variance, and their share of it.

    A direction's sign is a matter of chance; here its largest component is above zero.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    largest = np.abs(directions).argmax(1)
    directions *= np.sign(directions[np.arange(len(directions)), largest])[:, None]
    places = np.zeros((len(vectors), 2), np.float32)
    places[:, : len(directions)] = centred @ directions.T
    total = float((sizes**2).sum())
    return places, float((sizes[:2] ** 2).sum()) / total if total else 1.0


def modality_gap(one: Points, other: Points) -> ModalityGap:
    """How far apart two groups lie: contents and products, or pictures and titles of one side."""
    means = [group.vectors.mean(0) for group in (one, other)]
    squares, nearer = [], []
    for group, own, theirs in ((one, *means), (other, *reversed(means))):
        to_own = ((group.vectors - own) ** 2).sum(1)
        squares.append(to_own)
        nearer.append(to_own < ((group.vectors - theirs) ** 2).sum(1))
    return ModalityGap(
        distance=float(np.linalg.norm(means[0] - means[1])),
        spread=float(np.sqrt(np.concatenate(squares).mean())),
        told_apart=float(np.concatenate(nearer).mean()),
    )


@torch.inference_mode()
def _embedded(
    encoder: Encoder, batches: Iterable[ItemBatch], side: Side, view: str
) -> tuple[Float32[np.ndarray, "N D"], Bool[np.ndarray, " N"]]:
    """One view of every item, and which items have it."""
    vectors, there = [], []
    for batch in batches:
        own, mask = encoder.views(batch.to(encoder.device), side)[view]
        vectors.append(own.float().cpu().numpy())
        there.append(mask.cpu().numpy())
    return np.concatenate(vectors), np.concatenate(there)


def _id_of(reader: ShardReader, row: int) -> str:
    return reader.content_ids[row] if reader.family == "contents" else reader.product_ids[row][0]


def _small_picture(reader: ShardReader, row: int) -> bytes | None:
    name = frame_name(0) if reader.family == "contents" else image_name(0)
    if name not in reader.names(row):
        return None
    try:
        own = read_image(reader.read(row, [name])[name])
    except MediaError:
        return None
    return encode_jpeg(resize_shorter(own, _PICTURE), 75)


def _scaled(places: Sequence[Float32[np.ndarray, "_N 2"]]) -> list[Float32[np.ndarray, "_N 2"]]:
    """Places in percent of a field, from its upper left corner, with a margin."""
    together = np.concatenate(places)
    low, high = together.min(0), together.max(0)
    scale = 94 / np.maximum(high - low, 1e-9)
    shares = [3 + (own - low) * scale for own in places]
    return [np.stack([own[:, 0], 100 - own[:, 1]], axis=1) for own in shares]


def _mark(number: int, x: float, y: float, id_: str, title: str | None, jpeg: bytes | None) -> str:
    # A card opens towards the middle, so that none is cut at the edge.
    towards = ("left" if x < 50 else "right") + (" down" if y < 50 else " up")
    shown = picture(jpeg, "", style=f"max-width:96px;height:{_PICTURE}px") if jpeg else ""
    words = f"{escape(title)}<br>" if title else ""
    name = escape(f"{title}, {id_}" if title else id_, quote=True)
    return (
        f"<i class='g{number}' tabindex='0' role='img' aria-label='{name}' "
        f"style='left:{x:.2f}%;top:{y:.2f}%'><b class='{towards}' style='display:none'>{shown}<br>"
        f"{words}<small>{escape(id_)}</small></b></i>"
    )


def _style(name: str, num_groups: int) -> str:
    """The map's own style; a card takes the notebook's colours, Jupyter's or VS Code's."""
    paper = "var(--jp-layout-color0,var(--vscode-editor-background,Canvas))"
    ink = "var(--jp-content-font-color0,var(--vscode-editor-foreground,CanvasText))"
    own = f".{name}"
    groups = "".join(
        f"{own} .g{number}{{background:{_COLORS[number % len(_COLORS)]};"
        f"border-radius:{'50%' if number % 2 == 0 else '1px'}}}"
        for number in range(num_groups)
    )
    return (
        f"{own}{{max-width:860px;color:inherit}}"
        f"{own} .field{{position:relative;aspect-ratio:3/2;border:1px solid;border-color:"
        "color-mix(in srgb,currentColor 25%,transparent);border-radius:6px}"
        f"{own} i{{display:inline-block;width:9px;height:9px;opacity:.8}}"
        f"{own} .field i{{position:absolute;margin:-4px 0 0 -4px}}"
        f"{own} .field i:is(:hover,:focus){{z-index:1;opacity:1;outline:2px solid}}"
        f"{own} i:is(:hover,:focus) b{{display:block!important}}"
        f"{own} b{{position:absolute;width:150px;padding:6px;font:12px/1.35 sans-serif;"
        f"background:{paper};color:{ink};border:1px solid;border-radius:6px;overflow-wrap:anywhere}}"
        f"{own} .left{{left:14px}}{own} .right{{right:14px}}"
        f"{own} .down{{top:0}}{own} .up{{bottom:0}}"
        f"{own} .legend{{display:flex;gap:16px;margin-bottom:6px}}"
        f"{own} .note{{opacity:.72;font-size:smaller;margin-top:6px}}{groups}"
    )
