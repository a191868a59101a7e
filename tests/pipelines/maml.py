"""MAML, as learn2learn's maml_omniglot.py and maml_miniimagenet.py: the whole network adapts."""
# ruff: noqa: I001, F401  (the diff finds its place by the script's imports)

import random
import numpy as np

import learn2learn as l2l
from torch import nn, optim

from episodes import fast_adapt, outer_steps, seeded, tasksets

NETWORKS = {
    "omniglot": lambda ways: l2l.vision.models.OmniglotFC(28**2, ways),
    "mini-imagenet": lambda ways: l2l.vision.models.MiniImagenetCNN(ways),
}


def main(
        dataset,
        ways,
        shots,
        meta_lr=0.003,
        fast_lr=0.5,
        meta_batch_size=32,
        adaptation_steps=1,
        num_iterations=60000,
        cuda=True,
):
    device = seeded()
    sets = tasksets(dataset, ways, shots, num_tasks=20000, root="~/data")[:2]

    model = NETWORKS[dataset](ways)
    model.to(device)
    maml = l2l.algorithms.MAML(model, lr=fast_lr, first_order=False)
    opt = optim.Adam(maml.parameters(), meta_lr)
    loss = nn.CrossEntropyLoss(reduction="mean")

    def evaluate(batch):
        return fast_adapt(batch, maml.clone(), loss, adaptation_steps, shots, ways)

    parameters = list(maml.parameters())
    errors = outer_steps(num_iterations, meta_batch_size, sets, evaluate, parameters, opt)
    return errors, {"maml": maml}
