"""Generations: the folders of an index on disk, which of them is live, and who may change or remove one.

    manifest.json                          kind "index"; a copy of the live generation's
    CURRENT                                000002
    writer.lock                            locked by the one process that changes the index
    generations/000002/manifest.json       what the index was built from
    generations/000002/generation.json     the record below; readers hold a shared lock on it
    generations/000002/seal.json           hashes of these two
    generations/000002/base.faiss          the FAISS index, always a CPU one
    generations/000002/products.arrow      product_id and attributes, in the base's row order
    generations/000002/keys.npy            hashes of the ids in order, and their rows
    generations/000002/vectors.npy         optional: float16 vectors at full width
    generations/000002/changes/00000001.change   what was changed since: see changes.py
    generations/000002/changes/acknowledged      the number of the last of them
    generations/000002/pictures/                 optional: of products that were upserted: see pictures.py

Of a generation only `changes/` and `pictures/` grow. A new one is written under a temporary name, brought
to the disk, renamed, and then named by CURRENT, which is itself replaced by a rename. So whoever opens an
index finds the old generation or the new one. Locks are flock's: they vanish with the process that held them.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from mmrec.bars import progress_bar
from mmrec.errors import UserError
from mmrec.manifest import (
    FILE_NAME,
    Manifest,
    check_output,
    fingerprint_of,
    hash_file,
    new_folder,
    read_manifest,
    write_manifest,
)

BASE, PRODUCTS, KEYS, VECTORS = "base.faiss", "products.arrow", "keys.npy", "vectors.npy"
RECORD, CHANGES, CURRENT, WRITER_LOCK = "generation.json", "changes", "CURRENT", "writer.lock"
PICTURES = "pictures"
_SEAL = "seal.json"
_FOLDER, _TEMPORARY, _REMOVED = "generations", ".tmp-", ".removed-"
# Readers on other machines hold no lock that is seen here; what they most likely read is the last one.
KEPT_GENERATIONS = 2
# Read of each file at every opening: 4 MiB take some 2 ms, and tell files of two indexes apart.
_BLOCK, _BLOCKS = 65_536, 64
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generation.json` holds."""

    factory: str
    width: int
    """D, the width of vectors and queries."""
    indexed_width: int
    """Leading components that the base holds; less than `width` for an index at a narrower width."""
    count: int
    key: str
    """The column of ids: product_id, or content_id in an index of contents."""
    rerank: bool
    """Whether matches are scored again at full width unless a search says otherwise."""
    quantization_error: float
    """Mean squared distance of a vector from what the base keeps of it; 0 when it keeps all."""
    imbalance: float
    """FAISS's imbalance factor of the inverted lists: 1 when all are equally long."""
    files: dict[str, dict[str, Any]]
    """For each file its size in `bytes`, its `sha256`, and in `blocks` that of some blocks of it."""
    metric: str = "inner_product"
    upserted_error: float | None = None
    """The quantization error of what was upserted since the build and folded in; None where nothing was."""
    upserted_vectors: int = 0
    """How many vectors that is a mean of."""
    search: dict[str, float] = field(default_factory=dict)
    """Search parameters that tuning chose; the FAISS file has them, too. Empty where nothing was tuned."""

    @property
    def fingerprint(self) -> str:
        """Names what its changes belong to."""
        return str(self.files[BASE]["sha256"])[:16]


def live_generation(folder: Path) -> Path:
    """The generation that CURRENT names. Raises `UserError` where there is none."""
    path = folder / CURRENT
    if not path.is_file():
        raise UserError(f"{path}: no such file; it names the index's live generation")
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    generation = folder / _FOLDER / name
    if not re.fullmatch(r"\d{6}", name) or not generation.is_dir():
        raise UserError(f"{path}: names generation '{name[:40]}', which is not in {folder.name}")
    return generation


def hold_live_generation(folder: Path) -> tuple[Path, IO[bytes]]:
    """The live generation and a lock on it: it is not removed while the returned file is open."""
    while True:
        generation = live_generation(folder)
        try:
            held = (generation / RECORD).open("rb")
        except FileNotFoundError:
            if live_generation(folder) == generation:
                raise UserError(f"{generation / RECORD}: no such file") from None
            continue
        fcntl.flock(held, fcntl.LOCK_SH)
        if os.fstat(held.fileno()).st_nlink and generation.is_dir():
            return generation, held
        held.close()  # Removed between the two; CURRENT names another by now.


