"""The Grocery Store program: on a small clone made here, and on the shared copy if it is there."""

import hashlib
import importlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrec.data.tables import read_tables
from mmrec.errors import UserError
from mmrec.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
SHARED_COPY = ROOT.parent / "shared" / "data" / "GroceryStoreDataset"

sys.path.insert(0, str(ROOT))
program = importlib.import_module("data_prep.grocery_store")

# Name, coarse name, category, and photos in train, val and test.
CLASSES = [
    ("Golden-Delicious", "Apple", "Fruit", (7, 1, 2)),
    ("Sour-Milk", "Sour-Milk", "Packages", (11, 0, 3)),
]
HEADER = (
    "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),"
    "Iconic Image Path (str),Product Description Path (str)\n"
)


def write_photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((64, 48)).save(path)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with the dataset's layout: 2 products, 24 photos."""
    dataset = tmp_path / "clone" / "dataset"
    rows: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    classes = HEADER
    for label, (name, coarse, category, sizes) in enumerate(CLASSES):
        home = f"/iconic-images-and-descriptions/{category}/{name}/{name}"
        classes += f"{name},{label},{coarse},{label},{home}_Iconic.jpg,{home}_Description.txt\n"
        write_photo(dataset / f".{home}_Iconic.jpg", label)
        text = f"{name} is\n  from Arlagårdar. \n"
        (dataset / f".{home}_Description.txt").write_text(text, encoding="utf-8")
        for split, size in zip(rows, sizes, strict=True):
            for number in range(size):
                photo = f"{split}/{category}/{name}/{name}_{number:03d}.jpg"
                write_photo(dataset / photo, len(classes) + 100 * len(split) + number)
                rows[split].append(f"{photo}, {label}, {label}\n")
    (dataset / "classes.csv").write_text(classes)
    for split, lines in rows.items():
        (dataset / f"{split}.txt").write_text("".join(lines))
    return dataset.parent


@pytest.fixture
def config(clone: Path, tmp_path: Path):
    return program.GroceryStoreConfig(
        source=clone, out=tmp_path / "tables", clip_size=32, num_workers=1
    )


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_photos_become_contents_in_place(config):
    program.main(config)
    tables = read_tables(config.out)
    assert tables.attribute_columns == ["category", "coarse", "description"]
    first = tables.products.to_pylist()[0]
    assert first["product_id"] == "Golden-Delicious"
    assert first["title"] == "Golden Delicious"
    assert first["coarse"] == "Apple"
    assert first["category"] == "Fruit"
    assert first["description"] == "Golden-Delicious is from Arlagårdar."
    contents = tables.contents.to_pylist()
    assert len(contents) == 24
    assert {content["title"] for content in contents} == {None}
    for row in [*tables.products.to_pylist(), *contents]:
        (image,) = row["images"]
        assert not Path(image).is_absolute()
        assert config.source.resolve() in Path(tables.path_of(image)).resolve().parents
        assert Path(tables.path_of(image)).is_file()
    links = tables.links.to_pylist()
    assert Counter((link["product_id"], link["split"]) for link in links) == {
        ("Golden-Delicious", "train"): 7,
        ("Golden-Delicious", "val"): 1,
        ("Golden-Delicious", "test"): 2,
        ("Sour-Milk", "train"): 11,
        ("Sour-Milk", "test"): 3,
    }
    images = {content["content_id"]: content["images"][0] for content in contents}
    for link in links:
        path = Path(images[link["content_id"]])
        assert path.parent.name == link["product_id"]
        assert link["split"] in path.parts


def test_coarse_titles(config):
    program.main(replace(config, titles="coarse"))
    tables = read_tables(config.out)
    products = {link["content_id"]: link["product_id"] for link in tables.links.to_pylist()}
    for content in tables.contents.to_pylist():
        expected = {"Golden-Delicious": "Apple", "Sour-Milk": "Sour Milk"}
        assert content["title"] == expected[products[content["content_id"]]]


def test_every_photo_is_in_one_clip_of_its_own_product_and_split(config):
    photos = [
        program.Photo(path=f"{split}/{product}_{number}.jpg", product_id=product, split=split)
        for split in ("train", "test")
        for product, size in (("a", 1), ("b", 2), ("c", 3), ("d", 6), ("e", 7), ("f", 97))
        for number in range(size)
    ]
    for seed in range(20):
        clips = program.group_photos(photos, seed)
        dealt = [photo.path for clip in clips for photo in clip.photos]
        assert sorted(dealt) == sorted(photo.path for photo in photos)
        assert len({clip.content_id for clip in clips}) == len(clips)
        for clip in clips:
            assert len({(photo.product_id, photo.split) for photo in clip.photos}) == 1
            small = {"a": 1, "b": 2}.get(clip.photos[0].product_id)
            assert len(clip.photos) == small if small else 3 <= len(clip.photos) <= 5
    assert program.group_photos(photos, 3) == program.group_photos(photos, 3)
    assert program.group_photos(photos, 3) != program.group_photos(photos, 4)


