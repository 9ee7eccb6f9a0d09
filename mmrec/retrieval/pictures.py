"""Pictures of products that were upserted with one: small files beside a generation's changes.

    generations/000002/pictures/3f/3f8a...e1.jpg    by a hash of the id; empty where a product has none

The shards that an index was built from do not know such products, or know them with another picture. A
picture is no part of what is searched: losing one loses nothing else.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mmrec.retrieval.generations import PICTURES, full_disk_refused, replace_file


def keep_pictures(generation: Path, ids: Sequence[str], pictures: Sequence[bytes]) -> None:
    """Write a JPEG for each id, on the disk when this returns; b"" says that a product has none."""
    with full_disk_refused(generation.parent.parent):
        for id_, picture in zip(ids, pictures, strict=True):
            path = _path(generation, id_)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, picture)


def kept_picture(generation: Path, id_: str) -> bytes | None:
    """What was kept for an id; None where nothing was."""
    try:
        return _path(generation, id_).read_bytes()
    except FileNotFoundError:
        return None


def forget_pictures(generation: Path, ids: Sequence[str]) -> None:
    """Remove what was kept for some ids."""
    if (generation / PICTURES).is_dir():
        for id_ in ids:
            _path(generation, id_).unlink(missing_ok=True)


def carry_pictures(old: Path, new: Path) -> None:
    """Keep the pictures of one generation in the next; files are shared, since none is ever written to."""
    if (old / PICTURES).is_dir():
        shutil.copytree(old / PICTURES, new / PICTURES, copy_function=_link)


def _link(source: str, target: str) -> None:
    with suppress(OSError):  # a file system without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _path(generation: Path, id_: str) -> Path:
    # Ids may be longer than names of files, and hold what those may not.
    name = sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()
    return generation / PICTURES / name[:2] / f"{name}.jpg"
