"""Adapters as experts: the base as an adapter changes it, computed block by block as it is read.

`tensor` is a tensor of the base with an update, and `updates` is what kinds of adapters add to it, `singular_values`
what SVFit does. `config` and `peft` read what PEFT writes, `single_file` LoRA of diffusion models, which `pipeline`
gives to all components, `bare` files of nothing but factors.
"""

from mergeline.merging.checkpoints.adapters.bare import compose, composed, is_bare
from mergeline.merging.checkpoints.adapters.config import is_kept
from mergeline.merging.checkpoints.adapters.names import PREFIX
from mergeline.merging.checkpoints.adapters.peft import adapt, alone, is_adapter, open_adapted, unties
from mergeline.merging.checkpoints.adapters.pipeline import adapt_in_pipeline, adapt_pipeline, holds_adapters
from mergeline.merging.checkpoints.adapters.single_file import is_lora_file
from mergeline.merging.checkpoints.adapters.tensor import AdaptedTensor, added_rank
from mergeline.merging.checkpoints.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "PREFIX",
    "AdaptedTensor",
    "adapt",
    "adapt_in_pipeline",
    "adapt_pipeline",
    "added_rank",
    "alone",
    "compose",
    "composed",
    "holds_adapters",
    "is_adapter",
    "is_bare",
    "is_kept",
    "is_lora_file",
    "open_adapted",
    "unties",
]
