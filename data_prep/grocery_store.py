"""Bring the Grocery Store dataset to tables: 81 products, and contents made from 5,421 photos.

Input: a clone of https://github.com/marcusklasson/GroceryStoreDataset (Klasson et al., "A
Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels", WACV 2019,
arXiv:1901.00711): 2,640 train, 296 val and 2,485 test photos taken in shops, and for each product
an iconic image and a description. Output: a tables folder whose links carry the dataset's own
splits. Two forms:

- photos: every photo is one content. The tables point at the clone's files; nothing is copied.
- videos: every content is a short H.264 clip cut from 3 to 5 photos of one product and one split,
  with camera motion. Every photo is used exactly once. A product with fewer than 3 photos in a
  split gives one clip of what there is.

    git clone https://github.com/marcusklasson/GroceryStoreDataset data/GroceryStoreDataset
    python data_prep/grocery_store.py --source data/GroceryStoreDataset --out data/grocery/tables

Photos take seconds, videos about half a minute on 2 cores. Equal settings give equal bytes,
whatever the number of workers.

Shape letters: H height, W width, S side of a square frame.
"""

import csv
import multiprocessing
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import tyro
from jaxtyping import Float, UInt8
from PIL import Image

from mmrec.bars import progress_bar
from mmrec.cli import run_program
from mmrec.data.media import read_image
from mmrec.data.tables import SPLITS, Tables, write_tables
from mmrec.errors import MediaError, UserError
from mmrec.manifest import check_output, new_folder, relative_path

MIN_PHOTOS, MAX_PHOTOS = 3, 5
"""How many photos a clip is cut from."""
MIN_ZOOM = 0.75
"""The tightest shot: the side of the camera's square over the photo's shorter side."""


@dataclass(frozen=True, kw_only=True)
class GroceryStoreConfig:
    """What to read, where to write, and how a content is made from photos."""

    source: Path
    """The clone: the folder that holds `dataset/classes.csv`."""
    out: Path
    """The tables folder to write."""
    form: Literal["photos", "videos"] = "photos"
    """photos: one content a photo; videos: one content for a clip of 3 to 5 photos."""
    titles: Literal["none", "coarse"] = "none"
    """Content titles. coarse: the product's coarse class, such as "Apple"; it gives much of the
    answer away, so scores with and without it are not comparable."""
    seed: int = 0
    """Decides which photos share a clip, and how the camera moves."""
    fps: int = 5
    """Frames a second of a clip."""
    frames_per_photo: int = 5
    """Frames that a clip spends on each photo."""
    clip_size: int = 160
    """Width and height of a clip, in pixels; even."""
    num_workers: int | None = None
    """Processes that film clips; by default one a CPU core."""
    overwrite: bool = False
    """Replace `out` when it is already there."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One shop photo, as the dataset lists it."""

    path: str
    """Relative to the clone's `dataset` folder: `train/Fruit/Lemon/Lemon_001.jpg`."""
    product_id: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One video to film: its photos in order of appearance."""

    content_id: str
    photos: list[Photo]

    @property
    def video(self) -> str:
        """Where the clip lies in the tables folder."""
        return f"videos/{self.content_id}.mp4"


def main(config: GroceryStoreConfig) -> Tables:
    """Read the clone and write its tables."""
    check_config(config)
    dataset = config.source / "dataset"
    media = relative_path(config.out, dataset)
    products = read_products(dataset, media=media)
    photos = read_photos(dataset, [product["product_id"] for product in products])
    titles = {row["product_id"]: row["coarse"] for row in products if config.titles == "coarse"}

    with new_folder(config.out, kind="tables", overwrite=config.overwrite) as folder:
        dropped: Counter[str] = Counter()
        if config.form == "photos":
            contents, links = photo_contents(photos, media=media, titles=titles)
        else:
            clips, dropped = film_clips(group_photos(photos, config.seed), folder, config)
            contents, links = clip_contents(clips, titles=titles)
        tables = write_tables(
            folder,
            products=products,
            contents=contents,
            links=links,
            config=asdict(config),
            counts={
                "in": {"products": len(products), "photos": len(photos)},
                "out": {"products": len(products), "contents": len(contents)},
                "dropped": dict(dropped),
            },
        )
    splits = Counter(link["split"] for link in links)
    sizes = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
    print(f"{config.out}: {len(products)} products, {len(contents)} contents ({sizes})")
    return tables


def check_config(config: GroceryStoreConfig) -> None:
    """Refuse, before any work is done, settings that no clip can be made with."""
    check_output(config.out, kind="tables", overwrite=config.overwrite, inputs=[config.source])
    for name, least in (("fps", 1), ("frames_per_photo", 1), ("clip_size", 16), ("num_workers", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; expected at least {least}")
    if config.clip_size % 2:
        raise UserError(f"clip_size is {config.clip_size}; H.264 in yuv420p needs an even number")


# -------------------------------------------------------------------------------- reading the clone


def read_products(dataset: Path, *, media: str) -> list[dict[str, Any]]:
    """The product rows, in the dataset's order; `media` is the path of `dataset` in the tables."""
    products = []
    for row in _read_rows(dataset, "classes.csv", num_columns=6)[1:]:
        name, _, coarse, _, *paths = row
        iconic, description = (path.lstrip("/") for path in paths)
        for path in (iconic, description):
            _expect_file(dataset / path)
        products.append(
            {
                "product_id": name,
                "title": _words(name),
                "images": [f"{media}/{iconic}"],
                "category": iconic.split("/")[1],
                "coarse": _words(coarse),
                "description": " ".join((dataset / description).read_text("utf-8").split()),
            }
        )
    return products


