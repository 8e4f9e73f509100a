# SPDX-License-Identifier: Apache-2.0
"""The disk tier beside plain I/O on the same disk: ``python -m bench.disk``."""
