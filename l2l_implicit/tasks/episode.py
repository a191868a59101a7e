"""An episode of learn2learn, split into support and query."""

import torch
from torch import Tensor

Labelled = tuple[Tensor, Tensor]  # inputs [n, ...], labels [n]


def split_support_query(data: Tensor, labels: Tensor, shots: int) -> tuple[Labelled, Labelled]:
    """The first `shots` samples of every class are the support set, the others the query set.

    Unlike a split by even and odd positions it does not depend on the order in which classes come,
    and classes may have unequal numbers of query samples.

    Args:
        data: inputs [ways * (shots + queries), ...] in any order.
        labels: class of each input, [ways * (shots + queries)], integers.
        shots: support samples a class.

    Returns:
        `(support_data, support_labels), (query_data, query_labels)`, both sorted by class and,
        within a class, in the order of the episode.

    Raises:
        ValueError: labels do not match the data, or a class has not more than `shots` samples.

    Example:
        >>> x, y = torch.arange(6.0), torch.tensor([1, 0, 1, 0, 1, 0])
        >>> split_support_query(x, y, shots=1)[0]
        (tensor([1., 0.]), tensor([0, 1]))
    """
    if labels.dim() != 1 or len(labels) != len(data):
        raise ValueError(
            f"expected one label for each of {len(data)} inputs, got labels of shape "
            f"{tuple(labels.shape)}: pass data and labels of the same episode"
        )
    if shots < 1:
        raise ValueError(f"expected shots of at least 1, got {shots}: pass a positive number")
    ordered, order = torch.sort(labels, stable=True)
    classes, counts = torch.unique_consecutive(ordered, return_counts=True)
    _check_counts(classes, counts, shots)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    is_support = torch.arange(len(labels), device=labels.device) - first < shots
    support, query = order[is_support], order[~is_support]
    return (
        (data[support.to(data.device)], labels[support]),
        (data[query.to(data.device)], labels[query]),
    )


def _check_counts(classes: Tensor, counts: Tensor, shots: int) -> None:
    if bool((counts <= shots).any()):
        worst = int(counts.argmin())
        raise ValueError(
            f"expected more than shots={shots} samples of every class (the rest are queries), got "
            f"{int(counts[worst])} of class {int(classes[worst])}: sample more images a class "
            "(train_samples, test_samples) or lower shots"
        )
