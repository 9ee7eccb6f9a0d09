"""Generate a product catalogue and short videos of its products: for a first run, and for tests.

Products differ in shape, colour, pattern and a printed word; many differ from another in one of
these alone. In a clip one product (or two) moves, scales and turns over a cluttered, changing
background, in coloured light, among smaller products that the clip is not about. The content's
title is often missing, vague or wrong, and otherwise names one or two of the attributes. So neither
pictures nor titles are enough alone: both have to be learned, and joined.

Input: none. Output: a tables folder (see mmrec/data/tables.py) with `media/products/*.jpg` and
`media/contents/*.mp4`. Same seed, same bytes, with any number of workers.

    python data_prep/synthetic.py --out runs/demo/tables

Takes about 35 s on 2 cores, and 26 MB; prints where the tables are and how much they hold.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product as combine
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import av
import numpy as np
import tyro
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from mmrec.bars import progress_bar
from mmrec.cli import run_program
from mmrec.data.tables import Tables, write_tables
from mmrec.errors import UserError
from mmrec.manifest import check_output, new_folder

COLOURS = {
    "red": (212, 47, 52),
    "orange": (240, 126, 38),
    "yellow": (245, 198, 58),
    "green": (70, 158, 80),
    "teal": (28, 158, 160),
    "blue": (48, 102, 210),
    "purple": (126, 76, 190),
    "pink": (236, 112, 164),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag", "dipped")
WORDS = ("nova", "luna", "echo", "zest", "jazz", "puff", "kiwi", "boho")
CREAM, INK, WOOD = (252, 247, 236), (44, 42, 58), (222, 184, 135)

PICTURE_SIZE = 256  # px, square: what a shop would show
MARGIN = 18  # px around a product: room for its outline and shadow
UNIT = (PICTURE_SIZE - 2 * MARGIN) / 100  # px: shapes are given on a square of 100 by 100 units
SUPERSAMPLING = 3  # shapes are drawn this much larger and reduced, which smooths their edges
CHUNK = 20  # clips in one task of a worker: some 0.7 s of work


class Shape(NamedTuple):
    """A product's outline, on a square of 100 by 100 units."""

    category: str
    label: tuple[float, float, float]
    """Centre (x, y) and width of the printed label."""
    parts: tuple[tuple[str, str, tuple[float, ...]], ...]
    """Back to front: (role, form, numbers), as `_draw_sprite` and `_draw_form` read them."""


