"""The tracking settings as every process of a run can use them."""

from pathlib import Path

from common import config
from common.config import Settings
from common.tracking.address import resolve_uri


def with_absolute_uri(settings: Settings, base: Path) -> Settings:
    """The settings with a tracking address that means the same in every process.  Raises TrackingError."""
    if not settings.tracking.enabled:
        return settings
    return config.with_value(settings, "tracking", "uri", resolve_uri(settings.tracking.uri, base))
