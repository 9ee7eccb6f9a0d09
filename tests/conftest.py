"""Shapes and types are checked in every test, and what many tests need is made once."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from forked_training import TrainingServer

install_import_hook("mmrec", "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kills 100` breaks off preparation, training and writers of an index more often than a quick run.

    `--seconds 3600` reads an index for so long while it is changed.
    """
    parser.addoption("--kills", type=int, default=4, help="kills of a program (default 4)")
    parser.addoption(
        "--requests", type=int, default=100, help="generated requests to the service (default 100)"
    )
    parser.addoption(
        "--seconds", type=float, default=3, help="of reading beside a writer (default 3)"
    )


def load_program(path: str) -> ModuleType:
    """Import a stage program by its path from the root: stage folders are no packages."""
    name = "program_" + Path(path).stem
    if name not in sys.modules:
        spec = util.spec_from_file_location(name, ROOT / path)
        assert spec
        assert spec.loader
        module = util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the root of the repository, its output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="session")
def tiny_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve generated products and forty mp4 clips."""
    out = tmp_path_factory.mktemp("tiny") / "tables"
    program = ROOT / "data_prep/synthetic.py"
    sizes = "--num-products 12 --num-contents 40 --clip-frames 6 --clip-size 64 --num-workers 1"
    done = run(sys.executable, program, "--out", out, *sizes.split())
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_shards(tiny_tables: Path) -> Path:
    """The same as shards, in several small tars."""
    out = tiny_tables.parent / "shards"
    program = ROOT / "data_prep/make_shards.py"
    sizes = "--size 64 --num-frames 4 --samples-per-shard 8 --num-workers 1"
    done = run(sys.executable, program, "--tables", tiny_tables, "--out", out, *sizes.split())
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Real data that lies beside a checkout in some places; a test without it is skipped."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"the real data set {name} is not beside this checkout")
        return folder

    return find


@pytest.fixture(scope="session")
def trained(tiny_shards: Path) -> Path:
    """A run folder: a tiny encoder trained for two epochs with `accelerate launch`."""
    out = tiny_shards.parent / "train"
    flags = "--encoder.image-size 32 --sampler.batch-size 8 --epochs 2 --num-workers 0"
    done = run(
        Path(sys.executable).parent / "accelerate",
        *[
            "launch",
            "--quiet",
            "--config_file",
            "accelerate_config.yaml",
            "train/contrastive.py",
            "demo",
        ],
        *("--shards", tiny_shards, "--out", out, "--log-every", "1", *flags.split()),
    )
    assert done.returncode == 0, done.stderr
    return out


def reset_accelerate() -> None:
    """Accelerate keeps its state in singletons; runs in one process start from none."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """The state of accelerate is reset after the test."""
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def server() -> Iterator["TrainingServer"]:
    """Starts training in forks of a process that has imported everything, once for all tests."""
    from forked_training import TrainingServer

    with TrainingServer() as server:
        yield server


@pytest.fixture(scope="session")
def index(trained: Path, tiny_shards: Path) -> Path:
    """An index of the tiny catalogue, built by the command line's own functions."""
    from mmrec import cli

    embeddings, out = trained.parent / "embeddings", trained.parent / "index"
    cli.embed(encoder=trained / "encoder", shards=tiny_shards, out=embeddings)
    cli.index_build(embeddings=embeddings, out=out)
    return out


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine with two workers, which find the tests' own modules."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'mmrec[ray]'")
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()
