"""`python -m corrdit`: the command line, also from a source tree that is not installed."""

from corrdit.cli import entry_point

if __name__ == "__main__":
    entry_point()
