"""Embeds on several ranks, forks of one process that imports torch once: whole, killed, resumed, refused.

python tests/embed_on_ranks.py ENCODER SHARDS FOLDER prints what became of each run as one JSON object.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmrec.cli import run_program
from mmrec.retrieval import embed
from mmrec.retrieval.embed import EmbedSummary, embed_shards


def start(ranks: int, program: Callable[[], Any]) -> list[int]:
    """Fork a process for each rank, with the environment that torchrun gives; returns their pids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        status = 1
        try:
            run_program(program)
            status = 0
        finally:
            os._exit(status)
    return pids


def wait(pids: list[int]) -> list[int]:
    """The exit status of each; minus the signal for one that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def inodes(folder: Path) -> dict[str, int]:
    """Which files are there: a file that is written again has another number."""
    return {path.name: path.stat().st_ino for path in folder.glob("*.npy")}


def main(encoder: Path, shards: Path, folder: Path) -> dict[str, Any]:
    """All runs, one after the other."""
    torch.set_num_threads(1)
    write_part = embed.write_part

    def program(name: str, *, slow_s: float = 0.0) -> Callable[[], None]:
        def slowly(*part: Any) -> Any:
            time.sleep(slow_s)
            return write_part(*part)

        def run() -> None:
            embed.write_part = slowly
            summary: EmbedSummary = embed_shards(
                encoder, shards, folder / name, split="train", batch_size=2, device="cpu"
            )
            if summary.first:
                (folder / f"{name}.txt").write_text(summary.line())

        return run

    found: dict[str, Any] = {"two": wait(start(2, program("two")))}
    pids = start(2, program("killed", slow_s=0.3))
    unfinished = folder / ".killed.unfinished"
    end = time.monotonic() + 60
    while len(list(unfinished.glob("whole/*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    found["killed"] = wait(pids)
    whole = sorted(path.stem for path in unfinished.glob("whole/*.json"))
    before = inodes(unfinished / "embeddings/img_emb")
    # What a kill leaves of a file that it broke off.
    (unfinished / "embeddings/img_emb/.img_emb_000005.npy.tmp-1").write_bytes(b"half")
    found["resumed"] = wait(start(3, program("killed")))
    after = inodes(folder / "killed/img_emb")
    found["whole"] = whole
    found["kept"] = [n for n in whole if after[f"img_emb_{n}.npy"] == before[f"img_emb_{n}.npy"]]
    found["left"] = [path.name for path in folder.iterdir() if "unfinished" in path.name]
    found["refused"] = wait(start(2, program("two")))
    return found


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
