"""Environments: several turns of one answer. `ENVIRONMENTS` is the table of the known ones, `TOOLS` that of tools."""

from __future__ import annotations

from foveate.environments.observe import observation
from foveate.environments.protocol import Environment, Observation, Step

__all__ = ["ENVIRONMENTS", "TOOLS", "Environment", "Observation", "Step", "observation"]

_HERE = "foveate.environments"

ENVIRONMENTS: dict[str, str] = {
    "tools": f"{_HERE}.tool_use:ToolUse",
    "gui": f"{_HERE}.gui:Gui",
    "trl": f"{_HERE}.trl:trl",
    "gymnasium": f"{_HERE}.gymnasium:gymnasium",
    "http": f"{_HERE}.http:http",
}

TOOLS: dict[str, str] = {
    "zoom": f"{_HERE}.look:zoom",
    "rotate": f"{_HERE}.look:rotate",
    "mark": f"{_HERE}.look:mark",
    "calculator": f"{_HERE}.calculator:calculator",
}
