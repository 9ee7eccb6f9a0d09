"""What gradient caching costs: a batch of 4,096 contents beside one of 64 that goes through in one piece.

    python benchmarks/gradient_cache.py            # about 2 minutes on 2 cores
    python benchmarks/gradient_cache.py --quick    # under a minute on 2 cores: a batch of 512

A content has 8 frames and a title, its product one image and a title; a small vision transformer without
batch normalisation takes 48 pixels. Each batch size has a process of its own. The memory of a step is
the peak of resident memory during it less what is resident before it, where encoder, gradients and the
batch itself (bytes of pictures, which grow with it by nature) lie already; that and the whole process's
peak are both compared. For time, one process takes steps of 64, a step of the large batch, and steps of 64
again; beside the clock on the wall stands the processor's, which other work on the machine changes less.
The last line is one JSON object.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait by spinning would count as work on the processor's clock.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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


def main(config: GradientCacheConfig) -> None:
    """Measure memory and time, and print one JSON object on the last line."""
    large = config.batch_size or (512 if config.quick else 4096)
    memory = {size: _in_a_process("memory", size) for size in (SMALL, large)}
    for size, found in memory.items():
        step, peak, batch = (found[name] / 2**20 for name in ("step", "peak", "batch"))
        print(
            f"batch {size:5,}: a step takes {step:6.0f} MiB beside the batch's own {batch:5.0f}, "
            f"the process {peak:6.0f} at its peak"
        )
    seconds = _in_a_process("time", large)
    print("ms a sample: " + ", ".join(f"{name} {1000 * s:.1f}" for name, s in seconds.items()))
    small, cached = memory[SMALL], memory[large]
    rows = [
        (f"memory of a step of {large:,}", cached["step"] / small["step"], MEMORY_BAR),
        (f"peak of the process at {large:,}", cached["peak"] / small["peak"], MEMORY_BAR),
        (f"time a sample at {large:,}", seconds["cached"] / seconds["plain"], TIME_BAR),
        (
            f"processor time a sample at {large:,}",
            seconds["cached cpu"] / seconds["plain cpu"],
            TIME_BAR,
        ),
    ]
    peer = f"batch {SMALL} in one piece"
    results = [
        {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "holds": ratio <= bar}
        for what, ratio, bar in rows
    ]
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} of {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps({"benchmark": "gradient_cache", "machine": machine, "results": results}))


def _in_a_process(what: str, batch_size: int) -> dict[str, float]:
    command = [sys.executable, __file__, WORKER, what, str(batch_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(batch_size: int) -> dict[str, float]:
    """Bytes of a step above what was resident before it, of the process, and of the batch."""
    encoder = _make_encoder()
    cached = batch_size != SMALL
    # Gradients, and what a first step sets up, are there before anything is measured.
    _step(encoder, _make_batch(8), cached=cached)
    batch = _make_batch(batch_size)
    before = _reset_peak()
    for _ in range(1 if cached else 3):
        _step(encoder, batch, cached=cached)
    peak = _peak()
    sides = (batch.content, batch.product)
    own = sum(part.nbytes for items in sides for part in vars(items).values())
    return {"step": peak - before, "peak": peak, "batch": own}


def measure_time(batch_size: int) -> dict[str, float]:
    """Seconds a sample by the clock on the wall and by the processor's, cached and in one piece."""
    encoder = _make_encoder()
    small, large = _make_batch(SMALL), _make_batch(batch_size)
    for cached in (False, True):
        _step(encoder, small, cached=cached)
    plain = [_step(encoder, small, cached=False) for _ in range(6)]
    wall, cpu = _step(encoder, large, cached=True)
    plain += [_step(encoder, small, cached=False) for _ in range(6)]
    return {
        "plain": statistics.median(wall for wall, _ in plain) / SMALL,
        "cached": wall / batch_size,
        "plain cpu": statistics.median(cpu for _, cpu in plain) / SMALL,
        "cached cpu": cpu / batch_size,
    }


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


def _step(encoder: Encoder, batch: PairBatch, *, cached: bool) -> tuple[float, float]:
    """Seconds of a forward and a backward pass, by both clocks."""

    def losses_of(views: Views, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return contrastive_loss(views, batch, scale, Objectives())

    encoder.zero_grad(set_to_none=False)
    started = time.perf_counter(), time.process_time()
    if cached:
        cached_backward(encoder, batch, losses_of, config=CACHE)
    else:
        losses_of(*encoder(batch))["loss"].backward()
    return time.perf_counter() - started[0], time.process_time() - started[1]


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
        measure = {"memory": measure_memory, "time": measure_time}[sys.argv[2]]
        print(json.dumps(measure(int(sys.argv[3]))))
    else:
        main(tyro.cli(GradientCacheConfig))
