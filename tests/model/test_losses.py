"""The loss against a short dense float64 reference, on one process and on two ranks."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.model.losses import Objectives, contrastive_loss, edge_loss, info_nce, link_mass


def reference(rows: Tensor, columns: Tensor, mass: Tensor, scale: Tensor) -> Tensor:
    """Both directions, written out row by row."""
    total = rows.new_zeros(())
    for here, there, weights in ((rows, columns, mass), (columns, rows, mass.T)):
        terms = []
        for i in range(len(here)):
            if weights[i].sum() == 0:
                continue
            log_p = torch.log_softmax(scale * there @ here[i], 0)
            terms.append(-(weights[i] / weights[i].sum() * log_p).sum())
        total = total + torch.stack(terms).mean()
    return total / 2


def example(count: int, width: int = 5) -> dict[str, Tensor]:
    """Rows with one or two links, products that repeat, and one link to a product outside the batch."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randint(0, 4, (count,), generator=generator)
    second = torch.randint(0, 6, (count,), generator=generator)
    second[second == products] = -1
    weights = torch.rand(count, 2, generator=generator, dtype=torch.float64) + 0.1
    weights[:, 1] *= second >= 0
    draw = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return {
        "rows": normalize(draw[0], dim=-1),
        "columns": normalize(draw[1], dim=-1),
        "links": torch.stack([products, second], 1),
        "weights": weights,
        "products": products,
        "scale": torch.tensor(7.0, dtype=torch.float64),
    }


def dense_mass(links: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
    mass = torch.zeros(len(links), len(columns), dtype=weights.dtype)
    for i in range(len(links)):
        for j in range(len(columns)):
            for m in range(links.shape[1]):
                if links[i, m] == columns[j]:
                    mass[i, j] += weights[i, m]
    return mass


def test_mass_is_the_weight_of_the_link_to_a_columns_product() -> None:
    x = example(9)
    expected = dense_mass(x["links"], x["weights"], x["products"])
    assert torch.equal(link_mass(x["links"], x["weights"], x["products"]), expected)
    assert (expected > 0).sum() > 9  # Not only the diagonal: the example has repeated products.


def test_with_one_positive_a_row_it_is_clips_loss() -> None:
    x = example(6)
    loss, count = info_nce(x["rows"], x["columns"], torch.eye(6, dtype=torch.float64), x["scale"])
    logits = x["scale"] * x["rows"] @ x["columns"].T
    assert torch.allclose(loss / count, cross_entropy(logits, torch.arange(6)))


def test_value_and_gradients_equal_the_reference() -> None:
    results = []
    for compute in (_by_edge_loss, _by_reference):
        x = {k: v.clone() for k, v in example(12).items()}
        leaves = [x[name].requires_grad_() for name in ("rows", "columns", "scale")]
        loss = compute(x)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        # edge_loss works in float32 under mixed precision and so here.
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def _by_edge_loss(x: dict[str, Tensor]) -> Tensor:
    everyone = torch.ones(len(x["rows"]), dtype=torch.bool)
    return edge_loss(**x, row_mask=everyone, column_mask=everyone)


def _by_reference(x: dict[str, Tensor]) -> Tensor:
    mass = dense_mass(x["links"], x["weights"], x["products"])
    return reference(x["rows"], x["columns"], mass, x["scale"])


def test_masked_rows_and_columns_take_no_part() -> None:
    x = example(10)
    row_mask = torch.arange(10) % 3 != 0
    column_mask = torch.arange(10) != 4
    ours = edge_loss(**x, row_mask=row_mask, column_mask=column_mask)
    mass = dense_mass(x["links"], x["weights"], x["products"])[row_mask][:, column_mask]
    theirs = reference(x["rows"][row_mask], x["columns"][column_mask], mass, x["scale"])
    assert torch.allclose(ours.double(), theirs, rtol=1e-5)


def test_a_batch_with_nothing_to_compare_costs_nothing() -> None:
    x = example(4)
    nobody = torch.zeros(4, dtype=torch.bool)
    assert edge_loss(**x, row_mask=nobody, column_mask=nobody) == 0


def test_objectives_are_weighted_and_inactive_ones_left_out() -> None:
    x = example(8)
    items = ItemBatch(
        images=torch.zeros(8, 1, 3, 2, 2, dtype=torch.uint8),
        image_mask=torch.ones(8, 1, dtype=torch.bool),
        tokens=torch.zeros(8, 3, dtype=torch.long),
        text_mask=torch.ones(8, dtype=torch.bool),
    )
    batch = PairBatch(
        content=items,
        product=items,
        product_number=x["products"],
        links=x["links"],
        weights=x["weights"].float(),
        samples=torch.arange(8),
    )
    everyone = torch.ones(8, dtype=torch.bool)
    views = {
        "content": (x["rows"], everyone),
        "video": (x["rows"], everyone),
        "content_title": (x["columns"], everyone),
        "product": (x["columns"], everyone),
    }
    losses = contrastive_loss(views, batch, x["scale"], Objectives(video_title=0.5))
    assert set(losses) == {"content_product", "video_title", "loss"}
    expected = losses["content_product"] + 0.5 * losses["video_title"]
    assert torch.allclose(losses["loss"], expected)
    # Within one side, columns that show the row's own product are its positives.
    own = (x["products"][:, None] == x["products"]).double()
    theirs = reference(x["rows"], x["columns"], own, x["scale"])
    assert torch.allclose(losses["video_title"].double(), theirs, rtol=1e-5)


# --- two ranks ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _one_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    x = example(12)
    own = slice(rank * 12 // world, (rank + 1) * 12 // world)
    part = {name: value if name == "scale" else value[own].clone() for name, value in x.items()}
    leaves = [part["rows"], part["columns"], part["scale"]]
    for leaf in leaves:
        leaf.requires_grad_()
    # Titles missing here and there, and on the last rank everywhere.
    column_mask = torch.arange(12)[own] % 4 != 1
    column_mask &= rank < world - 1
    everyone = torch.ones(len(part["rows"]), dtype=torch.bool)
    loss = edge_loss(**part, row_mask=everyone, column_mask=column_mask)
    loss.backward()
    gradients = [leaf.grad for leaf in leaves]
    torch.save({"loss": loss.detach(), "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_one_process(world: int, tmp_path: Path) -> None:
    mp.spawn(_one_rank, (world, free_port(), str(tmp_path)), nprocs=world)  # pyright: ignore
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    x = {k: v.clone() for k, v in example(12).items()}
    leaves = [x["rows"].requires_grad_(), x["columns"].requires_grad_()]
    scale = x["scale"].requires_grad_()
    column_mask = torch.arange(12) % 4 != 1
    column_mask &= torch.arange(12) < 12 - 12 // world
    mass = dense_mass(x["links"], x["weights"], x["products"])[:, column_mask]
    loss = reference(x["rows"], x["columns"][column_mask], mass, scale)
    loss.backward()
    # The mean over ranks is the loss of the global batch, and DDP takes the mean of gradients.
    mean: Callable[[list[Tensor]], Tensor] = lambda values: torch.stack(values).mean()  # noqa: E731
    assert torch.allclose(mean([part["loss"] for part in parts]).double(), loss, rtol=1e-5)
    for number, leaf in enumerate(leaves):
        assert leaf.grad is not None
        gathered = torch.cat([part["gradients"][number] for part in parts]) / world
        assert torch.allclose(gathered, leaf.grad, rtol=1e-5, atol=1e-6)
    scales = mean([part["gradients"][2] for part in parts])
    assert scale.grad is not None
    assert torch.allclose(scales, scale.grad, rtol=1e-5)
