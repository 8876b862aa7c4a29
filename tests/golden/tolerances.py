"""How far outputs may be from the golden ones, and why; `EXACT` ones not by a bit.

Features, logits and pooled maps are sums of few binary digits, so no machine rounds them (see `network`).
What is computed from them in floating point is rounded, and where depends on the machine: exp, log and pow
come from its libraries, sums and matrix products are cut into as many lanes as its vectors have, LAPACK
iterates, and FAISS ranks in float32. Each tolerance is at least five times what such steps were seen to do
between code for SSE and code for AVX2, and far below what a change of a formula, a constant or a sign does.

A tolerance t allows t (|x| + median |x|) for an entry x of an array.
"""

from __future__ import annotations

import re

EXACT = 0.0
"""Nothing is rounded, or only by single divisions, which IEEE 754 defines to the bit."""
DOUBLE = 1e-12
"""Sums, products, exp, log, pow and square roots in float64."""
SOLVED = 1e-9
"""Float64 through an eigendecomposition, a pseudo-inverse, a root or a fit which multiply what is rounded."""
ROUNDED = 1e-6
"""Float64 kept as float32, whose last bit may differ; and distances between such vectors, which FAISS ranks
in float32: of two neighbours at almost the same distance it may take either."""
NORMS = 4e-7
"""Block norms: square roots in float32, added in up to six steps."""
GRADIENTS = 3e-6
"""Norms of gradients: backward passes in float32 from a softmax."""
FORWARD = 1e-5
"""A forward pass of images or maps of many digits: float32 sums of up to 64 products in every layer."""

COLUMNS = {
    "block_norm": NORMS,
    "dropped of mcdropout.0": ROUNDED,
    "parameter_gradient of gradnorm_body.0": GRADIENTS,
    "parameter_gradient of gradnorm_fc.0": GRADIENTS,
    "perturbed of odin.0": FORWARD,
    "rank_reduced of rankfeat.0": FORWARD,
    "rank_reduced of rankfeat.1": FORWARD,
}
"""Tolerances of feature columns; all others are exact."""

ARRAYS = (
    (r'Classes \S+ of .*"unit": true.*: (class|unlabelled)_sum', DOUBLE),
    (r"Deviations \S+ of .*: total", DOUBLE),
    (r"Draw \S+ of .*: (feature|probability)", ROUNDED),
    (r"Farthest \S+ of .*: distance", DOUBLE),
    (r'Grood \S+ bank .*"prototype": "noise".*: vectors', FORWARD),
    (r"(Grood|Knn|NnGuide) \S+ bank .*: vectors", ROUNDED),
    (r"LargestEnergy \S+ of .*: energy", DOUBLE),
    (r"Match \S+ of .*: residual", SOLVED),
    (r"Ranges \S+ of .*: (high|low)", DOUBLE),
    (r'Scatter \S+ of .*"unit": true.*: mean', DOUBLE),
    (r"Scatter \S+ of .*: scatter", DOUBLE),
    (r"Slopes \S+ of .*: (inverse|slope)", SOLVED),
    (r"Softmax \S+ of .*: sum", DOUBLE),
    (r"jigsaw pass .*: ratio", ROUNDED),
    (r"jigsaw pass .*: stderr", FORWARD),
    (r"noise pass .*: mean", FORWARD),
)
"""Tolerances of what is fitted, by the first pattern of `statistic: array` that fits; others are exact.

They hold for every version of a statistic."""

SCORES = {
    # Largest logits of exact features, as they are or pruned, and of an exact last layer, whole or pruned.
    **dict.fromkeys(("ash_maxlogit", "dice_maxlogit", "maxlogit"), EXACT),
    **dict.fromkeys(
        ("adascale", "ash", "cosine", "dice", "energy", "entropy", "fdbd", "gen", "gradnorm", "gram"), DOUBLE
    ),
    **dict.fromkeys(("grood_norm", "klmatching", "msp", "nci", "odin_cold"), DOUBLE),
    **dict.fromkeys(("react", "react_dice", "react_maxlogit", "scale", "she", "vra"), DOUBLE),
    **dict.fromkeys(("gradorth", "mahalanobis_ensemble", "mds", "mds_l2", "neco"), SOLVED),
    **dict.fromkeys(("openmax", "residual", "rmds", "rmds_l2", "tempscale", "vim"), SOLVED),
    # The last bit of an entry of the draw, which is kept as float32, moves the mean over its rows by 1e-10.
    "relation": SOLVED,
    **dict.fromkeys(("grood", "grood_noise", "grood_val", "knn", "mcdropout", "nnguide"), ROUNDED),
    "featurenorm": NORMS,
    "selectednorm": ROUNDED,
    **dict.fromkeys(("gradnorm_body", "gradnorm_fc"), GRADIENTS),
    # Errors of features, of both signs, in an energy that is large beside them.
    "rankfeat": 3e-7,
    # As FORWARD, divided by the temperature of 1000.
    "odin": 2e-8,
}
"""Tolerances of scores and thresholds by detector; a new detector needs one."""

METRICS = 1e-12
"""Ranks count, and no two scores are so close that their order is in doubt: `make` makes sure of that."""


def of(kind: str, group: str, name: str) -> float:
    """Tolerance of a column of a dataset, an array of a statistic, or the scores of a detector."""
    if kind == "features":
        return COLUMNS.get(name, EXACT)
    if kind == "scores":
        return SCORES[group]
    found = (tolerance for pattern, tolerance in ARRAYS if re.fullmatch(pattern, f"{group}: {name}"))
    return next(found, EXACT)
