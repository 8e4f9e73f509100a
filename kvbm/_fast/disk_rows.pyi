# SPDX-License-Identifier: Apache-2.0
"""One block between a host slot and a disk slot; through cimport, nothing for Python."""
