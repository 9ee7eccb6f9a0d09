"""Lineage: folders appear whole or not at all, and remember what they were made from."""

import json
import shutil
from pathlib import Path

import pytest
from servers import http_server

from mmrec.data.storage import list_files, place
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
    relative_path,
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


# Folders elsewhere


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """A folder in memory, which fsspec treats like a remote store."""
    return f"memory://{tmp_path.name}"


def test_relative_paths_keep_urls_whole(tmp_path: Path) -> None:
    assert relative_path(tmp_path / "a", tmp_path / "b/c") == "../b/c"
    assert relative_path(tmp_path, place("s3://bucket/b")) == "s3://bucket/b"
    assert relative_path(tmp_path, Path("s3://bucket/b")) == "s3://bucket/b"
    assert relative_path(place("s3://bucket/a"), place("s3://bucket/b")) == "s3://bucket/b"
    assert relative_path(place("s3://bucket/a"), tmp_path / "b") == str(tmp_path / "b")


def test_a_chain_over_http(tmp_path: Path) -> None:
    make(tmp_path / "served/tables", "tables", "1")
    make(tmp_path / "served/shards", "shards", "2", tmp_path / "served/tables")
    with http_server(tmp_path / "served") as server:
        shards = place(f"{server.url}/shards")
        assert read_manifest(str(shards), "shards").fingerprint == "2"
        encoder = tmp_path / "encoder"
        with new_folder(encoder, kind="encoder") as folder:
            parent = parent_of(encoder, shards, "shards")
            manifest = Manifest(
                kind="encoder", config={}, counts={}, fingerprint="3", parents=[parent]
            )
            write_manifest(folder, manifest)
        assert parent.path == f"{server.url}/shards"
        assert find_parent(encoder, "shards") == shards
        chain = [(m.kind, str(path)) for _, path, _, m in lineage(encoder) if m]
        assert chain[1:] == [
            ("shards", f"{server.url}/shards"),
            ("tables", f"{server.url}/tables"),
        ]
        assert f"{server.url}/tables" in describe(encoder)
        with pytest.raises(UserError, match=r"has no manifest\.json"):
            read_manifest(f"{server.url}/nothing")
        with (
            pytest.raises(UserError, match="cannot be written over HTTP"),
            new_folder(f"{server.url}/new", kind="tables"),
        ):
            pass


def test_a_remote_folder_is_whole_before_it_has_a_manifest(bucket: str, tmp_path: Path) -> None:
    def write(out: str, text: str, *, overwrite: bool = False) -> None:
        with new_folder(out, kind="tables", overwrite=overwrite) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / text).write_text(text)
            write_manifest(folder, Manifest(kind="tables", config={}, counts={}, fingerprint=text))

    write(f"{bucket}/out", "one")
    assert read_manifest(f"{bucket}/out", "tables").fingerprint == "one"
    with pytest.raises(UserError, match="already exists"):
        write(f"{bucket}/out", "two")
    write(f"{bucket}/out", "two", overwrite=True)
    assert read_manifest(f"{bucket}/out").fingerprint == "two"
    assert [path.name for path in list_files(place(f"{bucket}/out/deep"), "*")] == ["two"]
    with pytest.raises(UserError, match="replaces shards alone, and this is tables"):
        check_output(f"{bucket}/out", kind="shards", overwrite=True)
    with pytest.raises(UserError, match="holds the input"):
        check_output(f"{bucket}/out", kind="tables", overwrite=True, inputs=[f"{bucket}/out/deep"])
    for holder in (bucket, f"{bucket}/out"):
        with pytest.raises(UserError, match="holds the input"):
            check_output(holder, kind="tables", overwrite=True, inputs=[f"{bucket}/out"])
    check_output(f"{bucket}/ou", kind="tables", overwrite=True, inputs=[f"{bucket}/out", tmp_path])
