"""Places: local paths and URLs read alike, and a cache that several processes share."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import HttpServer, http_server, s3_server
from upath import UPath

from mmrec.data import storage
from mmrec.data.storage import (
    Slice,
    cache_folder,
    find_slice,
    is_file,
    is_remote,
    joined,
    list_files,
    local_copy,
    media_address,
    place,
    read_bytes,
    read_slice,
    replace_folder,
    write_bytes_whole,
)
from mmrec.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MMREC_CACHE_GB", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
def web(files: Path) -> Iterator[HttpServer]:
    with http_server(files) as server:
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as bucket:
        yield bucket


def cached(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


# Places


def test_paths_stay_paths_and_urls_do_not(tmp_path: Path) -> None:
    assert place("a/b") == place(Path("a/b")) == Path("a/b")
    assert place(str(tmp_path)) == place(f"file://{tmp_path}") == tmp_path
    for url in ("s3://bucket/a", "memory://a/b", "http://host:80/a", "https://host/a"):
        assert is_remote(place(url))
        assert str(place(url)) == str(place(url + "/")) == url
        assert str(place(url) / "c.tar") == f"{url}/c.tar"
        assert place(place(url)) == place(url)
        assert pickle.loads(pickle.dumps(place(url))) == place(url)
    assert not is_remote(place("C:/a"))


def test_a_url_that_was_read_as_a_path_is_one_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Path("s3://bucket/a")) == "s3:/bucket/a"
    assert str(place(Path("s3://bucket/a"))) == "s3://bucket/a"
    assert place(Path("file:///a/b")) == Path("/a/b")
    assert place(Path("no-protocol:/a")) == Path("no-protocol:/a")
    Path("s3:/bucket").mkdir(parents=True)
    assert place(Path("s3://bucket")) == Path("s3:/bucket")


def test_unknown_protocols_and_missing_packages() -> None:
    with pytest.raises(UserError, match="unknown protocol 'nope'"):
        place("nope://a")
    for url, package, extra in (
        ("s3://bucket", "s3fs", "s3"),
        ("gs://bucket", "gcsfs", "gcs"),
        ("https://host/a", "aiohttp", "http"),
    ):
        code = (
            f"import sys; sys.modules[{package!r}] = None\n"
            "from mmrec.data.storage import place\nfrom mmrec.errors import UserError\n"
            f"try: place({url!r})\nexcept UserError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"pip install 'mmrec[{extra}]'" in done.stdout, done.stderr


def test_what_is_written_down_is_found_from_where_it_was_written() -> None:
    assert joined(Path("/a/b"), "../c") == Path("/a/c")
    assert joined(Path("/a/b"), "/c") == Path("/c")
    assert str(joined(Path("/a/b"), "s3://bucket/c")) == "s3://bucket/c"
    assert str(joined(place("s3://bucket/a/b"), "../c.tar")) == "s3://bucket/a/c.tar"
    assert str(joined(place("s3://bucket/a"), "../../../c")) == "s3://bucket/c"
    assert str(joined(place("s3://bucket"), "c/./d")) == "s3://bucket/c/d"
    assert joined(place("s3://bucket/a"), "/c") == Path("/c")


def test_media_of_a_remote_table() -> None:
    assert media_address(Path("t"), "a/b.mp4") == "t/a/b.mp4"
    assert media_address(Path("t"), "http://host/b.mp4") == "http://host/b.mp4"
    root = place("https://host/t")
    assert media_address(root, "../m/b.mp4") == "https://host/m/b.mp4"
    assert media_address(root, "100% #1?.mp4") == "https://host/t/100%25%20%231%3F.mp4"
    assert media_address(root, "x y.tar#512+7") == "https://host/t/x%20y.tar#512+7"
    assert media_address(place("s3://b/t"), "100% #1.mp4") == "s3://b/t/100% #1.mp4"
    assert media_address(root, "/a/b.mp4") == "/a/b.mp4"


# Reading and writing


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_bytes_whole(path, b"one")
    write_bytes_whole(path, b"two")
    (tmp_path / "other").write_bytes(b"three")
    assert (read_bytes(path), is_file(path), is_file(path.parent)) == (b"two", True, False)
    write_bytes_whole(path, tmp_path / "other")
    assert path.read_bytes() == b"three"
    assert list_files(path.parent, "f*") == [path] == list(path.parent.iterdir())
    assert list_files(tmp_path / "nowhere", "*") == []
    assert local_copy(path) == path


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes_whole(path, b"old")
    with pytest.raises(FileNotFoundError):
        write_bytes_whole(path, tmp_path / "nowhere")
    assert [p.read_bytes() for p in tmp_path.iterdir() if p.is_file()] == [b"old"]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_bytes_whole(tmp_path / "file", b"new")
    assert list(tmp_path.glob("*file*")) == []


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_remote_stores(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue("s3") if kind == "s3" else f"memory://{tmp_path.name}"
    folder = place(root) / "a"
    assert isinstance(folder, UPath)
    assert not is_file(folder / "one")
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "one")
    assert list_files(folder, "*") == []
    write_bytes_whole(folder / "one", b"1")
    (tmp_path / "two").write_bytes(b"22")
    write_bytes_whole(folder / "two.tar", tmp_path / "two")
    assert read_bytes(folder / "one") == b"1"
    assert [str(path) for path in list_files(folder, "*.tar")] == [f"{folder}/two.tar"]
    assert (is_file(folder / "two.tar"), is_file(folder)) == (True, False)
    assert local_copy(folder / "two.tar").read_bytes() == b"22"
    assert read_slice(Slice(f"{folder}/two.tar", 1, 1)) == b"2"
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "three").write_bytes(b"3")
    (tmp_path / "new" / "last").write_bytes(b"")
    replace_folder(folder, tmp_path / "new", last="last")
    assert not is_file(folder / "one")
    assert read_bytes(folder / "deep" / "three") == b"3"


def test_an_s3_bucket_that_is_not_there(s3: str) -> None:
    assert not is_file(place("s3://mmrec-nowhere/a"))
    with pytest.raises(FileNotFoundError):
        local_copy(place("s3://mmrec-nowhere/a"))


def test_what_another_process_wrote_is_seen(s3: str) -> None:
    folder = place(f"{s3}/seen")
    write_bytes_whole(folder / "a", b"1")
    assert len(list_files(folder, "*")) == 1
    code = "import s3fs, sys; s3fs.S3FileSystem().pipe_file(sys.argv[1], b'2')"
    subprocess.run([sys.executable, "-c", code, f"{folder}/b"], check=True)
    assert len(list_files(folder, "*")) == 2
    assert read_bytes(folder / "b") == b"2"


def test_http(files: Path, web: HttpServer) -> None:
    (files / "a b.txt").write_bytes(b"hello")
    path = place(web.url) / "a b.txt"
    assert (is_file(path), read_bytes(path)) == (True, b"hello")
    assert not is_file(place(web.url) / "nowhere")
    assert list_files(place(web.url), "*.txt") == []
    with pytest.raises(UserError, match="cannot be written over HTTP"):
        write_bytes_whole(path, b"")
    (files / "x.tar").write_bytes(b"0123456789")
    before = len(web.requests)
    assert read_slice(Slice(f"{web.url}/x.tar", 3, 4)) == b"3456"
    assert len(web.requests) == before + 1
    with pytest.raises(EOFError, match="ends before byte 14"):
        read_slice(Slice(f"{web.url}/x.tar", 4, 10))


def test_a_server_that_is_gone_is_no_missing_file(files: Path) -> None:
    with http_server(files) as server:
        path = place(server.url) / "a"
    with pytest.raises(UserError, match="cannot be reached or read"):
        is_file(path)


def test_slices(tmp_path: Path) -> None:
    part = Slice("s3://b/x.tar", 512, 7)
    assert find_slice(str(part)) == part
    for whole in ("x.tar", "x.tar#5", "x.tar#5+", "x.mp4#5+6", "x.tar#5+6.mp4"):
        assert find_slice(whole) is None
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    assert read_slice(Slice(str(tmp_path / "x.tar"), 3, 4)) == b"3456"
    with pytest.raises(EOFError, match="ends before byte 11"):
        read_slice(Slice(str(tmp_path / "x.tar"), 3, 8))
    with pytest.raises(FileNotFoundError):
        read_slice(Slice(str(tmp_path / "nowhere.tar"), 0, 1))


# The cache


def test_a_file_is_fetched_once_until_it_changes(files: Path, web: HttpServer, cache: Path) -> None:
    (files / "x.tar").write_bytes(b"one")
    path = place(web.url) / "x.tar"
    copies = {local_copy(path) for _ in range(3)}
    assert [copy.read_bytes() for copy in copies] == [b"one"]
    assert web.count("GET", "x.tar") == 1
    assert next(iter(copies)).suffix == ".tar"
    (files / "x.tar").write_bytes(b"three")
    assert local_copy(path).read_bytes() == b"three"
    assert web.count("GET", "x.tar") == 2
    os.utime(files / "x.tar", (0, 0))
    local_copy(path)
    assert web.count("GET", "x.tar") == 3
    assert all(".part-" not in path.name for path in cached(cache))


def fetch(url: str, queue: "multiprocessing.SimpleQueue[bytes]") -> None:
    queue.put(hashlib.sha256(local_copy(place(url)).read_bytes()).digest())


def test_processes_and_threads_that_ask_at_once_fetch_once(files: Path, web: HttpServer) -> None:
    data = os.urandom(100_000)
    (files / "x.tar").write_bytes(data)
    url = f"{web.url}/x.tar"
    # A first request, so that the forked processes inherit a file system that is in use.
    assert is_file(place(url))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=fetch, args=(url, queue), daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    with ThreadPoolExecutor(4) as pool:
        found = [path.read_bytes() for path in pool.map(local_copy, [place(url)] * 8)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert set(found) == {data}
    assert {queue.get() for _ in workers} == {hashlib.sha256(data).digest()}
    assert web.count("GET", "x.tar") == 1


def test_those_used_longest_ago_make_room(
    files: Path, web: HttpServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMREC_CACHE_GB", "2500e-9")
    copies = []
    for number in range(2):
        (files / f"{number}.tar").write_bytes(bytes(1_000))
        copies.append(local_copy(place(f"{web.url}/{number}.tar")))
        os.utime(copies[-1], (number, number))
    used = local_copy(place(f"{web.url}/0.tar"))
    (files / "2.tar").write_bytes(bytes(1_000))
    third = local_copy(place(f"{web.url}/2.tar"))
    assert set(cached(cache)) == {used, third}
    # One that is larger than the whole cache is fetched all the same, alone.
    (files / "3.tar").write_bytes(bytes(9_000))
    large = local_copy(place(f"{web.url}/3.tar"))
    assert cached(cache) == [large]


def test_files_half_fetched_by_a_killed_process_go_in_the_end(
    files: Path, web: HttpServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMREC_CACHE_GB", "500e-9")
    fresh, stale = (cache_folder() / f"a.tar.part-{n}" for n in "12")
    for part in (fresh, stale):
        part.write_bytes(bytes(1_000))
    long_ago = time.time() - 200_000
    os.utime(stale, (long_ago, long_ago))
    (files / "x.tar").write_bytes(b"x")
    copy = local_copy(place(f"{web.url}/x.tar"))
    assert set(cached(cache)) == {fresh, copy}


def test_an_open_file_outlives_its_place_in_the_cache(
    files: Path, web: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMREC_CACHE_GB", "1e-9")
    (files / "a.tar").write_bytes(b"first")
    (files / "b.tar").write_bytes(b"second")
    with open(local_copy(place(f"{web.url}/a.tar")), "rb") as file:
        local_copy(place(f"{web.url}/b.tar"))
        assert file.read() == b"first"


def test_a_fetch_is_tried_again(
    files: Path, web: HttpServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (files / "x.tar").write_bytes(b"whole")
    web.cut = 2
    assert local_copy(place(f"{web.url}/x.tar")).read_bytes() == b"whole"
    assert web.count("GET", "x.tar") == 3
    (files / "y.tar").write_bytes(b"never whole")
    web.cut = 99
    with pytest.raises(UserError, match=r"y\.tar: cannot be reached or read"):
        local_copy(place(f"{web.url}/y.tar"))
    assert len(cached(cache)) == 1


@pytest.mark.parametrize("limit", ["0", "-1", "many", "nan"])
def test_a_limit_that_is_none(
    files: Path, web: HttpServer, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("MMREC_CACHE_GB", limit)
    (files / "x.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=f"MMREC_CACHE_GB={limit}: expected"):
        local_copy(place(f"{web.url}/x.tar"))


def test_the_cache_lies_at_home_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMREC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / ".cache" / "mmrec"
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="set MMREC_CACHE"):
        storage.cache_folder()
