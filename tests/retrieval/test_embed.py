"""Embedding of shards into parts: on ranks, after kills, in the layout that others read, faults refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run
from foreign_embeddings import write_foreign
from small_towers import small_encoder
from vectors import names, unit_vectors
from written_shards import write_shards

from mmrec import Matcher, ProductIndex, cli
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.retrieval import embed
from mmrec.retrieval.embed import embed_rows, embed_shards, open_split, read_embeddings
from mmrec.retrieval.matcher import upsert_embeddings
from mmrec.retrieval.parts import open_parts

AUTOFAISS = ROOT / ".peers/autofaiss/bin/python"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five train shards of five contents and one of three, and a catalogue in two."""
    return write_shards(tmp_path_factory.mktemp("embed") / "shards", num_contents=28)


@pytest.fixture(scope="module")
def encoder(shards: Path) -> Path:
    """A small encoder on the disk."""
    out = shards.parent / "encoder"
    small_encoder(shards.parent).save(out)
    return out


@pytest.fixture(scope="module")
def whole(encoder: Path, shards: Path) -> Path:
    """The train split as one process embeds it, on one thread: sums have an order of their own on several."""
    out, threads = shards.parent / "whole", torch.get_num_threads()
    torch.set_num_threads(1)
    embed_shards(encoder, shards, out, split="train", batch_size=2)
    torch.set_num_threads(threads)
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_parts_hold_what_the_encoder_says(whole: Path, encoder: Path, shards: Path) -> None:
    reader = open_split(shards, "train")
    from mmrec.model.encoder import Encoder

    right = embed_rows(Encoder.load(encoder, device="cpu"), reader)
    loaded = read_embeddings(whole)
    assert loaded.ids == reader.content_ids
    np.testing.assert_allclose(loaded.vectors, right, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(loaded.vectors, axis=1), 1, atol=1e-6)
    sizes = [len(np.load(path)) for path in sorted((whole / "img_emb").iterdir())]
    assert sizes == reader.shard_sizes
    assert len(loaded.metadata["product_ids"][0]) >= 1
    assert read_manifest(whole).counts == {"in": 28, "out": 28, "dropped": {}}


