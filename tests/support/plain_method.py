"""The product's default, written a second time: plain loops over the equations in float64.

Nothing of the package is used and nothing is clever, so that it can be read
against docs/concepts/method.md line by line. Only the assignment itself is scipy's.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True, kw_only=True)
class Plain:
    saliency: list[float]
    groups: list[list[int]]
    orders: dict[int, list[int]]
    experts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]


def compress_layer(xs, experts, router, *, top_k, keep, group_size):
    """Take token vectors, (gate, up, down) of each expert and the router; all float64."""
    num_experts, num_tokens = len(experts), len(xs)
    inner = len(experts[0][0])
    routed_sum, routed_count = [0.0] * num_experts, [0] * num_experts
    mean_output = [np.zeros(len(xs[0])) for _ in experts]
    logit_column = [np.zeros(num_tokens) for _ in experts]
    activation = [np.zeros((num_tokens, inner)) for _ in experts]
    for t, x in enumerate(xs):
        logit = router @ x
        p = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum()
        chosen = sorted(range(num_experts), key=lambda j: -p[j])[:top_k]
        for j, (gate, up, down) in enumerate(experts):
            logit_column[j][t] = logit[j]
            activation[j][t] = gate @ x / (1 + np.exp(-(gate @ x))) * (up @ x)
            output = down @ activation[j][t]
            mean_output[j] += p[j] * output / num_tokens
            if j in chosen:
                routed_sum[j] += p[j] / sum(p[i] for i in chosen) * np.linalg.norm(output)
                routed_count[j] += 1
    saliency = [
        total / count if count else 0.0
        for total, count in zip(routed_sum, routed_count, strict=True)
    ]
    far = distances(mean_output, logit_column)
    groups = group(saliency, far, keep, group_size)

    orders, merged = {}, {}
    positive = [s for s in saliency if s > 0]
    weight = [s if s > 0 else min(0.5, *positive) for s in saliency]
    for members in groups:
        centroid = members[0]
        total = sum(weight[j] for j in members)
        parts = [matrix * weight[centroid] / total for matrix in experts[centroid]]
        for j in members[1:]:
            order = neuron_order(experts, activation, centroid, j)
            gate, up, down = experts[j]
            parts[0] = parts[0] + weight[j] / total * gate[order]
            parts[1] = parts[1] + weight[j] / total * up[order]
            parts[2] = parts[2] + weight[j] / total * down[:, order]
            orders[j] = order
        merged[centroid] = tuple(parts)
    return Plain(saliency=saliency, groups=groups, orders=orders, experts=merged)


def distances(mean_output, logit_column):
    """1 - the mean of both similarities."""
    count = range(len(mean_output))
    unit = [column / np.linalg.norm(column) for column in logit_column]
    apart = [[math.dist(unit[i], unit[j]) for j in count] for i in count]
    largest = max(max(row) for row in apart)

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    def similarity(i, j):
        experts = (cosine(mean_output[i], mean_output[j]) + 1) / 2
        return (experts + 1 - apart[i][j] / largest) / 2

    return [[1 - similarity(i, j) for j in count] for i in count]


def group(saliency, far, keep, group_size):
    ranked = sorted(range(len(saliency)), key=lambda j: (-saliency[j], j))
    free = set(ranked[keep:])
    groups = []
    for centroid in ranked[:keep]:
        members = [centroid]
        while free and len(members) < group_size:
            nearest = min(free, key=lambda j: (far[centroid][j], j))
            free.remove(nearest)
            members.append(nearest)
        groups.append(members)
    return sorted(groups)


def neuron_order(experts, activation, centroid, member):
    def describe(j):
        gate, up, down = experts[j]
        inner = range(len(gate))
        acts = [activation[j][:, q] for q in inner]
        rows = [np.concatenate([gate[q], up[q], down[:, q]]) for q in inner]
        return [
            (a / np.linalg.norm(a), w / np.linalg.norm(w))
            for a, w in zip(acts, rows, strict=True)
        ]

    cost = [
        [math.dist(a, b) + math.dist(v, w) for b, w in describe(member)]
        for a, v in describe(centroid)
    ]
    return linear_sum_assignment(np.array(cost))[1].tolist()


def renumber(table, rows, groups):
    """Rename the experts of a table by token id; docs/concepts/method.md has the order."""
    centroids = [group[0] for group in groups]

    def tried(expert):
        own = [number for number, group in enumerate(groups) if expert in group]
        near = sorted(
            range(len(groups)),
            key=lambda n: (np.linalg.norm(rows[expert] - rows[centroids[n]]), n),
        )
        return own + [number for number in near if number not in own]

    renumbered = []
    for experts in table:
        new = [centroids.index(e) if e in centroids else None for e in experts]
        for rank in range(len(experts)):
            for place, expert in enumerate(experts):
                if new[place] is None and tried(expert)[rank] not in new:
                    new[place] = tried(expert)[rank]
        renumbered.append(new)
    return renumbered
