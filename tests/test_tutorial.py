"""The tutorial's ten commands, read out of the page and run in their order on a small folder."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, load_program

from mmrec import cli

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The commands in the page's shell blocks, as a shell would split them."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture
def own_folder(tiny_tables: Path, tmp_path: Path) -> Path:
    """`my/`, as somebody would bring it, in a folder that has the clone's programs."""
    my = tmp_path / "my"
    my.mkdir()
    for name in ("data_prep", "train", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    products = pq.read_table(tiny_tables / "products.parquet").to_pylist()
    contents = pq.read_table(tiny_tables / "contents.parquet").to_pylist()
    links = pq.read_table(tiny_tables / "links.parquet").to_pylist()
    for row in products:
        row["images"] = "|".join(taken(tiny_tables, my / "images", path) for path in row["images"])
    for row in contents:
        row["video"] = taken(tiny_tables, my / "videos", row["video"])
    kept = {
        "products": [
            _kept(row, "product_id", "title", "images", "category", "price") for row in products
        ],
        "contents": [_kept(row, "content_id", "title", "video") for row in contents],
        "links": [_kept(row, "content_id", "product_id") for row in links],
    }
    for name, rows in kept.items():
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), my / f"{name}.csv")
    shutil.copy(my / contents[0]["video"], my / "videos/new.mp4")
    (my / "sold-out.txt").write_text(products[0]["product_id"] + "\n")
    return tmp_path


def taken(tables: Path, folder: Path, path: str) -> str:
    """Copy a file of the tables, and return its path from the folder above."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tables / path, folder)
    return f"{folder.name}/{Path(path).name}"


def _kept(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def run(words: list[str]) -> None:
    """Run a command of the page: here, where torch is imported already, if it starts no other process."""
    if words[0] == "accelerate":  # The launcher's own flags end where the program begins.
        program = load_program("train/contrastive.py")
        flags = words[words.index("train/contrastive.py") + 1 :]
        cli.run_program(lambda: program.main(program.parse(flags)))
    elif words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True)
    else:
        assert words[0] == "mmrec"
        sys.argv = words
        cli.main()


def test_the_page_has_ten_commands() -> None:
    assert len(commands()) == 10
    assert re.findall(r"^\*\*(\d+)\.\*\*", PAGE, re.M) == [str(n) for n in range(1, 11)]


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_commands_lead_to_matches(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own_folder)
    monkeypatch.setattr(sys, "argv", [])
    printed = []
    for words in commands():
        run(words)
        printed.append(capsys.readouterr().out)
    assert (own_folder / "runs/my/sheet.html").is_file()
    assert "R@1" in printed[3]
    assert "title overlap" in printed[3]
    assert "embedded 12 items" in printed[4]
    first = printed[6].splitlines()
    assert len(first) >= 5
    assert re.search(r"\b0\.\d{3}\b", first[0])
    found = json.loads(printed[7])
    assert found["matches"]
    assert all(match["attributes"]["price"] < 30 for match in found["matches"])
    assert "deleted 1; runs/my/index holds 11" in printed[8]
    assert printed[9].startswith("index ")
    for kind in ("embeddings", "encoder", "shards"):
        assert re.search(rf"^ +{kind}  ", printed[9], re.M)


def test_links_of_the_page_lead_somewhere() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
