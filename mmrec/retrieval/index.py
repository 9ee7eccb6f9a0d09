"""ProductIndex: which products lie nearest to a query, by inner product, on FAISS; changed while it serves.

Shape letters: Q queries, N products, K matches, D embedding width.

An index is an immutable base, a small delta of later upserts, and tombstones; see view.py for how they
are searched, generations.py and changes.py for how they lie on disk. What FAISS calls an id is a row, and
no row leaves these modules: callers hand in product ids and get product ids.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int64

from mmrec.errors import UserError
from mmrec.manifest import Manifest, Parent, fingerprint_of, read_manifest
from mmrec.retrieval.base import (
    Base,
    base_in_memory,
    finish_base,
    narrowed,
    open_live_base,
    write_files,
)
from mmrec.retrieval.changes import Change, hash_changes, read_changes, write_change
from mmrec.retrieval.drift import (
    IndexStatus,
    imbalance_now,
    note_lists,
    status_of,
    upserted_error,
)
from mmrec.retrieval.faiss_base import (
    build_base,
    carried_over,
    imbalance_of,
    keeps_vectors,
    list_numbers,
    list_sizes,
    quantization_error,
    reason_of,
)
from mmrec.retrieval.generations import (
    Generation,
    has_live_generation,
    live_generation,
    lock_writer,
    manifest_of,
    next_generation,
    published_generation,
)
from mmrec.retrieval.gpu import Device
from mmrec.retrieval.intake import (
    check_ids,
    checked_indexed,
    checked_k,
    checked_queries,
    checked_vectors,
    fitted_attributes,
    joined_attributes,
    name_ids,
)
from mmrec.retrieval.pictures import (
    carry_pictures,
    forget_pictures,
    keep_pictures,
    kept_picture,
)
from mmrec.retrieval.view import View


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The products nearest to each query, best first."""

    ids: list[list[str]]
    """K product ids for each query; fewer where an approximate index came upon fewer."""
    scores: Float32[np.ndarray, "Q K"]
    """The inner products of the same matches; -inf past the end of a shorter row of ids."""


