"""``python -m pycert.cli`` is the program ``pycert``."""

import sys

from pycert.cli import main

if __name__ == "__main__":
    sys.exit(main())
