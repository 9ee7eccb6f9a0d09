"""How many samples a second our training loop takes, beside open_clip's own over the same tars.

    python benchmarks/train_step.py            # about 10 minutes on 2 cores
    python benchmarks/train_step.py --quick    # under a minute

Both train one architecture from the same weights on image and caption pairs in img2dataset's layout: our
program `train/contrastive.py` with pictures as contents and captions as products, and open_clip's
`train_one_epoch`, driven as its `main` drives it (`get_wds_dataset`, AdamW, cosine schedule, clipped
gradients). So a sample is one pass through the image tower and one through the text tower on either side,
a crop of at least 0.9 of the picture, and a loss over the batch. Each run is a process of its own on the same
cores, with as many loader processes; the two take turns. The first steps are left out. open_clip's
pipeline asks for webdataset below 0.3, which is put under .peers/ for its process alone.

On a CPU the model is ViT-B/32 at 2 layers of width 256 in either tower. Where a GPU is it is ViT-B/32,
then ViT-B/16, in bfloat16, and the model FLOPs utilization of each is printed. The last line is one
JSON object.
"""

import io
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# As train/contrastive.py sets it; here for both sides, so that it makes no difference between them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import open_clip
import torch
import tyro
from peers import install_webdataset
from PIL import Image
from safetensors.torch import save_file

from mmrec.data.foreign import ForeignMapping, index_tars
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.training.flops import FlopCount, peak_flops
from mmrec.training.run import read_metrics

