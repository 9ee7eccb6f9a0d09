"""Train a generator of semantic IDs on sessions, on contents and the products that they lead to, or on both.

Input: semantic IDs (train/semantic_ids.py), and a folder of sessions (data_prep/amazon_reviews.py,
data_prep/content_sessions.py) or embeddings of contents with their product_ids (`mmrec embed --split train`).
Output: a run folder with config.json, metrics.jsonl, curves.png, checkpoints, the best generator, what it
recommends to held-out users (lists/val.parquet and lists/test.parquet, which train/ranker.py reads), and how
good that is (metrics.json, table.txt).

    accelerate launch --quiet --config_file accelerate_config.yaml train/generator.py \
        --sessions runs/beauty/sessions --ids runs/beauty/ids --out runs/beauty/generator

Where sessions say what was watched and when, --watched FOLDERS (embeddings of those contents) teaches what
comes after a history and a content together, and val and test are asked with either and with both.

The first argument may be the config.json of an earlier run; flags override its fields. With --evaluate-only
the generator of a run is measured again, and not trained:

    python train/generator.py runs/beauty/generator/config.json --evaluate-only --test-beams 100

Targets are held out as --by says, and training sees neither validation's nor the test's. Figures are those
of mmrec.generative.evaluation: of products over the whole catalogue, with seen ones kept and removed. A
target that is not among the beams is a miss.

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the step; --resume goes on.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train/contrastive.py

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from jaxtyping import Float32, Int64
from tqdm import tqdm

from mmrec.bars import is_quiet
from mmrec.cli import run_program
from mmrec.distributed import Agreement
from mmrec.errors import UserError
from mmrec.generative.baselines import popularity_scores, transition_scores
from mmrec.generative.evaluation import (
    METRIC_NAMES,
    Evaluation,
    RankedProducts,
    Scores,
    evaluate_recommendations,
    format_differences,
    format_table,
)
from mmrec.generative.generated import (
    generate_lists,
    histories_as_codes,
    id_rows,
    in_catalogue,
    rank_answers,
)
from mmrec.generative.generator import Generator, GeneratorConfig, check_ids
from mmrec.generative.lists import write_lists
from mmrec.generative.semantic_ids import KIND as IDS_KIND
from mmrec.generative.semantic_ids import SemanticIds
from mmrec.generative.sequences import SequenceBatch, SequenceBatches, rows_or_zeros
from mmrec.generative.sessions import (
    FILES,
    Sessions,
    Split,
    SplitBy,
    check_same_sessions,
    read_sessions,
    sample_queries,
    split_sessions,
)
from mmrec.generative.trie import Trie, build_trie
from mmrec.generative.watched import last_watched, watched_sequences
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
from mmrec.retrieval.metrics import per_query
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
    """A folder of sessions."""
    by: SplitBy | None = "leave-one-out"
    """How targets of sessions are held out; None learns from all that there is, and measures nothing."""
    contents: Path | None = None
    """Embeddings of training contents, with the products that they lead to: sequences without a history."""
    watched: tuple[Path, ...] = ()
    """Folders of embeddings of what the sessions say was watched, beside those of --contents; what val and
    test are asked with is among them. Each training product is then learned a second time, from its history
    and one content watched since the purchase before it, and queries are asked with both, too."""
    val_contents: Path | None = None
    """The same of the val split, to measure on where there are no sessions."""
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    epochs: Count = 20
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
    eval_epochs: Count = 2
    """Epochs between evaluations."""
    patience: CountOrZero = 5
    """Evaluations in a row without a better one after which training ends early; 0 never ends it."""
    eval_users: Count = 2_000
    """Users or contents asked for at an evaluation, the same each time."""
    num_beams: Count = 20
    """Beams of evaluations while training."""
    test_beams: Count = 50
    """Beams of the lists that are written at the end: so many products a user."""
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
    evaluate_only: bool = False
    """Measure the generator in `out` again, and write its lists; nothing is trained."""
    seed: CountOrZero = 0


FREE_ON_RESUME = ("ids", "sessions", "contents", "val_contents", "out", "resume", "cpu_threads")
FREE_ON_RESUME += ("log_every", "keep_checkpoints", "eval_users", "num_beams", "test_beams")
FREE_ON_RESUME += ("patience", "evaluate_only", "watched")
METRIC = "R@10"
NAME, COUNTS = "generator", "transition counts"
CONTENT, BOTH = "generator, content alone", "generator, history and content"


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
    if config.watched and config.sessions is None:
        raise UserError("--watched: give --sessions too, which say who watched what")
    read_manifest(config.ids, IDS_KIND)
    inputs = inputs_of(config)
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
        for name in FILES:
            parts[name] = hash_file(config.sessions / f"{name}.parquet")
    if config.contents is not None:
        parts["contents"] = read_manifest(config.contents, "embeddings").fingerprint
    for number, path in enumerate(config.watched):
        parts[f"watched {number}"] = read_manifest(path, "embeddings").fingerprint
    return fingerprint_of(parts)


def inputs_of(config: GeneratorTraining) -> list[Path]:
    """What a generator is made from."""
    inputs = (config.ids, config.sessions, config.contents, *config.watched)
    return [path for path in inputs if path]


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads."""

    ids: SemanticIds
    sessions: Sessions | None
    rows: Int64[np.ndarray, " _"]
    """The row of each product of the sessions' catalogue in the table of IDs; -1 where there is none."""
    splits: dict[str, Split]
    """val and test of the sessions; empty where nothing is held out."""
    contents: Embeddings | None
    val_contents: Embeddings | None
    content_ids: list[str]
    """Those of `contents`, and then those that were watched."""
    vectors: Float32[np.ndarray, "_ V"] | None
    """Their embeddings; None without any."""
    last: dict[str, Int64[np.ndarray, " U"]]
    """The row in `vectors` of the last content that each user watched before val and test, -1 for none; empty
    where nothing watched is given."""

    @property
    def width(self) -> int:
        """Numbers of a content's embedding; 0 without contents."""
        return 0 if self.vectors is None else self.vectors.shape[1]

    @property
    def fullest(self) -> str:
        """How queries are asked where all is given that the run has learned from."""
        return BOTH if self.last else NAME


