# SPDX-License-Identifier: Apache-2.0
"""Policies: which of the blocks that may be evicted goes first.

``policy``
    What a policy is, and how a leader gets the one that `DYN_KVBM_EVICTION_POLICY` names.
``reuse``
    One that learns which requests are continued, and when.

The mechanism is in `kvbm._fast.ranks`; docs/eviction.md is for readers.
"""
