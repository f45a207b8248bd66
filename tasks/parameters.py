"""What flows take as parameters."""

from __future__ import annotations

from semids.config import BuildConfig, SweepConfig, read_config
from semids.stages import Ref

__all__ = ["BuildConfig", "Ref", "SweepConfig", "read_config"]