def read_data(config: GeneratorTraining) -> Data:
    """Read what the config names. Raises `UserError` for what does not belong together."""
    ids = SemanticIds.load(config.ids)
    sessions = read_sessions(config.sessions) if config.sessions else None
    splits = {}
    if sessions is not None and config.by is not None:
        check_held_out(config, ids, sessions)
        splits = {
            "val": split_sessions(sessions, config.by, "val"),
            "test": split_sessions(sessions, config.by, "test"),
        }
    contents, val_contents = (
        read_contents(ids, config.ids, path) if path else None
        for path in (config.contents, config.val_contents)
    )
    known = [read_contents(ids, config.ids, path) for path in config.watched]
    known = [contents, *known] if contents else known
    if len({one.manifest.encoder for one in known}) > 1:
        raise UserError("--watched and --contents: embed them with one encoder")
    content_ids = [id_ for one in known for id_ in one.ids]
    last = {}
    if sessions is not None and config.watched:
        last = {name: last_watched(sessions, own, content_ids) for name, own in splits.items()}
    for name, own in last.items():
        if own.max() < 0:
            raise UserError(f"--watched: none of them was watched before a target of {name}")
    return Data(
        ids=ids,
        sessions=sessions,
        rows=id_rows(ids, sessions.product_ids if sessions else []),
        splits=splits,
        contents=contents,
        val_contents=val_contents,
        content_ids=content_ids,
        vectors=np.concatenate([one.vectors for one in known]) if known else None,
        last=last,
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
    config: GeneratorTraining, data: Data
) -> tuple[SequenceBatches, dict[str, int]]:
    """All that is learned from, and counts of what was left out."""
    counts = {"sessions": 0, "unknown_items": 0, "items": 0, "contents": 0, "watched": 0}
    sequences, pairs, watched = [], [], []
    if data.sessions is not None:
        learned = data.splits["val"].train if data.splits else data.sessions.events
        found = [data.rows[own] for own in learned]
        sequences = [own[own >= 0] for own in found]
        counts["sessions"] = len(sequences)
        counts["items"] = sum(map(len, sequences))
        unknown = data.sessions.dropped.get("unknown product id", 0)
        counts["unknown_items"] = unknown + len(learned.items) - counts["items"]
        if counts["items"] < counts["unknown_items"]:
            raise UserError(
                f"{config.ids}: knows {counts['items']:,} and not {counts['unknown_items']:,} of the "
                f"products in {config.sessions}; they are of another catalogue"
            )
        if config.watched:
            watched = watched_sequences(data.sessions, learned, data.rows, data.content_ids)
            counts["watched"] = len(watched)
    if data.contents is not None:
        for row, own in enumerate(linked_products(data.contents)):
            pairs += [(row, product) for product in data.ids.known(own)[0]]
        counts["contents"] = len(data.contents.ids)
    batches = SequenceBatches(
        sequences,
        batch_size=config.batch_size,
        max_items=config.model.max_items + 1,  # A whole history, and what comes next.
        drop_items=config.drop_items,
        pairs=pairs,
        watched=watched,
        contents=data.vectors,
        seed=config.seed,
    )
    return batches, counts


