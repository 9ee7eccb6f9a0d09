"""Products that requests add, replace or take out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from mmrec.errors import UserError
from mmrec.model.encoder import Side
from mmrec.retrieval.index import ProductIndex
from mmrec.serve.live import Live, Served, read_token
from mmrec.serve.refusals import Refused, invalid
from mmrec.serve.uploads import Body, FieldKind, parse_json, printable, text_of

PRODUCT_FIELDS: dict[str, FieldKind] = {
    "product_id": "text",
    "title": "text",
    "attributes": "text",
    "images": "files",
}
MAX_ID = 512
_TITLE = "title"


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product as a request gives it, checked."""

    product_id: str
    title: str | None
    attributes: dict[str, Any]


class Superseded(Exception):
    """Another generation has taken the place of the one that a change was made for."""


def product_of(body: Body, max_text: int) -> Product:
    """The product in a request's body. Raises `Refused`."""
    product_id = text_of(body.fields, "product_id", MAX_ID)
    if product_id is None:
        raise invalid("product_id", "expected an id")
    if not product_id.isprintable() or not product_id.strip("./"):
        # Others turn lines around or end them; of dots and slashes clients make another address.
        raise invalid("product_id", "expected printable characters, and not dots and slashes alone")
    title = text_of(body.fields, "title", max_text)
    if title is None and not body.files.get("images"):
        raise Refused(
            422, "invalid field", "give a title or images: an index holds their embedding"
        )
    return Product(product_id=product_id, title=title, attributes=_attributes_of(body.fields))


def _attributes_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = fields.get("attributes")
    if isinstance(given, str):
        try:
            given = parse_json(given or "{}")
        except (ValueError, RecursionError):
            raise invalid("attributes", "expected a JSON object") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise invalid("attributes", "expected a JSON object")
    return given


def own_side(served: Served) -> Side:
    """The side that what the index holds is encoded on."""
    return "product" if served.matcher.index.key == "product_id" else "content"


def row_of(product: Product, index: ProductIndex) -> pa.Table:
    """A table of one row in the index's types. Raises `Refused` for an attribute that it has not."""
    schema = index.schema
    columns = {index.key: pa.array([product.product_id], schema.field(index.key).type)}
    if _TITLE in schema.names:
        columns[_TITLE] = pa.array([product.title], schema.field(_TITLE).type)
    known = [name for name in schema.names if name not in (index.key, _TITLE)]
    for name, value in product.attributes.items():
        if name not in known:
            raise invalid(
                "attributes", f"'{printable(name)}' is not a column; there are {', '.join(known)}"
            )
        columns[name] = _array_of(name, value, schema.field(name).type)
    # What is not given is null, and not missing: answers have the same attributes for all products.
    columns |= {n: pa.nulls(1, schema.field(n).type) for n in known if n not in columns}
    return pa.table(columns)


def _array_of(name: str, value: Any, kind: pa.DataType) -> pa.Array:
    tries = (lambda: pa.array([value], kind), lambda: pa.array([value]).cast(kind))
    # Arrow would make 1 of true.
    for convert in tries if pa.types.is_boolean(kind) or not isinstance(value, bool) else ():
        try:
            array = convert()
            json.dumps(array.to_pylist(), allow_nan=False, default=str)  # as an answer will
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            continue
        return array
    raise invalid("attributes", f"{name}: expected {kind}, and no NaN or infinity")


def upsert(
    live: Live,
    folder: Path,
    served: Served,
    product: Product,
    vector: Float32[np.ndarray, " D"],
    picture: bytes,
) -> dict[str, Any]:
    """Add or replace a product, its picture a JPEG or nothing; on the disk when this returns.

    Raises `Refused`, and `Superseded` where the vector is of an encoder that does not answer any more.
    """
    with live.changing:
        index = _writable(live, folder, served)
        row = row_of(product, index)
        created = product.product_id not in index
        with index, _told():
            index.upsert([product.product_id], vector[None], row, pictures=[picture])
        served.image_paths.pop(product.product_id, None)
        return {"product_id": product.product_id, "created": created, "products": len(index)}


def delete(live: Live, folder: Path, product_id: str) -> dict[str, Any]:
    """Take a product out; on the disk when this returns. Raises `Refused` and `Superseded`."""
    with live.changing:
        index = _writable(live, folder, live.current)
        # With the block's end this process stops being the index's writer: others may change it, too.
        with index, _told():
            deleted = index.delete([product_id]) > 0
        live.current.image_paths.pop(product_id, None)
        return {"product_id": product_id, "deleted": deleted, "products": len(index)}


def _writable(live: Live, folder: Path, served: Served) -> ProductIndex:
    index = served.matcher.index
    assert isinstance(index, ProductIndex)
    try:
        token = read_token(folder)
    except (UserError, OSError):
        token = None
    if live.current is not served or token != served.token:
        raise Superseded
    return index


class _told:
    """What the index refuses, without the paths of this machine."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, UserError):
            return
        if "another writer" in str(error):
            raise Refused(
                409,
                "conflict",
                "another process is changing the index; try again",
                retry_after_s=1,
            ) from None
        if "load it again" in str(error):
            raise Superseded from None
        raise Refused(422, "invalid field", "the index does not take this product") from error