def lock_writer(folder: Path) -> IO[str]:
    """Become the one writer of an index, until the returned file is closed.

    Clears away what a writer that was killed left half done. Raises `UserError` while another process,
    or another object of this one, is the writer.
    """
    lock = (folder / WRITER_LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        who = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(
            f"{folder}: is being changed by another writer (process {who}); "
            "try again when that one is closed"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    if has_live_generation(folder):
        _clear_leftovers(folder)
    return lock


def read_record(generation: Path, *, verify: bool) -> Generation:
    """Read `generation.json` and hold the files beside it against it.

    Sizes and some blocks of each file are always compared; on `verify` all bytes, and the manifests.
    Raises `UserError` naming the file that is wrong.
    """
    path = generation / RECORD
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        record = Generation(**json.loads(path.read_text(encoding="utf-8")))
        sizes = {name: int(file["bytes"]) for name, file in record.files.items()}
        hashes = {name: str(file["sha256"]) for name, file in record.files.items()}
        missing = {BASE, PRODUCTS, KEYS} - set(sizes)
        if missing:
            raise KeyError(*sorted(missing))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not a record that this version reads ({error!r}); build the index anew with "
            "`mmrec index build --overwrite`"
        ) from None
    _check_seal(generation, verify=verify)
    for name, size in progress_bar(sizes.items(), desc="verify", unit="file", shown=verify):
        file = generation / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            raise UserError(f"{file}: no such file")
        if found != size:
            raise UserError(f"{file}: is {found} bytes long, and was saved with {size}")
        blocks = record.files[name].get("blocks")  # Earlier versions wrote none.
        same = blocks is None or _hash_blocks(file) == blocks
        if not same or (verify and hash_file(file) != hashes[name]):
            raise UserError(f"{file}: is not the file that was saved: its SHA-256 differs")
    return record


def _check_seal(generation: Path, *, verify: bool) -> None:
    """Hold record and manifest against their hashes, and on `verify` the folder's manifest, too."""
    seal = generation / _SEAL
    if seal.is_file():
        try:
            hashes = dict(json.loads(seal.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{seal}: cannot be read ({error})") from None
        for name in (RECORD, FILE_NAME):
            file = generation / name
            if file.is_file() and hash_file(file) != hashes.get(name):
                raise UserError(f"{file}: is not the file that was saved: its SHA-256 differs")
    if not verify:
        return
    if not seal.is_file():
        raise UserError(f"{seal}: no such file; `mmrec index build` anew writes it")
    # A writer killed between CURRENT and this copy leaves that of the generation before.
    folder = generation.parent.parent
    manifests = [path.read_bytes() for path in generation.parent.glob(f"*/{FILE_NAME}")]
    if (folder / FILE_NAME).read_bytes() not in manifests:
        raise UserError(f"{folder / FILE_NAME}: is not that of a generation of this index")


def describe_files(generation: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a generation that is being written."""
    return {
        name: {
            "bytes": (generation / name).stat().st_size,
            "sha256": hash_file(generation / name),
            "blocks": _hash_blocks(generation / name),
        }
        for name in (BASE, PRODUCTS, KEYS, VECTORS)
        if (generation / name).is_file()
    }


def _hash_blocks(path: Path) -> str:
    """The SHA-256 of blocks spread over a file, its first and last among them; of a small file all."""
    size = path.stat().st_size
    starts = [max(0, size - _BLOCK) * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
    if size <= _BLOCK * _BLOCKS:
        starts = list(range(0, size, _BLOCK))
    digest = sha256()
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def manifest_of(record: Generation, **facts: Any) -> Manifest:
    """The manifest of an index; `facts` are its parents, config, counts and further details."""
    details = {"factory": record.factory, "width": record.width}
    if record.key != "product_id":
        details["key"] = record.key
    return Manifest(
        kind="index",
        fingerprint=fingerprint_of({name: file["sha256"] for name, file in record.files.items()}),
        **facts | {"details": details | facts.get("details", {})},
    )


def finish_generation(generation: Path, record: Generation, manifest: Manifest) -> None:
    """Write what is beside a generation's data, and bring all of it to the disk."""
    text = json.dumps(asdict(record), indent=2)
    (generation / RECORD).write_text(text + "\n", encoding="utf-8")
    write_manifest(generation, manifest)
    hashes = {name: hash_file(generation / name) for name in (RECORD, FILE_NAME)}
    (generation / _SEAL).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    (generation / CHANGES).mkdir()
    for path in generation.iterdir():
        sync(path)
    sync(generation)


@contextmanager
def published_generation(out: Path, *, overwrite: bool, is_writer: bool = False) -> Iterator[Path]:
    """A generation to be filled, of a new index at `out`, or the next of the one that is there.

    `is_writer` says that the caller holds the lock of the index at `out`. Raises `UserError` when `out` is
    there and is not to be overwritten, and when another writer holds it.
    """
    check_output(out, kind="index", overwrite=overwrite)
    with ExitStack() as stack:
        if (out / FILE_NAME).is_file() and not is_writer:
            stack.enter_context(lock_writer(out))
        replaces = has_live_generation(out)
        new = None if replaces else new_folder(out, kind="index", overwrite=overwrite)
        home = stack.enter_context(new) if new else out
        yield stack.enter_context(next_generation(home))


def has_live_generation(folder: Path) -> bool:
    """Whether an index is there that readers may have open; a damaged one is replaced as a folder."""
    try:
        return live_generation(folder).is_dir()
    except UserError:
        return False


@contextmanager
def next_generation(folder: Path) -> Iterator[Path]:
    """A new generation: filled by the block under a temporary name, live when the block ends well.

    The caller is the writer. Old generations that no reader holds are removed afterwards.
    """
    home = folder / _FOLDER
    home.mkdir(parents=True, exist_ok=True)
    name = f"{max([0, *map(int, _numbers(home))]) + 1:06d}"
    temporary = home / f"{_TEMPORARY}{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with full_disk_refused(folder):
            yield temporary
        temporary.rename(home / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(home)
    replace_file(folder / CURRENT, f"{name}\n".encode())
    _copy_manifest(folder)
    _remove_old(folder)


@contextmanager
def full_disk_refused(folder: Path) -> Iterator[None]:
    """Where the disk is full, the reader can mend that, whoever wrote: FAISS has an error of its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reasons = [os.strerror(number) for number in _FULL]
        reason = next((reason for reason in reasons if reason in str(error)), None)
        if reason is None:
            raise
        raise UserError(
            f"{folder}: cannot be written ({reason}); it is as it was: make room, and try again"
        ) from None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it holds the old bytes or the new ones, on the disk when this returns."""
    temporary = path.parent / f"{_TEMPORARY}{path.name}"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_manifest(folder: Path) -> None:
    """Lineage reads the manifest of the folder; the generation's own is the one that counts."""
    manifest = live_generation(folder) / FILE_NAME
    replace_file(folder / FILE_NAME, manifest.read_bytes())


def _numbers(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if re.fullmatch(r"\d{6}", path.name))


def _clear_leftovers(folder: Path) -> None:
    """Remove what never became live, and what was on its way out."""
    live = live_generation(folder)
    for path in (folder / _FOLDER).iterdir():
        unpublished = re.fullmatch(r"\d{6}", path.name) and path.name > live.name
        if unpublished or path.name.startswith((_TEMPORARY, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
    if (live / CHANGES).is_dir():
        for path in (live / CHANGES).glob(f"{_TEMPORARY}*"):
            path.unlink()
    with suppress(UserError):
        if read_manifest(live) != read_manifest(folder):
            _copy_manifest(folder)


def _remove_old(folder: Path) -> None:
    """Remove all but the last generations, unless a reader on this machine holds one."""
    home = folder / _FOLDER
    for name in _numbers(home)[:-KEPT_GENERATIONS]:
        try:
            held = (home / name / RECORD).open("r+b")
        except OSError:
            continue
        with held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            # Gone in one step: nobody is to find half a generation.
            removed = home / f"{_REMOVED}{name}"
            (home / name).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
