"""Semantic IDs: a product as a few codes cut from its embedding, and one more that tells equals apart.

    products.parquet       product_id, codes (L + 1 numbers), category where it is known
    contents.parquet       content_id, codes (L numbers); equal ones are not told apart
    codebook.safetensors   the centroids, and for RQ-VAE the layers before and after them
    report.json, .png      how well the codes are used (ids_report.py)
    manifest.json

IDs are never changed: new products are assigned to the frozen codebook and take the next free appended code.
Shape letters: N products, D embedding width, L levels, E = L + 1 codes of an ID, K codes a level, C contents.
"""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32, Int64
from safetensors.numpy import load_file, save

from mmrec.data.storage import write_bytes_whole
from mmrec.errors import UserError
from mmrec.generative.quantize import (
    Codebook,
    Layer,
    check_size,
    place_in_group,
    residual_kmeans,
)
from mmrec.manifest import (
    Manifest,
    Parent,
    fingerprint_of,
    new_folder,
    read_manifest,
    write_manifest,
)
from mmrec.ranges import Count, CountOrZero, Range, check_ranges
from mmrec.retrieval.intake import name_ids

KIND = "semantic_ids"
_PRODUCTS, _CONTENTS, _CODEBOOK = "products.parquet", "contents.parquet", "codebook.safetensors"
# Appended codes beside those in use, where none are asked for: new products must find room.
_FEWEST_APPENDED = 16


@dataclass(frozen=True, kw_only=True)
class SemanticIdConfig:
    """How embeddings become codes."""

    levels: Annotated[int, Range(1, 8)] = 3
    """Codes of an ID before the appended one."""
    codebook_size: Annotated[int, Range(2, 65_536)] = 256
    """Codes of a level; at most as many as there are products."""
    method: Literal["k-means", "rq-vae"] = "k-means"
    """Residual k-means on the embeddings themselves, or on the latents of an autoencoder."""
    balanced: bool = False
    """Give no code of a level more than an equal share of the products that the codebook is learned from."""
    appended: CountOrZero = 0
    """Values of the appended code: so many products may share the codes before it. 0 takes twice what is
    needed, and at least 16."""
    iterations: Count = 20
    """Rounds of k-means."""
    latent: Count = 32
    """Width of RQ-VAE's latents."""
    steps: Count = 3000
    """RQ-VAE's training steps, of 1,024 embeddings each."""
    seed: CountOrZero = 0


