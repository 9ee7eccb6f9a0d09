"""train/contrastive.py as torchrun starts it in tests: rank STOP_RANK alone gets SIGTERM in batch three."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import load_program

program = load_program("train/contrastive.py")
calls = 0
plain_loss = program.contrastive_loss


def loss_and_signal(*args: Any, **kwargs: Any) -> dict[str, Any]:
    global calls
    calls += 1
    if os.environ["STOP_RANK"] == os.environ["RANK"] and calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain_loss(*args, **kwargs)


program.contrastive_loss = loss_and_signal
program.run_program(lambda: program.main(program.parse(sys.argv[1:])))
