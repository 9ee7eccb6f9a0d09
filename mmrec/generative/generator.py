"""The generator: a small causal language model whose words are the codes of semantic IDs.

Its input is a start, to which a content's embedding may be added, and the IDs of a history; its output is
the ID of the next product, a level at a time. Codes of each level have rows of their own in one table, which
serves as input and, transposed, as output: a level scores its own codes alone.
Shape letters: B sequences, S products of a sequence, E codes of an ID, T = 1 + S E positions, D width of the
decoder, V width of a content's embedding, K codes of a level.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmrec.errors import UserError
from mmrec.generative.beam import Beams, beam_search
from mmrec.generative.dropout import replace_dropouts
from mmrec.generative.semantic_ids import SemanticIds
from mmrec.generative.trie import Trie
from mmrec.manifest import (
    Manifest,
    Parent,
    fingerprint_of,
    hash_file,
    new_folder,
    read_manifest,
    write_manifest,
)
from mmrec.ranges import Count, CountOrZero, Share, check_ranges

KIND = "generator"
_WEIGHTS = "model.safetensors"
# Names that architectures have for the share of values dropped in training. Attention's weights are not
# among them: without it attention is one call that holds no matrix of them, on a CPU and on a GPU.
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob")
_DROPOUTS += ("residual_dropout", "dropout", "embedding_dropout")
_NO_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_NO_WORDS = {"vocab_size": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The model."""

    architecture: str = "phi3"
    """A model type of transformers, started from random weights (phi3 is like llama, with dropout between its
    layers; qwen3, llama and gpt2 work as well), or the folder or name of a pretrained causal model."""
    width: Count = 128
    """D; not of pretrained models, which have their own, nor are the next three."""
    layers: Count = 4
    heads: Count = 4
    inner: Count = 384
    """Width between the two halves of a layer's feed-forward part."""
    dropout: Share = 0.2
    """Share of values dropped in training, wherever the architecture knows to, and before the output."""
    tied: bool = True
    """Score codes by the rows that they are read by; off, each level has weights of its own for that."""
    max_items: Count = 20
    """Products of a history that are looked at, the latest."""
    content_width: CountOrZero = 0
    """V; 0 without contents. A training program sets it to what it is given."""


