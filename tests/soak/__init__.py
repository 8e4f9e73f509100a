# SPDX-License-Identifier: Apache-2.0
"""A soak: real vLLM under random traffic for as long as one likes, every output compared.

pool       prompts with what an engine without kvbm generates for them
traffic    what happens in the engine: requests, aborts, preemptions, resets
faults     what is broken meanwhile
usage      memory, descriptors and threads of the engine's processes
report     what came out, and whether it is good
run        starts the engines; `python -m tests.soak` is its command line
"""
