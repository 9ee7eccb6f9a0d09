"""Train a generator of semantic IDs on sessions, on contents and the products that they lead to, or on both.

Input: semantic IDs (train/semantic_ids.py), and a folder with sessions.parquet (user_id, item_ids in time
order) or embeddings of contents with their product_ids (`mmrec embed --split train`). Output: a run folder
with config.json, metrics.jsonl, curves.png, checkpoints, the best generator, and what it recommends to
held-out users.

    accelerate launch --config_file accelerate_config.yaml train/generator.py \
        --sessions runs/beauty/sessions --ids runs/beauty/ids --out runs/beauty/generator

The first argument may be the config.json of an earlier run; flags override its fields. Leave-one-out: the
last product of a session is for the test, the one before it for validation, and training sees neither.
Figures are of items over the whole catalogue, with seen products kept; a target that is not among the beams
is a miss.

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the step; --resume goes on.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train/contrastive.py

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from tqdm import tqdm

from mmrec.bars import is_quiet
from mmrec.cli import run_program
from mmrec.distributed import Agreement
from mmrec.errors import UserError
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.semantic_ids import KIND as IDS_KIND
from mmrec.generative.semantic_ids import SemanticIds
from mmrec.generative.sequences import (
    SequenceBatch,
    SequenceBatches,
    Sessions,
    held_out_queries,
    read_sessions,
    without_last,
)
from mmrec.generative.trie import Trie, build_trie
from mmrec.manifest import (
    Manifest,
    Parent,
    check_output,
    fingerprint_of,
    hash_file,
    parent_of,
    read_manifest,
    write_manifest,
    write_whole,
)
from mmrec.ranges import Count, CountOrZero, NonNegative, Positive, Share, check_ranges
from mmrec.retrieval.embed import Embeddings, read_embeddings
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
from mmrec.training.faults import weights_are_finite
from mmrec.training.progress import Stopwatch, memory_gib
from mmrec.training.run import RunFolder, differing_fields, read_config
from mmrec.training.schedules import warmup_cosine
from mmrec.training.stopping import StopSignals, exit_status, stop_message

# --- config ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining:
    """Everything that a run is made from."""

    ids: Path
    """Semantic IDs of the catalogue."""
    out: Path
    """The run folder."""
    sessions: Path | None = None
    """A folder with sessions.parquet."""
    contents: Path | None = None
    """Embeddings of training contents, with the products that they lead to."""
    val_contents: Path | None = None
    """The same of the val split, to measure on where there are no sessions."""
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    epochs: Count = 40
    """Passes over the training sequences."""
    batch_size: Count = 128
    """Sequences of a step, over all ranks."""
    drop_items: Share = 0.1
    """Share of a sequence's products left out of it, other ones each epoch."""
    learning_rate: Positive = 2e-3
    """AdamW's peak, after a linear warm-up; half a cosine follows."""
    weight_decay: NonNegative = 0.05
    """On matrices and the table of codes."""
    warmup: Share = 0.05
    """Share of all steps over which the learning rate rises."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""
    held_out: Count = 2
    """Last products of a session that training does not see: the test's, and before it the validation's."""
    eval_epochs: Count = 2
    """Epochs between evaluations."""
    eval_users: Count = 2_000
    """Users or contents asked for at an evaluation, the same each time."""
    num_beams: Count = 20
    """Beams of evaluations while training."""
    test_beams: Count = 50
    """Beams of the evaluation on the test, at the end."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """None takes what accelerate's own config says."""
    cpu_threads: CountOrZero = 0
    """Threads of a rank that trains on a CPU; 0 shares the cores out among the ranks."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; there is one at the end in any case."""
    keep_checkpoints: Count = 2
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, or start if there is none."""
    seed: CountOrZero = 0


FREE_ON_RESUME = ("ids", "sessions", "contents", "val_contents", "out", "resume", "cpu_threads")
FREE_ON_RESUME += ("log_every", "keep_checkpoints", "eval_users", "num_beams", "test_beams")
METRIC = "R@10"


def parse(arguments: list[str]) -> GeneratorTraining:
    """Read an earlier run's config.json, if one is given, and the flags that override it."""
    program = "generator.py"
    if not arguments or not arguments[0].endswith(".json"):
        return tyro.cli(GeneratorTraining, args=arguments, prog=program)
    earlier = read_config(Path(arguments[0]), GeneratorTraining)
    return tyro.cli(GeneratorTraining, default=earlier, args=arguments[1:], prog=program)


