"""`mmrec index build` with a recall target, from embeddings of a tiny catalogue."""

import json
from pathlib import Path

import pytest

from mmrec import ProductIndex, cli
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.retrieval.embed import embed_shards


@pytest.fixture(scope="module")
def contents(index: Path, tiny_shards: Path) -> Path:
    """Embeddings of the validation contents."""
    out = index.parent / "val-contents"
    embed_shards(index.parent / "train/encoder", tiny_shards, out, split="val")
    return out


def test_an_index_tuned_by_the_command_line(
    index: Path, contents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = index.parent / "tuned"
    embeddings = index.parent / "embeddings"
    cli.index_build(
        embeddings=embeddings,
        out=out,
        recall_target=0.95,
        memory_budget="1MB",
        queries=contents,
        k=3,
    )
    printed = capsys.readouterr().out
    assert "all others: left out: 12 products are few" in printed
    assert "taken: Flat: recall@3 1.0000" in printed
    manifest = read_manifest(out)
    frontier = json.loads((out / "frontier.json").read_text())
    assert manifest.details["tuning"] == frontier
    assert manifest.config["goal"]["memory_budget"] == 1_000_000
    assert (out / "frontier.png").is_file()
    assert len(ProductIndex.load(out)) == 12
    # Another build is another index: what was measured of the first goes with it.
    cli.index_build(embeddings=embeddings, out=out, overwrite=True)
    assert not list(out.glob("frontier.*"))


def test_queries_must_be_contents(
    index: Path, contents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, embeddings = index.parent / "never", index.parent / "embeddings"
    with pytest.raises(UserError, match="give --queries DIR, embeddings of contents"):
        cli.index_build(embeddings=embeddings, out=out, recall_target=0.9)
    with pytest.raises(UserError, match="holds products, as the index does; tune with contents"):
        cli.index_build(embeddings=embeddings, out=out, recall_target=0.9, queries=embeddings)
    with pytest.raises(UserError, match="go with --recall-target"):
        cli.index_build(embeddings=embeddings, out=out, queries=contents)
    with pytest.raises(UserError, match="chooses the factory; leave out --factory"):
        cli.index_build(embeddings=embeddings, out=out, recall_target=0.9, factory="HNSW32")
    with pytest.raises(UserError, match="fits a memory budget of 1,000 bytes"):
        cli.index_build(
            embeddings=embeddings, out=out, recall_target=0.9, queries=contents, memory_budget="1K"
        )
    assert not out.exists()
    cli.index_build(embeddings=embeddings, out=out, recall_target=0.9, queries=Path("catalogue"))
    assert "recall of contents will be lower" in capsys.readouterr().out


def test_queries_of_another_encoder_are_refused(
    index: Path, contents: Path, tmp_path: Path
) -> None:
    text = (contents / "manifest.json").read_text()
    parent = read_manifest(contents).parent("encoder")
    assert parent
    foreign = contents.parent / f"foreign-{tmp_path.name}"
    foreign.mkdir()
    for part in contents.iterdir():
        if part.name != "manifest.json":
            (foreign / part.name).symlink_to(part)
    (foreign / "manifest.json").write_text(text.replace(parent.fingerprint, "f" * 16))
    with pytest.raises(
        UserError, match=f"made by encoder {'f' * 16}, and .* by {parent.fingerprint}"
    ):
        cli.index_build(
            embeddings=index.parent / "embeddings",
            out=index.parent / "never-either",
            recall_target=0.9,
            queries=foreign,
        )