@dataclass(frozen=True, kw_only=True)
class SemanticIds:
    """The IDs of a catalogue, and the frozen codebook that gives new products theirs."""

    codebook: Codebook
    product_ids: list[str]
    codes: Int32[np.ndarray, "N E"]
    appended: int
    """Values that the last code of a row of `codes` can take."""
    content_ids: list[str] = field(default_factory=list)
    content_codes: Int32[np.ndarray, "C L"] | None = None
    categories: list[str | None] | None = None
    config: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    root: str = ""
    """Fingerprint of the IDs that these grew from: a generator of theirs can use these as well."""
    manifest: Manifest | None = None

    def __len__(self) -> int:
        return len(self.product_ids)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values the code of each level can take, the appended one's last."""
        return (*[self.codebook.size] * self.codebook.levels, self.appended)

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each product."""
        return {product_id: row for row, product_id in enumerate(self.product_ids)}

    @cached_property
    def content_rows(self) -> dict[str, int]:
        """The row of each content."""
        return {content_id: row for row, content_id in enumerate(self.content_ids)}

    @property
    def fingerprint(self) -> str:
        """A hash of the codebook and of every product's and content's codes."""
        return fingerprint_of(
            {
                "codebook": _codebook_bytes(self.codebook),
                "codes": np.ascontiguousarray(self.codes, "<i4").tobytes(),
                "products": "\0".join(self.product_ids),
                "contents": "\0".join(self.content_ids),
                "content_codes": b""
                if self.content_codes is None
                else self.content_codes.tobytes(),
            }
        )

    def known(self, product_ids: Sequence[str]) -> tuple[list[int], int]:
        """The rows of those products that have an ID, in order, and how many have none."""
        rows = [self.rows[id_] for id_ in product_ids if id_ in self.rows]
        return rows, len(product_ids) - len(rows)

    def taken(self, rows: Sequence[int]) -> "SemanticIds":
        """Those of some products, in that order."""
        return replace(
            self,
            product_ids=[self.product_ids[row] for row in rows],
            codes=self.codes[list(rows)],
            categories=self.categories and [self.categories[row] for row in rows],
        )

    def extended(
        self,
        product_ids: Sequence[str],
        vectors: Float32[np.ndarray, "M D"],
        categories: Sequence[str | None] | None = None,
    ) -> "SemanticIds":
        """These IDs and those of new products; products that have one already keep it.

        Raises `UserError` for vectors of another width, not as many as products or not finite, an id that
        occurs twice, and where there is no room.
        """
        _check_vectors(product_ids, vectors)
        fresh = [row for row, id_ in enumerate(product_ids) if id_ not in self.rows]
        if not fresh:
            return self
        names = [product_ids[row] for row in fresh]
        _check_distinct(names)
        codes = give_codes(self.codebook, vectors[fresh], self.appended, taken=self.codes)
        known = self.categories or [None] * len(self)
        added = [categories[row] for row in fresh] if categories else [None] * len(fresh)
        return replace(
            self,
            product_ids=[*self.product_ids, *names],
            codes=np.concatenate([self.codes, codes]),
            categories=[*known, *added],
            root=self.root or self.fingerprint,
        )

    def save(
        self,
        out: Path,
        *,
        parents: Sequence[Parent] = (),
        inputs: Sequence[Path] = (),
        files: Mapping[str, bytes] | None = None,
        counts: Mapping[str, int] | None = None,
        details: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Manifest:
        """Write the folder; `files` are further ones, by name, and `details` go to the manifest."""
        fingerprint = self.fingerprint
        manifest = Manifest(
            kind=KIND,
            config=asdict(self.config),
            counts={"in": len(self), "out": len(self), "dropped": {}, **(counts or {})},
            parents=list(parents),
            fingerprint=fingerprint,
            details={
                "root": self.root or fingerprint,
                "levels": self.codebook.levels,
                "codebook_size": self.codebook.size,
                "appended": self.appended,
                "contents": len(self.content_ids),
                **(details or {}),
            },
        )
        with new_folder(out, kind=KIND, overwrite=overwrite, inputs=inputs) as folder:
            write_bytes_whole(folder / _CODEBOOK, _codebook_bytes(self.codebook))
            columns = {
                "product_id": pa.array(self.product_ids, pa.string()),
                "codes": _lists(self.codes),
            }
            if self.categories is not None:
                columns["category"] = pa.array(self.categories, pa.string())
            write_bytes_whole(folder / _PRODUCTS, _parquet(pa.table(columns)))
            if self.content_codes is not None:
                table = pa.table(
                    {"content_id": self.content_ids, "codes": _lists(self.content_codes)}
                )
                write_bytes_whole(folder / _CONTENTS, _parquet(table))
            for name, data in (files or {}).items():
                write_bytes_whole(folder / name, data)
            write_manifest(folder, manifest)
        return manifest

    @classmethod
    def load(cls, folder: Path | str) -> "SemanticIds":
        """Read a folder of IDs. Raises `UserError` when it is missing, broken or not what was written."""
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        try:
            codebook = _read_codebook(folder / _CODEBOOK)
            products = pq.read_table(folder / _PRODUCTS)
            contents = None
            if (folder / _CONTENTS).is_file():
                contents = pq.read_table(folder / _CONTENTS)
            ids = cls(
                codebook=codebook,
                product_ids=products["product_id"].to_pylist(),
                codes=_array(products["codes"], codebook.levels + 1),
                appended=manifest.details["appended"],
                content_ids=contents["content_id"].to_pylist() if contents else [],
                content_codes=_array(contents["codes"], codebook.levels) if contents else None,
                categories=(
                    products["category"].to_pylist()
                    if "category" in products.column_names
                    else None
                ),
                config=SemanticIdConfig(**manifest.config),
                root=manifest.details["root"],
                manifest=manifest,
            )
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            line = str(error).split("\n")[0]
            raise UserError(
                f"{folder}: semantic IDs that cannot be read ({line}); make them again"
            ) from None
        if ids.fingerprint != manifest.fingerprint:
            raise UserError(
                f"{folder}: holds other IDs than its manifest names ({ids.fingerprint}, not "
                f"{manifest.fingerprint}); make them again with train/semantic_ids.py"
            )
        return ids


def build_ids(
    product_ids: Sequence[str],
    vectors: Float32[np.ndarray, "N D"],
    config: SemanticIdConfig,
    *,
    content_ids: Sequence[str] = (),
    content_vectors: Float32[np.ndarray, "C D"] | None = None,
    categories: Sequence[str | None] | None = None,
) -> SemanticIds:
    """Learn a codebook from products, and contents where given, and give all of them codes.

    Raises `UserError` for a setting out of range, an id that occurs twice, vectors that are not finite or not
    as many as ids, a codebook larger than the catalogue, more cells than can be numbered, and more equal
    products than appended codes can tell apart.
    """
    check_ranges(config)
    _check_cells(config.levels, config.codebook_size)
    _check_distinct(product_ids)
    _check_vectors(product_ids, vectors)
    check_size(len(product_ids), config.codebook_size)
    if content_vectors is not None:
        _check_vectors(content_ids, content_vectors)
    both = vectors if content_vectors is None else np.concatenate([vectors, content_vectors])
    prefixes = None
    if config.method == "rq-vae":
        from mmrec.generative.rq_vae import train_rq_vae

        if config.balanced:
            raise UserError("--balanced goes with --method k-means; leave one of them out")
        codebook = train_rq_vae(
            both,
            levels=config.levels,
            size=config.codebook_size,
            latent=config.latent,
            steps=config.steps,
            seed=config.seed,
        )
    else:
        codebook, codes = residual_kmeans(
            both,
            levels=config.levels,
            size=config.codebook_size,
            balanced=config.balanced,
            iterations=config.iterations,
            seed=config.seed,
        )
        # A balanced cell is not always the nearest, so these are not what `assign` gives.
        prefixes = codes[: len(vectors)]
    if prefixes is None:
        prefixes = codebook.assign(vectors)
    appended = config.appended or max(_FEWEST_APPENDED, 2 * largest_cell(prefixes, codebook.size))
    return SemanticIds(
        codebook=codebook,
        product_ids=list(product_ids),
        codes=give_codes(codebook, vectors, appended, prefixes=prefixes),
        appended=appended,
        content_ids=list(content_ids),
        content_codes=None if content_vectors is None else codebook.assign(content_vectors),
        categories=None if categories is None else list(categories),
        config=config,
    )


def give_codes(
    codebook: Codebook,
    vectors: Float32[np.ndarray, "M D"],
    appended: int,
    *,
    prefixes: Int32[np.ndarray, "M L"] | None = None,
    taken: Int32[np.ndarray, "N E"] | None = None,
) -> Int32[np.ndarray, "M E"]:
    """IDs of new products that no product of `taken` has, each with the next free appended code.

    Where a cell is full its late comers go to the cell of the next nearest code of the last level. Raises
    `UserError` where all of those are full.
    """
    if prefixes is None:
        prefixes = (
            codebook.assign(vectors) if len(vectors) else np.zeros((0, codebook.levels), np.int32)
        )
    cells = cell_numbers(prefixes, codebook.size)
    free: defaultdict[int, int] = defaultdict(int)
    if taken is not None and len(taken):
        known, first = np.unique(cell_numbers(taken[:, :-1], codebook.size), return_inverse=True)
        last = np.full(len(known), -1)
        np.maximum.at(last, first, taken[:, -1])
        free.update(zip(known.tolist(), (last + 1).tolist(), strict=True))
    order = np.argsort(cells, kind="stable")
    places = np.empty(len(cells), np.int64)
    places[order] = place_in_group(cells[order])
    places += [free[cell] for cell in cells.tolist()] if free else 0
    codes = np.concatenate([prefixes, places[:, None].astype(np.int32)], axis=1)
    crowded = np.flatnonzero(places >= appended)
    if len(crowded):
        for cell, place in zip(cells.tolist(), places.tolist(), strict=True):
            free[cell] = min(appended, max(free[cell], place + 1))
        _move(codebook, vectors, codes, crowded, free, appended)
    return codes


def _move(
    codebook: Codebook,
    vectors: Float32[np.ndarray, "M D"],
    codes: Int32[np.ndarray, "M E"],
    crowded: Int64[np.ndarray, " C"],
    free: defaultdict[int, int],
    appended: int,
) -> None:
    """Give products of full cells the nearest with room under the same codes before the last; in place."""
    residuals = codebook.last_residual(vectors[crowded], codes[crowded, :-1])
    for row, residual in zip(crowded.tolist(), residuals, strict=True):
        distances = np.square(codebook.centroids[-1] - residual).sum(1)
        base = int(cell_numbers(codes[row : row + 1, :-1], codebook.size)[0]) - int(codes[row, -2])
        for code in np.argsort(distances, kind="stable").tolist():
            if free[base + code] < appended:
                codes[row, -2:] = code, free[base + code]
                free[base + code] += 1
                break
        else:
            raise UserError(
                f"no ID is left under codes {codes[row, :-2].tolist()}: {codebook.size:,} codes of "
                f"{appended:,} products each are taken; make IDs anew with more --levels or --appended"
            )


def cell_numbers(prefixes: Int32[np.ndarray, "N L"], size: int) -> Int64[np.ndarray, " N"]:
    """A number for each combination of codes. Raises `UserError` where there are more than 2^62."""
    _check_cells(prefixes.shape[1], size)
    numbers = np.zeros(len(prefixes), np.int64)
    for column in prefixes.T:
        numbers = numbers * size + column
    return numbers


def largest_cell(prefixes: Int32[np.ndarray, "N L"], size: int) -> int:
    """How many rows have the most frequent codes."""
    return int(np.unique(cell_numbers(prefixes, size), return_counts=True)[1].max())


def _check_cells(levels: int, size: int) -> None:
    if size**levels > 2**62:
        raise UserError(
            f"{levels} levels of {size:,} codes are more cells than can be numbered; give fewer --levels"
        )


def _check_vectors(ids: Sequence[str], vectors: Float32[np.ndarray, "N D"]) -> None:
    if len(ids) != len(vectors):
        raise UserError(f"{len(ids):,} ids and {len(vectors):,} vectors; expected one for each id")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
    if bad:
        raise UserError(f"vectors with NaN or infinity: {name_ids([ids[row] for row in bad])}")


def _check_distinct(ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = list(dict.fromkeys(id_ for id_ in ids if id_ in seen or seen.add(id_)))
        raise UserError(f"products that occur more than once: {name_ids(twice)}")


# ---------------------------------------------------------------------------------------------- files


def _lists(codes: Int32[np.ndarray, "N W"]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel(), pa.int32()), codes.shape[1])


def _array(column: pa.ChunkedArray, width: int) -> Int32[np.ndarray, "N W"]:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.int32).reshape(-1, width)


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def _codebook_bytes(codebook: Codebook) -> bytes:
    tensors = {"centroids": np.ascontiguousarray(codebook.centroids)}
    for name, layers in (("encoder", codebook.encoder), ("decoder", codebook.decoder)):
        for number, layer in enumerate(layers):
            tensors[f"{name}.{number}.weight"] = np.ascontiguousarray(layer.weight)
            tensors[f"{name}.{number}.bias"] = np.ascontiguousarray(layer.bias)
    return save(tensors)


def _read_codebook(path: Path) -> Codebook:
    tensors = load_file(path)

    def layers(name: str) -> tuple[Layer, ...]:
        count = sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in tensors)
        return tuple(
            Layer(weight=tensors[f"{name}.{n}.weight"], bias=tensors[f"{name}.{n}.bias"])
            for n in range(count)
        )

    return Codebook(
        centroids=tensors["centroids"], encoder=layers("encoder"), decoder=layers("decoder")
    )
