"""`python -m models.store`, see `command_line`."""

import sys

from models.store.command_line import main

if __name__ == "__main__":
    sys.exit(main())
