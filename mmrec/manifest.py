"""Lineage: the `manifest.json` in every folder of the flow, and how such a folder comes to be.

A folder is built under a temporary name and renamed when it is whole. Its fingerprint is a hash of
content alone, so that equal work gives equal fingerprints wherever and whenever it is done.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mmrec
from mmrec.data.storage import (
    Place,
    check_writable,
    is_file,
    joined,
    list_files,
    local_copy,
    place,
    read_bytes,
    replace_folder,
    write_bytes_whole,
)
from mmrec.errors import UserError

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A folder that another one was made from."""

    kind: str
    """What the parent is: tables, shards, run, encoder, embeddings or index."""
    fingerprint: str
    """The parent's fingerprint when the child was made: this decides whether two folders belong together."""
    path: str
    """Where the parent lay, relative to the child, or its URL: a hint for finding it, never a proof."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds."""

    kind: str
    config: dict[str, Any]
    """Every setting that the folder was made with."""
    counts: dict[str, Any]
    """Numbers of what came in, went out, and was dropped: `{"in": 9, "out": 8, "dropped": {"reason": 1}}`."""
    fingerprint: str
    parents: list[Parent] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Facts that only this kind of folder has."""
    schema_version: int = SCHEMA_VERSION
    mmrec_version: str = mmrec.__version__

    def parent(self, kind: str) -> Parent | None:
        """The first parent of that kind, if there is one."""
        return next((parent for parent in self.parents if parent.kind == kind), None)

    @property
    def encoder(self) -> str | None:
        """The fingerprint of the encoder that made what the folder holds, where that is known."""
        made_by = self.parent("encoder")
        return made_by.fingerprint if made_by else None


def write_manifest(folder: Place, manifest: Manifest) -> None:
    """Write the manifest into a folder; the last thing done before the folder is published."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_whole(folder / FILE_NAME, text + "\n")


def write_whole(path: Place, text: str) -> None:
    """Write a text file so that a reader finds the old one or the new one, never half of either."""
    write_bytes_whole(path, text.encode())


def read_manifest(folder: Place | str, kind: str | None = None) -> Manifest:
    """Read the manifest of a folder, local or remote.

    Raises `UserError` when the folder or its manifest is missing or broken, comes from a later schema,
    or is of another kind than the caller asked for.
    """
    folder = place(folder)
    path = folder / FILE_NAME
    if isinstance(folder, Path) and not folder.exists():
        raise UserError(f"{folder}: no such folder" + (f" (expected {kind})" if kind else ""))
    try:
        data = read_bytes(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(
            f"{folder}: has no {FILE_NAME}, so it is not a folder that mmrec finished"
        ) from None
    try:
        raw = json.loads(data)
        raw["parents"] = [Parent(**parent) for parent in raw["parents"]]
        manifest = Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a manifest that this version reads ({error})") from None
    if manifest.schema_version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema {manifest.schema_version}, and this mmrec ({mmrec.__version__}) reads up to "
            f"{SCHEMA_VERSION}; install mmrec {manifest.mmrec_version} or later"
        )
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder}: expected {kind}, found {manifest.kind}")
    return manifest


def parent_of(child: Place, folder: Place, kind: str | None = None) -> Parent:
    """The record that a folder at `child` keeps of the finished folder that it is made from."""
    manifest = read_manifest(folder, kind)
    return Parent(
        kind=manifest.kind, fingerprint=manifest.fingerprint, path=relative_path(child, folder)
    )


def relative_path(child: Place, folder: Place) -> str:
    """The path of `folder` as seen from `child`, so that a tree of folders can be moved as a whole.

    A URL stays whole, and so does the path of a local folder that is seen from a URL.
    """
    child, folder = place(child), place(folder)
    if not isinstance(folder, Path):
        return str(folder)
    if not isinstance(child, Path):
        return str(folder.resolve())
    return os.path.relpath(folder.resolve(), child.resolve())


def find_parent(folder: Place, kind: str) -> Place | None:
    """Where the parent of that kind lies now, or None when it has none, or it was moved or remade."""
    return find_recorded(folder, read_manifest(folder).parent(kind))


def find_recorded(folder: Place, record: Parent | None) -> Place | None:
    """The same, for a record that a folder keeps of it."""
    if record is None:
        return None
    path = joined(_absolute(folder), record.path)
    if not is_file(path / FILE_NAME) or read_manifest(path).fingerprint != record.fingerprint:
        return None
    return path


def _absolute(folder: Place | str) -> Place:
    found = place(folder)
    return found.resolve() if isinstance(found, Path) else found


def lineage(folder: Place | str) -> Iterator[tuple[int, Place, Parent | None, Manifest | None]]:
    """Walk a folder and its ancestors, nearest first.

    Yields (depth, path, the child's record of it, its manifest), an ancestor that several descendants
    remember alike once. The manifest is None where the folder is no longer there; where its fingerprint
    differs from the record, it was made anew since.
    """
    seen: set[tuple[str, str | None]] = set()

    def walk(
        path: Place, record: Parent | None, depth: int
    ) -> Iterator[tuple[int, Place, Parent | None, Manifest | None]]:
        if (str(path), record and record.fingerprint) in seen:
            return
        seen.add((str(path), record and record.fingerprint))
        manifest = read_manifest(path) if is_file(path / FILE_NAME) else None
        yield depth, path, record, manifest
        for parent in manifest.parents if manifest else []:
            yield from walk(joined(path, parent.path), parent, depth + 1)

    read_manifest(folder)
    yield from walk(_absolute(folder), None, 0)