def check_held_out(config: GeneratorTraining, ids: SemanticIds, sessions: Sessions) -> None:
    """Refuse IDs cut from other sessions, or with other targets held out: they may have seen ours."""
    if ids.manifest is None:
        return
    what = f"{config.ids}: was cut from"
    mend = f"cut IDs from these: train/semantic_ids.py --tables {config.sessions}"
    check_same_sessions(ids.manifest, sessions, config.sessions, what=what, mend=mend)
    details = ids.manifest.details
    if details.get("by", config.by) != config.by:
        raise UserError(
            f"{config.ids}: was cut from sessions with targets held out by {details['by']}, and these are by "
            f"{config.by}; give --by {details['by']}, or cut IDs with --by {config.by}"
        )


def read_contents(ids: SemanticIds, ids_path: Path, path: Path) -> Embeddings:
    """Embeddings of contents, which must be of the encoder that the IDs were cut from."""
    contents = read_embeddings(path)
    of_ids = ids.manifest.encoder if ids.manifest else None
    if of_ids is not None and contents.manifest.encoder != of_ids:
        raise UserError(
            f"{path}: was embedded by {contents.manifest.encoder}, and {ids_path} was cut from "
            f"embeddings of {of_ids}; embed contents and catalogue with one encoder"
        )
    return contents


# --- evaluation --------------------------------------------------------------------------------


def recommend(
    generator: Generator,
    data: Data,
    split: Split,
    trie: Trie,
    num_beams: int,
    *,
    way: str = NAME,
    last: Int64[np.ndarray, " U"] | None = None,
) -> RankedProducts:
    """The lists of a split's queries, in the rows of the sessions' catalogue.

    `way` says what they are asked with: NAME the history, CONTENT each user's content in `last`, BOTH both.
    """
    histories = histories_as_codes(split.histories, data.ids, data.rows)
    if way == CONTENT:
        histories = [own[:0] for own in histories]
    contents = None
    if data.vectors is not None:
        none = np.full(len(histories), -1)
        rows = none if way == NAME or last is None else last[split.queries]
        contents = rows_or_zeros(data.vectors, rows)
    found = generate_lists(generator, histories, trie=trie, num_beams=num_beams, contents=contents)
    return in_catalogue(found, data.ids, data.rows)


def validate(
    config: GeneratorTraining, generator: Generator, data: Data, trie: Trie
) -> dict[str, float]:
    """Means over some users, or contents, of validation; empty where there are none."""
    if data.splits:
        split = sample_queries(data.splits["val"], config.eval_users, seed=config.seed)
        way, last = data.fullest, data.last.get("val")
        lists = recommend(generator, data, split, trie, config.num_beams, way=way, last=last)
        found = evaluate_recommendations({way: lists}, split, len(data.rows), num_resamples=1)
        means = found.systems[way]["kept"].slices["all"]
        return {name: float(means[name]) for name in METRIC_NAMES}
    if data.val_contents is not None:
        return validate_contents(config, generator, data.val_contents, data.ids, trie)
    return {}


def validate_contents(
    config: GeneratorTraining,
    generator: Generator,
    contents: Embeddings,
    ids: SemanticIds,
    trie: Trie,
) -> dict[str, float]:
    """How well the products are found that contents lead to, of which each may have several."""
    count = min(config.eval_users, len(contents.ids))
    asked = np.sort(
        np.random.default_rng(config.seed).choice(len(contents.ids), count, replace=False)
    )
    nothing = torch.zeros(0, ids.codes.shape[1], dtype=torch.int64)
    lists = generate_lists(
        generator,
        [nothing] * count,
        trie=trie,
        num_beams=config.num_beams,
        contents=torch.from_numpy(contents.vectors[asked]),
    )
    linked = linked_products(contents)
    answers = [id_rows(ids, linked[row]).tolist() for row in asked]
    values = per_query(rank_answers(lists, answers, len(ids)))
    return {name: float(column.mean()) for name, column in values.items()}


