"""Every score by its definition, one image at a time in float64, from pixels on.

Written from the papers' equations, not from the code that is tested: gradients are autograd's, singular
vectors those of a decomposition, banks are searched by comparing with every row. What is drawn at random in a
run is either all rows, or follows the rule that the documentation states.
"""

from __future__ import annotations

import hashlib
import zlib
from functools import cache

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from torch.nn import functional


def logsumexp(values):
    return values.max() + np.log(np.exp(values - values.max()).sum())


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def unit(vector):
    return vector / np.linalg.norm(vector)


def energy_of(logits):
    return -logsumexp(logits)


def doubt(logits):
    """Log(1 - max p), of the other classes' share."""
    return logsumexp(np.delete(logits, logits.argmax())) - logsumexp(logits)


# Scores of logits


def msp(world, temperature=1):
    return [doubt(z / temperature) for z in world.query.z]


def maxlogit(world):
    return [-max(z) for z in world.query.z]


def energy(world, temperature=1):
    return [temperature * energy_of(z / temperature) for z in world.query.z]


def entropy(world):
    return [np.log(-sum(p * np.log(p) for p in softmax(z))) for z in world.query.z]


def gen(world, gamma, m):
    return [np.log(sum((p * (1 - p)) ** gamma for p in sorted(softmax(z))[-m:])) for z in world.query.z]


def tempscale(world):
    held = world.held

    def likelihood(temperature):
        return sum(
            logsumexp(z / temperature) - z[y] / temperature for z, y in zip(held.z, held.label, strict=True)
        )

    found = minimize_scalar(likelihood, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-10})
    return msp(world, found.x)


def klmatching(world):
    held = np.array([softmax(z) for z in world.held.z])
    predicted = held.argmax(axis=1)
    means = [held[predicted == k].mean(axis=0) for k in np.unique(predicted)]
    missing = np.setdiff1d(np.arange(held.shape[1]), predicted)
    tiny = np.finfo(float).tiny
    scores = []
    for z in world.query.z:
        p = softmax(z)
        divergences = [sum(p * np.log(p / np.maximum(q, tiny))) for q in means]
        negentropy = sum(p * np.log(p))
        one_hot = [negentropy - np.delete(p, k).sum() * np.log(tiny) for k in missing]
        scores.append(min(divergences + one_hot))
    return scores


