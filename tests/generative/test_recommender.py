"""The recommender: what it never generates, what it says of bad requests, and that it finds its parts."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'mmrec[generative]'")

from mmrec import Recommender, cli
from mmrec.errors import UserError
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.semantic_ids import SemanticIdConfig, SemanticIds, build_ids
from mmrec.manifest import parent_of
from mmrec.model.encoder import Encoder, EncoderConfig

NAMES = [f"p{row}" for row in range(30)]
MODEL = GeneratorConfig(width=32, layers=1, heads=2, inner=48, max_items=5)


def unit_vectors(number: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((number, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, IDs and a generator, all untrained, beside each other."""
    root = tmp_path_factory.mktemp("recommender")
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))
    encoder.save(root / "encoder", parents=[])
    vectors = unit_vectors(30, encoder.width)
    made = build_ids(NAMES, vectors, SemanticIdConfig(levels=2, codebook_size=8))
    made.save(root / "ids", parents=[parent_of(root / "ids", root / "encoder", "encoder")])
    shape = GeneratorConfig(**{**MODEL.__dict__, "content_width": encoder.width})
    generator = Generator(shape, made.sizes, root=made.fingerprint)
    parents = [parent_of(root / "generator", root / "ids", "semantic_ids")]
    generator.save(root / "generator", parents=parents)
    more = made.extended(["new"], unit_vectors(1, encoder.width, 9))
    more.save(root / "more", parents=[parent_of(root / "more", root / "encoder", "encoder")])
    other = build_ids(NAMES, unit_vectors(30, encoder.width, 5), SemanticIdConfig(codebook_size=8))
    other.save(root / "other")
    return root


@pytest.fixture(scope="module")
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder / "generator")


def ids_of(found: object) -> list[str]:
    return [one.product_id for one in found]  # pyright: ignore


def test_a_history_leads_to_the_most_probable_products(recommender: Recommender) -> None:
    found = recommender.recommend(["p3", "nowhere", "p8"], k=6)
    assert found.unknown_items == 1
    codes = torch.from_numpy(recommender.ids.codes).long()
    scores = recommender.generator.score([codes[[3, 8]]], codes)[0]
    best = scores.argsort(descending=True)[:6]
    assert ids_of(found) == [NAMES[row] for row in best.tolist()]
    assert [one.score for one in found] == pytest.approx(scores[best].tolist(), abs=1e-4)


def test_an_unavailable_product_is_never_generated(folder: Path) -> None:
    recommender = Recommender.load(folder / "generator")
    gone = ids_of(recommender.recommend(["p1"], k=10))
    recommender.set_unavailable(gone)
    assert len(recommender) == 20
    found = ids_of(recommender.recommend([*gone[:2], "p1"], k=30))
    assert sorted(found) == sorted(set(NAMES) - set(gone))
    recommender.use(SemanticIds.load(folder / "more"))
    found = ids_of(recommender.recommend(["p1"], k=31))
    assert sorted(found) == sorted({*NAMES, "new"} - set(gone))
    recommender.set_unavailable([])
    assert len(recommender.recommend(["p1"], k=40)) == 31
    with pytest.raises(UserError, match="without an ID in this catalogue: 'q'"):
        recommender.set_unavailable(["q"])
    with pytest.raises(UserError, match="no product is available"):
        recommender.set_unavailable([*NAMES, "new"])
    assert len(recommender) == 31


def test_seen_products_can_be_left_out(recommender: Recommender) -> None:
    first = ids_of(recommender.recommend(["p1", "p2"], k=30))
    fresh = ids_of(recommender.recommend(["p1", "p2"], k=28, seen=False))
    assert fresh == [name for name in first if name not in ("p1", "p2")]


