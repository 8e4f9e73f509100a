# SPDX-License-Identifier: Apache-2.0
"""Many processes on one segment, with crashes: nothing wrong, nothing lost, nothing leaked."""
