"""The command line: ``tunery``."""


def main() -> None:
    """Run the command line (the console script's entry point)."""
    from api.cli.commands import app

    app()
