"""`python -m physformer_cli` is `physformer`."""

from physformer_cli.main import run

run()
