"""Beam search against scoring every product, one at a time."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'mmrec[generative]'")

from mmrec.generative.beam import beam_search
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.trie import build_trie

SIZES = (6, 5, 4, 3)


def codes_of(number: int, seed: int = 0) -> np.ndarray:
    cells = np.random.default_rng(seed).permutation(int(np.prod(SIZES)))[:number]
    return np.stack(np.unravel_index(cells, SIZES), axis=1).astype(np.int64)


def small(architecture: str = "phi3", **changes: object) -> Generator:
    torch.manual_seed(0)
    settings = {"width": 32, "layers": 2, "heads": 2, "inner": 48, "max_items": 4, **changes}
    generator = Generator(GeneratorConfig(architecture=architecture, **settings), SIZES).eval()
    # Weights as they start give nearly even scores; larger ones tell mistakes from rounding.
    with torch.no_grad():
        for weight in generator.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return generator


def exhaustive(
    generator: Generator, history: torch.Tensor, ids: torch.Tensor, content: torch.Tensor | None
) -> torch.Tensor:
    """Scores from whole sequences, without cache, masks of its own, or padding."""
    scores = []
    for one in ids:
        codes = torch.cat([history, one[None]])[None]
        inputs = generator.inputs(codes, content)[:, :-1]
        states = generator.body(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
        total = 0.0
        for level, code in enumerate(one.tolist()):
            state = states[len(history) * len(SIZES) + level]
            odds = generator.logits(state, level).double().exp()
            rivals = range(SIZES[level])
            if level + 1 == len(SIZES):  # The appended code has rivals in its own cell alone.
                rivals = [other[-1] for other in ids.tolist() if other[:-1] == one.tolist()[:-1]]
            total += float((odds[code] / odds[list(rivals)].sum()).log())
        scores.append(total)
    return torch.tensor(scores)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("phi3", {}), ("phi3", {"tied": False}), ("qwen3", {}), ("gpt2", {})],
)
@torch.inference_mode()
def test_a_full_width_beam_equals_exhaustive_scoring(
    architecture: str, changes: dict[str, object]
) -> None:
    generator, codes = small(architecture, **changes), codes_of(40)
    ids = torch.from_numpy(codes)
    histories = [ids[[3, 7]], ids[[1]], ids[[5, 6, 9, 2]], ids[:0]]
    beams = generator.generate(histories, trie=build_trie(codes), num_beams=40)
    assert beams.products is not None
    for row, history in enumerate(histories):
        expected = exhaustive(generator, history, ids, None)
        assert sorted(beams.products[row].tolist()) == list(range(40))
        assert torch.allclose(beams.scores[row], expected[beams.products[row]].float(), atol=1e-4)
        assert (beams.scores[row].diff() <= 0).all()
        assert torch.equal(beams.codes[row], ids[beams.products[row]])
    assert torch.allclose(
        generator.score(histories, ids).gather(1, beams.products), beams.scores, atol=1e-4
    )


@torch.inference_mode()
def test_a_content_leads_to_products() -> None:
    generator, codes = small(content_width=8), codes_of(30)
    ids, contents = torch.from_numpy(codes), torch.randn(2, 8)
    contents[1] = 0  # None is given.
    beams = generator.generate(
        [ids[:0], ids[[4]]], trie=build_trie(codes), num_beams=30, contents=contents
    )
    assert beams.products is not None
    for row, (history, content) in enumerate([(ids[:0], contents[:1]), (ids[[4]], None)]):
        expected = exhaustive(generator, history, ids, content)
        assert torch.allclose(beams.scores[row], expected[beams.products[row]].float(), atol=1e-4)


@torch.inference_mode()
def test_a_narrower_catalogue_has_scores_of_its_own_cells() -> None:
    generator, codes = small(), codes_of(60)
    history = torch.from_numpy(codes[[1, 2]])
    in_stock = np.arange(60) % 2 == 0
    half = generator.generate([history], trie=build_trie(codes, available=in_stock), num_beams=60)
    assert half.products is not None
    found = half.products[0, :30]
    assert sorted(found.tolist()) == list(range(0, 60, 2))
    expected = exhaustive(generator, history, torch.from_numpy(codes[::2]), None)
    assert torch.allclose(half.scores[0, :30], expected[found // 2].float(), atol=1e-4)
    assert half.products[0, 30:].eq(-1).all()
    assert half.scores[0, 30:].isinf().all()


def test_cells_of_one_product_need_no_appended_code() -> None:
    generator = small()
    cells = np.stack(np.unravel_index(np.arange(0, 120, 3), SIZES[:3]), axis=1)
    codes = np.concatenate([cells, np.zeros((len(cells), 1), np.int64)], axis=1)
    asked = []
    logits = generator.logits
    generator.logits = lambda hidden, level: asked.append(level) or logits(hidden, level)
    history = torch.from_numpy(codes[[3, 5]])
    found = generator.generate([history], trie=build_trie(codes), num_beams=40)
    assert asked == [0, 1, 2]
    generator.logits = logits
    expected = generator.score([history], torch.from_numpy(codes))[0]
    assert found.products is not None
    assert torch.allclose(found.scores[0], expected[found.products[0]], atol=1e-4)


def test_without_a_trie_any_codes_are_found() -> None:
    generator = small()
    codes = np.stack(np.unravel_index(np.arange(360), SIZES), axis=1)
    history = [torch.from_numpy(codes[[11, 200]])]
    every = generator.generate(history, trie=build_trie(codes), num_beams=20)
    free = generator.generate(history, trie=None, num_beams=20)
    assert free.products is None
    assert torch.equal(free.codes, every.codes)
    assert torch.allclose(free.scores, every.scores, atol=1e-5)


def test_the_cache_holds_a_history_once() -> None:
    generator, codes = small(), codes_of(40)
    caches = []
    new_cache = generator.new_cache
    generator.new_cache = lambda: caches.append(new_cache()) or caches[-1]
    ids = torch.from_numpy(codes)[None, :3]
    prompt = generator.inputs(ids)
    present = torch.ones(prompt.shape[:2], dtype=torch.bool)
    beam_search(generator, prompt.detach(), present, trie=build_trie(codes), num_beams=10)
    (cache,) = caches
    # The prompt, six codes of the first level, ten beams, and those of the third with several products.
    assert cache.layers[0].keys.shape[:1] == (1,)
    assert 0 <= cache.layers[0].keys.shape[2] - prompt.shape[1] - 6 - 10 <= 10
