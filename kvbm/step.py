# SPDX-License-Identifier: Apache-2.0
"""What a leader tells its workers with each engine step.

The rows of a transfer are in the segment; the engine's metadata channel carries only which step this is, which
operations a worker has to report on, and which it has to stop.
"""

from dataclasses import dataclass, field


@dataclass
class StepMetadata:
    """One step's message, pickled by the engine.

    Attributes
    ----------
    step : int
        Number of the step, growing by one. A load of step s may begin when this arrives, a store of step s when
        the forward pass of this step is done.
    loads : dict of str to list of int
        Requests whose blocks begin to load, with the handles of their operations: report them when the loads
        have ended on this rank.
    held : dict of str to list of int
        Finished requests whose device blocks are kept until these stores have ended on this rank.
    failed_loads : dict of str to list of int
        Requests whose load could not be submitted, with the device blocks that must be recomputed.
    stop : list of int
        Stores whose device blocks are about to be overwritten: stop them before the forward pass.
    """

    step: int = 0
    loads: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, list[int]] = field(default_factory=dict)
    failed_loads: dict[str, list[int]] = field(default_factory=dict)
    stop: list[int] = field(default_factory=list)
