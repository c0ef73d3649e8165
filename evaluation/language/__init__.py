"""Causal language models on tasks of lm-eval: what is right, perplexities, and whether a model works at all."""

from mergeline.evaluation.language.harness import LanguageEvaluator, Scores
from mergeline.evaluation.language.models import LoadedModel, load_model
from mergeline.evaluation.language.settings import Language

__all__ = ["Language", "LanguageEvaluator", "LoadedModel", "Scores", "load_model"]
