"""Every method, in every way that its code tells apart, with the parameters that the tests of all methods use."""

from __future__ import annotations

from typing import Any

Use = tuple[str, dict[str, Any]]

ELEMENTWISE: list[Use] = [
    ("average", {}),
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"scale": 1.0, "normalize": True}),
    ("ties", {}),
    ("ties", {"scope": "tensor", "reduce": "sum"}),
    ("ties", {"density": 0.5, "reduce": "max", "variant": "mergelm"}),
    ("ties", {"density": 0.5, "variant": "mergekit"}),
    ("dare", {}),
    ("dare", {"drop_rate": 0.5, "variant": "mergekit", "inner": "average"}),
    ("dare", {"drop_rate": 0.5, "rescale": False, "inner": "ties"}),
    ("della", {}),
    ("della", {"density": 0.5, "normalize": False, "variant": "mergekit"}),
    ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2}),
    ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2, "remove_first": False, "scope": "tensor"}),
    ("breadcrumbs", {"density": 0.5, "bottom_rate": 0.2, "scope": "tensor", "variant": "mergellm"}),
    ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2, "scope": "tensor", "variant": "mergekit"}),
    ("sce", {}),
    ("sce", {"density": 0.4}),
]

GEOMETRIC: list[Use] = [
    ("slerp", {}),
    ("slerp", {"dot_threshold": 0.01}),
    ("karcher", {}),
    ("model_stock", {}),
    ("model_stock", {"scope": "row"}),
    ("model_stock", {"variant": "fusion_bench"}),
]

SPECTRAL: list[Use] = [
    ("cart", {"rank": 0.5, "scale": 1.7}),
    ("cart", {"rank_rule": "energy", "keys": "matrices"}),
    ("cart", {"rank": 0.3, "reduce": "tsv"}),
    ("cart", {"rank": 0.3, "origin": "task_arithmetic"}),
    ("cart", {"rank": 0.3, "origin": "tsv_merge", "scale": 0.5}),
    ("cart", {"rank": 0.3, "origin": "cart", "scale": 0.5}),
    ("cart", {"rank": 0.5, "basis": "dct"}),
    ("cart_indexing", {"rank": 0.5}),
    ("lowrank_task_arithmetic", {"rank": 0.5}),
    ("lowrank_task_arithmetic", {"rank": 0.5, "basis": "dct"}),
    ("tsv_merge", {}),
    ("tsv_merge", {"rank": 0.5, "keys": "block_linear"}),
    ("tsv_merge", {"orthogonalize": False}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("iso_cts", {"common_fraction": 0.3}),
    ("robust_merge", {}),
    ("opcm", {}),
    ("opcm", {"threshold": 0.2, "keys": "matrices"}),
    ("dc_merge", {"density": 0.2}),
    ("dc_merge", {"density": 0.5, "rank": 0.5, "keys": "block_linear"}),
    ("star", {}),
    ("star", {"energy": 0.8, "keys": "matrices"}),
]

OPTIMISED: list[Use] = [
    ("wudi", {"iterations": 20, "other": "mean"}),
    ("wudi", {"iterations": 20, "optimizer": "sgd", "learning_rate": 0.1, "other": "sum"}),
    ("wudi", {"solver": "direct", "keys": "matrices"}),
    ("optmerge", {"iterations": 20, "learning_rate": 0.1, "rank": 0.5}),
    ("optmerge", {"iterations": 20, "variant": "fusion_bench"}),
    ("swudi", {}),
    ("swudi", {"variant": "iwudi", "filter": "tikhonov", "keys": "block_linear", "other": "pretrained"}),
    ("swudi", {"filter": "landweber", "rank_rounding": "floor", "other": "sum"}),
    ("swudi", {"variant": "aswudi"}),
    ("doge", {"iterations": 20}),
    ("doge", {"iterations": 20, "scope": "tensor", "subspace": 2, "keys": "matrices"}),
]

STATISTICS: list[Use] = []

STORES: list[Use] = []

WRAPPERS: list[Use] = [
    ("lines", {}),
    ("lines", {"inner": "ties", "alpha": 0.5}),
    ("lines", {"inner": "cart", "rank": 0.5}),
    ("core_space", {}),
    ("core_space", {"inner": "cart", "rank": 0.5}),
    ("core_space", {"inner": "task_arithmetic", "keys": "block_linear"}),
    ("knots", {"density": 0.5}),
    ("knots", {"inner": "average", "keys": "matrices"}),
    ("knots", {"inner": "ties", "scope": "tensor", "drop_rate": 0.5}),
    ("svc", {}),
    ("svc", {"inner": "iso_c", "alpha": 0.5, "keys": "block_linear"}),
]

USES = ELEMENTWISE + GEOMETRIC + SPECTRAL + OPTIMISED + STATISTICS + STORES + WRAPPERS
