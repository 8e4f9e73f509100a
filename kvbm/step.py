# SPDX-License-Identifier: Apache-2.0
"""What a leader tells its workers with each engine step.

The rows of a transfer are in the segment; the engine's metadata channel carries only which step
this is, which operations a worker has to report on, and which it has to stop.
"""

from dataclasses import dataclass, field


@dataclass
class LoadOrder:
    """One request's load, as a worker has to report it.

    Attributes
    ----------
    handles : list of int
        Operations of the load.
    device_blocks : list of int
        All device blocks that it fills, of all groups.
    failed : bool
        Some of it could not be submitted: once the operations have ended, all of `device_blocks`
        are to be reported as not loaded.
    """

    handles: list[int] = field(default_factory=list)
    device_blocks: list[int] = field(default_factory=list)
    failed: bool = False


@dataclass
class StepMetadata:
    """One step's message, pickled by the engine.

    Attributes
    ----------
    step : int
        Number of the step, growing by one. A load of step s may begin when this arrives, a store of
        step s when the forward pass of this step is done.
    loads : dict of str to LoadOrder
        Requests whose blocks begin to load: report them when the load has ended on this rank.
    held : dict of str to list of int
        Finished requests whose device blocks are kept until these stores have ended on this rank.
    stop : list of int
        Cancelled stores whose device blocks are about to be overwritten: wait for the copy in
        progress before the forward pass.
    """

    step: int = 0
    loads: dict[str, LoadOrder] = field(default_factory=dict)
    held: dict[str, list[int]] = field(default_factory=dict)
    stop: list[int] = field(default_factory=list)