def check(config: GeneratorTraining) -> Path | None:
    """Find the checkpoint to go on from, and refuse what cannot work before any work is done."""
    check_ranges(config)
    if config.sessions is None and config.contents is None:
        raise UserError("give --sessions FOLDER, --contents FOLDER, or both")
    read_manifest(config.ids, IDS_KIND)
    inputs = [path for path in (config.ids, config.sessions, config.contents) if path]
    check_output(config.out / "generator", kind="generator", overwrite=True, inputs=inputs)
    checkpoint = newest_checkpoint(config.out) if config.resume else None
    if checkpoint is None:
        begun = list_checkpoints(config.out) or (config.out / "metrics.jsonl").exists()
        if begun and not config.resume:
            raise UserError(
                f"{config.out}: holds a run already; --resume goes on with it, or give another --out"
            )
        return None
    earlier = read_config(checkpoint / "config.json", GeneratorTraining)
    free = {name: getattr(config, name) for name in FREE_ON_RESUME}
    changed = differing_fields(replace(earlier, **free), config)
    if changed:
        raise UserError(f"{checkpoint}: cannot resume with another config: {'; '.join(changed)}")
    data, before = fingerprint_of_data(config), read_progress(checkpoint).shards
    if data != before:
        raise UserError(
            f"{config.out}: cannot resume on other data: began on {before}, and this is {data}"
        )
    return checkpoint


