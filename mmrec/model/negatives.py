"""Hard negatives in the loss: the products that a batch brought beyond those of its rows."""

from mmrec.data.batches import PairBatch
from mmrec.model.encoder import VIEWS, Views
from mmrec.model.losses import ExtraColumns


def split_negatives(views: Views, batch: PairBatch, *, shared: bool) -> tuple[Views, ExtraColumns]:
    """Part the views of a batch into those of its rows and those of its hard negatives.

    `shared` makes a negative one for every row of every rank, where the row does not link to it;
    else it is one for the row alone that brought it.
    """
    num_rows = len(batch)
    own = {name: (vectors[:num_rows], there[:num_rows]) for name, (vectors, there) in views.items()}
    extra = {
        name: (vectors[num_rows:], there[num_rows:])
        for name, (vectors, there) in views.items()
        if name in VIEWS["product"]
    }
    rows = None if shared else batch.negative_row
    return own, ExtraColumns(views=extra, products=batch.negative_number, rows=rows)
