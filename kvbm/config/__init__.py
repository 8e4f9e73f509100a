# SPDX-License-Identifier: Apache-2.0
"""The settings of a process.

``settings``
    What can be set: one field a tunable.
``loading``
    Reads them from vLLM's ``kv_connector_extra_config``, else the environment, else the default.
``kinds``, ``sizes``
    What a value may be, and how gigabytes become slots.
``table``
    The table in ``docs/configuration.md``, which has the rules, and the command line::

        python -m kvbm.config                                  the table, in Markdown
        python -m kvbm.config --update docs/configuration.md   put it into that page
        python -m kvbm.config --json                           the settings in effect here
"""

from kvbm.config.kinds import Status, Tunable
from kvbm.config.loading import load_settings
from kvbm.config.settings import Settings, tunables

__all__ = ["Settings", "Status", "Tunable", "load_settings", "tunables"]
