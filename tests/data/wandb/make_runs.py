"""Makes a small offline run with the wandb that is installed where this runs: `make_runs.py RUN_ID FOLDER STEPS`.

Not a test, and not needed by any: it says how the folders beside it were made.  The reader under test shares no code
with it.  Expected values are computed again in tests/unit/test_wandb_import.py from the formulas below.
"""

import os
import pathlib
import sys

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true", "WANDB_HOST": "lab"}
os.environ |= {"WANDB_DISABLE_CODE": "true", "WANDB_USERNAME": "someone", "WANDB_ERROR_REPORTING": "false"}

import numpy as np
import wandb


def main(run_id: str, folder: str, steps: int) -> None:
    old = wandb.__version__.startswith("0.16")
    prefix = "_" if old else "x_"
    options = {f"{prefix}disable_stats": True, f"{prefix}disable_meta": True, "disable_git": True}
    if not old:
        options |= {"x_save_requirements": False, "host": "lab", "program": "train.py", "x_executable": "python"}
    run = wandb.init(
        id=run_id,
        project="faces",
        name=f"resnet on {wandb.__version__}",
        notes="First try.\nSecond line.",
        tags=["baseline", "celeba"],
        group="trial",
        job_type="train",
        dir=folder,
        config={"lr": 0.01, "epochs": steps, "model": {"name": "resnet18", "width": 64}, "sizes": [1, 2], "none": None},
        settings=wandb.Settings(**options),
    )
    run.config.update({"lr": 0.02}, allow_val_change=True)
    for step in range(steps):  # enough of them to cross the 32 kB blocks of the log
        run.log(
            {"loss": 2.0 / (step + 1), "val": {"auc": step / steps}, "good": step > 3, "phase": "warm"}, step=2 * step
        )
    run.log({"odd": float("nan")}, step=2 * steps)
    run.log({"odd": float("inf")}, step=2 * steps + 1)
    picture = (np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).repeat(3).reshape(8, 8, 3)
    run.log({"sample": wandb.Image(picture, caption="a square")}, step=2 * steps + 2)
    run.log({"spread": wandb.Histogram([1, 2, 2, 3])}, step=2 * steps + 3)
    run.summary["best_auc"] = 0.95
    run.summary["verdict"] = "kept"
    note = pathlib.Path(folder) / "extra.txt"
    note.write_text("a file of the run\n")
    run.save(str(note), base_path=folder, policy="now")
    run.finish()


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
