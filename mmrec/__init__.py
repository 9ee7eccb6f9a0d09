"""mmrec: train, index and query a joint embedding space of content and products.

Importing this package imports neither torch nor faiss; the names below load what they need on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrec.generative.recommender import Recommender as Recommender
    from mmrec.model.encoder import Encoder as Encoder
    from mmrec.retrieval.index import ProductIndex as ProductIndex
    from mmrec.retrieval.matcher import Matcher as Matcher
    from mmrec.retrieval.matches import Matches as Matches

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "mmrec.model.encoder",
    "Matcher": "mmrec.retrieval.matcher",
    "Matches": "mmrec.retrieval.matches",
    "ProductIndex": "mmrec.retrieval.index",
    "Recommender": "mmrec.generative.recommender",
}
__all__ = ["Encoder", "Matcher", "Matches", "ProductIndex", "Recommender", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmrec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    # So that a notebook completes names that are not loaded yet.
    return sorted({*globals(), *__all__})
