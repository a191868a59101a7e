"""ANIL on FC100, as learn2learn's script of this name: tasks drawn by hand, the head adapts."""
# ruff: noqa: I001

import random

import numpy as np
import torch
from torch import nn
import torchvision as tv

import learn2learn as l2l
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels

from episodes import accuracy, halves


def fast_adapt(batch, learner, features, loss, adaptation_steps, shots, ways, device=None):
    data, labels = batch
    data = features(data.to(device))
    x, y, x_query, y_query = halves(data, labels.to(device), shots, ways)
    for _step in range(adaptation_steps):
        train_error = loss(learner(x), y)
        learner.adapt(train_error)
    predictions = learner(x_query)
    return loss(predictions, y_query), accuracy(predictions, y_query)


def tasks_of(mode, ways, shots):
    dataset = l2l.vision.datasets.FC100(
        root="~/data", transform=tv.transforms.ToTensor(), mode=mode
    )
    dataset = l2l.data.MetaDataset(dataset)
    transforms = [
        FusedNWaysKShots(dataset, n=ways, k=2 * shots),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
    ]
    return l2l.data.Taskset(dataset, task_transforms=transforms, num_tasks=20)


def main(
        ways=5,
        shots=5,
        meta_lr=0.001,
        fast_lr=0.1,
        adapt_steps=5,
        meta_bsz=32,
        iters=1000,
        cuda=1,
        seed=42,
):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    device = torch.device("cuda" if cuda and torch.cuda.device_count() else "cpu")
    train_tasks, valid_tasks = (tasks_of(mode, ways, shots) for mode in ("train", "validation"))

    model = l2l.vision.models.CNN4(output_size=ways, hidden_size=64, embedding_size=64 * 4)
    features = model.features
    head = model.classifier
    features.to(device)
    head = l2l.algorithms.MAML(head, lr=fast_lr)
    head.to(device)

    all_parameters = list(features.parameters()) + list(head.parameters())
    optimizer = torch.optim.Adam(all_parameters, lr=meta_lr)
    loss = nn.CrossEntropyLoss(reduction="mean")

    errors = []
    for _iteration in range(iters):
        optimizer.zero_grad()
        for _task in range(meta_bsz):
            settings = features, loss, adapt_steps, shots, ways, device
            error, _ = fast_adapt(train_tasks.sample(), head.clone(), *settings)
            error.backward()
            errors.append(error.item())
            fast_adapt(valid_tasks.sample(), head.clone(), *settings)
        for p in all_parameters:
            p.grad.data.mul_(1.0 / meta_bsz)
        optimizer.step()
    return errors, {"features": features, "head": head}
