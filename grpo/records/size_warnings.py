"""What a run prints about videos below the size that its model is published for."""

from grpo.run import RunSpec
from grpo.settings.schema import TEXT_AREA, measured_rewards
from wan_jax.models import presets

LEAST_LETTER = 10  # pixels: OCR engines do not read letters that are much smaller


def size_warnings(spec: RunSpec) -> list[str]:
    """Return a line about the sizes of a run that are below the smallest one that its model is
    published for; [] where there are none, or the model is no published one.
    """
    name = presets.name_of(spec.preset)
    if name is None:
        return []
    sampling = presets.PRESETS[name].sampling
    sizes = {(size.height, size.width): 0 for size in (*spec.trained_sizes, *spec.evaluated_sizes)}
    below = [(size, smallest) for size in sizes if (smallest := sampling.below(*size))]
    if not below:
        return []
    smallest = below[0][1]
    shown = ", ".join(f"{height} x {width}" for (height, width), _ in below)
    line = (
        f"warning: {shown}: {name} is published for {smallest[0]} x {smallest[1]} and more "
        f"({sampling.source})"
    )
    if sampling.breaks_below:
        line += f", and below that its videos are reported to break ({sampling.breaks_below})"
    measured = measured_rewards(spec.recipe)
    if "ocr" in measured and TEXT_AREA not in measured:
        line += (
            f". OCR does not read letters below some {LEAST_LETTER} pixels, so that small videos teach "
            f"larger letters: reward.panel with {TEXT_AREA} shows it (docs/howto/sizes.md)"
        )
    return [line]
