"""ANIL with Kronecker-factored updates on CIFAR-FS, as learn2learn's script of this name."""
# ruff: noqa: I001, F401  (the diff finds its place by the script's imports)

import random
import numpy as np

import learn2learn as l2l
import torch

from episodes import halves, outer_steps, seeded, tasksets


def fast_adapt(batch, features, classifier, update, diff_sgd, loss, adaptation_steps, shots, ways):
    data, labels = batch
    adaptation_data, adaptation_labels, evaluation_data, evaluation_labels = halves(
        features(data), labels, shots, ways
    )

    # Adapt the model & learned update
    for step in range(adaptation_steps):
        adaptation_error = loss(classifier(adaptation_data), adaptation_labels)
        if step > 0:  # Update the learnable update function
            update_grad = torch.autograd.grad(adaptation_error,
                                              update.parameters(),
                                              create_graph=True,
                                              retain_graph=True)
            diff_sgd(update, update_grad)
        classifier_updates = update(adaptation_error,
                                    classifier.parameters(),
                                    create_graph=True,
                                    retain_graph=True)
        diff_sgd(classifier, classifier_updates)

    # Evaluate the adapted model
    return loss(classifier(evaluation_data), evaluation_labels)


def main(
    ways, shots, meta_batch_size, num_iterations, cuda,
    fast_lr=0.1, meta_lr=0.003, adaptation_steps=5,
):  # fmt: skip
    seeded(1234)
    sets = tasksets("cifarfs", ways, shots, root="~/data")[:2]

    model = l2l.vision.models.CNN4(output_size=ways, hidden_size=32, embedding_size=32 * 4)
    kfo_transform = l2l.optim.transforms.KroneckerTransform(l2l.nn.KroneckerLinear)
    fast_update = l2l.optim.ParameterUpdate(
        parameters=model.classifier.parameters(), transform=kfo_transform
    )
    diff_sgd = l2l.optim.DifferentiableSGD(lr=fast_lr)
    all_parameters = list(model.parameters()) + list(fast_update.parameters())
    opt = torch.optim.Adam(all_parameters, meta_lr)
    loss = torch.nn.CrossEntropyLoss(reduction="mean")

    def evaluate(batch):
        clones = (l2l.clone_module(m) for m in (model.features, model.classifier, fast_update))
        return fast_adapt(batch, *clones, diff_sgd, loss, adaptation_steps, shots, ways)

    errors = outer_steps(num_iterations, meta_batch_size, sets, evaluate, all_parameters, opt)
    return errors, {"model": model, "update": fast_update}