# fmt: off
SHAPES = {
    "mug": Shape("kitchen", (43, 56, 42), (
        ("shade", "arc", (9, -100, 100, 56, 34, 92, 74)),
        ("body", "box", (9, 15, 20, 71, 88)),
        ("shade", "ellipse", (15, 13, 71, 29)),
        ("dark", "ellipse", (20, 16, 66, 26)),
    )),
    "teapot": Shape("kitchen", (48, 60, 40), (
        ("shade", "arc", (7, -110, 110, 62, 36, 97, 76)),
        ("shade", "curve", (3, 34, 12, 32, 24, 50, 30, 76, 22, 74, 12, 56)),
        ("body", "ellipse", (16, 30, 80, 90)),
        ("shade", "box", (4, 34, 84, 62, 92)),
        ("shade", "ellipse", (34, 24, 62, 38)),
        ("dark", "ellipse", (43, 14, 53, 25)),
    )),
    "bottle": Shape("kitchen", (50, 64, 40), (
        ("body", "curve", (41, 18, 59, 18, 61, 30, 74, 44, 75, 88,
                           66, 95, 34, 95, 25, 88, 26, 44, 39, 30)),
        ("dark", "box", (3, 39, 5, 61, 20)),
    )),
    "tee": Shape("clothing", (50, 46, 38), (
        ("body", "polygon", (34, 12, 66, 12, 95, 30, 84, 50, 73, 43,
                             74, 91, 26, 91, 27, 43, 16, 50, 5, 30)),
        ("shade", "pie", (0, 180, 36, -2, 64, 26)),
        ("clear", "pie", (0, 180, 40, 2, 60, 21)),
    )),
    "cap": Shape("clothing", (44, 50, 42), (
        ("body", "curve", (12, 70, 13, 48, 27, 27, 46, 21, 65, 27, 77, 46, 79, 70, 46, 74)),
        ("shade", "curve", (10, 66, 40, 62, 76, 62, 97, 74, 96, 81, 60, 76, 12, 77)),
        ("dark", "ellipse", (42, 16, 50, 24)),
    )),
    "sock": Shape("clothing", (50, 40, 36), (
        ("body", "polygon", (32, 8, 70, 8, 70, 62, 62, 80,
                             38, 93, 20, 91, 14, 80, 20, 71, 32, 63)),
        ("shade", "box", (4, 29, 5, 73, 20)),
        ("shade", "curve", (12, 80, 20, 69, 30, 73, 32, 92, 21, 93)),
    )),
    "sneaker": Shape("clothing", (30, 58, 36), (
        ("body", "curve", (8, 34, 24, 27, 37, 30, 50, 46, 72, 54,
                           93, 62, 96, 76, 50, 80, 8, 76, 6, 54)),
        ("cream", "box", (5, 4, 71, 97, 83)),
        ("cream", "line", (4, 32, 41, 42, 34)),
        ("cream", "line", (4, 41, 48, 50, 42)),
        ("cream", "line", (4, 51, 54, 59, 49)),
    )),
    "tote": Shape("bags", (50, 66, 46), (
        ("shade", "arc", (5, 180, 360, 32, 6, 68, 74)),
        ("body", "polygon", (17, 36, 83, 36, 89, 93, 11, 93)),
    )),
    "backpack": Shape("bags", (50, 72, 42), (
        ("dark", "arc", (5, 180, 360, 38, 3, 62, 31)),
        ("dark", "box", (6, 11, 42, 24, 84)),
        ("dark", "box", (6, 76, 42, 89, 84)),
        ("body", "box", (24, 18, 12, 82, 94)),
        ("shade", "line", (3, 25, 38, 75, 38)),
        ("shade", "box", (8, 26, 56, 74, 89)),
    )),
    "cushion": Shape("home", (50, 50, 46), (
        ("body", "curve", (9, 9, 50, 15, 91, 9, 85, 50, 91, 91, 50, 85, 9, 91, 15, 50)),
    )),
    "lamp": Shape("home", (50, 37, 42), (
        ("wood", "box", (2, 46, 55, 54, 88)),
        ("wood", "ellipse", (28, 83, 72, 95)),
        ("body", "polygon", (32, 7, 68, 7, 88, 60, 12, 60)),
    )),
    "umbrella": Shape("home", (50, 36, 40), (
        ("wood", "line", (4, 50, 5, 50, 86)),
        ("wood", "arc", (4, 0, 180, 34, 76, 54, 96)),
        ("body", "pie", (180, 360, 4, 10, 96, 100)),
        ("clear", "ellipse", (4, 49, 27, 63)),
        ("clear", "ellipse", (27, 49, 48, 63)),
        ("clear", "ellipse", (52, 49, 73, 63)),
        ("clear", "ellipse", (73, 49, 96, 63)),
    )),
}
# fmt: on

# What a title says around the attributes it names; the thing stands where the shape is not named.
PHRASES = (
    "unboxing my new {}",
    "love this {}",
    "{} haul",
    "{}, honest review",
    "a week with the {}",
    "finally got the {}",
    "gift idea: {}",
    "styling a {}",
)
THINGS = ("thing", "find", "one", "little treasure")
VAGUE = (
    "must have!!",
    "you need this",
    "wait for it...",
    "my favourite find this month",
    "run, don't walk",
    "obsessed",
    "small haul, big mood",
    "link in bio",
)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What to generate."""

    out: Path
    """The tables folder to make."""
    num_products: int = 240
    """Products in the catalogue, all different; at least 10."""
    num_contents: int = 1600
    """Contents: one mp4 clip each."""
    seed: int = 0
    """Decides everything: the same seed gives the same bytes."""
    clip_size: int = 112
    """Side of a clip's frames in pixels; even, as the video format asks."""
    clip_frames: int = 12
    """Frames in a clip."""
    fps: int = 8
    """Frames a second."""
    num_distractors: int = 3
    """Other products in a clip, smaller and further out than the one it is about."""
    second_product: float = 0.1
    """Fraction of contents that show, and link to, two products; the second with weight 0.5."""
    cold_fraction: float = 0.1
    """Fraction of products with no training link."""
    title_missing: float = 0.15
    """Fraction of contents with no title."""
    title_vague: float = 0.2
    """Fraction of contents whose title names no attribute."""
    title_wrong: float = 0.1
    """Fraction of contents whose title names one attribute wrongly; the titles left are right."""
    val: float = 0.1
    """Fraction of contents in the validation split."""
    test: float = 0.2
    """Fraction of contents in the test split."""
    num_workers: int = 0
    """Processes that render; 0 means one a core, and fewer for few clips."""
    overwrite: bool = False
    """Replace what is at `out`."""


