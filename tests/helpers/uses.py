"""Every method, in every way that its code tells apart, with the parameters that the tests of all methods use."""

from __future__ import annotations

from typing import Any, Sequence

import pytest

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
    ("della", {"density": 0.5, "elect": False}),
    ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2}),
    ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2, "remove_first": False, "scope": "tensor"}),
    ("breadcrumbs", {"density": 0.5, "bottom_rate": 0.2, "scope": "tensor", "variant": "mergellm"}),
    ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2, "scope": "tensor", "variant": "mergekit"}),
    ("breadcrumbs", {"density": 0.5, "elect": True, "normalize": True}),
    ("passthrough", {}),
    ("sce", {}),
    ("sce", {"density": 0.4}),
    ("wise_ft", {}),
    ("expo", {}),
    ("nearswap", {"threshold": 0.05}),
    ("arcee_fusion", {}),
    ("magmax", {}),
    ("random_mix", {}),
    ("ram", {"threshold": 0.05}),
    ("ram", {"threshold": 0.05, "variant": "ram_plus"}),
    ("consensus_ta", {}),
    ("consensus_ties", {}),
    ("consensus_ties", {"density": 0.6, "reduce": "mean", "min_tasks": 1}),
    ("magnitude_prune", {}),
    ("magnitude_prune", {"density": 0.5, "scope": "tensor"}),
    ("pcb", {}),
    ("pcb", {"density": 0.5, "variant": "root"}),
    ("pcb", {"density": 0.9, "variant": "nlp", "clamp": 0.2}),
    ("pcb", {"density": 0.3, "variant": "vision"}),
    ("tatr", {"density": 0.5}),
    ("metagpt", {}),
    ("delta_guided", {}),
    ("lata", {}),
    ("lata", {"mode": "threshold", "threshold": 0.1}),
    ("ema", {}),
    ("ema", {"window": 2}),
    ("greedy_soup", {}),
    ("greedy_soup", {"members": [1]}),
    ("metrics_weighted", {}),
]

GEOMETRIC: list[Use] = [
    ("slerp", {}),
    ("slerp", {"dot_threshold": 0.01}),
    ("nuslerp", {}),
    ("nuslerp", {"scope": "row"}),
    ("nuslerp", {"scope": "column"}),
    ("multislerp", {}),
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
    ("resmerge", {}),
    ("resmerge", {"rank_topk": 2, "head_ratio_budget": 0.5, "keys": "matrices"}),
    ("drm", {"drop_rate": 0.4}),
    ("drm", {"drop_rate": 0.0, "direction": "vertical", "keys": "matrices"}),
    ("free", {}),
    ("free", {"filter_ratio": 0.4, "with_align": False, "keys": "matrices"}),
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
    ("cart_wudi", {}),
    ("cart_wudi", {"power": 1.0, "low_rank": 0.0, "keys": "matrices"}),
    ("wudi", {"norm_power": 0.0, "iterations": 20}),
    ("swudi", {"norm_power": 0.0}),
    ("dop", {}),
    ("dop", {"svd_epsilon": 0.6, "svd_proj_space": "u", "alpha": 0.4, "keys": "matrices"}),
    ("ace", {}),
    ("ace", {"threshold": 0.0, "keys": "block_linear", "other": "sum"}),
    ("ace", {"threshold": 0.0, "variant": "official", "rank": 0.6}),
    ("doge", {"iterations": 20}),
    ("doge", {"iterations": 20, "scope": "tensor", "subspace": 2, "keys": "matrices"}),
]

