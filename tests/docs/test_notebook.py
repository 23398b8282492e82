"""docs/python.ipynb runs from top to bottom."""

import nbclient
import nbformat
import pytest

from tests import ROOT


@pytest.mark.slow
# Jupyter's own packages warn about each other.
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs():
    notebook = nbformat.read(ROOT / "docs/python.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    assert "thumbs-up" in printed and "'margin'" in printed
