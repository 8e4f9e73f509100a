# SPDX-License-Identifier: Apache-2.0
"""``python -m kvbm.replay``; see `kvbm.replay.command`."""

import sys

from kvbm.replay.command import main

sys.exit(main())
