"""Recommender: the products that a history, a content, or both lead to, generated from their semantic IDs.

from mmrec import Recommender
recommender = Recommender.load("runs/demo/generator")
recommender.recommend(history=["p00012", "p00107"], k=5)

A changed catalogue is another table of IDs or another set of available products: `use` and `set_unavailable`
build a new trie and swap it in. Nothing is trained, and no product that is not available can come out.
Shape letters: V width of a content's embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mmrec.data.batches import collate_items
from mmrec.data.media import Source
from mmrec.errors import UserError
from mmrec.generative.generator import KIND, Generator, check_ids
from mmrec.generative.semantic_ids import SemanticIds
from mmrec.generative.trie import Trie, build_trie
from mmrec.manifest import Manifest, find_parent, find_recorded, read_manifest
from mmrec.model.encoder import Encoder
from mmrec.retrieval.embed import pick_device
from mmrec.retrieval.intake import name_ids
from mmrec.retrieval.queries import Query, preprocessed, read_query


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One generated product."""

    product_id: str
    score: float
    """Log probability of its ID, at most 0."""


@dataclass(frozen=True, kw_only=True)
class Recommendations(Sequence[Recommendation]):
    """The products generated for one request, best first."""

    products: list[Recommendation]
    unknown_items: int = 0
    """Products of the history that have no ID, and were left out."""

    def __len__(self) -> int:
        return len(self.products)

    def __getitem__(self, place: Any) -> Any:
        return self.products[place]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "recommendations": [asdict(product) for product in self.products],
            "unknown_items": self.unknown_items,
        }


