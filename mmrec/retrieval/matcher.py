"""Matcher: what a notebook holds. A video, pictures or words in; matched products out.

from mmrec import Matcher
matcher = Matcher.load("runs/demo/index")
matcher.match(video="clip.mp4", title="love this NOVA find", k=5)

Shape letters: Q queries, D embedding width.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import psutil
import torch
from jaxtyping import Float32

from mmrec.data.batches import collate_items, item_loader
from mmrec.data.media import Source, encode_jpeg, resize_shorter
from mmrec.data.shards import ShardReader, frame_name, image_name
from mmrec.data.storage import Place, joined
from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    check_output,
    find_recorded,
    read_manifest,
    relative_path,
)
from mmrec.model.encoder import VIEWS, Encoder, Side
from mmrec.retrieval.backend import CatalogueIndex
from mmrec.retrieval.embed import open_split, pick_device, read_embeddings
from mmrec.retrieval.frontier import Frontier, remove_frontier
from mmrec.retrieval.index import Device, ProductIndex
from mmrec.retrieval.intake import checked_k
from mmrec.retrieval.match_gallery import THUMBNAIL
from mmrec.retrieval.matches import Match, Matches, Why
from mmrec.retrieval.milvus import COLLECTION, MilvusIndex
from mmrec.retrieval.out_of_core import build_from_parts, bytes_to_build
from mmrec.retrieval.parts import Parts, attributes_of, open_parts
from mmrec.retrieval.queries import (
    EncodedQuery,
    Ids,
    PictureLists,
    Query,
    Videos,
    Words,
    embed_parts_of,
    encode,
    is_given,
    listed,
    preprocessed,
    queries_of,
    read_query,
)
from mmrec.retrieval.tuning import TuningGoal, check_goal, query_vectors, tuned_index

if TYPE_CHECKING:
    from mmrec.retrieval.remote import RemoteMatcher

_READ = 32
"""Queries of a list that are read before they are embedded together."""
_SEARCHED = 1_024
"""Queries of a list that are searched for together."""


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

    @classmethod
    def connect(cls, url: str, token: str | None = None) -> "RemoteMatcher":
        """A matcher with the same `match`, answered by `mmrec serve` at `url`; needs the extra `serve`."""
        from mmrec.retrieval.remote import RemoteMatcher

        return RemoteMatcher(url, token=token)

    def has_picture(self, id_: str) -> bool:
        """Whether `picture_of` has something."""
        kept = self._kept_picture(id_)
        if kept is not None:
            return bool(kept)
        row = self._picture_rows.get(id_)
        if self._catalog is None or row is None:
            return False
        first = image_name(0) if self._catalog.family == "products" else frame_name(0)
        return first in self._catalog.names(row)

    def picture_of(self, id_: str) -> bytes | None:
        """The first picture of what the index holds, as it was upserted with, or as its shards have it.

        JPEG, but in shards that others wrote.
        """
        return self._picture_of(id_)

    # Without arguments either fits, and either is refused.
    @overload
    def match(  # pyright: ignore[reportOverlappingOverload]
        self,
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
        text: str | None = None,
        product_id: str | None = None,
        content_id: str | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> Matches: ...

    @overload
    def match(
        self,
        *,
        video: Videos | None = None,
        images: PictureLists | tuple[()] = (),
        title: Words | None = None,
        text: Words | None = None,
        product_id: Ids | None = None,
        content_id: Ids | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> list[Matches]: ...

    def match(
        self,
        *,
        video: Source | Videos | None = None,
        images: Source | Sequence[Source] | PictureLists = (),
        title: str | Words | None = None,
        text: str | Words | None = None,
        product_id: str | Ids | None = None,
        content_id: str | Ids | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> Matches | list[Matches]:
        """The k nearest to a video, or pictures, with or without words, or words alone.

            matcher.match(video="clip.mp4", title="love this mug", k=5, where="price < 30")
            matcher.match(images=["front.jpg", "back.jpg"])            # one query of two pictures
            matcher.match(images=[["a.jpg"], ["b.jpg", "c.jpg"]])      # two queries
            matcher.match(video=["a.mp4", "b.mp4"], title=["a mug", None])
            matcher.match(product_id="p00017")                         # products like a product

        Args:
            video: A path, URL or bytes of a video; or a list of them.
            images: Paths, URLs or bytes of a query's pictures instead, or one alone; a list of lists is
                many queries.
            title: A content's title; or a list.
            text: The same, under the name of what a person types.
            product_id: Something that the index holds, to find what is near it, without itself; or a list.
            content_id: The same, for an index of contents.
            k: The most matches of a query.
            where: A condition on attributes: "price < 30 and category = 'shoes' and available".
            side: Whether the query is a content or a product, where it is not the other side of what the
                index holds.
            rerank: As in `ProductIndex.search`.

        Returns `Matches`, or a list of them for lists, which have an entry for each query, None where it
        has none, and are read and embedded some at a time.

        Raises `UserError` when nothing is given, both words are, a file cannot be read (named, and of a list
        with its place, as `video[3]`), an id is not here, or the condition cannot be understood.
        """
        ids = self._ids_asked(product_id, content_id)
        if side not in (None, *VIEWS):
            raise UserError(f"side '{side}': expected {' or '.join(VIEWS)}")
        if ids is not None:
            if any(map(is_given, (video, images, title, text))):
                raise UserError(f"give {self.index.key}, or a video, images or text, not both")
            found = self._match_ids(ids, k=k, where=where, rerank=rerank)
            return found[0] if isinstance(ids, str) else found
        queries, many = queries_of(video, images, title, text)
        found = self._match_queries(queries, k=k, where=where, side=side, rerank=rerank)
        return found if many else found[0]

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
        """The unit vectors of several queries, in one batch; of one without pictures and title it is zero."""
        return self._stacked(self.encode_many(pictures, titles, side=side))

    def encode_many(
        self,
        pictures: Sequence[Sequence[np.ndarray]],
        titles: Sequence[str | None],
        *,
        side: Side | None = None,
    ) -> list[EncodedQuery]:
        """The same with what the towers made of each part, which `why` goes by."""
        return self._encode(
            [preprocessed(own, self.encoder.preprocess) for own in pictures], titles, side
        )

    def encode_held(self, ids: Sequence[str]) -> list[EncodedQuery]:
        """What the index holds, encoded anew from its shards.

        Raises `UserError` where an id is not in shards that the index remembers, or was replaced since.
        """
        for id_ in ids:
            if id_ not in self._picture_rows or self._kept_picture(id_) is not None:
                raise UserError(
                    f"{id_}: its pictures and title are not in the shards that the index remembers; give "
                    "them as images and text"
                )
        assert self._catalog is not None
        loader = item_loader(
            self._catalog,
            [self._picture_rows[id_] for id_ in ids],
            preprocess=self.encoder.preprocess,
            tokenizer=self.encoder.tokenizer,
            num_frames=self.encoder.config.num_frames,
            batch_size=_READ,
            num_workers=0,
        )
        side: Side = "product" if self.index.key == "product_id" else "content"
        width = self.index.width
        return [
            query for batch in loader for query in encode(self.encoder, batch, side, width=width)
        ]

    def read(
        self, video: Source | None = None, images: Sequence[Source] | Source = ()
    ) -> list[np.ndarray]:
        """The frames of a video, or pictures, as the encoder takes them: (H, W, 3) uint8 each.

        Raises `UserError` when both are given, or a file cannot be read.
        """
        own = [images] if isinstance(images, str | Path | bytes) else list(images)
        if video is None and not own:
            return []
        return read_query(Query(video=video, images=own), self.encoder.config.num_frames)

    def matches_of(self, ids: Sequence[str], scores: Sequence[float] | np.ndarray) -> list[Match]:
        """What the index and the shards know of the ids that a search found, with their scores."""
        attributes = self.index.attributes_of(ids)
        return [
            Match(
                product_id=id_,
                score=float(score),
                title=own.pop("title", None),
                attributes=own,
                image=self._picture_of(id_),
            )
            for id_, score, own in zip(ids, scores, attributes, strict=False)
        ]

    def why(self, query: EncodedQuery, ids: Sequence[str]) -> list[Why]:
        """What of a query carried its match with each of some products; `Matches.why` asks this.

        Raises `UserError` as `product_vectors` does.
        """
        products = self.product_vectors(ids)
        parts = embed_parts_of(self.encoder, query, width=self.index.width)
        scores = (products @ parts.T).tolist()
        has_frames, has_title = len(query.frames) > 0, query.title is not None
        return [
            Why(
                product_id=id_,
                score=whole,
                frame_losses=tuple(whole - rest for rest in without),
                video_alone=video if has_frames else None,
                title_alone=title if has_title else None,
            )
            for id_, (whole, video, title, *without) in zip(ids, scores, strict=True)
        ]

    def product_vectors(self, ids: Sequence[str]) -> Float32[np.ndarray, "Q D"]:
        """Unit vectors of what the index holds: its own, or made anew from the shards where it keeps none.

        Raises `UserError` for an id that is not here, and where neither can be had.
        """
        try:
            vectors = self.index.vectors(ids)
        except UserError as error:
            missing = [id_ for id_ in ids if id_ not in self.index]
            if missing or not all(id_ in self._picture_rows for id_ in ids):
                raise UserError(
                    str(error)
                    if missing
                    else f"{error}, and its shards are not where it remembers them; put them back, or build "
                    "it with `mmrec index build --rerank`"
                ) from None
            return self._stacked(self.encode_held(ids))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _match_queries(
        self,
        queries: Sequence[Query],
        *,
        k: int,
        where: str | None,
        side: Side | None,
        rerank: bool | None,
    ) -> list[Matches]:
        """Read and embed some at a time; the pictures of one query and no more lie in memory whole."""
        encoded: list[EncodedQuery] = []
        frames: list[list[bytes]] = []
        for start in range(0, len(queries), _READ):
            part = queries[start : start + _READ]
            tensors = []
            for query in part:
                pictures = read_query(query, self.encoder.config.num_frames)
                tensors.append(preprocessed(pictures, self.encoder.preprocess))
                frames.append([encode_jpeg(resize_shorter(p, THUMBNAIL), 85) for p in pictures])
            encoded += self._encode(tensors, [query.title for query in part], side)
        found = self._search(self._stacked(encoded), k, where, rerank)
        return [
            replace(own, title=query.title, frames=shown, explainer=partial(self._why_one, item))
            for own, query, item, shown in zip(found, queries, encoded, frames, strict=True)
        ]

    def _match_ids(
        self, ids: str | Sequence[str], *, k: int, where: str | None, rerank: bool | None
    ) -> list[Matches]:
        k = checked_k(k)
        asked = [ids] if isinstance(ids, str) else ids
        vectors = self.index.vectors(asked)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        titles = [own.get("title") for own in self.index.attributes_of(asked)]
        pictures = [self._picture_of(id_) for id_ in asked]
        found = self._search(vectors, k + 1, where, rerank)
        return [
            replace(
                own,
                matches=[match for match in own if match.product_id != id_][:k],
                title=title,
                frames=[picture] if picture else [],
                explainer=partial(self._why_held, id_),
            )
            for own, id_, title, picture in zip(found, asked, titles, pictures, strict=True)
        ]

    def _search(
        self, vectors: Float32[np.ndarray, "Q D"], k: int, where: str | None, rerank: bool | None
    ) -> list[Matches]:
        """What the index has for each query, some at a time, and each product looked up once."""
        found: list[Matches] = []
        for start in range(0, len(vectors), _SEARCHED):
            part = vectors[start : start + _SEARCHED]
            result = self.index.search(part, k, where=where, rerank=rerank)
            ids = list(dict.fromkeys(id_ for row in result.ids for id_ in row))
            held = {match.product_id: match for match in self.matches_of(ids, np.zeros(len(ids)))}
            for row, scores in zip(result.ids, result.scores, strict=True):
                pairs = zip(row, scores, strict=False)  # Scores go on where ids have ended.
                matches = [replace(held[id_], score=float(score)) for id_, score in pairs]
                found.append(Matches(matches=matches, key=self.index.key, schema=self.index.schema))
        return found

    def _ids_asked(self, product_id: Any, content_id: Any) -> str | list[str] | None:
        """The ids to find neighbours of, under the name that this index has for them."""
        for name, value in {"product_id": product_id, "content_id": content_id}.items():
            if value is None:
                continue
            if name != self.index.key:
                held = "contents" if self.index.key == "content_id" else "products"
                raise UserError(
                    f"{name}: this index holds {held}; give the {self.index.key} of one"
                )
            ids = value if isinstance(value, str) else listed(value)
            if ids is None or not all(isinstance(id_, str) for id_ in ids):
                raise UserError(f"{name}: expected ids, as text, found {value!r}")
            return ids
        return None

    def _encode(
        self,
        tensors: Sequence[Sequence[torch.Tensor]],
        titles: Sequence[str | None],
        side: Side | None,
    ) -> list[EncodedQuery]:
        if not len(tensors):
            return []
        items = collate_items(
            tensors,
            titles,
            tokenizer=self.encoder.tokenizer,
            size=self.encoder.preprocess.size,
        )
        # An index may hold the first numbers of nested embeddings alone.
        return encode(self.encoder, items, side or self.side, width=self.index.width)

    def _stacked(self, encoded: Sequence[EncodedQuery]) -> Float32[np.ndarray, "Q D"]:
        vectors = [query.vector for query in encoded]
        return np.stack(vectors) if vectors else np.zeros((0, self.index.width), np.float32)

    def _why_one(self, query: EncodedQuery, id_: str) -> Why:
        return self.why(query, [id_])[0]

    def _why_held(self, asked: str, id_: str) -> Why:
        """The same for a query that was something in the index."""
        return self._why_one(self.encode_held([asked])[0], id_)

    def _picture_of(self, id_: str) -> bytes | None:
        """The first picture, where there is one: tars that others wrote may have words alone."""
        kept = self._kept_picture(id_)
        if kept is not None:
            return kept or None
        if self._catalog is None or id_ not in self._picture_rows:
            return None
        row = self._picture_rows[id_]
        name = image_name(0) if self._catalog.family == "products" else frame_name(0)
        return self._catalog.read(row, [name])[name] if name in self._catalog.names(row) else None

    def _kept_picture(self, id_: str) -> bytes | None:
        """The picture that a product was upserted with; the shards know it with another, or not at all."""
        return self.index.picture(id_) if isinstance(self.index, ProductIndex) else None


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
