"""``python -m api.cli``: the same as the console script ``tunery``."""

from api.cli import main

main()
