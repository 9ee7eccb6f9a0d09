"""Matcher: what a notebook holds. A video, pictures or words in; matched products out.

from mmrec import Matcher
matcher = Matcher.load("runs/demo/index")
matcher.match(video="clip.mp4", title="love this NOVA find", k=5)
"""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32

from mmrec.data.batches import collate_items
from mmrec.data.media import (
    FrameConfig,
    Source,
    encode_jpeg,
    read_image,
    read_video,
    resize_shorter,
)
from mmrec.data.shards import ShardReader, image_name
from mmrec.data.storage import Place, joined
from mmrec.errors import MediaError, UserError
from mmrec.manifest import Parent, find_parent, read_manifest, relative_path
from mmrec.model.encoder import Encoder
from mmrec.retrieval.embed import open_split, pick_device, read_embeddings
from mmrec.retrieval.index import Device, ProductIndex

if TYPE_CHECKING:
    import pandas

_THUMBNAIL = 96


@dataclass(frozen=True, kw_only=True)
class Match:
    """One matched product."""

    product_id: str
    score: float
    """Cosine similarity of content and product, -1 to 1."""
    title: str | None
    attributes: dict[str, Any]
    image: bytes | None = field(default=None, repr=False)
    """The product's first picture as JPEG bytes, where the shards it came from are still there."""


