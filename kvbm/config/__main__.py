# SPDX-License-Identifier: Apache-2.0
"""``python -m kvbm.config``; see `kvbm.config.table`."""

import signal
import sys

from kvbm.config.table import main

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, quietly
sys.exit(main())
