# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of an instance, and the hit rates of its requests. See docs/metrics.md.

The counters are in the segment, so one exporter shows those of all engines and ranks that share an
instance, and they go on where a process ends. `python -m kvbm.metrics` is an exporter of its own;
with `DYN_KVBM_METRICS` an engine's scheduler process has one.
"""
