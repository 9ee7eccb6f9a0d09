"""What `mmrec inspect` tells of shards: figures against those counted by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_shards import make_small_shards

from mmrec import cli
from mmrec.data.foreign import ForeignMapping, index_tars
from mmrec.data.inspection import (
    Distribution,
    distributions,
    format_summary,
    read_facts,
    show,
    show_bytes,
    summarize,
)
from mmrec.data.shards import open_shards
from mmrec.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return make_small_shards(
        folder, samples_per_shard=3, cold_products=0.3, val=0.0, test=0.15, text_columns=("title",)
    )


@pytest.fixture
def unrecorded(shards: Path, tmp_path: Path) -> Path:
    """The same without samples.parquet, and with the manifest of an earlier version."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    (folder / "samples.parquet").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("claims", "files"):
        del manifest["details"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_summary(shards):
    summary = summarize(read_facts(shards))
    splits = summary["splits"]
    assert {split: found["samples"] for split, found in splits.items()} == {
        "train": 5,
        "test": 7,
        "catalog": 5,
    }
    assert [found["titles_missing"] for found in splits.values()] == [1, 0, 1]  # c5 and p0
    reader = open_shards(shards, "contents", "train")
    frames = [len(d) for r in range(5) for n, d in reader.read(r).items() if n.startswith("f")]
    assert splits["train"]["bytes"] == sum(frames)
    assert summary["dropped"] == {"no link": 1, "cannot open image": 1, "not a video or image": 1}
    assert summary["images_skipped"] == {"cannot open image": 1}
    assert summary["near_duplicates"] == {"groups": 1, "contents": 3, "largest": 3}
    assert summary["cold_products"] == {"without_training_links": 3, "held_out": 2}
    assert summary["resolutions"]["contents"] == {"64x64": 12}
    assert summary["not_recorded"] == []


def test_the_distributions(shards):
    found = {d.name: d for d in distributions(read_facts(shards))}
    # Clips of 5 + i frames at 8 a second, without the photo post c6 and the lost c7 and c8.
    lengths = [(5 + i) / 8 for i in range(14) if i not in (6, 7, 8)]
    assert sorted(found["length of a clip"].values) == pytest.approx(lengths)
    assert found["length of a clip"].quantiles()["median"] == pytest.approx(np.median(lengths))
    # c1, c5 and c13 train p1, and c2 and c6 train p2.
    links = found["training links of a product"]
    assert sorted(links.values) == [0, 0, 0, 2, 3]
    assert [(part.label, part.count) for part in links.bins()] == [
        ("0", 3),
        ("1", 0),
        ("2", 1),
        ("3", 1),
    ]
    assert sorted(found["products of a content"].values) == [1] * 11 + [2]  # c0 has two


def test_what_the_indexes_tell_is_the_same(shards, unrecorded):
    facts = read_facts(unrecorded)
    summary, whole = summarize(facts), summarize(read_facts(shards))
    assert not facts.has("duration")
    assert summary["splits"] == whole["splits"]
    names = [name for name in whole["distributions"] if name in summary["distributions"]]
    assert names == [
        "frames kept of a content",
        "size of a content's frames",
        "size of a product's images",
        "products of a content",
        "training links of a product",
    ]
    for name in names:
        assert summary["distributions"][name] == whole["distributions"][name]
    table = pq.read_table(shards / "samples.parquet").select(facts.samples.column_names)
    for split in facts.splits:
        rows = [row for row in table.to_pylist() if row["split"] == split]
        assert facts.of(split).to_pylist() == rows
    assert summary["near_duplicates"] is None
    assert summary["cold_products"] == {"without_training_links": 3, "held_out": None}
    told = format_summary(summary)
    assert "not recorded: length and resolution of the originals; near duplicates;" in told


def test_foreign_tars_are_told_from_their_indexes(shards, tmp_path):
    tars = shutil.copytree(shards / "contents", tmp_path / "tars")
    mapping = ForeignMapping(frames="f*.jpg", title="json:title", product_images="p0.i*.jpg")
    index_tars(
        [f"{tars}/train-*.tar"], tmp_path / "out", split="train", mapping=mapping, num_workers=1
    )
    summary = summarize(read_facts(tmp_path / "out"))
    assert summary["splits"]["train"]["samples"] == 5
    assert summary["splits"]["train"]["titles_missing"] == 1
    assert summary["distributions"]["training links of a product"]["max"] == 1
    assert "length of a clip" not in summary["distributions"]


def test_the_printed_summary(shards, capsys):
    cli.inspect(shards)
    printed = capsys.readouterr().out
    assert printed.startswith("shards  ")
    assert "\ntables  " not in printed.split("\nsamples\n")[1]
    for line in (
        "    train            5 contents  1 without a title (20.0%)",
        "length of a clip, s: min 0.625,",
        "training links of a product: min 0, 5% 0, median 0, 95% 3, max 3 (of 5)",
        "    0  ######################################## 3",
        "    2  ##############                           1",
        "dropped: no link 1, ",
        "near duplicates: 3 contents in 1 groups, the largest of 3",
        "cold products: 3 in no training link; 2 held out on purpose",
    ):
        assert line in printed
    cli.inspect(shards, json=True)
    chain = json.loads(capsys.readouterr().out)
    assert [entry["manifest"]["kind"] for entry in chain] == ["shards", "tables"]
    assert chain[0]["summary"] == json.loads(json.dumps(summarize(read_facts(shards))))


def test_a_table_of_samples_that_cannot_be_read(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "samples.parquet"
    pq.write_table(pq.read_table(path).drop_columns("num_links"), path)
    with pytest.raises(UserError, match=r"samples\.parquet: has no column num_links"):
        read_facts(folder)
    path.write_bytes(b"noise")
    with pytest.raises(UserError, match=r"samples\.parquet: cannot be read"):
        read_facts(folder)


@pytest.mark.parametrize(
    "values",
    [
        [5],
        [0],
        [0, 0, 0],
        [3, 4, 7],
        [0, 1, 2, 3000],
        [7, 3600, 12, 9, 11],
        list(range(100)),
        [1e-6, 1, 1e9],
        [1200, 1203, 1230],
        [-3, 5],
        [0.3, 0.6, 0.7, 1.2],
        [tenth / 10 for tenth in range(3, 40)],
        [0.1 + 0.2, 0.7 + 0.1],
        [1e-3, 1e3],
        [45.6] * 3,
    ],
)
def test_every_value_is_in_one_bin(values):
    array = np.array(values, dtype=np.float64)
    check_bins(array, whole=False)
    if (array == array.round()).all():
        check_bins(array, whole=True)


def check_bins(array: np.ndarray, *, whole: bool) -> None:
    bins = Distribution(name="n", unit="", values=array, whole=whole).bins()
    assert 1 <= len(bins) <= 24
    assert sum(part.count for part in bins) == len(array)
    assert len({part.label for part in bins}) == len(bins)
    for part in bins:
        inside = ((array >= part.low) & (array < part.high)).sum()
        assert part.count == inside
    assert bins[0].count
    assert bins[-1].count


def test_bins_grow_where_values_differ_by_orders_of_magnitude():
    values = np.array([0, 1, 1, 2, 3, 30, 4000], dtype=np.float64)
    bins = Distribution(name="n", unit="", values=values, whole=True).bins()
    assert [(part.label, part.count) for part in bins if part.count] == [
        ("0", 1),
        ("1", 2),
        ("2\u20134", 2),
        ("20\u201349", 1),
        ("2,000\u20134,999", 1),
    ]


def test_numbers_are_shown_with_three_digits():
    assert [show(value) for value in (0, 3, 3.14159, 1234.5, 0.0001)] == [
        *("0", "3", "3.14", "1,234", "0.000100")
    ]
    assert [show_bytes(size) for size in (12, 1500, 2_500_000, 3e13)] == [
        *("12 bytes", "1.5 kB", "2.5 MB", "30 TB")
    ]
