"""train/contrastive.py as torchrun starts it in tests, with what no flag can ask for.

FSDP_ON_CPU=1: Accelerate leaves FSDP out where there is no GPU, though torch can do it over gloo; its
state is told otherwise here. STOP_RANK=1: that rank alone gets SIGTERM during its third batch.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import load_program

program = load_program("train/contrastive.py")


def shard_on_cpu() -> None:
    plain = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if "fsdp_plugin" not in kwargs:
            return  # Only a look at the state that is there.
        self.fsdp_plugin = kwargs["fsdp_plugin"]
        self.distributed_type = DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


calls = 0
plain_loss = program.contrastive_loss


def loss_and_signal(*args: Any, **kwargs: Any) -> dict[str, Any]:
    global calls
    calls += 1
    if os.environ.get("STOP_RANK") == os.environ["RANK"] and calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain_loss(*args, **kwargs)


if "FSDP_ON_CPU" in os.environ:
    shard_on_cpu()
program.contrastive_loss = loss_and_signal
program.run_program(lambda: program.main(program.parse(sys.argv[1:])))
