"""The exponential moving average of a student's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor

from .sharding import restore


class HalfLifeEMA(EMAModel):
    """Exponential moving average with a half-life in images: `beta = 0.5**(batch / min(halflife, rampup *
    images_seen))` (Karras et al. 2020; SiD, training loop). The first update copies the parameters."""

    def __init__(self, parameters, halflife_images: float, rampup_ratio: float):
        parameters = list(parameters)
        # sharded tensors know no copy of all at once
        super().__init__(parameters, decay=1.0, foreach=not any(isinstance(p, DTensor) for p in parameters))
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio
        self.images_seen, self.batch_size = 0, 1

    def get_decay(self, optimization_step: int) -> float:
        halflife = min(self.halflife_images, self.rampup_ratio * self.images_seen)
        return 0.5 ** (self.batch_size / max(halflife, 1e-8))

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The averaged weights, for safetensors."""
        return ((str(number), tensor) for number, tensor in enumerate(self.shadow_params))

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up the averaged weights that `named` gave."""
        for name, shadow in self.named():
            restore(shadow, tensors[name])

    @contextmanager
    def applied(self, parameters: list[torch.nn.Parameter]):
        """Put the averaged weights into `parameters` for a while."""
        self.store(parameters)
        self.copy_to(parameters)
        try:
            yield
        finally:
            self.restore(parameters)
