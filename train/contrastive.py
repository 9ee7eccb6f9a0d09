"""Train an encoder of contents and products by contrastive learning on shards.

Input: a folder of shards (data_prep/make_shards.py). Output: a run folder with config.json, metrics.jsonl,
curves.png, checkpoints, and the best encoder.

    accelerate launch --quiet --config_file accelerate_config.yaml train/contrastive.py demo \
        --shards runs/demo/shards --out runs/demo/train

The first argument is a recipe below, or the config.json of an earlier run; flags override its fields. The
demo recipe takes about 3 minutes on 2 cores. See README.md for what each recipe reaches.

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the step and exit with 128 and the signal's number; a
second Ctrl-C ends at once. --resume goes on. train/launch/ has files for GPUs, machines and SLURM.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

# Read as torch is imported. Threads that wait for the others of a layer by spinning take the cores of the
# loader's processes: with anything else on the machine a step then takes up to five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Large tensors in large pages: a batch comes and goes at every step, and each of its 4 KiB pages would be
# found and cleared anew.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import tyro
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from tqdm import tqdm

from mmrec.bars import is_quiet
from mmrec.cli import run_program
from mmrec.data.batches import AugmentConfig, PairBatch, PairDataset, number_products, pair_loader
from mmrec.data.catalog import Catalog, attribute_groups
from mmrec.data.mixing import GROUP_ROWS
from mmrec.data.negatives import check_negatives, read_negatives
from mmrec.data.sampler import GlobalBatches, RankBatches, SamplerConfig, check_world_size
from mmrec.data.shards import ShardReader, open_sources
from mmrec.distributed import Agreement, broadcast_buffers, gather
from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    check_output,
    fingerprint_of,
    parent_of,
    read_manifest,
    write_manifest,
)
from mmrec.model.encoder import Encoder, EncoderConfig, Views
from mmrec.model.losses import (
    LossConfig,
    Objectives,
    active,
    check_loss,
    contrastive_loss,
    log_expected_columns,
)
from mmrec.model.negatives import split_negatives
from mmrec.model.tuning import TuningConfig, tune
from mmrec.model.widths import nested_loss
from mmrec.ranges import Count, CountOrZero, NonNegative, Range, check_ranges
from mmrec.retrieval.evaluation import Gallery, measure
from mmrec.training.checkpoints import (
    Progress,
    check_launch,
    list_checkpoints,
    newest_checkpoint,
    read_progress,
    restore_checkpoint,
    save_checkpoint,
    saving,
)
from mmrec.training.curves import summarize_curves
from mmrec.training.ema import AveragedEncoder
from mmrec.training.faults import FaultWatch, stop_at_fault, weights_are_finite
from mmrec.training.flops import FlopCount, peak_flops
from mmrec.training.gradient_cache import CacheConfig, cached_backward
from mmrec.training.optimizers import OptimizerConfig, build_optimizer, set_learning_rate
from mmrec.training.progress import Stopwatch, bar_fields, memory_gib
from mmrec.training.run import RunFolder, differing_fields, read_config, read_metrics
from mmrec.training.sample_log import SampleLog
from mmrec.training.schedules import warmup_cosine
from mmrec.training.sharding import (
    check_sharding,
    make_shardable,
    scale_of,
    whole_encoder,
    whole_tensor,
)
from mmrec.training.stopping import StopSignals, exit_status, stop_message

# --- config ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run is made from."""

    shards: Path
    """The folder written by data_prep/make_shards.py."""
    out: Path
    """The run folder."""
    further_shards: tuple[Path, ...] = ()
    """More folders to draw training rows from, mixed by `sampler.source_weights`; equal product ids are
    one product. Evaluation stays with `shards`."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objectives: Objectives = field(default_factory=Objectives)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    ema: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    """Decay of a moving average of the weights, which is then evaluated and exported; 0.999 is usual."""
    epochs: Count = 30
    """Passes over the training contents, each of as many rows as they are, less what fills no batch.

    Which contents are left out changes; a limit of rows a product and weights of sources show some
    contents more than once a pass, and others not at all."""
    num_frames: Count = 4
    """Frames of a content in a training row, one drawn from each of as many equal spans."""
    num_images: Count = 1
    """Images of a product in a training row, drawn at random."""
    negatives: Path | None = None
    """A table of train/mine_negatives.py: rows bring products of it as columns that are no positives."""
    num_negatives: Count = 1
    """Hard negatives that a row brings, drawn from its list in the table."""
    share_negatives: bool = True
    """A hard negative is one for all rows of the global batch; off, for the row that brought it."""
    accumulation: Count = 1
    """Batches whose gradients are added up before a step; each is a contrastive batch of its own."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """None takes what accelerate's own config says."""
    num_workers: CountOrZero = 2
    """Loader processes a rank; 0 loads in the training process."""
    cpu_threads: CountOrZero = 0
    """Threads of a rank that trains on a CPU; 0 shares the cores out among the ranks."""
    eval_every: CountOrZero = 0
    """Steps between evaluations on the val split; 0 evaluates at the end of each epoch."""
    best_metric: Literal["R@1", "R@5", "R@10", "MRR", "nDCG@10"] = "MRR"
    """The val metric whose best value picks the exported encoder."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; there is one at the end in any case."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    log_samples: bool = False
    """Write samples.jsonl: the contents of every global batch, as training consumed them."""
    trackers: tuple[str, ...] = ()
    """Names of Accelerate trackers to log to as well, such as tensorboard or wandb."""
    max_loss_ratio: NonNegative = 0.0
    """Stop at a loss so many times the median of the last 100 batches; 0 stops at NaN and infinity alone."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, or start if there is none."""
    accept_changes: bool = False
    """Resume with another learning rate, warm-up or clip norm than the run began with."""
    seed: CountOrZero = 0
    """Starts the weights; the order of the data has a seed of its own in `sampler`."""


