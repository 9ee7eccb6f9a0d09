"""samples.jsonl: what a run was trained on, one global batch a line, in the order of consumption.

    {"epoch": 0, "batch": 3, "contents": ["c07", "c31", ...]}

Rows stand in rank order. After a kill and a resume the file is that of a run which was never stopped.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec.training.run import read_json_lines

FILE_NAME = "samples.jsonl"


class SampleLog:
    """Appends to a run's samples.jsonl; only the main process holds one."""

    def __init__(self, run: Path, *, epoch: int, batch: int) -> None:
        """Open the file for a run whose next global batch is `batch` of `epoch`; (0, 0) starts afresh.

        Lines from there on are dropped, since those batches will come again.
        """
        self._path = run / FILE_NAME
        kept = [row for row in read_samples(run) if (row["epoch"], row["batch"]) < (epoch, batch)]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def log(self, *, epoch: int, batch: int, contents: Sequence[str]) -> None:
        """Append one global batch."""
        row = {"epoch": epoch, "batch": batch, "contents": list(contents)}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's samples.jsonl."""
    return read_json_lines(run / FILE_NAME)
