"""The record of a run: a local spool first, MLflow from it.

The five functions of `common.tracking.guide`, for a script of one's own, `load_model` and `thresholds_of` are here too:
looked up when they are asked for, so that a program that wants only an address or a spool imports no more than that.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.tracking.guide import create_nested_run, log_metrics, log_params, setup_mlflow, start_run
    from common.tracking.registry import load_model, thresholds_of

__all__ = ["create_nested_run", "load_model", "log_metrics", "log_params", "setup_mlflow", "start_run", "thresholds_of"]
_OF_REGISTRY = ("load_model", "thresholds_of")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"common.tracking.{'registry' if name in _OF_REGISTRY else 'guide'}")
    return getattr(module, name)
