"""verify_shards: what is whole passes, and every way of tampering is told by the claim that it breaks."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_shards import make_small_shards

from mmrec import cli
from mmrec.data.foreign import ForeignMapping, index_tars
from mmrec.data.shards import ShardReader, ShardSample, index_path, index_shard, write_shard
from mmrec.data.storage import place, write_bytes_whole
from mmrec.data.verification import verify_shards
from mmrec.errors import UserError
from mmrec.manifest import fingerprint_of, hash_file, read_manifest

Samples = list[ShardSample]
CLAIMS = [
    *("tars", "fingerprint", "indexes", "samples", "pictures", "keys", "catalogue", "links"),
    *("inline products", "samples.parquet", "drops", "split train", "split val", "split test"),
    *("products", "totals", "contents", "near duplicates", "cold products"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Shards of some settings, made once."""
    found: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        name = str(settings)
        if name not in found:
            found[name] = make_small_shards(tmp_path_factory.mktemp("small"), **settings)
        return found[name]

    return make


@pytest.fixture
def shards(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy to tamper with: products 3 a tar, p3 held out of training, splits by a hash."""
    source = made(samples_per_shard=3, cold_products=0.3, val=0.0, test=0.15)
    return shutil.copytree(source, tmp_path / "shards")


def differing(folder: Path) -> dict[str, str]:
    return {check.claim: check.detail for check in verify_shards(folder) if check.holds is False}


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def forge_fingerprint(folder: Path) -> None:
    """What a careful forger does: only what is deeper than the fingerprint can tell."""
    tars = {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*.tar")}
    edit_manifest(folder, lambda manifest: manifest.update(fingerprint=fingerprint_of(tars)))


def rewrite(tar: Path, change: Callable[[Samples], Samples]) -> None:
    """Write a tar and its index anew with other samples, and a fingerprint that fits."""
    write_shard(tar, change(list(read_samples(tar))))
    forge_fingerprint(tar.parents[1])


def read_samples(tar: Path) -> Iterator[ShardSample]:
    reader = ShardReader([tar], "contents")
    for row, key in enumerate(reader.keys):
        members = {n: data for n, data in reader.read(row).items() if n != "json"}
        yield ShardSample(key, members, reader.meta(row))


def flip(tar: Path, sample: int, member: str, at: int) -> None:
    """Change one byte of a member where it lies."""
    index = pq.read_table(index_path(tar)).slice(sample, 1).to_pylist()[0]
    data = bytearray(tar.read_bytes())
    data[index["offsets"][index["names"].index(member)] + at] ^= 0xFF
    tar.write_bytes(bytes(data))


# What is whole


@pytest.mark.parametrize(
    ("settings", "held_out", "straddling"),
    [
        ({"samples_per_shard": 3, "cold_products": 0.3, "val": 0.0, "test": 0.15}, 2, 0),
        ({"near_duplicates": "allow", "val": 0.0, "test": 0.5}, 0, 2),
    ],
)
def test_whole_shards_hold_every_claim(made, settings, held_out, straddling):
    checks = {check.claim: check for check in verify_shards(made(**settings))}
    assert list(checks) == [claim for claim in CLAIMS if claim != "split val"]
    assert [check.line() for check in checks.values() if check.holds is not True] == []
    # p15 is held out, too, though its images were lost.
    asked = settings.get("cold_products", 0.0)
    assert f"asked {asked}, held out {held_out}," in checks["cold products"].detail
    assert checks["near duplicates"].detail == f"groups 1, contents 3, straddling {straddling}"


@pytest.mark.parametrize(
    ("column", "first", "spans"),
    [
        (
            "day",
            "2024-01-11",
            "train 2024-01-01 to 2024-01-07, val 2024-01-11 to 2024-01-12, test 2024-01-04 to 2024-01-14",
        ),
        ("level", "10.5", "train 0.5 to 6.5, val 10.5 to 11.5, test 3.5 to 13.5"),
    ],
)
def test_splits_in_order_of_a_column(made, column, first, spans):
    check = verify_shards(made(split_by=column, val=0.2, test=0.2))[-1]
    assert check.line() == f"ok      split by {column}: held out from {first}, too late 0: {spans}"


def test_generated_shards_in_several_tars(tiny_shards):
    checks = verify_shards(tiny_shards)
    assert [check.claim for check in checks] == CLAIMS
    assert all(check.holds for check in checks), [check.line() for check in checks]


def test_shards_at_a_url(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    remote = place(f"memory://{tmp_path.name}/shards")
    for path in shards.rglob("*.*"):
        write_bytes_whole(remote / path.relative_to(shards).as_posix(), path)
    assert [check.line() for check in verify_shards(remote) if not check.holds] == []
    (remote / "contents/train-000000.tar").unlink()
    found = {check.claim: check.detail for check in verify_shards(remote) if not check.holds}
    assert found["tars"] == "contents/train-000000.tar is not there"


def test_shards_of_a_version_without_claims_and_facts(shards):
    edit_manifest(shards, lambda m: [m["details"].pop(n) for n in ("claims", "files", "facts")])
    edit_manifest(shards, lambda m: m["config"].pop("near_duplicates"))
    (shards / "samples.parquet").unlink()
    checks = verify_shards(shards)
    unclaimed = [check.claim for check in checks if check.holds is None]
    assert unclaimed == ["samples.parquet", "near duplicates", "cold products"]
    assert differing(shards) == {}


# Tampering


def test_a_flipped_byte_of_a_frame(shards):
    flip(shards / "contents/train-000000.tar", 0, "f01.jpg", 0)
    found = differing(shards)
    assert {"fingerprint", "pictures"} <= set(found)
    assert "f01.jpg does not decode" in found["pictures"]
    assert "contents/train-000000.tar: sample '000000000'" in found["pictures"]


def test_a_flipped_byte_of_an_inline_product_image(shards):
    flip(shards / "contents/test-000000.tar", 1, "p0.i0.jpg", 700)
    forge_fingerprint(shards)
    found = differing(shards)
    assert list(found) == ["inline products"]
    assert "images of product" in found["inline products"]


def test_a_flipped_byte_of_the_catalogue(shards):
    flip(shards / "products/catalog-000000.tar", 2, "i0.jpg", 1)
    assert {"fingerprint", "pictures", "inline products"} <= set(differing(shards))


def test_tars_that_changed_places(shards):
    one, other = (shards / f"contents/test-00000{number}.tar" for number in (0, 1))
    for path, twin in ((one, other), (index_path(one), index_path(other))):
        aside = path.with_name("aside")
        path.rename(aside)
        twin.rename(path)
        aside.rename(twin)
    found = differing(shards)
    assert set(found) == {"fingerprint", "samples.parquet"}
    forge_fingerprint(shards)
    assert set(differing(shards)) == {"samples.parquet"}


def test_a_tar_without_its_own_index(shards):
    one, other = (shards / f"contents/test-00000{number}.tar" for number in (0, 1))
    shutil.copyfile(index_path(one), index_path(other))
    assert "test-000001.tar has other key than the tar" in differing(shards)["indexes"]


def test_an_index_with_other_weights(shards):
    tar = shards / "contents/train-000000.tar"
    table = index_shard(tar)
    weights = table["weights"].to_pylist()
    weights[1] = [99.0]
    column = table.schema.get_field_index("weights")
    field = table.schema.field(column)
    changed = table.set_column(column, field, [weights])
    pq.write_table(changed, index_path(tar))
    found = differing(shards)
    assert set(found) == {"indexes"}
    assert "other weights than the tar for sample '000000001'" in found["indexes"]


def test_a_content_copied_into_another_split(shards):
    stolen = next(read_samples(shards / "contents/test-000000.tar"))
    copy = ShardSample("000000099", stolen.members, stolen.meta)
    rewrite(shards / "contents/train-000001.tar", lambda samples: [*samples, copy])
    found = differing(shards)
    name = stolen.meta["content_id"]
    assert found["contents"] == f"content '{name}' is in train and test"
    assert found["near duplicates"] == "1 contents look like one of a later split"
    assert {"split train", "totals", "samples.parquet"} <= set(found)
    assert "fingerprint" not in found


def test_a_content_twice_in_one_split(shards):
    first = next(read_samples(shards / "contents/train-000000.tar"))
    rewrite(shards / "contents/train-000001.tar", lambda samples: [*samples, first])
    found = differing(shards)
    name = first.meta["content_id"]
    assert found["contents"] == f"content '{name}' is in train and train"
    assert found["keys"] == "'000000000' occurs 2 times in train"


def test_a_near_duplicate_moved_into_training(shards):
    """Under another id, with counts that fit: its pictures tell."""

    def renamed(samples: Samples) -> Samples:
        meta = dict(copy.meta) | {"content_id": samples[0].meta["content_id"]}
        return [ShardSample(samples[0].key, copy.members, meta), *samples[1:]]

    copy = next(s for s in all_samples(shards, "test") if s.meta["content_id"] == "c9")
    rewrite(shards / "contents/train-000000.tar", renamed)
    found = differing(shards)
    assert found["near duplicates"] == "1 contents look like one of a later split"


def all_samples(folder: Path, split: str) -> Iterator[ShardSample]:
    for tar in sorted(folder.glob(f"contents/{split}-*.tar")):
        yield from read_samples(tar)


def test_a_product_held_out_linked_in_training(shards):
    def linked(samples: Samples) -> Samples:
        samples[0].meta["products"].append(  # pyright: ignore
            {"product_id": "p3", "title": "Product <3>", "weight": 0.1, "num_images": 0}
        )
        return samples

    rewrite(shards / "contents/train-000000.tar", linked)
    assert differing(shards)["cold products"] == "1 training links lead to products held out"


def test_a_late_content_in_training(made, tmp_path):
    shards = shutil.copytree(made(split_by="day", val=0.2, test=0.2), tmp_path / "shards")

    def later(samples: Samples) -> Samples:
        samples[0].meta["attributes"]["day"] = "2024-01-12"  # pyright: ignore
        return samples

    rewrite(shards / "contents/train-000000.tar", later)
    # It also moves the place from which the last ones are held out.
    found = differing(shards)
    assert set(found) == {"split by day"}
    assert found["split by day"] == "1 training contents are not before 2024-01-12"


@pytest.mark.parametrize(
    ("change", "claim", "detail"),
    [
        (
            lambda m: m["details"]["splits"]["train"].update(links=6),
            "split train",
            "the manifest says links 6, the tars 5",
        ),
        (lambda m: m["details"].update(warm_products=4), "products", "warm products 4, the tars 2"),
        (
            lambda m: m["counts"]["in"].update(links=9),
            "drops",
            "links: 9 came in, 13 went out, and 1 were lost",
        ),
        (
            lambda m: m["counts"]["in"].update(products=7, contents=13),
            "drops",
            "products: 7 came in, 5 went out, and 1 were lost (and 1 more)",
        ),
        (
            lambda m: m["counts"]["dropped"].update({"no link": 2}),
            "drops",
            "the manifest counts no link 2, ",
        ),
        (
            lambda m: m["details"]["claims"]["near_duplicates"].update(groups=0),
            "near duplicates",
            "the manifest says groups 0, the tars 1",
        ),
        (
            lambda m: m["details"]["claims"]["cold_products"].update(held_out=9),
            "cold products",
            "the manifest says held out 9, the tars 2",
        ),
        (
            lambda m: m["details"]["claims"]["contents"].update(in_two_splits=1),
            "contents",
            "the manifest says 1 in two splits, the tars 0",
        ),
        (lambda m: m["details"]["claims"].pop("cold_products"), "cold products", "held out None"),
        (
            lambda m: m["details"]["claims"]["cold_products"].update(asked=0.5),
            "cold products",
            "the manifest says asked 0.5, the tars 0.3",
        ),
        (
            lambda m: m["details"]["facts"].pop("samples.parquet"),
            "samples.parquet",
            "the manifest has no hash of samples.parquet",
        ),
        (lambda m: m.update(fingerprint="0" * 16), "fingerprint", "the manifest says 0000"),
    ],
)
def test_an_edited_manifest(shards, change, claim, detail):
    edit_manifest(shards, change)
    found = differing(shards)
    assert set(found) == {claim}
    assert detail in found[claim]


def test_totals_that_were_edited(shards):
    edit_manifest(shards, lambda m: m["counts"]["out"].update(links=9))
    found = differing(shards)
    assert set(found) == {"totals", "drops"}
    assert "the manifest says links 9, the tars 13" in found["totals"]


def test_claims_that_were_removed(shards, made, tmp_path):
    edit_manifest(shards, lambda m: m["details"].pop("claims"))
    assert differing(shards) == {"near duplicates": "not claimed", "cold products": "not claimed"}
    by_day = shutil.copytree(made(split_by="day", val=0.2, test=0.2), tmp_path / "by_day")
    edit_manifest(by_day, lambda m: m["details"]["claims"].pop("split_by"))
    found = differing(by_day)
    assert set(found) == {"split by day"}
    assert "the manifest says held out from None, the tars 2024-01-11" in found["split by day"]
    edit_manifest(by_day, lambda m: m["details"].pop("claims"))
    assert set(differing(by_day)) == {"near duplicates", "cold products", "split by day"}


@pytest.mark.parametrize(
    ("name", "claim"), [("samples.parquet", "samples.parquet"), ("dropped.parquet", "drops")]
)
def test_a_removed_table(shards, name, claim):
    (shards / name).unlink()
    found = differing(shards)
    assert set(found) == {claim}
    assert "is not there" in found[claim]


def test_a_removed_tar(shards):
    (shards / "contents/train-000001.tar").unlink()
    found = differing(shards)
    assert found["tars"] == "contents/train-000001.tar is not there"
    assert {"fingerprint", "split train", "totals", "samples.parquet"} <= set(found)
    index_path(shards / "contents/train-000001.tar").unlink()
    assert found == differing(shards)


def test_a_tar_that_nobody_listed(shards):
    for suffix in (".tar", ".parquet"):
        source = (shards / "contents/train-000000").with_suffix(suffix)
        shutil.copyfile(source, source.with_name(f"train-000009{suffix}"))
    found = differing(shards)
    assert found["tars"] == "contents/train-000009.tar is not listed"
    assert "contents" in found


def test_a_tar_that_was_cut_off(shards):
    path = shards / "contents/train-000000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    found = differing(shards)
    assert "train-000000.tar: not a shard that mmrec reads: unexpected end" in found["tars"]
    assert {"fingerprint", "split train"} <= set(found)


def test_a_member_that_its_sample_does_not_name(shards):
    def without_frame(samples: Samples) -> Samples:
        members = {name: data for name, data in samples[0].members.items() if name != "f01.jpg"}
        return [ShardSample(samples[0].key, members, samples[0].meta), *samples[1:]]

    rewrite(shards / "contents/train-000000.tar", without_frame)
    assert "has 1 frames and 4 times" in differing(shards)["samples"]


def test_a_meta_of_another_kind(shards):
    def nameless(samples: Samples) -> Samples:
        del samples[0].meta["products"][0]["num_images"]
        return samples

    rewrite(shards / "contents/train-000000.tar", nameless)
    found = differing(shards)
    assert "has a JSON member of another kind: KeyError('num_images')" in found["samples"]
    # The samples after it keep their rows: the other fault is a training link that its product lacks.
    assert found["samples.parquet"] == "has 17 rows for 16 samples (and 1 more)"


def test_a_product_twice_and_one_that_is_missing(shards):
    def first_twice(samples: Samples) -> Samples:
        return [samples[0], ShardSample(samples[1].key, samples[0].members, samples[0].meta)]

    rewrite(shards / "products/catalog-000000.tar", first_twice)
    found = differing(shards)
    assert found["catalogue"] == "product 'p0' occurs 2 times"
    assert "product 'p1' is not in the catalogue" in found["links"]


@pytest.mark.parametrize(
    ("column", "value", "claim"),
    [
        ("split", "test", "samples.parquet"),
        ("id", "c99", "samples.parquet"),
        ("num_links", 7, "samples.parquet"),
        ("group", "c1", "near duplicates"),
        ("width", 1, "samples.parquet"),  # of the original, which no shard holds
        ("cold", True, "cold products"),
    ],
)
def test_an_edited_table_of_samples(shards, column, value, claim):
    path = shards / "samples.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        if row["id"] in ("c1", "c2"):
            row[column] = value
    pq.write_table(type(table).from_pylist(rows, table.schema), path)
    assert claim in differing(shards)


def test_a_content_put_into_a_group_of_its_own(shards):
    path = shards / "samples.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    next(row for row in rows if row["id"] == "c1")["group"] = "zzz"
    pq.write_table(type(table).from_pylist(rows, table.schema), path)
    # A careful forger puts the hash right as well.
    edit_manifest(shards, lambda m: m["details"]["facts"].update({path.name: hash_file(path)}))
    found = differing(shards)
    assert found == {
        "near duplicates": "samples.parquet has content 'c1' in group zzz, its pictures in None"
    }


def test_an_edited_table_of_drops(shards):
    path = shards / "dropped.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert "dropped.parquet" in differing(shards)["drops"]


# Foreign tars, and the command


@pytest.fixture
def foreign(made: Callable[..., Path], tmp_path: Path) -> Path:
    """The training tars of the small shards, read as somebody else's."""
    source = made(samples_per_shard=3, cold_products=0.3, val=0.0, test=0.15)
    shutil.copytree(source / "contents", tmp_path / "tars")
    mapping = ForeignMapping(
        frames="f*.jpg",
        content_id="json:content_id",
        title="json:title",
        product_id="key",
        product_images="p0.i*.jpg",
    )
    index_tars(
        [str(tmp_path / "tars" / "train-00000{0,1}.tar")],
        tmp_path / "foreign",
        split="train",
        mapping=mapping,
        num_workers=1,
    )
    return tmp_path / "foreign"


def test_foreign_tars(foreign):
    assert differing(foreign) == {}
    tar = foreign.parent / "tars" / "train-000000.tar"
    index = pq.read_table(foreign / "contents" / "train-000000.parquet").to_pylist()[0]
    data = bytearray(tar.read_bytes())
    data[index["offsets"][0]] ^= 0xFF
    tar.write_bytes(bytes(data))
    assert set(differing(foreign)) == {"pictures"}
    tar.unlink()
    assert {"tars", "split train"} <= set(differing(foreign))


def test_the_command_prints_a_line_a_claim(shards, capsys):
    cli.inspect(shards, verify=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CLAIMS) - 1
    assert all(line.startswith("ok  ") for line in lines)
    edit_manifest(shards, lambda m: m["details"].update(catalog=1))
    with pytest.raises(UserError, match="not what its manifest claims: products"):
        cli.inspect(shards, verify=True)
    assert "DIFFERS products: the manifest says catalog 1, the tars 5" in capsys.readouterr().out
    with pytest.raises(UserError):
        cli.inspect(shards, verify=True, json=True)
    chain = json.loads(capsys.readouterr().out)
    assert chain[0]["manifest"]["fingerprint"] == read_manifest(shards).fingerprint
    assert {"claim": "tars", "holds": True, "detail": "7, all whole"} in chain[0]["checks"]


@pytest.mark.parametrize("flags", [{"verify": True}, {"report": Path("sheet.html")}])
def test_only_shards_are_verified_and_shown(made, flags):
    tables = made(samples_per_shard=3, cold_products=0.3, val=0.0, test=0.15).parent / "tables"
    flag = f"--{next(iter(flags))}"
    with pytest.raises(UserError, match=f"{flag} is for shards, and this holds tables"):
        cli.inspect(tables, **flags)
