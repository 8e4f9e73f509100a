# SPDX-License-Identifier: Apache-2.0
"""Digest to block; used through cimport, nothing for Python."""
