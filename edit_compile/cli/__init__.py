"""`edit-compile train | distil | record | compile | tune | build | inspect | verify | bench | plot`: the API.

Heavy imports wait inside the commands, so that `--help` answers at once.
"""

from edit_compile.cli.base import app  # isort: skip  # first, as it says what is not installed
from edit_compile.cli import bundles, models

__all__ = ["app", "bundles", "models"]
