"""Training a generator: it learns what follows what, and goes on where it was stopped."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import load_program, reset_accelerate
from small_embeddings import write_embeddings

pytest.importorskip("transformers", reason="pip install 'mmrec[generative]'")

from safetensors.numpy import load_file

from mmrec.errors import UserError
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.semantic_ids import SemanticIdConfig, SemanticIds, build_ids
from mmrec.generative.sequences import SequenceBatches
from mmrec.generative.sessions import read_sessions, time_split, write_sessions
from mmrec.manifest import Parent, find_parent, read_manifest

NAMES = [f"p{row}" for row in range(24)]
MODEL = GeneratorConfig(width=32, layers=1, heads=2, inner=48, dropout=0.0, max_items=5)


def unit_vectors(number: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((number, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "ids"
    made = build_ids(NAMES, unit_vectors(24), SemanticIdConfig(levels=2, codebook_size=4))
    made.save(folder, parents=[Parent(kind="encoder", fingerprint="encoder", path="../encoder")])
    return folder


@pytest.fixture(scope="module")
def sessions(ids: Path) -> Path:
    """Every product is followed by the one seven numbers on, from any start; one product is unknown."""
    folder = ids.parent / "sessions"
    items = [[NAMES[(start + 7 * place) % 24] for place in range(8)] for start in range(24)]
    items[0].insert(0, "unknown")
    # The catalogue has an order of its own, and a product without an ID, which u1 began with.
    items[1].insert(0, "without ID")
    return write_folder(folder, items, [*reversed(NAMES), "without ID"])


def write_folder(
    folder: Path,
    items: list[list[str]],
    products: list[str],
    watched: list[list[str]] | None = None,
) -> Path:
    """A folder of sessions, of which each event is a second after the one before it."""
    folder.mkdir()
    times = [[100 * row + place for place in range(len(own))] for row, own in enumerate(items)]
    columns = {
        "user_id": [f"u{row}" for row in range(len(items))],
        "item_ids": items,
        "times": times,
    }
    if watched is not None:  # Each before the product of its place.
        columns |= {"content_ids": watched, "content_times": times}
    write_sessions(
        folder,
        products=pa.table({"product_id": products}),
        sessions=pa.table(columns),
        config={},
        counts={},
    )
    return folder


def run(out: Path, ids: Path, **changes: Any) -> Path:
    program = load_program("train/generator.py")
    settings = {
        "model": MODEL,
        "epochs": 30,
        "batch_size": 8,
        "drop_items": 0.0,
        "learning_rate": 1e-2,
        "eval_epochs": 10,
        "num_beams": 5,
        "test_beams": 5,
        "cpu_threads": 1,
        "log_every": 5,
        **changes,
    }
    reset_accelerate()
    program.main(program.GeneratorTraining(ids=ids, out=out, **settings))
    return out


def test_it_learns_what_follows_what(
    ids: Path, sessions: Path, tmp_path: Path, fresh_accelerate: None, capsys: pytest.CaptureFixture
) -> None:
    out = run(tmp_path / "run", ids, sessions=sessions)
    printed = capsys.readouterr()
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["gallery"], metrics["queries"]) == (25, 24)
    assert set(metrics["systems"]) == {"popularity", "transition counts", "generator"}
    means = metrics["systems"]["generator"]["kept"]["slices"]["all"]
    assert means["R@5"] > 0.9
    assert metrics["systems"]["generator"]["kept"]["inflated_by"]["all"]["R@5"] >= 0
    for name, step in (("test", 49), ("val", 42)):
        lists = pq.read_table(out / f"lists/{name}.parquet").to_pylist()
        ranks = [
            row["item_ids"].index(NAMES[(number + step) % 24]) + 1
            for number, row in enumerate(lists)
            if NAMES[(number + step) % 24] in row["item_ids"]
        ]
        of = (
            means
            if name == "test"
            else metrics["val"]["systems"]["generator"]["kept"]["slices"]["all"]
        )
        assert sum(rank <= 5 for rank in ranks) / 24 == pytest.approx(of["R@5"])
        assert all(row["scores"] == sorted(row["scores"], reverse=True) for row in lists)
    assert "2 without an ID left out" in printed.err
    assert "inflated by" in printed.out
    manifest = read_manifest(out / "generator", "generator")
    assert manifest.parent("semantic_ids") is not None
    assert read_manifest(out, "run").counts["unknown_items"] == 2
    assert all(find_parent(folder, "sessions") == sessions for folder in (out, out / "generator"))
    assert Generator.load(out / "generator").root == SemanticIds.load(ids).fingerprint

    # Measured again, from the run's own config, it finds the same.
    program = load_program("train/generator.py")
    shutil.rmtree(out / "lists")
    reset_accelerate()
    program.main(program.parse([str(out / "config.json"), "--evaluate-only"]))
    again = json.loads((out / "metrics.json").read_text())
    assert again | {"users_per_s": 0} == metrics | {"users_per_s": 0}
    assert (out / "lists/val.parquet").is_file()
    assert not list((out / "generator").glob("*.tmp"))

    # Other targets than those held out, or other sessions, may be what it learned.
    others = write_folder(tmp_path / "others", [NAMES[:8]] * 24, NAMES)
    for flags, complaint in (
        (["--by", "time"], "held out targets by leave-one-out"),
        (["--sessions", str(others)], "was trained on sessions"),
    ):
        reset_accelerate()
        with pytest.raises(UserError, match=complaint):
            program.main(program.parse([str(out / "config.json"), "--evaluate-only", *flags]))


def test_a_time_split_learns_nothing_later_than_a_query(
    ids: Path, tmp_path: Path, fresh_accelerate: None
) -> None:
    items = [[NAMES[(start + place) % 24] for place in range(12)] for start in range(24)]
    folder = write_folder(tmp_path / "sessions", items, NAMES)
    table = pq.read_table(folder / "sessions.parquet").drop_columns(["times"])
    times = pa.array([[100 * place + row for place in range(12)] for row in range(24)])
    pq.write_table(table.append_column("times", times), folder / "sessions.parquet")
    out = run(tmp_path / "run", ids, sessions=folder, by="time", epochs=2, eval_epochs=1)
    split = time_split(read_sessions(folder), "test")
    assert read_manifest(out, "run").counts["items"] == len(split.train.items)
    lists = pq.read_table(out / "lists/test.parquet")
    assert (
        len(lists)
        == len(split.queries)
        == json.loads((out / "metrics.json").read_text())["queries"]
    )


def test_training_ends_where_validation_has_been_no_better_for_long(
    ids: Path, sessions: Path, tmp_path: Path, fresh_accelerate: None, monkeypatch: Any
) -> None:
    program = load_program("train/generator.py")
    values = iter([0.2, 0.1, 0.3, 0.2, 0.1, 0.9])
    monkeypatch.setattr(program, "validate", lambda *_: {"R@10": next(values)})
    settings = {"sessions": sessions, "eval_epochs": 1, "patience": 2}
    out = run(tmp_path / "run", ids, **settings)
    assert read_manifest(out, "run").details["best"] == {"R@10": 0.3, "step": 9}
    assert read_manifest(out, "run").counts["steps"] == 15
    resumed = run(out, ids, **settings, resume=True)
    assert read_manifest(resumed, "run").counts["steps"] == 15
    assert next(values) == 0.9


def test_a_stopped_run_goes_on_to_the_same_weights(
    ids: Path, sessions: Path, tmp_path: Path, fresh_accelerate: None, monkeypatch: Any
) -> None:
    settings = {"sessions": sessions, "epochs": 4, "drop_items": 0.3, "eval_epochs": 2}
    settings["model"] = replace(MODEL, dropout=0.2)
    whole = run(tmp_path / "whole", ids, **settings)
    program = load_program("train/generator.py")

    class StopAfterSeven(program.StopSignals):
        asked = 0

        @property
        def received(self) -> int:
            StopAfterSeven.asked += 1
            return signal.SIGTERM if StopAfterSeven.asked == 7 else 0

    monkeypatch.setattr(program, "StopSignals", StopAfterSeven)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "stopped", ids, **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-00000007"]
    with pytest.raises(UserError, match="epochs 4 -> 5"):
        run(tmp_path / "stopped", ids, **{**settings, "epochs": 5, "resume": True})
    resumed = run(tmp_path / "stopped", ids, **settings, resume=True)
    one, two = (load_file(folder / "generator/model.safetensors") for folder in (whole, resumed))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(UserError, match="holds a run already"):
        run(resumed, ids, **settings)


def test_contents_lead_to_products(ids: Path, tmp_path: Path, fresh_accelerate: None) -> None:
    vectors = unit_vectors(48, 3)
    links = [[NAMES[row % 24]] for row in range(48)]
    names = [f"c{row}" for row in range(48)]
    train = write_embeddings(tmp_path / "train", names, vectors, product_ids=links)
    out = run(tmp_path / "run", ids, contents=train, val_contents=train, epochs=40, batch_size=16)
    found = read_manifest(out, "run").details["best"]["R@10"]
    assert found > 0.9
    others = write_embeddings(
        tmp_path / "others", names, vectors, product_ids=links, encoder="another"
    )
    with pytest.raises(UserError, match="was embedded by another"):
        run(tmp_path / "wrong", ids, contents=others)
    with pytest.raises(UserError, match="others: was embedded by another"):
        run(tmp_path / "wrong", ids, contents=train, val_contents=others)
    bare = write_embeddings(tmp_path / "bare", names, vectors)
    with pytest.raises(UserError, match="says of no content which products"):
        run(tmp_path / "wrong", ids, contents=bare)


def test_a_history_and_a_content_together_lead_to_a_product(
    ids: Path, tmp_path: Path, fresh_accelerate: None, capsys: pytest.CaptureFixture
) -> None:
    """Of each user's two products the content says which comes next: neither suffices alone."""
    generator = np.random.default_rng(0)
    vectors = np.repeat(unit_vectors(2, 5), 6, axis=0) + 0.1 * unit_vectors(12, 6)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"c{row}" for row in range(12)]
    drawn = generator.integers(12, size=(48, 8))
    products = np.arange(48)[:, None] % 12 + np.where(drawn < 6, 0, 12)
    items = [[NAMES[row] for row in own] for own in products]
    watched = [[names[row] for row in own] for own in drawn]
    folder = write_folder(tmp_path / "sessions", items, NAMES, watched)
    parts = [
        write_embeddings(
            tmp_path / str(half), names[half::2], vectors[half::2], product_ids=[[]] * 6
        )
        for half in range(2)
    ]
    settings = {"sessions": folder, "watched": tuple(parts), "batch_size": 32, "epochs": 30}
    out = run(tmp_path / "run", ids, **settings)
    assert read_manifest(out, "run").counts["watched"] == 48 * 5
    metrics = json.loads((out / "metrics.json").read_text())
    found = {name: own["kept"]["slices"]["all"]["MRR"] for name, own in metrics["systems"].items()}
    assert found["generator, history and content"] > 0.85
    assert found["generator"] < 0.8
    assert found["generator, content alone"] < 0.5
    name = "generator, history and content - generator"
    assert metrics["differences"][name]["intervals"]["all"]["MRR"][0] > 0
    # What the ranker reads is what was found with all that is known.
    lists = pq.read_table(out / "lists/test.parquet")["item_ids"].to_pylist()
    hits = [own[0] == taken[-1] for own, taken in zip(lists, items, strict=True)]
    assert np.mean(hits) > 0.7
    assert "240 items after a content, too" in capsys.readouterr().err

    others = write_embeddings(tmp_path / "z", ["z"], unit_vectors(1), product_ids=[[]])
    for changes, complaint in (
        ({"watched": (others,)}, "none of them was watched before a target of val"),
        ({"sessions": None, "contents": parts[0]}, "--watched: give --sessions too"),
    ):
        with pytest.raises(UserError, match=complaint):
            run(tmp_path / "wrong", ids, **{**settings, **changes})


