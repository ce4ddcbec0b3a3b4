"""All architectures of the table."""

from __future__ import annotations

from tests.architectures.others import SERIES, SOUND, VISION
from tests.architectures.text import DECODERS, ENCODER_DECODERS, ENCODERS

KINDS = {
    "encoders of text": ENCODERS,
    "decoders of text": DECODERS,
    "encoder-decoders of text": ENCODER_DECODERS,
    "pictures": VISION,
    "speech": SOUND,
    "time series": SERIES,
}
ARCHITECTURES = {architecture.name: architecture for kind in KINDS.values() for architecture in kind}
