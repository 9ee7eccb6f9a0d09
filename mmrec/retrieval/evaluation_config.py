"""What an evaluation can be told: read by `mmrec evaluate`, and importable without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """An encoder, what it is measured on, and what beside it."""

    encoder: Path
    """An encoder's folder, or hf://user/name[@revision]."""
    shards: Path
    """The shards it was trained on, for their val or test split."""
    out: Path
    """The folder that gets metrics.json, queries.parquet and report.html."""
    split: Literal["train", "val", "test"] = "test"
    """Which contents to ask with."""
    index: Path | None = None
    """An index of the catalogue: also ask it, and measure what it misses of an exact search."""
    slice_by: tuple[str, ...] = ()
    """Further columns of products (or of contents) to slice by; category is where there is one."""
    max_values: int = 20
    """Slices of one column: its most frequent values, the rest is "other"."""
    untrained: bool = True
    """Measure the same encoder before training, too."""
    baselines: bool = True
    """Measure popularity, title overlap and colour histogram, too."""
    num_cards: int = 12
    """Queries shown from all over the split; half as many of the best, and of the worst."""
    picture: Path | None = None
    """Also draw a PNG of some matches."""
    other_shards: bool = False
    """Accept shards that the encoder was not trained on."""
    device: str = "auto"
    """auto, cpu or cuda."""
    batch_size: int = 64
    """Items encoded at a time."""
    num_workers: int = 0
    """Processes that read and decode; 0 does it in this one."""

    def __post_init__(self) -> None:
        """Raise `UserError` for what cannot be."""
        least = {"num_cards": 1, "batch_size": 1, "max_values": 1, "num_workers": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} {getattr(self, name)}: expected a number of at least {smallest}"
                )
