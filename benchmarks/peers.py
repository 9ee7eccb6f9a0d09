"""What peers of a benchmark need and cannot share with this package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def install_webdataset() -> Path:
    """Put the webdataset that open_clip's requirements-training.txt names under .peers/, and say where."""
    home = ROOT / ".peers" / "webdataset-0.2.86"
    if not home.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(home), "webdataset==0.2.86"], check=True)
    return home
