# SPDX-License-Identifier: Apache-2.0
"""Measurements on a machine with a CUDA device; none of them is a test."""
