# SPDX-License-Identifier: Apache-2.0
"""The demo: vLLM with and without kvbm on a multi-turn workload, ``python -m bench.demo``."""
