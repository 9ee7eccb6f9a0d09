"""How fast videos become shards, beside a bare decord loop that takes the same frames at the same size.

    python benchmarks/prepare_videos.py --videos DIR           # about 5 minutes on 4 cores
    python benchmarks/prepare_videos.py --quick                # under a minute, on generated clips

Ours is the whole of data_prep/make_shards.py: tables checked, frames decoded in a child process with
limits, resized, encoded, hashed, grouped, packed and published. The bare loop opens each file, takes the
frames, has decord resize them, and keeps nothing. Each measurement runs in processes of its own, the two
in turns on one core, then on all. The last line is one JSON object; a ratio is our videos a second over the
peer's.
"""

import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
NUM_FRAMES, SIZE = 8, 224
BARE_BAR, SCALING_BAR = 0.85, 0.85


@dataclass(frozen=True, kw_only=True)
class PrepareVideosConfig:
    """What is measured."""

    videos: Path | None = None
    """A folder of mp4, mkv or webm files; None generates clips."""
    num_videos: int = 400
    """Videos a core in one measurement: those of the folder, over and over."""
    rounds: int = 3
    """Times that each is measured; medians count."""
    quick: bool = False
    """Few generated clips, once."""


def main(config: PrepareVideosConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    num_videos, rounds = (60, 1) if config.quick else (config.num_videos, config.rounds)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        videos = _videos(folder, config.videos, 24 if config.quick else 100)
        few = _tables(folder / "one", videos, num_videos)
        many = _tables(folder / "all", videos, num_videos * len(cores))
        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            for what, tables, used in (("one core", few, cores[:1]), ("all cores", many, cores)):
                for who, measure in (("bare", _bare), ("ours", _ours)):
                    rate = measure(tables, used)
                    rates.setdefault(f"{who}, {what}", []).append(rate)
                    print(f"{who:<5} on {what:<10} {rate:8.1f} videos/s", flush=True)
        results = _judge({name: statistics.median(found) for name, found in rates.items()})
    machine = f"{platform.machine()}, {len(cores)} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "prepare_videos", "machine": machine, "results": results}))


def _judge(rate: dict[str, float]) -> list[dict[str, Any]]:
    ours_scale = rate["ours, all cores"] / rate["ours, one core"]
    bare_scale = rate["bare, all cores"] / rate["bare, one core"]
    num_cores = len(os.sched_getaffinity(0))
    return [
        _result(
            "one core", "bare decord", rate["ours, one core"] / rate["bare, one core"], BARE_BAR
        ),
        _result(
            "all cores", "bare decord", rate["ours, all cores"] / rate["bare, all cores"], BARE_BAR
        ),
        _result(f"1 to {num_cores} cores", "linear scaling", ours_scale / num_cores, SCALING_BAR),
        # What the machine itself allows: cores that share a clock, a cache or an execution unit do not
        # scale for a loop that shares nothing either.
        _result(
            f"1 to {num_cores} cores",
            "scaling of bare decord",
            ours_scale / bare_scale,
            SCALING_BAR,
        ),
    ]


def _result(what: str, peer: str, ratio: float, bar: float) -> dict[str, Any]:
    found = {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar}
    return found | {"holds": ratio >= bar}


def _videos(folder: Path, given: Path | None, num_generated: int) -> list[Path]:
    if given is not None:
        kinds = (".mp4", ".mkv", ".webm", ".mov", ".avi")
        videos = sorted(path.resolve() for path in given.rglob("*") if path.suffix in kinds)
        if not videos:
            raise SystemExit(f"{given}: has no videos")
        return videos
    tables = folder / "generated"
    sizes = ["--num-contents", num_generated, "--num-products", 10, "--clip-size", 320]
    sizes += ["--clip-frames", 96]
    _run([sys.executable, ROOT / "data_prep/synthetic.py", "--out", tables, *sizes])
    return sorted(path.resolve() for path in tables.rglob("*.mp4"))


def _tables(folder: Path, videos: list[Path], count: int) -> Path:
    """Tables of so many contents, each with a copy of a video of its own."""
    from mmrec.data.tables import write_tables

    (folder / "media").mkdir(parents=True)
    chosen = list(itertools.islice(itertools.cycle(videos), count))
    names = [f"media/{number:06d}{path.suffix}" for number, path in enumerate(chosen)]
    for name, path in zip(names, chosen, strict=True):
        os.link(path, folder / name) if _same_disk(path, folder) else shutil.copy(
            path, folder / name
        )
    from PIL import Image

    Image.new("RGB", (64, 64), "white").save(folder / "media/product.png")
    sizes = {path: _size(path) for path in videos}
    lines = [f"{folder / n}\t{sizes[p]}" for n, p in zip(names, chosen, strict=True)]
    (folder / "sizes.txt").write_text("\n".join(lines))
    contents = [
        {"content_id": f"c{number:06d}", "video": name} for number, name in enumerate(names)
    ]
    write_tables(
        folder,
        products=[{"product_id": "p", "title": None, "images": ["media/product.png"]}],
        contents=contents,
        links=[
            {"content_id": row["content_id"], "product_id": "p", "split": "train"}
            for row in contents
        ],
        config={},
        counts={},
    )
    return folder


def _size(path: Path) -> str:
    """Width and height at which decord is to give frames, found before the clock starts."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        height, width = decord.VideoReader(str(path), num_threads=1)[0].shape[:2]
    except Exception:  # a file that cannot be read is the same loss to both
        return "-1\t-1"
    scale = min(1.0, SIZE / min(height, width))
    return f"{round(width * scale)}\t{round(height * scale)}"


def _same_disk(path: Path, folder: Path) -> bool:
    return os.access(path, os.W_OK) and path.stat().st_dev == folder.stat().st_dev


def _ours(tables: Path, cores: list[int]) -> float:
    out = tables.parent / "shards"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, ROOT / "data_prep/make_shards.py", "--tables", tables, "--out", out]
    command += ["--num-frames", NUM_FRAMES, "--size", SIZE, "--num-workers", len(cores)]
    # The same clips over and over look alike, and belong to the same split here.
    command += ["--near-duplicates", "allow", "--max-dropped", 1]
    started = time.perf_counter()
    _run(command, cores)
    return _num_contents(tables) / (time.perf_counter() - started)


def _bare(tables: Path, cores: list[int]) -> float:
    """One process a core, each with its share of the files."""
    files = (tables / "sizes.txt").read_text().splitlines()
    started = time.perf_counter()
    with ThreadPoolExecutor(len(cores)) as pool:
        shares = [files[place :: len(cores)] for place in range(len(cores))]
        jobs = zip(shares, cores, strict=True)
        list(pool.map(lambda job: _run([sys.executable, "-c", BARE], [job[1]], job[0]), jobs))
    return len(files) / (time.perf_counter() - started)


BARE = f"""
import sys
import decord
decord.logging.set_level(decord.logging.QUIET)
for line in sys.stdin.read().split("\\n"):
    path, width, height = line.split("\\t")
    try:
        video = decord.VideoReader(
            path, ctx=decord.cpu(0), num_threads=1, width=int(width), height=int(height)
        )
        count = min({NUM_FRAMES}, len(video))
        video.get_batch([(2 * i + 1) * len(video) // (2 * count) for i in range(count)]).asnumpy()
    except Exception:
        pass
"""


def _num_contents(tables: Path) -> int:
    return sum(path.suffix != ".png" for path in (tables / "media").iterdir())


def _run(command: list[Any], cores: list[int] | None = None, lines: list[str] | None = None) -> str:
    text = [str(part) for part in command]
    if cores is not None:
        text = ["taskset", "-c", ",".join(map(str, cores)), *text]
    done = subprocess.run(
        text,
        input="\n".join(lines) if lines else None,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(text[:6])} ...: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main(tyro.cli(PrepareVideosConfig))
