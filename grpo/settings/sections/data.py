"""Data that training sees besides its own videos: `data`."""

import dataclasses

from grpo.settings.choices import DATA_NOISE
from grpo.settings.setting import Section, setting
from wan_jax.command_line.limits import Range


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """Pictures or videos with their own prompts, on which every optimiser step trains too. See docs/howto/data.md."""

    path: str = setting(
        "",
        "Folder of data, written by `python -m grpo.encode_clips`. A run that is continued may name "
        "another folder with the same content. Empty: no data.",
        path=True,
        per_process=True,
    )
    weight: float = setting(
        0.01,
        "Weight of the flow-matching error on the data in the loss of any method. 0: no data.",
        bounds=Range(0),
    )
    batch_size: int | None = setting(
        None,
        "Pictures or videos of the data in every optimiser step. None: sample.batch_size.",
        bounds=Range(1),
    )
    noise: str = setting(
        "own",
        "Noise and noise levels of the data. `own`: both are drawn for them. `rollout`: they are the "
        "initial noise of the videos of the optimiser step, and the levels of its stochastic steps, as "
        "in DDRL; the data must have the size and length of the videos.",
        choices=DATA_NOISE,
        experimental=("rollout",),
    )
    only: bool = setting(
        False,
        "Whether an epoch trains on the data alone: on all items with train.method=sft, on given "
        "pairs with `dpo`, on given ratings with `tgo`. Nothing is sampled or scored between "
        "evaluations. An epoch has train.updates_per_epoch optimiser steps.",
    )
    labels: str = setting(
        "",
        'Pairs for `dpo` or ratings for `tgo` with data.only, a JSON line each: {"preferred": NAME, '
        '"rejected": NAME} or {"file": NAME, "score": NUMBER}, with names of the data\'s items. A '
        "run that is continued may name another file with the same content.",
        path=True,
        per_process=True,
    )

    @property
    def used(self) -> bool:
        """Whether training sees data."""
        return bool(self.path) and (self.only or self.weight > 0)
