"""A few sessions written by hand."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from mmrec.generative.sessions import Sessions, write_sessions


def write_small(
    folder: Path,
    lists: Sequence[Sequence[str]],
    *,
    products: str = "abcdefgh",
    times: Sequence[Sequence[int]] | None = None,
) -> Sessions:
    """Sessions of products that are called by one letter each."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "user_id": [f"u{row}" for row in range(len(lists))],
        "item_ids": list(map(list, lists)),
    }
    if times is not None:
        columns["times"] = list(map(list, times))
    titles = [f"the {name} thing" for name in products]
    return write_sessions(
        folder,
        products=pa.table({"product_id": list(products), "title": titles}),
        sessions=pa.table(columns),
        config={},
        counts={},
    )
