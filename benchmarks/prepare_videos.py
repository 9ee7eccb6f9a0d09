"""How fast videos become shards, beside a bare decord loop and beside video2dataset.

    python benchmarks/prepare_videos.py --videos DIR           # about 8 minutes on 4 cores
    python benchmarks/prepare_videos.py --quick                # under a minute, on generated clips

Ours is the whole of data_prep/make_shards.py: tables checked, frames decoded in a child process with
limits, resized, encoded, hashed, grouped, packed and published. The bare loop opens each file, takes the
frames, has decord resize them, and keeps nothing. Each measurement runs in processes of its own, the two
in turns on one core, then on all. The last line is one JSON object; a ratio is our videos a second over the
peer's. Each side tells how many videos it made, those alone count, and a side that loses more than one in
twenty ends the measurement.

video2dataset (1.3.0, the last release) reads the same local files on all cores and writes tars. It knows no
"8 frames of a clip": the nearest are its FrameSubsampler at 8 frames per median length of the clips, and
its ResolutionSubsampler at a height of 224 pixels, each of which has ffmpeg encode a clip anew. Both together
are what the bar is held against; the first alone, which resizes nothing, is the least that it can be asked
for. Two faults of the release are mended by the program that starts it (its issues 311 and 322). It runs
once, in a virtual environment of its own under .peers/, since it requires numpy below 2 and torch 2.1.2,
which has no wheels past Python 3.11; that takes some minutes and 6 GB to make, and --quick leaves it out.
"""

import itertools
import json
import math
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
BARE_BAR, SCALING_BAR, VIDEO2DATASET_BAR = 0.85, 0.85, 1.5
LEAST_MADE = 0.95  # of the videos, by every side: a loss is fast
PEER = ROOT / ".peers" / "video2dataset"
PEER_REQUIREMENTS = """\
video2dataset==1.3.0
numpy==1.26.4
pandas==2.2.3
pyarrow==17.0.0
webdataset==0.2.100
imageio-ffmpeg==0.6.0
setuptools==75.8.0
"""


@dataclass(frozen=True, kw_only=True)
class PrepareVideosConfig:
    """What is measured."""

    videos: Path | None = None
    """A folder of mp4, mkv or webm files; None generates clips."""
    num_videos: int = 400
    """Videos a core in one measurement: those of the folder, over and over."""
    rounds: int = 3
    """Times that each is measured; medians count."""
    video2dataset: bool = True
    """Measure video2dataset as well, once, on all cores."""
    quick: bool = False
    """Few generated clips, once, without video2dataset."""


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
        medians = {name: statistics.median(found) for name, found in rates.items()}
        results = _judge(medians)
        if config.video2dataset and not config.quick:
            results += _judge_video2dataset(many, cores, medians["ours, all cores"])
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


def _judge_video2dataset(tables: Path, cores: list[int], ours: float) -> list[dict[str, Any]]:
    python = _install_video2dataset()
    results = []
    for what, resized in (("frames at 224 pixels", True), ("frames not resized", False)):
        rate = _video2dataset(python, tables, cores, resized=resized)
        print(f"video2dataset, {what} {rate:8.1f} videos/s", flush=True)
        results.append(
            _result("all cores", f"video2dataset, {what}", ours / rate, VIDEO2DATASET_BAR)
        )
    return results


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
    found = {path: _look_at(path) for path in videos}
    lines = [f"{folder / n}\t{found[p][0]}" for n, p in zip(names, chosen, strict=True)]
    (folder / "sizes.txt").write_text("\n".join(lines))
    seconds = [length for _, length in found.values() if length > 0]  # NaN is not
    (folder / "median_s.txt").write_text(str(statistics.median(seconds or [1.0])))
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


