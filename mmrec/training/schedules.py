"""Learning rates as pure functions of the step, so that a resume has no schedule to restore."""

import math


def warmup_cosine(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """The factor on the peak learning rate at a step in 0..total-1.

    Rises in a line over `warmup` steps, then falls along half a cosine to `final` times the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