class Product(NamedTuple):
    """One product of the catalogue."""

    number: int
    shape: str
    colour: str
    pattern: str
    word: str
    price: float
    num_pictures: int

    @property
    def product_id(self) -> str:
        return f"p{self.number:04d}"

    @property
    def title(self) -> str:
        return f"{self.word.capitalize()} {self.colour} {self.pattern} {self.shape}"

    @property
    def pictures(self) -> list[str]:
        """Paths of its pictures, relative to the tables' folder."""
        return [f"media/products/{self.product_id}-{i}.jpg" for i in range(self.num_pictures)]


class Content(NamedTuple):
    """One content: what its clip shows, and what its title says."""

    number: int
    split: str
    products: tuple[Product, ...]
    """One or two products, the one that the clip is about first."""
    title: str | None
    title_kind: str

    @property
    def content_id(self) -> str:
        return f"c{self.number:05d}"

    @property
    def video(self) -> str:
        """Path of its clip, relative to the tables' folder."""
        return f"media/contents/{self.content_id}.mp4"


# ---------------------------------------------------------------- the program


def main(config: SyntheticConfig) -> None:
    """Generate the tables and say where they are."""
    tables = generate(config)
    print(
        f"{config.out}: {tables.products.num_rows} products, {tables.contents.num_rows} contents, "
        f"{tables.links.num_rows} links"
    )


def generate(config: SyntheticConfig) -> Tables:
    """Write tables, pictures and clips to `config.out`.

    With more than one worker this module must be the program itself, or one that a new process can
    import by its name; so a caller that loads it by its path sets `num_workers=1`.

    Raises `UserError` for settings that contradict each other and for an `out` already there.
    """
    _check(config)
    check_output(config.out, kind="tables", overwrite=config.overwrite)
    products = _draw_products(config)
    contents = _plan_contents(config, products)
    with new_folder(config.out, kind="tables", overwrite=config.overwrite) as folder:
        for kind in ("products", "contents"):
            (folder / "media" / kind).mkdir(parents=True)
        for item in products:
            _write_pictures(folder, item, config.seed)
        _render_clips(folder, config, products, contents)
        tables = write_tables(
            folder,
            products=[_product_row(item) for item in products],
            contents=[_content_row(content) for content in contents],
            links=[row for content in contents for row in _link_rows(content)],
            config=asdict(config),
            counts=_count(products, contents),
        )
    return replace(tables, root=config.out)


def _check(config: SyntheticConfig) -> None:
    limit = len(SHAPES) * len(COLOURS) * len(PATTERNS) * len(WORDS)
    titles = config.title_missing + config.title_vague + config.title_wrong
    for name in ("title_missing", "title_vague", "title_wrong", "second_product", "val", "test"):
        if not 0 <= getattr(config, name) <= 1:
            _refuse(config, name, "0 to 1")
    if not 10 <= config.num_products <= limit:
        _refuse(config, "num_products", f"10 to {limit}, the number of different products")
    if config.clip_size < 32 or config.clip_size % 2:
        _refuse(config, "clip_size", "an even number of at least 32")
    for name, least in (("clip_frames", 1), ("fps", 1), ("seed", 0), ("num_workers", 0)):
        if getattr(config, name) < least:
            _refuse(config, name, f"at least {least}")
    if not 0 <= config.num_distractors <= config.num_products - 2:
        _refuse(config, "num_distractors", f"0 to {config.num_products - 2}")
    if not 0 <= config.cold_fraction <= 0.5:
        _refuse(config, "cold_fraction", "0 to 0.5")
    # A hair of room, as 0.7 + 0.2 + 0.1 is a little more than 1 in floating point.
    if titles > 1 + 1e-9:
        raise UserError(
            "--title-missing, --title-vague and --title-wrong: expected at most 1 in all, "
            f"found {titles:g}"
        )
    warm, train = config.num_products - _num_cold(config), _split_sizes(config)["train"]
    if train < warm:
        raise UserError(
            f"--num-contents {config.num_contents}: expected a training content for each of {warm} "
            f"products that are not cold, found {train}; give more contents or fewer products"
        )


def _refuse(config: SyntheticConfig, name: str, expected: str) -> NoReturn:
    flag = name.replace("_", "-")
    raise UserError(f"--{flag}: expected {expected}, found {getattr(config, name)}")


def _product_row(item: Product) -> dict[str, Any]:
    return {
        "product_id": item.product_id,
        "title": item.title,
        "images": item.pictures,
        "category": SHAPES[item.shape].category,
        "shape": item.shape,
        "colour": item.colour,
        "pattern": item.pattern,
        "word": item.word,
        "price": item.price,
    }


