"""What every mode uses and no idea about diffusion changes: settings, checkpoints, files, pictures, devices."""

import importlib.util
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent
for _name in ("config", "dataset", "diffusion", "model", "samplers"):  # a host program may have such modules as well
    _spec = importlib.util.find_spec(_name)  # of what was imported by that name, or would be
    if _spec is not None and Path(_spec.origin or "").resolve().parent != _FOLDER:
        raise ImportError(f"the module {_name} is {_spec.origin}, not the one in {_FOLDER}: give yours "
                          "another name, or move it into a package")
