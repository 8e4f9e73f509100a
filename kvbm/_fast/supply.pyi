# SPDX-License-Identifier: Apache-2.0
"""Records and slots for new blocks; used through cimport, nothing for Python."""