STATISTICS: list[Use] = [
    ("fisher", {}),
    ("fisher", {"normalize_fisher": "tensor", "variant": "mergelm"}),
    ("fisher", {"normalize_fisher": "none", "variant": "dataless", "favor_target": False}),
    ("regmean", {}),
    ("regmean", {"keys": "matrices", "nondiagonal": 1.0, "exclude": ["mlp"]}),
    ("esm", {}),
    ("esm", {"variant": "language", "rank": 0.4, "keys": "block_linear"}),
    ("esm", {"polarization": 0.0, "eigenvalue_power": 0.0}),
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
    ("rmm", {"rank": 1.0}),
    ("rmm", {"rank": 2, "components": 1}),
    ("twin", {"rank": 0.5}),
    ("twin", {"rank": 0.2, "inner": "ties"}),
    ("tall_mask", {}),
    ("tall_mask", {"inner": "ties", "threshold": 0.2}),
    ("emr", {}),
    ("losparse", {"sparse_ratio": 1.0}),  # all rows: copies of the base come back
    ("losparse", {"parameter_ratio": 0.8, "sparse_ratio": 0.4}),
    ("losparse", {"sparse_ratio": 0.0, "keys": "matrices"}),
    ("shared_basis", {"rank": 0.5, "layers": 2}),
    ("shared_basis", {"rank": 0.3, "side": "out", "of": "weights", "keys": "matrices"}),
    ("svd_compress", {"rank": 0.5}),
    ("svd_compress", {"rank": 0.5, "of": "weights", "keys": "matrices"}),
]

WRAPPERS: list[Use] = [
    ("lines", {}),
    ("lines", {"inner": "ties", "alpha": 0.5}),
    ("lines", {"inner": "cart", "rank": 0.5}),
    ("lines", {"inner": "dare", "inner_inner": "ties", "drop_rate": 0.5}),
    ("around", {}),
    ("around", {"inner": "ties", "density": 0.5}),
    ("around", {"inner": "sce", "origin": "tsv_merge", "density": 0.4}),
    ("around", {"inner": "cart", "origin": "task_arithmetic", "rank": 0.5}),
    ("around", {"inner": "ties", "origin": "ties", "origin_density": 0.4}),
    ("around", {"inner": "truncate", "inner_inner": "ties", "rank": 0.5}),
    ("truncate", {"rank": 0.5}),
    ("truncate", {"energy": 0.8, "inner": "ties", "keys": "matrices", "scope": "tensor"}),
    ("truncate", {"rank": 0.5, "inner": "dare", "inner_inner": "ties", "drop_rate": 0.5}),
    ("weighted_truncate", {"rank": 0.5}),
    ("weighted_truncate", {"energy": 0.8, "inner": "ties"}),
    ("subspace_boosting", {"beta": 0.5}),
    ("subspace_boosting", {"beta": 0.6, "inner": "ties", "density": 0.9, "keys": "matrices"}),
    ("core_space", {}),
    ("core_space", {"inner": "cart", "rank": 0.5}),
    ("core_space", {"inner": "task_arithmetic", "keys": "block_linear"}),
    ("knots", {"density": 0.5}),
    ("knots", {"inner": "average", "keys": "matrices"}),
    ("knots", {"inner": "ties", "scope": "tensor", "drop_rate": 0.5}),
    ("svc", {}),
    ("svc", {"inner": "iso_c", "alpha": 0.5, "keys": "block_linear"}),
]

# What fits give is merged by these; their tests are those of the fits.
OF_FITS = {"solved", "weighted"}
USES = ELEMENTWISE + GEOMETRIC + SPECTRAL + OPTIMISED + STATISTICS + STORES + WRAPPERS


def cuts_weights(method: str, params: dict[str, Any]) -> bool:
    """Whether it cuts the weights themselves, so that copies of the base come back cut."""
    return method == "losparse" or params.get("of") == "weights"


def by_use(method: str, uses: Sequence[Use] = USES, *, others_slow: bool = False) -> pytest.MarkDecorator:
    """A test of every use, which is given `method` and `params`; maybe a slow one of all but each method's first."""
    seen: set[str] = set()
    marked = []
    for id, params in uses:
        slow = [pytest.mark.slow] if others_slow and id in seen else []
        name = "-".join([id, *(f"{k}={v}" for k, v in params.items())])
        marked.append(pytest.param(id, params, id=name, marks=slow))
        seen.add(id)
    return pytest.mark.parametrize((method, "params"), marked)