def test(
    config: GeneratorTraining, generator: Generator, data: Data, trie: Trie
) -> Evaluation | None:
    """Write the lists of validation and test, and their figures; None where no session is held out."""
    if data.sessions is None or not data.splits:
        return None
    lists, seconds = {}, 0.0
    for name, split in data.splits.items():
        started = time.perf_counter()
        way, last = data.fullest, data.last.get(name)
        own = recommend(generator, data, split, trie, config.test_beams, way=way, last=last)
        seconds += time.perf_counter() - started
        write_lists(config.out / "lists" / f"{name}.parquet", own, data.sessions, split)
        lists[name] = own
    asked, last = data.splits["test"], data.last.get("test")
    systems: dict[str, Scores] = {
        "popularity": popularity_scores(asked.train, len(asked.targets), len(data.rows)),
        COUNTS: transition_scores(asked.train, asked.histories, len(data.rows)),
    }
    for way in (NAME, CONTENT) if data.last else ():
        systems[way] = recommend(
            generator, data, asked, trie, config.test_beams, way=way, last=last
        )
    systems[data.fullest] = lists["test"]
    found = evaluate_recommendations(systems, asked, len(data.rows))
    of_val = evaluate_recommendations(
        {data.fullest: lists["val"]}, data.splits["val"], len(data.rows)
    )
    users = sum(len(split.targets) for split in data.splits.values())
    report(config, found, of_val, users_per_s=users / seconds)
    return found


