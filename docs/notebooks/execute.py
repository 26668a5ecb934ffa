"""Run the notebooks of this folder and keep what their cells show.

    python docs/notebooks/execute.py            # writes the outputs into the files
    python docs/notebooks/execute.py --check    # says where they differ, and ends with status 1

Cells run from top to bottom in one namespace, in a folder that is thrown away, with the shipped model on the CPU.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

FOLDER = pathlib.Path(__file__).parent
Output = dict[str, Any]


def notebooks() -> list[pathlib.Path]:
    """The files, by name."""
    return sorted(FOLDER.glob("*.ipynb"))


def executed(notebook: dict[str, Any]) -> Iterator[list[Output]]:
    """Outputs of each code cell: what it prints, and its last expression."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), namespace)
            code = None if last is None else compile(ast.Expression(last.value), f"cell {number}", "eval")
            value = None if code is None else eval(code, namespace)
        outputs: list[Output] = []
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
        if value is not None:
            outputs.append(_result(value, number + 1))
        yield outputs


def _result(value: object, count: int) -> Output:
    data: dict[str, Any] = {"text/plain": [repr(value)]}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(True)
    elif hasattr(value, "_repr_png_"):
        data = {"image/png": base64.b64encode(value._repr_png_()).decode("ascii"), "text/plain": ["a picture"]}
    return {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}


def texts(outputs: list[Output]) -> list[str]:
    """What can be compared between machines: printed text and the short names of results."""
    return ["".join(output.get("text") or output["data"]["text/plain"]) for output in outputs]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    checks, status, here = parser.parse_args(arguments).check, 0, os.getcwd()
    for file in notebooks():
        notebook = json.loads(file.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                found = list(executed(notebook))
            finally:
                os.chdir(here)
        for number, (cell, outputs) in enumerate(zip(cells, found, strict=True), start=1):
            if texts(cell["outputs"]) != texts(outputs):
                print(f"{file.name}, code cell {number}: {texts(cell['outputs'])} became {texts(outputs)}")
                status = int(checks)
            cell["outputs"], cell["execution_count"] = outputs, number
        if not checks:
            file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
