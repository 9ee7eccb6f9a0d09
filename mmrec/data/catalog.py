"""Products by their ids, over the catalogues of one or several folders of shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mmrec.data.shards import ShardReader, image_name, open_sources
from mmrec.data.storage import Place
from mmrec.errors import UserError


class Catalog:
    """Random access to products: what each is called, its attributes, and its images.

    A product that several folders have is read from the first of them.
    """

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self._rows: dict[str, int] = {}
        for row, (product_id,) in enumerate(reader.product_ids):
            self._rows.setdefault(product_id, row)

    @classmethod
    def open(cls, folders: Sequence[Place | str]) -> "Catalog":
        """Open the catalogues of folders of shards; raises `UserError` where one has none."""
        reader, _ = open_sources(folders, "products", "catalog")
        return cls(reader)

    def __contains__(self, product_id: str) -> bool:
        return product_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def product_ids(self) -> list[str]:
        """Every product once."""
        return list(self._rows)

    def row(self, product_id: str) -> int:
        """Where a product is in `reader`; raises `KeyError` where it is not."""
        return self._rows[product_id]

    def meta(self, product_id: str) -> dict[str, Any]:
        """A product's title, attributes and number of images."""
        return self.reader.meta(self._rows[product_id])

    def read_images(self, product_id: str, images: Sequence[int]) -> list[bytes]:
        """The JPEG bytes of some of a product's images."""
        names = [image_name(i) for i in images]
        found = self.reader.read(self._rows[product_id], names)
        return [found[name] for name in names]


def attribute_groups(
    catalog: Catalog, numbers: Mapping[str, int], attribute: str
) -> Int[np.ndarray, " P"]:
    """A group number for each product by its own number: equal for equal values of an attribute.

    -1 where the product has no value, or is not in the catalogue. Raises `UserError` when no product
    has such an attribute.
    """
    groups = np.full(len(numbers), -1, np.int64)
    known: dict[str, int] = {}
    names: set[str] = set()
    for product_id, number in numbers.items():
        if product_id not in catalog:
            continue
        attributes = catalog.meta(product_id)["attributes"]
        names |= attributes.keys()
        value = attributes.get(attribute)
        if value is not None:
            groups[number] = known.setdefault(str(value), len(known))
    if not known:
        found = ", ".join(sorted(names)) or "none"
        raise UserError(
            f"--sampler.group-by {attribute}: no product has that attribute; found {found}"
        )
    return groups
