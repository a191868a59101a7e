"""Labelled images, in memory or decoded when asked for: what every image data set here is."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Device = torch.device | str | None


class ImageTable(Dataset):
    """Labelled uint8 images; an item is (float32 [c, h, w], int).

    Without a device the images stay uint8 (a quarter of the memory) and each item is converted
    when it is read. With a device, be it "cpu", the whole table is converted and moved there once
    and an item is a view: half the time a task, and on a GPU no hundred tiny conversions.

    Args:
        images: uint8 [n, c, h, w]; or a data set whose items begin with an image, uint8 [c, h, w],
            and are read when a task first asks for them.
        labels: n class indices, 0 to len(classes) - 1.
        classes: name of each class; a class may have no sample at all.
        mean, std: by channel, of images in [0, 1]; None leaves images in [0, 1].
        device: where items live, None for the CPU.
        keep: hold what a data set has read in memory, as uint8.

    Attributes:
        labels: int64 [n]; `labels_to_indices`: dict from label to the list of its indices, as
        `learn2learn.data.MetaDataset` takes it; `classes`: names by label; `notes`: what is worth
        recording with a run, fit for JSON; `augment`: an image's random changes [c, h, w], anew
        each time it is read, None for none.
    """

    def __init__(
        self, images: Any, labels: Sequence[int], classes: Sequence[str],
        mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
        device: Device = None, keep: bool = True,
    ) -> None:  # fmt: skip
        self.images, self.classes = images, list(classes)
        self.notes: dict[str, Any] = {}
        self._labels = [int(label) for label in labels]  # plain integers: items need no .item()
        self.labels = torch.tensor(self._labels)
        self.labels_to_indices: dict[int, list[int]] = {}
        for index, label in enumerate(self._labels):
            self.labels_to_indices.setdefault(label, []).append(index)
        self._mean = None if mean is None else 255 * torch.tensor(mean).view(-1, 1, 1)
        self._std = None if std is None else 255 * torch.tensor(std).view(-1, 1, 1)
        whole = isinstance(images, Tensor)
        if whole and (images.dtype != torch.uint8 or len(images) != len(self)):
            got = f"{len(self)} labels for images of {images.dtype}, shape {tuple(images.shape)}"
            raise ValueError(f"expected uint8 images and a label for each, got {got}")
        read = images.__getitem__ if whole else lambda index: images[index][0]
        self._read = functools.cache(read) if keep and not whole else read
        self.augment: Callable[[Tensor], Tensor] | None = None
        self._table = None
        if device is not None:
            every = images if whole else torch.stack([read(index) for index in range(len(self))])
            self._table = self._as_float(every).to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._table is not None:
            image = self._table[index]
            return self._changed(image), self._labels[index]
        return self._as_float(self._changed(self._read(index))), self._labels[index]

    def _changed(self, image: Tensor) -> Tensor:
        return image if self.augment is None else self.augment(image)

    def _as_float(self, images: Tensor) -> Tensor:
        if self._mean is None or self._std is None:
            return torch.div(images, 255)
        return (images - self._mean) / self._std
