"""The works of `benchmarks.side_by_side`: what both sides measure, and the targets of our side."""

import dataclasses

PEERS = {
    "autocast": "--mode=autocast",
    "bf16": "--mode=bf16",
    "bf16-compile": "--mode=bf16-compile",
    "bf16-compile-cudnn": "--mode=bf16-compile --attention=_native_cudnn",
}
OURS = {
    "ours": "",
    "ours-block": "--remat=block",
    "ours-fp8": "--weights=fp8",
    "ours-fp8-block": "--weights=fp8 --remat=block",
}
SIDES = (*OURS, *PEERS)


@dataclasses.dataclass(frozen=True)
class Target:
    """A target for one stage.

    Attributes:
        stage: name of the stage.
        kind: 'autocast' or 'best', the peer's time over ours; 'mfu'; or 'memory', the smallest
            peak memory of any peer.
        least: smallest value that reaches the target; not used by 'memory'.
    """

    stage: str
    kind: str
    least: float = 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides measure.

    Attributes:
        title: name in the table.
        module: benchmark that measures our side.
        task: task of `benchmarks.peer`.
        shape: arguments of both sides.
        stages: names of the stages.
        peers: modes of the peer, in the order in which they run.
        targets: targets of our side.
        ours: further arguments of our side.
        search: arguments of a run of our side before the measurement, for XLA's search.
        own: our variants, keys of `OURS`.
    """

    title: str
    module: str
    task: str
    shape: str
    stages: tuple[str, ...]
    peers: tuple[str, ...]
    targets: tuple[Target, ...]
    ours: str = ""
    search: str | None = None
    own: tuple[str, ...] = ("ours",)


IMAGE = "--height=512 --width=512 --frames=1 --batch=9"
SMALLER = "--height=256 --width=256 --frames=1 --batch=9"
DECODE = "--height=480 --width=832 --frames=81 --batch=1 --repeats=3"
STEPS = ("rollout", "update")
MEMORY = tuple(Target(stage, "memory") for stage in STEPS)
PARTS = ("rollout", "guided rollout", "grpo update", "nft update", "decode")
GUIDED = "--guidance=4.5 --kl=0.004 --repeats=3"
UPDATE = (
    Target("update", "autocast", 2.2),
    Target("update", "best", 2.0),
    Target("update", "mfu", 0.60),
)
WORKS = {
    "1.3b-image": Work(
        "1.3B, 9 x 1 x 512 x 512",
        "full_size",
        "steps",
        f"--size=1.3b {IMAGE}",
        STEPS,
        tuple(PEERS),
        (
            Target("rollout", "autocast", 2.5),
            Target("rollout", "best", 2.0),
            Target("rollout", "mfu", 0.65),
            *UPDATE,
            *MEMORY,
        ),
        own=tuple(OURS),
    ),
    "1.3b-clip": Work(
        "1.3B, 8 x 33 x 240 x 416",
        "full_size",
        "steps",
        "--size=1.3b --height=240 --width=416 --frames=33 --batch=8",
        STEPS,
        tuple(PEERS),
        (*UPDATE, *MEMORY),
        own=tuple(OURS),
    ),
    "14b-image": Work(
        "14B, 9 x 1 x 512 x 512",
        "full_size",
        "steps",
        f"--size=14b {IMAGE}",
        STEPS,
        ("bf16", "bf16-compile", "bf16-compile-cudnn", "autocast"),
        (
            Target("rollout", "best", 1.6),
            Target("rollout", "mfu", 0.78),
            Target("update", "best", 1.6),
            Target("update", "mfu", 0.78),
            *MEMORY,
        ),
        own=tuple(OURS),
    ),
    "decode": Work(
        "VAE in fp32, 1 x 81 x 480 x 832",
        "decode",
        "decode",
        DECODE,
        ("decode",),
        ("autocast",),
        (Target("decode", "best", 2.0), Target("decode", "memory")),
        "--dtype=float32",
        "--dtype=float32",
    ),
    "decode-bf16": Work(
        "VAE in bf16, 1 x 81 x 480 x 832",
        "decode",
        "decode",
        DECODE,
        ("decode",),
        ("bf16",),
        (Target("decode", "best", 2.0), Target("decode", "memory")),
        "--dtype=bfloat16",
        "--dtype=bfloat16",
    ),
    "epoch": Work(
        "1.3B, epoch of 3 x 12 x 1 x 512 x 512",
        "epoch",
        "epoch",
        f"--size=1.3b {IMAGE} --guidance=4.5 --kl=0.004 --groups=3 --group_size=12",
        ("epoch", "sample", "decode", "score wait", "update"),
        ("autocast", "bf16-compile", "bf16"),
        (Target("epoch", "autocast", 3.0), Target("epoch", "memory")),
        "",
        "--group_size=3 --updates=1 --steps=2 --trained=1 --epochs=1",
    ),
    "1.3b-parts": Work(
        "1.3B, 9 x 1 x 512 x 512, parts of an epoch",
        "parts",
        "parts",
        f"--size=1.3b {IMAGE} {GUIDED}",
        PARTS,
        ("autocast", "bf16-compile"),
        (),
        own=("ours", "ours-fp8"),
    ),
    "1.3b-256-parts": Work(
        "1.3B, 9 x 1 x 256 x 256, parts of an epoch",
        "parts",
        "parts",
        f"--size=1.3b {SMALLER} {GUIDED}",
        PARTS,
        ("autocast", "bf16-compile"),
        (),
        own=("ours", "ours-fp8"),
    ),
    "14b-parts": Work(
        "14B, 9 x 1 x 512 x 512, parts of an epoch",
        "parts",
        "parts",
        f"--size=14b {IMAGE} {GUIDED}",
        PARTS,
        ("bf16-compile", "autocast"),
        (),
        "--guided_remat=block",
        own=("ours", "ours-fp8"),
    ),
    "small-parts": Work(
        "tiny-wan, 32 x 1 x 64 x 128, parts of an epoch",
        "parts",
        "parts",
        "--size=small --height=64 --width=128 --frames=1 --batch=32 --guidance=2 --kl=0.004",
        PARTS,
        ("autocast", "bf16-compile"),
        (),
        "--dtype=float32 --remat=none --guided_remat=none",
    ),
}
