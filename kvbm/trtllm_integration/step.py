# SPDX-License-Identifier: Apache-2.0
"""One step's message to the workers, which TensorRT-LLM pickles and broadcasts."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbm.step import StepMetadata


@dataclass
class EngineStep:
    """One step, as TensorRT-LLM's workers need it.

    TensorRT-LLM makes no step while nothing is scheduled, but asks its workers all the same what
    has ended. So they are told of each store when it begins, and not when its request has ended.

    Attributes
    ----------
    step : StepMetadata
        What any engine's workers are told.
    stores : dict of str to list of int
        Operations that copy from a request's device blocks after this step's forward pass.
    wait : list of int
        Loads whose device blocks other requests get with this step: TensorRT-LLM has freed them
        without telling, and the forward pass must come after the last copy into them.
    lost : list of str
        Requests whose promised load did not arrive: no forward pass may run any more.
    """

    step: StepMetadata = field(default_factory=StepMetadata)
    stores: dict[str, list[int]] = field(default_factory=dict)
    wait: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
