"""train/mine_negatives.py beside a brute-force search, and training on what it wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import load_program
from forked_training import TrainingServer
from written_shards import TINY_VIT, write_shards

from mmrec.data.negatives import FILE_NAME
from mmrec.data.shards import open_shards
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.retrieval.embed import embed_rows
from mmrec.training.run import read_metrics


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
    program = load_program("train/mine_negatives.py")
    for changes, message in (
        ({"margin": 1.0}, r"--margin 1\.0: expected 0 to below 1"),
        ({"depth": 0}, "--depth 0: expected at least 1"),
        ({"num_workers": -1}, "--num-workers -1: expected at least 0"),
        ({"factory": "Flt"}, "'Flt' is not a FAISS factory"),
        ({"shards": (tmp_path / "no",)}, "no such folder"),
    ):
        places = {"encoder": folder / "encoder", "shards": (folder / "shards",)} | changes
        with pytest.raises(UserError, match=message):
            program.check(program.MineConfig(out=tmp_path / "negatives", **places))


def losses_of(
    server: TrainingServer, folder: Path, out: Path, *options: str | Path, ranks: int = 1
) -> list[float]:
    """Train for four steps; the loss of each."""
    flags = "--encoder.image-size 32 --sampler.batch-size 8 --epochs 2 --log-every 1"
    arguments = ["demo", "--shards", folder / "shards", "--out", out]
    arguments += ["--encoder.towers", folder / "vit.json", *flags.split()]
    arguments += ["--num-workers", "0", "--cpu-threads", "1", *options]
    run = server.start(arguments, ranks=ranks, log=out.with_suffix(".log"))
    assert run.wait() == [0] * ranks, run.text()
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    return mine(folder, folder / "negatives", num_negatives=3, margin=0.0)


@pytest.fixture(scope="module")
def plain(server: TrainingServer, folder: Path) -> list[float]:
    """The losses of a run without hard negatives."""
    return losses_of(server, folder, folder / "plain")


@pytest.mark.parametrize("share", ["--share-negatives", "--no-share-negatives"])
def test_two_ranks_train_on_a_table_as_one_does(
    server: TrainingServer,
    folder: Path,
    table: Path,
    plain: list[float],
    tmp_path: Path,
    share: str,
) -> None:
    """Also with a cache, and unlike training without the table."""
    mined = ["--negatives", table, "--num-negatives", "2", share]
    cache = ["--cache.frames", "3", "--cache.images", "4", "--cache.texts", "5"]
    one = losses_of(server, folder, tmp_path / "one", *mined)
    two = losses_of(server, folder, tmp_path / "two", *mined, *cache, ranks=2)
    assert len(one) == 4
    assert two == pytest.approx(one, rel=2e-4)
    # More columns that are no positives: the same first step has a larger loss.
    assert one[0] > plain[0] + 0.02


def test_a_resume_on_another_table_is_refused(
    server: TrainingServer, folder: Path, tmp_path: Path
) -> None:
    table = mine(folder, tmp_path / "negatives")
    arguments = ["demo", "--shards", folder / "shards", "--out", tmp_path / "run"]
    arguments += ["--encoder.towers", folder / "vit.json", "--sampler.batch-size", "8", "--resume"]
    arguments += ["--epochs", "1", "--num-workers", "0", "--negatives", table]
    for status, message in ((0, "trained 2 steps"), (1, "cannot resume on other shards")):
        run = server.start(arguments, log=tmp_path / "log")
        assert run.wait() == [status], run.text()
        assert message in run.text()
        mine(folder, table, num_negatives=1, overwrite=True)
