"""Threshold-guided optimisation (TGO, Bai et al., arXiv 2605.04653): a video is good or bad by its
score alone, without a pair.

With data.only it trains on given ratings, as published; otherwise on the videos of an epoch with
their rewards.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo.credit import Credit
from grpo.data.labels import RATINGS
from grpo.learning.flow_matching import FlowMatching, check_range
from grpo.learning.selection import Selection
from grpo.learning.velocity_loss import Rows, mean_square
from grpo.settings.schema import Recipe

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TGO(FlowMatching):
    """Trains on all videos, each on its side of the median score (`signed_confidence`).

    Attributes:
        temperature: train.tgo_temperature, T.
        confidence: train.tgo_confidence, c.
    """

    temperature: float = 1e-3
    confidence: float = 5.0

    name = "tgo"
    reads = (
        *FlowMatching.reads,
        "train.tgo_temperature",
        "train.tgo_confidence",
        "train.max_velocity_distance",
    )
    distances = ("kl",)
    logs = ("agreed",)  # share of the videos whose h is on their side
    of_data = RATINGS

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "temperature")
        check_range(self, "confidence", least=0)

    @classmethod
    def settings(cls, recipe: Recipe) -> dict:
        train = recipe.train
        return {
            "temperature": train.tgo_temperature,
            "confidence": train.tgo_confidence,
            "kl_weight": 0.0,  # the reference is part of the loss
        }

    @property
    def needs_reference(self) -> bool:
        return True

    def select(self, credit: Credit, group_size: int) -> Selection:
        weight = np.ones(len(credit.value), np.float32)
        weight[credit.spread] = self.rated_weights(credit.value[credit.spread])
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def rated_weights(self, scores: np.ndarray) -> np.ndarray:
        return signed_confidence(scores, self.confidence)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        assert rows.v_reference is not None, "needs_reference"
        excess = rows.error - mean_square(rows.v_reference - rows.target, rows.cells)
        score = -excess / self.temperature
        return tgo_loss(score, rows.weight), {"agreed": score * rows.weight > 0}


def signed_confidence(scores: np.ndarray, confidence: float) -> np.ndarray:
    """Return w where a score is at least the median of all, -w where it is below, float32 [N], with
    w = 1 + c |s - median| (arXiv 2605.04653, section 3). scores s: [N]. confidence: c.
    """
    if not len(scores):
        return np.ones(0, np.float32)
    threshold = np.median(scores)
    weight = 1 + confidence * np.abs(scores - threshold)
    return np.where(scores >= threshold, weight, -weight).astype(np.float32)


def tgo_loss(score: Array, weight: Array) -> Array:
    """Return -w (l log sigmoid(h) + (1 - l) log(1 - sigmoid(h))), [B] (arXiv 2605.04653, eq. 10, with
    beta 1).

    score h [B]: (the reference's error - the policy's error) / T. weight [B]: w where the label l is
    1, -w where it is 0.
    """
    return -jnp.abs(weight) * jax.nn.log_sigmoid(jnp.sign(weight) * score)


METHOD = TGO
