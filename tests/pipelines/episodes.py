"""What learn2learn's example scripts do with a sampled task."""

import numpy as np
import torch
from torch import Tensor


def halves(data: Tensor, labels: Tensor, shots: int, ways: int) -> tuple[Tensor, ...]:
    """Adaptation data and labels, then evaluation data and labels: every other sample."""
    indices = np.zeros(data.size(0), dtype=bool)
    indices[np.arange(shots * ways) * 2] = True
    adaptation, evaluation = torch.from_numpy(indices), torch.from_numpy(~indices)
    return data[adaptation], labels[adaptation], data[evaluation], labels[evaluation]


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    """The fraction of right predictions."""
    return (predictions.argmax(dim=1) == targets).float().mean()
