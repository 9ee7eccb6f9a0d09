"""MilvusIndex: a catalogue past one machine, in a Milvus collection, behind the interface of ProductIndex.

    mmrec index push --index runs/demo/index --uri http://localhost:19530
    mmrec search --backend milvus --uri http://localhost:19530 --text "love this mug"

The collection's properties hold what a folder's manifest does: the encoder's fingerprint, the lineage and the
columns. A path that ends in .db is for milvus-lite, which answers within this process, and which one process
alone can have open: for trying out, not for serving.

Shape letters: Q queries, N products, K matches, D embedding width.
"""

import base64
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32

from mmrec.data.storage import Place
from mmrec.errors import UserError
from mmrec.manifest import Manifest, Parent, find_recorded
from mmrec.retrieval.index import SearchResult
from mmrec.retrieval.intake import (
    check_ids,
    checked_k,
    checked_queries,
    checked_vectors,
    fitted_attributes,
    joined_attributes,
    name_ids,
)
from mmrec.retrieval.milvus_filters import milvus_filter, quoted
from mmrec.retrieval.milvus_rows import VECTOR, columns_of, from_rows, to_rows

COLLECTION = "products"
MOST_MATCHES = 16_384
"""Milvus's own limit of matches a query, and of rows a page."""
BATCH = 1_000
"""Rows sent or asked for at a time: at 1024 components 4 MB, of 64 MB that Milvus takes."""
KINDS: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "HNSW": {"M": 32, "efConstruction": 200},
    "IVF_FLAT": {"nlist": 1_024},
    "IVF_SQ8": {"nlist": 1_024},
}
"""Milvus's index types that `push` makes, with their parameters."""

_MANIFEST, _SCHEMA, _KIND, _ENCODER = (
    "mmrec.manifest",
    "mmrec.schema",
    "mmrec.kind",
    "mmrec.encoder",
)
_SOURCE = "mmrec.source"
_TIMEOUT_S = 60.0
_CONNECT_S = 10.0
_MOST_RESULTS = 200_000
_KEPT_FILTERS = 32


@dataclass(frozen=True, kw_only=True)
class MilvusStatus:
    """What a collection holds."""

    collection: str
    kind: str
    """Milvus's index type."""
    products: int
    width: int
    encoder: str | None
    """Fingerprint of the encoder that made the vectors."""
    advice: list[str] = field(default_factory=list)
    """Always empty: Milvus compacts by itself, and what its index loses it does not measure."""

    def lines(self) -> list[str]:
        """The status as text."""
        return [
            f"collection {self.collection}, {self.kind} in Milvus",
            f"products: {self.products:,}, {self.width} wide",
            f"encoder: {self.encoder or 'not known'}",
        ]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a collection's properties say."""

    manifest: Manifest
    schema: pa.Schema
    """The catalogue's columns, the id first."""
    kind: str
    source: str
    """Which state of which index it was pushed from."""

    def to_properties(self) -> dict[str, str]:
        """As Milvus keeps them: names and strings."""
        return {
            _MANIFEST: json.dumps(asdict(self.manifest), ensure_ascii=False),
            _SCHEMA: base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            _KIND: self.kind,
            _SOURCE: self.source,
            _ENCODER: self.manifest.encoder or "",
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> "Facts":
        """Raises LookupError or ValueError when mmrec did not write them."""
        raw = json.loads(properties[_MANIFEST])
        raw["parents"] = [Parent(**parent) for parent in raw["parents"]]
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(properties[_SCHEMA])))
        return cls(
            manifest=Manifest(**raw),
            schema=schema,
            kind=properties[_KIND],
            source=properties[_SOURCE],
        )


