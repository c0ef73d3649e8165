"""The modality `language`: causal language models on tasks of lm-eval."""