def test_ids_that_have_seen_the_targets_are_refused(
    ids: Path, sessions: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    SemanticIds.load(ids).save(seen, details={"by": None})
    with pytest.raises(UserError, match="targets held out by None"):
        run(tmp_path / "wrong", seen, sessions=sessions)
    reset_accelerate()
    elsewhere = Parent(kind="sessions", fingerprint="longer", path="../longer")
    SemanticIds.load(ids).save(tmp_path / "longer", parents=[elsewhere])
    with pytest.raises(UserError, match="was cut from sessions longer, and"):
        run(tmp_path / "wrong", tmp_path / "longer", sessions=sessions)


def test_sessions_of_another_catalogue_are_refused(ids: Path, tmp_path: Path) -> None:
    others = write_folder(tmp_path / "others", [list("xyzw")], list("xyzw"))
    with pytest.raises(UserError, match="they are of another catalogue"):
        run(tmp_path / "run", ids, sessions=others)
    reset_accelerate()
    with pytest.raises(UserError, match="give --sessions FOLDER, --contents FOLDER, or both"):
        run(tmp_path / "run", ids)


def test_flags_override_an_earlier_config(tmp_path: Path) -> None:
    program = load_program("train/generator.py")
    first = program.parse(
        ["--ids", "ids", "--out", "out", "--model.layers", "2", "--sessions", "s"]
    )
    assert (first.model.layers, first.epochs) == (2, program.GeneratorTraining.epochs)
    program.RunFolder(tmp_path, first, from_step=None)
    again = program.parse([str(tmp_path / "config.json"), "--resume"])
    assert again == replace(first, resume=True)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(50, size=size) for size in generator.integers(1, 40, size=60)]

    def plan(epoch: int, seed: int = 0, drop: float = 0.0) -> list[Any]:
        batches = SequenceBatches(sequences, batch_size=8, max_items=7, drop_items=drop, seed=seed)
        made = batches.plan(epoch)
        assert len(made) == batches.steps_per_epoch
        return [[own.tolist() for own, _ in batch] for batch in made]

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)
    assert plan(3) != plan(3, seed=1)
    windows = [own for batch in plan(0) for own in batch]
    assert max(len(own) for own in windows) <= 7
    # All is seen but for what fills no batch, and every window stands in some sequence as it is.
    whole = ["," + ",".join(map(str, own)) + "," for own in sequences]
    assert all(any("," + ",".join(map(str, w)) + "," in text for text in whole) for w in windows)
    assert sum(map(len, windows)) >= sum(map(len, sequences)) - 7 * 7
    # Those of a batch are about as long as each other.
    assert np.mean([max(map(len, b)) - min(map(len, b)) for b in plan(0)]) < 1.5
    kept = sum(len(own) for batch in plan(0, drop=0.5) for own in batch)
    assert 0.4 < kept / sum(map(len, windows)) < 0.7


