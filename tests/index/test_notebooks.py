"""The notebooks run from top to bottom on a tiny index, and show what they promise."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NAMES = ("query", "explore", "compare_encoders")


@pytest.fixture(scope="module")
def notebooks(index: Path, tiny_tables: Path, tiny_shards: Path) -> dict[str, Any]:
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
        patch.delenv("MMREC_OTHER_ENCODER", raising=False)
        resources = {"metadata": {"path": ROOT / "index"}}
        NotebookClient(together, timeout=120, resources=resources).execute()
    return read


def outputs(notebook: Any, kind: str) -> list[str]:
    """What cells showed, of one kind such as text/html."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in shown if kind in output.get("data", {})]


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
