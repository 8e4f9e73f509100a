# SPDX-License-Identifier: Apache-2.0
"""Request traces against the real block table, on a virtual clock: ``python -m kvbm.replay``.

``trace``, ``synthetic``
    Read a trace, or make one from a seed.
``manager``
    Runs it through a `BlockTable` in a segment of its own: the code and the shared state that
    engines use. No bytes are moved.
``policies``
    What plain LRU, ARC and an optimum that knows the future would have hit.
``report``, ``plot``
    A table, JSON, and a plot of hit rate against capacity.
``command``
    The command line.
"""