def describe(folder: Place | str) -> str:
    """A folder and its ancestors as text: what each holds, and whether the chain still fits."""
    lines: list[str] = []
    for depth, path, record, manifest in lineage(folder):
        indent = "    " * depth
        if manifest is None:
            # Tables that somebody else wrote have no manifest, and are none the worse for it.
            # Of a remote folder only the files can be asked for.
            there = not isinstance(path, Path) or path.exists()
            state = "has no manifest" if there else "no longer there"
            lines.append(f"{indent}{record.kind if record else '?'}  {path}  {state}")
            continue
        stale = record is not None and record.fingerprint != manifest.fingerprint
        note = f"  made anew since: was {record.fingerprint}" if stale and record else ""
        lines.append(f"{indent}{manifest.kind}  {path}  {manifest.fingerprint}{note}")
        # A count stands for a list of the same name.
        facts = {**manifest.details, "mmrec": manifest.mmrec_version, **manifest.counts}
        if depth == 0:
            facts |= {f"config.{name}": value for name, value in manifest.config.items()}
        lines += [f"{indent}    {name}: {_short(value)}" for name, value in facts.items()]
    return "\n".join(lines)


def lineage_to_json(folder: Place | str) -> str:
    """The manifests of a folder and its ancestors as a JSON array, each with its path."""
    chain = [
        {"path": str(path), "depth": depth, "manifest": asdict(manifest) if manifest else None}
        for depth, path, _, manifest in lineage(folder)
    ]
    return json.dumps(chain, ensure_ascii=False, default=str)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:200] + " ..."


def fingerprint_of(parts: Mapping[str, str | bytes]) -> str:
    """Hash named parts, in the order of their names, to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def hash_file(path: Place) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(local_copy(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_settings(
    unfinished: Place, earlier: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raises `UserError` when unfinished work is not of these settings, with those that differ."""
    differing = [
        f"{name} was {earlier.get(name)}, is {settings.get(name)}"
        for name in sorted({*earlier, *settings})
        if earlier.get(name) != settings.get(name)
    ]
    if differing:
        raise UserError(
            f"{unfinished}: holds unfinished work of other settings ({'; '.join(differing)}); finish it "
            "with those, or --restart throws it away"
        )


def check_no_file(path: Path) -> None:
    """Refuse an output folder whose place, or a place above it, is taken by a file."""
    for folder in (path, *path.resolve().parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{path}: cannot be written, since {folder} is a file")


def check_output(
    path: Place | str, *, kind: str, overwrite: bool, inputs: Iterable[Place | str] = ()
) -> None:
    """Refuse, before any work is done, an output folder that cannot or must not be written.

    What is there is replaced only if `overwrite` says so and its manifest is of the same kind, so that
    no slip of the hand deletes what mmrec did not make. An output that is or holds one of the `inputs`
    is refused in any case.
    """
    path = place(path)
    if isinstance(path, Path):
        check_no_file(path)
    else:
        check_writable(path)
    for given in inputs:
        if _holds(path, place(given)):
            raise UserError(f"{path}: holds the input {given}; give another --out")
    if not _has_files(path):
        return
    if not overwrite:
        raise UserError(f"{path}: already exists; give another --out, or --overwrite to replace it")
    found = read_manifest(path).kind if is_file(path / FILE_NAME) else "something else"
    if found != kind:
        raise UserError(
            f"{path}: --overwrite replaces {kind} alone, and this is {found}; give another --out"
        )


def _holds(folder: Place, inner: Place) -> bool:
    if isinstance(folder, Path) and isinstance(inner, Path):
        return inner.resolve().is_relative_to(folder.resolve())
    return f"{inner}".rstrip("/").startswith(f"{folder}".rstrip("/") + "/") or inner == folder


def _has_files(folder: Place) -> bool:
    if isinstance(folder, Path):
        return folder.exists() and any(folder.iterdir())
    return bool(list_files(folder, "*"))


@contextmanager
def new_folder(
    path: Place | str, *, kind: str, overwrite: bool = False, inputs: Iterable[Place | str] = ()
) -> Iterator[Path]:
    """Build a folder under a temporary name beside `path`, and rename it when the block ends well.

    When the block fails the temporary folder is removed, and what was at `path` before stays. A URL's
    folder is built on this machine and uploaded, its manifest last; what was there goes first. Raises
    `UserError` as `check_output` does.
    """
    path = place(path)
    check_output(path, kind=kind, overwrite=overwrite, inputs=inputs)
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
            replace_folder(path, Path(temporary), last=FILE_NAME)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        old = path.parent / f".{path.name}.old-{os.getpid()}"
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
