"""The hybrid: candidates and features against loops, what it learns, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import load_program
from scipy import sparse
from small_embeddings import write_embeddings

from mmrec.errors import UserError
from mmrec.generative.baselines import transition_scores
from mmrec.generative.evaluation import (
    RankedProducts,
    evaluate_recommendations,
)
from mmrec.generative.lists import list_shares
from mmrec.generative.ranker import (
    Ranker,
    RankerConfig,
    feature_names,
    fit_ranker,
    gather_candidates,
    keep_largest,
    link_by_content,
    link_by_sequences,
    word_weights,
)
from mmrec.generative.sessions import Sessions, leave_one_out, sequences_of, write_sessions
from mmrec.manifest import Manifest, Parent, read_manifest, write_manifest

NUM_PRODUCTS = 60
CONFIG = RankerConfig(candidates=20, rounds=30, leaves=7, leaf_rows=20, threads=1)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """Users who keep to one of six styles, which titles name; the last ten products are bought last alone."""
    generator = np.random.default_rng(0)
    styles = np.arange(NUM_PRODUCTS) % 6
    rows = []
    for _ in range(500):
        own = np.flatnonzero(styles == generator.integers(6))
        early, late = own[own < 50], own[own >= 50]
        taken = generator.permutation(early)[:4].tolist()
        if generator.random() < 0.2:
            taken[-1] = int(generator.choice(late))
        rows.append([f"p{item:02d}" for item in taken])
    words = ("oak", "linen", "steel", "wool", "glass", "cork")
    titles = [f"{words[style]} piece {item}" for item, style in enumerate(styles)]
    folder = tmp_path_factory.mktemp("styles")
    return write_sessions(
        folder,
        products=pa.table(
            {"product_id": [f"p{item:02d}" for item in range(NUM_PRODUCTS)], "title": titles}
        ),
        sessions=pa.table({"user_id": [f"u{row}" for row in range(len(rows))], "item_ids": rows}),
        config={},
        counts={},
    )


@pytest.fixture(scope="module")
def ranker(sessions: Sessions) -> Ranker:
    return fit_ranker(leave_one_out(sessions, "val"), sessions.product_ids, sessions.titles, CONFIG)


def test_the_largest_of_each_row_are_kept() -> None:
    dense = np.random.default_rng(0).random((8, 30)) * (
        np.random.default_rng(1).random((8, 30)) < 0.6
    )
    dense[3] = 0
    kept = keep_largest(sparse.csr_array(dense), 5).toarray()
    for row, own in zip(dense, kept, strict=True):
        assert sorted(own[own > 0]) == sorted(row[row > 0])[-5:]
        assert (own[own > 0] == row[own > 0]).all()


def test_titles_are_linked_by_rare_words() -> None:
    titles = ["Red mug", "red bowl", "blue mug, large", None, "of of of", "of x", "of y", "of z"]
    weights = word_weights(titles, common_word=0.4).toarray()
    # "of" is in half of the titles, and every other word of the last four is in one alone.
    assert not weights[3:].any()
    np.testing.assert_allclose(weights[0][weights[0] > 0], [np.log(4), np.log(4)])
    links = link_by_content(titles, RankerConfig(common_word=0.4))["title"].toarray()
    np.testing.assert_allclose(links[0, [1, 2]], [np.sqrt(0.5), np.sqrt(0.5)])
    assert links[0, 0] == links[1, 2] == 0


def test_links_by_sequences_equal_a_loop() -> None:
    train = [[0, 1, 2], [1, 2], [3], [0, 2, 4, 1]]
    config = RankerConfig()
    links = link_by_sequences(sequences_of(train), 5, config)
    users = np.zeros((5, 4))
    for user, row in enumerate(train):
        users[row, user] = 1 / np.sqrt(len(row))
    norms = np.linalg.norm(users, axis=1, keepdims=True)
    cosines = users @ users.T / (norms * norms.T)
    np.fill_diagonal(cosines, 0)
    np.testing.assert_allclose(links["together"].toarray(), cosines, atol=1e-12)
    forward = links["transition"].toarray()
    two = forward @ forward
    np.fill_diagonal(two, 0)
    np.testing.assert_allclose(links["two steps"].toarray(), two, atol=1e-12)
    # Backwards, 0 came before 2 at gaps 2 and 1, of a total of 3.5 in which 1 has 2 and 0 has 1.5.
    np.testing.assert_allclose(links["before"].toarray()[2, 0], 1.5 / (3.5 + 2))


def test_embeddings_become_links() -> None:
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0], [0.0, 0.0]])
    links = link_by_content([None] * 4, RankerConfig(), {"photos": vectors})["photos"].toarray()
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = 0.8
    np.testing.assert_allclose(links, expected, atol=1e-6)
    with pytest.raises(UserError, match="'photos': 4 rows for a catalogue of 3 products"):
        link_by_content([None] * 3, RankerConfig(), {"photos": vectors})


def test_features_say_what_their_names_say(sessions: Sessions) -> None:
    split = leave_one_out(sessions, "val")
    links = link_by_sequences(split.train, NUM_PRODUCTS, CONFIG)
    popularity = np.bincount(split.train.items, minlength=NUM_PRODUCTS)
    generated = list_shares(
        RankedProducts(products=np.full((500, 1), 59), scores=np.ones((500, 1))), NUM_PRODUCTS
    )
    found = gather_candidates(links, popularity, split.histories, CONFIG, {"generator": generated})
    names = feature_names(list(links), ["generator"])
    assert found.features.shape == (len(found.products), len(names))
    column = {name: found.features[:, place] for place, name in enumerate(names)}
    scores = transition_scores(split.train, split.histories, NUM_PRODUCTS).toarray()
    np.testing.assert_allclose(
        column["transition, history"], scores[found.queries, found.products], atol=1e-6
    )
    best = scores[found.queries].max(axis=1)
    np.testing.assert_allclose(
        column["transition, history over best"],
        scores[found.queries, found.products] / np.where(best > 0, best, 1),
        atol=1e-6,
    )
    shares = links["transition"].toarray()
    last = np.array([history[-1] for history in split.histories])
    np.testing.assert_allclose(
        column["transition, last"], shares[last[found.queries], found.products], atol=1e-6
    )
    assert (column["generator, score"] == (found.products == 59)).all()
    assert (column["generator, one over rank"] == (found.products == 59)).all()
    seen = [p in split.histories[q] for q, p in zip(found.queries, found.products, strict=True)]
    assert (column["seen"] == seen).all()
    np.testing.assert_allclose(
        column["popularity"], np.log1p(popularity[found.products]), rtol=1e-6
    )
    pairs = found.queries * NUM_PRODUCTS + found.products
    assert (np.diff(pairs) > 0).all()


def test_it_finds_what_counts_cannot(sessions: Sessions, ranker: Ranker) -> None:
    split = leave_one_out(sessions, "test")
    systems = {
        "counts": transition_scores(split.train, split.histories, NUM_PRODUCTS),
        "hybrid": ranker.rank(split.histories, k=30),
    }
    found = evaluate_recommendations(systems, split, NUM_PRODUCTS, num_resamples=100)
    counts, hybrid = (found.systems[name]["kept"].slices for name in systems)
    assert counts["cold product"]["R@10"] == 0
    assert hybrid["cold product"]["R@10"] > 0.3
    assert hybrid["all"]["N@10"] > counts["all"]["N@10"]
    assert sum(share for name, share in ranker.importance().items() if "title" in name) > 0.01
    np.testing.assert_allclose(sum(ranker.importance().values()), 1)


def test_links_see_no_target(sessions: Sessions) -> None:
    """With other targets, validation and test, all that is counted stays the same."""
    rows = sessions.table["item_ids"].to_pylist()
    split = leave_one_out(sessions, "val")
    assert len(split.train.items) == sum(len(row) - 2 for row in rows)
    for own, row in zip(split.train, rows, strict=True):
        assert [sessions.product_ids[item] for item in own] == row[:-2]


def test_lists_are_ordered_padded_and_repeatable(sessions: Sessions, ranker: Ranker) -> None:
    histories = leave_one_out(sessions, "test").histories.take(np.arange(20))
    first, again = ranker.rank(histories, k=55), ranker.rank(histories, k=55)
    assert (first.products == again.products).all()
    for products, scores in zip(first.products, first.scores, strict=True):
        there = products >= 0
        assert there[: there.sum()].all()
        assert (np.diff(scores[there]) <= 0).all()
        assert len(set(products[there])) == there.sum()


def test_what_is_saved_ranks_alike(sessions: Sessions, ranker: Ranker, tmp_path: Path) -> None:
    ranker.save(tmp_path / "ranker")
    loaded = Ranker.load(tmp_path / "ranker")
    histories = leave_one_out(sessions, "test").histories
    assert (loaded.rank(histories).products == ranker.rank(histories).products).all()
    assert loaded.config == ranker.config
    with (tmp_path / "ranker/model.txt").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="not those of its manifest"):
        Ranker.load(tmp_path / "ranker")


def test_a_source_alone_scores_as_the_baseline_does(sessions: Sessions, ranker: Ranker) -> None:
    split = leave_one_out(sessions, "test")
    alone = ranker.source_scores("transition", split.histories)
    expected = transition_scores(split.train, split.histories, NUM_PRODUCTS)
    np.testing.assert_allclose(alone.toarray(), expected.toarray(), atol=1e-12)


def test_recounting_changes_counts_alone(sessions: Sessions, ranker: Ranker) -> None:
    newer = ranker.recounted(leave_one_out(sessions, "test").before)
    assert newer.links["transition"].nnz > ranker.links["transition"].nnz
    assert newer.links["title"] is ranker.links["title"]
    assert newer.popularity.sum() == ranker.popularity.sum() + 500


def test_recommendations_are_new_to_the_user(ranker: Ranker) -> None:
    found = ranker.recommend(["p00", "nobody", "p06"], k=5)
    assert len(found) == 5
    assert not {"p00", "p06"} & {product for product, _ in found}
    with pytest.raises(UserError, match="none of its 1 ids is in the catalogue"):
        ranker.recommend(["nobody"])
    with pytest.raises(UserError, match="found none"):
        ranker.recommend([])
    for k in (0, -3):
        with pytest.raises(UserError, match=f"k {k}: expected at least 1"):
            ranker.recommend(["p00"], k=k)


def test_bad_input_is_refused(sessions: Sessions, ranker: Ranker) -> None:
    with pytest.raises(UserError, match="query 1: its history is empty"):
        ranker.rank(sequences_of([[1], []]))
    proposals = {"generator": sparse.csr_array((1, NUM_PRODUCTS))}
    with pytest.raises(UserError, match="fitted with proposals of: none; found: generator"):
        ranker.rank(sequences_of([[1]]), proposed=proposals)
    few = leave_one_out(sessions, "val")
    few = type(few)(
        train=few.train,
        before=few.before,
        queries=few.queries[:10],
        histories=few.histories.take(np.arange(10)),
        targets=few.targets[:10],
    )
    with pytest.raises(UserError, match="of 10 validation queries, expected 20 or more"):
        fit_ranker(few, sessions.product_ids, sessions.titles, CONFIG)
    with pytest.raises(UserError, match="--leaves 0: expected at least 1"):
        RankerConfig(leaves=0)


def test_the_program_measures_with_a_generator(
    sessions: Sessions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / "sessions"
    folder.mkdir()
    write_sessions(
        folder, products=sessions.products, sessions=sessions.table, config={}, counts={}
    )
    lists = tmp_path / "generator/lists"
    lists.mkdir(parents=True)
    found = [["p59", "p58", "gone"]] * 499
    table = pa.table(
        {
            "user_id": sessions.user_ids[:499],
            "item_ids": found,
            "scores": [[-1.0, -2.0, -3.0]] * 499,
        }
    )
    for held_out in ("val", "test"):
        pq.write_table(table, lists / f"{held_out}.parquet")
    ids = tmp_path / "ids"
    ids.mkdir()
    codes = [[item // 10, item % 10] for item in range(NUM_PRODUCTS)]
    pq.write_table(
        pa.table({"product_id": sessions.product_ids, "codes": codes}), ids / "products.parquet"
    )
    program = load_program("train/ranker.py")
    program.main(
        program.RankerTraining(
            sessions=folder,
            out=tmp_path / "out",
            generated=tmp_path / "generator",
            ids=ids,
            ranker=CONFIG,
        )
    )
    text = capsys.readouterr().out
    assert "unknown product id: 499" in text
    assert "user without a list: 1" in text
    assert "inflated by" in text
    assert "transition counts are features of hybrid" in text
    assert "hybrid - transition counts, seen kept, all: R@10 +" in text
    ranker = Ranker.load(tmp_path / "out/ranker")
    assert ranker.proposers == ("generator",)
    # Asked as it was fitted, it ranks what was generated among the rest.
    generated = [("p59", -1.0), ("p58", -2.0), ("gone", -3.0)]
    assert {"p59", "p58"} <= {
        id_ for id_, _ in ranker.recommend(["p00"], k=60, generated=generated)
    }
    with pytest.raises(UserError, match="fitted with proposals of: generator; found: none"):
        ranker.recommend(["p00"])


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def shop(sessions: Sessions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sessions with a video watched of each product before it is taken, and positions of lists."""
    folder = tmp_path_factory.mktemp("shop")
    rows = sessions.table["item_ids"].to_pylist()
    more = {
        "times": [[100 * place for place in range(len(own))] for own in rows],
        "content_ids": [[f"video of {item}" for item in own] for own in rows],
        "content_times": [[100 * place - 10 for place in range(len(own))] for own in rows],
        "positions": [[1 + row % 2] * len(own) for row, own in enumerate(rows)],
    }
    (folder / "sessions").mkdir()
    lists = {"item_ids": [["p00", "p01"]] * 300, "taken": [1, 1, 2] * 100, "shuffled": [True] * 300}
    write_sessions(
        folder / "sessions",
        products=sessions.products,
        sessions=pa.table({**{n: sessions.table[n] for n in ("user_id", "item_ids")}, **more}),
        displays=pa.table(lists),
        config={},
        counts={},
    )
    generator = np.random.default_rng(0)
    vectors = unit_rows(generator.standard_normal((NUM_PRODUCTS, 16)))
    write_embeddings(folder / "products", sessions.product_ids, vectors)
    names = [f"video of {item}" for item in sessions.product_ids]
    near = unit_rows(vectors + 0.1 * generator.standard_normal(vectors.shape))
    led = [[item] for item in sessions.product_ids]
    write_embeddings(folder / "contents", names, near, product_ids=led)
    # Runs that were stopped have no manifest of their own.
    made = Manifest(kind="generator", config={}, counts={}, fingerprint="made")
    other = Parent(kind="sessions", fingerprint="others", path="../../others")
    for name, parents in (("generated", []), ("of other sessions", [other])):
        (folder / name / "generator").mkdir(parents=True)
        write_manifest(folder / name / "generator", replace(made, parents=parents))
        (folder / name / "config.json").write_text('{"by": "leave-one-out"}')
    write_embeddings(folder / "others", names, near, product_ids=led, encoder="another")
    return folder


