"""The hybrid: candidates of several sources, put in order by gradient-boosted trees.

IDs alone cannot find what they were not trained on, and counts cannot find what never came after anything. So
candidates are the union of what counts, titles, embeddings and, where there is one, a generator propose, and
LightGBM's lambdarank (Burges, 2010; Ke et al., 2017) learns which of them is taken.

No leak: what is counted is counted on training sequences alone. The ranker learns from validation targets,
which are in no count, and is asked for test targets with the same counts, or with new ones that saw
validation.

Shape letters: Q queries, N catalogue size, C candidates of all queries, F features, E events, D width of an
embedding.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Float32, Int
from safetensors.numpy import load_file, save_file
from scipy import sparse

from mmrec.errors import UserError
from mmrec.generative.baselines import (
    TransitionConfig,
    count_transitions,
    history_weights,
    transition_shares,
)
from mmrec.generative.evaluation import RankedProducts, matrix_shape
from mmrec.generative.lists import list_shares
from mmrec.generative.sessions import Sequences, Split, catalogue_fingerprint, encode_history
from mmrec.manifest import (
    Manifest,
    Parent,
    fingerprint_of,
    hash_file,
    new_folder,
    read_manifest,
    write_manifest,
)
from mmrec.ranges import Count, CountOrZero, Positive, Range, Share, check_ranges

if TYPE_CHECKING:
    from lightgbm import Booster

KIND = "ranker"
GENERATOR = "generator"
"""What a generator is called among the sources."""
_MODEL, _LINKS, _PRODUCTS = "model.txt", "links.safetensors", "products.parquet"
_CONTEXT = ("popularity", "popularity of last", "seen", "history length", "sources")
# Queries whose candidates are gathered at once: some 300 MB of features and sparse products.
_QUERY_BLOCK = 2048
# Rows of a product of sparse matrices held at once.
_ROW_BLOCK = 1024
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Where candidates come from, and how the trees are grown."""

    transitions: TransitionConfig = field(default_factory=TransitionConfig)
    candidates: Count = 60
    """Candidates that each source proposes to a query."""
    neighbours: Count = 100
    """Products that each product is linked to by titles, by embeddings and by two steps."""
    common_word: Share = 0.2
    """Words in a larger share of titles tell nothing, and are not compared."""
    rounds: Count = 300
    """Trees at most; fewer where held-out queries no longer gain."""
    patience: Count = 20
    """Trees without a gain on held-out queries after which no more are grown."""
    leaves: Count = 31
    learning_rate: Positive = 0.05
    leaf_rows: Count = 100
    """Candidates that a leaf must hold."""
    largest_weight: Annotated[float, Range(1)] = 10.0
    """Where sessions say at which position of a list a product was taken, its query weighs 1 over the
    position's propensity, at most so much; 1 leaves positions out."""
    held_out: Share = 0.15
    """Share of the queries learned from that decides how many trees are kept."""
    threads: CountOrZero = 0
    """Threads of LightGBM; 0 takes one a core."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Products to be ranked, query by query, each once."""

    queries: Int[np.ndarray, " C"]
    """Which query each is for, ascending."""
    products: Int[np.ndarray, " C"]
    features: Float32[np.ndarray, "C F"]


# ---------------------------------------------------------------- how products are linked


def link_by_sequences(
    train: Sequences, num_products: int, config: RankerConfig
) -> dict[str, sparse.csr_array]:
    """Sources that count what was taken, each (N, N): row a product of the history, column a candidate.

    transition: shares of what came after it, as the baseline counts; before: the same backwards; together:
    cosine of the sets of users; two steps: transitions of transitions.
    """
    counts = count_transitions(train, num_products, config.transitions.window)
    forward = transition_shares(counts, config.transitions.shrinkage)
    backward = transition_shares(sparse.csr_array(counts.T), config.transitions.shrinkage)
    return {
        "transition": forward,
        "before": backward,
        "together": _cosines(_taken_by(train, num_products), config.neighbours),
        "two steps": _products(forward, forward, config.neighbours),
    }