def fingerprint_of_data(config: GeneratorTraining) -> str:
    """What decides whether a run reads the IDs and sessions that it began on."""
    parts = {"ids": read_manifest(config.ids, IDS_KIND).fingerprint}
    if config.sessions is not None:
        parts["sessions"] = hash_file(config.sessions / "sessions.parquet")
    if config.contents is not None:
        parts["contents"] = read_manifest(config.contents, "embeddings").fingerprint
    return fingerprint_of(parts)


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What an evaluation asks: histories, contents or both, and the right answers as rows of the IDs."""

    names: list[str]
    histories: list[torch.Tensor]
    contents: torch.Tensor | None
    answers: list[set[int]]
    single: bool
    """Whether each has one answer, so that nDCG is that of its rank."""

    def take(self, most: int, seed: int) -> "Queries":
        """At most so many of them, drawn by the seed."""
        if len(self.names) <= most:
            return self
        rows = sorted(
            np.random.default_rng(seed).choice(len(self.names), most, replace=False).tolist()
        )
        return Queries(
            names=[self.names[row] for row in rows],
            histories=[self.histories[row] for row in rows],
            contents=None if self.contents is None else self.contents[rows],
            answers=[self.answers[row] for row in rows],
            single=self.single,
        )


def session_queries(
    sessions: Sessions, ids: SemanticIds, config: GeneratorTraining, place: int, width: int
) -> Queries:
    """The held-out products of all sessions, `place` from the end; those without an ID are never found."""
    found = held_out_queries(sessions.items, config.held_out, place)
    codes = torch.from_numpy(ids.codes).long()
    return Queries(
        names=[sessions.user_ids[number] for number, _, _ in found],
        histories=[codes[ids.known(history)[0]] for _, history, _ in found],
        contents=torch.zeros(len(found), width) if width else None,
        answers=[{ids.rows.get(target, -2)} for _, _, target in found],
        single=True,
    )


def content_queries(embeddings: Embeddings, ids: SemanticIds) -> Queries:
    """Contents, and the products that each leads to."""
    nothing = torch.zeros(0, ids.codes.shape[1], dtype=torch.int64)
    return Queries(
        names=embeddings.ids,
        histories=[nothing] * len(embeddings.ids),
        contents=torch.from_numpy(embeddings.vectors),
        answers=[{ids.rows.get(id_, -2) for id_ in own} for own in linked_products(embeddings)],
        single=False,
    )


def linked_products(embeddings: Embeddings) -> list[list[str]]:
    """The products that each content leads to. Raises `UserError` for embeddings of something else."""
    if "product_ids" not in embeddings.metadata.column_names:
        raise UserError(
            f"{embeddings.folder}: says of no content which products it leads to; expected what "
            "`mmrec embed --split train` writes"
        )
    return embeddings.metadata["product_ids"].to_pylist()


def training_batches(
    config: GeneratorTraining,
    ids: SemanticIds,
    sessions: Sessions | None,
    contents: Embeddings | None,
) -> tuple[SequenceBatches, dict[str, int]]:
    """All that is learned from, and counts of what was left out."""
    counts = {"sessions": 0, "unknown_items": 0, "items": 0, "contents": 0}
    sequences, pairs = [], []
    if sessions is not None:
        for own in without_last(sessions.items, config.held_out):
            rows, unknown = ids.known(own)
            sequences.append(np.array(rows, np.int64))
            counts["unknown_items"] += unknown
            counts["items"] += len(rows)
        counts["sessions"] = len(sequences)
        if counts["items"] < counts["unknown_items"]:
            raise UserError(
                f"{config.ids}: knows {counts['items']:,} and not {counts['unknown_items']:,} of the "
                f"products in {config.sessions}; they are of another catalogue"
            )
    if contents is not None:
        for row, own in enumerate(linked_products(contents)):
            pairs += [(row, product) for product in ids.known(own)[0]]
        counts["contents"] = len(contents.ids)
    batches = SequenceBatches(
        sequences,
        batch_size=config.batch_size,
        max_items=config.model.max_items + 1,  # A whole history, and what comes next.
        drop_items=config.drop_items,
        pairs=pairs,
        contents=None if contents is None else contents.vectors,
        seed=config.seed,
    )
    return batches, counts


def check_encoders(config: GeneratorTraining, ids: SemanticIds, contents: Embeddings) -> None:
    """Refuse contents embedded by another encoder than the IDs were cut from."""
    of_ids = ids.manifest.encoder if ids.manifest else None
    if of_ids is not None and contents.manifest.encoder != of_ids:
        raise UserError(
            f"{config.contents}: was embedded by {contents.manifest.encoder}, and {config.ids} was cut from "
            f"embeddings of {of_ids}; embed contents and catalogue with one encoder"
        )


# --- evaluation --------------------------------------------------------------------------------


def recommend(
    generator: Generator, queries: Queries, trie: Trie, num_beams: int, *, at_once: int = 128
) -> Iterator[tuple[list[int], list[float]]]:
    """The products and scores that beams find for each query, best first."""
    order = sorted(range(len(queries.names)), key=lambda row: len(queries.histories[row]))
    found: list[Any] = [None] * len(order)
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        contents = None if queries.contents is None else queries.contents[rows].to(generator.device)
        beams = generator.generate(
            [queries.histories[row] for row in rows],
            trie=trie,
            num_beams=num_beams,
            contents=contents,
        )
        assert beams.products is not None
        for row, products, scores in zip(
            rows, beams.products.tolist(), beams.scores.tolist(), strict=True
        ):
            there = sum(product >= 0 for product in products)
            found[row] = (products[:there], scores[:there])
    yield from found


def measure(lists: Sequence[Sequence[int]], queries: Queries) -> dict[str, float]:
    """R@K, and for single answers nDCG@K, of items: the rank of the first right one, or a miss."""
    ranks = [
        next((place for place, product in enumerate(own, 1) if product in answers), math.inf)
        for own, answers in zip(lists, queries.answers, strict=True)
    ]
    metrics = {f"R@{k}": float(np.mean([rank <= k for rank in ranks])) for k in (1, 5, 10)}
    if queries.single:
        for k in (5, 10):
            gains = [1 / math.log2(1 + rank) if rank <= k else 0.0 for rank in ranks]
            metrics[f"N@{k}"] = float(np.mean(gains))
    return metrics


# --- training ----------------------------------------------------------------------------------


def build_optimizer(generator: Generator, config: GeneratorTraining) -> torch.optim.AdamW:
    """AdamW with weight decay where a weight has at least two dimensions."""
    learning = [weight for weight in generator.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in learning if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in learning if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def main(config: GeneratorTraining) -> None:
    """Train, evaluate while training, keep the best generator, and test it."""
    checkpoint = check(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        project_dir=config.out,
        # Of a batch without contents nothing flows to their projection.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if checkpoint:
        check_launch(accelerator, checkpoint)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError("a generator is small: launch its training with DDP, without FSDP")
    ranks = accelerator.num_processes
    if config.batch_size % ranks:
        raise UserError(f"--batch-size {config.batch_size}: does not divide among {ranks} ranks")
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(config.cpu_threads or max(1, (cores or 1) // ranks))

    # --- data ----------------------------------------------------------------------------------
    ids = SemanticIds.load(config.ids)
    sessions = read_sessions(config.sessions) if config.sessions else None
    contents = read_embeddings(config.contents) if config.contents else None
    if contents is not None:
        check_encoders(config, ids, contents)
    width = contents.vectors.shape[1] if contents else 0
    batches, counts = training_batches(config, ids, sessions, contents)
    queries, tests = None, None
    if sessions is not None and config.held_out >= 2:
        queries = session_queries(sessions, ids, config, 2, width)
    if sessions is not None:
        tests = session_queries(sessions, ids, config, 1, width)
    if sessions is None and config.val_contents is not None:
        queries = content_queries(read_embeddings(config.val_contents), ids)
    asked = queries.take(config.eval_users, config.seed) if queries else None
    total_steps = config.epochs * batches.steps_per_epoch
    eval_every = config.eval_epochs * batches.steps_per_epoch

    # --- model ---------------------------------------------------------------------------------
    shape = replace(config.model, content_width=width)
    generator = Generator(shape, ids.sizes, root=ids.root or ids.fingerprint)
    optimizer = build_optimizer(generator, config)
    model, optimizer = accelerator.prepare(generator, optimizer)
    trie = build_trie(ids.codes, device=accelerator.device)
    codes = torch.from_numpy(ids.codes).long().to(accelerator.device)
    if checkpoint:
        progress = read_progress(checkpoint)
        restore_checkpoint(accelerator, checkpoint, seed=config.seed)
    else:
        progress = Progress(shards=fingerprint_of_data(config))
    progress = replace(progress, world_size=ranks, mixed_precision=accelerator.mixed_precision)
    run = None
    if accelerator.is_main_process:
        run = RunFolder(config.out, config, from_step=progress.step if checkpoint else None)
        if not checkpoint:
            weights = sum(part.numel() for part in generator.parameters())
            left_out = f", {counts['unknown_items']:,} without an ID left out" * bool(
                counts["unknown_items"]
            )
            print(
                f"{batches.num_rows:,} sequences of {counts['items']:,} items{left_out}, "
                f"{counts['contents']:,} contents; {weights:,} weights; {total_steps:,} steps",
                file=sys.stderr,
            )
    parents = parents_of(config)

    # --- step ----------------------------------------------------------------------------------
    def train_on(batch: SequenceBatch, step: int) -> dict[str, torch.Tensor]:
        """One batch forward and backward, and an optimizer step."""
        warmup = max(1, round(config.warmup * total_steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(
                step, total=total_steps, warmup=warmup
            )
        with accelerator.autocast():
            losses = model(
                codes[batch.rows.to(codes.device)],
                batch.present.to(codes.device),
                None if batch.contents is None else batch.contents.to(codes.device),
            )
        accelerator.backward(losses["loss"])
        losses["gradient_norm"] = torch.as_tensor(
            accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
        )
        optimizer.step()
        optimizer.zero_grad()
        return losses

    def evaluate(progress: Progress) -> Progress:
        """Measure on validation and keep the generator if it is the best so far; the first rank does."""
        value = None
        if run and asked:
            generator.eval()
            lists = [own for own, _ in recommend(generator, asked, trie, config.num_beams)]
            metrics = measure(lists, asked)
            value = metrics[METRIC]
            run.log({"step": progress.step, **{f"val/{n}": v for n, v in metrics.items()}})
            shown = "  ".join(f"{name} {v:.4f}" for name, v in metrics.items())
            bar.write(f"step {progress.step}: val {shown}", file=sys.stderr)
            generator.train()
        better = value is None or progress.best is None or value >= progress.best
        with saving(config.out):
            if run and better:
                generator.save(config.out / "generator", parents=parents, overwrite=True)
        if better:
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
    started = time.perf_counter() - progress.seconds
    stop = 0
    with bar, StopSignals(announce=run is not None) as signals:
        model.train()
        watch = Stopwatch()
        while progress.step < total_steps and not stop:
            plan = batches.plan(progress.epoch)
            for place in range(progress.batch, batches.steps_per_epoch):
                share = slice(accelerator.process_index, None, ranks)
                losses = train_on(batches.collate(plan[place][share]), progress.step)
                watch.add(config.batch_size)
                ended_epoch = place + 1 == batches.steps_per_epoch
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    epoch=progress.epoch + ended_epoch,
                    batch=0 if ended_epoch else place + 1,
                    seconds=time.perf_counter() - started,
                )
                bar.update()
                ended = progress.step == total_steps
                logs = progress.step % config.log_every == 0 or ended
                evaluates = progress.step % eval_every == 0 or ended
                saves = progress.step % config.checkpoint_every == 0 or ended
                stop = 0 if ended else agreement.largest(signals.received)
                if logs:
                    means = {n: accelerator.reduce(v.detach(), "mean") for n, v in losses.items()}
                    row = {name: float(value) for name, value in means.items()}  # pyright: ignore
                    if not math.isfinite(row["loss"]):
                        raise UserError(
                            f"step {progress.step}: the loss is {row['loss']}; the last checkpoint is "
                            f"{(list_checkpoints(config.out) or ['none yet'])[-1]}; start anew with a lower "
                            "--learning-rate"
                        )
                    row |= {"lr": optimizer.param_groups[0]["lr"], **watch.report()}
                    row |= {"memory_gib": memory_gib(accelerator.device)}
                    if run:
                        run.log({"step": progress.step, **row})
                    bar.set_postfix(
                        {"loss": f"{row['loss']:.3f}", "seq/s": f"{row['samples_per_s']:.0f}"}
                    )
                if (evaluates or saves or stop) and agreement.largest(
                    int(not weights_are_finite(model))
                ):
                    raise UserError(
                        f"step {progress.step}: a weight is NaN or infinite, so nothing was saved; start "
                        "anew with a lower --learning-rate"
                    )
                if evaluates and not stop:
                    progress = evaluate(progress)
                    watch.report()
                if saves or stop:
                    save_checkpoint(accelerator, config.out, progress, keep=config.keep_checkpoints)
                if stop:
                    break
    if stop:
        if run:
            run.draw()
            print(stop_message(stop, config.out, program="train/generator.py"), file=sys.stderr)
        accelerator.end_training()
        raise SystemExit(exit_status(stop))

    # --- test and save -------------------------------------------------------------------------
    if run:
        device = str(accelerator.device)
        best = Generator.load(config.out / "generator", device=device)
        metrics = test(config, best, ids, tests, trie) if tests else {}
        finish(config, progress, counts, metrics)
    accelerator.end_training()


def parents_of(config: GeneratorTraining) -> list[Parent]:
    """What a generator is made from, as a folder in the run remembers it."""
    child = config.out / "generator"
    folders = [config.ids, config.sessions, config.contents]
    return [
        parent_of(child, f) for f in folders if f is not None and (f / "manifest.json").is_file()
    ]


def test(
    config: GeneratorTraining, generator: Generator, ids: SemanticIds, queries: Queries, trie: Trie
) -> dict[str, float]:
    """Ask for every session's last product, and write what was recommended beside the figures."""
    started = time.perf_counter()
    found = list(recommend(generator, queries, trie, config.test_beams))
    seconds = time.perf_counter() - started
    table = {
        "user_id": queries.names,
        "item_ids": [[ids.product_ids[row] for row in rows] for rows, _ in found],
        "scores": pa.array([scores for _, scores in found], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), config.out / "recommendations.parquet")
    metrics = measure([rows for rows, _ in found], queries)
    metrics["users_per_s"] = len(found) / seconds
    write_whole(config.out / "test.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def finish(
    config: GeneratorTraining, progress: Progress, counts: dict[str, int], metrics: dict[str, float]
) -> None:
    """Write the run's manifest and say where the generator is."""
    generator = read_manifest(config.out / "generator", "generator")
    minutes = round(progress.seconds / 60, 2)
    write_manifest(
        config.out,
        Manifest(
            kind="run",
            config=asdict(config),
            counts={"steps": progress.step, **counts},
            parents=parents_of(config),
            fingerprint=fingerprint_of(
                {"generator": generator.fingerprint, "steps": str(progress.step)}
            ),
            details={
                "best": {METRIC: progress.best, "step": progress.best_step},
                "minutes": minutes,
                "test": metrics,
            },
        ),
    )
    best = "nothing to validate on, so the last generator was kept"
    if progress.best is not None:
        best = f"best val {METRIC} {progress.best:.4f} at step {progress.best_step}"
    print(f"trained {progress.step} steps in {minutes:.1f} min; {best}")
    if metrics:
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("R@5", "N@5", "R@10", "N@10"))
        print(
            f"test, items, seen kept: {shown}; {metrics['users_per_s']:.0f} users/s at "
            f"{config.test_beams} beams"
        )
    print(f"generator: {config.out / 'generator'}")


if __name__ == "__main__":
    run_program(lambda: main(parse(sys.argv[1:])))