def _content_row(content: Content) -> dict[str, Any]:
    return {
        "content_id": content.content_id,
        "title": content.title,
        "video": content.video,
        "title_kind": content.title_kind,
    }


def _link_rows(content: Content) -> list[dict[str, Any]]:
    return [
        {
            "content_id": content.content_id,
            "product_id": item.product_id,
            "weight": weight,
            "split": content.split,
        }
        for item, weight in zip(content.products, (1.0, 0.5), strict=False)
    ]


def _count(products: Sequence[Product], contents: Sequence[Content]) -> dict[str, Any]:
    warm = {
        item.number for content in contents if content.split == "train" for item in content.products
    }
    return {
        "products": len(products),
        "cold_products": len(products) - len(warm),
        "pictures": sum(item.num_pictures for item in products),
        "contents": dict(Counter(content.split for content in contents)),
        "links": sum(len(content.products) for content in contents),
        "titles": dict(Counter(content.title_kind for content in contents)),
    }


# ---------------------------------------------------------------- the catalogue and its contents


def _draw_products(config: SyntheticConfig) -> list[Product]:
    """Draw products, no two alike, evenly from all combinations of attributes."""
    rng = np.random.default_rng([config.seed, 0])
    every = list(combine(SHAPES, COLOURS, PATTERNS, WORDS))
    chosen = rng.choice(len(every), config.num_products, replace=False)
    return [
        Product(
            number,
            *every[choice],
            price=round(float(rng.lognormal(3.0, 0.5)), 2),
            num_pictures=int(rng.integers(1, 3)),
        )
        for number, choice in enumerate(chosen.tolist())
    ]


def _num_cold(config: SyntheticConfig) -> int:
    return round(config.cold_fraction * config.num_products)


def _split_sizes(config: SyntheticConfig) -> dict[str, int]:
    val, test = round(config.val * config.num_contents), round(config.test * config.num_contents)
    return {"train": config.num_contents - val - test, "val": val, "test": test}


def _plan_contents(config: SyntheticConfig, products: Sequence[Product]) -> list[Content]:
    """Deal products and titles to contents, in every split to each product in turn.

    Cold products take twice their share of the validation and test contents: their scores are
    means over few queries, and would else be noise.
    """
    rng = np.random.default_rng([config.seed, 1])
    # Which products are cold must not depend on their numbers, as an id may not tell.
    order = [products[i] for i in rng.permutation(len(products))]
    cold, warm = order[: _num_cold(config)], order[_num_cold(config) :]
    plan: list[tuple[str, tuple[Product, ...]]] = []
    for split, size in _split_sizes(config).items():
        num_cold = 0 if split == "train" else min(size, round(2 * size * len(cold) / len(order)))
        for group, count in ((cold, num_cold), (warm, size - num_cold)):
            for item in _deal(group, count, rng):
                plan.append((split, (item, *_second_product(item, group, config, rng))))
    rates = {
        "missing": config.title_missing,
        "vague": config.title_vague,
        "wrong": config.title_wrong,
    }
    rates["right"] = max(0.0, 1 - sum(rates.values()))
    kinds = rng.choice(
        list(rates), len(plan), p=np.array(list(rates.values())) / sum(rates.values())
    )
    contents = []
    for number, row in enumerate(rng.permutation(len(plan)).tolist()):
        split, shown = plan[row]
        kind = str(kinds[number])
        contents.append(Content(number, split, shown, _write_title(shown[0], kind, rng), kind))
    return contents


def _deal(group: Sequence[Product], count: int, rng: np.random.Generator) -> list[Product]:
    """`count` products: each once, in random order, then each once more, and so on."""
    dealt: list[Product] = []
    while len(dealt) < count:
        dealt += [group[i] for i in rng.permutation(len(group))]
    return dealt[:count]


def _second_product(
    item: Product, group: Sequence[Product], config: SyntheticConfig, rng: np.random.Generator
) -> list[Product]:
    """One more product at the set rate; a cold one only beside a cold one."""
    if rng.random() >= config.second_product or len(group) < 2:
        return []
    other = group[int(rng.integers(len(group)))]
    return [] if other == item else [other]