@pytest.fixture(scope="module")
def ranks(encoder: Path, shards: Path) -> dict[str, Any]:
    """What became of the runs of several ranks that embed_on_ranks.py makes, beside `whole`."""
    program = ROOT / "tests/embed_on_ranks.py"
    done = run(sys.executable, program, encoder, shards, shards.parent, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


def test_two_ranks_write_the_bytes_that_one_does(ranks: dict[str, Any], whole: Path) -> None:
    assert ranks["two"] == [0, 0]
    assert bytes_of(whole.with_name("two")) == bytes_of(whole)
    assert "embedded 28 items, 16 wide" in whole.with_name("two.txt").read_text()
    assert "on 2 processes" in whole.with_name("two.txt").read_text()


def test_killed_ranks_go_on_as_three_and_no_part_is_made_twice(
    ranks: dict[str, Any], whole: Path
) -> None:
    assert ranks["killed"] == [-9, -9]
    assert ranks["resumed"] == [0, 0, 0]
    assert 2 <= len(ranks["whole"]) < 6
    assert ranks["kept"] == ranks["whole"]
    assert ranks["left"] == []
    assert "of them found" in whole.with_name("killed.txt").read_text()
    assert bytes_of(whole.with_name("killed")) == bytes_of(whole)


def test_what_one_rank_refuses_ends_all(ranks: dict[str, Any]) -> None:
    assert ranks["refused"] == [1, 1]
    assert ranks["stderr"].count("already exists") == 2


def test_unfinished_work_of_other_settings_is_not_mixed_in(
    encoder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_part", broken)
        with pytest.raises(OSError, match="no space"):
            embed_shards(encoder, shards, out, split="train")
    with pytest.raises(UserError, match=r"dtype was float16, is float32.*--restart throws it away"):
        embed_shards(encoder, shards, out, split="train", dtype="float32")
    summary = embed_shards(encoder, shards, out, split="train", dtype="float32", restart=True)
    assert summary.new_rows == summary.rows == 28
    assert np.load(out / "img_emb/img_emb_000000.npy").dtype == np.float32
    with pytest.raises(UserError, match="already exists"):
        embed_shards(encoder, shards, out, split="train")
    embed_shards(encoder, shards, out, split="catalog", overwrite=True)
    assert read_manifest(out).details["family"] == "products"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["old", "whole", "unfinished"])
def test_a_run_killed_after_it_published_is_tidied_by_the_next(
    place: str, overwrite: bool, encoder: Path, shards: Path, tmp_path: Path
) -> None:
    out, rmtree = tmp_path / "out", shutil.rmtree

    def killed(path: Path, **how: bool) -> None:
        if out.is_dir() and path.name.endswith(place):
            raise KeyboardInterrupt
        rmtree(path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_shards(encoder, shards, out, split="train")
    before = bytes_of(out)
    summary = embed_shards(encoder, shards, out, split="train", overwrite=overwrite)
    assert (summary.rows, summary.new_rows) == (28, 0)
    assert bytes_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="already exists"):
        embed_shards(encoder, shards, out, split="train")


def test_a_run_that_goes_on_takes_the_threads_that_it_began_with(
    encoder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, made = [], embed.embed_parts
    before = torch.get_num_threads()

    def noted(*args: Any, **how: Any):
        used.append(torch.get_num_threads())
        return made(*args, **how)

    monkeypatch.setattr(embed, "embed_parts", noted)
    try:
        torch.set_num_threads(2)
        with monkeypatch.context() as patch:
            patch.setattr(embed, "write_record", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                embed_shards(encoder, shards, tmp_path / "out", split="train")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        embed_shards(encoder, shards, tmp_path / "out", split="train")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert used == [2, 2]


def test_a_part_that_was_damaged_before_the_end_is_made_again(
    encoder: Path, shards: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shards.parent / "damaged"
    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed_shards(encoder, shards, out, split="train", batch_size=2)
    (out.with_name(".damaged.unfinished") / "embeddings/img_emb/img_emb_000003.npy").unlink()
    summary = embed_shards(encoder, shards, out, split="train", batch_size=2)
    assert summary.new_rows == 5
    assert read_embeddings(out).ids == read_embeddings(whole).ids


def test_items_without_a_direction_are_named(
    encoder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embed.embed_parts

    def spoiled(*args: object, **kwargs: object):
        for number, vectors in made(*args, **kwargs):  # pyright: ignore
            vectors[1] = np.nan if number == 2 else vectors[1]
            yield number, vectors

    monkeypatch.setattr(embed, "embed_parts", spoiled)
    with pytest.raises(UserError, match="1 embeddings of a shard of 5 have no direction: 'c11'"):
        embed_shards(encoder, shards, tmp_path / "out", split="train")
    assert not (tmp_path / "out").exists()


def test_ids_that_occur_twice_are_named_before_any_work(
    encoder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*args: object):
        reader = open_split(*args)  # pyright: ignore
        reader.content_ids[7] = "c02"
        return reader

    monkeypatch.setattr(embed, "open_split", twice)
    with pytest.raises(UserError, match="ids that occur more than once: 'c02'"):
        embed_shards(encoder, shards, tmp_path / "out", split="train")
    assert not list(tmp_path.iterdir())


READ_AS_OTHERS = """
import json, sys
from embedding_reader import EmbeddingReader
folder = sys.argv[1]
found = {"ids": [], "vectors": [], "numpy": []}
options = {"metadata_folder": folder + "/metadata", "meta_columns": ["id", "title"]}
reader = EmbeddingReader(folder + "/img_emb", file_format="parquet_npy", **options)
for vectors, meta in reader(batch_size=7, show_progress=False):
    found["ids"] += meta["id"].tolist()
    found["vectors"] += vectors.tolist()
for vectors, _ in EmbeddingReader(folder + "/img_emb", file_format="npy")(batch_size=4):
    found["numpy"] += vectors.tolist()
from autofaiss import build_index
index, _ = build_index(embeddings=folder + "/img_emb", save_on_disk=False, index_key="Flat",
                       metric_type="ip", verbose=50)
import numpy as np
_, rows = index.search(np.array(found["vectors"], "float32"), 1)
found["nearest"] = rows[:, 0].tolist()
open(sys.argv[2], "w").write(json.dumps(found))
"""


def test_autofaiss_and_its_reader_open_ours(whole: Path, tmp_path: Path) -> None:
    if not AUTOFAISS.exists():
        pytest.skip("no .peers/autofaiss: a virtual environment with 'autofaiss' and 'pyarrow<20'")
    done = run(AUTOFAISS, "-c", READ_AS_OTHERS, whole, tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    loaded = read_embeddings(whole)
    assert found["ids"] == loaded.ids
    assert found["nearest"] == list(range(len(loaded.ids)))
    for vectors in (found["vectors"], found["numpy"]):
        np.testing.assert_allclose(vectors, loaded.vectors, atol=1e-3)


def test_the_names_sort_as_text_and_pair_by_place(whole: Path) -> None:
    """What embedding-reader assumes, for where autofaiss is not at hand."""
    pairs = zip(
        sorted(map(str, (whole / "img_emb").rglob("*.npy"))),
        sorted(map(str, (whole / "metadata").rglob("*.parquet"))),
        strict=True,
    )
    ids = []
    for vectors, metadata in pairs:
        first_line = Path(vectors).read_bytes()[:300].split(b"\n")[0]
        assert b"'descr': '<f2'" in first_line
        table = pq.read_table(metadata)
        assert 0 < len(table) == len(np.load(vectors))
        ids += table["id"].to_pylist()
    assert ids == read_embeddings(whole).ids


def test_ours_opens_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve parts without leading zeros: as text, 10 comes before 2."""
    vectors = unit_vectors(24).astype(np.float16)
    folder = write_foreign(tmp_path / "theirs", names(24), vectors, [2] * 12)
    with pytest.raises(UserError, match="give one with --ids, of caption, sku, price"):
        cli.index_build(embeddings=folder, out=tmp_path / "index")
    with pytest.raises(UserError, match="has no column 'nosuch'; give one with --ids"):
        cli.index_build(embeddings=folder, out=tmp_path / "index", ids="nosuch")
    cli.index_build(embeddings=folder, out=tmp_path / "index", ids="sku")
    assert "indexed 24 products" in capsys.readouterr().out
    index = ProductIndex.load(tmp_path / "index", device="cpu")
    assert index.ids == names(24)
    assert index.search(vectors.astype(np.float32), 1).ids == [[name] for name in names(24)]
    found = index.search(vectors[:1].astype(np.float32), 24, where="price >= 20").ids[0]
    assert sorted(found) == names(24)[20:]
    more = write_foreign(tmp_path / "more", ["new-1", "new-2"], vectors[:2], [2])
    cli.index_upsert(index=tmp_path / "index", embeddings=more, ids="sku")
    assert len(ProductIndex.load(tmp_path / "index", device="cpu")) == 26
    cli.inspect(tmp_path / "index")
    assert "has no manifest" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not say which encoder"):
        Matcher.load(tmp_path / "index")


def test_what_theirs_does_not_say(whole: Path, tmp_path: Path) -> None:
    """An encoder that is not known is accepted on request, and ids are ours alone where mmrec wrote them."""
    vectors = unit_vectors(6, width=16).astype(np.float16)
    theirs = write_foreign(tmp_path / "theirs", names(6), vectors, [6])
    out = tmp_path / "index"
    cli.index_build(embeddings=whole, out=out)
    with pytest.raises(UserError, match="was written by mmrec, with ids of its own"):
        cli.index_build(embeddings=whole, out=tmp_path / "other", ids="title")
    cli.index_build(embeddings=theirs, out=out, ids="sku", overwrite=True)
    own = read_manifest(whole).parent("encoder")
    with ProductIndex.load(out, device="cpu") as index:
        index.manifest = replace(index.manifest, parents=[own])  # pyright: ignore
        with pytest.raises(UserError, match=r"by encoder unknown, and the index by .*--accept-enc"):
            upsert_embeddings(index, theirs, ids="sku")
        assert upsert_embeddings(index, theirs, ids="sku", accept_encoder=True) == 6


def test_their_vectors_serve_as_queries(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit_vectors(300, width=16).astype(np.float16)
    theirs = write_foreign(tmp_path / "theirs", names(300), vectors, [200, 100])
    out, matches = tmp_path / "index", tmp_path / "matches.parquet"
    # A folder of the name that stands for the catalogue itself.
    shutil.copytree(theirs, tmp_path / "catalogue")
    monkeypatch.chdir(tmp_path)
    for queries in (str(theirs), "./catalogue"):
        cli.index_build(
            embeddings=theirs,
            out=out,
            ids="sku",
            recall_target=0.9,
            queries=queries,
            overwrite=True,
        )
    with pytest.warns(UserWarning, match="not known which encoder made them"):
        cli.search(index=out, queries=theirs, out=matches, k=1)
    assert pq.read_table(matches)["query"].to_pylist() == [str(row) for row in range(300)]
    with pytest.warns(UserWarning, match="not known which encoder made them"):
        cli.search(index=out, queries=theirs, query_ids="sku", out=matches, k=1)
    assert pq.read_table(matches)["query"].to_pylist() == names(300)
    with pytest.warns(UserWarning, match="not known which encoder made them"):
        Matcher.load(out, encoder=encoder)


def test_columns_of_other_types_in_other_parts_are_one_line(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "theirs", names(4), unit_vectors(4), [2, 2])
    path = folder / "metadata/metadata_1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "price", [["cheap", "dear"]]), path)
    for memory_gb in (None, 1e-9):
        with pytest.raises(UserError, match=r"metadata: a column has other types in some parts"):
            cli.index_build(embeddings=folder, out=tmp_path / "i", ids="sku", memory_gb=memory_gb)


def test_ids_that_are_numbers_become_text(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "theirs", names(6), unit_vectors(6), [3, 3])
    cli.index_build(embeddings=folder, out=tmp_path / "index", ids="price")
    assert ProductIndex.load(tmp_path / "index").ids == [str(number) for number in range(6)]


def test_a_part_of_ours_that_is_gone_or_changed_is_named(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    path = copy / "metadata/metadata_000002.parquet"
    pq.write_table(pq.read_table(path).slice(0)[::-1], path)
    with pytest.raises(UserError, match=r"metadata_000002\.parquet: is not the file that was"):
        read_embeddings(copy)
    (copy / "img_emb/img_emb_000001.npy").unlink()
    with pytest.raises(UserError, match="expected 6 parts, found 5"):
        open_parts(copy)
    (copy / "parts.json").write_text("[]")
    with pytest.raises(UserError, match=r"parts\.json: is not the one that manifest\.json names"):
        open_parts(copy)