def report(
    config: GeneratorTraining, found: Evaluation, of_val: Evaluation, *, users_per_s: float
) -> None:
    """Print the table, and write it as table.txt and metrics.json."""
    lines, differences = [format_table(found), ""], {}
    ways = [way for way in (NAME, CONTENT, BOTH) if way in found.systems]
    for ours, theirs in ((ways[-1], other) for other in (COUNTS, *ways[:-1])):
        means, intervals = found.difference(ours, theirs)
        differences[f"{ours} - {theirs}"] = {"means": means, "intervals": intervals}
        for stratum, figures in format_differences(means, intervals).items():
            lines.append(f"{ours} - {theirs}, seen kept, {stratum}, paired: {figures}")
    lines.append(f"validation, seen kept: {format_means(of_val)}")
    lines.append(f"{users_per_s:.0f} users/s at {config.test_beams} beams")
    text = "\n".join(lines)
    print(text)
    write_whole(config.out / "table.txt", text + "\n")
    metrics = found.to_dict() | {
        "val": of_val.to_dict(),
        "differences": differences,
        "num_beams": config.test_beams,
        "users_per_s": users_per_s,
    }
    write_whole(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def format_means(found: Evaluation) -> str:
    """The generator's figures over all queries, asked with all that is given, seen kept, in a line."""
    means = list(found.systems.values())[-1]["kept"].slices["all"]
    return "  ".join(f"{name} {means[name]:.4f}" for name in METRIC_NAMES)


def evaluate_again(config: GeneratorTraining) -> None:
    """Measure the generator of a finished or stopped run."""
    accelerator = Accelerator()
    if not accelerator.is_main_process:
        return
    data = read_data(config)
    check_targets(config, data)
    generator = Generator.load(config.out / "generator", device=str(accelerator.device))
    check_ids(generator, data.ids, str(config.ids))
    trie = build_trie(data.ids.codes, device=accelerator.device)
    if test(config, generator, data, trie) is None:
        means = validate(config, generator, data, trie)
        if not means:
            raise UserError("nothing to measure on: give --sessions, or --val-contents")
        print("  ".join(f"{name} {value:.4f}" for name, value in means.items()))


def check_targets(config: GeneratorTraining, data: Data) -> None:
    """Refuse to measure on sessions or targets that training did not hold out: it may have learned them."""
    if data.sessions is None:
        return
    earlier = read_config(config.out / "config.json", GeneratorTraining)
    if earlier.by != config.by:
        raise UserError(f"{config.out}: held out targets by {earlier.by}; give --by {earlier.by}")
    made = read_manifest(config.out / "generator", "generator")
    what, mend = f"{config.out}: was trained on", "give --sessions the former"
    check_same_sessions(made, data.sessions, config.sessions, what=what, mend=mend)


# --- training ----------------------------------------------------------------------------------


def build_optimizer(generator: Generator, config: GeneratorTraining) -> torch.optim.AdamW:
    """AdamW with weight decay where a weight has at least two dimensions."""
    learning = [weight for weight in generator.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in learning if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in learning if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def has_given_up(config: GeneratorTraining, progress: Progress, eval_every: int) -> bool:
    """Whether as many evaluations in a row as `patience` says were no better than the best before them."""
    if not config.patience or progress.best is None:
        return False
    return progress.evaluated_step - progress.best_step >= config.patience * eval_every


def main(config: GeneratorTraining) -> None:
    """Train, evaluate while training, keep the best generator, and test it."""
    if config.evaluate_only:
        check_ranges(config)
        return evaluate_again(config)
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
    data = read_data(config)
    ids = data.ids
    batches, counts = training_batches(config, data)
    total_steps = config.epochs * batches.steps_per_epoch
    eval_every = config.eval_epochs * batches.steps_per_epoch

    # --- model ---------------------------------------------------------------------------------
    shape = replace(config.model, content_width=data.width)
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
                f"{counts['contents']:,} contents, {counts['watched']:,} items after a content, too; "
                f"{weights:,} weights; {total_steps:,} steps",
                file=sys.stderr,
            )
    parents = parents_of(config, config.out / "generator")

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
                batch.learned.to(codes.device),
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
        if run:
            generator.eval()
            means = validate(config, generator, data, trie)
            generator.train()
            value = means.get(METRIC)
            if means:
                run.log({"step": progress.step, **{f"val/{n}": v for n, v in means.items()}})
                shown = "  ".join(f"{name} {v:.4f}" for name, v in means.items())
                bar.write(f"step {progress.step}: val {shown}", file=sys.stderr)
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
    stop, over = 0, agreement.largest(int(has_given_up(config, progress, eval_every)))
    with bar, StopSignals(announce=run is not None) as signals:
        # Where a run was stopped between a step and its evaluation.
        if progress.step % eval_every == 0 and 0 < progress.step != progress.evaluated_step:
            progress = evaluate(progress)
        model.train()
        watch = Stopwatch()
        while progress.step < total_steps and not stop and not over:
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
                    over = agreement.largest(int(has_given_up(config, progress, eval_every)))
                if saves or stop or over:
                    save_checkpoint(accelerator, config.out, progress, keep=config.keep_checkpoints)
                if stop or over:
                    break
    if stop:
        if run:
            run.draw()
            print(stop_message(stop, config.out, program="train/generator.py"), file=sys.stderr)
        accelerator.end_training()
        raise SystemExit(exit_status(stop))

    # --- test and save -------------------------------------------------------------------------
    if run:
        best = Generator.load(config.out / "generator", device=str(accelerator.device))
        found = test(config, best, data, trie)
        finish(config, progress, counts, found)
    accelerator.end_training()


def parents_of(config: GeneratorTraining, child: Path) -> list[Parent]:
    """What a generator is made from, as the run or a folder in it remembers it."""
    inputs = inputs_of(config)
    return [parent_of(child, path) for path in inputs if (path / "manifest.json").is_file()]


def finish(
    config: GeneratorTraining, progress: Progress, counts: dict[str, int], found: Evaluation | None
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
            parents=parents_of(config, config.out),
            fingerprint=fingerprint_of(
                {"generator": generator.fingerprint, "steps": str(progress.step)}
            ),
            details={
                "best": {METRIC: progress.best, "step": progress.best_step},
                "minutes": minutes,
            },
        ),
    )
    best = "nothing to validate on, so the last generator was kept"
    if progress.best is not None:
        best = f"best val {METRIC} {progress.best:.4f} at step {progress.best_step}"
    print(f"trained {progress.step} steps in {minutes:.1f} min; {best}")
    if found:
        print(f"test, seen kept: {format_means(found)}")
    print(f"generator: {config.out / 'generator'}")


if __name__ == "__main__":
    run_program(lambda: main(parse(sys.argv[1:])))