def _write_title(item: Product, kind: str, rng: np.random.Generator) -> str | None:
    if kind == "missing":
        return None
    if kind == "vague":
        return VAGUE[rng.integers(len(VAGUE))]
    values = {"word": WORDS, "colour": tuple(COLOURS), "pattern": PATTERNS, "shape": tuple(SHAPES)}
    attributes = list(values)
    named = rng.permutation(len(attributes))[: 1 if rng.random() < 0.3 else 2]
    said = {attributes[i]: str(getattr(item, attributes[i])) for i in sorted(named)}
    if kind == "wrong":
        name = attributes[named[0]]
        others = [value for value in values[name] if value != said[name]]
        said[name] = others[rng.integers(len(others))]
    if "word" in said:
        said["word"] = said["word"].upper()
    if "shape" not in said:
        said["shape"] = THINGS[rng.integers(len(THINGS))]
    return PHRASES[rng.integers(len(PHRASES))].format(" ".join(said.values()))


# ---------------------------------------------------------------- drawing a product


def _draw_form(draw: ImageDraw.ImageDraw, form: str, numbers: Sequence[float], unit: float) -> None:
    """Draw one form in white; `unit` is the number of pixels in one of the numbers' units."""
    if form in ("polygon", "curve"):
        points = np.reshape(numbers, (-1, 2)) * unit
        draw.polygon([tuple(p) for p in (_smooth(points) if form == "curve" else points)], fill=255)
    elif form == "ellipse":
        draw.ellipse([n * unit for n in numbers], fill=255)
    elif form == "box":  # corner radius, then the corners
        draw.rounded_rectangle([n * unit for n in numbers[1:]], numbers[0] * unit, fill=255)
    elif form == "line":  # width, then the ends
        draw.line([n * unit for n in numbers[1:]], fill=255, width=round(numbers[0] * unit))
    elif form == "arc":  # width, angles from and to, then the corners
        box = [n * unit for n in numbers[3:]]
        draw.arc(box, numbers[1], numbers[2], fill=255, width=round(numbers[0] * unit))
    elif form == "pie":  # angles from and to, then the corners
        draw.pieslice([n * unit for n in numbers[2:]], numbers[0], numbers[1], fill=255)


def _smooth(points: Float[np.ndarray, "n 2"], steps: int = 8) -> Float[np.ndarray, "m 2"]:
    """A closed Catmull-Rom curve through the points."""
    before, after, beyond = (np.roll(points, -shift, axis=0) for shift in (-1, 1, 2))
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (before, points, after, beyond))
    curve = 2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
    curve += (3 * p1 - p0 - 3 * p2 + p3) * t**3
    return (curve / 2).reshape(-1, 2)


def _mask(forms: Sequence[tuple[str, tuple[float, ...]]]) -> Image.Image:
    """A smooth mask of PICTURE_SIZE: draw forms larger, round their corners a little, reduce."""
    size = round(100 * UNIT * SUPERSAMPLING)
    image = Image.new("L", (size, size))
    for form, numbers in forms:
        _draw_form(ImageDraw.Draw(image), form, numbers, UNIT * SUPERSAMPLING)
    image = image.filter(ImageFilter.GaussianBlur(SUPERSAMPLING * 1.5))
    steep = image.point([min(255, max(0, (v - 128) * 4 + 128)) for v in range(256)])
    return ImageOps.expand(steep.reduce(SUPERSAMPLING), MARGIN)


class Stencil(NamedTuple):
    """All that products of one shape have in common; every image is a grey one of PICTURE_SIZE."""

    parts: list[tuple[str, Image.Image]]
    """Role and mask of each part, back to front."""
    inside: Image.Image
    """Where the product is."""
    outlined: Image.Image
    """Where the product and the line around it are."""
    shadow: Image.Image
    """How much of its shadow falls where."""
    light: Image.Image
    """What to multiply with: light from the upper left, and edges that turn away from it."""
    heights: tuple[int, int]
    """Where its body begins and ends, in units from the top."""


@cache
def _cut_stencil(shape: str) -> Stencil:
    parts, inside = [], Image.new("L", (PICTURE_SIZE, PICTURE_SIZE))
    for role, form, numbers in SHAPES[shape].parts:
        mask = _mask([(form, numbers)])
        parts.append((role, mask))
        inside = (ImageChops.subtract if role == "clear" else ImageChops.lighter)(inside, mask)
    outlined = inside.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.7))
    shadow = ImageChops.offset(outlined, 6, 12).filter(ImageFilter.GaussianBlur(5))
    depth = np.asarray(inside.filter(ImageFilter.GaussianBlur(9)), np.float64) / 255
    across = np.linspace(1, -1, PICTURE_SIZE)
    light = 0.66 + 0.32 * depth + 0.07 * (across[None, :] + across[:, None])
    body = next(mask for role, mask in parts if role == "body").getbbox()
    assert body is not None
    return Stencil(
        parts=parts,
        inside=inside,
        outlined=outlined,
        shadow=shadow.point([round(v * 0.45) for v in range(256)]),
        light=Image.fromarray((np.clip(light, 0, 1) * 255).astype(np.uint8)),
        heights=(round((body[1] - MARGIN) / UNIT), round((body[3] - MARGIN) / UNIT)),
    )


