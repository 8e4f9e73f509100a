# SPDX-License-Identifier: Apache-2.0
"""What a tier is made of: memory or files that hold the bytes of blocks."""
