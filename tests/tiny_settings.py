"""Settings that tests of training share: a narrow network for 32 px in float32 on one thread, and nothing tracked."""

from common import config
from common.settings import Settings


def changed(settings: Settings, **values: object) -> Settings:
    """The settings with other values, all checked together; values: section__key."""
    raw = config.to_mapping(settings)
    for name, value in values.items():
        section, _, key = name.partition("__")
        raw[section][key] = value
    return config.from_mapping(raw)


TINY = changed(
    Settings(),
    data__image_size=32,
    model__backbone="cnn",
    model__embedding_size=16,
    model__width=0.25,
    training__batch_size=8,
    training__precision="float32",
    training__memory_format="contiguous",
    training__threads=1,
    training__device="cpu",
    federation__rounds=2,
    federation__local_epochs=1,
    tracking__enabled=False,
    tracking__plots="none",
    tracking__tensorboard="none",
    tracking__system_metrics_s="off",
)
