"""What an index is after a kill at any moment, and what it says of files that are not what was written."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from vectors import names, unit_vectors

from mmrec.errors import UserError
from mmrec.retrieval.index import ProductIndex

COUNT = 200
# Round after round: upsert, replace, delete, now and then compact or publish anew. What a product's vector
# and price should be follows from its round, and "done" is printed once a call has returned.
WRITER = """
import sys
import pyarrow as pa
from vectors import names, unit_vectors
from mmrec.retrieval.index import ProductIndex

folder, first = sys.argv[1], int(sys.argv[2])
index = ProductIndex.load(folder, device="cpu")
say = lambda *words: print(*words, flush=True)
index.delete([])  # become the writer
say("ready")
for number in range(first, first + 10_000):
    ids = [f"r{number}-{i}" for i in range(20)]
    table = pa.table({"product_id": ids, "round": [number] * 20})
    index.upsert(ids, unit_vectors(20, seed=number + 1), table)
    say("upsert", number)
    if number % 3 == 2:
        index.delete([f"r{number - 1}-{i}" for i in range(20)])
        say("delete", number - 1)
    if number % 4 == 3:
        index.compact()
        say("compact", number)
    if number % 10 == 9:
        index.save(folder, overwrite=True)
        say("publish", number)
"""


def run_and_kill(folder: Path, first: int, delay_s: float) -> list[tuple[str, int]]:
    """Start the writer, kill it, and return what it had acknowledged."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        ready = process.stdout.readline()
        assert ready == "ready\n", process.stderr.read()
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().splitlines()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    return [(what, int(number)) for what, number in (line.split() for line in lines)]


def rounds_of(index: ProductIndex) -> set[int]:
    """The rounds that the index holds, each checked to be whole."""
    rounds: dict[int, list[int]] = {}
    rows = [row for row in index.products.to_pylist() if row["product_id"].startswith("r")]
    for row in rows:
        number, place = map(int, row["product_id"][1:].split("-"))
        assert row["round"] == number
        rounds.setdefault(number, []).append(place)
    vectors = index.vectors([row["product_id"] for row in rows])
    starts = np.cumsum([0, *map(len, rounds.values())])
    for start, (number, places) in zip(starts, rounds.items(), strict=False):
        assert places == list(range(20))
        expected = unit_vectors(20, seed=number + 1)
        np.testing.assert_array_equal(vectors[start : start + 20], expected)
    return set(rounds)


@pytest.mark.timeout(1_800)
def test_a_killed_writer_loses_nothing_acknowledged(tmp_path, request):
    """The kills fall into upserts, deletes, compactions and publications; the index goes on each time."""
    kills = request.config.getoption("--kills")
    moments = random.Random(0)
    index = ProductIndex.build(names(COUNT), unit_vectors(COUNT))
    index.save(tmp_path / "index")
    alive: set[int] = set()
    next_round = 0
    for _ in range(kills):
        first = next_round
        done = run_and_kill(tmp_path / "index", first, moments.uniform(0.0, 0.5))
        upserted = [number for what, number in done if what == "upsert"]
        last = max(upserted, default=first - 1)
        opened = ProductIndex.load(tmp_path / "index", device="cpu", verify=True)
        found = rounds_of(opened)
        deleted = {number for what, number in done if what == "delete"}
        # The one call in flight may have happened or not, but never by half.
        in_flight = {last + 1} | ({last - 1} if last % 3 == 2 else set())
        sure = (alive | set(upserted)) - deleted
        assert found - in_flight == sure - in_flight
        assert set(names(COUNT)) <= set(opened.ids)
        assert len(opened) == COUNT + 20 * len(found)
        assert opened.search(unit_vectors(5), 1).ids == [[id_] for id_ in names(5)]
        # The next writer takes up where this one was killed, and clears what it left.
        with opened:
            opened.delete([])
            left = [path.name for path in (tmp_path / "index/generations").iterdir()]
            assert all(name.isdigit() for name in left)
        alive, next_round = found, last + 2


# ---------------------------------------------------------------------------------- damaged changes


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    ProductIndex.build(names(COUNT), unit_vectors(COUNT)).save(tmp_path / "index")
    with ProductIndex.load(tmp_path / "index", device="cpu") as index:
        for number in range(3):
            ids = [f"n{number}"]
            index.upsert(ids, unit_vectors(1), pa.table({"product_id": ids, "price": [1.0]}))
    return tmp_path / "index"


def changes_of(folder: Path) -> Path:
    return folder / "generations/000001/changes"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes of changes, and was written with"),
        (lambda data: data[:20], "bytes of changes, and was written with"),
        (lambda data: b"", "not a file of changes"),
        (lambda data: b"PAR1" + data[4:], "not a file of changes"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "SHA-256 differs"),
    ],
)
@pytest.mark.parametrize("number", [2, 3])
def test_damaged_changes_are_named(changed, damage, message, number):
    path = changes_of(changed) / f"{number:08d}.change"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path.name}: .*{message}"):
        ProductIndex.load(changed)


