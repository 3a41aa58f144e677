"""Slow plain versions of a recommender's losses: one position, one item at a time. Sums over positions."""

import torch


def softmax(hidden, targets, items, padding):
    total = 0.0
    for state, target in zip(hidden, targets.tolist(), strict=True):
        scores = {item: torch.dot(state, items[item]) for item in range(len(items)) if item != padding}
        total = total - torch.log(torch.exp(scores[target]) / sum(torch.exp(score) for score in scores.values()))
    return total


def sampled_softmax(hidden, targets, items, negatives, expected_counts):
    """`expected_counts`: how often each negative is expected in such a sample."""
    total = 0.0
    for state, target in zip(hidden, targets.tolist(), strict=True):
        own = torch.exp(torch.dot(state, items[target]))
        others = sum(
            torch.exp(torch.dot(state, items[item])) / count
            for item, count in zip(negatives.tolist(), expected_counts, strict=True)
            if item != target
        )
        total = total - torch.log(own / (own + others))
    return total


def gbce(hidden, targets, items, negatives, num_items, calibration):
    alpha = len(negatives) / (num_items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    total = 0.0
    for state, target in zip(hidden, targets.tolist(), strict=True):
        probability = 1 / (1 + torch.exp(-torch.dot(state, items[target])))
        loss = torch.log(probability**beta)
        for item in negatives.tolist():
            if item != target:
                loss = loss + torch.log(1 - 1 / (1 + torch.exp(-torch.dot(state, items[item]))))
        total = total - loss / (len(negatives) + 1)
    return total
