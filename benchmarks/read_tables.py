"""How long read_tables takes, and how much memory: 1,000,000 rows in under 20 s and 2 GB on one core.

    python benchmarks/read_tables.py           # about 4 minutes: 1,000,000 and 1,700,000 rows in every format
    python benchmarks/read_tables.py --quick   # 100,000 rows in under a minute; a tenth of the seconds

Tables are generated (600,000 contents, 100,000 products, 300,000 links; then 1,000,000 links) and read
in a process of their own that is held to one core; its peak of resident memory counts Python and all
libraries. The last line is one JSON object; a ratio is the limit over what was measured.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

SECONDS_PER_MILLION = 20.0
GIGABYTES = 2.0
WORDS = ("red", "blue", "mug", "lamp", "shoe", "bag", "new", "soft", "large", "best", "find")
FORMATS = ("parquet", "csv", "csv with JSON lists", "jsonl")


@dataclass(frozen=True, kw_only=True)
class ReadTablesConfig:
    """What is measured."""

    quick: bool = False
    """A tenth of the rows, and fewer links."""
    folder: Path | None = None
    """Where to write the tables; a temporary folder by default (500 MB at a time)."""


def main(config: ReadTablesConfig) -> None:
    """Measure every format, and print one JSON object on the last line."""
    million = 100_000 if config.quick else 1_000_000
    links = [million * 3 // 10] if config.quick else [million * 3 // 10, million]
    results = []
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        for num_links in links:
            for form in FORMATS:
                # Both in processes of their own: what runs them would count as theirs.
                sizes = {"contents": million * 6 // 10, "products": million // 10}
                _run(_GENERATE, temporary, form, json.dumps(sizes | {"links": num_links}))
                measured = json.loads(_run(_READ, temporary))
                results += _judge(form, measured)
    machine = (
        f"{platform.machine()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(json.dumps({"benchmark": "read_tables", "machine": machine, "results": results}))


def _judge(form: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    rows, seconds, gigabytes = (measured[name] for name in ("rows", "seconds", "gigabytes"))
    print(f"{form:<20} {rows:>10,} rows  {seconds:6.2f} s  {gigabytes:.2f} GB", flush=True)
    limit_s = SECONDS_PER_MILLION * max(rows, 100_000) / 1_000_000
    return [
        _result(f"{rows:,} rows of {form}: seconds", f"{limit_s:g} s", limit_s / seconds),
        _result(f"{rows:,} rows of {form}: memory", f"{GIGABYTES:g} GB", GIGABYTES / gigabytes),
    ]


def _result(what: str, limit: str, ratio: float) -> dict[str, Any]:
    return {"what": what, "peer": limit, "ratio": round(ratio, 2), "bar": 1.0, "holds": ratio >= 1}


_GENERATE, _READ = "--generate", "--read"


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


# What the processes do


def generate(folder: Path, form: str, sizes: dict[str, int]) -> None:
    """Write three tables of made-up rows, in place of those that are there."""
    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(0)
    words = np.array(WORDS)

    def ids(kind: str, count: int) -> np.ndarray:
        return np.char.add(f"{kind}-", np.char.zfill(np.arange(count).astype(str), 9))

    def titles(count: int) -> pa.Array:
        picked = words[rng.integers(0, len(words), (count, 6))]
        return pa.array([" ".join(row) for row in picked.tolist()])

    products, contents = ids("product", sizes["products"]), ids("content", sizes["contents"])
    # Two columns of random numbers name a link; of links that are drawn twice one is kept.
    pairs = np.unique(
        rng.integers(0, [len(contents), len(products)], (2 * sizes["links"], 2)), axis=0
    )
    pairs = rng.permutation(pairs)[: sizes["links"]]
    tables = {
        "products": pa.table(
            {
                "product_id": products,
                "title": titles(len(products)),
                "images": pa.array([[f"images/{p}-{i}.jpg" for i in range(3)] for p in products]),
                "category": rng.choice(words, len(products)),
                "price": rng.random(len(products)),
            }
        ),
        "contents": pa.table(
            {
                "content_id": contents,
                "title": titles(len(contents)),
                # One in ten is a photo post.
                "video": pa.array(
                    [None if i % 10 == 0 else f"videos/{c}.mp4" for i, c in enumerate(contents)]
                ),
                "images": pa.array(
                    [[f"images/{c}.jpg"] if i % 10 == 0 else [] for i, c in enumerate(contents)]
                ),
                "likes": rng.integers(0, 10_000, len(contents)),
            }
        ),
        "links": pa.table(
            {
                "content_id": contents[pairs[:, 0]],
                "product_id": products[pairs[:, 1]],
                "weight": rng.random(len(pairs)) + 0.1,
                "split": np.array(["train", "val", "test"])[pairs[:, 0] % 3],
            }
        ),
    }
    for name, table in tables.items():
        for suffix in ("parquet", "csv", "jsonl"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        write(folder, name, table, form)


def write(folder: Path, name: str, table: Any, form: str) -> None:
    """Write one table in a format of `FORMATS`."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    if form == "parquet":
        pq.write_table(table, folder / f"{name}.parquet")
    elif form == "jsonl":
        with open(folder / f"{name}.jsonl", "w") as file:
            for row in table.to_pylist():
                file.write(json.dumps(row) + "\n")
    else:
        if "images" in table.column_names:
            as_text = json.dumps if form == "csv with JSON lists" else "|".join
            cells = pa.array([as_text(cell) for cell in table["images"].to_pylist()])
            table = table.set_column(table.column_names.index("images"), "images", cells)
        pyarrow.csv.write_csv(table, folder / f"{name}.csv")


def read(folder: Path) -> None:
    """Read and validate the tables on one core; prints seconds and the peak of memory as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from mmrec.data.tables import read_tables

    started = time.perf_counter()
    tables = read_tables(folder)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    rows = len(tables.products) + len(tables.contents) + len(tables.links)
    print(json.dumps({"rows": rows, "seconds": seconds, "gigabytes": peak / 1e9}))


if __name__ == "__main__":
    if sys.argv[1:2] == [_GENERATE]:
        generate(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
    elif sys.argv[1:2] == [_READ]:
        read(Path(sys.argv[2]))
    else:
        main(tyro.cli(ReadTablesConfig))
