# SPDX-License-Identifier: Apache-2.0
"""Look at an instance from outside: live, after a crash, or in a file. See docs/inspect.md.

Nothing here attaches, locks or writes: a segment is read as bytes and decoded by the contract of
layout.h (kvbm/_fast/contract.pyx), so no engine has to answer and a damaged segment still shows
what can be read of it.

    capture.py   the bytes of a segment, and what the kernel knows about it; snapshot files
    decode.py    bytes -> arrays of blocks, operations, participants
    report.py, tree.py, detail.py   what the commands show, as plain data
    verify.py    the invariants
    picture.py   a map of the tiers
    live.py      an open segment that is looked at again and again; top.py, top_view.py
    cli.py       the command line; text.py prints
"""