class Server:
    """A connection to Milvus whose failures are a `UserError` each."""

    def __init__(self, uri: str) -> None:
        """Connect, with the token in MILVUS_TOKEN if there is one.

        Raises `UserError` when nothing answers there.
        """
        try:
            import grpc
            import pymilvus
        except ModuleNotFoundError:
            raise UserError("pymilvus is not installed: pip install 'mmrec[milvus]'") from None
        # All log tracebacks beside what they raise; the last is milvus-lite's, for calls that it lacks.
        for name in ("pymilvus", "milvus_lite", "grpc._server"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # A password in it is for nobody's log.
        self.uri = re.sub(r"//[^/@]*@", "//", uri)
        self._failures = (pymilvus.MilvusException, grpc.RpcError)
        self.lite = "://" not in uri
        if self.lite:
            _check_lite(uri)
        try:
            self.client = pymilvus.MilvusClient(
                uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=_CONNECT_S
            )
        except (*self._failures, ValueError) as error:
            reason = _reason(error)
            # All that milvus-lite says of its lock is that it failed.
            held = "; one process alone can have it open" if self.lite else ""
            raise UserError(
                f"{self.uri}: no Milvus answers there ({reason}){held}; give --uri the address of a server, "
                "such as http://localhost:19530, or a path that ends in .db"
            ) from None

    def ask(self, call: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the client."""
        try:
            return getattr(self.client, call)(*arguments, timeout=_TIMEOUT_S, **named)
        except self._failures as error:
            raise UserError(f"{self.uri}: {call} failed: {_reason(error)}") from None

    def facts(self, collection: str) -> Facts | None:
        """What a collection says of itself, or None where there is no such collection.

        Raises `UserError` for one that mmrec did not make.
        """
        if not self.ask("has_collection", collection):
            return None
        properties = self.ask("describe_collection", collection).get("properties", {})
        try:
            return Facts.from_properties(dict(properties))
        except (LookupError, TypeError, ValueError, pa.ArrowException):
            raise UserError(
                f"{self.uri}: collection '{collection}' was not pushed by mmrec; give another "
                "--collection"
            ) from None

    def count(self, collection: str) -> int:
        """The rows of a collection, with all that was written and without what was deleted."""
        rows = self.ask(
            "query", collection, filter="", output_fields=["count(*)"], consistency_level="Strong"
        )
        return int(rows[0]["count(*)"])


class MilvusIndex:
    """A collection of product vectors, joined to ids and attributes; see `ProductIndex`.

    Where it differs: a search gives at most 16,384 matches a query; upserts of more than 1,000 products
    are several, so a failure can leave the first of them done; the columns are those that were pushed;
    vectors are never scored again (`rerank`). What this object wrote it finds at once, others within
    Milvus's bounded staleness.
    """

    def __init__(self, server: Server, collection: str, facts: Facts) -> None:
        """Take a loaded collection; for `open` to call."""
        self.collection = collection
        self.manifest: Manifest | None = facts.manifest
        self._server = server
        self._facts = facts
        self._columns = columns_of(facts.schema)
        self._filters: OrderedDict[str, str] = OrderedDict()

    @classmethod
    def open(cls, uri: str, collection: str = COLLECTION) -> "MilvusIndex":
        """Open a collection that `push_index` made.

        Raises `UserError` when nothing answers at the URI, or there is no such collection of mmrec's.
        """
        if "://" not in uri and not Path(uri).exists():
            raise UserError(f"{uri}: no such file; `mmrec index push --uri {uri} ...` makes it")
        server = Server(uri)
        facts = server.facts(collection)
        if facts is None:
            there = ", ".join(server.ask("list_collections")) or "none"
            raise UserError(
                f"{server.uri}: has no collection '{collection}' (found: {there}); "
                f"`mmrec index push --index INDEX --uri {server.uri} --collection {collection}` makes it"
            )
        server.ask("load_collection", collection)
        return cls(server, collection, facts)

    def close(self) -> None:
        """Let go of the connection."""
        self._server.client.close()

    def __enter__(self) -> "MilvusIndex":
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
        """The number of products: a query."""
        return self._server.count(self.collection)

    @property
    def key(self) -> str:
        """The name of the id column: product_id, or content_id in an index of contents."""
        return self._facts.schema.names[0]

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the id and the attributes."""
        return self._facts.schema

    @property
    def width(self) -> int:
        """D, the width of its vectors and of queries."""
        return self._facts.manifest.details["width"]

    @property
    def ids(self) -> list[str]:
        """Every product's id, in the order of ids: asked for on each call, a page at a time."""
        id_field = self._columns[0].field
        found: list[str] = []
        while True:
            after = f"{id_field} > {quoted(found[-1])}" if found else ""
            rows = self._query(
                after,
                [id_field],
                limit=MOST_MATCHES,
                iterator="True",  # Pages in the order of ids.
                reduce_stop_for_best="True",
            )
            found += [row[id_field] for row in rows]
            if len(rows) < MOST_MATCHES:
                return found

    def __contains__(self, product_id: str) -> bool:
        return bool(self.present([product_id]))

    def present(self, ids: Sequence[str]) -> set[str]:
        """Those ids that are here."""
        return set(self._rows(ids, []))

    def attributes(self, product_id: str) -> dict[str, Any]:
        """A product's title and other columns. Raises `UserError` for an id that is not here."""
        return self.attributes_of([product_id])[0]

    def attributes_of(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The same of several products, in one query for each thousand."""
        rows = self._found(ids, [column.field for column in self._columns])
        table = from_rows([rows[id_] for id_ in ids], self._columns)
        return (
            table.drop_columns([self.key]).to_pylist()
            if len(self._columns) > 1
            else [{}] * len(ids)
        )

    def vectors(self, ids: Sequence[str]) -> Float32[np.ndarray, "Q D"]:
        """The vectors of products, in the order of `ids`, as they were pushed.

        Raises `UserError` for an id that is not here.
        """
        rows = self._found(ids, [VECTOR])
        return np.array([rows[id_][VECTOR] for id_ in ids], np.float32).reshape(-1, self.width)

    def find_parent(self, kind: str) -> Place | None:
        """Where the encoder or the shards lie, if this machine sees them where the pushing one did."""
        return find_recorded(Path(), self._facts.manifest.parent(kind))

    def status(self) -> MilvusStatus:
        """Counts, index type and encoder."""
        return MilvusStatus(
            collection=self.collection,
            kind=self._facts.kind,
            products=len(self),
            width=self.width,
            encoder=self._facts.manifest.encoder,
        )

    # ----------------------------------------------------------------------------------- searching

    def search(
        self,
        queries: Float[np.ndarray, "Q D"],
        k: int,
        *,
        where: str | None = None,
        rerank: bool | None = None,
    ) -> SearchResult:
        """The k products of highest inner product with each query, among those that meet a condition.

        `where` is in the language of filters.py. Raises `UserError` for k below 1 or above 16,384, for
        queries of another width or that are not finite, for `rerank`, and for a condition that
        cannot be understood or that Milvus would answer otherwise than DuckDB.
        """
        k = checked_k(k)
        if k > MOST_MATCHES:
            raise UserError(f"k is {k:,}; Milvus gives at most {MOST_MATCHES:,} matches a query")
        if rerank:
            raise UserError(
                "a collection in Milvus does not score matches again; leave out --rerank"
            )
        queries = checked_queries(queries, self.width)
        condition = self._condition(where) if where is not None else ""
        # A message of Milvus's has a largest size.
        step = max(1, min(BATCH, _MOST_RESULTS // k))
        hits = [
            found
            for start in range(0, len(queries), step)
            for found in self._hits(queries[start : start + step], k, condition)
        ]
        ids = [[hit[self._columns[0].field] for hit in found] for found in hits]
        scores = np.full((len(hits), max(map(len, ids), default=0)), -np.inf, np.float32)
        for row, found in enumerate(hits):
            scores[row, : len(found)] = [hit["distance"] for hit in found]
        return SearchResult(ids=ids, scores=scores)

    def _hits(self, queries: np.ndarray, k: int, condition: str) -> Any:
        parameters = {"HNSW": {"ef": max(128, 2 * k)}, "FLAT": {}}.get(
            self._facts.kind, {"nprobe": 64}
        )
        return self._server.ask(
            "search",
            self.collection,
            data=list(queries),
            anns_field=VECTOR,
            filter=condition,
            limit=k,
            search_params={"metric_type": "IP", "params": parameters},
            consistency_level="Session",
        )

    def _condition(self, where: str) -> str:
        """A condition as Milvus takes it; the last ones are remembered."""
        if where not in self._filters:
            self._filters[where] = milvus_filter(where, self._columns)
            while len(self._filters) > _KEPT_FILTERS:
                self._filters.popitem(last=False)
        return self._filters[where]

    # ------------------------------------------------------------------------------------ changing

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        attributes: pa.Table | None = None,
    ) -> None:
        """Add products, or replace those that are here, in batches of 1,000.

        `attributes` holds a row for each id; a column that it lacks is null. Without it products that
        are here keep theirs.

        Raises `UserError`, naming ids, before anything is written: for what `ProductIndex.upsert`
        refuses, for a column that the collection has not, and for values that Milvus cannot hold.
        """
        if not len(ids):
            return
        vectors = checked_vectors(ids, vectors, width=self.width)
        if attributes is None:
            products = self._known_attributes(ids)
        else:
            products = joined_attributes(ids, attributes, self.key)
        new = set(products.column_names) - set(self._facts.schema.names)
        if new:
            raise UserError(
                f"attribute '{min(new)}' is no column of collection '{self.collection}'; a collection "
                "keeps the columns that it was pushed with: leave it out, or push an index that has it"
            )
        products = fitted_attributes(products, self._facts.schema)
        upsert_rows(self._server, self.collection, to_rows(products, vectors, self._columns))

    def delete(self, ids: Sequence[str]) -> int:
        """Take products out. Ids that are not here are passed over; returns how many were here."""
        check_ids(ids)
        here = list(self._rows(ids, []))
        for batch in _batches(here):
            self._server.ask("delete", self.collection, filter=self._among(batch))
        return len(here)

    def _known_attributes(self, ids: Sequence[str]) -> pa.Table:
        """What is known of products; of new ones the id alone."""
        known = self._rows(ids, [column.field for column in self._columns])
        id_field = self._columns[0].field
        return from_rows([known.get(id_, {}) | {id_field: id_} for id_ in ids], self._columns)

    # ------------------------------------------------------------------------------------- asking

    def _found(self, ids: Sequence[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        rows = self._rows(ids, fields)
        missing = [id_ for id_ in ids if id_ not in rows]
        if missing:
            raise UserError(f"not in this index of {len(self)} products: {name_ids(missing)}")
        return rows

    def _rows(self, ids: Sequence[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """The rows of those ids that are here, by id."""
        id_field = self._columns[0].field
        return {
            row[id_field]: row
            for batch in _batches(list(dict.fromkeys(ids)))
            for row in self._query(self._among(batch), [id_field, *fields])
        }

    def _query(self, condition: str, fields: list[str], **settings: Any) -> list[dict[str, Any]]:
        return list(
            self._server.ask(
                "query",
                self.collection,
                filter=condition,
                output_fields=fields,
                consistency_level="Strong",
                **settings,
            )
        )

    def _among(self, ids: Sequence[str]) -> str:
        return f"{self._columns[0].field} in [{', '.join(map(quoted, ids))}]"


def upsert_rows(server: Server, collection: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows in batches that fit a message. Raises `UserError` where Milvus took fewer."""
    for batch in _batches(rows):
        done = server.ask("upsert", collection, data=list(batch))["upsert_count"]
        if done != len(batch):
            raise UserError(f"{server.uri}: took {done} of {len(batch)} products; push them again")


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _check_lite(uri: str) -> None:
    """Say what a path needs before pymilvus makes something of it."""
    if not uri.endswith(".db"):
        raise UserError(
            f"{uri}: expected the address of a Milvus server, such as http://localhost:19530, or a "
            "path that ends in .db for milvus-lite"
        )
    try:
        import milvus_lite  # noqa: F401
    except ModuleNotFoundError:
        # With its dependencies it would write faiss-cpu over the FAISS that is here.
        raise UserError(
            f"{uri}: is for milvus-lite, which is not installed: pip install --no-deps milvus-lite"
        ) from None


def _reason(error: Exception) -> str:
    """Milvus's complaint in a line."""
    text = " ".join(str(getattr(error, "message", "") or error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
