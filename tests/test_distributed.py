"""Collectives, and the loss over them, at 2 and 4 ranks that bring different numbers of rows."""

import os
import socket
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import CASES, LEAVES, SHARED, example, gradients, leaves_of, ours, reference
from torch import Tensor

from mmrec import distributed

# Rows and extra columns that each rank brings; one brings none.
ROWS = {2: [7, 5], 4: [5, 0, 4, 3]}
EXTRA = {2: [3, 5], 4: [4, 0, 2, 2]}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def part_of(x: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What a rank brings of a batch; its extra columns belong to rows of its own."""
    part = {}
    for name, value in x.items():
        sizes = EXTRA[world] if name.startswith("extra") else ROWS[world]
        part[name] = value if name in SHARED else value.split(sizes)[rank].clone()
    part["extra_rows"] = part["extra_rows"] - sum(ROWS[world][:rank])
    return part


def whole(world: int) -> dict[str, Tensor]:
    """A batch of which one rank has no columns at all, and another no rows."""
    x = example()
    last = ROWS[world][-1]
    x["column_mask"][-last:] = False
    x["row_mask"][: ROWS[world][0]] &= world == 2
    # Extra columns belong to rows of the rank that brings them.
    owners = []
    for rank, count in enumerate(EXTRA[world]):
        first, rows = sum(ROWS[world][:rank]), ROWS[world][rank]
        owners += [first + h % rows for h in range(count)]
    x["extra_rows"] = torch.tensor(owners)
    return x


def _one_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = []
    for case in CASES:
        part = part_of(whole(world), rank, world)
        leaves = leaves_of(part)
        loss = ours(part, case, chunk_rows=2)
        # A rank without rows still joins in the backward pass of the others.
        connected = loss + 0 * sum(leaf.sum() for leaf in leaves.values())
        results.append([loss.detach(), *gradients(connected, leaves)])
    torch.save(results, f"{folder}/loss{rank}.pt")
    torch.save(_collectives(rank), f"{folder}/collectives{rank}.pt")
    dist.destroy_process_group()


def _collectives(rank: int) -> dict[str, Tensor]:
    """Each rank gathers rank + 1 rows, and weighs what it gathered by its own number."""
    local = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    sizes = distributed.gather_sizes(local)
    rows = distributed.gather_with_gradient(local, sizes)
    (rows * torch.arange(len(rows))[:, None] * (rank + 1)).sum().backward()
    assert local.grad is not None
    low = local.detach().bfloat16().requires_grad_()
    gathered = distributed.gather_with_gradient(low, sizes)
    gathered.sum().backward()
    assert low.grad is not None
    # Only the first rank's rows come of a parameter; the others' backward must join in.
    frozen = torch.ones(1, 2, requires_grad=rank == 0)
    distributed.gather_with_gradient(frozen).sum().backward()
    values = torch.tensor([float(rank), -torch.inf, 500.0 * rank], requires_grad=True)
    joined = distributed.logsumexp_over_ranks(values)
    (joined[[0, 2]].sum() * (rank + 1)).backward()
    assert values.grad is not None
    return {
        "sizes": torch.tensor(sizes),
        "rows": rows.detach(),
        "gradient": local.grad,
        "low": low.grad,
        "frozen": torch.zeros(0) if frozen.grad is None else frozen.grad,
        "joined": joined.detach(),
        "joined_gradient": values.grad,
    }


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The world size, and a folder with what its ranks found."""
    world = request.param
    folder = tmp_path_factory.mktemp("ranks")
    # The server imports once what every rank needs, and ranks are forks of it.
    set_forkserver_preload(["mmrec.model.losses", "loss_cases"])
    mp.start_processes(  # pyright: ignore
        _one_rank, (world, free_port(), str(folder)), nprocs=world, start_method="forkserver"
    )
    return world, folder


def load(folder: Path, name: str, world: int) -> list:
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(world)]


def test_ranks_together_equal_one_process(outcome: tuple[int, Path]) -> None:
    world, folder = outcome
    parts = load(folder, "loss", world)
    for number, case in enumerate(CASES):
        x = whole(world)
        leaves = leaves_of(x)
        expected = reference(x, case)
        found = [part[number] for part in parts]
        # The mean over ranks is the loss of the global batch, and DDP takes the mean of gradients.
        mean = torch.stack([part[0] for part in found]).mean()
        torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-12, msg=str(case))
        for place, (name, theirs) in enumerate(
            zip(LEAVES, gradients(expected, leaves), strict=True)
        ):
            shares = [part[place + 1] / world for part in found]
            total = sum(shares) if name in SHARED else torch.cat(shares)
            torch.testing.assert_close(
                total, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, c=case, n=name: f"{c} {n}: {m}"
            )


def test_collectives_take_uneven_rows(outcome: tuple[int, Path]) -> None:
    world, folder = outcome
    everyone = torch.cat([torch.full((rank + 1, 2), float(rank)) for rank in range(world)])
    weights = torch.arange(len(everyone))[:, None].expand(-1, 2)
    values = torch.tensor([[float(r), -torch.inf, 500.0 * r] for r in range(world)])
    of_all = sum(range(1, world + 1))
    starts = [rank * (rank + 1) // 2 for rank in range(world)]
    for rank, found in enumerate(load(folder, "collectives", world)):
        own = slice(starts[rank], starts[rank] + rank + 1)
        assert found["sizes"].tolist() == list(range(1, world + 1))
        assert torch.equal(found["rows"], everyone)
        assert torch.equal(found["gradient"], (weights[own] * of_all).float())
        assert torch.equal(found["low"], torch.full((rank + 1, 2), float(world)).bfloat16())
        assert found["frozen"].tolist() == ([] if rank else [[world, world]])
        torch.testing.assert_close(found["joined"], values.logsumexp(0))
        share = values.softmax(0)[rank] * of_all
        share[1] = 0
        torch.testing.assert_close(found["joined_gradient"], share)


def test_one_process_needs_no_group() -> None:
    local = torch.randn(3, 2)
    assert distributed.gather_sizes(local) == [3]
    assert distributed.gather_with_gradient(local) is local
    assert distributed.gather(local) is local
    assert distributed.logsumexp_over_ranks(local[0]) is not None
