"""samples.jsonl: what a run was trained on, one global batch a line, in the order of consumption.

    {"epoch": 0, "batch": 3, "contents": ["c07", "c31", ...]}

Rows stand in rank order. After a kill and a resume the file is that of a run which was never stopped.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec.manifest import write_whole
from mmrec.training.run import RunFolder, read_json_lines

FILE_NAME = "samples.jsonl"


class SampleLog:
    """Appends to a run's samples.jsonl; only the main process holds one."""

    def __init__(self, run: RunFolder, *, epoch: int, batch: int) -> None:
        """Open the file for a run whose next global batch is `batch` of `epoch`; (0, 0) starts afresh.

        Lines from there on are dropped, since those batches will come again.
        """
        self._run, self._path = run, run.path / FILE_NAME
        rows = read_samples(run.path)
        kept = [row for row in rows if (row["epoch"], row["batch"]) < (epoch, batch)]
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, *, epoch: int, batch: int, contents: Sequence[str]) -> None:
        """Append one global batch; a full disk costs its line and a warning, as with metrics.jsonl."""
        row = {"epoch": epoch, "batch": batch, "contents": list(contents)}
        self._run.append(self._path, row)


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's samples.jsonl."""
    return read_json_lines(run / FILE_NAME)
