"""The atlas: every feature described, labelled and laid out to browse, as pages and as tables.

from pipeline.atlas import Atlas
atlas = Atlas.open("artifacts/laptop/atlas")
atlas.features                    a data frame, one row a feature
atlas.label_of("L12/402")
"""

from pipeline.atlas.attach import attach_steering
from pipeline.atlas.opened import Atlas, diff_atlases

__all__ = ["Atlas", "attach_steering", "diff_atlases"]
