# SPDX-License-Identifier: Apache-2.0
"""Operations and rings; used through cimport, nothing for Python."""