def link_by_content(
    titles: Sequence[str | None],
    config: RankerConfig,
    embeddings: Mapping[str, Float[np.ndarray, "_N _D"]] | None = None,
) -> dict[str, sparse.csr_array]:
    """Sources that know products nobody has taken: cosines of rare words in titles, and of embeddings."""
    links = {"title": _cosines(word_weights(titles, config.common_word), config.neighbours)}
    for name, vectors in (embeddings or {}).items():
        if len(vectors) != len(titles):
            raise UserError(
                f"embeddings '{name}': {len(vectors):,} rows for a catalogue of {len(titles):,} products"
            )
        links[name] = _nearest(vectors, config.neighbours)
    return links


def word_weights(titles: Sequence[str | None], common_word: float) -> sparse.csr_array:
    """TF-IDF of the words of each title, without those that many titles share or one has, (N, words)."""
    words = [Counter(_WORD.findall((title or "").casefold())) for title in titles]
    spread = Counter(word for title in words for word in title)
    most = max(2, common_word * len(titles))
    number = {word: place for place, word in enumerate(sorted(spread)) if 2 <= spread[word] <= most}
    rows, columns, values = [], [], []
    for row, title in enumerate(words):
        for word in sorted(title):
            if word in number:
                rows.append(row)
                columns.append(number[word])
                values.append(np.log(len(titles) / spread[word]))
    shape = (len(titles), max(1, len(spread)))
    return sparse.csr_array((np.array(values, np.float64), (rows, columns)), shape=shape)


def keep_largest(matrix: sparse.csr_array, count: int) -> sparse.csr_array:
    """The `count` largest entries of each row."""
    starts, values = matrix.indptr, matrix.data
    kept = np.ones(len(values), bool)
    # A row at a time, since sorting whole products of matrices takes many times as long.
    for row in np.flatnonzero(np.diff(starts) > count):
        own = values[starts[row] : starts[row + 1]]
        kept[starts[row] + np.argpartition(own, -count)[:-count]] = False
    rows = np.repeat(np.arange(matrix_shape(matrix)[0]), np.diff(starts))[kept]
    return sparse.csr_array((values[kept], (rows, matrix.indices[kept])), shape=matrix.shape)


def _taken_by(train: Sequences, num_products: int) -> sparse.csr_array:
    ones = np.ones(len(train.items))
    taken = sparse.csr_array((ones, (train.items, train.owners)), shape=(num_products, len(train)))
    # Two users who took everything link all of it; they count for less.
    lengths = np.maximum(train.lengths, 1)
    return sparse.csr_array(taken @ sparse.diags_array(1 / np.sqrt(lengths)))


def _cosines(rows: sparse.csr_array, count: int) -> sparse.csr_array:
    norms = np.sqrt(rows.multiply(rows).sum(axis=1))
    unit = sparse.csr_array(sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ rows)
    return _products(unit, sparse.csr_array(unit.T), count)


def _products(left: sparse.csr_array, right: sparse.csr_array, count: int) -> sparse.csr_array:
    """The `count` largest entries of each row of a product, itself left out, a block of rows at a time."""
    blocks = []
    for start in range(0, matrix_shape(left)[0], _ROW_BLOCK):
        block = sparse.csr_array(left[start : start + _ROW_BLOCK] @ right)
        own = np.repeat(np.arange(matrix_shape(block)[0]), np.diff(block.indptr)) + start
        block.data[block.indices == own] = 0
        block.eliminate_zeros()
        blocks.append(keep_largest(block, count))
    return sparse.csr_array(sparse.vstack(blocks))


