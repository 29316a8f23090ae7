"""The runs whose programs (`grpo.compiled.functions`) are lowered and compiled for AMD GPUs: full
sizes, abstract arguments.
"""

import dataclasses

from configs import wan21_14b_ocr
from grpo.compiled.functions import Functions
from grpo.run import RunSpec
from grpo.settings import parse
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models import presets


@dataclasses.dataclass(frozen=True)
class Case:
    """One of the runs that are lowered and compiled: the recipe of single frames, 9 videos a
    device, at this size.
    """

    model: str  # of `presets.PRESETS`
    lora: bool  # or all weights
    devices: int  # 8: a mesh of data 2 x fsdp 4
    video: bool = False  # 33 x 240 x 416 instead of 1 x 512 x 512
    method: str = "grpo"

    def __str__(self) -> str:
        trained, size = "lora" if self.lora else "full", "33x240x416" if self.video else "1x512x512"
        method = "" if self.method == "grpo" else f"-{self.method}"
        return f"{self.model}-{trained}-{size}-{self.devices}{method}"

    def run(self, devices: list, backend: str, **values) -> Functions:
        """Return the jitted functions on the first of `devices`, which may be those of a topology.

        values: {'section.key': value} of the recipe that differ.
        """
        config = wan21_14b_ocr.get_config()
        config.train.method = self.method
        config.sample.batch_size = 9 * self.devices
        if self.video:
            config.sample.frames, config.sample.height, config.sample.width = 33, 240, 416
        if not self.lora:
            config.lora.rank = 0
        config.update_from_flattened_dict(values)
        mesh = mesh_lib.make_mesh(
            fsdp=4 if self.devices == 8 else 1, devices=devices[: self.devices]
        )
        recipe = parse.recipe_from_config(config)
        settings, preset = parse.settings_of(recipe), presets.PRESETS[self.model]
        return Functions(RunSpec(recipe, settings, preset, mesh, backend))


CASES = [
    Case(model, lora, devices)
    for model in ("wan2.1-1.3b", "wan2.1-14b")
    for lora in (True, False)
    for devices in (1, 8)
    if lora or devices == 8 or model == "wan2.1-1.3b"
]
CASES += [
    Case("wan2.1-1.3b", True, 1, True),
    Case("wan2.1-1.3b", True, 8, True),
    Case("wan2.1-14b", True, 1, True),
    Case("wan2.1-1.3b", True, 1, method="nft"),
    Case("wan2.1-14b", False, 8, method="nft"),
]
# its weights, moments and average alone are more than a device has
TOO_LARGE = Case("wan2.1-14b", False, 1)
