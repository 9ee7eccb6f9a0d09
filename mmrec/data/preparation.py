"""The two kinds of task that turn media into shards: decode a part, and pack a shard.

A part is a fixed slice of a table's rows: the JPEGs of all its samples one after another in a file,
and a Parquet table that says what lies where and what was wrong. Parts do not depend on what other
parts lost, so they are made in any order on any machine; shards are packed when all parts are there.

Shape letters: H height, W width.
"""

import functools
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from mmrec.data.duplicates import hash_jpeg
from mmrec.data.isolation import GIGABYTE, Isolated
from mmrec.data.media import (
    FrameConfig,
    encode_jpeg,
    read_image,
    read_subtitles,
    read_video,
    resize_shorter,
)
from mmrec.data.shards import ShardSample, index_path, write_shard
from mmrec.data.storage import (
    Place,
    Slice,
    is_file,
    place,
    read_bytes,
    read_slice,
    write_bytes_whole,
)
from mmrec.errors import MediaError, UserError
from mmrec.manifest import hash_file

_FAULTS = pa.list_(pa.struct([("reason", pa.string()), ("detail", pa.string())]))
PART_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sizes", pa.list_(pa.int64())),  # of its JPEGs, which follow one another from `offset`
        ("offset", pa.int64()),
        ("times", pa.list_(pa.float64())),
        ("hashes", pa.list_(pa.binary())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("duration", pa.float64()),
        ("num_frames", pa.int64()),
        ("subtitles", pa.string()),
        ("faults", _FAULTS),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What is kept of a file, and what decoding it may cost."""

    frames: FrameConfig
    size: int
    """Shorter side of what is kept, in pixels."""
    jpeg_quality: int
    subtitles: bool
    """Read captions beside or inside a clip."""
    timeout_s: float
    """Longest time for one sample's media."""
    memory_gb: float
    """Most memory for one sample's media, in GiB."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """Where one sample's media lie: a clip, or still images."""

    id: str
    video: str | None
    images: list[str]
    most: int
    """Images to keep; a clip's frames are the config's matter."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What decoding made of one sample's media; without a JPEG the sample is lost."""

    jpegs: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Seconds into the clip, one per JPEG; empty for still images."""
    hashes: list[bytes] = field(default_factory=list)
    """Perceptual hashes of those pictures that are not flat."""
    width: int = 0
    """As shown, in pixels, before resizing; of the first picture kept."""
    height: int = 0
    duration: float = 0.0
    """Seconds; 0 for still images."""
    num_frames: int = 0
    """Frames in the clip, or images kept."""
    subtitles: str | None = None
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Reason and detail of what could not be read."""


@dataclass(frozen=True)
class PartReport:
    """What a part's task says to the one who ordered it."""

    num_samples: int
    num_lost: int


@dataclass(frozen=True)
class DecodeTask:
    """Decode the media of a slice of rows into a part."""

    part: str
    """Place of the part without a suffix: `.bin` has the JPEGs, `.parquet` what lies where."""
    media: Sequence[Media]
    config: DecodeConfig

    def run(self) -> PartReport:
        """Make the part unless it is there."""
        if is_file(place(f"{self.part}.parquet")):
            return report_part(self.part)
        decode = _decoder(self.config.timeout_s, self.config.memory_gb)
        rows = []
        with _growing(place(f"{self.part}.bin")) as file:
            for media in self.media:
                pictures = _decode_safely(decode, self.config, media)
                rows.append(_part_row(media.id, pictures, file.tell()))
                file.writelines(pictures.jpegs)
        # The table comes last: a part that has one is whole.
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, PART_SCHEMA), stream)
        write_bytes_whole(place(f"{self.part}.parquet"), stream.getvalue())
        return PartReport(len(rows), sum(not row["sizes"] for row in rows))


@contextmanager
def _growing(path: Place) -> Iterator[BinaryIO]:
    """A file on this machine's disk that gets its place when the block ends well.

    So what has been written takes no memory, however much it is.
    """
    if not isinstance(path, Path):
        with tempfile.NamedTemporaryFile() as file:
            yield file  # pyright: ignore[reportReturnType]
            file.flush()
            write_bytes_whole(path, Path(file.name))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _decode_safely(
    decode: Callable[[tuple[DecodeConfig, Media]], Pictures], config: DecodeConfig, media: Media
) -> Pictures:
    address = media.video or media.images[0]
    try:
        return decode((config, media))
    except MediaError as error:
        return Pictures(faults=[_fault(error, address)])
    except UserError:
        raise
    except Exception as error:
        # A fault of ours that one odd file brings out must not end a night's work. Should it be every
        # file's, too many are dropped, and the message shows the first.
        said = MediaError("decoder failed", f"{type(error).__name__}: {error}")
        return Pictures(faults=[_fault(said, address)])


def report_part(part: str) -> PartReport:
    """What the task that made a part said."""
    table = read_part(part)
    lost = sum(not sizes for sizes in table["sizes"].to_pylist())
    return PartReport(len(table), lost)


