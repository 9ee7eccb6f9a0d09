"""The table of hard negatives: written, refused, and drawn from by training rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_loader import letters, small_loader
from written_shards import write_shards

from mmrec.data.batches import (
    AugmentConfig,
    PairDataset,
    Preprocess,
    number_products,
)
from mmrec.data.negatives import FILE_NAME, read_negatives, write_negatives
from mmrec.data.sampler import Row
from mmrec.data.shards import ShardReader, open_shards
from mmrec.errors import UserError
from mmrec.manifest import new_folder, parent_of

TABLE = {
    "c00": (["p01", "p02", "p03"], [0.5, 0.4, 0.3]),
    "c01": (["p06"], [0.2]),
    "c02": ([], []),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("negatives") / "shards", num_contents=6, num_val=0)


@pytest.fixture
def table(shards: Path, tmp_path: Path) -> Path:
    out = tmp_path / "negatives"
    with new_folder(out, kind="negatives") as folder:
        parents = [parent_of(out, shards, "shards")]
        write_negatives(folder, TABLE, parents=parents, config={}, counts={})
    return out


@pytest.fixture
def train(shards: Path) -> ShardReader:
    return open_shards(shards, "contents", "train")


def dataset(
    train: ShardReader, shards: Path, table: Path | None, *, per_row: int = 2
) -> PairDataset:
    numbers = number_products(train.product_ids)
    negatives = table and read_negatives(
        table,
        shards=[shards],
        content_ids=train.content_ids,
        numbers=numbers,
        per_row=per_row,
    )
    return PairDataset(
        train,
        numbers,
        preprocess=Preprocess(size=32),
        augment=AugmentConfig(modality_dropout=0.0),
        num_frames=2,
        num_images=1,
        num_epochs=4,
        seed=0,
        negatives=negatives,
    )


def test_a_row_draws_from_its_list_anew_each_epoch(
    train: ShardReader, shards: Path, table: Path
) -> None:
    rows = dataset(train, shards, table)
    numbers = number_products(train.product_ids)
    # p06 has no link in these few contents, so its number follows theirs.
    assert "p06" not in numbers
    (only,) = rows[Row(0, 1, 0)].negatives
    assert only.number == len(numbers)
    assert rows[Row(0, 2, 0)].negatives == rows[Row(0, 3, 0)].negatives == []
    drawn = [[n.number for n in rows[Row(epoch, 0, 0)].negatives] for epoch in range(20)]
    assert all(len(set(found)) == 2 for found in drawn)
    assert {n for found in drawn for n in found} == {numbers[p] for p in ("p01", "p02", "p03")}
    assert drawn == [[n.number for n in rows[Row(e, 0, 0)].negatives] for e in range(20)]


def test_negatives_leave_the_row_itself_as_it_is(
    train: ShardReader, shards: Path, table: Path
) -> None:
    plain, mined = (dataset(train, shards, each)[Row(1, 0, 0)] for each in (None, table))
    for name in ("content", "product"):
        assert all(map(torch.equal, getattr(plain, name), getattr(mined, name)))
    assert all(picture.shape == (3, 32, 32) for n in mined.negatives for picture in n.pictures)


def test_negatives_stand_behind_the_products_of_a_batch(
    train: ShardReader, shards: Path, table: Path
) -> None:
    rows = dataset(train, shards, table)
    for batch in small_loader(rows, train, batch_size=6, num_workers=0):
        samples = batch.samples.tolist()
        assert len(batch) == len(batch.content) == 6
        assert len(batch.product) == 6 + 3
        brought = [samples[row] for row in batch.negative_row.tolist()]
        assert sorted(brought) == [0, 0, 1]
        where = brought.index(1)
        assert batch.negative_number[where] == len(number_products(train.product_ids))
        assert batch.product.tokens[6 + where].tolist() == letters(["product 6"])[0].tolist()
        moved = batch.to("cpu")
        assert torch.equal(moved.negative_number, batch.negative_number)


def test_workers_do_not_change_negatives(train: ShardReader, shards: Path, table: Path) -> None:
    rows = dataset(train, shards, table)
    streams = [small_loader(rows, train, batch_size=6, num_workers=workers) for workers in (0, 2)]
    for one, two in zip(*streams, strict=True):
        assert torch.equal(one.negative_number, two.negative_number)
        assert torch.equal(one.product.images, two.product.images)


def test_a_table_of_other_shards_or_another_schema_is_refused(
    train: ShardReader, shards: Path, table: Path, tmp_path: Path
) -> None:
    other = write_shards(tmp_path / "other", num_contents=7, num_val=0)
    arguments = {"content_ids": train.content_ids, "per_row": 1}
    numbers = number_products(train.product_ids)
    with pytest.raises(
        UserError, match=r"mined with shards \w+, and training reads \w+; mine anew"
    ):
        read_negatives(table, shards=[other], numbers=numbers, **arguments)
    with pytest.raises(UserError, match="expected negatives, found shards"):
        read_negatives(shards, shards=[shards], numbers=numbers, **arguments)
    pq.write_table(pa.table({"content_id": ["c00"], "products": [["p1"]]}), table / FILE_NAME)
    with pytest.raises(UserError, match="not a table of negatives"):
        read_negatives(table, shards=[shards], numbers=numbers, **arguments)
    elsewhere = {"content_id": ["c00"], "product_ids": [["p99"]], "scores": [[0.1]]}
    pq.write_table(pa.table(elsewhere), table / FILE_NAME)
    with pytest.raises(UserError, match="product 'p99' is not in the catalogue"):
        read_negatives(table, shards=[shards], numbers=numbers, **arguments)


def test_a_drawn_list_is_in_order_and_without_repeats(
    train: ShardReader, shards: Path, table: Path
) -> None:
    negatives = read_negatives(
        table,
        shards=[shards],
        content_ids=train.content_ids,
        numbers=number_products(train.product_ids),
        per_row=1,
    )
    draws = [negatives.draw(0, np.random.default_rng(i)) for i in range(60)]
    assert {len(found) for found in draws} == {1}
    assert {found[0] for found in draws} == {"p01", "p02", "p03"}
    assert replace(negatives, per_row=3).draw(0, np.random.default_rng(0)) == ["p01", "p02", "p03"]