_NOWHERE = Path("")
RECIPES: dict[str, TrainConfig] = {
    # The generated catalogue on two cores: small frames, printed words, so nothing is mirrored.
    "demo": TrainConfig(
        shards=_NOWHERE,
        out=_NOWHERE,
        encoder=EncoderConfig(towers="mmrec-tiny", num_frames=6),
        sampler=SamplerConfig(batch_size=64),
        augment=AugmentConfig(min_scale=0.85, flip=0.0, color=0.0, modality_dropout=0.0),
        # Edges that make pictures meet without help from titles, and pictures with their product's title.
        objectives=Objectives(video_image=1.0, image_title=1.0),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        epochs=11,
        num_frames=2,
        num_workers=1,
        eval_every=51,
    ),
    # GroceryStore photos from random weights on four cores.
    "grocery": TrainConfig(
        shards=_NOWHERE,
        out=_NOWHERE,
        encoder=EncoderConfig(towers="mmrec-small16", image_size=144, num_frames=8),
        sampler=SamplerConfig(batch_size=64, unique_products=True),
        augment=AugmentConfig(
            min_scale=0.35,
            color=0.15,
            rotate=15.0,
            erase=0.25,
            mix=0.5,
            early_size=64,
            early_share=0.66,
            late_size=112,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=1.0),
        ema=0.998,
        epochs=110,
        num_frames=1,
        num_workers=1,
        eval_every=410,
        best_metric="R@1",
    ),
    # Fine-tuning open_clip's ViT-B/32 on one GPU.
    "vit-b-32": TrainConfig(
        shards=_NOWHERE,
        out=_NOWHERE,
        encoder=EncoderConfig(towers="ViT-B-32", pretrained="laion2b_s34b_b79k"),
        sampler=SamplerConfig(batch_size=256),
        optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.2),
        epochs=10,
        num_workers=8,
        mixed_precision="bf16",
    ),
}

