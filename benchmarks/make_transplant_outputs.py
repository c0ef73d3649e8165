"""Write tests/goldens/transplant.safetensors: what mergekit 0.1.5's matching pursuit gives.

PYTHONPATH=/path/to/mergekit-0.1.5 python benchmarks/make_transplant_outputs.py
"""

from pathlib import Path

import torch
from mergekit.tokensurgeon.omp import batch_omp
from safetensors.torch import save_file

torch.manual_seed(0)
target_BD, points_ND, model_ND = torch.randn(12, 24), torch.randn(80, 24), torch.randn(80, 16)
chosen_BK, coefficients_BK = batch_omp(target_BD, points_ND, 8)
rows_BD = torch.bmm(coefficients_BK.unsqueeze(1), model_ND[chosen_BK]).squeeze(1)
found = {
    "target": target_BD,
    "points": points_ND,
    "model": model_ND,
    "chosen": chosen_BK,
    "coefficients": coefficients_BK,
    "rows": rows_BD,
}
save_file(found, Path(__file__).parents[1] / "tests/goldens/transplant.safetensors")
