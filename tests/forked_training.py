"""Training runs of several ranks as forks of one process that has imported everything.

A run by `accelerate launch` or torchrun spends most of a short test on importing torch. Here a server
imports once and forks for each rank, with the environment that torchrun would give it; a rank can be
killed like any process. Run by path, this file is that server: a job a line on stdin, a pid a line back.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResidualAttentionBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@dataclass(frozen=True)
class Run:
    """The ranks of a run that was started."""

    pids: list[int]
    log: Path

    def kill(self) -> bool:
        """SIGKILL to every rank, as losing the machine would; False where one was over sooner."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return all(status is None for status in self.wait())

    def alive(self) -> bool:
        """Whether any rank is still there."""
        return any(_alive(pid) for pid in self.pids)

    def wait(self) -> list[int | None]:
        """Wait for all ranks; the exit status of each, None for one that was killed."""
        end = time.monotonic() + TIMEOUT_S
        while self.alive():
            assert time.monotonic() < end, f"no end after {TIMEOUT_S} s: {self.text()}"
            time.sleep(0.01)
        return [self._status(rank) for rank in range(len(self.pids))]

    def text(self) -> str:
        """What the ranks have written."""
        logs = [_part(self.log, rank) for rank in range(len(self.pids))]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.exists())

    def _status(self, rank: int) -> int | None:
        path = _part(self.log, rank).with_suffix(".status")
        return int(path.read_text()) if path.exists() else None


class TrainingServer:
    """Starts runs; a context."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=TIMEOUT_S)

    def start(
        self,
        arguments: Sequence[str | Path],
        *,
        log: Path,
        ranks: int = 1,
        fail_at: int | None = None,
        sharded: bool = False,
    ) -> Run:
        """Start train/contrastive.py with these arguments; batch `fail_at` raises in every rank.

        With `sharded` the ranks, or one alone, train with FSDP2.
        """
        port = _free_port()
        pids = []
        for rank in range(ranks):
            environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            if sharded:
                environment |= FSDP
            if ranks > 1 or sharded:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            pids.append(
                self._ask(
                    {
                        "arguments": [str(part) for part in arguments],
                        "environment": environment,
                        "log": str(_part(log, rank)),
                        "fail_at": fail_at,
                        "sharded": sharded,
                    }
                )
            )
        return Run(pids, log)

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _part(log: Path, rank: int) -> Path:
    return log.with_name(f"{log.name}.{rank}.log")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve() -> None:
    """Import what training imports, then fork for each job."""
    from conftest import load_program

    program = load_program("train/contrastive.py")
    # The children that end are nobody's to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run_job(program, job)
        print(pid, flush=True)


def _run_job(program: Any, job: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = Path(job["log"])
    log.with_suffix(".status").unlink(missing_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= job["environment"]
    status = 1
    try:
        if job["sharded"]:
            _shard_on_cpu()
        if job["fail_at"] is not None:
            _raise_at(program, job["fail_at"])
        program.main(program.parse(job["arguments"]))
        status = 0
    except BaseException:  # the fork must not go on as a second server
        traceback.print_exc()
    log.with_suffix(".status").write_text(str(status))
    sys.stderr.flush()
    os._exit(status)


def _shard_on_cpu() -> None:
    """Accelerate leaves FSDP out where there is no GPU, though torch can do it over gloo: say otherwise."""
    import accelerate.state
    from accelerate.utils import DistributedType

    plain = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        if "fsdp_plugin" not in options:
            return  # Only a look at the state that is there.
        self.fsdp_plugin = options["fsdp_plugin"]
        self.distributed_type = DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


def _raise_at(program: Any, number: int) -> None:
    """Let the loss of one batch fail."""
    whole = program.contrastive_loss
    calls = 0

    def fails(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise RuntimeError(f"batch {number} fails on purpose")
        return whole(*arguments, **options)

    program.contrastive_loss = fails


if __name__ == "__main__":
    _serve()
