"""Supervised pre-training, then adaptation, as learn2learn's script of this name."""
# ruff: noqa: I001, F401  (the diff finds its place by the script's imports)

import random
import numpy as np

import learn2learn as l2l
import torch

from episodes import seeded, tasksets


def fast_adapt(task, features, classifier, shots, ways, device):
    data, labels = task
    data = features(data)
    data = (data - data.mean(dim=0, keepdim=True))

    (support_data, support_labels), (query_data, query_labels) = l2l.data.partition_task(
        data=data,
        labels=labels.long(),
        shots=shots,
    )
    classifier.fit_(support_data, support_labels)
    preds = classifier(query_data)
    acc = l2l.utils.accuracy(preds, query_labels)
    loss = torch.nn.functional.cross_entropy(preds, query_labels)
    return acc, loss


def pretrain(args):
    options = args.options
    sizes = options.shots, options.ways, seeded(options.seed)
    train_tasks, valid_tasks, _ = tasksets(options.dataset, options.ways, options.shots)
    train_dataset = train_tasks.dataset
    num_classes = int(max(train_dataset.labels)) + 1
    train_loader = torch.utils.data.DataLoader(
        train_dataset, batch_size=options.batch_size, shuffle=True
    )
    train_loader = l2l.data.InfiniteIterator(train_loader)
    model = l2l.vision.models.CNN4(output_size=num_classes, hidden_size=64, embedding_size=256)
    protonet = l2l.nn.PrototypicalClassifier(distance="cosine")
    opt = torch.optim.SGD(params=model.parameters(), lr=options.lr, momentum=0.9, nesterov=True)
    criterion = torch.nn.CrossEntropyLoss()

    errors, accuracies = [], []
    for iteration in range(options.iterations):
        model.train()
        X, y = next(train_loader)
        loss = criterion(model(X), y.long())
        opt.zero_grad()
        loss.backward()
        opt.step()
        errors.append(loss.item())
        if iteration % options.eval_freq == 0:
            model.eval()
            with torch.no_grad():
                for tasks in (train_tasks, valid_tasks):
                    acc, valid_loss = fast_adapt(tasks.sample(), model.features, protonet, *sizes)
                    accuracies.append(float(acc))
                    errors.append(float(valid_loss))
    return errors, {"model": model, "accuracies": accuracies}
