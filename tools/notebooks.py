"""Run the notebooks of docs/notebooks and write down what they gave.

    python tools/notebooks.py [NOTEBOOK.ipynb …]

Each runs in a folder of its own that is gone afterwards, without a network and on one thread, as the tests run them.  What would differ
from one run to the next though nothing has changed (times of cells, ids, what went to stderr) is left out of what is written.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
_OFFLINE = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def executed(path: Path, folder: Path) -> NotebookNode:
    """A notebook with the outputs of a run in ``folder``; a cell that raises ends it with :class:`nbclient.exceptions.CellExecutionError`."""
    notebook = nbformat.read(path, as_version=4)
    # Sockets in a folder instead of ports that others could take or listen to; their paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="nb") as sockets,
        patch.dict(os.environ, _OFFLINE | {"IPYTHONDIR": sockets, "JUPYTER_RUNTIME_DIR": sockets}),
    ):
        # No limit for a cell: how fast the machine is decides nothing.
        client = NotebookClient(
            notebook,
            timeout=None,
            startup_timeout=600,
            kernel_name="python3",
            # However the kernel cut what a cell printed.
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        manager = client.create_kernel_manager()
        manager.set_trait("transport", "ipc")
        manager.set_trait("ip", f"{sockets}/kernel")
        client.execute()
    return tidied(notebook)


def tidied(notebook: NotebookNode) -> NotebookNode:
    """The same without what differs between runs of the same code."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("metadata", None)
                if output.output_type in ("display_data", "execute_result"):
                    output.metadata = {}
    return notebook


def main() -> int:
    """Run those that are named, or all."""
    for path in [Path(word) for word in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
