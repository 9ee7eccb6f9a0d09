"""The whole flow on a tiny catalogue: what every command writes, says and refuses."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, load_program, run
from small_runs import first_step, small_run

from mmrec import cli
from mmrec.errors import UserError
from mmrec.manifest import lineage, read_manifest
from mmrec.model.encoder import Encoder
from mmrec.retrieval.embed import embed_shards, read_embeddings
from mmrec.retrieval.evaluation_config import EvaluationConfig
from mmrec.training.checkpoints import list_checkpoints
from mmrec.training.run import read_metrics

BIN = Path(sys.executable).parent


def test_training_leaves_a_whole_run_folder(trained: Path, tiny_shards: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "encoder", "manifest.json"} <= names
    rows = read_metrics(trained)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert {"lr", "scale", "samples_per_s", "data_wait", "gradient_norm"} <= set(steps[0])
    assert next(row["step"] for row in rows if "val/R@1" in row) == 0
    chain = [manifest.kind for _, _, _, manifest in lineage(trained / "encoder") if manifest]
    assert chain == ["encoder", "shards", "tables"]


def test_the_index_knows_where_it_came_from(index: Path) -> None:
    kinds = {parent.kind for parent in read_manifest(index).parents}
    assert kinds == {"embeddings", "encoder", "shards"}


def test_embeddings_lie_in_parts_with_their_ids(index: Path, tiny_shards: Path) -> None:
    folder = index.parent / "embeddings"
    embeddings = read_embeddings(folder)
    catalog = read_manifest(tiny_shards).details["catalog"]
    assert embeddings.vectors.shape == (catalog, 128)
    np.testing.assert_allclose(np.linalg.norm(embeddings.vectors, axis=1), 1, atol=1e-6)
    parts = sorted((folder / "img_emb").iterdir())
    assert np.load(parts[0]).dtype == np.float16
    metadata = pq.read_table(folder / "metadata" / "metadata_000000.parquet")
    assert len(metadata) == len(np.load(parts[0]))
    assert embeddings.ids[: len(metadata)] == metadata["id"].to_pylist()


def test_embedding_does_not_depend_on_batches(
    trained: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    for size in (1, 7):
        embed_shards(
            *(trained / "encoder", tiny_shards, tmp_path / str(size)),
            split="val",
            batch_size=size,
            dtype="float32",
        )
    one, many = (read_embeddings(tmp_path / name) for name in ("1", "7"))
    assert one.ids == many.ids
    np.testing.assert_allclose(one.vectors, many.vectors, atol=1e-5)


def test_search_answers_to_a_video_pictures_words_and_a_mix(
    index: Path, tiny_tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = next((tiny_tables / "media/contents").glob("*.mp4"))
    picture = next((tiny_tables / "media/products").glob("*.jpg"))
    answers = []
    for query in (
        {"video": str(video)},
        {"images": (str(picture),)},
        {"text": "a red mug"},
        {"video": str(video), "text": "a red mug"},
    ):
        cli.search(index=index, k=3, json=True, **query)  # pyright: ignore[reportArgumentType]
        answers.append(json.loads(capsys.readouterr().out))
    for answer in answers:
        assert len(answer["matches"]) == 3
        scores = [match["score"] for match in answer["matches"]]
        assert scores == sorted(scores, reverse=True)
        assert {"product_id", "title", "attributes"} <= set(answer["matches"][0])
    assert len({str(answer["matches"]) for answer in answers}) == 4


def test_evaluation_writes_metrics_in_their_one_shape(
    trained: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluationConfig(
        encoder=trained / "encoder",
        shards=tiny_shards,
        out=tmp_path,
        num_cards=3,
        picture=tmp_path / "matches.png",
    )
    cli.evaluate(config=config)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["gallery"] == read_manifest(tiny_shards).details["catalog"]
    assert set(metrics["slices"]["all"]) == {
        *("queries", "R@1", "R@5", "R@10", "R@50", "MRR", "nDCG@10")
    }
    assert {"untrained", "popularity", "title overlap", "color histogram"} == set(
        metrics["baselines"]
    )
    assert {"all", "warm", "cold"} <= set(metrics["slices"])
    low, high = metrics["intervals"]["all"]["MRR"]
    assert low <= metrics["slices"]["all"]["MRR"] <= high
    printed = capsys.readouterr().out
    assert "trained" in printed
    assert "untrained" in printed
    assert "<html" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "matches.png").read_bytes()[:4] == b"\x89PNG"


def test_inspect_tells_the_chain(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.inspect(index)
    printed = capsys.readouterr().out
    for kind in ("index", "embeddings", "encoder", "shards", "tables"):
        assert f"{kind}  " in printed
    cli.inspect(index, json=True)
    assert json.loads(capsys.readouterr().out)[0]["manifest"]["kind"] == "index"


# --- resume ------------------------------------------------------------------------------------


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_program("train/contrastive.py")
    config = small_run(
        tiny_shards, tmp_path / "whole", epochs=3, checkpoint_every=2, keep_checkpoints=99
    )
    program.main(config)
    # What a run that was killed after its second checkpoint leaves behind.
    broken = tmp_path / "broken"
    shutil.copytree(config.out, broken)
    for checkpoint in list_checkpoints(broken)[2:]:
        shutil.rmtree(checkpoint)
    capsys.readouterr()
    program.main(replace(config, out=broken, resume=True))
    assert first_step(capsys.readouterr().err) == 4
    whole, resumed = (
        [{k: row[k] for k in ("step", "loss", "lr", "scale")} for row in rows if "loss" in row]
        for rows in (read_metrics(config.out), read_metrics(broken))
    )
    assert whole == resumed
    ends = [weights_of(list_checkpoints(run)[-1]) for run in (config.out, broken)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    faster = replace(config.optimizer, learning_rate=0.5)
    with pytest.raises(UserError, match=r"another config: optimizer\.learning_rate"):
        program.main(replace(config, out=broken, resume=True, optimizer=faster))
    with pytest.raises(UserError, match="holds a run already"):
        program.main(config)
    elsewhere = tmp_path / "shards"
    shutil.copytree(tiny_shards, elsewhere)
    raw = json.loads((elsewhere / "manifest.json").read_text())
    (elsewhere / "manifest.json").write_text(json.dumps(raw | {"fingerprint": "f" * 16}))
    with pytest.raises(UserError, match="cannot resume on other shards"):
        program.main(replace(config, out=broken, resume=True, shards=elsewhere))


@pytest.mark.usefixtures("fresh_accelerate")
def test_training_starts_from_a_file_of_open_clip_weights(
    tiny_shards: Path, tmp_path: Path
) -> None:
    import open_clip
    from safetensors.torch import save_file

    model_config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "flow-vit.json").write_text(json.dumps(model_config))
    open_clip.add_model_config(tmp_path / "flow-vit.json")
    theirs = open_clip.create_model("flow-vit").eval()
    weights = {name: part.contiguous() for name, part in theirs.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    program = load_program("train/contrastive.py")
    recipe = program.RECIPES["vit-b-32"]
    encoder = replace(
        recipe.encoder,
        towers=str(tmp_path / "flow-vit.json"),
        pretrained=str(tmp_path / "weights.safetensors"),
    )
    config = replace(
        recipe,
        shards=tiny_shards,
        out=tmp_path / "run",
        encoder=encoder,
        sampler=replace(recipe.sampler, batch_size=12),
        epochs=1,
        num_workers=0,
        log_every=1,
        mixed_precision="no",
    )
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        start = Encoder(encoder).eval().image_tower(pixels)
        assert torch.equal(start, theirs.visual(pixels))  # pyright: ignore[reportCallIssue]
    program.main(config)
    steps = [row for row in read_metrics(config.out) if "loss" in row]
    assert len(steps) == 2
    last = weights_of(list_checkpoints(config.out)[-1])
    name = "image_tower.conv1.weight"
    assert not torch.equal(last[name], weights["visual.conv1.weight"])


@pytest.mark.usefixtures("fresh_accelerate")
def test_options_work_together(tiny_shards: Path, tmp_path: Path) -> None:
    """Mixed precision, accumulation, every objective, separate towers, a cap, a tracker."""
    program = load_program("train/contrastive.py")
    config = small_run(
        tiny_shards,
        tmp_path / "run",
        encoder={"separate_towers": True},
        sampler={"batch_size": 6, "max_rows_per_product": 1},
        objectives=dict(video_image=1.0, title_title=0.5, video_title=0.5, image_title=0.5),
        accumulation=2,
        mixed_precision="bf16",
        eval_every=2,
        trackers=("tensorboard",),
    )
    program.main(config)
    steps = [row for row in read_metrics(config.out) if "loss" in row]
    assert len(steps) == 2 * (28 // 6) // 2
    assert {"content_product", "video_image", "title_title", "video_title", "image_title"} <= set(
        steps[0]
    )
    assert all(np.isfinite(row["loss"]) for row in steps)
    assert list(config.out.rglob("events.out.tfevents.*"))
    assert Encoder.load(config.out / "encoder").product_image_tower is not None


@pytest.mark.usefixtures("fresh_accelerate")
def test_training_on_distinct_products_and_small_pictures_first(
    tiny_shards: Path, tmp_path: Path
) -> None:
    program = load_program("train/contrastive.py")
    config = small_run(
        tiny_shards,
        tmp_path / "run",
        encoder={"image_size": 48},
        sampler={"batch_size": 14, "unique_products": True},
        augment={"early_size": 32, "early_share": 0.5},
    )
    program.main(config)
    steps = [row for row in read_metrics(config.out) if "loss" in row]
    assert len(steps) == 2 * (28 // 14)
    assert steps[-1]["content_product"] < steps[0]["content_product"]
    assert Encoder.load(config.out / "encoder").preprocess.size == 48


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_tower_of_one_size_refuses_small_pictures(tiny_shards: Path, tmp_path: Path) -> None:
    program = load_program("train/contrastive.py")
    config = small_run(
        tiny_shards,
        tmp_path / "run",
        encoder={"towers": "ViT-S-32-alt", "image_size": None},
        augment={"early_size": 64},
    )
    with pytest.raises(UserError, match="ViT-S-32-alt cannot take pictures of that size"):
        program.main(config)


def test_two_ranks_train_together(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (
        "--encoder.image-size 32 --sampler.batch-size 8 --epochs 1 --num-workers 0 --log-every 1"
    )
    done = run(
        BIN / "torchrun",
        *["--nproc-per-node", "2", "--master-port", "29655", "train/contrastive.py", "demo"],
        *("--shards", tiny_shards, "--out", tmp_path / "run", *flags.split()),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    steps = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(steps) == 3
    # The loss of the global batch, not of one rank: near log(8), which random embeddings would have.
    assert 1.0 < steps[0]["content_product"] < 4.0
    assert Encoder.load(tmp_path / "run/encoder").width == 128


# --- bad input ---------------------------------------------------------------------------------


def test_an_encoder_that_did_not_make_the_index_is_refused(index: Path, tmp_path: Path) -> None:
    from mmrec import Matcher
    from mmrec.model.encoder import EncoderConfig

    other = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))
    fingerprint = other.save(tmp_path / "other")
    made_by = read_manifest(index).parent("encoder")
    assert made_by
    with pytest.raises(UserError, match=f"{made_by.fingerprint}.*{fingerprint}.*mmrec embed"):
        Matcher.load(index, encoder=tmp_path / "other")


def test_a_missing_encoder_is_named_with_the_command_that_mends_it(
    index: Path, tmp_path: Path
) -> None:
    from mmrec import Matcher

    alone = tmp_path / "index"
    shutil.copytree(index, alone)
    with pytest.raises(UserError, match=r"is no longer there; .*--encoder"):
        Matcher.load(alone)


def test_shards_from_elsewhere_are_not_evaluated_by_accident(
    trained: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "shards"
    shutil.copytree(tiny_shards, other)
    raw = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(raw | {"fingerprint": "f" * 16}))
    config = EvaluationConfig(encoder=trained / "encoder", shards=other, out=tmp_path / "out")
    with pytest.raises(UserError, match="--other-shards"):
        cli.evaluate(config=config)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mmrec search --index {no} --text x", "no such folder"),
        ("mmrec embed --encoder {no} --shards {no} --out {out}", "no such folder"),
        (
            "mmrec index build --embeddings {shards} --out {out}",
            "expected embeddings, found shards",
        ),
        ("python train/contrastive.py nothing", "expected a recipe"),
        (
            "python train/contrastive.py demo --shards {shards} --out {out} --sampler.batch-size 999",
            "a batch of 999 rows needs as many samples",
        ),
        ("python train/contrastive.py demo --shards {no} --out {out}", "no such folder"),
        ("python data_prep/make_shards.py --tables {no} --out {out}", "no such folder"),
    ],
)
def test_bad_input_gets_one_line(
    command: str, message: str, tiny_shards: Path, tmp_path: Path
) -> None:
    words = command.format(no=tmp_path / "no", out=tmp_path / "out", shards=tiny_shards).split()
    done = run(BIN / words[0], *words[1:])
    assert done.returncode == 1
    assert message in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == errors[0]
    assert not (tmp_path / "out").exists()


def test_a_tar_that_went_missing_is_noticed(tiny_shards: Path, tmp_path: Path) -> None:
    from mmrec.data.shards import open_shards

    broken = tmp_path / "shards"
    shutil.copytree(tiny_shards, broken)
    (broken / "contents/train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"manifest counts 28 samples of split 'train'.* hold 20"):
        open_shards(broken, "contents", "train")


def test_embeddings_that_were_changed_are_refused(index: Path, tmp_path: Path) -> None:
    copy = tmp_path / "embeddings"
    shutil.copytree(index.parent / "embeddings", copy)
    part = copy / "img_emb/img_emb_000000.npy"
    np.save(part, np.roll(np.load(part), 1, axis=0))
    with pytest.raises(UserError, match=r"img_emb_000000\.npy: is not the file that was written"):
        read_embeddings(copy)


def test_outputs_do_not_swallow_inputs(tiny_tables: Path, tiny_shards: Path) -> None:
    before = sorted(path.name for path in tiny_tables.parent.iterdir())
    for out in (tiny_tables, tiny_tables.parent):
        done = run(
            *(BIN / "python", "data_prep/make_shards.py", "--overwrite"),
            *("--tables", tiny_tables, "--out", out),
        )
        assert done.returncode == 1
        assert "holds the input" in done.stderr
    assert sorted(path.name for path in tiny_tables.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"accumulation": 0}, "--accumulation 0"),
        ({"log_every": 0}, "--log-every 0"),
        ({"num_workers": -1}, "--num-workers -1"),
        ({"trackers": ("foo",)}, "--trackers foo: not installed here"),
        (
            {"objectives": {"content_product": 0.0, "video_image": 0.0, "image_title": 0.0}},
            "nothing to learn",
        ),
        ({"encoder": {"num_frames": 0}}, r"--encoder\.num-frames 0"),
        ({"encoder": {"pretrained": "README.md"}}, "does not fit mmrec-tiny"),
        ({"sampler": {"window_shards": 0}}, r"--sampler\.window-shards 0"),
        ({"augment": {"early_size": 8}}, "expected at least 16"),
        ({"augment": {"late_size": 8}}, "expected at least 16"),
        ({"loss": {"logq": 1.0}, "sampler": {"group_by": "category"}}, "is not known with"),
        ({"augment": {"mix": 0.5}, "loss": {"positives": "diagonal"}}, "shows several products"),
    ],
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_settings_out_of_range_are_refused_before_any_work(
    changes: dict, message: str, tiny_shards: Path, tmp_path: Path
) -> None:
    program = load_program("train/contrastive.py")
    config = small_run(tiny_shards, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        program.main(config)
    assert not (tmp_path / "run").exists()


def test_a_query_that_cannot_be_read_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for query, message in (
        ({"video": str(tmp_path / "nowhere.mp4")}, "nowhere.mp4: file not found"),
        ({"video": str(tmp_path / "broken.mp4")}, "broken.mp4: not a video or image"),
        ({}, "nothing to match"),
        ({"video": "a.mp4", "images": ("b.jpg",)}, "a video or images, not both"),
    ):
        with pytest.raises(UserError, match=message):
            cli.search(index=index, **query)  # pyright: ignore[reportArgumentType]


def test_recipes_can_be_read_as_help() -> None:
    done = run(BIN / "python", ROOT / "train/contrastive.py", "grocery", "--help")
    assert done.returncode == 0
    assert "--sampler.batch-size" in done.stdout