def openmax(world, tail, alpha):
    train = world.train
    correct = train.label == train.prediction
    models = {}
    for c in np.unique(train.label[correct]):
        own = train.z[correct & (train.label == c)]
        distances = sorted(np.linalg.norm(z - own.mean(axis=0)) for z in own)
        count = tail if tail else min(20, max(2, len(own) // 20))
        models[c] = own.mean(axis=0), *weibull(np.array(distances[-count:]))
    scores = []
    for z in world.query.z:
        corrected, unknown = z.copy(), 0.0
        for i, c in enumerate(np.argsort(-z)[:alpha]):
            if c in models:
                mean, shift, shape, scale = models[c]
                excess = max(np.linalg.norm(z - mean) - shift, 0)
                extreme = 1 - np.exp(-(min(excess / scale, 100) ** shape))  # beyond that it is 1
                weight = 1 - (alpha - i) / alpha * extreme
                corrected[c] = weight * z[c]
                unknown += (1 - weight) * z[c]
        scores.append(unknown - logsumexp(corrected))
    return scores


def weibull(tail):
    """Shift, and maximum-likelihood shape and scale, of distances that begin at 1 after the shift."""
    shift = min(tail) - 1
    x = tail - shift

    def slope(shape):
        powers = (x / max(x)) ** shape
        return sum(powers * np.log(x)) / sum(powers) - 1 / shape - np.log(x).mean()

    shape = brentq(slope, 1e-2, 1e3, xtol=1e-13)
    return shift, shape, max(x) * np.mean((x / max(x)) ** shape) ** (1 / shape)


# Gradients


def gradnorm(world):
    return [-abs(last_layer_gradient(world, h)).sum() for h in world.query.h]


def gradorth(world, share):
    _, sizes, directions = np.linalg.svd(world.train.h, full_matrices=False)
    held = np.cumsum(sizes**2) / sum(sizes**2)
    basis = directions[: 1 + np.searchsorted(held, share)]
    return [-np.linalg.norm(last_layer_gradient(world, h) @ basis.T) for h in world.query.h]


def last_layer_gradient(world, h):
    """∂KL(u ‖ p)/∂W."""
    weight = torch.tensor(world.weight, requires_grad=True)
    logits = weight @ torch.tensor(h) + torch.tensor(world.bias)
    uniform = torch.full_like(logits, 1 / len(logits))
    loss = functional.kl_div(logits.log_softmax(0), uniform, reduction="sum")
    return torch.autograd.grad(loss, weight)[0].numpy()


def gradnorm_layers(world, layers):
    """One backward pass for each image through the whole network."""
    modules = [
        module
        for name, module in world.module.named_modules()
        if name.partition(".")[0] in layers and isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    scores = []
    for image in world.query.images:
        logits = world.module(image[None])
        loss = -logits.log_softmax(1).mean()
        gradients = torch.autograd.grad(loss, [module.weight for module in modules])
        scores.append(-sum(float(each.abs().sum()) for each in gradients))
    return scores


def grood(world, mixup_layer, mixup_weight, samples, class_samples):
    prototypes = class_means(world.train.h, world.train.label)
    ood = mixed_prototype(world, mixup_layer, mixup_weight)
    correct = world.train.h[world.train.label == world.train.prediction]
    bank = np.array([prototype_gradient(h, prototypes, ood) for h in correct])
    found = [prototype_gradient(h, prototypes, ood) for h in world.query.h]
    return [min(np.linalg.norm(bank - g, axis=1)) for g in found]


def grood_norm(world, mixup_layer, mixup_weight, samples, class_samples):
    prototypes = class_means(world.train.h, world.train.label)
    ood = mixed_prototype(world, mixup_layer, mixup_weight)
    return [
        -np.linalg.norm(h - ood) - logsumexp(-np.linalg.norm(h - prototypes, axis=1)) for h in world.query.h
    ]


def class_means(feature, label):
    return np.array([feature[label == c].mean(axis=0) for c in np.unique(label)])


def prototype_gradient(h, prototypes, ood):
    """Gradient, at the OOD prototype, of the cross-entropy over negative distances to all prototypes."""
    point = torch.tensor(ood, requires_grad=True)
    everyone = torch.cat([torch.tensor(prototypes), point[None]])
    logits = -(torch.tensor(h) - everyone).norm(dim=1)
    loss = functional.cross_entropy(logits[None], torch.tensor([0]))
    return torch.autograd.grad(loss, point)[0].numpy()


@cache
def mixed_prototype(world, block, weight):
    """Mean feature of all training images mixed at a block with the mean map of their runner-up class."""
    train = world.train
    maps = world.outputs(block, train.images)
    known = np.unique(train.label)
    means = {c: maps[torch.tensor(train.label == c)].mean(dim=0) for c in known}
    runners_up = [next(c for c in np.argsort(-z)[1:] if c in means) for z in train.z]
    others = torch.stack([means[c] for c in runners_up])
    return world.features(train.images, block, weight * maps + (1 - weight) * others).mean(axis=0)


# More than one pass


def odin(world, temperature, noise):
    def objective(logits):
        return (logits / temperature).log_softmax(1).amax(dim=1) * temperature

    scores = []
    for image, gradient in zip(
        world.query.images, world.rounded_gradients(world.query, objective), strict=True
    ):
        moved = image[None] + noise * gradient.sign() / world.std
        scores.append(doubt(world.module(moved).detach().numpy()[0] / temperature))
    return scores


def adascale(world, p_min, p_max, k1, k2, weight, share, step):
    def largest(logits):
        return logits.amax(dim=1)

    def moved(rows):
        found = []
        for image, gradient in zip(rows.images, world.rounded_gradients(rows, largest), strict=True):
            flat = gradient.flatten()
            chosen = torch.argsort(flat.abs(), stable=True)[: max(1, int(share / 100 * len(flat)))]
            change = torch.zeros_like(flat)
            change[chosen] = step * flat[chosen].sign()
            found.append(world.features(image[None] + change.view_as(image))[0])
        return found

    def shift(h, other):
        order = np.argsort(-h, kind="stable")
        first, second = (order[: max(1, int(len(h) * k / 100))] for k in (k1, k2))
        return weight * sum(abs(other - h)[second]) + sum(np.maximum(other, 0)[first])

    held, query = world.held, world.query
    known = [shift(h, other) for h, other in zip(held.h, moved(held), strict=True)]
    scores = []
    for h, other in zip(query.h, moved(query), strict=True):
        own = shift(h, other)
        rank = sum(each <= own for each in known) / len(known)
        p = p_min + (1 - rank) * (p_max - p_min)
        positive = sorted(np.maximum(h, 0))[::-1]
        ratio = sum(positive) / sum(positive[: len(h) - round(len(h) * p / 100)])
        scores.append(energy_of(world.weight @ h * np.exp(ratio) + world.bias))
    return scores


def rankfeat(world, blocks):
    def reduced(_, __, output):
        matrix = output.flatten(2)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (matrix - s[:, :1, None] * u[:, :, :1] @ v[:, :1]).view_as(output)

    logits = []
    for block in blocks:
        handle = world.module.get_submodule(block).register_forward_hook(reduced)
        logits.append([world.module(image[None]).detach().numpy()[0] for image in world.query.images])
        handle.remove()
    return [energy_of(z) for z in np.mean(logits, axis=0)]


def mcdropout(world, samples):
    """An image's masks are drawn with the seed, the number of the pass and a hash of its key."""
    layer = next(m for m in world.module.modules() if isinstance(m, torch.nn.Dropout))
    scores = []
    for image, key in zip(world.query.images, world.keys, strict=True):
        word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        total = np.zeros(len(world.bias))
        for sample in range(samples):
            rng = np.random.default_rng([0, sample, word])

            def drop(_, __, output, rng=rng):
                kept = rng.random(tuple(output.shape[1:]), dtype=np.float32) >= layer.p
                return output * torch.tensor(kept) / (1 - layer.p)

            handle = layer.register_forward_hook(drop)
            total += softmax(world.module(image[None]).detach().numpy()[0])
            handle.remove()
        scores.append(1 - max(total) / samples)
    return scores


# Last layer and feature


def dice(world, p):
    contribution = world.weight * world.train.h.mean(axis=0)
    masked = np.where(contribution > np.percentile(contribution, p), world.weight, 0)
    return [energy_of(masked @ h + world.bias) for h in world.query.h]


def shaped(world, shape):
    return [energy_of(world.weight @ shape(h) + world.bias) for h in world.query.h]


def react(world, p=None, c=None):
    bound = np.percentile(world.train.h, p) if c is None else c
    return shaped(world, lambda h: np.minimum(h, bound))


def vra(world, low=None, high=None, a=None, c=None):
    lower = np.percentile(world.train.h, low, axis=0) if a is None else a
    upper = np.percentile(world.train.h, high, axis=0) if c is None else c
    return shaped(world, lambda h: np.where(h < lower, 0, np.minimum(h, upper)))


def kept(h, p):
    """The largest entries and all that equal the smallest of them."""
    return h >= sorted(h)[round(len(h) * p / 100)]


def ash(world, variant, p):
    def shape(h):
        top = kept(h, p)
        if variant == "b":
            return np.where(top, sum(h) / sum(top), 0)
        pruned = np.where(top, h, 0)
        return pruned * np.exp(sum(h) / sum(pruned)) if variant == "s" else pruned

    return shaped(world, shape)


def scale(world, p):
    return shaped(world, lambda h: h * np.exp(sum(h) / sum(h[kept(h, p)])))


def vim(world, dim):
    lengths, logits = residual_of(world, world.train.h, dim), world.train.z
    alpha = np.mean([max(z) for z in logits]) / np.mean(lengths)
    found = zip(residual_of(world, world.query.h, dim), world.query.z, strict=True)
    return [alpha * length + energy_of(z) for length, z in found]


def residual(world, dim):
    return residual_of(world, world.query.h, dim)


def residual_of(world, rows, dim):
    """Length of what is left of h - o outside the leading right singular vectors of the training rows."""
    origin = -np.linalg.pinv(world.weight) @ world.bias
    principal = np.linalg.svd(world.train.h - origin)[2][:dim]
    return [np.linalg.norm((h - origin) - principal.T @ (principal @ (h - origin))) for h in rows]


def neco(world, dim):
    train = world.train.h
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation = np.where(deviation**2 > 1e-12 * sum(deviation**2), deviation, 1)
    directions = np.linalg.svd((train - mean) / deviation)[2][:dim]
    signed = (train < 0).any()
    scores = []
    for h, z in zip(world.query.h, world.query.z, strict=True):
        n = (h - mean) / deviation
        share = np.linalg.norm(directions @ n) / np.linalg.norm(n)
        scores.append(-share * (max(z) if signed else 1))
    return scores


def distances(train, label, query):
    """Of each row of `query` to the nearest class mean and to the mean of all; the rank within classes."""
    centred = np.array([h - train[label == c].mean(axis=0) for h, c in zip(train, label, strict=True)])
    within, total = (rows.T @ rows / len(rows) for rows in (centred, train - train.mean(axis=0)))
    floor = 1e-12 * np.trace(total)

    def inverse(covariance):
        values, vectors = np.linalg.eigh(covariance)
        used = values > floor
        return vectors[:, used] / values[used] @ vectors[:, used].T, sum(used)

    (own, rank), (background, _) = inverse(within), inverse(total)
    nearest = [min((h - mean) @ own @ (h - mean) for mean in class_means(train, label)) for h in query]
    common = [(h - train.mean(axis=0)) @ background @ (h - train.mean(axis=0)) for h in query]
    return np.array(nearest), np.array(common), rank


def mds(world):
    return distances(world.train.h, world.train.label, world.query.h)[0]


def rmds(world):
    nearest, common, _ = distances(world.train.h, world.train.label, world.query.h)
    return nearest - common


def on_units(world):
    train, query = (np.array([unit(h) for h in rows.h]) for rows in (world.train, world.query))
    return distances(train, world.train.label, query)


def mds_l2(world):
    return on_units(world)[0]


def rmds_l2(world):
    nearest, common, _ = on_units(world)
    return nearest - common


def she(world):
    train = world.train
    correct = train.label == train.prediction
    means = {c: train.h[correct & (train.label == c)].mean(axis=0) for c in np.unique(train.label[correct])}
    found = zip(world.query.h, world.query.z, strict=True)
    return [-(h @ means[z.argmax()]) if z.argmax() in means else 0 for h, z in found]


def cosine(world):
    means = class_means(world.train.h, world.train.label)
    return [-max(unit(h) @ unit(mean) for mean in means) for h in world.query.h]


def fdbd(world):
    mean, scores = world.train.h.mean(axis=0), []
    for h, z in zip(world.query.h, world.query.z, strict=True):
        own = z.argmax()
        others = [c for c in range(len(z)) if c != own]
        apart = [abs(z[own] - z[c]) / np.linalg.norm(world.weight[own] - world.weight[c]) for c in others]
        scores.append(-np.mean(apart) / np.linalg.norm(h - mean))
    return scores


def nci(world, alpha):
    mean = world.train.h.mean(axis=0)
    found = zip(world.query.h, world.query.z, strict=True)
    return [-(world.weight[z.argmax()] @ unit(h - mean)) - alpha * sum(abs(h)) for h, z in found]


# Neighbours


def knn(world, k):
    bank = [unit(h) for h in world.train.h]
    return [sorted(np.linalg.norm(h - other) for other in bank)[k - 1] for h in map(unit, world.query.h)]


def nnguide(world, k):
    bank = [logsumexp(z) * unit(h) for h, z in zip(world.train.h, world.train.z, strict=True)]
    found = zip(world.query.h, world.query.z, strict=True)
    return [-logsumexp(z) * np.mean(sorted(np.array(bank) @ unit(h))[-k:]) for h, z in found]


def relation(world, power, threshold):
    bank = [(unit(h), softmax(z)) for h, z in zip(world.train.h, world.train.z, strict=True)]
    scores = []
    for h, own in zip(world.query.h, map(softmax, world.query.z), strict=True):
        similar = [max(unit(h) @ other, 0) * (own @ p) for other, p in bank]
        scores.append(-np.mean([each**power if each > threshold else 0 for each in similar]))
    return scores


# Blocks


@cache
def chosen_block(world, name):
    """Place of a block; without a name that whose norm, on average, is the largest share of jigsaws'."""
    if name is not None:
        return world.network.blocks.index(name)
    rng = np.random.default_rng(1)
    pairs = [world.jigsaw(pixels, rng) for pixels in world.train.pixels]
    whole, puzzle = (world.forward(np.stack(side)).norms for side in zip(*pairs, strict=True))
    ratio = (whole / puzzle).mean(axis=0)
    best, second = sorted(ratio)[:-3:-1]
    assert best - second > 0.005, "no draw of jigsaws decides which block is the best"
    return ratio.argmax()


def featurenorm(world, block=None):
    return -world.query.norms[:, chosen_block(world, block)]


def selectednorm(world, block=None):
    found = zip(world.query.h, world.query.norms[:, chosen_block(world, block)], strict=True)
    return [energy_of(world.weight @ (norm * unit(h)) + world.bias) for h, norm in found]


def gram(world, orders):
    """Of the run's own pooled maps: the rows that are held out follow from a checksum of them, and ranges
    close to 0, which deviations are divided by, enlarge the rounding of maps that have both signs."""
    held_out = np.array([zlib.crc32(row.tobytes()) % 10 == 0 for row in world.stored_pooled["train"]])
    cuts = np.cumsum([pooled.shape[1] for pooled in world.query.pooled])[:-1]
    stages = [np.split(world.stored_pooled[part].astype(float), cuts, axis=1) for part in ("train", "query")]

    def rows_of_gram(f):
        found = []
        for order in orders:
            base = f**order * sum(f**order)
            found.append(np.sign(base) * abs(base) ** (1 / order))
        return np.concatenate(found)

    total = np.zeros(len(world.query.h))
    for train, query in zip(*stages, strict=True):
        values = np.array([rows_of_gram(f) for f in train])
        prediction = world.train.prediction

        def deviation(f, predicted, values=values, prediction=prediction):
            own = ~held_out & (prediction == predicted)
            known = values[own] if own.any() else values[~held_out]
            low, high, found = known.min(axis=0), known.max(axis=0), rows_of_gram(f)
            below, above = np.maximum(low - found, 0), np.maximum(found - high, 0)
            return sum(below / abs(low + 1e-6) + above / abs(high + 1e-6))

        expected = np.mean(
            [deviation(f, c) for f, c in zip(train[held_out], prediction[held_out], strict=True)]
        )
        found = np.array([deviation(f, c) for f, c in zip(query, world.query.prediction, strict=True)])
        total += found / (expected if expected > 0 else 1)
    return total


def mahalanobis_ensemble(world):
    total = np.zeros(len(world.query.h))
    for train, query in zip(world.train.pooled, world.query.pooled, strict=True):
        nearest, _, rank = distances(train, world.train.label, query)
        total += nearest / rank
    return total
