"""The notebook runs from top to bottom on a tiny index, and shows what it promises."""

from pathlib import Path

import nbformat
from conftest import ROOT
from nbclient import NotebookClient


def test_the_query_notebook_runs(index: Path, tiny_tables: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMREC_INDEX", str(index))
    monkeypatch.setenv("MMREC_TABLES", str(tiny_tables))
    notebook = nbformat.read(ROOT / "index/query.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": ROOT / "index"}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("data:image/jpeg;base64" in page for page in pages)
    assert any("<table" in page for page in pages)
