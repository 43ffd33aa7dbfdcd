"""`python -m dtrain` is `dtrain`."""

import sys

from dtrain.cli import main

sys.argv[0] = "dtrain"  # the name in help texts
sys.exit(main())
