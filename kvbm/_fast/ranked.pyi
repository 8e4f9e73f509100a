# SPDX-License-Identifier: Apache-2.0
"""The order of eviction with a policy; used through cimport, nothing for Python."""
