"""Encoders on the Hugging Face hub: what a repository holds, and its model card.

A repository is an encoder's folder, with README.md and, where they are known, metrics.json beside it.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrec.errors import UserError
from mmrec.manifest import Manifest, find_parent, fingerprint_of, read_manifest
from mmrec.model.download import told_by_the_hub

if TYPE_CHECKING:
    from mmrec.model.encoder import Encoder

_SHOWN = ("R@1", "R@5", "R@10", "R@50", "MRR", "nDCG@10")
_CARD_SLICES = ("all", "warm", "cold")
_TAGS = ["mmrec", "video-retrieval", "product-retrieval", "multimodal", "embeddings"]


def push_encoder(
    encoder: "Encoder",
    repo_id: str,
    *,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Publish an encoder; as `Encoder.push_to_hub`. `training` is what the card tells of its run."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "encoder"
        write_repository(
            encoder,
            folder,
            repo_id=repo_id,
            metrics=metrics,
            training=training,
            license=license,
        )
        api = HfApi(token=token, library_name="mmrec")
        with told_by_the_hub(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=f"mmrec encoder {read_manifest(folder).fingerprint}",
                # An earlier encoder's would otherwise be taken for this one's.
                delete_patterns=["metrics.json", "tokenizer/*"],
            )
    return str(done.commit_url)


def write_repository(
    encoder: "Encoder",
    folder: Path,
    *,
    repo_id: str,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> None:
    """Write what a repository of an encoder holds into a new folder.

    Names of files stay, the paths to them on this machine go. Raises `UserError` where metrics are another
    encoder's.
    """
    _ = encoder.tokenizer  # Made by now, its files are saved too.
    parents = [replace(parent, path=Path(parent.path).name) for parent in encoder.parents]
    copied = copy(encoder)  # The same weights under names without paths.
    copied.config = replace(
        encoder.config,
        towers=_name(encoder.config.towers),
        pretrained=_name(encoder.config.pretrained),
    )
    fingerprint = copied.save(folder, parents=parents)
    if metrics is not None and metrics.get("encoder") != fingerprint:
        raise UserError(
            f"metrics are of encoder {metrics.get('encoder')}, and this is {fingerprint}; give those that "
            "`mmrec evaluate` wrote of this one"
        )
    card = model_card(
        read_manifest(folder),
        repo_id=repo_id,
        metrics=metrics,
        training=training,
        license=license,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if metrics is not None:
        text = json.dumps(metrics, indent=2, allow_nan=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")


def _name(given: str) -> str:
    """The last part of a path; other names, which may hold a slash, as they are."""
    local = given.endswith(".json") or Path(given).is_file()
    return Path(given).name if local else given


def find_metrics(encoder: Path) -> dict[str, Any] | None:
    """What `mmrec evaluate` wrote of an encoder, in a folder near it; None where nothing is found.

    It is looked for beside the encoder, beside its run, and in the folders that lie next to either.
    """
    fingerprint = read_manifest(encoder, "encoder").fingerprint
    near = [encoder.resolve(), *encoder.resolve().parents[:2]]
    files = [file for folder in near for file in (*folder.glob("metrics.json"),)]
    files += [file for folder in near[1:] for file in sorted(folder.glob("*/metrics.json"))]
    for file in files:
        try:
            metrics = read_metrics_file(file)
        except UserError:  # Somebody else's file of that name.
            continue
        if metrics.get("encoder") == fingerprint:
            return metrics
    return None


def read_metrics_file(path: Path) -> dict[str, Any]:
    """Read the metrics.json of `mmrec evaluate`; raises `UserError` for anything else."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        _ = metrics["slices"]["all"], metrics["gallery"], metrics["queries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected the metrics.json of `mmrec evaluate` ({type(error).__name__}: {error})"
        ) from None
    return metrics


def find_training(encoder: Path) -> dict[str, Any]:
    """What the run and the shards of an encoder say of its training, where they still lie where they did."""
    manifest = read_manifest(encoder, "encoder")
    found: dict[str, Any] = {}
    shards = find_parent(encoder, "shards")
    if shards is not None:
        splits = read_manifest(shards).details.get("splits", {})
        found["splits"] = {name: dict(part) for name, part in splits.items()}
    run = encoder.resolve().parent
    if (run / "manifest.json").is_file():
        of_run = read_manifest(run)
        steps = str(of_run.counts.get("steps"))
        if of_run.kind == "run" and of_run.fingerprint == fingerprint_of(
            {"encoder": manifest.fingerprint, "steps": steps}
        ):
            paths = ("shards", "out", "further_shards", "negatives", "encoder")
            found["config"] = {k: v for k, v in of_run.config.items() if k not in paths}
            found["steps"] = of_run.counts["steps"]
            found["best"] = of_run.details.get("best")
    return found


