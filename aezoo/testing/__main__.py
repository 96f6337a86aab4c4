"""What `check_ddp` launches twice: `python -m aezoo.testing FOLDER`."""

import sys
from pathlib import Path

from aezoo.testing.ranks import train_subjects

if __name__ == "__main__":
    train_subjects(Path(sys.argv[1]))
