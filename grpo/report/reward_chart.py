"""Draws the main reward of a run over its epochs, for the report and the model card."""

import math

from grpo.records.run_log import number, reward_name
from grpo.report.charts import COLORS
from grpo.report.run_records import RunRecords


class RewardChart:
    """The mean reward of training samples and of held-out prompts over the epochs.

    Attributes:
        training: (epoch, mean reward) of the epochs with a result.
        joined: whether the evaluations are a curve. Without training in between, as in
            `grpo.evaluate`, they are points.
        name: of the reward.
    """

    def __init__(self, run: RunRecords):
        rewards = [(m["epoch"], number(m, "reward_mean")) for m in run.metrics]
        self.training = [(e, v) for e, v in rewards if v is not None and math.isfinite(v)]
        self.evaluations = run.evaluations
        self.joined = bool(self.training) and len(run.evaluations) > 1
        self.name = reward_name(run.evaluations[-1] if run.evaluations else {})

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.training or self.evaluations)

    def draw(self, axes) -> None:
        """Plot onto matplotlib's axes, in `COLORS`."""
        if self.training:
            epochs, means = zip(*self.training)
            axes.plot(epochs, means, color=COLORS["training"], lw=1.4, label="training samples")
        if self.evaluations:
            epochs, low, high, heldout = (
                [e[key] for e in self.evaluations] for key in ("epoch", "low", "high", "reward")
            )
            if self.joined:
                axes.fill_between(epochs, low, high, color=COLORS["heldout"], alpha=0.22, lw=0)
            else:
                axes.vlines(epochs, low, high, color=COLORS["heldout"], alpha=0.4, lw=6)
            axes.plot(
                epochs,
                heldout,
                ls="-" if self.joined else "none",
                label="held-out prompts",
                color=COLORS["heldout"],
                lw=2.2,
                marker="o",
                ms=5,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(self.name)
        if self.training:
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:  # only the epochs that were evaluated
            axes.set_xticks([e["epoch"] for e in self.evaluations])
            axes.margins(x=0.2)
