"""Run one function of a test file in this fresh process: child.py FILE FUNCTION ARGUMENTS RESULT [PACKAGE ...]

ARGUMENTS is a JSON list, RESULT the file that gets what the function returns, as JSON. Importing any of the PACKAGEs
fails, as on the machine of a stranger who never installed them.
"""

import importlib.util
import json
import sys
from pathlib import Path


class Missing:
    """A finder that goes first and finds nothing for the given packages (an editable install is found otherwise)."""

    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    file, function, arguments, result, *packages = sys.argv[1:]
    sys.meta_path.insert(0, Missing(packages))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Path(result).write_text(json.dumps(getattr(module, function)(*json.loads(arguments))))
