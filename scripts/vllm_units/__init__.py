# SPDX-License-Identifier: Apache-2.0
"""vLLM's own connector unit tests with kvbm's connector: see ``scripts/vllm_unit_tests.py``."""
