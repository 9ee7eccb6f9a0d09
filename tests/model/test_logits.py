"""Streamed logsumexps and softplus sums against dense ones, and what they keep in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from mmrec.model import logits
from mmrec.model.logits import Entries, find_entries, logsumexps, softplus_sums


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entries(*places: tuple[int, int]) -> Entries:
    rows, columns = zip(*places, strict=True)
    return Entries(torch.tensor(rows), torch.tensor(columns))


PICKED = entries((0, 1), (0, 3), (2, 3), (4, 0), (4, 0), (6, 5))
EXCLUDED = entries((0, 0), (1, 5), (3, 2), (6, 0))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Seven rows and six columns, unit vectors."""
    return {
        "rows": normalize(draw(7, 4), dim=1).requires_grad_(),
        "columns": normalize(draw(6, 4, seed=1), dim=1).requires_grad_(),
        "scale": torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
    }


@pytest.mark.parametrize("num_links", [1, 3])
def test_entries_are_all_pairs_of_a_link_and_a_column(num_links: int) -> None:
    generator = torch.Generator().manual_seed(num_links)
    links = torch.randint(-1, 5, (8, num_links), generator=generator)
    ids = torch.randint(0, 6, (9,), generator=generator)
    found, which = find_entries(links, ids)
    expected = [
        (i, j, i * num_links + m)
        for i in range(8)
        for m in range(num_links)
        for j in range(9)
        if links[i, m] == ids[j]
    ]
    ours = zip(found.rows.tolist(), found.columns.tolist(), which.tolist(), strict=True)
    assert sorted(ours) == sorted(expected)
    assert found.rows.tolist() == sorted(found.rows.tolist())


def test_there_are_no_entries_without_links_or_columns() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert len(find_entries(torch.zeros(4, 0, dtype=torch.long), torch.arange(3))[0]) == 0
    assert len(find_entries(none[:, None], torch.arange(3))[0]) == 0
    assert len(find_entries(torch.arange(3)[:, None], none)[0]) == 0


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("shifted", [False, True])
def test_logsumexps_equal_dense_ones(
    inputs: dict[str, Tensor], chunk_rows: int, shifted: bool
) -> None:
    column_shift, row_shift = (draw(6, seed=2), draw(7, seed=3)) if shifted else (None, None)
    by_row, by_column, chosen = logsumexps(
        **inputs,
        picked=PICKED,
        excluded=EXCLUDED,
        column_shift=column_shift,
        row_shift=row_shift,
        chunk_rows=chunk_rows,
    )
    raw = inputs["scale"] * inputs["rows"] @ inputs["columns"].T
    logits = raw.index_put((EXCLUDED.rows, EXCLUDED.columns), raw.new_tensor(-torch.inf))
    for_row = logits if column_shift is None else logits + column_shift
    for_column = logits if row_shift is None else logits + row_shift[:, None]
    dense = (for_row.logsumexp(1), for_column.logsumexp(0), logits[PICKED.rows, PICKED.columns])
    weights = [draw(7, seed=4), draw(6, seed=5), draw(6, seed=6)]
    for ours, theirs in zip((by_row, by_column, chosen), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(
            sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)),
            list(inputs.values()),
        )
        for parts in ((by_row, by_column, chosen), dense)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7])
