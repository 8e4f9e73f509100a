# SPDX-License-Identifier: Apache-2.0
"""``python -m kvbm.config``; see `kvbm.config.table`."""

import sys

from kvbm.config.table import main

sys.exit(main())
