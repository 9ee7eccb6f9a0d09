"""The contrastive loss beside open_clip's ClipLoss: time, bytes kept for backward, peak memory.

    python benchmarks/contrastive_loss.py            # about 3 minutes on four cores
    python benchmarks/contrastive_loss.py --quick    # under a minute on two

Random unit features of width 512, each row with a product of its own, so that both compute the same loss,
which is checked. Forward plus backward take turns in one process; medians are compared. Bytes kept are the
tensors that autograd saves, each counted once. Peak memory is what the process grew by during one step,
features and their gradients not counted before it, in a process of its own. On a GPU both run under autocast
to bfloat16 at larger batches. The last line is one JSON object.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

# As train/contrastive.py sets it, and for the same reason; it holds for both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from mmrec.model.losses import LossConfig, edge_loss

# Shape letters: B rows, D width.
WORKER = "--worker"
WIDTH = 512
SCALE = 20.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIME_BAR = {"cpu": 0.8, "cuda": 0.7}[DEVICE]
MEMORY_BAR = 0.1
Loss = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class ContrastiveLossConfig:
    """How much to measure."""

    quick: bool = False
    """One batch size and few rounds, for a first look."""
    rounds: int = 7
    """Times that each loss is run, after one that is not counted."""
    chunk_rows: int = LossConfig().chunk_rows
    """Rows of a chunk of ours."""


def main(config: ContrastiveLossConfig) -> None:
    """Measure, print as it goes, and end with one line of JSON."""
    sizes = [4_096, 8_192] if DEVICE == "cpu" else [32_768, 65_536]
    results = []
    for size in sizes[:1] if config.quick else sizes:
        ratio = _time_ratio(size, config)
        what = f"forward plus backward, B={size:,}, D={WIDTH}, {DEVICE}"
        results.append(_result(what, "open_clip ClipLoss", ratio, TIME_BAR))
    size = 8_192 if DEVICE == "cpu" else sizes[0]
    kept = {name: _bytes_kept(loss) for name, loss in _losses(size, config.chunk_rows).items()}
    allowed = 2 * size * WIDTH * 4 + config.chunk_rows * size * 4
    print(f"B={size:,}: kept for backward, MiB", {k: round(v / 2**20, 1) for k, v in kept.items()})
    what = f"bytes kept for backward, B={size:,}"
    ratio = kept["mmrec"] / kept["open_clip"]
    results.append(_result(what, "open_clip ClipLoss", ratio, MEMORY_BAR))
    results.append(_result(what, "the features plus one chunk", kept["mmrec"] / allowed, 1.0))
    grown = {name: _in_own_process(name, size, config.chunk_rows) for name in kept}
    print(f"B={size:,}: growth at the peak, MiB", {k: v // 2**20 for k, v in grown.items()})
    ratio = grown["mmrec"] / grown["open_clip"]
    results.append(_result(f"peak memory of a step, B={size:,}", "open_clip ClipLoss", ratio, 0.1))
    where = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    if DEVICE == "cuda":
        where = torch.cuda.get_device_name()
    machine = f"{platform.machine()}, {where}, torch {torch.__version__}"
    print(json.dumps({"benchmark": "contrastive_loss", "machine": machine, "results": results}))


def _result(what: str, peer: str, ratio: float, bar: float) -> dict[str, object]:
    holds = ratio <= bar
    return {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "holds": holds}


def _losses(size: int, chunk_rows: int) -> dict[str, Loss]:
    """Both losses of the same features."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, size, WIDTH, generator=generator)
    rows, columns = (normalize(part, dim=1).to(DEVICE).requires_grad_() for part in draws)
    scale = torch.tensor(SCALE, device=DEVICE, requires_grad=True)
    everyone = torch.ones(size, dtype=torch.bool, device=DEVICE)
    products = torch.randperm(size, generator=generator).to(DEVICE)
    theirs = ClipLoss()

    def ours() -> Tensor:
        return edge_loss(
            rows,
            columns,
            row_mask=everyone,
            column_mask=everyone,
            links=products[:, None],
            weights=torch.ones(size, 1, device=DEVICE),
            products=products,
            scale=scale,
            config=LossConfig(chunk_rows=chunk_rows),
        )

    def theirs_of_the_same() -> Tensor:
        return theirs(rows, columns, scale)

    return {"mmrec": ours, "open_clip": theirs_of_the_same}


def _forward(loss: Loss) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else nullcontext():
        return loss()


def _time_ratio(size: int, config: ContrastiveLossConfig) -> float:
    """Our median time over open_clip's."""
    losses = _losses(size, config.chunk_rows)
    values = {}
    for name, loss in losses.items():  # Not counted: threads and buffers are made.
        values[name] = _forward(loss).item()
        _seconds(loss)
    # bfloat16 logits are off by 1/256 of themselves.
    torch.testing.assert_close(
        values["mmrec"], values["open_clip"], rtol=1e-5 if DEVICE == "cpu" else 1e-2, atol=0
    )
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(3 if config.quick else config.rounds):
        for name, loss in losses.items():
            seconds[name].append(_seconds(loss))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"B={size:,}: seconds", {name: round(time, 3) for name, time in medians.items()})
    return medians["mmrec"] / medians["open_clip"]


def _seconds(loss: Loss) -> float:
    started = time.perf_counter()
    _forward(loss).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _bytes_kept(loss: Loss) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, each storage once."""
    storages: dict[int, int] = {}

    def note(part: Tensor) -> Tensor:
        storage = part.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return part

    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        value = _forward(loss)
    del value
    return sum(storages.values())


def _in_own_process(name: str, size: int, chunk_rows: int) -> int:
    command = [sys.executable, __file__, WORKER, name, str(size), str(chunk_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _growth(name: str, size: int, chunk_rows: int) -> int:
    """Bytes by which one step raises the most memory that the process has held."""
    _seconds(_losses(64, chunk_rows)[name])  # Threads and libraries' own buffers.
    loss = _losses(size, chunk_rows)[name]
    before = _peak()
    _seconds(loss)
    return _peak() - before


def _peak() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it forked.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        print(_growth(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        main(tyro.cli(ContrastiveLossConfig))
