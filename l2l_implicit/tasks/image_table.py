"""Labelled images in memory, whole or one by one: what every image data set here is made of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class LabelledData(Dataset):
    """What `learn2learn.data.MetaDataset` needs to know about labels.

    Args:
        labels: n class indices, 0 to len(classes) - 1.
        classes: name of each class; a class may have no sample at all.

    Attributes:
        labels: int64 [n]; `labels_to_indices`: dict from label to the list of its indices, as
        `learn2learn.data.MetaDataset` takes it; `classes`: names by label; `notes`: what is worth
        recording with a run, fit for JSON.
    """

    def __init__(self, labels: Sequence[int], classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.notes: dict[str, Any] = {}
        self._labels = [int(label) for label in labels]  # plain integers: items need no .item()
        self.labels = torch.tensor(self._labels)
        self.labels_to_indices: dict[int, list[int]] = {}
        for index, label in enumerate(self._labels):
            self.labels_to_indices.setdefault(label, []).append(index)

    def __len__(self) -> int:
        return len(self._labels)


class ImageTable(LabelledData):
    """Labelled images as one uint8 tensor; an item is (float32 [c, h, w], int).

    Without a device the images stay uint8 (a quarter of the memory) and each item is converted
    when it is read. With a device, be it "cpu", the whole table is converted and moved there once
    and an item is a view: half the time a task, and on a GPU no hundred tiny conversions.

    Args:
        images: uint8 [n, c, h, w].
        labels, classes: see `LabelledData`.
        mean, std: by channel, of images in [0, 1]; None leaves images in [0, 1].
        device: where items live, None for the CPU.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int],
        classes: Sequence[str],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(labels, classes)
        self.images = images
        self._mean = None if mean is None else 255 * torch.tensor(mean).view(-1, 1, 1)
        self._std = None if std is None else 255 * torch.tensor(std).view(-1, 1, 1)
        self._table = None if device is None else self._as_float(images).to(device)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._table is not None:
            return self._table[index], self._labels[index]
        return self._as_float(self.images[index]), self._labels[index]

    def _as_float(self, images: Tensor) -> Tensor:
        if self._mean is None or self._std is None:
            return torch.div(images, 255)
        return (images - self._mean) / self._std


class LazyImages(LabelledData):
    """Labelled images that are decoded when a task first asks; an item is (float32 [c, h, w], int).

    Args:
        read: image of an index, uint8 [c, h, w].
        labels, classes: see `LabelledData`.
        keep: hold what was decoded in memory, as uint8.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        labels: Sequence[int],
        classes: Sequence[str],
        keep: bool = True,
    ) -> None:
        super().__init__(labels, classes)
        self._read, self._keep = read, keep
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.div(self._image(index), 255), self._labels[index]

    def on_device(self, device: torch.device | str | None) -> LabelledData:
        """The table with all images decoded and on the device; None leaves this as it is."""
        if device is None:
            return self
        images = torch.stack([self._read(index) for index in range(len(self))])
        table = ImageTable(images, self._labels, self.classes, device=device)
        table.notes = self.notes
        return table

    def _image(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        image = self._read(index)
        if self._keep:
            self._kept[index] = image
        return image