def _look_at(path: Path) -> tuple[str, float]:
    """Width and height at which decord is to give frames, and seconds, found before the clock starts."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(str(path), num_threads=1)
        height, width = video[0].shape[:2]
        seconds = float(video.get_frame_timestamp(len(video) - 1)[1])
    except Exception:  # a file that cannot be read is the same loss to all
        return "-1\t-1", math.nan
    scale = min(1.0, SIZE / min(height, width))
    return f"{round(width * scale)}\t{round(height * scale)}", seconds


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
    seconds = time.perf_counter() - started
    made = json.loads((out / "manifest.json").read_text())["counts"]["out"]["contents"]
    return _checked("make_shards", made, _num_contents(tables)) / seconds


def _checked(who: str, made: int, total: int) -> int:
    """The number of videos that a side made, if it is nearly all."""
    if made < LEAST_MADE * total:
        raise SystemExit(f"{who} made {made} of {total} videos")
    return made


def _bare(tables: Path, cores: list[int]) -> float:
    """One process a core, each with its share of the files."""
    files = (tables / "sizes.txt").read_text().splitlines()
    started = time.perf_counter()
    with ThreadPoolExecutor(len(cores)) as pool:
        shares = [files[place :: len(cores)] for place in range(len(cores))]
        jobs = zip(shares, cores, strict=True)
        counts = list(
            pool.map(lambda job: _run([sys.executable, "-c", BARE], [job[1]], job[0]), jobs)
        )
    seconds = time.perf_counter() - started
    return _checked("the bare loop", sum(map(int, counts)), len(files)) / seconds


BARE = f"""
import sys
import decord
decord.logging.set_level(decord.logging.QUIET)
made = 0
for line in sys.stdin.read().split("\\n"):
    path, width, height = line.split("\\t")
    try:
        video = decord.VideoReader(
            path, ctx=decord.cpu(0), num_threads=1, width=int(width), height=int(height)
        )
        count = min({NUM_FRAMES}, len(video))
        video.get_batch([(2 * i + 1) * len(video) // (2 * count) for i in range(count)]).asnumpy()
        made += 1
    except Exception:
        pass
print(made)
"""


def _video2dataset(python: Path, tables: Path, cores: list[int], *, resized: bool) -> float:
    """Videos a second of video2dataset, a process a core."""
    urls = tables / "urls.csv"
    files = [str(path) for path in sorted((tables / "media").iterdir()) if path.suffix != ".png"]
    urls.write_text("\n".join(["url", *files]))
    out = tables.parent / "video2dataset"
    shutil.rmtree(out, ignore_errors=True)
    launcher = tables / "launch_video2dataset.py"
    launcher.write_text(VIDEO2DATASET)
    # Four shards a core: so that the last one keeps no core waiting for long.
    per_shard = max(1, -(-len(files) // (4 * len(cores))))
    frame_rate = NUM_FRAMES / float((tables / "median_s.txt").read_text())
    command = [python, launcher, urls, out, len(cores), per_shard, frame_rate]
    started = time.perf_counter()
    _run([*command, SIZE if resized else 0], cores, path=PEER / "bin")
    seconds = time.perf_counter() - started
    stats = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
    made = sum(found["successes"] for found in stats)
    return _checked("video2dataset", made, len(files)) / seconds


VIDEO2DATASET = """
import sys
from video2dataset import video2dataset
from video2dataset.subsamplers import FrameSubsampler, ResolutionSubsampler

# At the top, for the processes that it spawns run this file as well. The worker asks subsamplers for
# `encode_formats`, which they lack, and FrameSubsampler changes the keys of a dict that is being iterated.
FrameSubsampler.encode_formats = ResolutionSubsampler.encode_formats = {"video": "mp4"}
take_frames = FrameSubsampler.__call__
FrameSubsampler.__call__ = lambda self, streams, metadata=None: take_frames(
    self, dict(streams), metadata
)

if __name__ == "__main__":
    urls, out, num_cores, per_shard, frame_rate, height = sys.argv[1:]
    subsampling = {"FrameSubsampler": {"args": {"frame_rate": float(frame_rate)}}}
    if int(height):
        size = {"height": int(height), "resize_mode": ["scale"]}
        subsampling["ResolutionSubsampler"] = {"args": size}
    video2dataset(
        urls,
        output_folder=out,
        output_format="webdataset",
        input_format="csv",
        config={
            "subsampling": subsampling,
            "reading": {"yt_args": {}, "timeout": 60, "sampler": None},
            "storage": {
                "number_sample_per_shard": int(per_shard),
                "oom_shard_count": 5,
                "captions_are_subtitles": False,
            },
            "distribution": {
                "processes_count": int(num_cores),
                "thread_count": 8,
                "subjob_size": 1000,
                "distributor": "multiprocessing",
            },
        },
    )
"""


def _install_video2dataset() -> Path:
    """The Python of an environment that has it and an ffmpeg; made at the first call."""
    python, made = PEER / "bin" / "python", PEER / "requirements.txt"
    if made.exists() and made.read_text() == PEER_REQUIREMENTS:
        return python
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("video2dataset requires torch 2.1.2: run this with Python 3.11")
    print(f"making {PEER}", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", PEER])
    _run([python, "-m", "pip", "install", "--quiet", *PEER_REQUIREMENTS.split()])
    find = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"
    (PEER / "bin" / "ffmpeg").symlink_to(_run([python, "-c", find]).strip())
    made.write_text(PEER_REQUIREMENTS)
    return python


def _num_contents(tables: Path) -> int:
    return sum(path.suffix != ".png" for path in (tables / "media").iterdir())


def _run(
    command: list[Any],
    cores: list[int] | None = None,
    lines: list[str] | None = None,
    path: Path | None = None,
) -> str:
    """What a command prints, run on some cores with lines as its input and a folder ahead in PATH."""
    text = [str(part) for part in command]
    if cores is not None:
        text = ["taskset", "-c", ",".join(map(str, cores)), *text]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if path is not None:
        settings["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        text,
        input="\n".join(lines) if lines else None,
        capture_output=True,
        text=True,
        env=os.environ | settings,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(text[:6])} ...: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main(tyro.cli(PrepareVideosConfig))
