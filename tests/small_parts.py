"""make_shards with two samples a part, so that a small catalogue has many: for tests that kill it."""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_prep"))
import make_shards

if __name__ == "__main__":
    make_shards.SAMPLES_PER_PART = 2
    make_shards.main(tyro.cli(make_shards.MakeShardsConfig))