def test_videos_hold_every_photo(config):
    from decord import VideoReader

    program.main(replace(config, form="videos", fps=10, frames_per_photo=4))
    tables = read_tables(config.out)
    frames = Counter()
    splits = {link["content_id"]: link["split"] for link in tables.links.to_pylist()}
    for content in tables.contents.to_pylist():
        video = VideoReader(tables.path_of(content["video"]))
        assert video[0].shape == (32, 32, 3)
        assert video.get_avg_fps() == pytest.approx(10)
        frames[splits[content["content_id"]]] += len(video)
    assert frames == {"train": 18 * 4, "val": 1 * 4, "test": 5 * 4}
    manifest = read_manifest(config.out, "tables")
    assert manifest.counts["in"] == {"products": 2, "photos": 24}
    assert manifest.counts["dropped"] == {}


def test_bytes_depend_on_the_seed_and_on_nothing_else(config, tmp_path):
    config = replace(config, form="videos")
    outs = {name: tmp_path / name / "tables" for name in ("one", "two", "seed")}
    program.main(replace(config, out=outs["one"]))
    program.main(replace(config, out=outs["two"], num_workers=2))
    program.main(replace(config, out=outs["seed"], seed=1))
    assert bytes_of(outs["one"]) == bytes_of(outs["two"])
    assert bytes_of(outs["one"]) != bytes_of(outs["seed"])


def test_camera_stays_in_the_photo_and_moves():
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 0] = np.arange(64) * 4
    image[..., 1] = np.arange(48)[:, None] * 5
    image[..., 2] = 200
    for seed in range(50):
        shot = program.film_photo(image, np.random.default_rng(seed), num_frames=5, clip_size=24)
        assert [frame.shape for frame in shot] == [(24, 24, 3)] * 5
        assert all((frame[..., 2] == 200).all() for frame in shot)  # nothing beyond the edge
        assert not np.array_equal(shot[0], shot[-1])
        # Each frame shows at least 3/4 of the shorter side: 0.75 * 48 px of 4 levels, less blur.
        assert all(frame[..., 0].max() - frame[..., 0].min() > 0.7 * 48 * 4 for frame in shot)


def test_unreadable_photos_are_dropped_and_counted(config):
    photos = sorted((config.source / "dataset" / "test").rglob("*.jpg"))
    for photo in photos[:2]:  # both test photos of the first product: its clip cannot be made
        photo.write_bytes(b"not a photo")
    program.main(replace(config, form="videos"))
    manifest = read_manifest(config.out, "tables")
    assert sum(manifest.counts["dropped"].values()) == 2
    tables = read_tables(config.out)
    links = {(link["product_id"], link["split"]) for link in tables.links.to_pylist()}
    assert ("Golden-Delicious", "test") not in links
    assert ("Sour-Milk", "test") in links
    assert len(list(config.out.rglob("*.mp4"))) == len(tables.contents)


@pytest.mark.parametrize(
    "missing", ["classes.csv", "val.txt", "train/Fruit/Golden-Delicious/Golden-Delicious_003.jpg"]
)
def test_a_missing_file_is_named(config, missing):
    (config.source / "dataset" / missing).unlink()
    with pytest.raises(UserError, match=missing):
        program.main(config)
    assert not config.out.exists()


def test_the_program_ends_with_one_line_for_a_user_error(tmp_path):
    command = [sys.executable, ROOT / "data_prep/grocery_store.py"]
    done = subprocess.run(
        [*command, "--source", tmp_path, "--out", tmp_path / "tables"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/dataset/classes.csv: no such file")
    assert done.stderr.count("\n") == 1


def test_bad_lists_are_refused(config):
    listing = config.source / "dataset" / "test.txt"
    text = listing.read_text()
    listing.write_text(text + "test/Fruit/Golden-Delicious/Golden-Delicious_000.jpg, 2, 0\n")
    with pytest.raises(UserError, match=r"test\.txt: row 6: class '2' is not one of the 2"):
        program.main(config)
    listing.write_text(text + "test/Fruit/Golden-Delicious/Golden-Delicious_000.jpg\n")
    with pytest.raises(UserError, match=r"test\.txt: row 6: expected 3 columns, found 1"):
        program.main(config)


@pytest.mark.parametrize(
    ("field", "value"), [("clip_size", 33), ("clip_size", 8), ("fps", 0), ("frames_per_photo", 0)]
)
def test_bad_settings_are_refused(config, field, value):
    with pytest.raises(UserError, match=f"{field} is {value}"):
        program.main(replace(config, **{field: value}))


def test_an_existing_folder_stays(config):
    program.main(config)
    before = bytes_of(config.out)
    with pytest.raises(UserError, match="already exists"):
        program.main(replace(config, titles="coarse"))
    assert bytes_of(config.out) == before
    program.main(replace(config, titles="coarse", overwrite=True))
    assert bytes_of(config.out) != before


@pytest.mark.skipif(not SHARED_COPY.is_dir(), reason=f"needs a clone at {SHARED_COPY}")
def test_the_published_counts(tmp_path):
    program.main(program.GroceryStoreConfig(source=SHARED_COPY, out=tmp_path / "tables"))
    tables = read_tables(tmp_path / "tables")
    assert len(tables.products) == 81
    splits = Counter(tables.links["split"].to_pylist())
    assert splits == {"train": 2640, "val": 296, "test": 2485}
    assert set(tables.products["category"].to_pylist()) == {"Fruit", "Packages", "Vegetables"}
    assert len(set(tables.products["coarse"].to_pylist())) == 43
    assert min(len(text) for text in tables.products["description"].to_pylist()) > 20
    assert Path(tables.path_of(tables.products["images"][80][0].as_py())).is_file()