WORKER = "--worker"
ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE, WEIGHT_DECAY, BETAS, WARMUP, CLIP_NORM = 1e-4, 0.2, (0.9, 0.98), 0.05, 1.0
BARS = {"cpu": 1.0, "cuda": 1.2}
MOST_DATA_WAIT = 0.05
SMALL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {
        "image_size": 224,
        "layers": 4,
        "width": 256,
        "head_width": 64,
        "patch_size": 32,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 256,
        "heads": 4,
        "layers": 2,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    """What is measured."""

    quick: bool = False
    """Fewer and smaller batches, one round."""
    num_workers: int = 0
    """Loader processes of either side; 0 takes one for two cores, and at most 8."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one side's process is told; the same for both."""

    model: str
    """An open_clip name, or the path of a model config."""
    folder: str
    batch_size: int
    warm_steps: int
    """Steps that are left out."""
    num_steps: int
    """Steps in all."""
    num_workers: int
    device: str

    @property
    def num_measured(self) -> int:
        """Samples that are counted."""
        return (self.num_steps - self.warm_steps) * self.batch_size


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one run came to."""

    samples_per_s: float
    data_wait: float
    first_loss: float


def main(config: TrainStepConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    on_gpu = torch.cuda.is_available()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_pairs = (16_384 if on_gpu else 2_048) // (4 if config.quick else 1)
        _write_tars(folder, num_tars=8, per_tar=num_pairs // 8)
        index_tars(
            [str(tar) for tar in sorted(folder.glob("*.tar"))],
            folder / "shards",
            split="train",
            mapping=ForeignMapping(product_title="txt"),
            num_workers=2,
        )
        for model in ("ViT-B-32", "ViT-B-16") if on_gpu else (_write_small_config(folder),):
            results += _compare(_setting(config, model, folder), rounds=1 if config.quick else 3)
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} of {os.cpu_count()} cores, Python {platform.python_version()}"
    if on_gpu:
        machine += f", {torch.cuda.get_device_name()}"
    print(json.dumps({"benchmark": "train_step", "machine": machine, "results": results}))


def _setting(config: TrainStepConfig, model: str, folder: Path) -> Setting:
    on_gpu = torch.cuda.is_available()
    warm, measured = (20, 100) if on_gpu else (10, 40)
    batch_size = 256 if on_gpu else 64
    if config.quick:
        warm, measured, batch_size = (10, 30, 256) if on_gpu else (3, 9, 32)
    cores = len(os.sched_getaffinity(0))
    return Setting(
        model=model,
        folder=str(folder),
        batch_size=batch_size,
        warm_steps=warm,
        num_steps=warm + measured,
        num_workers=config.num_workers or min(8, max(1, cores // 2)),
        device="cuda" if on_gpu else "cpu",
    )


def _compare(setting: Setting, *, rounds: int) -> list[dict[str, Any]]:
    _write_weights(setting)
    rates: dict[str, list[Rate]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            rates[name].append(_rate_of(name, setting))
            one = rates[name][-1]
            print(
                f"{name:<10}{one.samples_per_s:8.1f} samples/s  data wait {one.data_wait:.1%}  "
                f"first loss {one.first_loss:.3f}",
                flush=True,
            )
    ours, theirs = (statistics.median(rate.samples_per_s for rate in rates[name]) for name in SIDES)
    name = Path(setting.model).stem
    bar = BARS[setting.device]
    results: list[dict[str, Any]] = [
        {
            "what": f"samples a second of training, {name}, batch {setting.batch_size}",
            "peer": "open_clip_train",
            "ratio": round(ours / theirs, 3),
            "bar": bar,
            "holds": ours / theirs >= bar,
            "samples_per_s": round(ours, 1),
            "peer_samples_per_s": round(theirs, 1),
        }
    ]
    if setting.device == "cuda":
        wait = statistics.median(rate.data_wait for rate in rates["mmrec"])
        results.append(
            {
                "what": f"share of time waiting for data, {name}",
                "peer": "the step",
                "ratio": round(wait, 3),
                "bar": MOST_DATA_WAIT,
                "holds": wait < MOST_DATA_WAIT,
            }
        )
        _print_mfu(name, ours, theirs)
    return results


def _print_mfu(name: str, ours: float, theirs: float) -> None:
    """Model FLOPs utilization: 3 x (image + text) FLOPs a sample, over the GPU's dense 16-bit peak."""
    peak = peak_flops(torch.cuda.get_device_name(), half=True)
    if not peak:
        print(f"MFU of {name}: no peak is known for {torch.cuda.get_device_name()}")
        return
    count = FlopCount(Encoder(EncoderConfig(towers=name)))
    a_sample = 3 * (count.of_image(224) + count.of_title(77))
    print(
        f"MFU of {name}: mmrec {ours * a_sample / peak:.1%}, open_clip {theirs * a_sample / peak:.1%} "
        f"({a_sample / 1e9:.1f} GFLOP a sample, peak {peak / 1e12:.0f} TFLOP/s)"
    )


def _rate_of(name: str, setting: Setting) -> Rate:
    """Run one side in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if name == "open_clip":
        environment["PYTHONPATH"] = os.pathsep.join([str(install_webdataset()), str(ROOT)])
    told = json.dumps(vars(setting))
    done = subprocess.run(
        [sys.executable, __file__, WORKER, name, told],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return Rate(**json.loads(done.stdout.splitlines()[-1]))


def _write_small_config(folder: Path) -> str:
    path = folder / "vit-small-32.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return str(path)


def _known_to_open_clip(model: str) -> str:
    if model.endswith(".json"):
        open_clip.add_model_config(model)
    return Path(model).stem


def _write_weights(setting: Setting) -> None:
    """Random weights that both sides start from."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(_known_to_open_clip(setting.model))
    weights = {name: part.contiguous() for name, part in model.state_dict().items()}
    save_file(weights, Path(setting.folder) / "weights.safetensors")


def _write_tars(folder: Path, *, num_tars: int, per_tar: int) -> None:
    """Photos of 256 pixels with as much detail as photos have, and a caption each."""
    rng = np.random.default_rng(0)
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(per_tar):
                coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((341, 256), Image.Resampling.BICUBIC), float)
                grain = rng.normal(0, 6, (256, 341, 1))
                pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG", quality=90)
                caption = f"a photo of thing {number * per_tar + i} in a shop".encode()
                for suffix, data in (("jpg", stream.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:05d}{i:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _mmrec(setting: Setting) -> Rate:
    """Our program as it is, read from the run's own metrics.jsonl."""
    folder = Path(setting.folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary) / "run"
        num_pairs = sum(1 for _ in _captions(folder))
        flags: dict[str, Any] = {
            "shards": folder / "shards",
            "out": out,
            "encoder.towers": setting.model,
            "encoder.pretrained": folder / "weights.safetensors",
            "sampler.batch-size": setting.batch_size,
            "augment.min-scale": 0.9,
            "augment.flip": 0.0,
            "augment.color": 0.0,
            "augment.modality-dropout": 0.0,
            "optimizer.learning-rate": LEARNING_RATE,
            "optimizer.weight-decay": WEIGHT_DECAY,
            "optimizer.clip-norm": CLIP_NORM,
            "epochs": math.ceil(setting.num_steps / (num_pairs // setting.batch_size)),
            "num-frames": 1,
            "mixed-precision": "bf16" if setting.device == "cuda" else "no",
            "num-workers": setting.num_workers,
            # A line for the steps that are left out, then one for each stretch of the same length.
            "log-every": setting.warm_steps,
            "eval-every": 10**9,
            "checkpoint-every": 10**9,
        }
        command = [sys.executable, str(ROOT / "train/contrastive.py"), "vit-b-32"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        rows = [row for row in read_metrics(out) if "loss" in row]
    measured = [row for row in rows if setting.warm_steps < row["step"] <= setting.num_steps]
    steps = [row["step"] - setting.warm_steps * n for n, row in enumerate(measured, 1)]
    assert all(step == setting.warm_steps for step in steps), "lines are a stretch apart"
    seconds = [setting.warm_steps * setting.batch_size / row["samples_per_s"] for row in measured]
    return Rate(
        samples_per_s=setting.num_measured / sum(seconds),
        data_wait=sum(s * r["data_wait"] for s, r in zip(seconds, measured, strict=True))
        / sum(seconds),
        first_loss=rows[0]["loss"],
    )


def _captions(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            yield from (name for name in tar.getnames() if name.endswith(".txt"))


class _TimedLoader:
    """Passes open_clip's loader through, and notes when each batch was asked for and came."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.num_batches: int = loader.num_batches
        self.num_samples: int = loader.num_samples
        self.asked: list[float] = []
        self.came: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        while True:
            self.asked.append(time.perf_counter())
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.came.append(time.perf_counter())
            yield batch


def _open_clip(setting: Setting) -> Rate:
    """open_clip's `train_one_epoch` over an epoch of as many steps."""
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    # As its main sets them.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    folder = Path(setting.folder)
    name = _known_to_open_clip(setting.model)
    arguments = Namespace(
        train_data="::".join(map(str, sorted(folder.glob("*.tar")))),
        train_num_samples=setting.batch_size * setting.num_steps,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=setting.batch_size,
        workers=setting.num_workers,
        seed=0,
        device=setting.device,
        precision="amp_bf16" if setting.device == "cuda" else "fp32",
        accum_freq=1,
        distill=False,
        skip_scheduler=False,
        horovod=False,
        grad_clip_norm=CLIP_NORM,
        log_every_n_steps=setting.warm_steps,
        wandb=False,
        rank=0,
        local_rank=0,
        world_size=1,
    )
    model: Any = open_clip.create_model(
        name,
        pretrained=str(folder / "weights.safetensors"),
        device=setting.device,
        output_dict=True,
    )
    transform = open_clip.image_transform(
        224, is_train=True, mean=model.visual.image_mean, std=model.visual.image_std
    )
    data = get_wds_dataset(
        arguments, transform, is_train=True, tokenizer=open_clip.get_tokenizer(name)
    )
    loader = _TimedLoader(data.dataloader)
    optimizer = _open_clip_optimizer(model)
    losses = _FirstLoss()
    train_one_epoch(
        model,
        {"train": SimpleNamespace(dataloader=loader, set_epoch=data.set_epoch)},
        open_clip.ClipLoss(cache_labels=True),
        0,
        optimizer,
        None,
        cosine_lr(optimizer, LEARNING_RATE, round(WARMUP * setting.num_steps), setting.num_steps),
        None,
        arguments,
        tb_writer=losses,
    )
    if setting.device == "cuda":
        torch.cuda.synchronize()
    # The last asking is for a batch that is not there: it comes as the last step ends.
    seconds = loader.asked[-1] - loader.asked[setting.warm_steps]
    waits = [came - asked for came, asked in zip(loader.came, loader.asked, strict=False)]
    return Rate(
        samples_per_s=setting.num_measured / seconds,
        data_wait=sum(waits[setting.warm_steps :]) / seconds,
        first_loss=losses.value,
    )


def _open_clip_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The groups and settings of open_clip's `main`."""

    def plain(name: str, part: torch.Tensor) -> bool:
        return part.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if plain(n, p)], "weight_decay": 0.0},
            {"params": [p for n, p in named if not plain(n, p)], "weight_decay": WEIGHT_DECAY},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=1e-6,
    )


class _FirstLoss:
    """Stands where open_clip expects a TensorBoard writer, and keeps the first loss that is logged."""

    value = math.nan

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss" and math.isnan(self.value):
            self.value = value


SIDES = {"mmrec": _mmrec, "open_clip": _open_clip}


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        logging.basicConfig(level=logging.WARNING)
        print(json.dumps(vars(SIDES[sys.argv[2]](Setting(**json.loads(sys.argv[3]))))))
    else:
        main(tyro.cli(TrainStepConfig))
