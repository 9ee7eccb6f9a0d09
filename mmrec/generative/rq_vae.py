"""RQ-VAE: an autoencoder whose latents are residual codes (Zeghidour et al. 2021; TIGER, Rajput et al. 2023).

The layers of lucidrains' vector-quantize-pytorch learn the codes; what comes out is a plain `Codebook`.
Shape letters: N rows, D embedding width, Z latent width, L levels, K codes a level.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from mmrec.errors import UserError
from mmrec.generative.quantize import Codebook, Layer, check_size


def train_rq_vae(
    vectors: Float32[np.ndarray, "N D"],
    *,
    levels: int,
    size: int,
    latent: int = 32,
    steps: int = 3000,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Codebook:
    """Learn an encoder, codes and a decoder that give embeddings back, by AdamW on the squared error.

    Codes start from k-means and follow moving averages; one that is hardly used is put on a row of the
    batch. Raises `UserError` where there are fewer rows than codes, or the extra is not installed.
    """
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        raise UserError(
            "--method rq-vae needs vector-quantize-pytorch: pip install 'mmrec[generative]'"
        ) from None
    check_size(len(vectors), size)
    torch.manual_seed(seed)
    width, hidden = vectors.shape[1], max(latent, vectors.shape[1] // 2)
    encoder, decoder = _mlp(width, hidden, latent), _mlp(latent, hidden, width)
    quantizer = ResidualVQ(
        dim=latent,
        num_quantizers=levels,
        codebook_size=size,
        kmeans_init=True,
        threshold_ema_dead_code=2,
        commitment_weight=0.25,
    )
    rows = torch.from_numpy(np.ascontiguousarray(vectors, np.float32))
    # Each coordinate at unit variance: those of unit vectors are as small as a learning rate.
    scale = float(rows.std()) or 1.0
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], learning_rate)
    # K-means starts from the first batch, so that must hold enough rows for every code.
    batch_size = min(len(rows), max(batch_size, 4 * size))
    for _ in range(steps):
        batch = rows[torch.randperm(len(rows))[:batch_size]] / scale
        latents, _, commitment = quantizer(encoder(batch)[None])
        loss = nn.functional.mse_loss(decoder(latents[0]), batch) + commitment.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        codebooks: Any = quantizer.codebooks
        centroids = codebooks.detach().float().numpy().copy()
    return Codebook(
        centroids=centroids,
        encoder=_layers(encoder, first=1 / scale),
        decoder=_layers(decoder, last=scale),
    )


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _layers(mlp: nn.Sequential, *, first: float = 1.0, last: float = 1.0) -> tuple[Layer, ...]:
    """An MLP's layers, the scale of its inputs or outputs made part of them."""
    linear: list[Any] = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().numpy().copy() for layer in linear]
    biases = [layer.bias.detach().numpy().copy() for layer in linear]
    weights[0], weights[-1], biases[-1] = weights[0] * first, weights[-1] * last, biases[-1] * last
    return tuple(Layer(weight=w, bias=b) for w, b in zip(weights, biases, strict=True))
