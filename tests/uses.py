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
    ("cart_indexing", {"rank": 0.5}),
    ("lowrank_task_arithmetic", {"rank": 0.5}),
    ("tsv_merge", {}),
    ("tsv_merge", {"rank": 0.5, "keys": "block_linear"}),
    ("tsv_merge", {"orthogonalize": False}),
    ("iso_c", {}),
]

OPTIMISED: list[Use] = []

STATISTICS: list[Use] = [
    ("fisher", {}),
    ("fisher", {"normalize_fisher": "tensor", "variant": "mergelm"}),
    ("fisher", {"normalize_fisher": "none", "variant": "dataless", "favor_target": False}),
    ("regmean", {}),
    ("regmean", {"keys": "matrices", "nondiagonal": 1.0, "exclude": ["mlp"]}),
    ("ffg", {}),
    ("ffg", {"threshold": 0.001}),
    ("ota", {}),
    ("ota", {"density": 0.5, "normalize": "global"}),
    ("ota", {"density": 0.5, "merge": "linear", "rescale": True, "fallback_to_base": False}),
    ("ota", {"density": 0.5, "merge": "ties", "rank1": True}),
    ("widen", {}),
    ("widen", {"threshold": 0.5, "calibration": 0.5, "embeddings": ["mlp.weight"]}),
]

STORES: list[Use] = [
    ("cart_indexing", {"rank": 0.5, "scale": 1.5, "keys": "matrices"}),
    ("tsv_compress", {}),
    ("tsv_compress", {"rank": 0.5, "keys": "block_linear"}),
    ("twin", {"rank": 0.5}),
    ("twin", {"rank": 0.2, "inner": "ties"}),
    ("tall_mask", {}),
    ("tall_mask", {"inner": "ties", "threshold": 0.2}),
    ("emr", {}),
]

WRAPPERS: list[Use] = [
    ("lines", {}),
    ("lines", {"inner": "ties", "alpha": 0.5}),
    ("lines", {"inner": "cart", "rank": 0.5}),
]

USES = ELEMENTWISE + GEOMETRIC + SPECTRAL + OPTIMISED + STATISTICS + STORES + WRAPPERS