def test_after_a_content_the_last_product_alone_is_learned() -> None:
    batches = SequenceBatches(
        [np.array([0, 1, 2])],
        batch_size=3,
        max_items=4,
        pairs=[(0, 6)],
        watched=[(np.array([1, 5, 3, 4, 5]), np.array([1]))],
        contents=unit_vectors(2),
    )
    [rows] = batches.plan(0)
    batch = batches.collate(rows)
    expected = {-1: [1, 1, 1, 0], 0: [1, 0, 0, 0], 1: [0, 0, 0, 1]}
    assert batch.learned.tolist() == [expected[content] for _, content in rows]
    assert [own.tolist() for own, content in rows if content == 1] == [[5, 3, 4, 5]]

    generator = Generator(replace(MODEL, content_width=8), (4, 4, 2))
    states = []
    generator.body.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
    codes = torch.from_numpy(np.stack(np.unravel_index(np.arange(7), (4, 4, 2)), axis=1))
    loss = generator(codes[batch.rows], batch.learned, batch.contents)["loss"]
    [gradient] = torch.autograd.grad(loss, states)
    # What writes a product that is not learned, or padding, is not moved by the loss.
    reached = gradient.unflatten(1, (4, 3)).abs().sum(-1) > 0  # (B, S, E)
    assert torch.equal(reached, batch.learned[..., None].expand_as(reached))


def test_another_content_leads_to_a_product_each_epoch() -> None:
    watched = [(np.arange(1, size), np.arange(size)) for size in range(4, 20)]

    def plan(epoch: int, drop: float = 0.5) -> list[tuple[list[int], int]]:
        batches = SequenceBatches(
            [], batch_size=16, max_items=30, drop_items=drop, watched=watched, seed=1
        )
        [rows] = batches.plan(epoch)
        return sorted(((own.tolist(), content) for own, content in rows), key=lambda r: r[0][-1])

    assert plan(3) == plan(3) != plan(4)
    # However much is left out of a history, the product that is learned stays.
    assert [own[-1] for own, _ in plan(0)] == [own[-1] for own, _ in watched]
    assert sum(len(own) for own, _ in plan(0)) < 0.75 * sum(len(own) for own, _ in watched)
    chosen = np.array([[content for _, content in plan(epoch)] for epoch in range(19)])
    for column, (_, choices) in zip(chosen.T, watched, strict=True):
        assert set(column[: len(choices)]) == set(choices.tolist())
