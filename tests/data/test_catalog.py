"""Products by id over several catalogues, and their groups by an attribute."""

from pathlib import Path

import numpy as np
import pytest
from written_shards import write_shards

from mmrec.data.catalog import Catalog, attribute_groups
from mmrec.data.shards import open_shards, open_sources
from mmrec.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Products p00 to p06, and p05 to p08."""
    folder = tmp_path_factory.mktemp("catalog")
    first = write_shards(folder / "a", num_contents=6, num_val=0)
    second = write_shards(
        folder / "b", num_contents=9, num_val=0, num_products=4, first_product=5, prefix="d"
    )
    return [first, second]


def test_sources_are_opened_as_one(folders: list[Path]) -> None:
    joined, sizes = open_sources(folders, "contents", "train")
    assert sizes == [6, 9]
    parts = [open_shards(folder, "contents", "train") for folder in folders]
    assert joined.content_ids == [name for part in parts for name in part.content_ids]
    assert joined.read(7) == parts[1].read(1)
    with pytest.raises(UserError, match="no contents shards of split 'val'"):
        open_sources(folders, "contents", "val")


def test_a_product_of_two_sources_is_one(folders: list[Path]) -> None:
    catalog = Catalog.open(folders)
    assert catalog.product_ids == [f"p{number:02d}" for number in range(9)]
    assert catalog.meta("p06")["title"] == "product 6"
    first = open_shards(folders[0], "products", "catalog")
    assert catalog.read_images("p05", [1, 0]) == [first.read(5)[f"i{i}.jpg"] for i in (1, 0)]
    assert "p09" not in catalog


def test_groups_are_equal_values_of_an_attribute(folders: list[Path]) -> None:
    catalog = Catalog.open(folders)
    numbers = {"p00": 0, "p01": 1, "p03": 2, "p05": 3, "elsewhere": 4}
    groups = attribute_groups(catalog, numbers, "category")
    # p00 and p03 are mugs, p01 is a shoe, p05 has no category.
    np.testing.assert_array_equal(groups, [0, 1, 0, -1, -1])
    with pytest.raises(UserError, match="no product has that attribute; found category"):
        attribute_groups(catalog, numbers, "color")