@dataclass(frozen=True, kw_only=True)
class Matches(Sequence[Match]):
    """The products nearest to one query, best first. A notebook shows them as a gallery."""

    matches: list[Match]
    title: str | None = None
    """The query's words."""
    frames: list[bytes] = field(default_factory=list, repr=False)
    """The query's frames or pictures as JPEG bytes."""

    def __getitem__(self, place: Any) -> Any:
        return self.matches[place]

    def __len__(self) -> int:
        return len(self.matches)

    def __iter__(self) -> Iterator[Match]:
        return iter(self.matches)

    def to_dict(self) -> dict[str, Any]:
        """What `mmrec search --json` prints: no pictures, only what can be read."""
        return {
            "title": self.title,
            "frames": len(self.frames),
            "matches": [
                {name: value for name, value in asdict(match).items() if name != "image"}
                for match in self.matches
            ],
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """A row a match: product_id, score, title, and a column an attribute."""
        import pandas

        rows = []
        for match in self.matches:
            own = {"product_id": match.product_id, "score": match.score, "title": match.title}
            rows.append(own | match.attributes | own)  # An attribute called score stays behind.
        return pandas.DataFrame(rows)

    def _repr_html_(self) -> str:
        query = "".join(_picture(frame, "query frame") for frame in self.frames[:6])
        words = f"<p>“{html.escape(self.title)}”</p>" if self.title else ""
        cards = "".join(_card(place, match) for place, match in enumerate(self.matches, 1))
        return (
            f"<div><div>{query}</div>{words}"
            f"<div style='display:flex;flex-wrap:wrap;gap:12px;margin-top:8px'>{cards}</div></div>"
        )


class Matcher:
    """An encoder beside the index that was built with it."""

    def __init__(
        self, encoder: Encoder, index: ProductIndex, *, catalog: ShardReader | None = None
    ) -> None:
        """Join an encoder and an index; `catalog` supplies product pictures.

        Raises `UserError` when the encoder is not the one that made the index's embeddings.
        """
        made_by = index.manifest.parent("encoder") if index.manifest else None
        if made_by is not None and made_by.fingerprint != encoder.fingerprint:
            raise UserError(
                f"the index was built with encoder {made_by.fingerprint} and this encoder is "
                f"{encoder.fingerprint}: their spaces differ; mend it with `mmrec embed --encoder ENCODER "
                f"...` and `mmrec index build ...`, or load the encoder that belongs to the index"
            )
        self.encoder = encoder
        self.index = index
        self._catalog = catalog
        self._picture_rows = (
            {ids[0]: row for row, ids in enumerate(catalog.product_ids)} if catalog else {}
        )

    @classmethod
    def load(
        cls,
        index: Path | str,
        *,
        encoder: Path | str | None = None,
        device: Device = "auto",
    ) -> "Matcher":
        """Open an index folder, with its encoder found through the index's lineage or given by path.

        Raises `UserError` when either is missing or the two do not belong together.
        """
        folder = Path(index)
        opened = ProductIndex.load(folder, device=device)
        if encoder is None:
            encoder = _find_encoder(folder)
        return cls(
            Encoder.load(encoder, device=pick_device(device)),
            opened,
            catalog=_open_catalog(find_parent(folder, "shards")),
        )

    def match(
        self,
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
        text: str | None = None,
        k: int = 10,
    ) -> Matches:
        """The k products nearest to a content: a video, or pictures, with or without words, or words alone.

        `video` and `images` (one or several) are paths, URLs or bytes. `title` and `text` are two names
        for the words: a content's title, or a query typed by a person.

        Raises `UserError` when nothing is given, both words are, or a file cannot be read.
        """
        if isinstance(images, str | Path | bytes):
            images = [images]
        if video is not None and images:
            raise UserError("give a video or images, not both")
        if title and text:
            raise UserError("give title or text, not both: they are the same thing")
        words = title or text
        pictures = self._read(video, images)
        if not pictures and not (words and words.strip()):
            raise UserError("nothing to match: give a video, images or text")
        result = self.index.search(self.embed(pictures, words)[None], k)
        return Matches(
            matches=[
                self._match(product_id, float(score))
                for product_id, score in zip(result.ids[0], result.scores[0], strict=False)
            ],
            title=words,
            frames=[encode_jpeg(resize_shorter(picture, _THUMBNAIL), 85) for picture in pictures],
        )

    def embed(self, pictures: Sequence[np.ndarray], title: str | None) -> Float32[np.ndarray, " D"]:
        """The unit vector of one content, from pictures (H, W, 3) uint8 and a title, either missing."""
        tensors = [
            self.encoder.preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
            for picture in pictures
        ]
        batch = collate_items(
            [tensors],
            [title],
            tokenizer=self.encoder.tokenizer,
            size=self.encoder.preprocess.size,
        )
        # An index may hold the first numbers of nested embeddings alone.
        return self.encoder.embed(batch, "content", width=self.index.width)[0].cpu().numpy()

    def _read(self, video: Source | None, images: Sequence[Source]) -> list[np.ndarray]:
        source = video
        try:
            if video is not None:
                frames = FrameConfig(num_frames=self.encoder.config.num_frames)
                return read_video(video, frames).frames
            pictures = []
            for source in images:
                pictures.append(read_image(source))
            return pictures[: self.encoder.config.num_frames]
        except MediaError as error:
            name = f"{len(source)} bytes" if isinstance(source, bytes) else source
            raise UserError(f"{name}: {error.reason}") from None

    def _match(self, product_id: str, score: float) -> Match:
        attributes = self.index.attributes(product_id)
        title = attributes.pop("title", None)
        image = None
        if self._catalog is not None and product_id in self._picture_rows:
            row = self._picture_rows[product_id]
            name = image_name(0)
            # Products of tars that others wrote may have words alone.
            image = (
                self._catalog.read(row, [name])[name] if name in self._catalog.names(row) else None
            )
        return Match(
            product_id=product_id, score=score, title=title, attributes=attributes, image=image
        )


def build_index(
    embeddings: Path,
    out: Path,
    *,
    factory: str = "Flat",
    overwrite: bool = False,
) -> ProductIndex:
    """Build and publish an index from a folder of product embeddings.

    The index remembers the encoder, and where the shards and their pictures lie. Raises `UserError`
    for embeddings of contents, and for a factory that FAISS does not know.
    """
    loaded = read_embeddings(embeddings)
    if loaded.manifest.details["family"] != "products":
        raise UserError(
            f"{embeddings}: holds contents; an index is built of products (mmrec embed --split catalog)"
        )
    index = ProductIndex.build(
        loaded.ids, loaded.vectors, factory=factory, attributes=_attributes(loaded.metadata)
    )
    own = Parent(
        kind="embeddings",
        fingerprint=loaded.manifest.fingerprint,
        path=relative_path(out, embeddings),
    )
    ancestors = [
        Parent(
            kind=parent.kind,
            fingerprint=parent.fingerprint,
            path=relative_path(out, joined(embeddings, parent.path)),
        )
        for parent in loaded.manifest.parents
    ]
    index.save(
        out,
        parents=[own, *ancestors],
        config={"factory": factory},
        counts={"in": len(loaded.ids), "out": len(index), "dropped": {}},
        overwrite=overwrite,
    )
    return index


def _attributes(metadata: pa.Table) -> pa.Table:
    """product_id, title, and a column an attribute, from the metadata of embeddings."""
    import json

    rows = [
        {"product_id": row["id"], "title": row["title"], **json.loads(row["attributes"])}
        for row in metadata.to_pylist()
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _open_catalog(shards: Place | None) -> ShardReader | None:
    """The catalogue's shards for their pictures; matches do without where they are gone."""
    try:
        return open_split(shards, "catalog") if shards else None
    except UserError:
        return None


def _find_encoder(index: Path) -> Path:
    found = find_parent(index, "encoder")
    if isinstance(found, Path):
        return found
    record = read_manifest(index, "index").parent("encoder")
    if record is None:
        raise UserError(
            f"{index}: does not say which encoder it was built with; give one by its path"
        )
    place = (index / record.path).resolve()
    now = "is no longer there"
    if (place / "manifest.json").is_file():
        now = f"is now another one, {read_manifest(place).fingerprint}"
    raise UserError(
        f"{index}: was built with encoder {record.fingerprint}, and {place} {now}; give the right one "
        f"with --encoder, or make both anew: `mmrec embed --encoder {place} ...`, `mmrec index build ...`"
    )


def _picture(jpeg: bytes, description: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return (
        f"<img alt='{html.escape(description, quote=True)}' src='data:image/jpeg;base64,{data}' "
        f"style='height:{_THUMBNAIL}px;margin:2px;border-radius:4px'>"
    )


def _card(place: int, match: Match) -> str:
    title = match.title or match.product_id
    picture = _picture(match.image, title) if match.image else ""
    attributes = ", ".join(
        f"{name} {value}" for name, value in match.attributes.items() if value is not None
    )
    return (
        f"<div style='width:128px'>{picture}<div><b>{place}</b> · {match.score:.3f}</div>"
        f"<div>{html.escape(title)}</div>"
        f"<div style='color:gray;font-size:smaller'>{html.escape(attributes[:120])}</div></div>"
    )
