"""The notebooks run from top to bottom on a tiny index, and show what they promise."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT, load_program
from nbclient import NotebookClient

from mmrec.manifest import parent_of

NAMES = ("query", "explore", "compare_encoders", "recommend")


@pytest.fixture(scope="module")
def recommending(index: Path, tiny_tables: Path) -> dict[str, Path]:
    """Sessions on the tiny tables, and a generator of the tiny catalogue's IDs that has learned nothing."""
    from mmrec.generative.generator import Generator, GeneratorConfig
    from mmrec.generative.semantic_ids import SemanticIds

    root = index.parent / "recommending"
    sessions = load_program("data_prep/content_sessions.py")
    sessions.main(
        sessions.ContentSessionsConfig(
            tables=tiny_tables, out=root / "sessions", num_users=30, max_events=6
        )
    )
    cutting = load_program("train/semantic_ids.py")
    config = cutting.SemanticIdConfig(codebook_size=4, levels=2)
    embeddings = index.parent / "embeddings"
    cutting.main(cutting.SemanticIdsProgram(embeddings=embeddings, out=root / "ids", ids=config))
    ids = SemanticIds.load(root / "ids")
    width = ids.codebook.width
    shape = GeneratorConfig(width=32, layers=1, heads=2, inner=48, content_width=width)
    parents = [parent_of(root / "generator", root / "ids", "semantic_ids")]
    Generator(shape, ids.sizes, root=ids.root).save(root / "generator", parents=parents)
    return {name: root / name for name in ("sessions", "generator")}


@pytest.fixture(scope="module")
def notebooks(
    index: Path, tiny_tables: Path, tiny_shards: Path, recommending: dict[str, Path]
) -> dict[str, Any]:
    """All of them after a run in one kernel, which forgets its variables between them."""
    read = {n: nbformat.read(ROOT / f"index/{n}.ipynb", as_version=4) for n in NAMES}
    together = nbformat.v4.new_notebook()
    for own in read.values():
        together.cells += [*own.cells, nbformat.v4.new_code_cell("%reset -f")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMREC_INDEX", str(index))
        patch.setenv("MMREC_TABLES", str(tiny_tables))
        patch.setenv("MMREC_SHARDS", str(tiny_shards))
        patch.setenv("MMREC_ENCODER", str(index.parent / "train/encoder"))
        for name, folder in recommending.items():
            patch.setenv(f"MMREC_{name.upper()}", str(folder))
        patch.delenv("MMREC_OTHER_ENCODER", raising=False)
        resources = {"metadata": {"path": ROOT / "index"}}
        NotebookClient(together, timeout=120, resources=resources).execute()
    return read


def outputs(notebook: Any, kind: str) -> list[str]:
    """What cells showed, of one kind such as text/html."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in shown if kind in output.get("data", {})]


def test_nothing_is_warned_of(notebooks: dict[str, Any]) -> None:
    cells = [cell for notebook in notebooks.values() for cell in notebook.cells]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []


def test_the_query_notebook_shows_galleries_reasons_tables_and_a_figure(
    notebooks: dict[str, Any],
) -> None:
    pages = outputs(notebooks["query"], "text/html")
    assert sum("data:image/jpeg;base64" in page for page in pages) == 5
    assert any("What the score loses without each frame" in page for page in pages)
    assert any("<table" in page for page in pages)
    assert outputs(notebooks["query"], "image/png")


def test_the_explore_notebook_shows_maps_and_gaps(notebooks: dict[str, Any]) -> None:
    pages = outputs(notebooks["explore"], "text/html")
    assert sum("class='field'" in page for page in pages) == 2
    assert outputs(notebooks["explore"], "image/png")
    texts = outputs(notebooks["explore"], "text/plain")
    assert sum(text.startswith("ModalityGap(distance=") for text in texts) == 2


def test_the_comparison_notebook_shows_figures_and_queries(notebooks: dict[str, Any]) -> None:
    pages = outputs(notebooks["compare_encoders"], "text/html")
    assert any("chance</" in page or "may be chance" in page for page in pages)
    assert any("right at place" in page for page in pages)


def test_the_recommending_notebook_shows_pictures_codes_and_both_levels(
    notebooks: dict[str, Any],
) -> None:
    pages = outputs(notebooks["recommend"], "text/html")
    assert sum("data:image/jpeg;base64" in page for page in pages) == 2
    assert any("codes" in page and "recommended" in page for page in pages)
    assert any("product found" in page and "ID found" in page for page in pages)
    printed = [
        o["text"] for c in notebooks["recommend"].cells for o in c.get("outputs", []) if "text" in o
    ]
    assert any("the history gives nothing to go by: it is empty" in text for text in printed)
    assert any("transition counts" in text and "inflated by" in text for text in printed)
