"""The ConfigDict that every recipe begins with: all settings with their defaults.

docs/settings.md explains every setting (`python -m grpo.settings` prints it, `python -m
grpo.settings kl` the settings of a word). The method is DiffusionNFT, which learnt fastest of all on
the small Wan (docs/results.md, "Methods under one budget"). With train.method=grpo the defaults are
Flow-GRPO's published settings for Wan 2.1 (`general_ocr_wan2_1`).
"""

import ml_collections
from absl import flags
from ml_collections import config_flags

from grpo.settings.schema import SETTINGS

ConfigDict = ml_collections.ConfigDict


class _OrNone:
    """Parses 'None' and nothing, on the command line, as None. `grpo.settings.validation` refuses it
    where it is not a value.
    """

    def parse(self, argument):
        return None if argument in ("None", "") else super().parse(argument)


class _FloatOrNone(_OrNone, flags.FloatParser):
    pass


class _IntegerOrNone(_OrNone, flags.IntegerParser):
    pass


config_flags.register_flag_parser_for_type(float, _FloatOrNone())
config_flags.register_flag_parser_for_type(int, _IntegerOrNone())


def defaults() -> ConfigDict:
    """Returns a new ConfigDict of all settings. Optional ones are None and keep their type."""
    c = ConfigDict()
    for key, entry in SETTINGS.items():
        *sections, name = key.split(".")
        place = c
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[name] = (
            ml_collections.config_dict.placeholder(entry.kind) if entry.optional else entry.default
        )
    return c
