# SPDX-License-Identifier: Apache-2.0
"""KV-cache block manager for LLM engines: blocks of past prompts in host memory and beyond, over one shared segment."""
