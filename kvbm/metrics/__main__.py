# SPDX-License-Identifier: Apache-2.0
"""``python -m kvbm.metrics [INSTANCE ...]``: an exporter beside the engines."""

from __future__ import annotations

import argparse
import sys

from kvbm.closing import end_asked_for
from kvbm.config import load_settings
from kvbm.errors import ConfigError
from kvbm.instance import instances
from kvbm.metrics.exporter import ADDRESS, Exporter


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvbm.metrics",
        description="Serve the metrics of kvbm instances on this host, for Prometheus.",
        epilog="The hit rates over the last requests are in the engines' own exporters alone.",
    )
    parser.add_argument("instances", nargs="*", metavar="INSTANCE", help="default: all")
    parser.add_argument("--port", type=int, help="default: DYN_KVBM_METRICS_PORT, or 6880")
    parser.add_argument("--address", default=ADDRESS, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        port = load_settings().metrics_port if args.port is None else args.port
        chosen = args.instances
        exporter = Exporter(lambda: chosen or list(instances()), port, None, args.address)
    except (ConfigError, OSError, OverflowError) as error:
        print(f"kvbm.metrics: {error}", file=sys.stderr)
        return 1
    with end_asked_for() as wait:
        print(f"serving on {args.address}:{exporter.port}/metrics", flush=True)
        wait()
        exporter.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
