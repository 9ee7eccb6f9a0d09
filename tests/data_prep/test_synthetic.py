"""The generator: what it writes is whole, as it was told, and the same every time."""

import hashlib
import importlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mmrec.data.tables import Tables, read_tables
from mmrec.errors import UserError
from mmrec.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT))
program = importlib.import_module("data_prep.synthetic")

ATTRIBUTES = ("shape", "colour", "pattern", "word")


def small_config(out: Path, **changes):
    small = {"num_products": 12, "num_contents": 40, "clip_frames": 6, "clip_size": 64}
    return program.SyntheticConfig(out=out, **(small | {"num_workers": 1} | changes))


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return program.generate(small_config(tmp_path_factory.mktemp("synthetic") / "tables"))


def plan(tmp_path: Path, **changes):
    """The catalogue and the contents of a larger set, without drawing them."""
    config = program.SyntheticConfig(out=tmp_path, **changes)
    products = program._draw_products(config)
    return products, program._plan_contents(config, products)


def hashes(folder: Path) -> dict[str, str]:
    """Every file's hash but the manifest's, which records where the folder was made."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_tables_read_back_and_name_every_media_file(tables: Tables):
    again = read_tables(tables.root)
    assert again.fingerprint == tables.fingerprint
    assert (again.products.num_rows, again.contents.num_rows) == (12, 40)
    named = {path for paths in again.products["images"].to_pylist() for path in paths}
    named |= set(again.contents["video"].to_pylist())
    assert named == {name for name in hashes(tables.root) if name.startswith("media")}
    assert again.attribute_columns == ["category", *ATTRIBUTES, "price"]


def test_clips_are_h264_of_the_asked_size_length_and_rate(tables: Tables):
    for video in tables.contents["video"].to_pylist()[:5]:
        with av.open(tables.path_of(video)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == 6
        # The picture moves, and has something in it.
        assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 3
        assert frames[0].std() > 15


def test_pictures_show_the_product_in_its_colour_on_white(tables: Tables):
    for row in tables.products.to_pylist():
        pixels = np.asarray(Image.open(tables.path_of(row["images"][0]))).astype(int)
        assert pixels.shape == (256, 256, 3)
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] > 245).all()
        own = np.abs(pixels - program.COLOURS[row["colour"]]).max(axis=2) < 40
        assert own.mean() > 0.03, row["title"]


def test_same_seed_same_bytes_with_any_number_of_workers(tables: Tables, tmp_path: Path):
    two = program.generate(small_config(tmp_path / "two", num_workers=2))
    assert hashes(two.root) == hashes(tables.root)
    one, other = read_manifest(tables.root), read_manifest(two.root)
    assert (one.counts, one.fingerprint) == (other.counts, other.fingerprint)


def test_another_seed_gives_other_products_and_clips(tables: Tables, tmp_path: Path):
    other = program.generate(small_config(tmp_path / "other", seed=1))
    assert other.fingerprint != tables.fingerprint
    old, new = hashes(tables.root), hashes(other.root)
    assert not any(old[name] == new[name] for name in old if name.endswith(".mp4"))


def test_manifest_counts_what_the_tables_hold(tables: Tables):
    counts = read_manifest(tables.root, "tables").counts
    links = tables.links.to_pylist()
    splits = {link["content_id"]: link["split"] for link in links}
    warm = {link["product_id"] for link in links if link["split"] == "train"}
    pictures = tables.products["images"].to_pylist()
    assert counts == {
        "products": 12,
        "cold_products": 12 - len(warm),
        "pictures": sum(map(len, pictures)),
        "contents": dict(Counter(splits.values())),
        "links": len(links),
        "titles": dict(Counter(tables.contents["title_kind"].to_pylist())),
    }
    assert counts["contents"] == {"train": 28, "val": 4, "test": 8}
    assert counts["cold_products"] == 1


def test_products_differ_and_many_differ_in_one_attribute_alone(tmp_path: Path):
    products, _ = plan(tmp_path)
    values = np.array([[getattr(item, name) for name in ATTRIBUTES] for item in products])
    same = (values[:, None] == values[None]).sum(axis=2)
    np.fill_diagonal(same, 0)
    assert same.max() == 3
    assert (same == 3).any(axis=1).mean() > 0.5
    assert len({item.title for item in products}) == len(products) == 240


def test_a_tenth_of_the_products_is_cold_and_every_product_is_tested(tmp_path: Path):
    products, contents = plan(tmp_path)
    shown = {split: set() for split in ("train", "val", "test")}
    for content in contents:
        shown[content.split] |= set(content.products)
    cold = set(products) - shown["train"]
    assert len(cold) == 24
    assert shown["test"] == set(products)
    # Ids must not tell which products are cold.
    assert 60 < np.mean([item.number for item in cold]) < 180
    first = Counter(content.products[0] in cold for content in contents if content.split == "test")
    assert first == {True: 64, False: 256}


def test_second_products_are_linked_with_half_the_weight(tmp_path: Path):
    _, contents = plan(tmp_path)
    pairs = [content for content in contents if len(content.products) == 2]
    assert 0.07 < len(pairs) / len(contents) < 0.13
    rows = program._link_rows(pairs[0])
    assert [row["weight"] for row in rows] == [1.0, 0.5]
    assert len({row["product_id"] for row in rows}) == 2


def test_titles_say_what_their_kind_promises_at_the_set_rates(tmp_path: Path):
    _, contents = plan(tmp_path)
    rates = {"missing": 0.15, "vague": 0.2, "wrong": 0.1, "right": 0.55}
    counts = Counter(content.title_kind for content in contents)
    for kind, rate in rates.items():
        assert counts[kind] / len(contents) == pytest.approx(rate, abs=0.03)
    vocabulary = {*program.SHAPES, *program.COLOURS, *program.PATTERNS, *program.WORDS}
    for content in contents:
        said = vocabulary & set((content.title or "").lower().replace(",", " ").split())
        true = {getattr(content.products[0], name) for name in ATTRIBUTES}
        assert (content.title is None) == (content.title_kind == "missing")
        if content.title_kind == "right":
            assert 1 <= len(said) <= 2
            assert said <= true
        elif content.title_kind == "wrong":
            assert len(said - true) == 1
        else:
            assert not said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_products": 9}, "--num-products: expected 10 to 4608"),
        ({"num_products": 4609, "num_contents": 9000}, "--num-products: expected 10 to 4608"),
        ({"clip_size": 65}, "--clip-size: expected an even number"),
        ({"clip_size": 16}, "--clip-size: expected an even number"),
        ({"clip_frames": 0}, "--clip-frames: expected at least 1"),
        ({"title_wrong": -0.1}, "--title-wrong: expected 0 to 1, found -0.1"),
        ({"title_missing": 0.5, "title_vague": 0.5}, "expected at most 1 in all, found 1.1"),
        ({"cold_fraction": 0.9}, "--cold-fraction: expected 0 to 0.5"),
        ({"num_distractors": 11}, "--num-distractors: expected 0 to 10"),
        ({"num_contents": 12}, "expected a training content for each of 11 products"),
        ({"val": 0.6, "test": 0.6}, "expected a training content"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, changes, message):
    with pytest.raises(UserError, match=message):
        program.generate(small_config(tmp_path / "tables", **changes))
    assert list(tmp_path.iterdir()) == []


def test_extreme_rates_and_a_still_clip_work(tmp_path: Path):
    config = small_config(
        tmp_path / "tables",
        num_contents=12,
        clip_frames=1,
        num_distractors=0,
        cold_fraction=0.0,
        second_product=1.0,
        title_missing=0.7,
        title_vague=0.2,
        title_wrong=0.1,
        val=0.0,
        test=0.0,
    )
    tables = program.generate(config)
    assert set(tables.links["split"].to_pylist()) == {"train"}
    assert "right" not in tables.contents["title_kind"].to_pylist()


def test_an_output_that_is_there_is_kept_unless_told_otherwise(tables: Tables, tmp_path: Path):
    config = small_config(tmp_path / "tables", num_contents=16)
    first = program.generate(config)
    with pytest.raises(UserError, match="already exists"):
        program.generate(config)
    second = program.generate(replace(config, seed=3, overwrite=True))
    assert first.fingerprint != second.fingerprint


def test_the_program_runs_from_the_command_line(tmp_path: Path):
    command = [sys.executable, "data_prep/synthetic.py", "--out", str(tmp_path / "tables")]
    command += ["--num-products", "12", "--num-contents", "24", "--clip-frames", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "12 products, 24 contents" in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "already exists" in again.stderr
