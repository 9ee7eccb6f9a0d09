"""A moving average of the weights, which is what is evaluated and exported (Polyak and Juditsky 1992)."""

from timm.utils.model_ema import ModelEmaV3

from mmrec.model.encoder import Encoder


class AveragedEncoder(ModelEmaV3):
    """An encoder whose weights are the average of another's over its last steps.

        average = d_t average + (1 - d_t) weights,    d_t = min(decay, 1 - t^(-2/3))

    The decay rises with the step, so a short run averages over its own last part and not over its
    random start. Batch normalisation's running statistics are averaged as weights are, since they belong
    to them; counters are copied. The decay is a function of the step alone: a checkpoint holds the average
    and nothing else.
    """

    module: Encoder

    def __init__(self, encoder: Encoder, decay: float) -> None:
        """Start from the encoder as it is, with a decay between 0 and 1."""
        super().__init__(encoder, decay=decay, use_warmup=True)
        self.module.requires_grad_(False)
        self.module.eval()
