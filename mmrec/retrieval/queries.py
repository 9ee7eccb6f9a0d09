"""Queries: what `Matcher.match` is asked, read from files, and what the encoder's towers make of it.

A query is a video or pictures, with or without words, or words alone. What the towers made of each picture
and of the words is kept, a few kilobytes, where the pictures would be megabytes: embedding the query again
with a part of it missing is then a matter of pooling and fusing.

Shape letters: T frames or pictures, D embedding width, W the width that an index asks for, R versions of a
query.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mmrec.data.batches import ItemBatch, Preprocess
from mmrec.data.media import FrameConfig, Source, read_image, read_video
from mmrec.errors import MediaError, UserError
from mmrec.model.encoder import VIEWS, Encoder, Side
from mmrec.model.widths import truncate

SOURCE = str | Path | bytes
# Lists of what a query is made of, with None where one has none.
Videos = list[Source] | list[Source | None] | tuple[Source | None, ...]
Words = list[str] | list[str | None] | tuple[str | None, ...]
Ids = list[str] | tuple[str, ...]
Pictures = Sequence[Source] | None
PictureLists = list[Pictures] | list[list[Source]] | tuple[Pictures, ...]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query before its files are read."""

    video: Source | None = None
    images: Sequence[Source] = ()
    title: str | None = None
    number: int | None = None
    """Its place in a list of queries, from 0; None where it is alone."""

    def __post_init__(self) -> None:
        if self.video is not None and self.images:
            raise UserError(f"{self.prefix}give a video or images, not both")
        if self.video is None and not self.images and not (self.title and self.title.strip()):
            raise UserError(f"{self.prefix}nothing to match: give a video, images or text")

    @property
    def prefix(self) -> str:
        """What an error about the whole query begins with."""
        return "" if self.number is None else f"query [{self.number}]: "


@dataclass(frozen=True, kw_only=True)
class EncodedQuery:
    """What an encoder made of one query."""

    side: Side
    frames: Float[Tensor, "T D"]
    """What the image tower gave for each frame or picture."""
    title: Float[Tensor, " D"] | None
    """What the text tower gave for the words."""
    vector: Float32[np.ndarray, " W"]
    """The query as an index is asked with it: of unit length, or zero where nothing was given."""