def _nearest(vectors: Float[np.ndarray, "N D"], count: int) -> sparse.csr_array:
    """Cosines of each product's nearest others, where they are positive."""
    import faiss

    unit = np.ascontiguousarray(vectors, np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    cosines, found = index.search(unit, min(count + 1, len(unit)))
    rows = np.broadcast_to(np.arange(len(unit))[:, None], found.shape)
    used = (found >= 0) & (found != rows) & (cosines > 0)
    shape = (len(unit), len(unit))
    return sparse.csr_array(
        (cosines[used].astype(np.float64), (rows[used], found[used])), shape=shape
    )


# ---------------------------------------------------------------- candidates and features


def gather_candidates(
    links: Mapping[str, sparse.csr_array],
    popularity: Int[np.ndarray, " N"],
    histories: Sequences,
    config: RankerConfig,
    proposed: Mapping[str, sparse.csr_array] | None = None,
) -> Candidates:
    """The union of what every source proposes to each query, with features.

    `popularity` counts each product's training events. `proposed` are further sources as positive scores
    (Q, N), such as a generator's (`lists.list_shares`) or what was watched (`watched.watched_scores`).
    Raises `UserError` for an empty history.
    """
    if len(empty := np.flatnonzero(histories.lengths == 0)):
        raise UserError(f"query {empty[0]}: its history is empty; expected at least one product")
    blocks = []
    for start in range(0, len(histories), _QUERY_BLOCK):
        numbers = np.arange(start, min(start + _QUERY_BLOCK, len(histories)))
        own = {name: matrix[numbers] for name, matrix in (proposed or {}).items()}
        block = _gather_block(links, popularity, histories.take(numbers), config, own)
        blocks.append((block.queries + start, block.products, block.features))
    queries, products, features = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return Candidates(queries=queries, products=products, features=features)


def feature_names(links: Sequence[str], proposed: Sequence[str] = ()) -> list[str]:
    """The columns of `Candidates.features`.

    Of each link: what it gives the candidate from the whole history, the same over the query's best, and
    from each of the last three products alone. Of each further source: its score, the same over the query's
    best, and one over its rank, 0 where it did not propose the candidate.
    """
    of_link = ("history", "history over best", "last", "second last", "third last")
    of_source = ("score", "score over best", "one over rank")
    names = [f"{link}, {what}" for link in links for what in of_link]
    names += [f"{source}, {what}" for source in proposed for what in of_source]
    return [*names, *_CONTEXT]


def _gather_block(
    links: Mapping[str, sparse.csr_array],
    popularity: Int[np.ndarray, " N"],
    histories: Sequences,
    config: RankerConfig,
    proposed: Mapping[str, sparse.csr_array],
) -> Candidates:
    num_products = len(popularity)
    window, decay = config.transitions.window, config.transitions.decay
    recent = history_weights(histories, num_products, window=window, decay=decay)
    at_place = [_products_at(histories, num_products, place) for place in range(3)]
    scores = {name: sparse.csr_array(recent @ matrix) for name, matrix in links.items()}
    scores |= proposed
    keys = [_keys(keep_largest(matrix, config.candidates)) for matrix in scores.values()]
    union, sources = np.unique(np.concatenate(keys), return_counts=True)
    queries, products = union // num_products, union % num_products
    columns = []
    for name, matrix in scores.items():
        whole = _values_at(matrix, union)
        columns += [whole, whole / _row_maxima(queries, whole)]
        if name in links:
            columns += [_values_at(sparse.csr_array(at @ links[name]), union) for at in at_place]
        else:
            columns.append(_values_at(_one_over_rank(matrix), union))
    last = histories.items[histories.offsets[1:] - 1]
    columns += [
        np.log1p(popularity[products]),
        np.log1p(popularity[last])[queries],
        np.isin(union, histories.owners * num_products + histories.items),
        histories.lengths[queries],
        sources,
    ]
    features = np.stack(columns, axis=1).astype(np.float32)
    return Candidates(queries=queries, products=products, features=features)


def _products_at(histories: Sequences, num_products: int, place: int) -> sparse.csr_array:
    """1 at the product that is so many places from each history's end, (Q, N)."""
    there = histories.places_from_end == place
    where = (histories.owners[there], histories.items[there])
    shape = (len(histories), num_products)
    return sparse.csr_array((np.ones(np.count_nonzero(there)), where), shape=shape)


def _one_over_rank(matrix: sparse.csr_array) -> sparse.csr_array:
    """1 at each row's largest entry, 1/2 at the next, and so on."""
    values = np.asarray(matrix.data, np.float64)
    rows = np.repeat(np.arange(matrix_shape(matrix)[0]), np.diff(matrix.indptr))
    # Rows stay together, so that places of the order are places of a row.
    order = np.lexsort((-values, rows))
    ranks = np.empty(len(rows))
    ranks[order] = np.arange(len(rows)) - matrix.indptr[rows] + 1
    return sparse.csr_array((1 / ranks, matrix.indices, matrix.indptr), shape=matrix.shape)


def _keys(matrix: sparse.csr_array) -> Int[np.ndarray, " E"]:
    """The row times the number of columns, plus the column, of each entry."""
    num_rows, num_columns = matrix_shape(matrix)
    rows = np.repeat(np.arange(num_rows), np.diff(matrix.indptr))
    return rows * num_columns + matrix.indices


def _values_at(matrix: sparse.csr_array, keys: Int[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """Entries at ascending keys, 0 where there is none."""
    matrix.sum_duplicates()
    own = _keys(matrix)
    if not len(own):
        return np.zeros(len(keys))
    places = np.minimum(np.searchsorted(own, keys), len(own) - 1)
    return np.where(own[places] == keys, matrix.data[places], 0.0)


def _row_maxima(
    queries: Int[np.ndarray, " C"], values: Float[np.ndarray, " C"]
) -> Float[np.ndarray, " C"]:
    """The largest value of each entry's query, and 1 where that is 0."""
    largest = np.zeros(int(queries.max(initial=-1)) + 1)
    np.maximum.at(largest, queries, values)
    return np.where(largest > 0, largest, 1.0)[queries]


# ---------------------------------------------------------------- the trees


@dataclass(frozen=True, kw_only=True)
class Ranker:
    """Links between products, and the trees that weigh them."""

    config: RankerConfig
    product_ids: list[str]
    links: dict[str, sparse.csr_array]
    popularity: Int[np.ndarray, " N"]
    proposers: tuple[str, ...]
    """Names of the further sources that it was fitted with, such as a generator."""
    booster: "Booster"

    def rank(
        self,
        histories: Sequences,
        *,
        k: int = 100,
        proposed: Mapping[str, sparse.csr_array] | None = None,
    ) -> RankedProducts:
        """The `k` best candidates of each query, best first.

        Raises `UserError` when `proposed` names other sources than the ranker was fitted with.
        """
        if tuple(proposed or {}) != self.proposers:
            expected, found = (
                ", ".join(names) or "none" for names in (self.proposers, proposed or {})
            )
            raise UserError(f"ranker: fitted with proposals of: {expected}; found: {found}")
        gathered = gather_candidates(self.links, self.popularity, histories, self.config, proposed)
        scores = np.asarray(self.booster.predict(gathered.features))
        order = np.lexsort((-scores, gathered.queries))
        queries = gathered.queries[order]
        places = np.arange(len(order)) - np.searchsorted(queries, queries)
        kept = places < k
        where = (queries[kept], places[kept])
        ranked = RankedProducts(
            products=np.full((len(histories), k), -1),
            scores=np.zeros((len(histories), k)),
            whole=np.bincount(queries, minlength=len(histories)) <= k,
        )
        ranked.products[where] = gathered.products[order][kept]
        ranked.scores[where] = scores[order][kept]
        return ranked

    def source_scores(self, source: str, histories: Sequences) -> sparse.csr_array:
        """What one source alone says of each query, (Q, N)."""
        window, decay = self.config.transitions.window, self.config.transitions.decay
        recent = history_weights(histories, len(self.product_ids), window=window, decay=decay)
        return sparse.csr_array(recent @ self.links[source])

    def recommend(
        self,
        history: Sequence[str],
        *,
        k: int = 10,
        generated: Sequence[tuple[str, float]] | None = None,
    ) -> list[tuple[str, float]]:
        """The `k` best products that are not in a history of product ids, with their scores.

        `generated` are the products that `Recommender.recommend` gives for the same history, with their
        scores: as many as the lists had that the ranker was fitted with, if with any.
        Unknown ids are left out. Raises `UserError` when none is known, and for k below 1.
        """
        if k < 1:
            raise UserError(f"k {k}: expected at least 1")
        rows, _ = encode_history(history, self.product_ids)
        histories = Sequences(rows, np.array([0, len(rows)]))
        proposed = None
        if generated is not None:
            places = {id_: row for row, id_ in enumerate(self.product_ids)}
            listed = np.array([places.get(id_, -1) for id_, _ in generated], np.int64)
            scores = np.array([score for _, score in generated], np.float64)
            lists = RankedProducts(products=listed[None], scores=scores[None])
            proposed = {GENERATOR: list_shares(lists, len(self.product_ids))}
        ranked = self.rank(histories, k=k + len(rows), proposed=proposed)
        seen = set(rows.tolist())
        pairs = zip(ranked.products[0].tolist(), ranked.scores[0].tolist(), strict=True)
        new = [
            (self.product_ids[row], score) for row, score in pairs if row >= 0 and row not in seen
        ]
        return new[:k]

    def importance(self) -> dict[str, float]:
        """What each feature adds to the trees: its share of all splits' gain, largest first."""
        gains = self.booster.feature_importance("gain")
        names = feature_names(list(self.links), self.proposers)
        shares = zip(names, (gains / max(gains.sum(), 1e-12)).tolist(), strict=True)
        return dict(sorted(shares, key=lambda pair: -pair[1]))

    def recounted(self, train: Sequences) -> "Ranker":
        """The same trees with links counted anew, on sequences that have grown since."""
        counted = link_by_sequences(train, len(self.product_ids), self.config)
        popularity = np.bincount(train.items, minlength=len(self.product_ids))
        return replace(self, links=self.links | counted, popularity=popularity)

    def save(
        self, folder: Path, *, parents: Sequence[Parent] = (), overwrite: bool = False
    ) -> None:
        """Write config.json, model.txt, links.safetensors, products.parquet and a manifest."""
        with new_folder(folder, kind=KIND, overwrite=overwrite) as new:
            (new / _MODEL).write_text(self.booster.model_to_string())
            arrays = {"popularity": self.popularity}
            for name, matrix in self.links.items():
                arrays[f"{name}.values"] = matrix.data
                arrays[f"{name}.columns"] = matrix.indices
                arrays[f"{name}.starts"] = matrix.indptr
            save_file(arrays, new / _LINKS)
            pq.write_table(pa.table({"product_id": self.product_ids}), new / _PRODUCTS)
            files = (_MODEL, _LINKS, _PRODUCTS)
            manifest = Manifest(
                kind=KIND,
                config=asdict(self.config),
                counts={"products": len(self.product_ids), "trees": self.booster.num_trees()},
                fingerprint=fingerprint_of({name: hash_file(new / name) for name in files}),
                parents=list(parents),
                details={
                    "links": list(self.links),
                    "proposers": list(self.proposers),
                    "catalogue": catalogue_fingerprint(self.product_ids),
                },
            )
            write_manifest(new, manifest)

    @classmethod
    def load(cls, folder: Path) -> "Ranker":
        """Read what `save` wrote. Raises `UserError` for another kind of folder, or one that was changed."""
        manifest = read_manifest(folder, KIND)
        files = {name: hash_file(folder / name) for name in (_MODEL, _LINKS, _PRODUCTS)}
        if fingerprint_of(files) != manifest.fingerprint:
            raise UserError(
                f"{folder}: its files are not those of its manifest; fit the ranker again"
            )
        arrays = load_file(folder / _LINKS)
        popularity = arrays["popularity"]
        links = {
            name: sparse.csr_array(
                tuple(arrays[f"{name}.{part}"] for part in ("values", "columns", "starts")),
                shape=(len(popularity),) * 2,
            )
            for name in manifest.details["links"]
        }
        settings = dict(manifest.config)
        transitions = TransitionConfig(**settings.pop("transitions"))
        lightgbm = _lightgbm()
        return cls(
            config=RankerConfig(transitions=transitions, **settings),
            product_ids=pq.read_table(folder / _PRODUCTS)["product_id"].to_pylist(),
            links=links,
            popularity=popularity,
            proposers=tuple(manifest.details["proposers"]),
            booster=lightgbm.Booster(model_str=(folder / _MODEL).read_text()),
        )


def fit_ranker(
    split: Split,
    product_ids: Sequence[str],
    titles: Sequence[str | None],
    config: RankerConfig | None = None,
    *,
    embeddings: Mapping[str, Float[np.ndarray, "_N _D"]] | None = None,
    proposed: Mapping[str, sparse.csr_array] | None = None,
    weights: Float[np.ndarray, " Q"] | None = None,
) -> Ranker:
    """Learn from a validation split which candidate is taken next.

    Links are counted on `split.train`, in which no target of the split is. Queries whose target no source
    proposes teach nothing and are left out. `weights` are what each query counts for, such as
    `displays.target_weights`: all pairs of its target and another candidate weigh as much, as in Joachims,
    Swaminathan and Schnabel (2017). Raises `UserError` where fewer than 20 queries teach.
    """
    config = config or RankerConfig()
    links = link_by_sequences(split.train, len(product_ids), config)
    links |= link_by_content(titles, config, embeddings)
    popularity = np.bincount(split.train.items, minlength=len(product_ids))
    gathered = gather_candidates(links, popularity, split.histories, config, proposed)
    booster = _grow(gathered, split.targets, config, weights)
    return Ranker(
        config=config,
        product_ids=list(product_ids),
        links=links,
        popularity=popularity,
        proposers=tuple(proposed or {}),
        booster=booster,
    )


def _grow(
    gathered: Candidates,
    targets: Int[np.ndarray, " Q"],
    config: RankerConfig,
    weights: Float[np.ndarray, " Q"] | None,
) -> "Booster":
    lightgbm = _lightgbm()
    taken = gathered.products == targets[gathered.queries]
    teaches = np.bincount(gathered.queries[taken], minlength=len(targets)) > 0
    if np.count_nonzero(teaches) < 20:
        raise UserError(
            f"ranker: a source proposes the target of {np.count_nonzero(teaches)} of {len(targets)} "
            "validation queries, expected 20 or more to learn from; give more sessions"
        )
    held_out = np.random.default_rng(config.seed).random(len(targets)) < config.held_out
    settings: dict[str, Any] = {
        "objective": "lambdarank",
        "metric": "ndcg",
        "eval_at": [10],
        "num_leaves": config.leaves,
        "learning_rate": config.learning_rate,
        "min_data_in_leaf": config.leaf_rows,
        "num_threads": config.threads,
        "seed": config.seed,
        # Equal trees for equal data, whatever the number of threads.
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
    }

    def dataset(chosen: Bool[np.ndarray, " Q"], **more: Any) -> Any:
        rows = chosen[gathered.queries]
        sizes = np.bincount(gathered.queries[rows], minlength=len(targets))[chosen]
        features, labels = gathered.features[rows], taken[rows].astype(np.int64)
        weigh = None if weights is None else weights[gathered.queries[rows]]
        return lightgbm.Dataset(features, labels, group=sizes, weight=weigh, **more)

    learned = dataset(teaches & ~held_out)
    if not (teaches & held_out).any():
        return lightgbm.train(settings, learned, config.rounds)
    watched = dataset(teaches & held_out, reference=learned)
    stop = lightgbm.early_stopping(config.patience, verbose=False)
    grown = lightgbm.train(settings, learned, config.rounds, valid_sets=[watched], callbacks=[stop])
    # Saving keeps all trees unless told otherwise; what is kept is the best number of them.
    return lightgbm.Booster(model_str=grown.model_to_string(num_iteration=grown.best_iteration))


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError:
        raise UserError("the ranker needs LightGBM: pip install 'mmrec[generative]'") from None
    return lightgbm