@cache
def _pattern_mask(pattern: str, top: int, bottom: int) -> Image.Image:
    """Where a pattern shows its second colour, on a body between two heights (in units)."""
    return _mask(_pattern_forms(pattern, top, bottom))


def _pattern_forms(pattern: str, top: int, bottom: int) -> list[tuple[str, tuple[float, ...]]]:
    if pattern == "striped":
        return [("box", (0, 0, y, 100, y + 8)) for y in range(2, 100, 17)]
    if pattern == "dotted":
        rows = enumerate(range(5, 100, 15))
        middles = [(x + 9 * (j % 2), y) for j, y in rows for x in range(5, 105, 18)]
        return [("ellipse", (x - 5, y - 5, x + 5, y + 5)) for x, y in middles]
    if pattern == "checked":
        rows = enumerate(range(2, 100, 16))
        corners = [(x, y) for j, y in rows for x in range(2 + 16 * (j % 2), 100, 32)]
        return [("box", (0, x, y, x + 16, y + 16)) for x, y in corners]
    if pattern == "zigzag":
        edge = [(x, 9 * (i % 2)) for i, x in enumerate(range(-4, 110, 12))]
        band = edge + [(x, y + 8) for x, y in reversed(edge)]
        return [
            ("polygon", tuple(n for x, dy in band for n in (x, y + dy))) for y in range(-6, 100, 20)
        ]
    if pattern == "dipped":
        return [("box", (0, 0, top + 0.6 * (bottom - top), 100, 100))]
    return []


