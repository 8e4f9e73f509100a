# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on a device."""

from tests.fast.conftest import make_instance

__all__ = ["make_instance"]
