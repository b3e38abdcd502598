"""Dropout of whole channels, drawn from each picture's key, so that it does not depend on the batch or the process.

Source: Tompson et al. 2015, Efficient Object Localization Using Convolutional Networks, section 3.2 (SpatialDropout).
"""

import torch
from torch import Tensor

from gesso.random_key import uniform


def drop_channels(values: Tensor, key: Tensor, rate: float, number: int) -> Tensor:
    """Sets each channel of each picture to zero with a probability, and scales the others up: dtype and shape stay.

    Args:
        values: (B, channels, ...).
        key: (B,) int64, ``ImageBatch.key``.
        rate: the probability, from 0 to below 1.
        number: of the stream of chance (``random_key.stream``).
    """
    if not rate:
        return values
    channels = torch.arange(values.shape[1], device=values.device)
    kept: Tensor = uniform(key[:, None], number, channels) >= rate
    factors = kept.to(values.dtype) / (1 - rate)
    return values * factors.view(*kept.shape, *(1 for _ in values.shape[2:]))
