"""`python -m aezoo` is the same as `aezoo`."""

from aezoo.cli import main

if __name__ == "__main__":
    main()