def queries_of(
    video: Any = None, images: Any = (), title: Any = None, text: Any = None
) -> tuple[list[Query], bool]:
    """The queries that arguments of `match` stand for, and whether they were given as lists.

    Raises `UserError` where lists and single values are mixed, lengths differ, or a query is empty.
    """
    if is_given(title) and is_given(text):
        raise UserError("give title or text, not both: they are the same thing")
    words = "text" if title is None or is_given(text) else "title"
    pictures = _pictures(images, "images")
    parts = {"video": video, "images": pictures, words: title if words == "title" else text}
    own = {name: listed(value) for name, value in parts.items() if name != "images"}
    own["images"] = _listed_images(pictures)
    lists = {name: value for name, value in own.items() if value is not None}
    if not lists:
        return [_checked_query(video, pictures, parts[words], words=words)], False
    single = [n for n, value in parts.items() if n not in lists and is_given(value)]
    if single:
        also = " ([[a, b], [c]] is two queries of pictures)" if "images" in single else ""
        raise UserError(
            f"{' and '.join(lists)}: a list is many queries, so {' and '.join(single)} has to be a list with "
            f"an entry for each, too{also}"
        )
    lengths = {name: len(value) for name, value in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise UserError(f"expected an entry for each query, None where it has none; found {found}")
    nothing = [None] * max(lengths.values())
    columns = [lists.get(name) or nothing for name in ("video", "images", words)]
    rows = enumerate(zip(*columns, strict=True))
    return [_checked_query(*row, words=words, number=number) for number, row in rows], True


def _checked_query(
    video: Any, images: Any, title: Any, *, words: str, number: int | None = None
) -> Query:
    row = "" if number is None else f"[{number}]"
    if video is not None and not isinstance(video, SOURCE):
        raise UserError(
            f"video{row}: expected a path, a URL or bytes, found {type(video).__name__}"
        )
    if title is not None and not isinstance(title, str):
        raise UserError(f"{words}{row}: expected words, found {type(title).__name__}")
    pictures = _pictures(images, f"images{row}")
    wrong = next((picture for picture in pictures if not isinstance(picture, SOURCE)), None)
    if wrong is not None:
        raise _no_picture(wrong, f"images{row}")
    return Query(video=video, images=pictures, title=title, number=number)


def _pictures(images: Any, where: str) -> list[Any]:
    """What `images` holds, as a list; one that a table lacks is None or NaN."""
    if images is None or (isinstance(images, float) and math.isnan(images)):
        return []
    if isinstance(images, SOURCE):
        return [images]
    if not isinstance(images, Iterable):
        raise _no_picture(images, where)
    return list(images)


def _no_picture(found: Any, where: str) -> UserError:
    return UserError(
        f"{where}: expected paths, URLs or bytes of image files, found {type(found).__name__}"
    )


def is_given(value: Any) -> bool:
    """Whether an argument of `match` says anything."""
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def listed(value: Any) -> list[Any] | None:
    """The entries of an argument that was given as a list (or a tuple, or a column of a table), else None.

    A missing entry is None; tables may have NaN there.
    """
    if isinstance(value, SOURCE) or not isinstance(value, Iterable):
        return None
    return [None if isinstance(entry, float) and math.isnan(entry) else entry for entry in value]


def read_query(query: Query, num_frames: int) -> list[np.ndarray]:
    """The frames of a query's video, or its pictures, (H, W, 3) uint8 each, at most `num_frames`.

    Raises `UserError` that names the file, and its place where there were several.
    """
    row = "" if query.number is None else f"[{query.number}]"
    source, where = query.video, f"video{row}" if row else ""
    try:
        if query.video is not None:
            return read_video(query.video, FrameConfig(num_frames=num_frames)).frames
        pictures = []
        for place, source in enumerate(query.images):
            where = f"images{row}[{place}]" if row or len(query.images) > 1 else ""
            pictures.append(read_image(source))
        return pictures[:num_frames]
    except MediaError as error:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else f"{source}"
        raise UserError(": ".join(part for part in (where, name, error.reason) if part)) from None


def preprocessed(pictures: Sequence[np.ndarray], preprocess: Preprocess) -> list[Tensor]:
    """Pictures, (H, W, 3) uint8 each, as an image tower takes them."""
    return [preprocess(torch.from_numpy(np.array(p)).permute(2, 0, 1)) for p in pictures]


@torch.inference_mode()
def encode(encoder: Encoder, items: ItemBatch, side: Side, *, width: int) -> list[EncodedQuery]:
    """Run the towers once over a batch of queries."""
    titles = encoder.title_features_cut(items.tokens[items.text_mask], side)
    items = items.to(encoder.device)
    frames = encoder.picture_features(items.pictures(), side)
    views = encoder.views_of({side: items}, {side: (frames, titles)})
    vectors = truncate(views, width)[VIEWS[side][0]][0].float().cpu().numpy()
    own_frames = frames.float().cpu().split(items.image_mask.sum(1).tolist())
    own_titles = iter(titles.float().cpu())
    return [
        EncodedQuery(
            side=side, frames=rows, title=next(own_titles) if has_title else None, vector=vector
        )
        for rows, has_title, vector in zip(
            own_frames, items.text_mask.tolist(), vectors, strict=True
        )
    ]


@torch.inference_mode()
def embed_parts_of(
    encoder: Encoder, query: EncodedQuery, *, width: int
) -> Float32[np.ndarray, "R W"]:
    """A query embedded whole, by its pictures alone, by its title alone, and without each picture in turn.

    R is 3 + T. As if the missing part had never been there: frames that follow move up.
    """
    count, device = len(query.frames), encoder.device
    num_rows, most = 3 + count, max(1, count)
    image_mask = torch.zeros(num_rows, most, dtype=torch.bool, device=device)
    image_mask[:, :count] = True
    image_mask[2] = False
    image_mask[3 + torch.arange(count), torch.arange(count)] = False
    text_mask = torch.full((num_rows,), query.title is not None, device=device)
    text_mask[1] = False
    items = ItemBatch(
        # The towers have run already, so that of pixels and tokens there need be none.
        images=torch.zeros(num_rows, most, 3, 0, 0, dtype=torch.uint8, device=device),
        image_mask=image_mask,
        tokens=torch.zeros(num_rows, 0, dtype=torch.long, device=device),
        text_mask=text_mask,
    )
    frames = query.frames.to(device)
    rows = frames.expand(num_rows, count, -1)[image_mask[:, :count]]
    title = torch.zeros(0, frames.shape[1], device=device)
    if query.title is not None:
        title = query.title.to(device).expand(int(text_mask.sum()), -1)
    views = encoder.views_of({query.side: items}, {query.side: (rows, title)})
    return truncate(views, width)[VIEWS[query.side][0]][0].float().cpu().numpy()


def _listed_images(images: list[Any]) -> list[Any] | None:
    """Pictures of many queries, given as a list of lists; None where they are of one."""
    alone = next((e for e in images if not isinstance(e, SOURCE | Iterable | float | None)), None)
    if alone is not None:
        raise _no_picture(alone, "images")
    nested = [not isinstance(entry, SOURCE) for entry in images]
    if not any(nested):
        return None
    if not all(nested):
        raise UserError(
            "images: expected the pictures of one query, [a, b], or a list for each of many, [[a, b], [c]]; "
            "found both"
        )
    return images
