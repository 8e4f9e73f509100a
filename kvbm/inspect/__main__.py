# SPDX-License-Identifier: Apache-2.0
"""``python -m kvbm.inspect``: see `kvbm.inspect.cli`."""

import signal
import sys

try:
    import click  # noqa: F401
except ImportError:
    print(
        "python -m kvbm.inspect needs click: install it, or kvbm with its extra: "
        "pip install 'kvbm[inspect]'",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    from kvbm.inspect.cli import main

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, quietly
    main(prog_name="python -m kvbm.inspect")
