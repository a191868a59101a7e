"""ANIL on FC100, as learn2learn's script of this name: the head adapts."""
# ruff: noqa: I001, F401  (the diff finds its place by the script's imports)

import random

import torch
from torch import nn

import learn2learn as l2l

from episodes import fast_adapt, outer_steps, seeded, tasksets


def main(ways, shots, meta_bsz, iters, cuda, meta_lr=0.001, fast_lr=0.1, adapt_steps=5):
    device = seeded()
    sets = tasksets("fc100", ways, shots, num_tasks=20, root="~/data")[:2]

    model = l2l.vision.models.CNN4(output_size=ways, hidden_size=64, embedding_size=64 * 4)
    features = model.features
    head = model.classifier
    features.to(device)
    head = l2l.algorithms.MAML(head, lr=fast_lr)
    head.to(device)

    all_parameters = list(features.parameters()) + list(head.parameters())
    optimizer = torch.optim.Adam(all_parameters, lr=meta_lr)
    loss = nn.CrossEntropyLoss(reduction="mean")

    def evaluate(batch):
        return fast_adapt(batch, head.clone(), loss, adapt_steps, shots, ways, features)

    errors = outer_steps(iters, meta_bsz, sets, evaluate, all_parameters, optimizer)
    return errors, {"features": features, "head": head}
