"""How fast rows of training come out of tars, beside open_clip's own pipeline over the same tars.

    python benchmarks/load_pairs.py            # about 5 minutes on one core
    python benchmarks/load_pairs.py --quick    # under a minute

Image and caption pairs in img2dataset's layout, 256 pixels, are read by open_clip's `get_wds_dataset` as
it is, and by our loader through `mmrec shards index`, each in a process of its own on one core: decoded,
cropped at random to 224 pixels, tokenised, and normalised. The two take turns. open_clip's pipeline asks
for webdataset below 0.3, which is put under .peers/ for its process alone. Then our loader runs over 50,000
samples, and its memory at the end is compared with that after the first 5,000. The last line is one
JSON object.
"""

import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from peers import install_webdataset
from PIL import Image

from mmrec.data.batches import (
    AugmentConfig,
    PairDataset,
    Preprocess,
    normalise_pixels,
    number_products,
    pair_loader,
)
from mmrec.data.foreign import ForeignMapping, index_tars
from mmrec.data.sampler import GlobalBatches, RankBatches, SamplerConfig
from mmrec.data.shards import open_shards

WORKER = "--worker"
BATCH = 64
BAR = 2.5
MEMORY_BAR = 1.05
WORDS = [
    "red",
    "blue",
    "mug",
    "shoe",
    "soft",
    "large",
    "wool",
    "steel",
    "sale",
    "new",
    "with",
    "for",
]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class LoadPairsConfig:
    """What is measured."""

    quick: bool = False
    """Fewer samples, one round, and memory over 5,000 samples."""


def main(config: LoadPairsConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    num_images, rounds, many = (640, 1, 5_000) if config.quick else (3_200, 3, 50_000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tars = _write_tars(folder, num_tars=4, per_tar=250 if config.quick else 1_000)
        index_tars(
            [str(tar) for tar in tars],
            folder / "shards",
            split="train",
            mapping=ForeignMapping(product_title="txt"),
            num_workers=1,
        )
        rates: dict[str, list[float]] = {name: [] for name in STREAMS}
        for _ in range(rounds):
            for name in STREAMS:
                rates[name].append(_rate_of(name, folder, num_images))
                print(f"{name:<10}{rates[name][-1]:8.0f} images/s on one core", flush=True)
        growth = _growth(_mmrec(folder), many)
    ratio = statistics.median(rates["mmrec"]) / statistics.median(rates["open_clip"])
    results = [
        {
            "what": "images a second on one core, 256 to 224 pixels",
            "peer": "open_clip get_wds_dataset",
            "ratio": round(ratio, 2),
            "bar": BAR,
            "holds": ratio >= BAR,
        },
        {
            "what": f"memory after {many:,} samples",
            "peer": "after a tenth of them",
            "ratio": round(growth, 3),
            "bar": MEMORY_BAR,
            "holds": growth <= MEMORY_BAR,
        },
    ]
    machine = (
        f"{platform.machine()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(json.dumps({"benchmark": "load_pairs", "machine": machine, "results": results}))


def _rate_of(name: str, folder: Path, num_images: int) -> float:
    """Images a second, found in a process of its own."""
    # As train/contrastive.py sets it; it is open_clip's gain as well.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    if name == "open_clip":
        environment["PYTHONPATH"] = str(install_webdataset())
    command = [sys.executable, __file__, WORKER, name, str(folder), str(num_images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def _write_tars(folder: Path, *, num_tars: int, per_tar: int) -> list[Path]:
    """Photos with as much detail as photos have: smooth colours, edges, and some grain."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:05d}.tar" for number in range(num_tars)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(per_tar):
                coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((341, 256), Image.Resampling.BICUBIC))
                edges = np.asarray(coarse.resize((341, 256), Image.Resampling.NEAREST))
                grain = rng.normal(0, 6, (256, 341, 1))
                pixels = np.clip(0.7 * smooth + 0.3 * edges + grain, 0, 255).astype(np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG", quality=90)
                words = rng.choice(WORDS, 6)
                caption = f"{' '.join(words)}, a photo of thing {number * per_tar + i}".encode()
                for suffix, data in (("jpg", stream.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def _open_clip(folder: Path) -> Iterator[int]:
    """The sizes of open_clip's batches, epoch after epoch."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    transform = open_clip.image_transform(224, is_train=True, mean=MEAN, std=STD)
    arguments = Namespace(
        train_data="::".join(map(str, sorted(folder.glob("*.tar")))),
        train_num_samples=BATCH * 1_000_000,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=0,
        world_size=1,
        seed=0,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    info = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    for images, _ in info.dataloader:
        yield len(images)


def _mmrec(folder: Path) -> Iterator[int]:
    """The sizes of our batches, with the images normalised as the encoder does, a batch at a time."""
    import open_clip

    reader = open_shards(folder / "shards", "contents", "train")
    numbers = number_products(reader.product_ids)
    batches = GlobalBatches(
        SamplerConfig(batch_size=BATCH),
        shard_sizes=reader.shard_sizes,
        products=[[numbers[p] for p in ids] for ids in reader.product_ids],
        weights=reader.weights,
    )
    dataset = PairDataset(
        reader,
        numbers,
        preprocess=Preprocess(size=224),
        augment=AugmentConfig(min_scale=0.9, flip=0.0, color=0.0, modality_dropout=0.0),
        num_frames=1,
        num_images=1,
        num_epochs=1_000,
        seed=0,
    )
    loader = pair_loader(
        dataset,
        RankBatches(batches, rank=0, world_size=1, num_epochs=1_000),
        tokenizer=open_clip.get_tokenizer("ViT-B-32"),
        num_workers=0,
        pin_memory=False,
    )
    mean, std = (torch.tensor(part) * 255 for part in (MEAN, STD))
    for batch in loader:
        yield len(normalise_pixels(batch.content.pictures(), mean, std))


def _rate(sizes: Iterator[int], num_images: int) -> float:
    """Images a second, after two batches that fill buffers and caches."""
    list(islice(sizes, 2))
    started = time.perf_counter()
    found = sum(islice(sizes, num_images // BATCH))
    return found / (time.perf_counter() - started)


def _growth(sizes: Iterator[int], num_samples: int) -> float:
    """Resident memory after so many samples over that after a tenth of them."""
    process = psutil.Process()
    list(islice(sizes, num_samples // 10 // BATCH))
    early = process.memory_info().rss
    list(islice(sizes, num_samples * 9 // 10 // BATCH))
    late = process.memory_info().rss
    print(
        f"memory {early / 2**20:.0f} MiB after {num_samples // 10:,} samples, {late / 2**20:.0f} at the end"
    )
    return late / early


STREAMS = {"open_clip": _open_clip, "mmrec": _mmrec}


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        torch.set_num_threads(1)
        print(_rate(STREAMS[sys.argv[2]](Path(sys.argv[3])), int(sys.argv[4])))
    else:
        main(tyro.cli(LoadPairsConfig))
