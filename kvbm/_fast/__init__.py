# SPDX-License-Identifier: Apache-2.0
"""Compiled core: the shared segment and everything that must not wait for the interpreter."""
