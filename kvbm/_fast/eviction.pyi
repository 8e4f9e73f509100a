# SPDX-License-Identifier: Apache-2.0
"""The order of eviction; used through cimport, nothing for Python."""
