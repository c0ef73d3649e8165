"""The steps of the pipeline: plain functions from declared inputs to declared outputs."""
