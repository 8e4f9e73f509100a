# SPDX-License-Identifier: Apache-2.0
"""Orders of eviction on trial: what could be won over least recently used, and with what knowledge.

``python -m bench.eviction TRACE --capacity 1k,10k``; results in bench/results/replay.md.
"""
