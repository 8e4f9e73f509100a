# SPDX-License-Identifier: Apache-2.0
"""KV events: what a router hears of one engine, its device cache and its tiers in one stream.

``model``
    Events and the tiers they name.
``msgspec_wire``
    Events as bytes.
``tracker``
    Which tiers hold which block, and what subscribers have been told of it.
``table_keys``
    By which number a block table knows a block of the engine's.
``table_source``
    What changes in the block tables.
``batch_log``
    Numbered batches, the last of them kept for subscribers that missed some.
``zmq_publisher``, ``zmq_receiver``, ``zmq_consolidator``
    Sockets, and the thread that joins all of it.
``index``
    What a subscriber makes of it.

``docs/events.md`` is the page for who subscribes. Nothing here is imported by ``import kvbm``; the
sockets need ``pip install kvbm[events]``.
"""
