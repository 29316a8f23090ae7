"""Adds the measured parts of an epoch up to the seconds of a video, for four methods.

`benchmarks.side_by_side` measures the parts on both sides (works NAME-parts), and prints this table
below its own. With T denoising steps, K trained steps or noise levels, and batches of B videos,

    seconds a video = (T x rollout step + decoding + K x update of a step) / B

    method                 rollout            T     update             K
    Flow-GRPO              with guidance      all   grpo, with KL      T - 1
    Flow-GRPO-Fast         with guidance      all   grpo, with KL      2
    NFT                    with guidance      all   nft, with KL       4
    NFT without guidance   without guidance   all   nft, with KL       4

Encoding of prompts, waiting for scores and evaluation are left out.
"""

import dataclasses
import re

from benchmarks.comparison_works import OURS, WORKS, Work
from benchmarks.workload import STEPS, Record

SMALL_STEPS = 10  # of configs/tiny_grpo.py
HEAD = (
    "work",
    "method",
    "ours",
    "(T x rollout + decode + K x update) / B, ms",
    "ours, s a video",
    "peer autocast, s",
    "compiled bf16, s",
    "x autocast",
    "x compiled",
)


@dataclasses.dataclass(frozen=True)
class Method:
    """What an epoch of a method consists of. trained: number of trained steps or levels of a video;
    None: all steps but one.
    """

    title: str
    rollout: str
    update: str
    trained: int | None = None

    def counts(self, steps: int) -> tuple[int, int]:
        """Return (T, K)."""
        return steps, steps - 1 if self.trained is None else self.trained


METHODS = (
    Method("Flow-GRPO", "guided rollout", "grpo update"),
    Method("Flow-GRPO-Fast", "guided rollout", "grpo update", 2),
    Method("NFT", "guided rollout", "nft update", 4),
    Method("NFT without guidance", "rollout", "nft update", 4),
)


def sizes(name: str, work: Work) -> tuple[int, int]:
    """Return (T, B) of a work."""
    batch = re.search(r"--batch=(\d+)", work.shape)
    assert batch is not None, work.shape
    return SMALL_STEPS if name.startswith("small") else STEPS, int(batch[1])


def seconds(method: Method, record: Record, steps: int, batch: int) -> float:
    """Return the seconds of a video."""
    rollouts, updates = method.counts(steps)
    stages = record.stages
    total = rollouts * stages[method.rollout].ms + stages["decode"].ms
    return (total + updates * stages[method.update].ms) / batch / 1000


def formula(method: Method, record: Record, steps: int, batch: int) -> str:
    """Return the sum with the measured milliseconds."""
    rollouts, updates = method.counts(steps)
    ms = {name: f"{stage.ms:.1f}" for name, stage in record.stages.items()}
    return (
        f"({rollouts} x {ms[method.rollout]} + {ms['decode']} + {updates} x {ms[method.update]}) "
        f"/ {batch}"
    )


def rows(name: str, records: dict[str, Record]) -> list[str]:
    """Return the rows of a work. records: by side."""
    steps, batch = sizes(name, WORKS[name])
    lines = []
    for method in METHODS:
        peers = [
            seconds(method, records[side], steps, batch) if side in records else None
            for side in ("autocast", "bf16-compile")
        ]
        for own in (side for side in records if side in OURS):
            ours = seconds(method, records[own], steps, batch)
            cells = [
                WORKS[name].title.removesuffix(", parts of an epoch"),
                method.title,
                own,
                formula(method, records[own], steps, batch),
                f"{ours:.3f}",
                *("" if peer is None else f"{peer:.3f}" for peer in peers),
                *("" if peer is None else f"{peer / ours:.2f}" for peer in peers),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(results: dict[str, dict]) -> str:
    """Return the table in Markdown; '' where no parts were measured. results: of `side_by_side`."""
    lines = []
    for name in (name for name in WORKS if name in results and WORKS[name].task == "parts"):
        sides = {side: v for side, v in results[name].items() if "failed" not in v}
        lines += rows(name, {side: Record.from_dict(v) for side, v in sides.items()})
    if not lines:
        return ""
    head = ["| " + " | ".join(HEAD) + " |", "|---|---|---|---|" + "--:|" * (len(HEAD) - 4)]
    return "\n".join([*head, *lines])