def test_softplus_sums_equal_dense_ones(inputs: dict[str, Tensor], chunk_rows: int) -> None:
    offset = draw(6, seed=2).requires_grad_()
    ours = softplus_sums(
        **inputs, offset=offset, picked=PICKED, excluded=EXCLUDED, chunk_rows=chunk_rows
    )
    logits = inputs["scale"] * inputs["rows"] @ inputs["columns"].T + offset
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    for places in (PICKED, EXCLUDED):
        left_out[places.rows, places.columns] = True
    dense = (
        softplus(logits).masked_fill(left_out, 0).sum(1),
        logits[PICKED.rows, PICKED.columns],
    )
    leaves = [*inputs.values(), offset]
    weights = [draw(7, seed=4), draw(6, seed=6)]
    gradients = []
    for parts in (ours, dense):
        terms = [(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]
        gradients.append(torch.autograd.grad(terms[0] + terms[1], leaves))
    for a, b in zip((*ours, *gradients[0]), (*dense, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradients_pass_gradcheck(inputs: dict[str, Tensor]) -> None:
    leaves = tuple(inputs.values())
    shifts = {"column_shift": draw(6, seed=2), "row_shift": draw(7, seed=3)}
    places = {"picked": PICKED, "excluded": EXCLUDED, "chunk_rows": 3}
    softmax: Callable[..., object] = lambda *x: logsumexps(*x, **shifts, **places)  # noqa: E731
    assert torch.autograd.gradcheck(softmax, leaves)
    offset = draw(6, seed=2).requires_grad_()
    sigmoid: Callable[..., object] = lambda *x: softplus_sums(*x, **places)  # noqa: E731
    assert torch.autograd.gradcheck(sigmoid, (*leaves, offset))


def test_sums_over_nothing_are_minus_infinity_and_have_no_gradient() -> None:
    rows, columns = draw(3, 4).requires_grad_(), draw(2, 4, seed=1).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64)
    nowhere = Entries(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    # Row 1 and column 0 have every entry excluded.
    alone = entries((0, 0), (1, 0), (1, 1), (2, 0))
    by_row, by_column, _ = logsumexps(
        rows, columns, scale, picked=nowhere, excluded=alone, chunk_rows=2
    )
    assert by_row.isinf().tolist() == [False, True, False]
    assert by_column.isinf().tolist() == [True, False]
    (by_row[[0, 2]].sum() + by_column[1]).backward()
    assert rows.grad is not None
    assert columns.grad is not None
    assert rows.grad.isfinite().all()
    assert (rows.grad[1] == 0).all()
    assert (columns.grad[0] == 0).all()
    empty = draw(0, 4).requires_grad_()
    by_row, by_column, _ = logsumexps(rows, empty, scale, picked=nowhere, chunk_rows=2)
    assert (by_row == -torch.inf).all()
    assert len(by_column) == 0
    _, by_column, _ = logsumexps(empty, columns, scale, picked=nowhere, chunk_rows=2)
    assert (by_column == -torch.inf).all()


def test_logits_that_lie_far_apart_lose_nothing_in_float32() -> None:
    # The second column's best logit is 180 below the row's: e^-180 is 0 in float32.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    columns = torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
    _, by_column, _ = logsumexps(
        rows, columns, torch.tensor(100.0), picked=entries((0, 0)), chunk_rows=1
    )
    expected = torch.tensor([100.0, -80.0]) + torch.log(torch.tensor(2.0))
    torch.testing.assert_close(by_column, expected)


def test_bfloat16_features_are_multiplied_in_float32_on_a_cpu() -> None:
    low = [normalize(draw(8, 16, seed=s), dim=1).bfloat16().requires_grad_() for s in (0, 1)]
    high = [part.detach().float().requires_grad_() for part in low]
    scale = torch.tensor(20.0)
    results = []
    for leaves, autocast in ((low, True), (high, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts = logsumexps(*leaves, scale, picked=PICKED, chunk_rows=3)
        assert all(part.dtype == torch.float32 for part in parts)
        loss = parts[0].sum() + parts[1].sum() - parts[2].sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert results[0][1].dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16())


def test_what_is_saved_for_backward_is_features_and_vectors() -> None:
    rows, columns = draw(512, 16).float().requires_grad_(), draw(512, 16).float().requires_grad_()
    saved: dict[int, int] = {}

    def note(part: Tensor) -> Tensor:
        saved[part.data_ptr()] = part.nbytes
        return part

    everyone = torch.arange(512)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        logsumexps(
            rows, columns, torch.tensor(5.0), picked=Entries(everyone, everyone), chunk_rows=32
        )
    features = rows.nbytes + columns.nbytes
    assert features <= sum(saved.values()) <= features + 4 * 512 * 4


def total_and_gradients(leaves: list[Tensor], device: str = "cpu") -> list[Tensor]:
    """All that a loss takes of the logits in one number, and its gradients by rows, columns and scale."""
    places = Entries(PICKED.rows.to(device), PICKED.columns.to(device))
    by_row, by_column, chosen = logsumexps(*leaves, picked=places, chunk_rows=3)
    loss = by_row.sum() + by_column.sum() - chosen.sum()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_bfloat16_factors_change_little(
    inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of GPUs, with a product that CPUs have."""
    exact = total_and_gradients(list(inputs.values()))
    leaves = [part.detach().float().requires_grad_() for part in inputs.values()]
    monkeypatch.setattr(logits, "_dtype_of_factors", lambda rows: torch.bfloat16)
    monkeypatch.setattr(logits, "_wide_mm", lambda left, right: left.float() @ right.float())
    low = total_and_gradients(leaves)
    assert not torch.equal(low[0].double(), exact[0])
    for ours, theirs in zip(low, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_gives_what_a_cpu_gives(inputs: dict[str, Tensor], autocast: bool) -> None:
    exact = total_and_gradients(list(inputs.values()))
    leaves = [part.detach().float().cuda().requires_grad_() for part in inputs.values()]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = total_and_gradients(leaves, "cuda")
    tolerance = 0.02 if autocast else 1e-4
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance)
