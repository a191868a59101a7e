"""Images in the layout that was asked for, one-channel ones too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.training.meta_learner import laid_out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_follow_it_and_no_pixel_moves(channels: int, channels_last: bool) -> None:
    images = torch.randn(5, channels, 6, 4)
    for given in (images, images[::2], images.to(memory_format=torch.channels_last)):
        shown = laid_out(given, channels_last)
        assert torch.equal(shown, given)
        convolution = nn.Conv2d(channels, 8, 3, padding=1)
        if channels_last:
            convolution = convolution.to(memory_format=torch.channels_last)
        made = convolution(shown)
        assert made.is_contiguous(memory_format=torch.channels_last) == channels_last
        torch.testing.assert_close(made, convolution(given.contiguous()))