class ProductIndex:
    """An index of product vectors, joined to ids and attributes.

    Made by `build` or `load`. Searching from several threads at once is safe, also while another thread
    upserts, deletes, compacts or refreshes. A saved index has one writer at a time: the first change
    makes this object the writer until `close`, or the end of a `with` block.
    """

    def __init__(self, base: Base, *, manifest: Manifest | None = None) -> None:
        """Take a base as it is; for `build` and `load` to call."""
        self.manifest = manifest
        """None until the index is saved."""
        self._view = View.of(base)
        self._facts: list[dict[str, Any]] = []
        self._lists: dict[str, int] = {}
        self._folder: Path | None = None
        self._device: Device = "cpu"
        self._cagra = False
        self._changing = threading.RLock()
        self._writer: IO[str] | None = None

    # ------------------------------------------------------------------------- building and opening

    @classmethod
    def build(
        cls,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        *,
        factory: str = "Flat",
        attributes: pa.Table | None = None,
        indexed_width: int | None = None,
        keep_vectors: bool = False,
        rerank: bool = False,
        key: str = "product_id",
    ) -> "ProductIndex":
        """Index unit-length vectors, in memory.

        `factory` is a FAISS factory string: "Flat" is exact; "HNSW32", "IVF64,Flat" and
        "IVF64,PQ16" trade recall for speed or memory, and are trained on the vectors where they
        need training. `attributes` has a product_id column (or `key`) that holds every id, in any
        order. `indexed_width` indexes the leading components alone, for vectors trained to be cut
        (Matryoshka); `keep_vectors` keeps all of them as float16 beside the index, and `rerank` does
        and scores matches again by them.

        Raises `UserError`, naming ids, for duplicate ids and for vectors that are not finite or not
        of unit length; for products without a row of attributes; and for a factory string that
        FAISS does not know, or that needs more vectors to train on.
        """
        return cls.assemble(
            ids,
            vectors,
            lambda indexed: (build_base(indexed, factory), factory, {}),
            attributes=attributes,
            indexed_width=indexed_width,
            keep_vectors=keep_vectors,
            rerank=rerank,
            key=key,
        )

    @classmethod
    def assemble(
        cls,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        make: Callable[[Float32[np.ndarray, "N I"]], tuple[Any, str, dict[str, float]]],
        *,
        attributes: pa.Table | None = None,
        indexed_width: int | None = None,
        keep_vectors: bool = False,
        rerank: bool = False,
        key: str = "product_id",
    ) -> "ProductIndex":
        """Index vectors as `build` does, with a FAISS index of the caller's making.

        `make` is handed the checked vectors at the indexed width and returns a FAISS index of inner
        products that holds them in this order, its factory string, and the search parameters that were
        chosen for it, if any.
        """
        vectors = checked_vectors(ids, vectors)
        width = vectors.shape[1]
        indexed = checked_indexed(ids, vectors, width if indexed_width is None else indexed_width)
        products = joined_attributes(ids, attributes, key)
        index, factory, search = make(indexed)
        record = Generation(
            factory=factory,
            width=width,
            indexed_width=indexed.shape[1],
            count=len(ids),
            key=key,
            rerank=rerank,
            quantization_error=quantization_error(index, indexed) or 0.0,
            imbalance=imbalance_of(list_sizes(index)),
            files={},
            search=search,
        )
        store = vectors.astype(np.float16) if keep_vectors or rerank else None
        return cls(base_in_memory(record, index, products, store))

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: Device = "auto",
        cagra: bool = False,
        verify: bool = False,
    ) -> "ProductIndex":
        """Open a saved index: its files are mapped, not read, and all changes since are applied.

        `device`: "cpu"; "cuda" for a copy on every GPU; "auto" for that where there is a GPU and
        it takes this kind of index, and else the CPU. On a GPU HNSW becomes a CAGRA graph; `cagra`
        makes one of a flat index, too. `verify` reads the files once more to compare
        their hashes; sizes are always compared.

        Raises `UserError` naming the file when one is missing, truncated or not what was saved, and
        when "cuda" is asked for and cannot be had.
        """
        folder = Path(folder)
        read_manifest(folder, "index")
        base, manifest = open_live_base(folder, device, cagra=cagra, verify=verify)
        opened = cls(base, manifest=manifest)
        opened._folder, opened._device, opened._cagra = folder, device, cagra
        opened._read_on()
        return opened

    def save(
        self,
        out: Path | str,
        *,
        parents: Sequence[Parent] = (),
        config: Mapping[str, Any] | None = None,
        counts: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Manifest:
        """Publish the index as a folder, and go on as one that was opened there.

        Over an index that is there already (`overwrite`) it becomes the next generation, so that
        readers of the old one go on. `details` go into the manifest, for what was measured of this
        index. Raises `UserError` when `out` is there and is not to be overwritten, and when another
        writer holds it.
        """
        out = Path(out)
        own = self._folder is not None and _is_same_folder(self._folder, out)
        with self._changing:
            was_writer = own and self._writer is not None
            if own and overwrite and has_live_generation(out):
                self._become_writer()  # What others changed since is not to be lost.
            base = self._folded()
            is_writer = own and self._writer is not None
            with published_generation(out, overwrite=overwrite, is_writer=is_writer) as generation:
                record = write_files(generation, base)
                if own:
                    self._carry_pictures(generation)
                manifest = manifest_of(
                    record,
                    parents=list(parents),
                    config=dict(config or {}),
                    counts=dict(counts or {"out": len(self)}),
                    details=dict(details or {}),
                )
                finish_base(generation, record, manifest)
        with self._changing:
            if not was_writer:
                self.close()
            # What this object was opened from, perhaps with another encoder, is behind it.
            self._folder, self.manifest = out, None
            self._open_live()
        return manifest

    def close(self) -> None:
        """Stop being the writer; the index can still be searched, and another may change it."""
        with self._changing:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> "ProductIndex":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------- what it holds

    def __len__(self) -> int:
        """The number of products."""
        return len(self._view)

    @property
    def factory(self) -> str:
        """The FAISS factory string that it was built with."""
        return self._record.factory

    @property
    def width(self) -> int:
        """D, the width of its vectors and of queries."""
        return self._record.width

    @property
    def key(self) -> str:
        """The name of the id column: product_id, or content_id in an index of contents."""
        return self._record.key

    @property
    def rerank(self) -> bool:
        """Whether matches are scored again at full width unless a search says otherwise."""
        return self._record.rerank

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where searches run."""
        return self._view.base.device

    @property
    def fingerprint(self) -> str | None:
        """Names all that a saved index holds, changes too, as of now; None while it is in memory."""
        with self._changing:
            path = self._view.base.path
            if path is None or self.manifest is None:
                return None
            changes = hash_changes(path.parent, len(self._facts))
            return fingerprint_of({"index": self.manifest.fingerprint, "changes": changes})

    @property
    def keeps_vectors(self) -> bool:
        """Whether `vectors` gives back exactly what was indexed."""
        record = self._record
        return record.indexed_width == record.width and keeps_vectors(self._view.base.index)

    @property
    def ids(self) -> list[str]:
        """Every product's id: a list made on each call."""
        view = self._view
        old = view.base.keys.take(view.live_rows()).tolist()
        return old + view.delta.ids[view.delta.live_rows()].tolist()

    @property
    def products(self) -> pa.Table:
        """Id and attributes of every product, in the order of `ids`: a table made on each call."""
        return self._view.products()

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the id and the attributes."""
        schemas = [self._view.base.products.schema, self._view.delta.table.schema]
        return pa.unify_schemas(schemas, promote_options="permissive")

    def __contains__(self, product_id: str) -> bool:
        return bool(self._view.rows_of([product_id])[0] >= 0)

    def attributes(self, product_id: str) -> dict[str, Any]:
        """A product's title and other columns. Raises `UserError` for an id that is not here."""
        return self.attributes_of([product_id])[0]

    def attributes_of(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The same of several products, in the order of `ids`."""
        view = self._view
        found = view.attributes_of(_rows_of(view, ids))
        return [{n: v for n, v in columns.items() if n != self.key} for columns in found]

    def picture(self, product_id: str) -> bytes | None:
        """The JPEG that a product was upserted with, b"" where it has none; None where nothing was said."""
        path = self._view.base.path
        return None if path is None else kept_picture(path.parent, product_id)

    def vectors(self, ids: Sequence[str]) -> Float32[np.ndarray, "Q D"]:
        """The vectors of products, in the order of `ids`; approximate where the index compresses.

        Raises `UserError` for an id that is not here, and for an index that keeps no vectors.
        """
        view, record = self._view, self._record
        rows = _rows_of(view, ids)
        if record.indexed_width < record.width and view.base.store is None:
            raise UserError(
                f"this index keeps {record.indexed_width} of {record.width} components and gives no "
                "vectors back; build it with --rerank"
            )
        try:
            return view.vectors(rows)
        except RuntimeError as error:
            raise UserError(
                f"an index of factory '{self.factory}' does not give its vectors back "
                f"({reason_of(error)})"
            ) from None

    def status(self) -> IndexStatus:
        """Counts, drift since the build, and what should be done about it."""
        with self._changing:
            view = self._view
            held = view.base.path
            return status_of(
                self._record,
                self._facts,
                generation=held.parent.name if held else "in memory",
                delta=len(view.delta),
                tombstones=view.num_dead,
                imbalance=imbalance_now(view.base, view.dead, self._lists),
            )

    @property
    def _record(self) -> Generation:
        return self._view.base.record

    # ----------------------------------------------------------------------------------- searching

    def search(
        self,
        queries: Float[np.ndarray, "Q D"],
        k: int,
        *,
        where: str | None = None,
        rerank: bool | None = None,
    ) -> SearchResult:
        """The k products of highest inner product with each query; k is cut to what there is.

        `where` is a condition on the attributes, such as "price < 30 and category = 'shoes'": see
        filters.py. What few products meet is searched exactly, where vectors are kept. `rerank`
        scores matches again by vectors at full width.

        Raises `UserError` for k < 1, for queries of another width or that are not finite, for a
        condition that cannot be understood, and for `rerank` where no vectors are kept for it.
        """
        k = checked_k(k)
        view = self._view
        queries = checked_queries(queries, view.base.record.width)
        rerank = view.base.record.rerank if rerank is None else rerank
        if rerank and view.base.store is None:
            raise UserError("this index keeps no vectors to score by; build it with --rerank")
        selection = view.select(where) if where is not None else None
        scores, rows = view.search(queries, k, selection=selection, rerank=rerank)
        return SearchResult(ids=_ids_of(view, rows), scores=scores)

    # ------------------------------------------------------------------------------------ changing

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        attributes: pa.Table | None = None,
        *,
        pictures: Sequence[bytes] | None = None,
    ) -> None:
        """Add products, or replace those that are here; on the disk when this returns.

        `attributes` holds a row for each id, as in `build`; a column that it lacks is null, a new
        column is added. Without it products that are here keep theirs. `pictures` holds a JPEG for each
        id, b"" for one that has none, for `picture` to give back; an index in memory keeps none.

        Raises `UserError`, naming ids, for what `build` refuses; for a column of another type than it
        has here; and while another writer holds the index. Nothing is changed then.
        """
        if not len(ids):
            return
        vectors = checked_vectors(ids, vectors, width=self.width)
        indexed = checked_indexed(ids, vectors, self._record.indexed_width)
        with self._changing:
            self._become_writer()
            if attributes is None:
                products = self._known_attributes(ids)
            else:
                products = joined_attributes(ids, attributes, self.key)
            products = fitted_attributes(products, self.schema)
            facts = self._measured(indexed)
            change = Change(kind="upsert", products=products, vectors=vectors, facts=facts)
            self._change(change, pictures)

    def delete(self, ids: Sequence[str]) -> int:
        """Take products out; on the disk when this returns. Ids that are not here are passed over.

        Returns how many were here. Raises `UserError` while another writer holds the index.
        """
        check_ids(ids)
        with self._changing:
            self._become_writer()
            rows = self._view.rows_of(ids)
            here = list(dict.fromkeys(np.array(ids, object)[rows >= 0].tolist()))
            if here:
                gone = pa.table({self.key: pa.array(here, pa.string())})
                self._change(Change(kind="delete", products=gone))
            return len(here)

    def compact(self) -> bool:
        """Make a new generation whose base holds everything, without tombstones.

        Codes are carried over and nothing is trained. Searches go on meanwhile, changes wait.
        Returns whether there was anything to do. Raises `UserError` while another writer holds the
        index.
        """
        with self._changing:
            self._become_writer()
            base = self._folded()
            if base is self._view.base:
                return False
            if self._folder is None:
                self._take(base, self.manifest)
                return True
            with next_generation(self._folder) as generation:
                assert self.manifest is not None
                self._carry_pictures(generation)
                finish_base(generation, write_files(generation, base), self.manifest)
            self._open_live()
            return True

    def refresh(self) -> bool:
        """See what a writer has changed since; until then this object's answers stay as they are.

        Returns whether anything had changed. Raises `UserError` when the index was built anew with
        another encoder: queries of the old one do not fit it.
        """
        with self._changing:
            if self._folder is None or self._writer is not None:
                return False
            path = self._view.base.path
            if path is None or live_generation(self._folder) != path.parent:
                self._open_live()
                return True
            return self._read_on()

    def _become_writer(self) -> None:
        if self._folder is not None and self._writer is None:
            writer = lock_writer(self._folder)
            try:
                self.refresh()
            except BaseException:
                writer.close()
                raise
            self._writer = writer

    def _change(self, change: Change, pictures: Sequence[bytes] | None = None) -> None:
        """Write a change, then show it."""
        path = self._view.base.path
        if self._folder is not None and path is not None:
            if pictures is not None:
                keep_pictures(path.parent, change.ids, pictures)
            write_change(path.parent, len(self._facts) + 1, self._record.fingerprint, change)
            if pictures is None:
                forget_pictures(path.parent, change.ids)
        self._show(change)

    def _show(self, change: Change) -> None:
        self._view = self._view.changed(change)
        self._facts.append(change.facts)
        note_lists(self._lists, change)

    def _read_on(self) -> bool:
        """Apply changes that were written since."""
        path = self._view.base.path
        assert path is not None
        before = len(self._facts)
        for change in read_changes(path.parent, self._record.fingerprint, after=before):
            self._show(change)
        return len(self._facts) > before

    def _open_live(self) -> None:
        """Go on with the live generation."""
        assert self._folder is not None
        base, manifest = open_live_base(self._folder, self._device, cagra=self._cagra)
        _check_same_encoder(self.manifest, manifest, self._folder)
        self._take(base, manifest)
        self._read_on()

    def _take(self, base: Base, manifest: Manifest | None) -> None:
        self._view, self.manifest = View.of(base), manifest
        self._facts, self._lists = [], {}

    def _carry_pictures(self, generation: Path) -> None:
        path = self._view.base.path
        if path is not None:
            carry_pictures(path.parent, generation)

    def _folded(self) -> Base:
        """The base with all changes in it: a new one in memory, or as it is where there are none."""
        view = self._view
        if not view.num_dead and not view.delta.count:
            return view.base
        old, new = view.live_rows(), view.delta.live_rows()
        added = view.delta.vectors[new]
        indexed = narrowed(added, self._record.indexed_width)
        index = carried_over(view.base.index, old, indexed, path=view.base.path)
        store = view.base.store
        if store is not None:
            store = np.concatenate([store[old], added.astype(np.float16)])
        error, vectors = upserted_error(self._record, self._facts)
        record = replace(
            self._record, count=len(view), upserted_error=error, upserted_vectors=vectors
        )
        return base_in_memory(record, index, view.products(), store)

    def _known_attributes(self, ids: Sequence[str]) -> pa.Table:
        """What is known of products; of new ones the id alone."""
        rows = self._view.rows_of(ids).tolist()
        known = [self._view.attributes(row) if row >= 0 else {} for row in rows]
        own = [{**columns, self.key: id_} for id_, columns in zip(ids, known, strict=True)]
        return pa.Table.from_pylist(own, schema=self.schema)

    def _measured(self, indexed: Float32[np.ndarray, "N D"]) -> dict[str, Any]:
        """How well new vectors fit what the base was trained on."""
        index = self._view.base.index
        facts: dict[str, Any] = {"vectors": len(indexed)}
        if not keeps_vectors(index):
            facts["quantization_error"] = quantization_error(index, indexed)
        if (lists := list_numbers(index, indexed)) is not None:
            facts["lists"] = lists.tolist()
        return facts


def measure_recall(
    index: ProductIndex,
    queries: Float[np.ndarray, "Q D"],
    k: int,
    *,
    vectors: Float[np.ndarray, "N D"] | None = None,
) -> float:
    """The share of each query's true k nearest products that `index` returns: a mean.

    The truth is exact inner product over `vectors`, in the order of `index.ids`: what the index was
    built from. Without them the index's own vectors serve. Raises `UserError` when it has only
    compressed ones: measured against these, recall would look better than it is.
    """
    if not len(queries):
        raise UserError("recall cannot be measured without queries")
    ids = index.ids
    if vectors is None:
        if not index.keeps_vectors:
            raise UserError(
                f"an index of factory '{index.factory}' does not keep its vectors as they were; "
                "hand measure_recall those that it was built from"
            )
        vectors = index.vectors(ids)
    found = index.search(queries, k).ids
    exact = ProductIndex.build(ids, vectors).search(queries, k).ids
    pairs = zip(found, exact, strict=True)
    return float(np.mean([len(set(ours) & set(true)) / len(true) for ours, true in pairs]))


def _is_same_folder(one: Path, other: Path) -> bool:
    """Whether both lead to one folder; what is there no more is like no other."""
    return one.exists() and other.exists() and one.samefile(other)


def _ids_of(view: View, rows: Int64[np.ndarray, "Q K"]) -> list[list[str]]:
    """The ids of matches; a row ends where nothing more was found."""
    if (rows >= 0).all():
        return view.ids_of(rows.ravel()).reshape(rows.shape).tolist()
    return [view.ids_of(found[found >= 0]).tolist() for found in rows]


def _rows_of(view: View, ids: Sequence[str]) -> Int64[np.ndarray, " Q"]:
    rows = view.rows_of(ids)
    if (rows < 0).any():
        missing = [ids[place] for place in np.flatnonzero(rows < 0).tolist()]
        raise UserError(f"not in this index of {len(view)} products: {name_ids(missing)}")
    return rows


def _check_same_encoder(before: Manifest | None, now: Manifest, folder: Path) -> None:
    """Refuse to go on with an index that was built anew in another encoder's space."""
    old, new = before.encoder if before else None, now.encoder
    if old and new and old != new:
        raise UserError(
            f"{folder}: was built with encoder {old} when it was opened, and is built with "
            f"{new} now; load it again, with that encoder"
        )
