"""`python -m pws`."""

import sys

from pws.cli import main

sys.exit(main())