def _tint(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


@cache
def _draw_label(word: str, width: float) -> Image.Image:
    """The printed word on a label, `width` pixels wide."""
    scale = SUPERSAMPLING
    size = (round(width * scale), round(width * 0.42 * scale))
    label = Image.new("RGBA", size)
    draw = ImageDraw.Draw(label)
    box = (0, 0, size[0] - 1, size[1] - 1)
    draw.rounded_rectangle(box, size[1] * 0.25, fill=(255, 255, 255), outline=INK, width=2 * scale)
    height = size[1] * 0.72
    while ImageFont.load_default(height).getlength(word) > size[0] * 0.88:
        height *= 0.96
    font = ImageFont.load_default(height)
    middle = (size[0] / 2, size[1] * 0.52)
    draw.text(middle, word, INK, font, anchor="mm", stroke_width=scale, stroke_fill=INK)
    return label.reduce(scale)


@cache
def _draw_sprite(item: Product) -> Image.Image:
    """The product and its soft shadow alone, RGBA, PICTURE_SIZE square."""
    size, colour = (PICTURE_SIZE, PICTURE_SIZE), COLOURS[item.colour]
    stencil = _cut_stencil(item.shape)
    heights = stencil.heights if item.pattern == "dipped" else (0, 100)
    cloth = Image.new("RGB", size, colour)
    cloth.paste(CREAM, mask=_pattern_mask(item.pattern, *heights))
    fills = {"body": cloth, "shade": _tint(colour, 0.72), "dark": INK, "cream": CREAM, "wood": WOOD}
    picture = Image.new("RGB", size)
    for role, mask in stencil.parts:
        if role != "clear":
            picture.paste(fills[role], (0, 0), mask)
    picture = ImageChops.multiply(picture, Image.merge("RGB", [stencil.light] * 3))
    x, y, width = (n * UNIT for n in SHAPES[item.shape].label)
    label = _draw_label(item.word.upper(), width)
    corner = (round(MARGIN + x - label.width / 2), round(MARGIN + y - label.height / 2))
    picture.paste(label, corner, label)
    # A thin dark line around everything sets the product off from any background.
    outlined = Image.new("RGB", size, _tint(colour, 0.4))
    outlined.paste(picture, mask=stencil.inside)
    outlined.putalpha(stencil.outlined)
    shadow = Image.new("RGBA", size)
    shadow.putalpha(stencil.shadow)
    return Image.alpha_composite(shadow, outlined)


# ---------------------------------------------------------------- pictures and clips


def _write_pictures(folder: Path, item: Product, seed: int) -> None:
    """The product on white: from the front, and at another angle where it has a second picture."""
    rng = np.random.default_rng([seed, 2, item.number])
    for i, path in enumerate(item.pictures):
        picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
        angle, turn = (0.0, 1.0) if i == 0 else (rng.choice([-1, 1]) * rng.uniform(12, 28), 0.8)
        _paste(picture, _draw_sprite(item), np.array([0.5, 0.5, 0.94, angle, turn]))
        picture.save(folder / path, quality=92)


def _paste(frame: Image.Image, sprite: Image.Image, pose: Float[np.ndarray, "5"]) -> None:
    """Paste a square sprite in a pose.

    A pose is the middle (x, y) and the side of the sprite as parts of the frame's side, an angle in
    degrees, and its width over its height, which less than 1 makes look turned away.
    """
    x, y, side, angle, turn = (float(n) for n in pose)
    reach = abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle)))
    box = math.ceil(side * frame.width * reach)  # the turned sprite just fits
    zoom = sprite.width / (side * frame.width)
    middle = (sprite.width / 2, sprite.height / 2)
    matrix = _turn(angle, (zoom / turn, zoom), middle, box)
    turned = sprite.transform((box, box), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    corner = (round(x * frame.width - box / 2), round(y * frame.height - box / 2))
    frame.paste(turned, corner, turned)


def _turn(
    angle: float, zoom: tuple[float, float], middle: tuple[float, float], box: int
) -> tuple[float, ...]:
    """An affine matrix for `Image.transform`, from each place of a square box to one in the source.

    `zoom` is the number of source pixels in one of the box's, across and down the source; `middle`
    is the place in the source that the middle of the box shows.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    a, b, d, e = cos * zoom[0], -sin * zoom[0], sin * zoom[1], cos * zoom[1]
    return (a, b, middle[0] - (a + b) * box / 2, d, e, middle[1] - (d + e) * box / 2)


class _Path(NamedTuple):
    """How something moves through a clip: two poses (see `_paste`), and a sway between them."""

    start: Float[np.ndarray, "5"]
    end: Float[np.ndarray, "5"]
    sway: Float[np.ndarray, "5"]
    phase: float

    def at(self, time: float) -> Float[np.ndarray, "5"]:
        """The pose at a time from 0 to 1."""
        eased = time * time * (3 - 2 * time)
        swing = math.sin(2 * math.pi * (time + self.phase))
        return self.start + (self.end - self.start) * eased + self.sway * swing


def _product_path(x: float, size: tuple[float, float], rng: np.random.Generator) -> _Path:
    """A path about the middle of the frame's height, in sight throughout."""
    low = np.array([x - 0.09, 0.42, size[0], -32, 0.8])
    high = np.array([x + 0.09, 0.58, size[1], 32, 1.0])
    sway = rng.uniform(-1, 1, 5) * np.array([0.03, 0.03, 0.03, 8, 0.0])
    return _Path(rng.uniform(low, high), rng.uniform(low, high), sway, rng.random())


def _distractor_path(rng: np.random.Generator) -> _Path:
    """A path along the frame's edge, partly out of it."""
    around, drift = rng.uniform(0, 2 * math.pi), rng.uniform(-0.8, 0.8)
    side, angle = rng.uniform(0.24, 0.38), rng.uniform(-60, 60)
    start, end = (
        np.array([0.5 + 0.46 * math.cos(a), 0.5 + 0.46 * math.sin(a), side, angle, 0.9])
        for a in (around, around + drift)
    )
    return _Path(start, end, np.array([0.02, 0.02, 0.02, 12, 0.0]), rng.random())


def _random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour for a background: as often one of the products' as any other."""
    if rng.random() < 0.5:
        names = list(COLOURS)
        return _tint(COLOURS[names[rng.integers(len(names))]], rng.uniform(0.5, 1.2))
    red, green, blue = (int(n) for n in rng.integers(20, 245, 3))
    return red, green, blue


def _draw_background(size: int, rng: np.random.Generator) -> Image.Image:
    """A cluttered picture to move the camera over: a coloured gradient with forms and texture."""
    corners = np.array([[_random_colour(rng) for _ in range(3)] for _ in range(3)], np.uint8)
    canvas = Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(int(rng.integers(12, 30))):
        x, y = rng.uniform(0, size, 2)
        w, h = rng.uniform(0.02, 0.18, 2) * size
        fill = (*_random_colour(rng), int(rng.integers(90, 230)))
        form = rng.integers(4)
        if form == 0:
            draw.ellipse((x - w, y - h, x + w, y + h), fill=fill)
        elif form == 1:
            draw.rectangle((x - w, y - h, x + w, y + h), fill=fill)
        elif form == 2:
            draw.polygon(
                [tuple(p) for p in (x, y) + rng.uniform(-0.18, 0.18, (4, 2)) * size], fill=fill
            )
        else:
            step = 0.3 * w + 4
            for i in range(int(rng.integers(3, 7))):
                draw.line(
                    (x + i * step, y - h, x + i * step + h / 2, y + h),
                    fill=fill,
                    width=int(step / 2),
                )
    return canvas.filter(ImageFilter.BoxBlur(0.6))  # smooths the forms' jagged edges


def _camera(rng: np.random.Generator) -> _Path:
    """How a background is seen: its middle, the part of it in sight, and its turn."""
    low, high = np.array([0.4, 0.4, 0.45, -25, 1]), np.array([0.6, 0.6, 0.6, 25, 1])
    return _Path(rng.uniform(low, high), rng.uniform(low, high), np.zeros(5), 0.0)


def _look(background: Image.Image, pose: Float[np.ndarray, "5"], size: int) -> Image.Image:
    """The part of a background in the camera's sight, `size` square."""
    x, y, side, angle, _ = (float(n) for n in pose)
    zoom = side * background.width / size
    middle = (x * background.width, y * background.height)
    matrix = _turn(angle, (zoom, zoom), middle, size)
    return background.transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _draw_light(rng: np.random.Generator) -> tuple[float, ...]:
    """A scene's light (brightness, contrast, a cast of colour) as a matrix for `Image.convert`."""
    red, green, blue = rng.uniform(0.72, 1.12) * rng.uniform(0.85, 1.15, 3)
    lift = rng.uniform(0, 24)
    return (red, 0, 0, lift, 0, green, 0, lift, 0, 0, blue, lift)


def _render_clip(
    folder: Path, config: SyntheticConfig, products: Sequence[Product], content: Content
) -> None:
    """Draw and encode one clip; everything random comes from the seed and the content's number."""
    rng = np.random.default_rng([config.seed, 3, content.number])
    size = config.clip_size
    if len(content.products) == 1:
        paths = [_product_path(0.5, (0.6, 0.86), rng)]
    else:
        left = 0.28 if rng.random() < 0.5 else 0.72
        paths = [_product_path(left, (0.5, 0.62), rng), _product_path(1 - left, (0.42, 0.52), rng)]
    others = [
        products[i] for i in rng.permutation(len(products)) if products[i] not in content.products
    ]
    cast = [(item, _distractor_path(rng)) for item in others[: config.num_distractors]]
    cast += list(zip(content.products, paths, strict=True))[::-1]
    moving = [(_reduced_sprite(item, path, size), path) for item, path in cast]
    light = _draw_light(rng)
    # A cut to another background, somewhere in the clip or (so never) after its end.
    cut = rng.uniform(0.25, 1.5)
    scenes = [(_draw_background(2 * size, rng), _camera(rng)) for _ in range(1 + (cut < 1))]
    frames = []
    for number in range(config.clip_frames):
        time = number / max(1, config.clip_frames - 1)
        background, camera = scenes[time > cut]
        frame = _look(background, camera.at(time), size)
        for sprite, path in moving:
            _paste(frame, sprite, path.at(time))
        frames.append(frame.convert("RGB", light))
    _encode(folder / content.video, frames, config.fps)


def _reduced_sprite(item: Product, path: _Path, size: int) -> Image.Image:
    """A product at the size that it has on its path: a transform to less would leave out pixels."""
    side = round(size * (path.start[2] + path.end[2]) / 2)
    return _draw_sprite(item).resize((side, side), reducing_gap=2.0)


def _encode(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Write an H.264 file; one thread, as the bytes depend on the number of threads."""
    options = {"preset": "veryfast", "tune": "zerolatency", "crf": "23", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def _render_clips(
    folder: Path, config: SyntheticConfig, products: Sequence[Product], contents: Sequence[Content]
) -> None:
    render = partial(_render_clip, folder, config, products)
    # A hundred clips are drawn about as soon as a second process has started.
    workers = config.num_workers or min(os.cpu_count() or 1, max(1, len(contents) // 100))
    with progress_bar(total=len(contents), desc="clips", unit="clip") as progress:
        if workers == 1:
            for content in contents:
                render(content)
                progress.update()
            return
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for _ in pool.map(render, contents, chunksize=CHUNK):
                progress.update()


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(SyntheticConfig)))
