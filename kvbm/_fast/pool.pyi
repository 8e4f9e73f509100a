# SPDX-License-Identifier: Apache-2.0
"""Free block records and free slots; used through cimport, nothing for Python."""