# The same as clips: fewer contents with several frames each, so more epochs of fewer steps, on smaller
# pictures, and too few in val to pick by the first place alone.
RECIPES["grocery-videos"] = replace(
    RECIPES["grocery"],
    encoder=EncoderConfig(towers="mmrec-small", num_frames=8),
    augment=AugmentConfig(min_scale=0.35, color=0.15, early_size=64, early_share=0.66),
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.1),
    ema=None,
    epochs=150,
    num_frames=2,
    eval_every=110,
    best_metric="MRR",
)


def parse(arguments: list[str]) -> TrainConfig:
    """Read a recipe's name, or an earlier run's config.json, and the flags that override it."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if first is None and arguments and arguments[0] in ("-h", "--help"):
        first, arguments = "demo", ["demo", *arguments]
    if first is None or (first not in RECIPES and not first.endswith(".json")):
        raise UserError(
            f"expected a recipe ({', '.join(RECIPES)}) or a config.json as the first argument, "
            f"found {first or 'none'}"
        )
    default = RECIPES[first] if first in RECIPES else read_config(Path(first), TrainConfig)
    if default.shards == _NOWHERE:
        # Without a default of their own, tyro asks for these two.
        default = replace(default, shards=tyro.MISSING, out=tyro.MISSING)
    return tyro.cli(
        TrainConfig, default=default, args=arguments[1:], prog=f"contrastive.py {first}"
    )


# Where and how fast may change on resume; what is learned may not.
FREE_ON_RESUME = (
    *("shards", "further_shards", "out", "resume", "num_workers", "cpu_threads"),
    *("trackers", "log_every", "log_samples", "keep_checkpoints"),
    *("max_loss_ratio", "accept_changes"),
)
# What may have made a loss explode; with --accept-changes these may differ as well.
MENDABLE = tuple(f"optimizer.{name} " for name in ("learning_rate", "warmup", "clip_norm"))


def check(config: TrainConfig) -> Path | None:
    """Find the checkpoint to go on from, and refuse what cannot work before any work is done."""
    check_ranges(config)
    if config.loss.logq and (config.sampler.source_weights or config.sampler.group_by):
        raise UserError(
            "--loss.logq: how often a product is drawn is not known with --sampler.source-weights or "
            "--sampler.group-by; leave one of them out"
        )
    if config.augment.mix and (config.loss.positives != "shared" or config.objectives.video_title):
        raise UserError(
            "--augment.mix: what is mixed shows several products, which --loss.positives shared alone "
            "can say, and no title of its own, which --objectives.video-title asks for"
        )
    if not active(config.objectives):
        raise UserError("--objectives: every weight is 0, so there is nothing to learn")
    check_loss(config.loss, has_bias=config.encoder.start_bias is not None)
    known = [tracker.value for tracker in get_available_trackers()]
    for tracker in config.trackers:
        if tracker not in known:
            found = ", ".join(known) or "none"
            raise UserError(f"--trackers {tracker}: not installed here; those that are: {found}")
    check_output(
        config.out / "encoder",
        kind="encoder",
        overwrite=True,
        inputs=[config.shards, *config.further_shards],
    )
    if not config.resume and (
        list_checkpoints(config.out) or (config.out / "metrics.jsonl").exists()
    ):
        raise UserError(
            f"{config.out}: holds a run already; --resume goes on with it, or give another --out"
        )
    checkpoint = newest_checkpoint(config.out) if config.resume else None
    if checkpoint is None:
        return None
    # Checkpoints of earlier versions hold no config.
    home = checkpoint if (checkpoint / "config.json").exists() else config.out
    earlier = read_config(home / "config.json", TrainConfig)
    free = {name: getattr(config, name) for name in FREE_ON_RESUME}
    changed = differing_fields(replace(earlier, **free), config)
    if config.accept_changes:
        changed = [field for field in changed if not field.startswith(MENDABLE)]
    if changed:
        raise UserError(f"{checkpoint}: cannot resume with another config: {'; '.join(changed)}")
    shards = fingerprints_of_data(config)
    before = read_progress(checkpoint).shards
    if shards != before:
        raise UserError(
            f"{config.out}: cannot resume on other shards: began on {before}, and {config.shards} is {shards}"
        )
    return checkpoint


def fingerprints_of_data(config: TrainConfig) -> str:
    """What decides whether a run reads the shards, and the negatives, that it began on."""
    folders = (config.shards, *config.further_shards)
    found = [read_manifest(folder, "shards").fingerprint for folder in folders]
    if config.negatives is not None:
        found.append(check_negatives(config.negatives, folders).fingerprint)
    return "+".join(found)


@dataclass(frozen=True)
class TrainingRows:
    """The training contents of all folders of shards, and the order of their rows."""

    manifests: list[Manifest]
    """Those of the folders; the folder of the validation split comes first."""
    reader: ShardReader
    numbers: dict[str, int]
    """A number for each product that is linked to."""
    products: list[list[int]]
    """The products of each content that can stand for it, by number."""
    weights: list[list[float]]
    """Those links' weights."""
    batches: GlobalBatches


