"""`python -m aezoo` is the same as `aezoo`."""

from aezoo.cli.main import main

if __name__ == "__main__":
    main()
