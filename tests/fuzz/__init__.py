# SPDX-License-Identifier: Apache-2.0
"""Hostile and corrupt segments, thousands of them: no crash, no hang; each is refused or bounded.

`python -m tests.fuzz` makes cases from seeds (`cases`), puts each into shared memory (`world`), and
walks through it as leaders, workers, recoverers and readers do (`steps`, `readers`, `disk`), in
processes of which `server` notices every end.
"""