def model_card(
    manifest: Manifest,
    *,
    repo_id: str,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> str:
    """The README.md of a repository: metadata in YAML, use, figures and lineage in Markdown."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="mmrec",
        tags=_TAGS,
        license=license,
        model_name=repo_id.rsplit("/", 1)[-1],
        eval_results=list(_results(metrics)) if metrics else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rsplit('/', 1)[-1]}\n",
        _use(repo_id, manifest),
        _figures(metrics),
        _lineage(manifest, training or {}),
    ]
    return "\n".join(part for part in parts if part)


def _results(metrics: Mapping[str, Any]) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for name in _CARD_SLICES:
        for metric in _SHOWN:
            if metric in metrics["slices"].get(name, {}):
                yield EvalResult(
                    task_type="video-to-product-retrieval",
                    task_name="Content to product retrieval",
                    dataset_type=f"mmrec-shards-{metrics.get('shards')}",
                    dataset_name=f"{metrics['queries']} contents, {metrics['gallery']} products",
                    dataset_config=name,
                    dataset_split=metrics.get("split"),
                    metric_type=metric.lower().replace("@", "_at_"),
                    metric_name=metric,
                    metric_value=round(metrics["slices"][name][metric], 4),
                )


def _use(repo_id: str, manifest: Manifest) -> str:
    widths = ", ".join(str(width) for width in manifest.details.get("widths", ()))
    nested = f", nested widths {widths}" if len(manifest.details.get("widths", ())) > 1 else ""
    return f"""An encoder by mmrec of contents (a short video or photos, and a title) and of products (images
and a title) into one space: {manifest.details["width"]} wide{nested},
{manifest.counts["parameters"]:,} parameters, towers `{manifest.config["towers"]}`.

```python
from mmrec import Encoder

encoder = Encoder.from_pretrained("{repo_id}")
```

```sh
mmrec embed --encoder hf://{repo_id} --shards my/shards --out my/embeddings
mmrec index build --embeddings my/embeddings --out my/index
mmrec search --index my/index --video clip.mp4
```
"""


def _figures(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "## Figures\nThis encoder was published without an evaluation.\n"
    rows = {f"this encoder, {n}": metrics["slices"].get(n, {}) for n in _CARD_SLICES}
    rows |= {name: slices.get("all", {}) for name, slices in metrics.get("baselines", {}).items()}
    head = f"| {metrics['queries']:,} contents, {metrics['gallery']:,} products |"
    lines = [f"{head} {' | '.join(_SHOWN)} |", "|---" * (len(_SHOWN) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[metric]:.3f}" for metric in _SHOWN) + " |"
        for name, row in rows.items()
        if all(metric in row for metric in _SHOWN)
    ]
    text = "\n".join(lines)
    return f"""## Figures
{text}

The whole catalogue is searched, and ties count against the encoder. Cold products have no training content;
the baselines learn nothing and are of all contents. `metrics.json` has further slices and intervals.
"""


def _lineage(manifest: Manifest, training: Mapping[str, Any]) -> str:
    rows = [("encoder", manifest.fingerprint)]
    rows += [(parent.kind, parent.fingerprint) for parent in manifest.parents]
    lines = ["## Lineage", "| made | fingerprint |", "|---|---|"]
    lines += [f"| {kind} | `{fingerprint}` |" for kind, fingerprint in rows]
    lines += ["", f"Made by mmrec {manifest.mmrec_version}; the fingerprint is checked at loading."]
    for split, part in training.get("splits", {}).items():
        counts = ", ".join(f"{value:,} {name}" for name, value in part.items() if name != "shards")
        lines += [f"- {split}: {counts}"]
    if "steps" in training:
        best = json.dumps(training.get("best"))
        lines += [f"- trained for {training['steps']:,} steps; the best by val: {best}"]
    shown = {"encoder": manifest.config, **training.get("config", {})}
    config = json.dumps(shown, indent=2, ensure_ascii=False, default=str)
    lines += ["", "<details><summary>Config</summary>", "", "```json", config, "```", ""]
    return "\n".join([*lines, "</details>", ""])
