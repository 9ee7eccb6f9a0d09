"""train/mine_negatives.py beside a brute-force search, and training on what it wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import load_program
from written_shards import TINY_VIT, write_shards

from mmrec.data.negatives import FILE_NAME
from mmrec.data.shards import open_shards
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.retrieval.embed import embed_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 contents and 12 products, and an encoder with random weights."""
    folder = tmp_path_factory.mktemp("mining")
    write_shards(folder / "shards", num_contents=20, num_val=0, num_products=12)
    (folder / "vit.json").write_text(json.dumps(TINY_VIT))
    torch.manual_seed(0)
    Encoder(EncoderConfig(towers=str(folder / "vit.json"))).save(folder / "encoder")
    return folder


def mine(folder: Path, out: Path, **changes: Any) -> Path:
    program = load_program("train/mine_negatives.py")
    config = {"num_workers": 0, "device": "cpu", "shards": (folder / "shards",)} | changes
    return program.main(program.MineConfig(encoder=folder / "encoder", out=out, **config))


def test_the_table_is_that_of_a_search_by_hand(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = mine(folder, tmp_path / "negatives", num_negatives=3, depth=9, margin=0.02)
    encoder = Encoder.load(folder / "encoder")
    catalog = open_shards(folder / "shards", "products", "catalog")
    contents = open_shards(folder / "shards", "contents", "train")
    products = embed_rows(encoder, catalog)
    names = [ids[0] for ids in catalog.product_ids]
    linked = {p for ids in contents.product_ids for p in ids}
    expected = {}
    for i, vector in enumerate(embed_rows(encoder, contents)):
        own = contents.product_ids[i]
        scores = {name: float(vector @ products[row]) for row, name in enumerate(names)}
        best = max(scores[p] for p in own)
        nearest = sorted(names, key=lambda name: -scores[name])[:9]
        kept = [
            p
            for p in nearest
            if p not in own and p in linked and scores[p] <= best - 0.02 * abs(best)
        ]
        expected[contents.content_ids[i]] = (kept[:3], [scores[p] for p in kept[:3]])
    rows = pq.read_table(out / FILE_NAME).to_pylist()
    assert {row["content_id"]: row["product_ids"] for row in rows} == {
        name: ids for name, (ids, _) in expected.items()
    }
    for row in rows:
        np.testing.assert_allclose(row["scores"], expected[row["content_id"]][1], atol=1e-5)
    manifest = read_manifest(out, "negatives")
    assert [parent.kind for parent in manifest.parents] == ["encoder", "shards"]
    counts = manifest.counts
    assert counts["candidates"] == 20 * 9 == counts["kept"] + sum(counts["dropped"].values())
    printed = capsys.readouterr().out
    assert f"own product       {counts['dropped']['own product']:>10}" in printed
    assert f"{counts['kept'] / 180:6.1%}" in printed


def test_settings_out_of_range_are_refused(folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"margin": 1.0}, r"--margin 1\.0: expected 0 to below 1"),
        ({"depth": 0}, "--depth 0: expected at least 1"),
        ({"shards": (tmp_path / "no",)}, "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            mine(folder, tmp_path / "negatives", **changes)
    assert not (tmp_path / "negatives").exists()
