"""`python -m xform`."""

import sys

from xform.cli import main

sys.exit(main())
