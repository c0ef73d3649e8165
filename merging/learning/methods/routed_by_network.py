"""A compressed store whose router is a small network, trained on a few examples of each task."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.routing import Training, by_network, check_store, store_recipe
from mergeline.merging.methods.parameters import BelowOne, Positive, PositiveCount, Share
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2406.15479", code="LZY-the-boys/Twin-Merging@f481c608", routed=True)
def routed_by_network(
    job: Job,
    *,
    inner: str = "tsv_compress",
    blocks: PositiveCount = 1,
    width: PositiveCount = 2,
    dropout: BelowOne = 0.5,
    rate: Positive = 5e-4,
    epochs: PositiveCount = 50,
    batch: PositiveCount = 256,
    held_out: Share = 0.2,
    **params: Any,
) -> Recipe:
    """A store of all experts, and Twin-Merging's router: a network that tells from hidden states which expert to take.

    It is trained on examples by whose task they are of; other labels are not looked at. The expert's weights are then
    given back from the store, as `mergeline extract-expert` does, and run.

    Formula:
        e* = argmax W₃ φ(W₂ φ(W₁ x)), φ: batch normalisation, leaky ReLU, dropout while it is trained;
        x: the base's hidden states before the MLPs of the last blocks, their first token and their mean over tokens
    Parameters:
        inner: the method that keeps the store; its parameters stand beside these
        blocks: how many of the last blocks are looked at
        width: of the hidden layers, in widths of x
        dropout: after each hidden layer
        rate: of AdamW
        epochs: over all examples; the one whose held-out examples are known best is kept
        batch: examples in a step
        held_out: the share of the examples that choose the epoch, a half or less
    Trap:
        The official router reads the merge of all experts, weighs their exclusive parts for every input by its softmax,
        and keeps the epoch that is best on the test split; here it reads the base, takes one expert, and is chosen on
        examples that were held out.
    """
    check_store(inner, params)
    training = Training(width, dropout, rate, epochs, batch, held_out)
    return store_recipe(job, inner, params, by_network(job, blocks, training))
