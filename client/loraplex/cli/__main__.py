"""Lets `python -m loraplex.cli` be the command."""

from loraplex.cli.main import app

if __name__ == "__main__":
    app()
