"""From an index in a folder to a Milvus collection.

Rows go into a collection beside the one that is served, `NAME_being_pushed`, which takes its name once all of
them are there. So searches never see half a catalogue, and a push that was broken off goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmrec.bars import progress_bar
from mmrec.data.storage import joined
from mmrec.errors import UserError
from mmrec.manifest import Manifest, Parent, fingerprint_of
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.intake import name_ids
from mmrec.retrieval.milvus import BATCH, COLLECTION, KINDS, Facts, MilvusIndex, Server, upsert_rows
from mmrec.retrieval.milvus_rows import MAX_BYTES, VECTOR, columns_of, plain_type, to_rows

_CHECKED = 1_000


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did."""

    products: int
    """Rows of the collection now, counted by Milvus."""
    sent: int
    """Of those, written by this run."""
    resumed: int
    """Found there from a run that was broken off."""


def push_index(
    folder: Path,
    uri: str,
    *,
    collection: str = COLLECTION,
    kind: str = "FLAT",
    progress: bool = False,
) -> Pushed:
    """Move an index with its attributes and lineage into a collection, and replace what it held.

    `kind` is one of `KINDS`. Rows that an earlier run sent are read back and compared, and of the others a
    sample, vectors and attributes, before the collection is published. Raises `UserError` when nothing
    answers at the URI, when the collection is another encoder's or not mmrec's, when the index keeps no
    vectors, and for values that Milvus cannot hold.
    """
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,200}", collection):
        raise UserError(
            f"collection {collection!r}: expected letters, digits and _, and no digit first"
        )
    index = ProductIndex.load(folder, device="cpu")
    if not (index.keeps_vectors or index.rerank):
        raise UserError(
            f"{folder}: an index of factory '{index.factory}' keeps codes and no vectors to push; build "
            "it with --factory Flat, or with --rerank"
        )
    facts = _facts_of(index, folder, kind)
    server = Server(uri)
    _check_replaceable(server, collection, facts)
    staging = f"{collection}_being_pushed"
    _make_staging(server, staging, index, facts)
    resumed = _send(server, staging, index, facts, progress)
    _verify(server, staging, index, facts)
    if server.ask("has_collection", collection):
        server.ask("drop_collection", collection)
    server.ask("rename_collection", staging, collection)
    server.ask("load_collection", collection)
    return Pushed(products=server.count(collection), sent=len(index) - resumed, resumed=resumed)


def _facts_of(index: ProductIndex, folder: Path, kind: str) -> Facts:
    assert index.manifest is not None
    own = Parent(kind="index", fingerprint=index.manifest.fingerprint, path=str(folder.resolve()))
    # A collection lies in no folder that paths could be relative to.
    ancestors = [
        Parent(
            kind=parent.kind,
            fingerprint=parent.fingerprint,
            path=_absolute(folder, parent.path),
        )
        for parent in index.manifest.parents
    ]
    source = fingerprint_of({"index": index.fingerprint or "", "kind": kind})
    manifest = Manifest(
        kind="index",
        config={"backend": "milvus", "kind": kind},
        counts={"in": len(index), "out": len(index)},
        fingerprint=source,
        parents=[own, *ancestors],
        details={
            "key": index.key,
            "width": index.width,
            "split": index.manifest.details.get("split", "catalog"),
        },
    )
    schema = index.products.schema
    plain = pa.schema([(field.name, plain_type(field.type)) for field in schema])
    return Facts(manifest=manifest, schema=plain, kind=kind, source=source)


def _absolute(folder: Path, path: str) -> str:
    found = joined(folder.resolve(), path)
    return str(found.resolve() if isinstance(found, Path) else found)


def _check_replaceable(server: Server, collection: str, facts: Facts) -> None:
    """Refuse to put vectors where those of another encoder are searched."""
    there = server.facts(collection)
    if there is None:
        return
    theirs, ours = there.manifest.encoder, facts.manifest.encoder
    if theirs != ours:
        raise UserError(
            f"{server.uri}: collection '{collection}' is of encoder "
            f"{theirs or 'unknown'}, and this index of "
            f"{ours or 'unknown'}: their spaces differ; give another --collection"
        )


def _make_staging(server: Server, staging: str, index: ProductIndex, facts: Facts) -> None:
    """The collection to fill: what an earlier push of the same left, or a new one."""
    there = server.facts(staging)
    if there is not None and there.source == facts.source:
        server.ask("load_collection", staging)
        return
    if there is not None:
        server.ask("drop_collection", staging)
    from pymilvus import DataType, MilvusClient

    types = {
        "int": DataType.INT64,
        "float": DataType.DOUBLE,
        "bool": DataType.BOOL,
        "text": DataType.VARCHAR,
        "other": DataType.JSON,
    }
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    for column in columns_of(facts.schema):
        limit = {"max_length": MAX_BYTES} if column.family == "text" else {}
        schema.add_field(
            column.field,
            types[column.family],
            is_primary=not column.nullable,
            nullable=column.nullable,
            **limit,
        )
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=index.width)
    parameters = MilvusClient.prepare_index_params()
    parameters.add_index(VECTOR, index_type=facts.kind, metric_type="IP", params=KINDS[facts.kind])
    server.ask(
        "create_collection",
        staging,
        schema=schema,
        index_params=parameters,
        properties=facts.to_properties(),
    )


def _send(server: Server, staging: str, index: ProductIndex, facts: Facts, progress: bool) -> int:
    """Write what is not there yet as it should be; returns how many rows were."""
    filling = MilvusIndex(server, staging, facts)
    products, columns = index.products, columns_of(facts.schema)
    ids = products[index.key].to_pylist()
    resuming, resumed = len(filling) > 0, 0
    for start in progress_bar(range(0, len(ids), BATCH), desc="push", shown=progress):
        batch = ids[start : start + BATCH]
        there = filling.present(batch) if resuming else set()
        there -= set(_differing(filling, index, [id_ for id_ in batch if id_ in there]))
        resumed += len(there)
        rows = [row for row, id_ in enumerate(batch) if id_ not in there]
        if rows:
            table = products.slice(start, len(batch)).take(pa.array(rows))
            vectors = index.vectors([batch[row] for row in rows])
            upsert_rows(server, staging, to_rows(table, vectors, columns))
    return resumed


def _verify(server: Server, staging: str, index: ProductIndex, facts: Facts) -> None:
    """Count the rows, and read some of them back, before they are served."""
    server.ask("flush", staging)
    count = server.count(staging)
    if count != len(index):
        raise UserError(
            f"{server.uri}: has {count:,} of {len(index):,} products in '{staging}'; push once more"
        )
    ids = index.ids
    sample = ids[:: max(1, len(ids) // _CHECKED)]
    other = _differing(MilvusIndex(server, staging, facts), index, sample)
    if other:
        raise UserError(
            f"{server.uri}: gives other vectors or attributes back than it was sent in '{staging}': "
            f"{name_ids(other)}; push once more"
        )


def _differing(there: MilvusIndex, index: ProductIndex, ids: Sequence[str]) -> list[str]:
    """Those products whose vector or attributes are not the same in Milvus."""
    if not ids:
        return []
    same = (there.vectors(ids) == index.vectors(ids)).all(axis=1).tolist()
    own, theirs = index.attributes_of(ids), there.attributes_of(ids)
    return [
        id_
        for id_, equal, mine, other in zip(ids, same, own, theirs, strict=True)
        if not equal or any(mine.get(name) != value for name, value in other.items())
    ]