def read_part(part: str) -> pa.Table:
    """A part's table, of `PART_SCHEMA`."""
    path = place(f"{part}.parquet")
    return pq.read_table(pa.BufferReader(path.read_bytes()))


@functools.lru_cache(maxsize=1)
def _decoder(timeout_s: float, memory_gb: float) -> Isolated[tuple[DecodeConfig, Media], Pictures]:
    # Kept from task to task: a child takes half a second to start.
    return Isolated(decode, timeout_s=timeout_s, memory_bytes=int(memory_gb * GIGABYTE))


def decode(item: tuple[DecodeConfig, Media]) -> Pictures:
    """Read, resize, encode and hash one sample's media."""
    config, media = item
    return _decode_clip(config, media.video) if media.video else _decode_images(config, media)


def _decode_clip(config: DecodeConfig, address: str) -> Pictures:
    try:
        clip = read_video(address, config.frames, size=config.size)
    except MediaError as error:
        return Pictures(faults=[_fault(error, address)])
    faults, subtitles = [], None
    if config.subtitles:
        try:
            subtitles = read_subtitles(address)
        except MediaError as error:  # A clip with damaged captions is still a clip.
            faults.append(_fault(error, address))
    jpegs = [_encode(config, frame) for frame in clip.frames]
    return Pictures(
        jpegs=jpegs,
        times=clip.times,
        hashes=_hashes(jpegs),
        width=clip.width,
        height=clip.height,
        duration=clip.duration,
        num_frames=clip.num_frames,
        subtitles=subtitles,
        faults=faults,
    )


def _decode_images(config: DecodeConfig, media: Media) -> Pictures:
    jpegs: list[bytes] = []
    faults, shape = [], (0, 0)
    for address in media.images:
        if len(jpegs) == media.most:
            break
        try:
            image = read_image(address)
        except MediaError as error:
            faults.append(_fault(error, address))
            continue
        shape = shape if jpegs else image.shape[:2]
        jpegs.append(_encode(config, image))
    return Pictures(
        jpegs=jpegs,
        hashes=_hashes(jpegs),
        width=shape[1],
        height=shape[0],
        num_frames=len(jpegs),
        faults=faults,
    )


def _encode(config: DecodeConfig, image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    return encode_jpeg(resize_shorter(image, config.size), config.jpeg_quality)


def _hashes(jpegs: Sequence[bytes]) -> list[bytes]:
    return [found for jpeg in jpegs if (found := hash_jpeg(jpeg)) is not None]


def _fault(error: MediaError, address: str) -> tuple[str, str]:
    # An address that the detail has already is not said twice.
    detail = error.detail if address in error.detail else f"{address}: {error.detail}"
    return error.reason, detail if error.detail else address


def _part_row(sample_id: str, pictures: Pictures, offset: int) -> dict[str, Any]:
    row = asdict(pictures)
    row["sizes"] = [len(jpeg) for jpeg in row.pop("jpegs")]
    row["faults"] = [{"reason": reason, "detail": detail} for reason, detail in pictures.faults]
    return row | {"id": sample_id, "offset": offset}


# Packing


@dataclass(frozen=True)
class Stored:
    """The pictures of a sample where a part holds them."""

    part: str
    offset: int
    sizes: Sequence[int]

    def read(self) -> list[bytes]:
        """The JPEGs."""
        if not self.sizes:
            return []
        data = read_slice(Slice(f"{self.part}.bin", self.offset, sum(self.sizes)))
        ends = np.cumsum([0, *self.sizes])
        return [data[a:b] for a, b in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Packed:
    """A sample as a shard will have it."""

    pictures: Sequence[tuple[Stored, Sequence[str]]]
    """Stored pictures, and the member names they get: one for each, or fewer for the first ones."""
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class PackTask:
    """Write a shard and its index out of parts."""

    tar: str
    receipt: str
    """Place of the record that the shard is whole, with its hash: a tar without one is not trusted."""
    first: int
    """Number of its first sample in the split, which keys count from."""
    samples: Sequence[Packed]

    def run(self) -> str:
        """Write the shard unless it is there; returns the SHA-256 of the tar in hexadecimal."""
        target, receipt = place(self.tar), place(self.receipt)
        if is_file(receipt) and is_file(target):
            return json.loads(read_bytes(receipt))["sha256"]
        digest = self._write(target)
        write_bytes_whole(receipt, json.dumps({"sha256": digest}).encode())
        return digest

    def _write(self, target: Place) -> str:
        if isinstance(target, Path):
            write_shard(target, self._samples())
            return hash_file(target)
        with tempfile.TemporaryDirectory() as folder:
            tar = Path(folder) / target.name
            write_shard(tar, self._samples())
            # The index first, as `write_shard` does: a tar that is there has its index.
            write_bytes_whole(index_path(target), index_path(tar))
            write_bytes_whole(target, tar)
            return hash_file(tar)

    def _samples(self) -> Any:
        for number, sample in enumerate(self.samples, self.first):
            members = {}
            for stored, names in sample.pictures:
                members |= dict(zip(names, stored.read(), strict=False))
            yield ShardSample(f"{number:09d}", members, sample.meta)
