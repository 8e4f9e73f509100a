# SPDX-License-Identifier: Apache-2.0
from kvbm._fast.segment import Segment

def recover(segment: Segment, rebuild: bool = False) -> int: ...
