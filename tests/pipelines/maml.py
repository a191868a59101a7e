"""MAML, as learn2learn's maml_omniglot.py and maml_miniimagenet.py: the whole network adapts."""
# ruff: noqa: I001

import random
import numpy as np

import learn2learn as l2l
import torch
from torch import nn, optim

from episodes import fast_adapt, outer_steps, tasksets

NETWORKS = {
    "omniglot": lambda ways: l2l.vision.models.OmniglotFC(28**2, ways),
    "mini-imagenet": lambda ways: l2l.vision.models.MiniImagenetCNN(ways),
}


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
    sets = tasksets(dataset, ways, shots, num_tasks=20000, root="~/data")[:2]

    model = NETWORKS[dataset](ways)
    model.to(device)
    maml = l2l.algorithms.MAML(model, lr=fast_lr, first_order=False)
    opt = optim.Adam(maml.parameters(), meta_lr)
    loss = nn.CrossEntropyLoss(reduction="mean")

    def evaluate(batch):
        return fast_adapt(batch, maml.clone(), loss, adaptation_steps, shots, ways, device)

    parameters = list(maml.parameters())
    errors = outer_steps(num_iterations, meta_batch_size, sets, evaluate, parameters, opt)
    return errors, {"maml": maml}