def read_photos(dataset: Path, product_ids: Sequence[str]) -> list[Photo]:
    """The photos of `train.txt`, `val.txt` and `test.txt`, in the order of these files."""
    photos = []
    for split in SPLITS:
        for number, row in enumerate(_read_rows(dataset, f"{split}.txt", num_columns=3), 1):
            path, label = row[0], row[1]
            if not label.isdigit() or int(label) >= len(product_ids):
                raise UserError(
                    f"{dataset / split}.txt: row {number}: class '{label}' is not one of the "
                    f"{len(product_ids)} in classes.csv"
                )
            _expect_file(dataset / path)
            photos.append(Photo(path=path, product_id=product_ids[int(label)], split=split))
    return photos


def _read_rows(dataset: Path, name: str, *, num_columns: int) -> list[list[str]]:
    path = dataset / name
    _expect_file(path)
    with open(path, encoding="utf-8", newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    for number, row in enumerate(rows, 1):
        if len(row) != num_columns:
            raise UserError(
                f"{path}: row {number}: expected {num_columns} columns, found {len(row)}"
            )
    return rows


def _expect_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; --source is to be a whole clone of "
            "https://github.com/marcusklasson/GroceryStoreDataset"
        )


def _words(name: str) -> str:
    """`Golden-Delicious` as a title: `Golden Delicious`."""
    return name.replace("-", " ")


# ------------------------------------------------------------------------------- contents and links