def open_training(config: TrainConfig) -> TrainingRows:
    """Open the train split of all folders, and plan its batches."""
    folders = (config.shards, *config.further_shards)
    manifests = [read_manifest(folder, "shards") for folder in folders]
    train, sizes = open_sources(folders, "contents", "train")
    numbers = number_products(train.product_ids)
    # A content carries the images of its heaviest links alone; only those can stand for it.
    carried = [manifest.config["max_products_per_content"] for manifest in manifests]
    inline = [most for most, size in zip(carried, sizes, strict=True) for _ in range(size)]
    groups = None
    if config.sampler.group_by is not None:
        groups = attribute_groups(Catalog.open(folders), numbers, config.sampler.group_by)
    products = [
        [numbers[p] for p in ids[:most]]
        for ids, most in zip(train.product_ids, inline, strict=True)
    ]
    weights = [own[:most] for own, most in zip(train.weights, inline, strict=True)]
    batches = GlobalBatches(
        config.sampler,
        shard_sizes=train.shard_sizes,
        products=products,
        weights=weights,
        source_sizes=sizes,
        groups=groups,
    )
    return TrainingRows(manifests, train, numbers, products, weights, batches)


# --- model -------------------------------------------------------------------------------------


def check_sizes(encoder: Encoder, config: TrainConfig) -> None:
    """Refuse training sizes that the image tower cannot take: most vision transformers take one size."""
    sizes = {
        "--encoder.image-size": encoder.preprocess.size,
        "--augment.early-size": config.augment.early_size,
        "--augment.late-size": config.augment.late_size,
    }
    for flag, size in sizes.items():
        if not size:
            continue
        try:
            with torch.no_grad():
                encoder.eval().image_tower(torch.zeros(1, 3, size, size))
        except Exception as error:  # each architecture complains in its own way
            raise UserError(
                f"{flag} {size}: {config.encoder.towers} cannot take pictures of that size "
                f"({str(error).splitlines()[0][:100]}); expected the size that it was made for"
            ) from None


