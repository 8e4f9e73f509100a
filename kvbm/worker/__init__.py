# SPDX-License-Identifier: Apache-2.0
"""A worker's side: one rank's device memory, its arena and slab, and the threads that copy."""
