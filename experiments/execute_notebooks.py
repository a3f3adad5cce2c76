"""Execute the notebooks, outputs included, as they are committed.

    AUTOCOMPRESS_TASK=../experiments/tasks/resnet20_cifar10.py python experiments/execute_notebooks.py [NAME ...]

Runs `notebooks/*.ipynb`, or those whose names start with NAME, in their own folder: a path of a task is as seen from
there. What changes from one run to the next without meaning anything is left out (times, versions of Python), and plots
are stored with a palette, which makes them a third as long. A cell that fails, or that writes to stderr, ends the run,
and that notebook stays as it was. Needs the extra `notebooks`.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from common import ROOT
from nbclient import NotebookClient
from PIL import Image

FOLDER = ROOT / "notebooks"
COLOURS = 256  # of a palette, the most that a PNG has
CELL_SECONDS = 3600


def execute(path: Path) -> None:
    """Run a notebook in its folder, and write it back with its outputs."""
    notebook = nbformat.read(path, 4)
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    cleaned(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def cleaned(notebook: Any) -> None:
    """Leave out, in place, what differs between runs that show the same."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise SystemExit(f"a cell writes to stderr: {output['text']}")
            picture = output.get("data", {}).get("image/png")
            if picture is not None:
                output["data"]["image/png"] = small(picture)


def small(picture: str) -> str:
    """A base64 PNG with a palette instead of true colours."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image = image.quantize(COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.name.startswith(tuple(names)):
            execute(path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
