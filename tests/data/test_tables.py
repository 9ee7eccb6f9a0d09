"""Good tables in every format, and the message for every bad one."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import http_server, s3_server

from mmrec.data.storage import place, write_bytes_whole
from mmrec.data.tables import read_tables, tables_manifest, write_tables
from mmrec.errors import UserError
from mmrec.manifest import read_manifest

Rows = list[dict[str, Any]]

PRODUCTS: Rows = [
    {"product_id": "p1", "title": "Red mug", "images": ["p1.jpg"], "price": 3.5},
    {"product_id": "p2", "title": None, "images": ["p2.jpg", "p2b.jpg"], "price": 4.0},
]
CONTENTS: Rows = [
    {"content_id": "c1", "title": "Tea time", "video": "c1.mp4", "images": []},
    {"content_id": "c2", "title": "  ", "video": None, "images": ["c2.jpg"]},
]
LINKS: Rows = [
    {"content_id": "c1", "product_id": "p1", "weight": 2.0, "split": "train"},
    {"content_id": "c2", "product_id": "p2", "weight": 1.0, "split": "val"},
]


def write(folder: Path, name: str, rows: Rows, suffix: str = ".parquet") -> Path:
    path = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_all(
    folder: Path,
    *,
    products: Rows = PRODUCTS,
    contents: Rows = CONTENTS,
    links: Rows = LINKS,
    suffix: str = ".parquet",
) -> Path:
    for name, rows in (("products", products), ("contents", contents), ("links", links)):
        write(folder, name, rows, suffix)
    return folder


def changed(rows: Rows, row: int, **values: Any) -> Rows:
    return [old | values if number == row else old for number, old in enumerate(rows)]


def without(rows: Rows, column: str) -> Rows:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


def in_csv(rows: Rows, separator: str | None) -> Rows:
    def cell(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return separator.join(value) if separator else json.dumps(value)

    return [{name: cell(value) for name, value in row.items()} for row in rows]


# Good tables


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", "|.csv", "[.csv"])
def test_all_formats_give_the_same_tables(tmp_path, suffix):
    rows: dict[str, Rows] = {"products": PRODUCTS, "contents": CONTENTS, "links": LINKS}
    if suffix.endswith(".csv"):
        separator = "|" if suffix[0] == "|" else None
        rows = {name: in_csv(table, separator) for name, table in rows.items()}
        suffix = ".csv"
    tables = read_tables(write_all(tmp_path, **rows, suffix=suffix))
    assert tables.products.to_pylist() == PRODUCTS
    assert tables.contents.to_pylist() == changed(CONTENTS, 1, title=None)
    assert tables.links.to_pylist() == LINKS
    assert tables.attribute_columns == ["price"]
    assert tables.root == tmp_path


def test_formats_may_be_mixed(tmp_path):
    write(tmp_path, "products", PRODUCTS, ".jsonl")
    write(tmp_path, "contents", CONTENTS, ".parquet")
    write(tmp_path, "links", LINKS, ".csv")
    assert len(read_tables(tmp_path).links) == 2


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_ids_that_look_like_numbers_stay_text(tmp_path, suffix):
    products = changed(PRODUCTS, 0, product_id="00123")
    links = changed(LINKS, 0, product_id="00123")
    if suffix == ".csv":
        products, contents = in_csv(products, "|"), in_csv(CONTENTS, "|")
    else:
        contents = CONTENTS
    tables = read_tables(
        write_all(tmp_path, products=products, contents=contents, links=links, suffix=suffix)
    )
    assert tables.products["product_id"].to_pylist() == ["00123", "p2"]
    assert tables.links["product_id"].to_pylist() == ["00123", "p2"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_numbers_as_ids(tmp_path, suffix):
    products = [row | {"product_id": 10 + i} for i, row in enumerate(PRODUCTS)]
    contents = [row | {"content_id": 20 + i} for i, row in enumerate(CONTENTS)]
    links = [row | {"content_id": 20 + i, "product_id": 10 + i} for i, row in enumerate(LINKS)]
    tables = read_tables(
        write_all(tmp_path, products=products, contents=contents, links=links, suffix=suffix)
    )
    assert tables.contents["content_id"].to_pylist() == ["20", "21"]
    assert tables.links["product_id"].to_pylist() == ["10", "11"]


def test_missing_optional_columns(tmp_path):
    contents = without(without(CONTENTS[:1], "images"), "title")
    links = without(without(LINKS[:1], "weight"), "split")
    products = without(without(PRODUCTS, "title"), "price")
    tables = read_tables(write_all(tmp_path, products=products, contents=contents, links=links))
    assert tables.contents.to_pylist() == [
        {"content_id": "c1", "title": None, "video": "c1.mp4", "images": []}
    ]
    assert tables.links.to_pylist() == [{"content_id": "c1", "product_id": "p1", "weight": 1.0}]
    assert tables.products["title"].to_pylist() == [None, None]
    assert tables.attribute_columns == []


def test_photo_posts_alone_need_no_video_column(tmp_path):
    contents = [{"content_id": c, "images": [f"{c}.jpg"]} for c in ("c1", "c2")]
    tables = read_tables(write_all(tmp_path, contents=contents))
    assert tables.contents["video"].to_pylist() == [None, None]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_null_lists_are_empty(tmp_path, suffix):
    contents = changed(CONTENTS, 0, images=None)
    tables = read_tables(write_all(tmp_path, contents=contents, suffix=suffix))
    assert tables.contents["images"].to_pylist() == [[], ["c2.jpg"]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_blank_entries_of_lists_are_left_out(tmp_path, suffix):
    products = changed(PRODUCTS, 1, images=["p2.jpg", None, ""])
    contents = CONTENTS
    if suffix == ".csv":
        products, contents = in_csv(products, None), in_csv(CONTENTS, None)
    tables = read_tables(write_all(tmp_path, products=products, contents=contents, suffix=suffix))
    assert tables.products["images"].to_pylist() == [["p1.jpg"], ["p2.jpg"]]


def test_a_column_of_nulls_only(tmp_path):
    contents = [{"content_id": "c1", "title": None, "video": "c1.mp4", "images": None}]
    tables = read_tables(write_all(tmp_path, contents=contents, links=LINKS[:1]))
    assert tables.contents.to_pylist() == [
        {"content_id": "c1", "title": None, "video": "c1.mp4", "images": []}
    ]


def test_null_weights_count_one(tmp_path):
    tables = read_tables(write_all(tmp_path, links=changed(LINKS, 1, weight=None)))
    assert tables.links["weight"].to_pylist() == [2.0, 1.0]


def test_text_with_newlines_and_commas_in_csv(tmp_path):
    title = 'Two lines,\nand a "quote"'
    rows = in_csv(changed(PRODUCTS, 0, title=title), "|")
    write_all(tmp_path, products=rows, contents=in_csv(CONTENTS, "|"), suffix=".csv")
    assert read_tables(tmp_path).products["title"][0].as_py() == title


def test_paths_and_urls(tmp_path):
    tables = read_tables(write_all(tmp_path))
    assert tables.path_of("a/b.jpg") == str(tmp_path / "a" / "b.jpg")
    assert tables.path_of("/elsewhere/b.jpg") == "/elsewhere/b.jpg"
    assert tables.path_of("https://host/b.jpg") == "https://host/b.jpg"


def test_the_fingerprint_is_of_content(tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for folder in (one, two, other):
        folder.mkdir()
    links = changed(LINKS, 0, weight=3.0)
    fingerprints = [
        read_tables(write_all(one)).fingerprint,
        read_tables(write_all(two)).fingerprint,
        read_tables(write_all(other, links=links)).fingerprint,
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_write_tables_reads_back_and_leaves_a_manifest(tmp_path):
    tables = write_tables(
        tmp_path,
        products=PRODUCTS,
        contents=CONTENTS,
        links=LINKS,
        config={"seed": 1},
        counts={"in": 2},
    )
    manifest = read_manifest(tmp_path, "tables")
    assert (manifest.config, manifest.counts) == ({"seed": 1}, {"in": 2})
    assert manifest.fingerprint == tables.fingerprint == read_tables(tmp_path).fingerprint
    assert tables_manifest(tables) == manifest
    write(tmp_path, "links", LINKS[:1])
    edited = tables_manifest(read_tables(tmp_path))
    assert edited.config == {}
    assert edited.fingerprint != manifest.fingerprint


def test_write_tables_of_rows_with_different_columns(tmp_path):
    products = [without(PRODUCTS[:1], "price")[0], PRODUCTS[1]]
    tables = write_tables(
        tmp_path, products=products, contents=CONTENTS, links=LINKS, config={}, counts={}
    )
    assert tables.products["price"].to_pylist() == [None, 4.0]


# Bad tables: (what is wrong, what the message holds)

BAD: dict[str, tuple[Mapping[str, Rows], list[str]]] = {
    "missing column": (
        {"products": without(PRODUCTS, "images")},
        ["products", "missing column 'images'", "found product_id, title, price"],
    ),
    "misspelt column": (
        {"products": [{"Product ID": r["product_id"], "images": r["images"]} for r in PRODUCTS]},
        ["products", "missing column 'product_id'", "rename 'Product ID'?"],
    ),
    "misspelt images": (
        {"products": [{"product_id": r["product_id"], "image": r["images"]} for r in PRODUCTS]},
        ["products", "missing column 'images'", "rename 'image'?"],
    ),
    "no media columns": (
        {"contents": [{"content_id": "c1"}, {"content_id": "c2"}]},
        ["contents", "missing column 'video' or 'images'", "found content_id"],
    ),
    "duplicate product": (
        {"products": [*PRODUCTS, PRODUCTS[0]]},
        ["products", "row 3", "product_id", "'p1'", "first in row 1"],
    ),
    "duplicate content": (
        {"contents": [*CONTENTS, CONTENTS[1]]},
        ["contents", "row 3", "content_id", "'c2'", "first in row 2"],
    ),
    "empty id": (
        {"products": changed(PRODUCTS, 1, product_id=" ")},
        ["products", "row 2", "product_id is empty"],
    ),
    "null id": (
        {"contents": changed(CONTENTS, 0, content_id=None)},
        ["contents", "row 1", "content_id is empty"],
    ),
    "unknown product": (
        {"links": changed(LINKS, 1, product_id="p9")},
        ["links", "row 2", "product_id 'p9'", "products."],
    ),
    "unknown content": (
        {"links": changed(LINKS, 0, content_id="c9")},
        ["links", "row 1", "content_id 'c9'", "contents."],
    ),
    "null in a link": (
        {"links": changed(LINKS, 0, content_id=None)},
        ["links", "row 1", "content_id"],
    ),
    "zero weight": (
        {"links": changed(LINKS, 1, weight=0.0)},
        ["links", "row 2", "weight 0.0"],
    ),
    "negative weight": (
        {"links": changed(LINKS, 0, weight=-1.5)},
        ["links", "row 1", "weight -1.5"],
    ),
    "bad split": (
        {"links": changed(LINKS, 1, split="valid")},
        ["links", "row 2", "split 'valid'", "train, val or test"],
    ),
    "null split": (
        {"links": changed(LINKS, 1, split=None)},
        ["links", "row 2", "split"],
    ),
    "content in two splits": (
        {"links": [*LINKS, LINKS[0] | {"product_id": "p2", "split": "test"}]},
        ["links", "content 'c1'", "more than one split"],
    ),
    "duplicate link": (
        {"links": [*LINKS, LINKS[0]]},
        ["links", "row 3", "duplicate link 'c1' -> 'p1'", "first in row 1"],
    ),
    "product without images": (
        {"products": changed(PRODUCTS, 1, images=[])},
        ["products", "row 2", "product 'p2' has no images"],
    ),
    "content without media": (
        {"contents": changed(CONTENTS, 1, images=None)},
        ["contents", "row 2", "content 'c2' has neither video nor images"],
    ),
    "blank video": (
        {"contents": changed(CONTENTS, 0, video=" ")},
        ["contents", "row 1", "content 'c1' has neither video nor images"],
    ),
}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("fault", BAD)
def test_bad_tables_are_named(tmp_path, fault, suffix):
    rows, expected = BAD[fault]
    rows = {"products": PRODUCTS, "contents": CONTENTS, "links": LINKS} | dict(rows)
    if suffix == ".csv":
        rows = {name: in_csv(table, "|") for name, table in rows.items()}
    write_all(tmp_path, **rows, suffix=suffix)
    with pytest.raises(UserError) as caught:
        read_tables(tmp_path)
    message = str(caught.value)
    table = expected[0]
    assert str(tmp_path / f"{table}{suffix}") in message
    for part in expected[1:]:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, weight):
    write_all(tmp_path, links=changed(LINKS, 1, weight=weight))
    with pytest.raises(UserError, match=r"links\.parquet: row 2: weight (nan|inf) is not positive"):
        read_tables(tmp_path)


def test_a_weight_that_is_no_number(tmp_path):
    links = changed(LINKS, 1, weight="much")
    write_all(
        tmp_path,
        products=in_csv(PRODUCTS, "|"),
        contents=in_csv(CONTENTS, "|"),
        links=links,
        suffix=".csv",
    )
    with pytest.raises(UserError, match=r"links\.csv: column 'weight' is not numeric.*much"):
        read_tables(tmp_path)


@pytest.mark.parametrize("name", ["products", "contents", "links"])
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_empty_table(tmp_path, name, suffix):
    if suffix == ".csv":
        write_all(
            tmp_path,
            products=in_csv(PRODUCTS, "|"),
            contents=in_csv(CONTENTS, "|"),
            suffix=suffix,
        )
        path = tmp_path / f"{name}.csv"
        path.write_text(path.read_text().splitlines()[0] + "\n")
    else:
        write_all(tmp_path)
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match=rf"{name}\{suffix}: has no rows"):
        read_tables(tmp_path)


def test_an_empty_file(tmp_path):
    write_all(tmp_path, suffix=".jsonl")
    (tmp_path / "products.jsonl").write_text("")
    with pytest.raises(UserError, match=r"products\.jsonl"):
        read_tables(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_damaged_file(tmp_path, suffix):
    write_all(tmp_path)
    (tmp_path / "links.parquet").unlink()
    (tmp_path / f"links{suffix}").write_bytes(b'\x00\xff{"a": [\n1,2,3\n"')
    with pytest.raises(UserError, match=rf"links\{suffix}") as caught:
        read_tables(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_json_list_in_csv(tmp_path):
    products = changed(in_csv(PRODUCTS, None), 1, images='["p2.jpg"')
    write_all(tmp_path, products=products, contents=in_csv(CONTENTS, None), suffix=".csv")
    with pytest.raises(UserError, match=r"products\.csv: row 2: .*not a JSON array"):
        read_tables(tmp_path)


def test_lists_of_the_wrong_kind(tmp_path):
    write_all(tmp_path, products=[row | {"images": 7} for row in PRODUCTS])
    with pytest.raises(UserError, match=r"products\.parquet: column 'images' is int64, expected"):
        read_tables(tmp_path)


def test_an_id_of_the_wrong_kind(tmp_path):
    write_all(tmp_path, products=[row | {"product_id": ["p1"]} for row in PRODUCTS])
    with pytest.raises(UserError, match=r"products\.parquet: column 'product_id' is list"):
        read_tables(tmp_path)


def test_missing_and_doubled_tables(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_tables(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected products\.parquet or products\.csv or"):
        read_tables(tmp_path)
    write_all(tmp_path)
    write(tmp_path, "links", LINKS, ".csv")
    with pytest.raises(UserError, match=r"one links table, found links\.parquet and links\.csv"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("table", "column", "meant"),
    [
        ("links", "Split", "split"),
        ("links", "weights", "weight"),
        ("products", "Title", "title"),
        ("contents", "image", "images"),
    ],
)
def test_an_optional_column_that_is_misspelt_is_not_silently_missed(tmp_path, table, column, meant):
    rows: dict[str, Rows] = {"products": PRODUCTS, "contents": CONTENTS, "links": LINKS}
    rows[table] = [
        {(column if name == meant else name): value for name, value in row.items()}
        for row in rows[table]
    ]
    with pytest.raises(UserError, match=f"column '{column}' reads like a misspelt '{meant}'"):
        read_tables(write_all(tmp_path, **rows))


def test_two_columns_of_one_name_are_refused(tmp_path):
    write_all(
        tmp_path, suffix=".csv", products=in_csv(PRODUCTS, "|"), contents=in_csv(CONTENTS, "|")
    )
    path = tmp_path / "links.csv"
    path.write_text("content_id,product_id,weight,weight\nc1,p1,1,2\n")
    with pytest.raises(UserError, match=r"links\.csv: has 2 columns called 'weight'"):
        read_tables(tmp_path)


def test_an_attribute_may_share_a_name_with_another_tables_column(tmp_path):
    products = [row | {"weight": 1.5} for row in in_csv(PRODUCTS, "|")]
    write_all(tmp_path, suffix=".csv", products=products, contents=in_csv(CONTENTS, "|"))
    assert read_tables(tmp_path).products["weight"].to_pylist() == [1.5, 1.5]


def test_bytes_that_are_not_text_are_refused(tmp_path):
    write_all(
        tmp_path, suffix=".csv", products=in_csv(PRODUCTS, "|"), contents=in_csv(CONTENTS, "|")
    )
    path = tmp_path / "products.csv"
    path.write_bytes(
        "product_id,title,images,brand\np1,a,a.jpg,Café\np2,b,b.jpg,x\n".encode("latin-1")
    )
    with pytest.raises(UserError, match="column 'brand' holds bytes that are not UTF-8"):
        read_tables(tmp_path)


def test_a_path_may_start_with_a_bracket(tmp_path):
    products = in_csv(PRODUCTS, "|")
    products[0]["images"] = "[new] mug.jpg"
    write_all(tmp_path, suffix=".csv", products=products, contents=in_csv(CONTENTS, "|"))
    assert read_tables(tmp_path).products["images"][0].as_py() == ["[new] mug.jpg"]


# Lists in text: by column where no cell is JSON, by cell where one is


@pytest.mark.parametrize("with_json", [False, True])
def test_lists_in_text_are_split_trimmed_and_rid_of_blanks(tmp_path, with_json):
    cells = ["a.jpg", " b.jpg | c d.jpg|", "|", "e.jpg||f.jpg", None, " "]
    lists = [["a.jpg"], ["b.jpg", "c d.jpg"], [], ["e.jpg", "f.jpg"], [], []]
    if with_json:
        cells.append('["g|h.jpg", "", "i.jpg"]')
        lists.append(["g|h.jpg", "i.jpg"])
    contents = [
        {"content_id": f"c{i}", "video": f"{i}.mp4", "images": cell} for i, cell in enumerate(cells)
    ]
    links = [{"content_id": "c0", "product_id": "p1"}]
    for suffix in (".parquet", ".csv"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        products = in_csv(PRODUCTS, "|") if suffix == ".csv" else PRODUCTS
        write_all(folder, contents=contents, products=products, links=links, suffix=suffix)
        assert read_tables(folder).contents["images"].to_pylist() == lists


def test_blank_entries_leave_all_other_lists_as_they_are(tmp_path):
    lists = [["a.jpg"], [" ", "b.jpg", None], None, [""], ["c.jpg", "d.jpg"]]
    contents = [
        {"content_id": f"c{i}", "video": f"{i}.mp4", "images": cell} for i, cell in enumerate(lists)
    ]
    write_all(tmp_path, contents=contents, links=[{"content_id": "c0", "product_id": "p1"}])
    table = pq.read_table(tmp_path / "contents.parquet")
    pq.write_table(table, tmp_path / "contents.parquet", row_group_size=2)
    expected = [["a.jpg"], ["b.jpg"], [], [], ["c.jpg", "d.jpg"]]
    assert read_tables(tmp_path).contents["images"].to_pylist() == expected


# Tables elsewhere


def test_tables_behind_http(tmp_path, monkeypatch):
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t").mkdir()
    local = write_tables(
        tmp_path / "t", products=PRODUCTS, contents=CONTENTS, links=LINKS, config={}, counts={}
    )
    with http_server(tmp_path) as server:
        url = f"{server.url}/t"
        tables = read_tables(url)
        assert tables.fingerprint == local.fingerprint
        assert tables.contents.to_pylist() == local.contents.to_pylist()
        assert tables.path_of("a/b 1.jpg") == f"{url}/a/b%201.jpg"
        assert tables.path_of("../b.jpg") == f"{server.url}/b.jpg"
        assert tables.path_of("s3://bucket/b.jpg") == "s3://bucket/b.jpg"
        assert tables_manifest(tables) == read_manifest(tmp_path / "t")
        with pytest.raises(UserError, match=rf"{server.url}/x: has no products table"):
            read_tables(f"{server.url}/x")
        write(tmp_path / "t", "links", changed(LINKS, 1, product_id="p9"))
        with pytest.raises(UserError, match=rf"{url}/links\.parquet: row 2: product_id 'p9'"):
            read_tables(url)


def test_tables_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    write_all(
        tmp_path, suffix=".csv", products=in_csv(PRODUCTS, "|"), contents=in_csv(CONTENTS, "|")
    )
    with s3_server(tmp_path / "log") as bucket:
        for path in tmp_path.glob("*.csv"):
            write_bytes_whole(place(f"{bucket}/t/{path.name}"), path)
        tables = read_tables(f"{bucket}/t")
        assert tables.links.to_pylist() == LINKS
        assert tables.path_of("b.jpg") == f"{bucket}/t/b.jpg"
