"""What a model costs, as the sections of a record: the only place that makes them."""

import dataclasses
from typing import Any

from bench.config.schema import ProfileConfig
from bench.measure import flops, published
from bench.model.detectors import Detector


def flops_section(detector: Detector, profile: ProfileConfig) -> dict[str, Any]:
    """Return the `flops` section of a record."""
    height, width = profile.image_size
    report = flops.count(detector, image_size=(height, width), proposals=profile.proposals)
    return {
        **dataclasses.asdict(report),
        "unit": flops.UNIT,
        "published": published.section(
            detector, image_size=report.image_size, proposals=profile.proposals
        ),
    }