class Recommender:
    """A generator, the IDs of a catalogue, and where contents come in the encoder that embeds them."""

    def __init__(
        self, generator: Generator, ids: SemanticIds, *, encoder: Encoder | None = None
    ) -> None:
        """Raises `UserError` for IDs that the generator did not learn, or of another encoder."""
        check_ids(generator, ids, "the IDs given")
        _check_encoder(ids, encoder)
        self.generator = generator.eval()
        self.encoder = encoder
        self._unavailable: frozenset[str] = frozenset()
        # One attribute, so that a change by another thread is seen whole or not at all.
        self._catalogue = ids, build_trie(ids.codes, device=generator.device)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        ids: Path | str | None = None,
        encoder: Path | str | None = None,
        device: str = "auto",
    ) -> "Recommender":
        """Open a run of train/generator.py, or the generator in it.

        The IDs and the encoder are found through lineage, or given by path: IDs that were extended since, for
        one. Raises `UserError` when what is needed is missing or does not belong together. Without an encoder
        all works but requests by video, pictures or words.
        """
        folder = Path(folder)
        if read_manifest(folder).kind == "run" and (folder / KIND).is_dir():
            folder = folder / KIND
        on = pick_device(device)
        generator = Generator.load(folder, device=on)
        found = ids or find_parent(folder, "semantic_ids")
        if found is None:
            raise UserError(
                f"{folder}: the semantic IDs that it was trained on are not where they were; give them with "
                "--ids"
            )
        table = SemanticIds.load(Path(str(found)))
        check_ids(generator, table, str(found))
        if encoder is None and generator.content is not None and table.manifest is not None:
            encoder = _recorded_encoder(Path(str(found)), table.manifest)
        loaded = None if encoder is None else Encoder.load(encoder, device=on)
        return cls(generator, table, encoder=loaded)

    def __len__(self) -> int:
        """How many products may be generated."""
        return len(self._catalogue[1])

    @property
    def ids(self) -> SemanticIds:
        """The IDs of the catalogue, of unavailable products as well."""
        return self._catalogue[0]

    def use(self, ids: SemanticIds) -> None:
        """Recommend from these IDs from now on: those of before, extended. What was unavailable stays so.

        Raises `UserError` for IDs that did not grow from those that the generator learned.
        """
        check_ids(self.generator, ids, "the IDs given")
        self._catalogue = ids, self._trie_without(ids, self._unavailable & set(ids.rows))

    def set_unavailable(self, product_ids: Iterable[str]) -> None:
        """From now on these products, and no others, are never generated; they may stand in histories.

        Raises `UserError` for products without an ID, and where nothing would be left.
        """
        wanted = frozenset(product_ids)
        unknown = sorted(wanted - set(self.ids.rows))
        if unknown:
            raise UserError(
                f"unavailable products without an ID in this catalogue: {name_ids(unknown)}"
            )
        self._catalogue = self.ids, self._trie_without(self.ids, wanted)
        self._unavailable = wanted

    def _trie_without(self, ids: SemanticIds, product_ids: Iterable[str]) -> Trie:
        available = np.ones(len(ids), bool)
        available[[ids.rows[id_] for id_ in product_ids]] = False
        return build_trie(ids.codes, available=available, device=self.generator.device)

    def recommend(
        self,
        history: Sequence[str] | None = (),
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
        k: int = 10,
        num_beams: int | None = None,
        seen: bool = True,
    ) -> Recommendations:
        """The k products most likely to come next after a history (oldest first), a content, or both.

        How both act together is learned where train/generator.py was given --watched: what comes after a
        history and a content that was watched since.
        Products of the history without an ID are left out and counted. `num_beams` is at least k; more find
        more surely what is likely, and left out it is twice k or 50. `seen` says whether products of the
        history may come again. Raises `UserError` for a request with nothing known in it, a history that is
        one string, a k or num_beams below 1, or a content where the generator has learned none.
        """
        ids, trie = self._catalogue
        if isinstance(history, str):
            raise UserError(
                f"history '{history}': expected a list of product ids, found one string"
            )
        rows, unknown = ids.known(() if history is None else history)
        _check_count("k", k)
        if num_beams is not None:
            _check_count("num_beams", num_beams)
        content = None
        if video is not None or title is not None or not _is_empty(images):
            content = self.embed(video=video, images=images, title=title)
        if not rows and content is None:
            what = (
                f"none of its {unknown} products has an ID in this catalogue"
                if unknown
                else "it is empty"
            )
            raise UserError(
                f"the history gives nothing to go by: {what}; give known products or a content"
            )
        beams = max(num_beams or max(2 * k, 50), k) + (0 if seen else len(set(rows)))
        codes = torch.from_numpy(ids.codes[rows]).long()
        found = self.generator.generate([codes], trie=trie, num_beams=beams, contents=content)
        assert found.products is not None
        listed = [
            Recommendation(product_id=ids.product_ids[row], score=score)
            for row, score in zip(found.products[0].tolist(), found.scores[0].tolist(), strict=True)
            if row >= 0 and (seen or row not in rows)
        ]
        return Recommendations(products=listed[:k], unknown_items=unknown)

    def embed(
        self,
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
    ) -> Float[Tensor, "1 V"]:
        """The embedding of a content, as the generator takes it. Raises `UserError` where it takes none."""
        if self.generator.content is None:
            raise UserError(
                "this generator was trained without contents; train it with --contents, or give a history"
            )
        if self.encoder is None:
            raise UserError(
                "a content needs the encoder that the IDs came of; give it with --encoder"
            )
        most = self.encoder.config.num_frames
        pictures = []
        if video is not None or not _is_empty(images):
            own = [images] if isinstance(images, str | Path | bytes) else list(images)[:most]
            pictures = read_query(Query(video=video, images=own), most)
        preprocess = self.encoder.preprocess
        batch = collate_items(
            [preprocessed(pictures, preprocess)],
            [title],
            tokenizer=self.encoder.tokenizer,
            size=preprocess.size,
        )
        vector: Float32[np.ndarray, "1 V"] = self.encoder.embed(batch, "content").cpu().numpy()
        return torch.from_numpy(vector).to(self.generator.device)


def _check_count(name: str, count: Any) -> None:
    """Raise `UserError` for a count that is not a whole number, or below 1."""
    if not isinstance(count, int | np.integer) or count < 1:
        raise UserError(f"{name} {count}: expected at least 1, a whole number")


def _is_empty(images: Sequence[Source] | Source) -> bool:
    return not isinstance(images, str | Path | bytes) and not len(images)  # pyright: ignore


def _recorded_encoder(folder: Path, manifest: Manifest) -> Path | None:
    """Where the encoder of a table of IDs lies now, if it is there."""
    found = find_recorded(folder, manifest.parent("encoder"))
    return Path(str(found)) if found is not None else None


def _check_encoder(ids: SemanticIds, encoder: Encoder | None) -> None:
    wanted = ids.manifest.encoder if ids.manifest else None
    if encoder is not None and wanted is not None and encoder.fingerprint != wanted:
        raise UserError(
            f"the semantic IDs were cut from embeddings of encoder {wanted}, and this one is "
            f"{encoder.fingerprint}; give the former with --encoder"
        )
