"""Pipelines that denoise several times in one call, by a loop for each."""

from __future__ import annotations

from typing import Any

from . import STEPS, Entry
from . import animatediff as animate
from .sd_variants import UNET, depth, marigold


def free_init() -> Any:
    """Begins anew from the video that it made, with the high frequencies of other noise."""
    pipe = animate.pipeline()
    pipe.enable_free_init(num_iters=2)
    return pipe


def intrinsics() -> Any:
    targets = {"target_names": ["albedo", "material"]}
    return marigold("Intrinsics", targets=2, target_properties=targets)


MARIGOLD: dict[str, Any] = {**UNET, "form": "none", "output": "latent", "loop": STEPS}

ENTRIES = [
    Entry("AnimateDiffPipeline FreeInit", free_init, animate.text_to_video, loop=STEPS, **animate.UNET),
    Entry("MarigoldDepthPipeline ensemble", marigold, lambda: depth(ensemble_size=3), **MARIGOLD),
    Entry("MarigoldNormalsPipeline ensemble", lambda: marigold("Normals"), lambda: depth(ensemble_size=3), **MARIGOLD),
    # The last loop has one row, those before two.
    Entry(
        "MarigoldNormalsPipeline uneven ensemble",
        lambda: marigold("Normals"),
        lambda: depth(ensemble_size=3, batch_size=2),
        graphs=4,
        **MARIGOLD,
    ),
    Entry("MarigoldIntrinsicsPipeline", intrinsics, depth, **{**MARIGOLD, "loop": None}),
]
