"""Batches, options and a dense float64 reference for the tests of the loss.

The reference builds the whole matrix of logits, and tables of positive mass and of ignored pairs, by loops
over rows and columns; it shares no code with the package.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from mmrec.model.losses import ExtraColumns, LossConfig, edge_loss

LEAVES = ("rows", "columns", "scale", "bias", "extra")
SHARED = ("scale", "bias", "log_q")


@dataclass(frozen=True)
class Case:
    """One combination of options."""

    kind: Any
    positives: Any
    logq: float
    extra: str
    between_products: bool = False

    def config(self, chunk_rows: int = 3) -> LossConfig:
        return LossConfig(
            kind=self.kind, positives=self.positives, logq=self.logq, chunk_rows=chunk_rows
        )


CASES = [
    Case(*options)
    for options in product(
        ("softmax", "sigmoid"), ("shared", "masked", "diagonal"), (0.0, 0.7), ("none", "all", "own")
    )
]
# Rows that are products too: both directions are corrected.
CASES += [Case("softmax", "shared", 0.7, "none", between_products=True)]


def example(count: int = 12, width: int = 5, num_extra: int = 8) -> dict[str, Tensor]:
    """Rows with one or two links, products that repeat, links to products outside of the batch, and masks."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randint(0, 4, (count,), generator=generator)
    second = torch.randint(0, 6, (count,), generator=generator)
    second[second == products] = -1
    weights = torch.rand(count, 2, generator=generator, dtype=torch.float64) + 0.1
    weights[:, 1] *= second >= 0
    draw = torch.randn(3, max(count, num_extra), width, generator=generator, dtype=torch.float64)
    row_mask = torch.arange(count) % 5 != 3
    column_mask = torch.arange(count) % 4 != 1
    return {
        "rows": normalize(draw[0, :count], dim=-1),
        "columns": normalize(draw[1, :count], dim=-1),
        "row_mask": row_mask,
        "column_mask": column_mask,
        "links": torch.stack([products, second], 1),
        "weights": weights,
        "products": products,
        "scale": torch.tensor(7.0, dtype=torch.float64),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
        "log_q": torch.randn(8, generator=generator, dtype=torch.float64),
        "extra": normalize(draw[2, :num_extra], dim=-1),
        "extra_mask": torch.arange(num_extra) % 4 != 2,
        # Some are products that rows link to, and one row of those that own them is masked.
        "extra_products": torch.randint(0, 8, (num_extra,), generator=generator),
        "extra_rows": torch.arange(num_extra) * count // num_extra,
    }


def ours(x: dict[str, Tensor], case: Case, chunk_rows: int = 3) -> Tensor:
    """The package's value on this rank's part."""
    column_log_q = x["log_q"][x["products"]] if case.logq else None
    extra = ExtraColumns(
        views={"product": (x["extra"], x["extra_mask"])},
        products=x["extra_products"],
        rows=x["extra_rows"] if case.extra == "own" else None,
    )
    names = [
        "rows",
        "columns",
        "row_mask",
        "column_mask",
        "links",
        "weights",
        "products",
        "scale",
        "bias",
    ]
    return edge_loss(
        **{name: x[name] for name in names},
        config=case.config(chunk_rows),
        row_log_q=column_log_q if case.between_products else None,
        column_log_q=column_log_q,
        extra=None if case.extra == "none" else extra,
    )


def pair_tables(x: dict[str, Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """Each pair's positive mass, and whether it is ignored; extra columns come after the others."""
    links, products, extra = x["links"], x["products"], x["extra_products"]
    mass = torch.zeros(len(links), len(products) + len(extra), dtype=torch.float64)
    ignored = torch.zeros_like(mass, dtype=torch.bool)
    for i in range(len(links)):
        for j in range(len(products)):
            linked = [m for m in range(links.shape[1]) if links[i, m] == products[j]]
            if case.positives == "shared":
                mass[i, j] = sum(x["weights"][i, m] for m in linked)
            elif case.positives == "masked":
                mass[i, j] = products[i] == products[j]
                ignored[i, j] = bool(linked) and products[i] != products[j]
            else:
                mass[i, j] = i == j
        for h in range(len(extra)):
            ignored[i, len(products) + h] = (
                case.extra == "none"
                or bool((links[i] == extra[h]).any())
                or (case.extra == "own" and x["extra_rows"][h] != i)
            )
    return mass, ignored


def reference(x: dict[str, Tensor], case: Case) -> Tensor:
    """The loss of a whole batch, densely."""
    mass, ignored = pair_tables(x, case)
    keep = torch.cat([x["column_mask"], x["extra_mask"]])
    mass, ignored = mass[x["row_mask"]][:, keep], ignored[x["row_mask"]][:, keep]
    rows = x["rows"][x["row_mask"]]
    logits = x["scale"] * rows @ torch.cat([x["columns"], x["extra"]])[keep].T
    q = case.logq * torch.cat([x["log_q"][x["products"]], torch.zeros_like(x["extra"][:, 0])])[keep]
    row_q = case.logq * x["log_q"][x["products"]][x["row_mask"]] * case.between_products
    if case.kind == "softmax":
        return (one_direction(logits - q, mass, ignored) / 2) + (
            one_direction((logits - row_q[:, None]).T, mass.T, ignored.T) / 2
        )
    z = logits - q + x["bias"]
    share = (shares(mass) + shares(mass.T).T) / 2
    found = -(share * logsigmoid(z)).sum()
    return (found - logsigmoid(-z)[(mass == 0) & ~ignored].sum()) / len(rows)


def shares(mass: Tensor) -> Tensor:
    total = mass.sum(1, keepdim=True)
    return torch.where(total > 0, mass / total, 0.0)


def one_direction(logits: Tensor, mass: Tensor, ignored: Tensor) -> Tensor:
    terms = []
    for i in range(len(logits)):
        if mass[i].sum() > 0:
            keep = ~ignored[i]
            log_p = torch.log_softmax(logits[i][keep], 0)
            terms.append(-(mass[i][keep] / mass[i].sum() * log_p).sum())
    return torch.stack(terms).mean()


def leaves_of(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies to differentiate by, put into `x` itself."""
    for name in LEAVES:
        x[name] = x[name].clone().requires_grad_()
    return {name: x[name] for name in LEAVES}


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [
        torch.zeros_like(leaf) if part is None else part
        for part, leaf in zip(found, leaves.values(), strict=True)
    ]
