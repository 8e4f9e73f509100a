# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: what is found, stored and loaded, and when; no bytes pass here.

`leader.Leader` is what an engine's connector drives; a `sequences.Sequence` is what it knows of one
request. Beside them, one module for each question: what is stored late (`late_stores`), whether a
request waits for a store that is under way (`arrivals`), whether loading pays (`rates`), what
happens after failures (`load_failures`, `failure_pause`), who is alive (`liveness`), what goes to
disk and comes back (`disk_tier`, `disk_transfers`, `disk_opening`), and what is recorded
(`recorder`).
"""