def photo_contents(
    photos: Sequence[Photo], *, media: str, titles: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One content, with its link, for each photo."""
    contents, links = [], []
    for photo in photos:
        content_id = f"{photo.split}/{Path(photo.path).stem}"
        contents.append(
            {
                "content_id": content_id,
                "title": titles.get(photo.product_id),
                "images": [f"{media}/{photo.path}"],
            }
        )
        links.append(_link(content_id, photo))
    return contents, links


def clip_contents(
    clips: Sequence[Clip], *, titles: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One content, with its link, for each clip."""
    contents, links = [], []
    for clip in clips:
        contents.append(
            {
                "content_id": clip.content_id,
                "title": titles.get(clip.photos[0].product_id),
                "video": clip.video,
            }
        )
        links.append(_link(clip.content_id, clip.photos[0]))
    return contents, links


def _link(content_id: str, photo: Photo) -> dict[str, Any]:
    return {
        "content_id": content_id,
        "product_id": photo.product_id,
        "weight": 1.0,
        "split": photo.split,
    }


def group_photos(photos: Sequence[Photo], seed: int) -> list[Clip]:
    """Deal every product's photos of a split into clips of 3 to 5; fewer than 3 make one clip."""
    groups: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        groups[f"{photo.split}/{photo.product_id}"].append(photo)
    clips = []
    for name, group in groups.items():
        rng = _generator(seed, name)
        fewest, most = -(-len(group) // MAX_PHOTOS), max(1, len(group) // MIN_PHOTOS)
        order = np.array_split(rng.permutation(len(group)), rng.integers(fewest, most + 1))
        for number, rows in enumerate(order, 1):
            clip_photos = [group[row] for row in rows]
            clips.append(Clip(content_id=f"{name}_{number:03d}", photos=clip_photos))
    return clips


def _generator(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each name, so that no result depends on who does what first."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


# ------------------------------------------------------------------------------------------ filming


def film_clips(
    clips: Sequence[Clip], folder: Path, config: GroceryStoreConfig
) -> tuple[list[Clip], Counter[str]]:
    """Film clips into `folder`, in several processes.

    Returns the clips that came to be, and how many photos were dropped for each reason.
    """
    for clip in clips:
        (folder / clip.video).parent.mkdir(parents=True, exist_ok=True)
    filmed, dropped = [], Counter()
    num_workers = config.num_workers or os.cpu_count() or 1
    # spawn, because forking a process in which FFmpeg has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        faults = pool.map(partial(film_clip, folder=folder, config=config), clips, chunksize=8)
        for clip, reasons in zip(
            clips, progress_bar(faults, total=len(clips), desc="clips", unit="clip"), strict=True
        ):
            dropped.update(reasons)
            if len(reasons) < len(clip.photos):
                filmed.append(clip)
    return filmed, dropped


def film_clip(clip: Clip, *, folder: Path, config: GroceryStoreConfig) -> list[str]:
    """Write one clip, if any of its photos can be read; returns a reason for each that cannot."""
    rng = _generator(config.seed, clip.content_id)
    frames: list[UInt8[np.ndarray, "S S 3"]] = []
    reasons = []
    for photo in clip.photos:
        try:
            image = read_image(config.source / "dataset" / photo.path)
        except MediaError as error:
            reasons.append(error.reason)
            continue
        shot = film_photo(
            image, rng, num_frames=config.frames_per_photo, clip_size=config.clip_size
        )
        if frames and rng.random() < 0.5:  # half of the joins are cuts, half are cross-fades
            shot[0] = (frames[-1] // 2) + (shot[0] // 2)
        frames.extend(shot)
    if frames:
        write_video(folder / clip.video, frames, fps=config.fps)
    return reasons


def film_photo(
    image: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    *,
    num_frames: int,
    clip_size: int,
) -> list[UInt8[np.ndarray, "S S 3"]]:
    """A smooth pan and zoom across a photo, from one random square of it to another."""
    photo = Image.fromarray(image)
    start, end = _random_square(photo, rng), _random_square(photo, rng)
    frames = []
    for time in np.linspace(0.0, 1.0, num_frames):
        eased = time * time * (3.0 - 2.0 * time)  # the camera starts and stops gently
        left, top, side = (1.0 - eased) * start + eased * end
        box = (left, top, min(left + side, photo.width), min(top + side, photo.height))
        # A box in fractions of a pixel keeps slow motion smooth.
        frame = photo.resize((clip_size, clip_size), Image.Resampling.BILINEAR, box=box)
        frames.append(np.array(frame))
    return frames


def _random_square(photo: Image.Image, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    """Left, top and side of a square within the photo, in pixels."""
    side = rng.uniform(MIN_ZOOM, 1.0) * min(photo.size)
    left, top = rng.random(2) * (np.array(photo.size) - side)
    return np.array([left, top, side])


def write_video(path: Path, frames: Sequence[UInt8[np.ndarray, "S S 3"]], *, fps: int) -> None:
    """Write frames as H.264 in mp4; equal frames give equal bytes."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "23", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        # x264 cuts a frame in as many slices as it has threads.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(GroceryStoreConfig)))
