"""tutorial.ipynb runs as it is committed. `python -m tests.test_tutorial` runs all of it and stores its pictures."""

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

TUTORIAL = ROOT / "tutorial.ipynb"
MOST_LINES, MOST_BYTES = 12, 1_000_000

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def execute() -> Any:
    """The notebook with the outputs of a new kernel, which is started in the project's folder as Jupyter does."""
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: Any) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))) for output in cell.outputs]


def test_every_cell_runs_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is shortened. Each output is a picture: no bar, no warning, no text beside it."""
    monkeypatch.setenv("TUTORIAL_STEPS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = code_cells(execute())
    assert all(len(pictures(cell)) == 1 for cell in cells)
    (comparison,) = [cell for cell in cells if "by_hand" in cell.source]
    by_hand, sampled = np.split(pictures(comparison)[0][4:], 2)
    assert np.abs(by_hand[:84, 128:].astype(int) - sampled[:84, 128:]).max() <= 2, "the same images but for rounding"


def test_what_is_committed_can_be_read_without_being_run() -> None:
    text, notebook = TUTORIAL.read_text("utf-8"), nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    assert len(text.encode()) < MOST_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], "run in order, by a new kernel"
    for before, cell in zip(notebook.cells[::2], notebook.cells[1::2], strict=True):
        assert before.cell_type == "markdown" and cell.cell_type == "code"
        assert len(cell.source.splitlines()) <= MOST_LINES and max(map(len, cell.source.splitlines())) <= 120
        assert [picture.shape[1] > 400 for picture in pictures(cell)] == [True]
        assert not cell.metadata
    words = re.sub(r'"image/png": ".*"', "", text)
    assert not re.search(r"/(home|root|Users|tmp|work)/|[A-Z]:\\\\", words), "no path of a machine"
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}


if __name__ == "__main__":
    executed = execute()
    for output in [output for cell in code_cells(executed) for output in cell.outputs]:
        output.data.pop("image/jpeg", None)  # the same picture again
    executed.metadata["language_info"] = {"name": "python"}  # not the version at hand
    nbformat.write(executed, TUTORIAL)
