"""What gradient caching costs: a batch of 4,096 contents beside one of 64 that goes through in one piece.

    python benchmarks/gradient_cache.py            # about 2 minutes on 2 cores
    python benchmarks/gradient_cache.py --quick    # under a minute on 2 cores: a batch of 512

A content has 8 frames and a title, its product one image and a title; a small vision transformer without
batch normalisation takes 48 pixels. Each batch size has a process of its own. The memory of a step is
the peak of resident memory during it less what is resident before it, where encoder, gradients and the
batch itself (bytes of pictures, which grow with it by nature) lie already. Both that and the whole
process's peak are printed; the bar is on the step. The last line is one JSON object.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.model.encoder import Encoder, EncoderConfig, Views
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.training.gradient_cache import CacheConfig, cached_backward

WORKER = "--worker"
SMALL = 64
NUM_FRAMES, SIZE, TOKENS = 8, 48, 16
MEMORY_BAR = TIME_BAR = 1.5
TOWERS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 3,
        "width": 96,
        "head_width": 32,
        "patch_size": 12,
    },
    "text_cfg": {
        "context_length": TOKENS,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
CACHE = CacheConfig(frames=256, images=64, texts=64)


@dataclass(frozen=True, kw_only=True)
class GradientCacheConfig:
    """What is measured."""

    quick: bool = False
    """A batch of 512 instead of 4,096."""
    batch_size: int | None = None
    """Another size of the cached batch."""


@dataclass(frozen=True)
class Measured:
    """A step of one batch size, in bytes and seconds."""

    step_bytes: int
    """Peak during a step, above what was resident before it."""
    peak_bytes: int
    """Peak of the whole process."""
    batch_bytes: int
    seconds_per_sample: float


def main(config: GradientCacheConfig) -> None:
    """Measure both sizes, and print one JSON object on the last line."""
    large = config.batch_size or (512 if config.quick else 4096)
    small = _in_a_process(SMALL, cached=False, steps=5)
    cached = _in_a_process(large, cached=True, steps=1)
    mib = 2**20
    for size, found in ((SMALL, small), (large, cached)):
        print(
            f"batch {size:5,}: a step takes {found.step_bytes / mib:6.0f} MiB beside the batch's own "
            f"{found.batch_bytes / mib:5.0f}, the process {found.peak_bytes / mib:6.0f} at its peak; "
            f"{1000 * found.seconds_per_sample:.1f} ms a sample"
        )
    memory = cached.step_bytes / small.step_bytes
    whole = cached.peak_bytes / small.peak_bytes
    seconds = cached.seconds_per_sample / small.seconds_per_sample
    peer = f"batch {SMALL} in one piece"
    rows = [
        (f"memory of a step of {large:,}", memory, MEMORY_BAR),
        (f"peak of the process with a batch of {large:,}", whole, MEMORY_BAR),
        (f"time a sample with a batch of {large:,}", seconds, TIME_BAR),
    ]
    results = [
        {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "holds": ratio <= bar}
        for what, ratio, bar in rows
    ]
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} of {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps({"benchmark": "gradient_cache", "machine": machine, "results": results}))


def _in_a_process(batch_size: int, *, cached: bool, steps: int) -> Measured:
    job = json.dumps({"batch_size": batch_size, "cached": cached, "steps": steps})
    command = [sys.executable, __file__, WORKER, job]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure(batch_size: int, *, cached: bool, steps: int) -> Measured:
    """Take steps of one batch size in this process."""
    encoder = _make_encoder()
    # Gradients, and what a first step sets up, are there before anything is measured.
    _step(encoder, _make_batch(8), cached=cached)
    batch = _make_batch(batch_size)
    before = _reset_peak()
    seconds = [_step(encoder, batch, cached=cached) for _ in range(steps)]
    peak = _peak()
    batch_bytes = sum(
        part.nbytes for items in (batch.content, batch.product) for part in vars(items).values()
    )
    return Measured(peak - before, peak, batch_bytes, statistics.median(seconds) / batch_size)


def _make_encoder() -> Encoder:
    with tempfile.TemporaryDirectory() as folder:
        towers = Path(folder) / "benchmark-vit.json"
        towers.write_text(json.dumps(TOWERS), encoding="utf-8")
        torch.manual_seed(0)
        return Encoder(EncoderConfig(towers=str(towers))).train()


def _make_batch(batch_size: int) -> PairBatch:
    def items(num_pictures: int) -> ItemBatch:
        pixels = torch.randint(0, 256, (batch_size, num_pictures, SIZE, SIZE, 3), dtype=torch.uint8)
        return ItemBatch(
            images=pixels.permute(0, 1, 4, 2, 3),
            image_mask=torch.ones(batch_size, num_pictures, dtype=torch.bool),
            tokens=torch.randint(1, 400, (batch_size, TOKENS)),
            text_mask=torch.ones(batch_size, dtype=torch.bool),
        )

    products = torch.arange(batch_size)
    return PairBatch(
        content=items(NUM_FRAMES),
        product=items(1),
        product_number=products,
        links=products[:, None],
        weights=torch.ones(batch_size, 1),
        samples=products,
    )


def _step(encoder: Encoder, batch: PairBatch, *, cached: bool) -> float:
    """Seconds of a forward and a backward pass."""

    def losses_of(views: Views, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return contrastive_loss(views, batch, scale, Objectives())

    encoder.zero_grad(set_to_none=False)
    started = time.perf_counter()
    if cached:
        cached_backward(encoder, batch, losses_of, config=CACHE)
    else:
        losses_of(*encoder(batch))["loss"].backward()
    return time.perf_counter() - started


def _reset_peak() -> int:
    """Resident bytes now; on Linux the peak is forgotten."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        print(json.dumps(asdict(measure(**json.loads(sys.argv[2])))))
    else:
        main(tyro.cli(GradientCacheConfig))
