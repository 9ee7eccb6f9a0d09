"""Matcher: what a notebook holds. A video, pictures or words in; matched products out.

from mmrec import Matcher
matcher = Matcher.load("runs/demo/index")
matcher.match(video="clip.mp4", title="love this NOVA find", k=5)
"""

import base64
import html
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
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
from mmrec.data.shards import ShardReader, frame_name, image_name
from mmrec.data.storage import Place, joined
from mmrec.errors import MediaError, UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    check_output,
    find_recorded,
    read_manifest,
    relative_path,
)
from mmrec.model.encoder import Encoder, Side
from mmrec.retrieval.backend import CatalogueIndex
from mmrec.retrieval.embed import open_split, pick_device, read_embeddings
from mmrec.retrieval.frontier import Frontier, remove_frontier
from mmrec.retrieval.index import Device, ProductIndex
from mmrec.retrieval.milvus import COLLECTION, MilvusIndex
from mmrec.retrieval.out_of_core import build_from_parts, bytes_to_build
from mmrec.retrieval.parts import Parts, attributes_of, open_parts
from mmrec.retrieval.tuning import TuningGoal, check_goal, query_vectors, tuned_index

if TYPE_CHECKING:
    import pandas

_THUMBNAIL = 96


@dataclass(frozen=True, kw_only=True)
class Match:
    """One matched product."""

    product_id: str
    """The product's id; in an index of contents the content's."""
    score: float
    """Cosine similarity of query and match, -1 to 1."""
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
        self, encoder: Encoder, index: CatalogueIndex, *, catalog: ShardReader | None = None
    ) -> None:
        """Join an encoder and an index; `catalog` supplies the pictures of what it holds.

        Raises `UserError` when the encoder is not the one that made the index's embeddings, and warns
        where a saved index does not say which one did.
        """
        check_encoder(index, encoder.fingerprint)
        if index.manifest is not None and encoder_of(index) is None:
            warn_of_unknown_encoder("the index's embeddings")
        self.encoder = encoder
        self.index = index
        self._catalog = catalog
        self.side: Side = "content" if index.key == "product_id" else "product"
        """What queries are, unless said otherwise: contents ask for products, products for contents."""
        self._picture_rows = _rows_by_id(catalog) if catalog else {}

    @classmethod
    def load(
        cls,
        index: Path | str | None = None,
        *,
        uri: str | None = None,
        collection: str = COLLECTION,
        encoder: Path | str | None = None,
        device: Device = "auto",
    ) -> "Matcher":
        """Open an index folder, or a collection in Milvus at `uri` that was pushed from one.

        The encoder is found through the index's lineage or given by path. Raises `UserError` when
        either is missing or the two do not belong together.
        """
        opened = open_index(index, uri=uri, collection=collection, device=device)
        if isinstance(opened, MilvusIndex):
            shards = opened.find_parent("shards")
            encoder = encoder or _pushed_encoder(opened)
        else:
            folder = Path(index or "")
            assert opened.manifest is not None
            shards = find_recorded(folder, opened.manifest.parent("shards"))
            encoder = encoder or _find_encoder(folder, opened.manifest)
        return cls(
            Encoder.load(encoder, device=pick_device(device)),
            opened,
            catalog=_open_catalog(shards, opened),
        )

    def match(
        self,
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
        text: str | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> Matches:
        """The k nearest to a video, or pictures, with or without words, or words alone.

        `video` and `images` (one or several) are paths, URLs or bytes. `title` and `text` are two names
        for the words: a content's title, or a query typed by a person. `where` is a condition on
        attributes ("price < 30 and available"). `side` says whether the query is a content or a
        product, where it is not the other side of what the index holds; `rerank` as in
        `ProductIndex.search`.

        Raises `UserError` when nothing is given, both words are, a file cannot be read, or the condition
        cannot be understood.
        """
        words = _one_of(title, text)
        pictures = self.read(video, images)
        if not pictures and not (words and words.strip()):
            raise UserError("nothing to match: give a video, images or text")
        query = self.embed(pictures, words, side=side)[None]
        result = self.index.search(query, k, where=where, rerank=rerank)
        return Matches(
            matches=self._matches(result.ids[0], result.scores[0]),
            title=words,
            frames=[encode_jpeg(resize_shorter(picture, _THUMBNAIL), 85) for picture in pictures],
        )

    def match_like(
        self, id_: str, *, k: int = 10, where: str | None = None, rerank: bool | None = None
    ) -> Matches:
        """The k nearest to something that the index holds, without itself.

        Raises `UserError` for an id that is not here, and for an index that keeps no vectors.
        """
        if k < 1:
            raise UserError(f"k is {k}; expected at least 1")
        query = self.index.vectors([id_])
        query /= np.linalg.norm(query, axis=1, keepdims=True)
        result = self.index.search(query, k + 1, where=where, rerank=rerank)
        pairs = zip(result.ids[0], result.scores[0], strict=False)
        others = [(found, score) for found, score in pairs if found != id_][:k]
        ids, scores = [found for found, _ in others], np.array([score for _, score in others])
        title = self.index.attributes(id_).get("title")
        return Matches(matches=self._matches(ids, scores), title=title)

    def embed(
        self, pictures: Sequence[np.ndarray], title: str | None, *, side: Side | None = None
    ) -> Float32[np.ndarray, " D"]:
        """The unit vector of one query, from pictures (H, W, 3) uint8 and a title, either missing."""
        return self.embed_many([pictures], [title], side=side)[0]

    def embed_many(
        self,
        pictures: Sequence[Sequence[np.ndarray]],
        titles: Sequence[str | None],
        *,
        side: Side | None = None,
    ) -> Float32[np.ndarray, "Q D"]:
        """The unit vectors of several queries; one with neither pictures nor a title is zero."""
        tensors = [
            [
                self.encoder.preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
                for picture in own
            ]
            for own in pictures
        ]
        batch = collate_items(
            tensors,
            titles,
            tokenizer=self.encoder.tokenizer,
            size=self.encoder.preprocess.size,
        )
        # An index may hold the first numbers of nested embeddings alone.
        vectors = self.encoder.embed(batch, side or self.side, width=self.index.width)
        return vectors.cpu().numpy()

    def read(
        self, video: Source | None = None, images: Sequence[Source] | Source = ()
    ) -> list[np.ndarray]:
        """The frames of a video, or pictures, as the encoder takes them: (H, W, 3) uint8 each.

        Raises `UserError` when both are given, or a file cannot be read.
        """
        if isinstance(images, str | Path | bytes):
            images = [images]
        if video is not None and images:
            raise UserError("give a video or images, not both")
        return self._read(video, images)

    def _matches(self, ids: Sequence[str], scores: np.ndarray) -> list[Match]:
        found = self.index.attributes_of(ids)
        return [
            self._match(id_, float(score), attributes)
            for id_, score, attributes in zip(ids, scores, found, strict=False)
        ]

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

    def _match(self, product_id: str, score: float, attributes: dict[str, Any]) -> Match:
        title = attributes.pop("title", None)
        return Match(
            product_id=product_id,
            score=score,
            title=title,
            attributes=attributes,
            image=self._picture_of(product_id),
        )

    def _picture_of(self, id_: str) -> bytes | None:
        """The first picture, where shards have one: tars that others wrote may have words alone."""
        if self._catalog is None or id_ not in self._picture_rows:
            return None
        row = self._picture_rows[id_]
        name = image_name(0) if self._catalog.family == "products" else frame_name(0)
        return self._catalog.read(row, [name])[name] if name in self._catalog.names(row) else None


def open_index(
    index: Path | str | None = None,
    *,
    uri: str | None = None,
    collection: str = COLLECTION,
    device: Device = "auto",
) -> ProductIndex | MilvusIndex:
    """Open an index folder, or a collection in Milvus.

    Raises `UserError` when neither or both are given, and when it cannot be opened.
    """
    if uri is not None and index is None:
        return MilvusIndex.open(uri, collection)
    if index is not None and uri is None:
        return ProductIndex.load(index, device=device)
    raise UserError("give an index folder, or the URI of Milvus, and not both")


def encoder_of(index: CatalogueIndex) -> str | None:
    """The fingerprint of the encoder that made what an index holds, where that is known."""
    return index.manifest.encoder if index.manifest else None


def warn_of_unknown_encoder(what: str) -> None:
    """Say that matches may mean nothing: nobody knows whether vectors are of one space."""
    warnings.warn(
        f"{what}: it is not known which encoder made them; matches are worth something only if one made both",
        stacklevel=3,
    )


def check_encoder(index: CatalogueIndex, fingerprint: str | None) -> None:
    """Refuse an encoder that did not make what an index holds."""
    known = encoder_of(index)
    if known is not None and fingerprint != known:
        raise UserError(
            f"the index was built with encoder {known} and this encoder is "
            f"{fingerprint}: their spaces differ; mend it with `mmrec embed --encoder ENCODER "
            f"...` and `mmrec index build ...`, or load the encoder that belongs to the index"
        )


def build_index(
    embeddings: Path,
    out: Path,
    *,
    factory: str = "Flat",
    width: int | None = None,
    rerank: bool = False,
    ids: str | None = None,
    memory_gb: float | None = None,
    overwrite: bool = False,
    goal: TuningGoal | None = None,
    queries: Path | None = None,
    report: Callable[[str], None] = print,
) -> ProductIndex:
    """Build and publish an index from a folder of embeddings, of products or of contents.

    The index remembers the encoder, and where the shards and their pictures lie. `width` indexes the
    leading components alone; `rerank` keeps all of them, and scores matches again by them. `ids` names
    the column of ids of embeddings that mmrec did not write. Embeddings that do not fit `memory_gb`, by
    default half of what is free, are read a part at a time: see out_of_core.py. With a `goal` the factory
    is chosen by measurement with `queries`: see `tune` and `query_vectors`. Raises `UserError` for a
    factory that FAISS does not know, for vectors that cannot be indexed, and for a goal out of reach.
    """
    check_output(out, kind="index", overwrite=overwrite, inputs=[embeddings])
    if width is not None and width < 1:
        raise UserError(f"--width {width}: expected at least 1")
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise UserError(f"--memory-gb {memory_gb:g}: expected a number above 0")
    if goal is not None:
        check_goal(goal)
    parts = open_parts(embeddings, ids=ids)
    config: dict[str, Any] = {"factory": factory, "width": width, "rerank": rerank}
    details: dict[str, Any] = {"split": parts.manifest.config.get("split", "catalog")}
    memory = int(memory_gb * 2**30) if memory_gb else psutil.virtual_memory().available // 2
    if bytes_to_build(parts) > memory:
        if goal is not None:
            raise UserError(
                f"{embeddings}: takes {bytes_to_build(parts) / 2**30:.1f} GiB and may take "
                f"{memory / 2**30:.1f}; tuning holds all of it: tune embeddings of some of the shards, and "
                "build all with the --factory that was taken"
            )
        build_from_parts(
            parts,
            out,
            factory=factory,
            indexed_width=width,
            rerank=rerank,
            memory_bytes=memory,
            parents=_ancestors(parts, out),
            config=config,
            details=details,
            overwrite=overwrite,
        )
        remove_frontier(out)
        return ProductIndex.load(out, device="cpu")
    loaded = read_embeddings(embeddings, ids=ids)
    columns = attributes_of(parts, loaded.metadata, loaded.ids)
    frontier: Frontier | None = None
    if goal is not None:
        index, frontier = tuned_index(
            loaded.ids,
            loaded.vectors,
            query_vectors(loaded, queries, report),
            goal,
            attributes=columns,
            indexed_width=width,
            rerank=rerank,
            key=parts.key,
            report=report,
        )
        config |= {"factory": index.factory, "goal": asdict(goal)}
        details["tuning"] = frontier.to_dict()
    else:
        index = ProductIndex.build(
            loaded.ids,
            loaded.vectors,
            factory=factory,
            attributes=columns,
            indexed_width=width,
            rerank=rerank,
            key=parts.key,
        )
    index.save(
        out,
        parents=_ancestors(replace(parts, manifest=loaded.manifest), out),
        config=config,
        counts={"in": len(loaded.ids), "out": len(index), "dropped": {}},
        details=details,
        overwrite=overwrite,
    )
    remove_frontier(out)
    if frontier is not None:
        frontier.write(out)
    return index


def _ancestors(parts: Parts, out: Path) -> list[Parent]:
    """The embeddings that an index is made from, and what they were made from."""
    own = Parent(
        kind="embeddings",
        fingerprint=parts.manifest.fingerprint,
        path=relative_path(out, parts.folder),
    )
    return [
        own,
        *(
            replace(parent, path=relative_path(out, joined(parts.folder, parent.path)))
            for parent in parts.manifest.parents
        ),
    ]


def upsert_embeddings(
    index: CatalogueIndex,
    embeddings: Path,
    *,
    ids: str | None = None,
    accept_encoder: bool = False,
) -> int:
    """Upsert a folder of embeddings with its attributes; returns how many there are.

    `ids` as in `build_index`. Raises `UserError` when another encoder made them than made the index, when
    the encoder of one of the two is not known, unless `accept_encoder` says that it is the same, and when
    they are of the other side.
    """
    loaded = read_embeddings(embeddings, ids=ids)
    if loaded.parts.key != index.key:
        family = loaded.manifest.details["family"]
        raise UserError(
            f"{embeddings}: holds {family}, and this index has the column '{index.key}'"
        )
    theirs, ours = loaded.manifest.encoder, encoder_of(index)
    if theirs is not None:
        check_encoder(index, theirs)
    if (theirs is None) != (ours is None) and not accept_encoder:
        raise UserError(
            f"{embeddings}: was made by encoder {theirs or 'unknown'}, and the index by "
            f"{ours or 'unknown'}; if they are the same, say so with --accept-encoder"
        )
    index.upsert(
        loaded.ids, loaded.vectors, attributes_of(loaded.parts, loaded.metadata, loaded.ids)
    )
    return len(loaded.ids)


def _one_of(title: str | None, text: str | None) -> str | None:
    if title and text:
        raise UserError("give title or text, not both: they are the same thing")
    return title or text


def _rows_by_id(reader: ShardReader) -> dict[str, int]:
    if reader.family == "products":
        return {ids[0]: row for row, ids in enumerate(reader.product_ids)}
    return {content_id: row for row, content_id in enumerate(reader.content_ids)}


def _open_catalog(shards: Place | None, index: CatalogueIndex) -> ShardReader | None:
    """The shards of what an index holds, for pictures; matches do without where they are gone."""
    split = index.manifest.details.get("split", "catalog") if index.manifest else "catalog"
    try:
        return open_split(shards, split) if shards else None
    except UserError:
        return None


def _pushed_encoder(index: MilvusIndex) -> Path:
    found = index.find_parent("encoder")
    if isinstance(found, Path):
        return found
    record = index.manifest.parent("encoder") if index.manifest else None
    where = f"{record.fingerprint}, then at {record.path}" if record else "unknown"
    raise UserError(
        f"collection '{index.collection}' was made with encoder {where}, which is not there now; give "
        "it with --encoder"
    )


def _find_encoder(index: Path, manifest: Manifest) -> Path:
    """The encoder of an index; the manifest is its generation's, since the folder's may be older."""
    record = manifest.parent("encoder")
    found = find_recorded(index, record)
    if isinstance(found, Path):
        return found
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
