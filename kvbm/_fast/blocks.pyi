# SPDX-License-Identifier: Apache-2.0
"""The life of a block; used through cimport, nothing for Python."""
