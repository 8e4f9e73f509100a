# SPDX-License-Identifier: Apache-2.0
"""Runs the real vLLM around a KV connector and says whether its outputs changed.

model      writes a small Llama with random weights whose outputs depend on every KV row
workload   multi-turn conversations, replays and the other phases of a run
engine     starts an engine in a fresh process, follows it, ends it
child      what happens in that process
counters   the engine's and kvbm's counters
results    what comes back
compare    equal outputs or where they part
faults     what tests do to a cache to see that the comparison can fail
probes     what tests ask of an engine beyond requests

Nothing here imports vLLM or torch in the caller's process.
"""
