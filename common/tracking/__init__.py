"""The record of a run: a local spool first, MLflow from it."""
