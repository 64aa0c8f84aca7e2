"""The record of a run: a local spool first, MLflow from it.

The five functions of `common.tracking.guide`, for a script of one's own, are here too: looked up when they are asked
for, so that a program that wants only an address or a spool imports no more than that.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.tracking.guide import create_nested_run, log_metrics, log_params, setup_mlflow, start_run

__all__ = ["create_nested_run", "log_metrics", "log_params", "setup_mlflow", "start_run"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from common.tracking import guide

    return getattr(guide, name)