def test_contents_are_embedded_by_the_encoder_of_the_ids(
    recommender: Recommender, tmp_path: Path
) -> None:
    from PIL import Image

    pictures = []
    for number, color in enumerate(("red", "navy")):
        pictures.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 40), color).save(pictures[-1])
    red = recommender.recommend(images=pictures[:1], k=30)
    both = recommender.recommend(["p4"], images=pictures[:1], title="a red thing", k=30)
    assert sorted(ids_of(red)) == sorted(ids_of(both)) == sorted(NAMES)
    assert [one.score for one in red] != pytest.approx([one.score for one in both])
    vector = recommender.embed(images=pictures[:1])
    assert float(vector.norm()) == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(vector, recommender.embed(images=pictures[1:]))
    with pytest.raises(UserError, match=r"missing\.mp4"):
        recommender.recommend(video=tmp_path / "missing.mp4")


def test_bad_requests_are_one_line(recommender: Recommender, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to go by: it is empty"):
        recommender.recommend([])
    with pytest.raises(UserError, match="none of its 2 products has an ID"):
        recommender.recommend(["x", "y"])
    with pytest.raises(UserError, match="expected at least 1"):
        recommender.recommend(["p1"], k=0)
    for bad in (0, -7):
        with pytest.raises(
            UserError, match=f"num_beams {bad}: expected at least 1, a whole number"
        ):
            recommender.recommend(["p1"], num_beams=bad)
    with pytest.raises(UserError, match="history 'p1': expected a list of product ids"):
        recommender.recommend("p1")
    with pytest.raises(UserError, match="it is empty"):
        recommender.recommend(None)
    with pytest.raises(UserError, match=r"k 2.5: expected at least 1, a whole number"):
        # Tests check every argument's type, and would refuse this one on their own.
        inspect.unwrap(Recommender.recommend)(recommender, ["p1"], k=2.5)  # pyright: ignore
    with pytest.raises(UserError, match="and the generator learned"):
        Recommender.load(folder / "generator", ids=folder / "other")
    with pytest.raises(UserError, match="expected generator, found semantic_ids"):
        Recommender.load(folder / "ids")
    torch.manual_seed(1)
    another = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))
    another.save(tmp_path / "encoder", parents=[])
    with pytest.raises(UserError, match=r"were cut from embeddings of encoder .*, and this one is"):
        Recommender.load(folder / "generator", encoder=tmp_path / "encoder")
    with pytest.raises(UserError, match=r"these semantic IDs grew from .*, and the generator"):
        recommender.use(SemanticIds.load(folder / "other"))


def test_the_command_prints_json(
    folder: Path, recommender: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    away = tmp_path / "away.txt"
    away.write_text("p0\np5\n\n")
    cli.recommend(
        generator=folder / "generator", history=("p1", "z"), k=28, unavailable=away, json=True
    )
    printed = json.loads(capsys.readouterr().out)
    names = [one["product_id"] for one in printed["recommendations"]]
    assert printed["unknown_items"] == 1
    assert sorted(names) == sorted(set(NAMES) - {"p0", "p5"})
    cli.recommend(generator=folder / "generator", history=("p1", "z"), k=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "products of the history without an ID, left out: 1"
    assert [line.split()[-1] for line in lines[1:]] == ids_of(recommender.recommend(["p1"], k=2))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            (),
            "error: the history gives nothing to go by: it is empty; give known products or a content",
        ),
        (
            ("--history", "x", "y"),
            "error: the history gives nothing to go by: none of its 2 products has an ID",
        ),
        (
            ("--history", "p1", "--ids", "other"),
            "error: {folder}/other: these semantic IDs grew from",
        ),
        (("--history", "p1", "--ids", "nowhere"), "error: {folder}/nowhere"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    folder: Path, flags: tuple[str, ...], line: str, monkeypatch: Any, capsys: Any
) -> None:
    given = [str(folder / flag) if flag in ("other", "nowhere") else flag for flag in flags]
    command = ["mmrec", "recommend", "--generator", str(folder / "generator"), *given]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(line.format(folder=folder))
    assert printed.err.count("\n") == 1
