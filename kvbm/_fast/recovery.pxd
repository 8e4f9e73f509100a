# SPDX-License-Identifier: Apache-2.0
from kvbm._fast.layout cimport kv_view

cdef int recover_view(kv_view *view, int fd, bint always_rebuild) noexcept nogil
