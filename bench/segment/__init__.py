# SPDX-License-Identifier: Apache-2.0
"""The shared block table beside one table behind a mutex, by one and by many processes."""
