"""The ConfigDict that every recipe begins with: all settings with their defaults.

docs/reference/settings.md explains every setting (`python -m grpo.settings` prints it, `python -m
grpo.settings kl` the settings of a word). The method is DiffusionNFT, which learnt fastest of all on
the small Wan (docs/results.md, "Methods under one budget"). With train.method=grpo the defaults of
the optimiser and the loss are Flow-GRPO's for Wan 2.1 (`general_ocr_wan2_1`); configs/published has
whole published runs.
"""

import ast
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags
from ml_collections.config_flags import tuple_parser

from grpo.settings.schema import SETTINGS


class _OrNone(flags.ArgumentParser):
    """Parses 'None' and nothing, on the command line, as None. `grpo.settings.validation` refuses it
    where it is not a value.
    """

    def parse(self, argument):
        return None if argument in ("None", "") else super().parse(argument)


class _FloatOrNone(_OrNone, flags.FloatParser):
    pass


class _IntegerOrNone(_OrNone, flags.IntegerParser):
    pass


class _Tuple(tuple_parser.TupleParser):
    """Parses A,B and (A,B) on the command line as the texts 'A' and 'B', besides Python's own forms;
    nothing is the empty tuple. A text with a comma in it is in quotes, as in Python.
    """

    def parse(self, argument):
        if not isinstance(argument, str):
            return super().parse(argument)
        try:
            ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            if "," in argument and re.search("['\"]", argument):
                raise ValueError("put quotes around each of its texts, or around none") from None
            inner = re.fullmatch(r"\s*[(\[](.*)[)\]]\s*", argument)
            texts = (inner[1] if inner else argument).split(",")
            return tuple(filter(None, map(str.strip, texts)))
        return super().parse(argument)


config_flags.register_flag_parser_for_type(float, _FloatOrNone())
config_flags.register_flag_parser_for_type(int, _IntegerOrNone())
config_flags.register_flag_parser_for_type(tuple, _Tuple())


def defaults() -> Any:
    """Returns a new ConfigDict of all settings. Optional ones are None and keep their type.

    Any, because the annotations of ConfigDict allow no `config.section.name = value`.
    """
    config = ConfigDict()
    for key, entry in SETTINGS.items():
        *sections, name = key.split(".")
        place: Any = config
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        if entry.named:  # a dict in a recipe, a text on the command line
            place[name] = config_dict.FieldReference(entry.default, field_type=object)
        elif entry.optional:
            place[name] = config_dict.FieldReference(entry.default, field_type=entry.kind)
        else:
            place[name] = entry.default
    return config
