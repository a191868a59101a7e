"""MAML, as learn2learn's maml_omniglot.py and maml_miniimagenet.py: the whole network adapts."""
# ruff: noqa: I001

import random
import numpy as np

import learn2learn as l2l
import torch
from torch import nn, optim

from episodes import accuracy, halves

NETWORKS = {
    "omniglot": lambda ways: l2l.vision.models.OmniglotFC(28**2, ways),
    "mini-imagenet": lambda ways: l2l.vision.models.MiniImagenetCNN(ways),
}


def fast_adapt(batch, learner, loss, adaptation_steps, shots, ways, device):
    data, labels = (part.to(device) for part in batch)
    x, y, x_query, y_query = halves(data, labels, shots, ways)
    for _step in range(adaptation_steps):
        learner.adapt(loss(learner(x), y))
    predictions = learner(x_query)
    return loss(predictions, y_query), accuracy(predictions, y_query)


def main(
        dataset,
        ways=5,
        shots=1,
        meta_lr=0.003,
        fast_lr=0.5,
        meta_batch_size=32,
        adaptation_steps=1,
        num_iterations=60000,
        cuda=True,
        seed=42,
):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    device = torch.device("cuda" if cuda else "cpu")
    tasksets = l2l.vision.benchmarks.get_tasksets(
        dataset,
        train_ways=ways,
        train_samples=2 * shots,
        test_ways=ways,
        test_samples=2 * shots,
        num_tasks=20000,
        root="~/data",
    )

    model = NETWORKS[dataset](ways)
    model.to(device)
    maml = l2l.algorithms.MAML(model, lr=fast_lr, first_order=False)
    opt = optim.Adam(maml.parameters(), meta_lr)
    loss = nn.CrossEntropyLoss(reduction="mean")

    errors = []
    for _iteration in range(num_iterations):
        opt.zero_grad()
        for _task in range(meta_batch_size):
            settings = loss, adaptation_steps, shots, ways, device
            error, _ = fast_adapt(tasksets.train.sample(), maml.clone(), *settings)
            error.backward()
            errors.append(error.item())
            fast_adapt(tasksets.validation.sample(), maml.clone(), *settings)
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / meta_batch_size)
        opt.step()
    return errors, {"maml": maml}
