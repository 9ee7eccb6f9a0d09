"""Training a generator: it learns what follows what, and goes on where it was stopped."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_program, reset_accelerate
from small_embeddings import write_embeddings

pytest.importorskip("transformers", reason="pip install 'mmrec[generative]'")

from safetensors.numpy import load_file

from mmrec.errors import UserError
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.semantic_ids import SemanticIdConfig, SemanticIds, build_ids
from mmrec.generative.sequences import SequenceBatches, held_out_queries, without_last
from mmrec.manifest import Parent, read_manifest

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
    folder.mkdir()
    items = [[NAMES[(start + 7 * place) % 24] for place in range(8)] for start in range(24)]
    items[0].insert(0, "unknown")
    table = pa.table({"user_id": [f"u{row}" for row in range(24)], "item_ids": items})
    pq.write_table(table, folder / "sessions.parquet")
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
    test = json.loads((out / "test.json").read_text())
    assert test["R@1"] > 0.9
    recommended = pq.read_table(out / "recommendations.parquet").to_pylist()
    assert np.mean(
        [row["item_ids"][0] == NAMES[(number + 49) % 24] for number, row in enumerate(recommended)]
    ) == pytest.approx(test["R@1"])
    assert "1 without an ID left out" in capsys.readouterr().err
    manifest = read_manifest(out / "generator", "generator")
    assert manifest.parent("semantic_ids") is not None
    assert read_manifest(out, "run").counts["unknown_items"] == 1
    assert Generator.load(out / "generator").root == SemanticIds.load(ids).fingerprint


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
    bare = write_embeddings(tmp_path / "bare", names, vectors)
    with pytest.raises(UserError, match="says of no content which products"):
        run(tmp_path / "wrong", ids, contents=bare)


def test_sessions_of_another_catalogue_are_refused(ids: Path, tmp_path: Path) -> None:
    table = pa.table({"user_id": ["a"], "item_ids": [["x", "y", "z", "w"]]})
    pq.write_table(table, tmp_path / "sessions.parquet")
    with pytest.raises(UserError, match="they are of another catalogue"):
        run(tmp_path / "run", ids, sessions=tmp_path)
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


def test_training_sees_nothing_held_out() -> None:
    items = [["a", "b", "c", "d"], ["a", "b", "c"], ["a", "b"]]
    assert without_last(items, 2) == [["a", "b"], ["a"], ["a", "b"]]
    assert held_out_queries(items, 2, 1) == [(0, ["a", "b", "c"], "d"), (1, ["a", "b"], "c")]
    assert held_out_queries(items, 2, 2) == [(0, ["a", "b"], "c"), (1, ["a"], "b")]


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
