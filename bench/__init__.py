# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, the demo, and what runs the real engine around kvbm."""
