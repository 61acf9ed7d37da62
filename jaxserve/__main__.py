"""``python -m jaxserve``: the command line where the package is on the path but not installed."""

from jaxserve.cli import main

if __name__ == "__main__":
    main()