class Generator(nn.Module):
    """Scores and generates semantic IDs. `sizes` are the codes of each level; see `SemanticIds.sizes`."""

    def __init__(
        self,
        config: GeneratorConfig,
        sizes: Sequence[int],
        *,
        root: str = "",
        body: nn.Module | None = None,
    ) -> None:
        """Build the model; `root` is that of the IDs (`SemanticIds.root`), `body` replaces the config's.

        Raises `UserError` for an architecture that transformers does not know or cannot build so.
        """
        super().__init__()
        check_ranges(config, "model.")
        self.config = config
        self.root = root
        self._sizes = tuple(int(size) for size in sizes)
        positions = 1 + (config.max_items + 1) * len(self._sizes)
        self.body: Any = build_body(config, positions) if body is None else body
        self.width: int = self.body.config.hidden_size
        self.starts = [sum(self._sizes[:level]) for level in range(len(self._sizes))]
        # The last row is the start.
        self.codes = nn.Embedding(sum(self._sizes) + 1, self.width)
        nn.init.normal_(self.codes.weight, std=0.02)
        self.heads = None
        if not config.tied:
            self.heads = nn.ModuleList(
                nn.Linear(self.width, size, bias=False) for size in self._sizes
            )
        self.content = None
        if config.content_width:
            self.content = nn.Linear(config.content_width, self.width)
        self.drop = nn.Dropout(config.dropout)
        replace_dropouts(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""
        return self._sizes

    @property
    def levels(self) -> int:
        """E."""
        return len(self._sizes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codes.weight.device

    # What beam search asks for.

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        from transformers import DynamicCache

        return DynamicCache()

    def hidden(
        self,
        inputs: Float[Tensor, "B Q D"],
        *,
        mask: Float[Tensor, "B 1 Q S"],
        positions: Int64[Tensor, "B Q"],
        cache: Any = None,
    ) -> Float[Tensor, "B Q D"]:
        """The last layer's states; keys and values are added to the cache, where one is given."""
        found = self.body(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return found.last_hidden_state

    def embed_codes(self, codes: Int64[Tensor, "*B"], level: int) -> Float[Tensor, "*B D"]:
        """Inputs for codes of a level."""
        return self.codes(codes + self.starts[level])

    def logits(self, hidden: Float[Tensor, "*B D"], level: int) -> Float[Tensor, "*B K"]:
        """Scores of the codes of a level alone."""
        if self.heads is not None:
            return self.heads[level](hidden)
        first = self.starts[level]
        return nn.functional.linear(hidden, self.codes.weight[first : first + self._sizes[level]])

    # What training and use ask for.

    def inputs(
        self,
        ids: Int64[Tensor, "B S E"],
        contents: Float[Tensor, "B V"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The start, with a content added where one is given (a zero row is none), and the codes of IDs."""
        start = self.codes.weight[-1].expand(len(ids), 1, -1)
        if contents is not None:
            if self.content is None:
                raise UserError("this generator was trained without contents; give it a history")
            known = contents.any(1)[:, None, None]
            start = start + self.content(contents)[:, None] * known
        offsets = torch.tensor(self.starts, device=ids.device)
        codes = self.codes(ids + offsets).flatten(1, 2)  # (B, S E, D)
        return torch.cat([start.to(codes.dtype), codes], dim=1)

    def forward(
        self,
        ids: Int64[Tensor, "B S E"],
        learned: Bool[Tensor, "B S"],
        contents: Float[Tensor, "B V"] | None = None,
    ) -> dict[str, Tensor]:
        """The loss of the products marked as learned, given those before each; padding is on the right.

            loss = - mean over learned products of sum over levels of log p(code | codes before it)

        Returns it as `loss`, and each level's share of it.
        """
        inputs = self.drop(self.inputs(ids, contents)[:, :-1])
        # No mask: causal attention never looks to the right, where the padding is.
        states = self.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
        states = self.drop(states).unflatten(1, (-1, self.levels))[learned]  # (P, E, D)
        targets = ids[learned]  # (P, E)
        losses = {
            f"level_{level + 1}": nn.functional.cross_entropy(
                self.logits(states[:, level], level).float(), targets[:, level]
            )
            for level in range(self.levels)
        }
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.inference_mode()
    def score(
        self,
        histories: Sequence[Int64[Tensor, "_ E"]],
        ids: Int64[Tensor, "N E"],
        contents: Float[Tensor, "B V"] | None = None,
    ) -> Float[Tensor, "B N"]:
        """The score of each ID of a catalogue after each history, as `beam_search` defines it, one by one."""
        rows = []
        _, cells = ids[:, :-1].unique(dim=0, return_inverse=True)
        for number, history in enumerate(histories):
            history = history[-self.config.max_items :]
            whole = torch.cat([history.expand(len(ids), -1, -1), ids[:, None]], dim=1)
            own = None if contents is None else contents[number].expand(len(ids), -1)
            inputs = self.inputs(whole, own)[:, :-1]
            states = self.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
            last = states[:, -self.levels :]
            total = torch.zeros(len(ids), device=ids.device)
            for level in range(self.levels):
                logits = self.logits(last[:, level], level).float()
                found = logits.gather(1, ids[:, level, None])[:, 0]
                if level + 1 < self.levels:
                    total += found - logits.logsumexp(-1)
                    continue
                # The appended code's softmax is over the products of its cell.
                siblings = torch.full(
                    (len(ids), int(cells.max()) + 1), -torch.inf, device=ids.device
                )
                siblings[torch.arange(len(ids)), cells] = found
                total += found - siblings.logsumexp(0)[cells]
            rows.append(total)
        return torch.stack(rows)

    @torch.inference_mode()
    def generate(
        self,
        histories: Sequence[Int64[Tensor, "_ E"]],
        *,
        trie: Trie | None,
        num_beams: int,
        contents: Float[Tensor, "B V"] | None = None,
    ) -> Beams:
        """The most probable next IDs after each history, by `beam_search`."""
        if trie is not None and trie.depth != self.levels:
            raise UserError(
                f"this generator writes IDs of {self.levels} codes, and these have {trie.depth}: they are of "
                "another catalogue"
            )
        latest = [history[-self.config.max_items :] for history in histories]
        longest = max((len(history) for history in latest), default=0)
        ids = torch.zeros(len(latest), longest, self.levels, dtype=torch.int64, device=self.device)
        filled = torch.zeros(len(latest), longest, dtype=torch.bool, device=self.device)
        for row, history in enumerate(latest):
            if len(history):
                ids[row, longest - len(history) :] = history.to(self.device)
                filled[row, longest - len(history) :] = True
        prompt = self.inputs(ids, contents)
        filled = filled.repeat_interleave(self.levels, dim=1)
        # The start moves up to the history, which stands at the right; what is left of it is padding.
        gap = (~filled).sum(1)
        rows = torch.arange(len(latest), device=self.device)
        start = prompt[:, 0].clone()
        prompt[rows, gap] = start
        present = torch.cat([filled.new_zeros(len(latest), 1), filled], dim=1)
        present[rows, gap] = True
        return beam_search(self, prompt, present, trie=trie, num_beams=num_beams)

    # Files.

    def save(
        self,
        out: Path,
        *,
        parents: Sequence[Parent] = (),
        details: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Manifest:
        """Write config.json, body.json, the weights and a manifest."""
        with new_folder(out, kind=KIND, overwrite=overwrite) as folder:
            weights = {n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
            save_file(weights, folder / _WEIGHTS)
            body = json.dumps(self.body.config.to_dict(), indent=2, default=str)
            (folder / "body.json").write_text(body + "\n", encoding="utf-8")
            manifest = Manifest(
                kind=KIND,
                config=asdict(self.config),
                counts={"weights": sum(part.numel() for part in self.parameters())},
                parents=list(parents),
                fingerprint=fingerprint_of(
                    {"weights": hash_file(folder / _WEIGHTS), "root": self.root, "body": body}
                ),
                details={"sizes": list(self._sizes), "root": self.root, **(details or {})},
            )
            write_manifest(folder, manifest)
        return manifest

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu") -> "Generator":
        """Read a generator's folder. Raises `UserError` when it is missing or broken."""
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        try:
            body = json.loads((folder / "body.json").read_text(encoding="utf-8"))
            generator = cls(
                GeneratorConfig(**manifest.config),
                manifest.details["sizes"],
                root=manifest.details["root"],
                body=_from_settings(body),
            )
            generator.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            line = str(error).split("\n")[0][:160]
            raise UserError(f"{folder}: a generator that cannot be read ({line})") from None
        return generator.to(device).eval()


def build_body(config: GeneratorConfig, positions: int) -> nn.Module:
    """The layers of a causal model without words of its own: by type from random weights, or pretrained.

    Raises `UserError` where transformers is missing, or cannot build it.
    """
    transformers = _transformers()
    try:
        if config.architecture in transformers.CONFIG_MAPPING:
            if config.width % config.heads:
                raise ValueError(f"width {config.width} does not divide by {config.heads} heads")
            settings = transformers.AutoConfig.for_model(
                config.architecture,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                head_dim=config.width // config.heads,
                intermediate_size=config.inner,
                max_position_embeddings=positions,
                **_NO_WORDS,
            )
            shares = {name: config.dropout for name in _DROPOUTS} | dict.fromkeys(_NO_DROPOUTS, 0.0)
            for name, share in shares.items():
                if hasattr(settings, name):
                    setattr(settings, name, share)
            body = transformers.AutoModel.from_config(settings)
        else:
            body = transformers.AutoModel.from_pretrained(config.architecture)
        return _without_words(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())[:160]
        raise UserError(
            f"--model.architecture {config.architecture}: transformers cannot build it ({line}); expected a "
            "causal model's type, such as phi3, llama or gpt2, or the folder of a pretrained one"
        ) from None


def _from_settings(settings: dict[str, Any]) -> nn.Module:
    """The body that a generator's folder describes, its weights still random."""
    transformers = _transformers()
    model_type = settings.pop("model_type")
    return _without_words(
        transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(model_type, **{**settings, **_NO_WORDS})
        )
    )


def _without_words(body: Any) -> Any:
    """A body that is fed by embeddings alone: its own table shrinks to a row that nobody reads."""
    body.set_input_embeddings(nn.Embedding(1, body.config.hidden_size).requires_grad_(False))
    body.config.vocab_size = 1
    return body


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("a generator needs transformers: pip install 'mmrec[generative]'") from None
    return transformers


def check_ids(generator: Generator, ids: SemanticIds, where: str) -> None:
    """Refuse IDs that are not those a generator learned, nor grew from them."""
    root = ids.root or ids.fingerprint
    if generator.root != root:
        raise UserError(
            f"{where}: these semantic IDs grew from {root}, and the generator learned {generator.root}; give "
            "those, or train a generator on these"
        )
