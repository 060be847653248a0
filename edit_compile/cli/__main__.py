"""`python -m edit_compile.cli`."""

from edit_compile.cli import app

app()
