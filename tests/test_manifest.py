"""Lineage: folders appear whole or not at all, and remember what they were made from."""

import json
import shutil
from pathlib import Path

import pytest

from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    check_output,
    describe,
    find_parent,
    fingerprint_of,
    lineage,
    new_folder,
    parent_of,
    read_manifest,
    write_manifest,
)


def make(folder: Path, kind: str, fingerprint: str, parent: Path | None = None) -> Path:
    with new_folder(folder, kind=kind, overwrite=True) as temporary:
        parents = [parent_of(folder, parent)] if parent else []
        write_manifest(
            temporary,
            Manifest(
                kind=kind, config={"a": 1}, counts={}, fingerprint=fingerprint, parents=parents
            ),
        )
    return folder


def test_a_folder_appears_only_when_whole(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), new_folder(tmp_path / "out", kind="tables") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise Interrupted
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_when_its_replacement_fails(tmp_path: Path) -> None:
    make(tmp_path / "out", "tables", "1")
    with pytest.raises(KeyError), new_folder(tmp_path / "out", kind="tables", overwrite=True):
        raise KeyError
    assert read_manifest(tmp_path / "out").fingerprint == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    make(tmp_path / "out", "tables", "1")
    with (
        pytest.raises(UserError, match="already exists"),
        new_folder(tmp_path / "out", kind="tables"),
    ):
        pass


def test_overwriting_replaces_only_its_own_kind(tmp_path: Path) -> None:
    make(tmp_path / "out", "tables", "1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    for folder, found in (("out", "tables"), ("mine", "something else")):
        with (
            pytest.raises(UserError, match=f"replaces shards alone, and this is {found}"),
            new_folder(tmp_path / folder, kind="shards", overwrite=True),
        ):
            pass
    assert (tmp_path / "mine/precious.txt").exists()


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    tables = make(tmp_path / "all/tables", "tables", "1")
    for out in (tables, tmp_path / "all", tmp_path / "all/../all"):
        with pytest.raises(UserError, match="holds the input"):
            check_output(out, kind="tables", overwrite=True, inputs=[tables])
    check_output(tables / "shards", kind="shards", overwrite=False, inputs=[tables])


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file/below/out", kind="tables", overwrite=True)


def test_parents_are_found_after_the_whole_tree_moves(tmp_path: Path) -> None:
    tables = make(tmp_path / "a/tables", "tables", "1")
    make(tmp_path / "a/shards", "shards", "2", tables)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert find_parent(tmp_path / "b/shards", "tables") == (tmp_path / "b/tables").resolve()
    assert find_parent(tmp_path / "b/shards", "encoder") is None
    make(tmp_path / "b/tables", "tables", "9")
    assert find_parent(tmp_path / "b/shards", "tables") is None


def test_the_chain_is_told_with_its_breaks(tmp_path: Path) -> None:
    tables = make(tmp_path / "tables", "tables", "1")
    shards = make(tmp_path / "shards", "shards", "2", tables)
    encoder = make(tmp_path / "encoder", "encoder", "3", shards)
    assert [m.kind for _, _, _, m in lineage(encoder) if m] == ["encoder", "shards", "tables"]
    make(tmp_path / "tables", "tables", "9")
    assert "made anew since: was 1" in describe(encoder)
    shutil.rmtree(tables)
    assert "no longer there" in describe(encoder)


def test_fingerprints_depend_on_content_and_names_not_on_order() -> None:
    assert fingerprint_of({"a": "1", "b": b"2"}) == fingerprint_of({"b": b"2", "a": "1"})
    assert fingerprint_of({"a": "12", "b": "3"}) != fingerprint_of({"a": "1", "b": "23"})


def test_bad_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "nothing", "shards")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    folder = make(tmp_path / "out", "tables", "1")
    with pytest.raises(UserError, match="expected index, found tables"):
        read_manifest(folder, "index")
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema 99"):
        read_manifest(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(folder)
