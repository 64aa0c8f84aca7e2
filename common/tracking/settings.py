"""The tracking settings as every process of a run can use them."""

from pathlib import Path

from common import config
from common.settings import Settings
from common.tracking.address import resolve_uri, shown_uri
from common.tracking.tensorboard import OFF


def with_absolute_uri(settings: Settings, base: Path) -> Settings:
    """The settings with a tracking address and a TensorBoard folder that mean the same in every process.

    Raises TrackingError.
    """
    tracking = settings.tracking
    if tracking.tensorboard != OFF:
        folder = base.resolve() / Path(tracking.tensorboard).expanduser()
        settings = config.with_value(settings, "tracking", "tensorboard", str(folder))
    if not tracking.enabled:
        return settings
    return config.with_value(settings, "tracking", "uri", resolve_uri(tracking.uri, base))


def without_secrets(settings: Settings) -> Settings:
    """The settings as others may see them, such as clients and MLflow: no user and password in the tracking address."""
    shown = shown_uri(settings.tracking.uri)
    return settings if shown == settings.tracking.uri else config.with_value(settings, "tracking", "uri", shown)