def main(config: TrainConfig) -> None:
    """Train, evaluate while training, and export the best encoder."""
    checkpoint = check(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        log_with=list(config.trackers) or None,
        project_dir=config.out,
        # A batch may hold no title at all, and then the text tower has no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if checkpoint:
        check_launch(accelerator, checkpoint)
    check_world_size(
        config.sampler.batch_size,
        accelerator.num_processes,
        group_rows=GROUP_ROWS if config.augment.mix else 1,
    )
    check_sharding(
        accelerator, averaged=config.ema is not None, adapted=config.tuning.lora_rank > 0
    )
    if config.cache.on and accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "--cache: chunks run beside DDP, and not under FSDP; expected one of the two"
        )
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        # accelerate launch gives a process one thread unless OMP_NUM_THREADS says otherwise.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(
            config.cpu_threads or max(1, (cores or 1) // accelerator.num_processes)
        )

    # --- data ----------------------------------------------------------------------------------
    rows = open_training(config)
    train, numbers, batches = rows.reader, rows.numbers, rows.batches
    negatives = None
    if config.negatives is not None:
        negatives = read_negatives(
            config.negatives,
            shards=(config.shards, *config.further_shards),
            content_ids=train.content_ids,
            numbers=numbers,
            per_row=config.num_negatives,
        )
    log_q = None
    if config.loss.logq:
        log_q = log_expected_columns(
            rows.products, rows.weights, num_products=len(numbers), sampler=config.sampler
        ).to(accelerator.device)
    has_val = rows.manifests[0].details["splits"].get("val", {}).get("contents", 0) > 0
    gallery = Gallery.open(config.shards, "val") if has_val else None
    total_batches = config.epochs * batches.steps_per_epoch
    total_steps = total_batches // config.accumulation
    if not total_steps:
        raise UserError(
            f"{total_batches} batches do not make one step of --accumulation {config.accumulation}"
        )
    eval_every = config.eval_every or max(1, batches.steps_per_epoch // config.accumulation)

    # --- model ---------------------------------------------------------------------------------
    encoder = Encoder(config.encoder)
    check_sizes(encoder, config)
    tune(encoder, config.tuning)
    make_shardable(encoder, accelerator)
    tokenizer = encoder.tokenizer
    optimizer = build_optimizer(encoder, config.optimizer)
    peak = None
    if accelerator.device.type == "cuda":
        half = accelerator.mixed_precision != "no"
        peak = peak_flops(torch.cuda.get_device_name(accelerator.device), half=half)
    flops = FlopCount(encoder) if peak else None
    model, optimizer = accelerator.prepare(encoder, optimizer)
    average = AveragedEncoder(encoder, config.ema) if config.ema is not None else None
    if average:
        accelerator.register_for_checkpointing(average)
    exported = average.module if average else encoder

    if checkpoint:
        progress = read_progress(checkpoint)
        restore_checkpoint(accelerator, checkpoint, seed=config.seed)
    else:
        progress = Progress(shards=fingerprints_of_data(config))
    progress = replace(
        progress,
        world_size=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision,
    )
    run = None
    if accelerator.is_main_process:
        run = RunFolder(config.out, config, from_step=progress.step if checkpoint else None)
    sample_log = None
    if run and config.log_samples:
        sample_log = SampleLog(run, epoch=progress.epoch, batch=progress.batch)
    if config.trackers:
        accelerator.init_trackers("mmrec")
    loader = pair_loader(
        PairDataset(
            train,
            numbers,
            preprocess=encoder.preprocess,
            augment=config.augment,
            num_frames=config.num_frames,
            num_images=config.num_images,
            num_epochs=config.epochs,
            seed=config.sampler.seed,
            negatives=negatives,
        ),
        RankBatches(
            batches,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_epochs=config.epochs,
            start_epoch=progress.epoch,
            start_step=progress.batch,
        ),
        tokenizer=tokenizer,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    # --- step ----------------------------------------------------------------------------------
    def train_on(batch: PairBatch, step: int) -> dict[str, torch.Tensor]:
        """One batch forward and backward; an optimizer step when enough have been added up."""
        warmup = max(1, round(config.optimizer.warmup * total_steps))
        factor = warmup_cosine(step, total=total_steps, warmup=warmup)
        set_learning_rate(optimizer, config.optimizer.learning_rate * factor)
        batch = batch.to(accelerator.device)

        def losses_of(views: Views, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            def at_width(views: Views) -> dict[str, torch.Tensor]:
                extra = None
                if config.negatives is not None:
                    views, extra = split_negatives(views, batch, shared=config.share_negatives)
                return contrastive_loss(
                    views,
                    batch,
                    scale,
                    config.objectives,
                    config=config.loss,
                    bias=encoder.logit_bias,
                    log_q=log_q,
                    extra_columns=extra,
                )

            return nested_loss(views, encoder.widths, at_width)

        with accelerator.accumulate(model):
            if config.cache.on:
                losses = cached_backward(
                    encoder,
                    batch,
                    losses_of,
                    config=config.cache,
                    model=model,
                    backward=accelerator.backward,
                    autocast=lambda: accelerator.autocast(),
                )
            else:
                with accelerator.autocast():
                    losses = losses_of(*model(batch))
                accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
                losses["gradient_norm"] = whole_tensor(torch.as_tensor(norm))
            optimizer.step()
            optimizer.zero_grad()
        encoder.cap_scale()
        if average and accelerator.sync_gradients:
            average.update(encoder, step + 1)
        return losses

    def record(row: dict[str, Any]) -> None:
        if run:
            run.log(row)
        if config.trackers:
            named = {n if "/" in n else f"train/{n}": v for n, v in row.items() if n != "step"}
            accelerator.log(named, step=row["step"])

    def evaluate(progress: Progress) -> Progress:
        """Measure retrieval on the val split and export the encoder if it is the best so far."""
        value = None
        whole = whole_encoder(exported)
        if gallery:
            # Ranks see other rows, and so have other batch statistics; the first one's are exported.
            broadcast_buffers(whole)
            metrics = measure(whole, gallery, num_workers=config.num_workers)
            value = metrics[config.best_metric]
            record({"step": progress.step, **{f"val/{name}": v for name, v in metrics.items()}})
            if run:
                shown = "  ".join(f"{name} {v:.3f}" for name, v in metrics.items())
                if not is_quiet():
                    bar.write(f"step {progress.step}: val {shown}", file=sys.stderr)
        # Equal is better: of two that score the same, the one that has learned longer.
        better = value is not None and (progress.best is None or value >= progress.best)
        if better or (value is None and progress.step == total_steps):
            with saving(config.out):
                if accelerator.is_main_process:
                    parents = shards_parents(config, config.out / "encoder")
                    whole.save(config.out / "encoder", parents=parents, overwrite=True)
            progress = replace(progress, best=value, best_step=progress.step)
        if run:
            run.draw()
        accelerator.wait_for_everyone()
        return replace(progress, evaluated_step=progress.step)

    # --- loop ----------------------------------------------------------------------------------
    # In a log, too, where nobody watches a terminal.
    hidden = run is None or is_quiet()
    bar = tqdm(total=total_steps, initial=progress.step, desc="train", unit="step", disable=hidden)
    agreement = Agreement()
    on_cpu = accelerator.device.type == "cpu"
    faults = FaultWatch(
        max_loss_ratio=config.max_loss_ratio, check_norms=accelerator.scaler is None
    )
    last_checkpoint = checkpoint

    def check_losses() -> None:
        stop_at_fault(
            faults,
            agreement,
            run=config.out,
            content_ids=train.content_ids,
            last_checkpoint=last_checkpoint,
        )

    def check_weights() -> None:
        if agreement.largest(int(not weights_are_finite(model))):
            raise UserError(
                f"step {progress.step}: a weight is NaN or infinite, so nothing was saved; the last good "
                f"checkpoint is {last_checkpoint or 'none yet'}; --resume goes on from there"
            )

    started = time.perf_counter() - progress.seconds
    micro = progress.epoch * batches.steps_per_epoch + progress.batch
    stop = 0
    with bar, StopSignals(announce=run is not None) as signals:
        # At the start, and where a run was stopped between a step and its evaluation.
        if progress.step % eval_every == 0 and progress.evaluated_step != progress.step:
            progress = evaluate(progress)
        model.train()
        watch = Stopwatch(peak_flops=peak and peak * accelerator.num_processes)
        for batch in watch.waiting(loader):
            if progress.step == total_steps:
                break
            epoch, place = divmod(micro, batches.steps_per_epoch)
            losses = train_on(batch, progress.step)
            # Copied: a loader's batch lies in memory that the next ones need.
            samples = batch.samples.clone()
            faults.add(losses, step=progress.step + 1, epoch=epoch, batch=place, samples=samples)
            if config.log_samples:
                shown = gather(samples.to(accelerator.device)).tolist()
                if sample_log:
                    contents = [train.content_ids[i] for i in shown]
                    sample_log.log(epoch=epoch, batch=place, contents=contents)
            of_ranks = accelerator.num_processes
            watch.add(len(batch) * of_ranks, flops.of_step(batch) * of_ranks if flops else 0.0)
            micro += 1
            if micro % config.accumulation:
                continue
            epoch, place = divmod(micro, batches.steps_per_epoch)
            seconds = time.perf_counter() - started
            progress = replace(
                progress, step=progress.step + 1, epoch=epoch, batch=place, seconds=seconds
            )
            bar.update()
            ended = progress.step == total_steps
            logs = progress.step % config.log_every == 0 or ended
            evaluates = progress.step % eval_every == 0 or ended
            saves = progress.step % config.checkpoint_every == 0 or ended
            stop = 0 if ended else agreement.largest(signals.received)
            # A GPU is asked for its numbers only now and then: to look is to wait for it.
            looks = on_cpu or progress.step % 100 == 0
            if looks or logs or evaluates or saves or stop:
                check_losses()
            if evaluates or saves or stop:
                check_weights()
            if logs:
                means = {n: accelerator.reduce(v.detach(), "mean") for n, v in losses.items()}
                row = {name: float(value) for name, value in means.items()}  # pyright: ignore
                row |= {
                    "lr": optimizer.param_groups[0]["lr"],
                    "scale": scale_of(encoder),
                    **watch.report(),
                    "memory_gib": memory_gib(accelerator.device),
                }
                record({"step": progress.step, "epoch": micro / batches.steps_per_epoch, **row})
                bar.set_postfix(bar_fields(row))
            if evaluates and not stop:
                progress = evaluate(progress)
                model.train()
                watch.report()
            if saves or stop:
                last_checkpoint = save_checkpoint(
                    accelerator, config.out, progress, keep=config.keep_checkpoints
                )
            if stop:
                break
    if stop:
        if run:
            run.draw()
            print(stop_message(stop, config.out), file=sys.stderr)
        accelerator.end_training()
        raise SystemExit(exit_status(stop))

    # --- save ----------------------------------------------------------------------------------
    if run:
        finish(config, progress, total_batches * config.sampler.batch_size)
    accelerator.end_training()


def shards_parents(config: TrainConfig, child: Path) -> list[Parent]:
    """The record of what was trained on; the folder of the validation split comes first."""
    return [parent_of(child, f, "shards") for f in (config.shards, *config.further_shards)]


def finish(config: TrainConfig, progress: Progress, samples: int) -> None:
    """Write the run's manifest and say where the encoder is."""
    encoder = read_manifest(config.out / "encoder", "encoder")
    minutes = round(progress.seconds / 60, 2)
    write_manifest(
        config.out,
        Manifest(
            kind="run",
            config=asdict(config),
            counts={"steps": progress.step, "in": samples, "out": samples, "dropped": {}},
            parents=shards_parents(config, config.out),
            fingerprint=fingerprint_of(
                {"encoder": encoder.fingerprint, "steps": str(progress.step)}
            ),
            details={
                "best": {config.best_metric: progress.best, "step": progress.best_step},
                "minutes": minutes,
            },
        ),
    )
    best = "there is no val split, so the last encoder was kept"
    if progress.best is not None:
        best = f"best val {config.best_metric} {progress.best:.3f} at step {progress.best_step}"
    print("\n".join(summarize_curves(read_metrics(config.out))))
    print(f"trained {progress.step} steps in {minutes:.1f} min; {best}")
    print(f"encoder: {config.out / 'encoder'}")


if __name__ == "__main__":
    run_program(lambda: main(parse(sys.argv[1:])))
