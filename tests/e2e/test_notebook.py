"""examples/notebook.ipynb: all its cells, in order, in a folder like the one that `make demo` leaves."""

import re
import sys
from unittest.mock import patch

import nbformat
import pytest
from nbclient import NotebookClient
from programs import run_folder

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.e2e,
    # Of the client's own libraries, which have no say in what the notebook does.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def printed(cells):
    return "\n".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))


def test_the_notebook_runs_and_says_what_it_is_about(faces, tmp_path, with_tables):
    (tmp_path / "data").symlink_to(faces.folder / "data")
    with_tables(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    with patch.dict("os.environ", {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}):
        client.execute()
    text = printed(notebook.cells)
    assert "celeba: 12 people, 96 pictures, 0 left out" in text
    assert re.search(r"best round: \d", text)
    assert len(re.findall(r"^(untrained|best): AUC 0\.\d{3} on people never seen", text, re.MULTILINE)) == 2
    assert re.search(r"^one person: -?\d\.\d\d, two people: -?\d\.\d\d$", text, re.MULTILINE)
    assert re.search(r"^\d people known, \d+ pictures asked for, \d+% right$", text, re.MULTILINE)
    assert (run_folder(tmp_path) / "metrics.json").stat().st_mode & 0o077 == 0  # as the programs leave it


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
