"""`python -m fragfs` is the `fragfs` command."""

import sys

from fragfs.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