def test_the_program_takes_what_was_watched_and_weighs_positions(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_program("train/ranker.py")
    settings = {"sessions": shop / "sessions", "out": shop / "out", "ranker": CONFIG}
    program.main(
        program.RankerTraining(
            **settings, embeddings=(shop / "products",), contents=(shop / "contents",)
        )
    )
    text = capsys.readouterr().out
    assert "as weighed for: 1.00 0.50" in text
    figures = json.loads(text.splitlines()[-1])["seen kept"]
    assert figures["watched"]["R@5"] > 0.99
    assert figures["hybrid"]["R@5"] > 0.9 > figures["titles alone"]["R@5"]
    assert Ranker.load(shop / "out/ranker").proposers == ("watched",)
    parents = read_manifest(shop / "out/ranker").parents
    assert [parent.kind for parent in parents] == ["sessions", "embeddings", "embeddings"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"contents": ("contents",)}, "--contents: give --embeddings too"),
        ({"contents": ("others",), "embeddings": ("products",)}, "was embedded by another, and "),
        ({"contents": ("products",), "embeddings": ("products",)}, "none of them was watched"),
        ({"embeddings": ("contents",)}, "holds none of the products of p00 and others"),
        ({"embeddings": ("products", "products")}, "two folders called products"),
        (
            {"generated": "generated", "by": "time"},
            "held out by leave-one-out, and these are by time",
        ),
        ({"generated": "of other sessions"}, "was trained on sessions others, and "),
        ({"generated": "run"}, "run/lists/val.parquet: no such file"),
        ({"ids": "ids"}, "give --generated, too"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(
    shop: Path, tmp_path: Path, flags: dict[str, Any], complaint: str
) -> None:
    program = load_program("train/ranker.py")
    given = {
        name: tuple(shop / one for one in value)
        if isinstance(value, tuple)
        else (value if name == "by" else shop / value)
        for name, value in flags.items()
    }
    with pytest.raises(UserError, match=complaint):
        program.main(
            program.RankerTraining(
                sessions=shop / "sessions", out=tmp_path / "out", ranker=CONFIG, **given
            )
        )