def test_missing_and_foreign_changes_are_named(changed, tmp_path):
    first, second = sorted(changes_of(changed).iterdir())[:2]
    ProductIndex.build(names(9), unit_vectors(9, seed=3)).save(tmp_path / "other")
    shutil.copy(first, changes_of(tmp_path / "other") / first.name)
    with pytest.raises(UserError, match=r"00000001\.change: is change 1 of another generation"):
        ProductIndex.load(tmp_path / "other")
    shutil.copy(first, second)
    with pytest.raises(UserError, match=r"00000002\.change: is change 1 of another generation"):
        ProductIndex.load(changed)
    second.unlink()
    with pytest.raises(UserError, match=r"00000002\.change: no such file, and it or a later"):
        ProductIndex.load(changed)


def test_a_last_change_that_is_gone_is_named(changed):
    assert (changes_of(changed) / "acknowledged").read_text() == "00000003\n"
    (changes_of(changed) / "00000003.change").unlink()
    with pytest.raises(UserError, match=r"00000003\.change: no such file"):
        ProductIndex.load(changed)


def test_a_stale_object_saves_what_others_changed(changed):
    stale = ProductIndex.load(changed, device="cpu")
    with ProductIndex.load(changed, device="cpu") as writer:
        writer.upsert(["late"], unit_vectors(1))
        writer.delete(["n0"])
        with pytest.raises(UserError, match="is being changed by another writer"):
            stale.save(changed, overwrite=True)
    stale.save(changed, overwrite=True)
    assert "late" in stale
    opened = ProductIndex.load(changed, device="cpu")
    assert "late" in opened
    assert "n0" not in opened
    opened.upsert(["later"], unit_vectors(1))  # Saving left no writer behind.


def test_a_damaged_index_is_not_replaced_under_its_writer(changed):
    with ProductIndex.load(changed, device="cpu") as writer:
        writer.delete([])
        (changed / "CURRENT").write_text("000007\n")
        with pytest.raises(UserError, match="is being changed by another writer"):
            ProductIndex.build(names(5), unit_vectors(5)).save(changed, overwrite=True)
    ProductIndex.build(names(5), unit_vectors(5)).save(changed, overwrite=True)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_a_full_disk_is_one_line_and_changes_nothing(factory, tmp_path):
    """A limit on the size of files stands for the disk; FAISS and Python have errors of their own."""
    folder = tmp_path / "index"
    ProductIndex.build(names(COUNT), unit_vectors(COUNT), factory=factory).save(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ProductIndex.load(folder, device="cpu") as index:
        index.delete(names(3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
        try:
            for change in (
                index.compact,
                lambda: index.save(folder, overwrite=True),
                lambda: index.upsert(names(50), unit_vectors(50)),
            ):
                with pytest.raises(UserError, match=r"index: cannot be written \(File too large\)"):
                    change()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(ProductIndex.load(folder, verify=True)) == COUNT - 3


def test_a_reader_that_finds_damage_keeps_its_state(changed):
    reader = ProductIndex.load(changed, device="cpu")
    with ProductIndex.load(changed, device="cpu") as writer:
        writer.upsert(["late"], unit_vectors(1))
    path = changes_of(changed) / "00000004.change"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"00000004\.change"):
        reader.refresh()
    assert len(reader) == COUNT + 3


def test_an_index_of_another_encoder_is_not_gone_over_to(tmp_path):
    from mmrec.manifest import Parent

    def publish(fingerprint: str) -> None:
        parent = Parent(kind="encoder", fingerprint=fingerprint, path="../encoder")
        index = ProductIndex.build(names(9), unit_vectors(9))
        index.save(tmp_path / "index", parents=[parent], overwrite=True)

    publish("a" * 16)
    reader = ProductIndex.load(tmp_path / "index")
    publish("b" * 16)
    with pytest.raises(UserError, match=rf"encoder {'a' * 16} .* {'b' * 16} now; load it again"):
        reader.refresh()
    assert reader.manifest.parent("encoder").fingerprint == "a" * 16
    found = json.loads((tmp_path / "index/manifest.json").read_text())
    assert found["parents"][0]["fingerprint"] == "b" * 16


def test_a_damaged_index_can_be_replaced(changed):
    (changed / "CURRENT").write_text("000007\n")
    with pytest.raises(UserError, match="names generation '000007'"):
        ProductIndex.load(changed)
    ProductIndex.build(names(5), unit_vectors(5)).save(changed, overwrite=True)
    assert ProductIndex.load(changed).ids == names(5)
    # What an earlier version wrote has no manifest in its generation.
    (changed / "generations/000001/manifest.json").unlink()
    ProductIndex.build(names(6), unit_vectors(6)).save(changed, overwrite=True)
    assert ProductIndex.load(changed).ids == names(6)


def test_an_index_may_be_published_with_another_encoder(tmp_path):
    from mmrec.manifest import Parent

    index = ProductIndex.build(names(5), unit_vectors(5))
    for fingerprint in ("a" * 16, "b" * 16):
        parent = Parent(kind="encoder", fingerprint=fingerprint, path="../encoder")
        index.save(tmp_path / fingerprint, parents=[parent])
        assert index.manifest.parent("encoder").fingerprint == fingerprint
