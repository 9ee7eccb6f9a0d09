"""From rows of shards to batches of tensors: ItemBatch, PairBatch, and the DataLoader of training.

Images travel as uint8 and are normalised a batch at a time inside the encoder, on its device. Shape
letters: B samples, T frames or images, H W pixels, L tokens, M links of a content,
H (alone) hard negatives of a batch.
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mmrec.data.media import decode_jpeg
from mmrec.data.mixing import GROUP_ROWS, mix_rows
from mmrec.data.negatives import HardNegatives
from mmrec.data.sampler import RankBatches, Row, draw_some
from mmrec.data.shards import ShardReader, frame_name, image_name, product_image_name
from mmrec.ranges import Range, Share

Tokenizer = Callable[[list[str]], Tensor]
Image = UInt8[Tensor, "3 H W"]


@dataclass(frozen=True, kw_only=True)
class ItemBatch:
    """Contents or products as the encoder takes them: pictures, a title, and masks of what is there."""

    images: UInt8[Tensor, "B T 3 H W"]
    """A content's frames or a product's images; zero where the mask is false. Channels lie innermost."""
    image_mask: Bool[Tensor, "B T"]
    tokens: Int[Tensor, "B L"]
    """The title's tokens; meaningless where the mask is false."""
    text_mask: Bool[Tensor, " B"]

    def __len__(self) -> int:
        return len(self.images)

    def pictures(self) -> UInt8[Tensor, "N 3 H W"]:
        """The pictures that are there, row by row, with channels innermost in memory."""
        flat = self.images.flatten(0, 1).permute(0, 2, 3, 1)  # (B * T, H, W, 3)
        if not self.image_mask.all():
            flat = flat[self.image_mask.flatten()]
        return flat.permute(0, 3, 1, 2)

    def to(self, device: torch.device | str) -> "ItemBatch":
        """The same batch on another device."""
        return ItemBatch(
            **{name: part.to(device, non_blocking=True) for name, part in vars(self).items()}
        )

    def pin_memory(self) -> "ItemBatch":
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return ItemBatch(**{name: part.pin_memory() for name, part in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Rows of training: a content beside one of its products, and all that the content links to."""

    content: ItemBatch
    product: ItemBatch
    """The rows' products, and after them the rows' hard negatives."""
    product_number: Int[Tensor, " B"]
    """The number of the row's product in the split's sorted list of product ids."""
    links: Int[Tensor, "B M"]
    """Numbers of every product that the content links to; -1 pads to the split's longest row."""
    weights: Float[Tensor, "B M"]
    """The links' weights; 0 pads."""
    samples: Int[Tensor, " B"]
    """Row numbers in the split: they name a batch in a log."""
    negative_number: Int[Tensor, " H"] = field(default_factory=lambda: torch.zeros(0).long())
    """The numbers of the hard negatives, past those of the split where no training row links to them."""
    negative_row: Int[Tensor, " H"] = field(default_factory=lambda: torch.zeros(0).long())
    """The row of this batch that brought each of them."""

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on another device."""
        return PairBatch(**{n: part.to(device) for n, part in vars(self).items()})

    def pin_memory(self) -> "PairBatch":
        """The same batch in page-locked memory."""
        return PairBatch(**{n: part.pin_memory() for n, part in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training changes in a sample; every draw comes from (seed, epoch, sample)."""

    min_scale: Share = 0.5
    """Smallest share of a picture's area that a random crop keeps; 1 turns cropping off."""
    max_aspect: Annotated[float, Range(1)] = 4 / 3
    """Largest stretch of a crop's sides, either way."""
    flip: Share = 0.5
    """Probability of a mirror image; 0 where printed words matter."""
    color: Share = 0.2
    """Strength of brightness, contrast and saturation changes; 0 turns them off."""
    rotate: Annotated[float, Range(0, 180)] = 0.0
    """Largest rotation of a picture, either way, in degrees; what it uncovers is the picture's mean."""
    erase: Share = 0.0
    """Probability that a rectangle of a picture is filled with its mean (Zhong et al. 2020)."""
    mix: Share = 0.0
    """Probability that a rectangle of a content's pictures is another row's, with its links (CutMix).

    Rows are mixed within fours, by draws of (seed, epoch, the first row's sample). What is mixed has no
    title.
    """
    modality_dropout: Share = 0.1
    """Probability that a side which has both pictures and a title loses one of them."""
    early_size: Annotated[int, Range(16)] | None = None
    """Side of pictures in the early epochs, in pixels, for towers that take any size.

    Half the side costs a quarter of the time, and what is learned on small pictures carries over
    (progressive resizing: Howard 2018; Tan and Le 2021, EfficientNetV2). None trains at one size.
    """
    early_share: Share = 0.6
    """Share of the epochs that is at the early size, if there is one."""
    late_size: Annotated[int, Range(16)] | None = None
    """Side of pictures in the other epochs, in pixels, likewise; None is the tower's own.

    A random crop shows things larger than they are in a whole picture, which a tower that is trained on
    smaller pictures than it will see makes up for (FixRes: Touvron et al. 2019).
    """

    def size_of(self, epoch: int, num_epochs: int) -> int | None:
        """The side of pictures in an epoch; None is the tower's own."""
        early = self.early_size and epoch < round(self.early_share * num_epochs)
        return self.early_size if early else self.late_size


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture of any size becomes what an image tower expects."""

    size: int
    """Side of the tower's square input, in pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    """Keep the aspect ratio and crop the centre, or squash to a square (SigLIP's towers)."""

    def __call__(self, image: Image) -> UInt8[Tensor, "3 S S"]:
        """Resize and crop as at test time."""
        if self.resize == "squash":
            return _resize(image, self.size, self.size, self.interpolation)
        height, width = image.shape[-2:]
        shorter = min(height, width)
        height, width = (int(self.size * side / shorter) for side in (height, width))
        image = _resize(image, height, width, self.interpolation)
        return F.center_crop(image, [self.size, self.size])

    def augmented(
        self, image: Image, view: "View", *, size: int | None = None
    ) -> UInt8[Tensor, "3 S S"]:
        """Crop, flip and recolour as one draw of augmentation says, at the tower's size or another."""
        side = size or self.size
        top, left, height, width = view.box(*image.shape[-2:])
        image = image[:, top : top + height, left : left + width]
        image = _resize(image, side, side, self.interpolation)
        if view.flip:
            image = F.horizontal_flip(image)
        if view.color != (1.0, 1.0, 1.0):
            brightness, contrast, saturation = view.color
            image = F.adjust_brightness(image, brightness)
            image = F.adjust_contrast(image, contrast)
            image = F.adjust_saturation(image, saturation)
        if view.angle or view.hole:
            mean = image.float().mean((1, 2)).tolist()
            if view.angle:
                mode = InterpolationMode.BILINEAR
                image = F.rotate(image, view.angle, interpolation=mode, fill=mean)
            if view.hole:
                top, left, height, width = (round(part * side) for part in view.hole)
                fill = torch.tensor(mean).to(torch.uint8).view(3, 1, 1)
                image = F.erase(image, top, left, height, width, fill)
        return image


def _resize(image: Image, height: int, width: int, mode: str) -> UInt8[Tensor, "3 _ _"]:
    if image.shape[-2:] == (height, width):
        return image
    # Decoders lay channels innermost, and torch resizes bytes twice as fast so; a crop must be copied
    # first, or it falls back to planes.
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    return interpolate(pixels, size=(height, width), mode=mode, antialias=True)[0]


def normalise_pixels(
    images: UInt8[Tensor, "N 3 H W"], mean: Float[Tensor, " 3"], std: Float[Tensor, " 3"]
) -> Float[Tensor, "N 3 H W"]:
    """Bytes to floats less `mean` over `std` (both in 0..255 per channel), channels innermost in memory."""
    pixels = images.permute(0, 2, 3, 1).contiguous().float()  # (N, H, W, 3)
    # Whole lines of an image at a time: three numbers repeated are too short to compute on at once.
    lines = pixels.flatten(2)  # (N, H, W * 3)
    width = pixels.shape[2]
    # In place: a batch of floats is large, and each copy of it is memory to be found and filled.
    torch.addcmul((-mean / std).repeat(width), lines, (1 / std).repeat(width), out=lines)
    return pixels.permute(0, 3, 1, 2)


_CROP_TRIES = 10  # as torchvision's RandomResizedCrop makes before it gives up


@dataclass(frozen=True)
class View:
    """One draw of augmentation, shared by all frames of a clip so that it stays one scene."""

    crops: tuple[tuple[float, float], ...]
    """Shares of the area and ratios of width to height; the first that fits into a picture is taken."""
    max_aspect: float
    """The largest of these ratios, either way."""
    top: float
    left: float
    flip: bool = False
    color: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Factors of brightness, contrast and saturation."""
    angle: float = 0.0
    """Rotation in degrees, against the clock."""
    hole: tuple[float, float, float, float] | None = None
    """What is erased: top, left, height and width as shares of the side."""

    @classmethod
    def draw(cls, config: AugmentConfig, rng: np.random.Generator) -> "View":
        """Draw crop, flip, colour, rotation and hole from a generator."""
        # One call: each costs as much as resizing a few lines of a picture.
        draws = iter(rng.random(12 + 2 * _CROP_TRIES).tolist())
        top, left, flip, *color = (next(draws) for _ in range(6))
        angle, erase = next(draws), next(draws)
        height, width = 0.15 + 0.35 * next(draws), 0.15 + 0.35 * next(draws)
        hole = ((1 - height) * next(draws), (1 - width) * next(draws), height, width)
        stretch = 2 * math.log(config.max_aspect)
        crops = [
            (
                config.min_scale + (1 - config.min_scale) * next(draws),
                math.exp(stretch * (next(draws) - 0.5)),
            )
            for _ in range(_CROP_TRIES)
        ]
        return cls(
            crops=tuple(crops),
            max_aspect=config.max_aspect,
            top=top,
            left=left,
            flip=flip < config.flip,
            color=tuple(1 + config.color * (2 * part - 1) for part in color),
            angle=config.rotate * (2 * angle - 1),
            hole=hole if erase < config.erase else None,
        )

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The crop in pixels of a picture of that size: top, left, height, width."""
        crop_height, crop_width = self._size(height, width)
        top = int(self.top * (height - crop_height + 1))
        left = int(self.left * (width - crop_width + 1))
        return top, left, crop_height, crop_width

    def _size(self, height: int, width: int) -> tuple[int, int]:
        for scale, aspect in self.crops:
            area = height * width * scale
            crop_height, crop_width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if 0 < crop_height <= height and 0 < crop_width <= width:
                return crop_height, crop_width
        # Too long for its ratios: as much as fits of the longest of them.
        aspect = min(max(width / height, 1 / self.max_aspect), self.max_aspect)
        crop_height = min(height, max(1, round(width / aspect)))
        return crop_height, min(width, max(1, round(crop_height * aspect)))


def collate_items(
    images: Sequence[Sequence[UInt8[Tensor, "3 S S"]]],
    titles: Sequence[str | None],
    *,
    tokenizer: Tokenizer,
    size: int,
) -> ItemBatch:
    """Stack items with any number of pictures (0 or more) and with or without a title."""
    longest = max(1, max(len(pictures) for pictures in images))
    # numpy asks for memory that is zero already, so that places without a picture cost nothing.
    stacked = torch.from_numpy(np.zeros((len(images), longest, size, size, 3), np.uint8))
    mask = torch.zeros(len(images), longest, dtype=torch.bool)
    for row, pictures in enumerate(images):
        for t, picture in enumerate(pictures):
            stacked[row, t] = picture.permute(1, 2, 0)
        mask[row, : len(pictures)] = True
    given = [title for title in titles if title and title.strip()]
    text_mask = torch.tensor([bool(title and title.strip()) for title in titles])
    found = tokenizer(given or [""])
    tokens = found.new_zeros(len(titles), found.shape[1])
    if given:
        tokens[text_mask] = found
    return ItemBatch(
        images=stacked.permute(0, 1, 4, 2, 3), image_mask=mask, tokens=tokens, text_mask=text_mask
    )


class RememberingTokenizer:
    """A tokenizer that keeps what it found for titles: a product's comes back in most batches."""

    def __init__(self, tokenizer: Tokenizer, *, most: int = 8192) -> None:
        """Keep at most so many titles; all are let go when they are more."""
        self._tokenizer = tokenizer
        self._most = most
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > self._most:
            self._known.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._known |= dict(zip(new, self._tokenizer(new).unbind(), strict=True))
        return torch.stack([self._known[text] for text in texts])


def number_products(ids: Iterable[Sequence[str]]) -> dict[str, int]:
    """Give every product id of a split a number, the same on every rank."""
    return {product_id: n for n, product_id in enumerate(sorted({p for row in ids for p in row}))}


def spread(count: int, wanted: int) -> list[int]:
    """The middles of `wanted` equal spans of `count` frames; all of them where there are fewer."""
    if count <= wanted:
        return list(range(count))
    return [int((t + 0.5) * count / wanted) for t in range(wanted)]


def spread_randomly(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """One random frame out of each of `wanted` equal spans; all of them where there are fewer."""
    if count <= wanted:
        return list(range(count))
    edges = np.linspace(0, count, wanted + 1)
    return [int(i) for i in np.minimum(rng.uniform(edges[:-1], edges[1:]).astype(int), count - 1)]


@dataclass(frozen=True)
class _Pair:
    content: list[Tensor]
    content_title: str | None
    product: list[Tensor]
    product_title: str | None
    number: int
    links: list[int]
    weights: list[float]
    sample: int
    epoch: int
    repeat: int
    size: int
    """Side of its pictures, in pixels; the same in all rows of an epoch."""
    negatives: list["_Negative"]


@dataclass(frozen=True)
class _Negative:
    pictures: list[Tensor]
    title: str | None
    number: int


class PairDataset(Dataset[_Pair]):
    """Training rows by (epoch, sample, slot): map-style, so that the sampler alone decides the order."""

    def __init__(
        self,
        reader: ShardReader,
        numbers: Mapping[str, int],
        *,
        preprocess: Preprocess,
        augment: AugmentConfig,
        num_frames: int,
        num_images: int,
        num_epochs: int,
        seed: int,
        negatives: HardNegatives | None = None,
    ) -> None:
        self._negatives = negatives
        self.max_links = max(len(ids) for ids in reader.product_ids)
        self._reader = reader
        self._numbers = numbers
        self._preprocess = preprocess
        self.augment = augment
        self._num_frames = num_frames
        self._num_images = num_images
        self._num_epochs = num_epochs
        self.seed = seed

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, row: Row) -> _Pair:
        # The fourth number is kept for draws of another kind.
        rng = np.random.default_rng([self.seed, row.epoch, row.sample, 0, row.repeat])
        sample, slot = row.sample, row.slot
        meta = self._reader.meta(sample)
        linked = meta["products"][slot]
        present = self._reader.names(sample)
        num_frames = sum(1 for name in present if name.startswith("f"))
        frames = [frame_name(t) for t in spread_randomly(num_frames, self._num_frames, rng)]
        drawn = draw_some(linked["num_images"], self._num_images, rng)
        images = [product_image_name(slot, i) for i in drawn if row.brings_product]
        bytes_read = self._reader.read(sample, [*frames, *images])
        size = self.augment.size_of(row.epoch, self._num_epochs) or self._preprocess.size
        content = self._pictures([bytes_read[name] for name in frames], rng, size)
        product = self._pictures([bytes_read[name] for name in images], rng, size)
        content, content_title = self._drop_modality(content, meta["title"], rng)
        product_title = linked["title"] if row.brings_product else None
        product, product_title = self._drop_modality(product, product_title, rng)
        return _Pair(
            content=content,
            content_title=content_title,
            product=product,
            product_title=product_title,
            number=self._numbers[linked["product_id"]],
            links=[self._numbers[p] for p in self._reader.product_ids[sample]],
            weights=self._reader.weights[sample],
            sample=sample,
            epoch=row.epoch,
            repeat=row.repeat,
            size=size,
            negatives=self._draw_negatives(row, size),
        )

    def _draw_negatives(self, row: Row, size: int) -> list[_Negative]:
        if self._negatives is None:
            return []
        # A stream of its own, so that the row itself is augmented as it is without negatives.
        rng = np.random.default_rng([self.seed, row.epoch, row.sample, 2, row.repeat])
        found = []
        for product_id in self._negatives.draw(row.sample, rng):
            meta = self._negatives.catalog.meta(product_id)
            drawn = draw_some(meta["num_images"], self._num_images, rng)
            encoded = self._negatives.catalog.read_images(product_id, drawn)
            pictures, title = self._drop_modality(
                self._pictures(encoded, rng, size), meta["title"], rng
            )
            found.append(_Negative(pictures, title, self._negatives.numbers[product_id]))
        return found

    def _pictures(self, encoded: list[bytes], rng: np.random.Generator, size: int) -> list[Tensor]:
        if not encoded:
            return []
        view = View.draw(self.augment, rng)
        return [self._preprocess.augmented(decode_jpeg(data), view, size=size) for data in encoded]

    def _drop_modality(
        self, pictures: list[Tensor], title: str | None, rng: np.random.Generator
    ) -> tuple[list[Tensor], str | None]:
        drop, which = rng.random(2)
        if not pictures or not title or drop >= self.augment.modality_dropout:
            return pictures, title
        return ([], title) if which < 0.5 else (pictures, None)


@dataclass(frozen=True)
class _CollatePairs:
    tokenizer: Tokenizer
    max_links: int
    """Every batch is padded to this width, so that ranks can gather links as they are."""
    mix: Share = 0.0
    seed: int = 0

    def __call__(self, pairs: list[_Pair]) -> PairBatch:
        links = np.full((len(pairs), self.max_links), -1)
        weights = np.zeros((len(pairs), self.max_links), np.float32)
        for row, pair in enumerate(pairs):
            links[row, : len(pair.links)] = pair.links
            weights[row, : len(pair.weights)] = pair.weights
        collate = {"tokenizer": self.tokenizer, "size": pairs[0].size}
        content = collate_items(
            [p.content for p in pairs], [p.content_title for p in pairs], **collate
        )
        if self.mix:
            links, weights = self._mix(pairs, content, links, weights)
        negatives = [(row, n) for row, pair in enumerate(pairs) for n in pair.negatives]
        return PairBatch(
            content=content,
            product=collate_items(
                [p.product for p in pairs] + [n.pictures for _, n in negatives],
                [p.product_title for p in pairs] + [n.title for _, n in negatives],
                **collate,
            ),
            product_number=torch.tensor([p.number for p in pairs]),
            links=torch.from_numpy(links),
            weights=torch.from_numpy(weights),
            samples=torch.tensor([p.sample for p in pairs]),
            negative_number=torch.tensor([n.number for _, n in negatives], dtype=torch.long),
            negative_row=torch.tensor([row for row, _ in negatives], dtype=torch.long),
        )

    def _mix(
        self,
        pairs: list[_Pair],
        content: ItemBatch,
        links: Int[np.ndarray, "B M"],
        weights: Float[np.ndarray, "B M"],
    ) -> tuple[Int[np.ndarray, "B 2*M"], Float[np.ndarray, "B 2*M"]]:
        """Mix the rows of each group in place; returns their links and weights."""
        pixels, mask = content.images.permute(0, 1, 3, 4, 2).numpy(), content.image_mask.numpy()
        mixtures = []
        for start in range(0, len(pairs), GROUP_ROWS):
            part = slice(start, start + GROUP_ROWS)
            first = pairs[start]
            # A stream of its own: the fourth number keeps it apart from that of a sample.
            rng = np.random.default_rng([self.seed, first.epoch, first.sample, 1, first.repeat])
            mixtures.append(
                mix_rows(
                    pixels[part],
                    mask[part],
                    links[part],
                    weights[part],
                    probability=self.mix,
                    rng=rng,
                )
            )
        links, weights, mixed = map(np.concatenate, zip(*mixtures, strict=True))
        content.text_mask[torch.from_numpy(mixed)] = False
        return links, weights


def pair_loader(
    dataset: PairDataset,
    batches: RankBatches,
    *,
    tokenizer: Tokenizer,
    num_workers: int,
    pin_memory: bool,
) -> Iterable[PairBatch]:
    """The DataLoader of training: one rank's batches, in the sampler's order, read ahead by workers.

    It has a generator of its own, as all loaders here: an iterator draws a seed as it starts, and from the
    global one that would change a run's dropout on each resume and at each evaluation.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=_CollatePairs(
            RememberingTokenizer(tokenizer), dataset.max_links, dataset.augment.mix, dataset.seed
        ),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),
    )


def item_loader(
    reader: ShardReader,
    rows: Sequence[int],
    *,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    num_frames: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    stretches: Sequence[int] | None = None,
) -> Iterable[ItemBatch]:
    """Batches of contents or products as at test time, in the order of `rows`, nothing augmented.

    `stretches` are numbers of rows, one stretch after the other, over whose ends no batch goes.
    """
    return DataLoader(
        _ItemDataset(reader, rows, preprocess, num_frames),
        batch_sampler=[list(b) for b in _in_batches(stretches or [len(rows)], batch_size)],
        collate_fn=_CollateItems(tokenizer, preprocess.size),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),
    )


def _in_batches(stretches: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    start = 0
    for size in stretches:
        for first in range(start, start + size, batch_size):
            yield range(first, min(first + batch_size, start + size))
        start += size


class _ItemDataset(Dataset[tuple[list[Tensor], str | None]]):
    def __init__(
        self, reader: ShardReader, rows: Sequence[int], preprocess: Preprocess, num_frames: int
    ) -> None:
        self._reader = reader
        self._rows = rows
        self._preprocess = preprocess
        self._num_frames = num_frames
        self._name = frame_name if reader.family == "contents" else image_name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[list[Tensor], str | None]:
        row = self._rows[number]
        prefix = self._name(0)[0]
        count = sum(1 for name in self._reader.names(row) if name.startswith(prefix))
        names = [self._name(t) for t in spread(count, self._num_frames)]
        encoded = self._reader.read(row, names)
        pictures = [self._preprocess(decode_jpeg(encoded[name])) for name in names]
        return pictures, self._reader.meta(row)["title"]


@dataclass(frozen=True)
class _CollateItems:
    tokenizer: Tokenizer
    size: int

    def __call__(self, items: list[tuple[list[Tensor], str | None]]) -> ItemBatch:
        pictures, titles = zip(*items, strict=True)
        return collate_items(pictures, titles, tokenizer=self.tokenizer, size=self.size)


def _one_thread(worker: int) -> None:
    # Workers share the cores with the trainer; their tensor work is too small to gain from threads.
    torch.set_num_threads(1)
    # Terminals and schedulers signal every process of a program. Workers end when it lets them go: it
    # may still want a batch.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
