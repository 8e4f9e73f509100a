# SPDX-License-Identifier: Apache-2.0
"""A model of the protocol of the shared segment, explored exhaustively.

* ``explore`` runs every interleaving of a few actors, with crashes, and reports the shortest trace
  that violates a property;
* ``cells`` is the segment: one cell for each word that the protocol names;
* ``blocks``, ``table``, ``operations`` and ``recovery`` are the protocol, step by step, under the
  names and the labels of ``kvbm/_fast/layout.h`` and of the sources beside it; ``disk_rows`` and
  ``disk`` are what moves between two tables; ``rules`` has a flag for each rule that it can break;
* ``invariants`` says what must hold after every step, and what at the end;
* ``actors`` are the processes, ``setting``, ``scenarios`` and ``disk_scenarios`` put a few of them
  together, ``mutations`` breaks one rule of the protocol at a time.

``python -m tests.model`` prints the table of bench/results/model.md.
"""
