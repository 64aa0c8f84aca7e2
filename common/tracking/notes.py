"""What MLflow's pages say of an experiment, a run and a registered model: what it is, of which data, how to load it.

Counts and settings alone: no person's name and no path.
"""

from typing import Final

NOTE_TAG: Final = "mlflow.note.content"  # what MLflow's pages show as the description of a run or an experiment
VERSION: Final = "{version}"  # in a model's note, where its number will stand

# By a run's mode: what its experiment holds, and what such a run is.
_EXPERIMENTS: Final = {
    "local": "Models that one site trained alone, on its own pictures.",
    "centralized": "Models trained on all sites' pictures in one place: what a federation is measured against.",
    "federated": "Federated models: the pictures stayed at their sites. Each site is a nested run.",
    "federated_client": "One site's part of federated runs, kept by the site itself.",
    "federated_evaluation": "Models that sites scored and did not train. Each site is a nested run.",
    "twins": "Verification of twins, who are the hardest impostors.",
    "ablation": "What one setting is worth: a training for each of its values, all else equal, as nested runs.",
    "sweep": "Searches for good settings, judged by validation alone. Each trial is a nested run.",
    "evaluation": "Comparisons of models on the same test data, with intervals: open report.html among the artifacts.",
}
_RUNS: Final = {
    "local": "Training at one site alone",
    "centralized": "Training on all sites' pictures in one place",
    "federated": "Federated training",
    "federated_client": "One site's part of a federated training",
    "federated_evaluation": "An evaluation at all sites",
    "twins": "Training on twins",
    "ablation": "An ablation",
    "sweep": "A search for good settings",
    "evaluation": "A comparison of models on the same test data",
}
_HOW_TO_LOOK: Final = (
    "Charts of several experiments: add `?workflowType=machine_learning` to the address of the experiment's page."
    " Names of figures are the same in all kinds of runs."
)


def experiment_note(mode: str) -> str:
    """The description of the experiment of such runs; "" for a mode that is none of ours."""
    return f"{_EXPERIMENTS[mode]}\n\n{_HOW_TO_LOOK}" if mode in _EXPERIMENTS else ""


def run_note(mode: str, model: str, image_size: int | None, strategy: str = "") -> str:
    """What a run is, in one sentence.  model: the kind of model.  image_size: px; None: of several models."""
    what = f"{_RUNS.get(mode, mode)} of `{model}`" + (f" by `{strategy}`" if strategy else "")
    return f"{what}." if image_size is None else f"{what}, pictures of {image_size} x {image_size} px."


def data_note(datasets: str, num_pictures: int | str, num_sites: int = 1) -> str:
    """Which data, in counts.  datasets: names, joined by +."""
    sites = f", {num_sites} sites" if num_sites > 1 else ""
    return f"Data: {datasets.replace('+', ', ')}{sites}, {num_pictures} pictures."


def chosen_note(unit: str, best: int, last: int, val_auc: float) -> str:
    """Which round or epoch is the best.  unit: "round" or "epoch"."""
    return f"Best {unit}: {best} of {last}, chosen by validation (AUC {val_auc:.4f})."


def registered_note(name: str, model: str) -> str:
    """The description of a registered model, whichever its versions are."""
    return (
        f"`{model}`: aligned pictures of faces to embeddings of length 1; two faces are compared by the dot product of"
        " theirs.\n\nEach version says what it was trained on, and its tags which round or epoch it is. `@champion` is"
        f" the one with the highest validation AUC on the same validation people.\n\n{_snippet(f'{name}@champion')}"
    )


def version_note(name: str, model: str, image_size: int) -> str:
    """What one version is and how to load it, with VERSION where its number will stand."""
    return (
        f"`{model}`.\n\nInput: float32 [B, 3, {image_size}, {image_size}], RGB in [-1, 1], aligned."
        f" Output: float32 [B, D], of length 1.\n\n{_snippet(f'{name}/{VERSION}')}"
    )


def _snippet(version: str) -> str:
    uri = f"models:/{version}"
    return (
        "```python\nfrom common.tracking import load_model  # FaceFed's own: runs nothing that the registry holds\n\n"
        f'embeddings = load_model("{uri}")(pictures)\n```\n\nWithout FaceFed, if you trust all who can write here:\n\n'
        "```python\nimport mlflow\n\n"
        f'embeddings = mlflow.pyfunc.load_model("{uri}").predict(pictures.numpy())\n```'
    )
