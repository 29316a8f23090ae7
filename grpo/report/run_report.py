"""One page that says what a run achieved: `report.html`, readable anywhere without a network.

    python -m grpo.report --run runs/tiny_ocr

Made from the run folder's files alone (`grpo.records.run_log` lists them), so it can be rebuilt at
any time, also of a run that was cut short. Pictures are embedded; all text is escaped.
"""

import html
import math
import pathlib
from collections.abc import Callable

import numpy as np

from grpo.records import run_log
from grpo.records.run_log import EXPERTS, number
from grpo.records.statistics import paired_difference
from grpo.report.charts import chart
from grpo.report.page import COLORS, page, table
from grpo.settings.budget import Budget, Spent
from rewards.ocr.targets import TargetError, parse_targets
from wan_jax.storage import media

MEDIA_BYTES = 7_000_000  # of all embedded pictures together, so that the page stays below 10 MB
SURE = "95\N{NO-BREAK SPACE}%"  # confidence of every interval
FPS = 16
VISIBLE = 192  # pixels: smaller pictures are enlarged to about this height
STAGES = {
    "sample": "sampling",
    "decode": "VAE decoding",
    "score_wait": "waiting for scores",
    "update": "policy update",
    "save": "checkpoints",
}
HEALTH = {  # metric: (name, the worse direction, what to expect)
    "ratio_max_error": (
        "first update's |ratio − 1|",
        max,
        "0 but for rounding: sampling and update agree",
    ),
    "clip_fraction": (
        "ratios clipped or left out",
        max,
        "a share of 0 to 1; near 1 nothing is learnt",
    ),
    "approx_kl": ("KL to the sampling policy", max, "small and steady"),
    "kl": ("KL to the reference model", max, "grows slowly"),
    "flow_error": ("flow-matching error", max, "no jumps; depends on the noise levels drawn"),
    "preferred": ("pairs ordered rightly", min, "a share of 0 to 1; 0 at first, then above 1/2"),
    "grad_norm": ("gradient norm", max, "no jumps; before clipping"),
    "policy_loss": ("policy loss", max, "no trend to expect: advantages are centred"),
    "group_std": ("reward spread within groups", min, "the learning signal; 0 teaches nothing"),
    "zero_std_fraction": (
        "groups without spread",
        max,
        "a share of 0 to 1; near 1 nothing is learnt",
    ),
    "failed_scores": ("failed scores", max, "0; such videos are masked, not punished"),
    "nonfinite_videos": ("videos that are not finite", max, "0; they are among the failed scores"),
}


def write_report(folder) -> pathlib.Path:
    """Writes `folder`/report.html of what can be read there, and returns its path. Raises
    FileNotFoundError without a run folder.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    metrics, config = run_log.read_metrics(folder), run_log.read_config(folder)
    every = run_log.read_evaluations(folder)
    evaluations = comparable(every)
    write_pairs(folder, evaluations)
    sections = [
        ("", _headline(evaluations, metrics, config, every)),
        ("Reward", _reward_chart(evaluations, metrics)),
        ("Before and after" if evaluations[1:] else "Samples", _pictures(folder, evaluations)),
        ("Every held-out prompt", _prompt_table(evaluations)),
        ("Where the time went", _timings(metrics, evaluations)),
        ("Training health", _health(metrics)),
        ("Settings", _settings(config)),
        ("Run it again", _command(config)),
    ]
    name = folder.resolve().name
    text = page(
        f"{name}: GRPO report",
        html.escape(name),
        [(title, body) for title, body in sections if body],
    )
    path = folder / "report.html"
    run_log.write_atomically(path, text.encode(errors="replace"))
    return path


def write_pairs(folder: pathlib.Path, evaluations: list[dict]) -> None:
    """Writes `folder`/side_by_side/000.png or .mp4 and so on: the first prompts' samples of the
    first evaluation on the left, of the last one on the right; the same prompt and noise. Nothing
    where there are no two to compare.
    """
    sides = _previews(folder, evaluations)
    if len(sides) < 2 or sides[0][1].shape[1:] != sides[1][1].shape[1:]:
        return
    pairs = folder / "side_by_side"
    pairs.mkdir(exist_ok=True)
    for i, (before, after) in enumerate(zip(sides[0][1], sides[1][1])):
        frames, height = before.shape[:2]
        media.write(
            pairs / f"{i:03d}.{'mp4' if frames > 1 else 'png'}",
            media.side_by_side(before, after),
            min(FPS, frames),
            max(1, -(-VISIBLE // height)),
        )


def _previews(folder: pathlib.Path, evaluations: list[dict]) -> list[tuple[dict, np.ndarray]]:
    """The first and the last evaluation with their videos uint8 [n, T, H, W, 3], of those that have
    any.
    """
    return [
        (e, v)
        for e in (evaluations[:1] + evaluations[1:][-1:])
        if (v := run_log.read_previews(folder, e["epoch"])) is not None
    ]


def summary_lines(folder) -> list[str]:
    """What to print at the end of a run: the result, and where its report is."""
    every = run_log.read_evaluations(folder)
    evaluations = comparable(every)
    path = pathlib.Path(folder, "report.html")
    missing = without_result(every)
    warning = [f"warning: {missing}"] if missing else []
    if not evaluations:
        return [
            "no held-out evaluation was recorded"
            if not every
            else "no held-out evaluation has a result",
            *warning,
            f"report: {path}",
        ]
    first, last = evaluations[0], evaluations[-1]
    if len(evaluations) == 1:
        result = (
            f"{last['reward']:.2f} (95 % CI {_interval(last)}, {last['num']} held-out prompts; "
            "one evaluation so far)"
        )
    else:
        result = (
            f"{first['reward']:.2f} -> {last['reward']:.2f} (95 % CI {_interval(first)} -> "
            f"{_interval(last)}, {last['num']} held-out prompts; intervals {_overlap(first, last)})"
        )
    return [f"OCR reward {result}", *warning, f"report: {path}"]


def comparable(evaluations: list[dict]) -> list[dict]:
    """Those that have a result, on the same prompts as the newest of them: a resumed run may have
    been given others.
    """
    scored = [e for e in evaluations if math.isfinite(e["reward"])]
    return [e for e in scored if e["prompts"] == scored[-1]["prompts"]]


def without_result(evaluations: list[dict]) -> str:
    """Name the evaluations that scored fewer than two videos, which are left out; "" where there
    are none.
    """
    epochs = [str(e["epoch"]) for e in evaluations if not math.isfinite(e["reward"])]
    return (
        f"no result of the evaluation after epoch {', '.join(epochs)}: fewer than two videos could "
        "be scored"
        if epochs
        else ""
    )


def _interval(evaluation: dict) -> str:
    return f"[{evaluation['low']:.2f}, {evaluation['high']:.2f}]"


def _overlap(first: dict, last: dict) -> str:
    return (
        "overlap"
        if first["low"] <= last["high"] and last["low"] <= first["high"]
        else "do not overlap"
    )


def _headline(evaluations: list[dict], metrics: list[dict], config: dict, every: list[dict]) -> str:
    """The result in one sentence, then in figures. every: also the evaluations that are not
    compared.
    """
    done, notes, tiles = len(metrics) and metrics[-1]["epoch"], [], []
    if not evaluations:
        sentence = (
            "No held-out evaluation has a result."
            if every
            else "No held-out evaluation was recorded."
        )
    elif len(evaluations) == 1:
        last = evaluations[0]
        sentence = (
            f"OCR reward {last['reward']:.2f} on {last['num']} held-out prompts, {SURE} confidence "
            f"interval {_interval(last)}."
        )
        notes.append(
            f"There is one evaluation so far, after epoch {last['epoch']}: nothing to compare it "
            "with."
        )
        tiles.append(
            (f"{last['reward']:.2f}", f"after epoch {last['epoch']}, {SURE} CI {_interval(last)}")
        )
    else:
        first, last = evaluations[0], evaluations[-1]
        sentence = (
            f"OCR reward {first['reward']:.2f} → {last['reward']:.2f} on {last['num']} held-out "
            f"prompts. The {SURE} confidence intervals {_interval(first)} and {_interval(last)} "
            f"{_overlap(first, last)}."
        )
        before, after = np.array(first["rewards"]), np.array(last["rewards"])
        tiles = [
            (f"{e['reward']:.2f}", f"after epoch {e['epoch']}, {SURE} CI {_interval(e)}")
            for e in (first, last)
        ]
        if np.isfinite(after - before).sum() >= 2:
            mean, low, high = paired_difference(before, after)
            tiles.append(
                (f"{mean:+.2f}", f"per prompt and seed, {SURE} CI [{low:+.2f}, {high:+.2f}]")
            )
        tiles.append(
            (
                f"{(after > before).sum()} : {(after < before).sum()}",
                f"prompts better : worse, {(after == before).sum()} equal",
            )
        )
    failed = evaluations[-1].get("failed_scores", 0) if evaluations else 0
    if failed:
        notes.append(
            f"{failed} of {len(evaluations[-1]['prompts'])} samples of the last evaluation could "
            "not be scored and are left out."
        )
    if missing := without_result(every):
        notes.append(f"There is {missing}.")
    others = sum(math.isfinite(e["reward"]) for e in every) - len(evaluations)
    if others:
        notes.append(f"{others} earlier evaluation(s) on other prompts are left out.")
    for name in dict.fromkeys(name for m in metrics for name in m.get("failed_rewards", {})):
        if count := sum(m.get("failed_rewards", {}).get(name, 0) for m in metrics):
            notes.append(f"{name} could not be measured for {count:,} videos of the training.")
    if (
        done
        and done < config.get("epochs", 0)
        and not Budget(**config.get("budget", {})).reached(
            Spent(metrics[-1].get("spent_evaluations", 0), metrics[-1].get("spent_seconds", 0.0))
        )
    ):
        notes.append(f"Epoch {done} of {config['epochs']}: the run is not finished.")
    if missing := run_log.ranges(
        set(range(1, max([done, *(e["epoch"] for e in evaluations)]) + 1))
        - {m["epoch"] for m in metrics}
        if metrics
        else ()
    ):
        notes.append(
            f"The log has no record of epoch(s) {missing}; curves and figures leave them out."
        )
    if metrics:
        videos = [number(m, "videos") for m in metrics]
        tiles.append(
            (
                f"{done}",
                f"epochs, {sum(v or 0 for v in videos):,} videos sampled"
                if videos[-1]
                else "epochs",
            )
        )
    figures = "".join(
        f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>'
        for v, t in tiles
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f'<p class="lead">{html.escape(sentence)}</p>{notes}' + (
        f'<div class="tiles">{figures}</div>' if tiles else ""
    )


def _reward_chart(evaluations: list[dict], metrics: list[dict]) -> str:
    points = [
        (m["epoch"], reward)
        for m in metrics
        if (reward := number(m, "reward_mean")) is not None and math.isfinite(reward)
    ]
    if not points and not evaluations:
        return ""
    # without training in between, as of grpo.evaluate, nothing leads on
    joined = bool(points) and len(evaluations) > 1

    def draw(ax):
        if points:
            ax.plot(*zip(*points), color=COLORS["training"], lw=1.4, label="training samples")
        if evaluations:
            epochs = [e["epoch"] for e in evaluations]
            band = [[e[k] for e in evaluations] for k in ("low", "high")]
            if joined:
                ax.fill_between(epochs, *band, color=COLORS["heldout"], alpha=0.22, lw=0)
            else:
                ax.vlines(epochs, *band, color=COLORS["heldout"], alpha=0.4, lw=6)
            ax.plot(
                epochs,
                [e["reward"] for e in evaluations],
                "-" if joined else "",
                color=COLORS["heldout"],
                lw=2.2,
                marker="o",
                ms=5,
                label="held-out prompts",
            )
        ax.set_xlabel("epoch")
        ax.set_ylabel("OCR reward")
        ax.xaxis.get_major_locator().set_params(integer=True)

    caption = (
        "Held-out: the averaged (EMA) weights with the deployment sampler, the same prompts and "
        f"seeds each time; the {'band' if joined else 'bar'} is the {SURE} bootstrap interval of "
        "the mean."
    )
    if points:
        caption += (
            " Training: the mean over an epoch's samples, drawn as training draws them, which for "
            "GRPO is with noise: the levels may differ."
        )
    return chart(draw, caption, "OCR reward by epoch")


def _pictures(folder: pathlib.Path, evaluations: list[dict]) -> str:
    """The first prompts' samples of the first and the last evaluation, side by side."""
    sides = _previews(folder, evaluations)
    if not sides:
        return '<p class="note">No previews were kept.</p>' if evaluations else ""
    count = min(len(videos) for _, videos in sides)
    count = min(count, len(sides[0][0]["prompts"]))
    budget = MEDIA_BYTES // (count * len(sides))
    cards = []
    for i in range(count):
        prompt = sides[0][0]["prompts"][i]
        figures = "".join(
            f"<figure>{_embed(videos[i], budget, e['epoch'])}"
            f"<figcaption>after epoch {e['epoch']}: <b>{_reward(e['rewards'][i])}</b>, "
            f"{_read(e['texts'][i])}</figcaption></figure>"
            for e, videos in sides
        )
        cards.append(
            f'<article><p class="prompt">{html.escape(prompt)}</p><p class="target">asked for '
            f'{html.escape(_target(prompt))}</p><div class="pair">{figures}</div></article>'
        )
    pairs = " The folder side_by_side has each pair in one file." if sides[1:] else ""
    same = "; both sides start from the same noise" if sides[1:] else ""
    return f'<p class="note">The first {count} held-out prompts, not a selection{same}.{pairs}</p>{"".join(cards)}'


def _reward(value: float) -> str:
    return "not scored" if math.isnan(value) else f"{value:.2f}"


def _read(text: str) -> str:
    return f"read <q>{html.escape(text)}</q>" if text.strip() else "nothing read"


def _target(prompt: str) -> str:
    try:
        return ", ".join(f"“{t}”" for t in parse_targets(prompt))
    except TargetError:
        return "no quoted text"


def _embed(video: np.ndarray, budget: int, epoch: int) -> str:
    """video uint8 [T, H, W, 3] as <img> or <video> of at most `budget` characters: the first
    encoding that fits.
    """
    frames, h, w, _ = video.shape
    alt = f"sample after epoch {epoch}"
    scale = max(1, -(-VISIBLE // h))
    look = f'style="width:{w * scale}px"' + (' class="tiny"' if scale > 1 else "")
    if frames > 1:
        fps = min(FPS, frames)  # a short clip lasts a second
        for crf in (media.CRF, 26, 34):
            if len(uri := media.mp4_data_uri(video, fps, min(scale, 2), crf=crf)) <= budget:
                return (
                    f'<video {look} src="{uri}" title="{alt}; click to pause" autoplay muted loop '
                    'playsinline onclick="this.paused ? this.play() : this.pause()"></video>'
                )
    middle = video[frames // 2]
    for factor, quality in ((1, None), (1, 92), (1, 80), (2, 80), (4, 80)):
        frame = media.shrink(middle, factor)
        uri = media.jpeg_data_uri(frame, quality) if quality else media.png_data_uri(frame)
        if len(uri) <= budget:
            return f'<img {look} src="{uri}" alt="{alt}">'
    return f'<p class="note">{h} x {w} pixels are too large to embed.</p>'


def _prompt_table(evaluations: list[dict]) -> str:
    if not evaluations:
        return ""
    shown = evaluations[:1] + evaluations[1:][-1:]
    head = ["prompt"] + [f"{what} after {e['epoch']}" for e in shown for what in ("reward", "read")]
    rows = [
        [prompt] + [v for e in shown for v in (_reward(e["rewards"][i]), e["texts"][i])]
        for i, prompt in enumerate(evaluations[-1]["prompts"][:1000])
    ]
    return f"<details><summary>{len(rows)} prompts</summary>{table(head, rows)}</details>"


def _timings(metrics: list[dict], evaluations: list[dict]) -> str:
    """Mean seconds an epoch by stage; the first epoch apart, because it compiles. And the device's
    idle share: outside sampling, decoding and update it has nothing to do.
    """
    timed = [
        {
            stage: value
            for stage in m["seconds"]
            if (value := number(m["seconds"], stage)) is not None
        }
        for m in metrics
        if isinstance(m.get("seconds"), dict)
    ]
    if not timed:
        return ""
    steady = timed[1:] or timed
    stages = [s for s in dict.fromkeys(k for t in timed for k in t) if s != "total"]
    mean = {s: float(np.mean([t.get(s, 0.0) for t in steady])) for s in stages}
    total = sum(mean.values()) or 1.0
    names = [html.escape(STAGES.get(s, s)) for s in stages]
    bar = "".join(
        f'<i class="s{i % 6}" style="width:{mean[s] / total:.2%}" title="{names[i]}"></i>'
        for i, s in enumerate(stages)
    )
    rows = [
        [
            f'<i class="dot s{i % 6}"></i>{names[i]}',
            f"{mean[s]:.2f}",
            f"{mean[s] / total:.0%}",
            f"{timed[0].get(s, 0.0):.2f}",
        ]
        for i, s in enumerate(stages)
    ]
    rows.append(
        [
            "all stages",
            f"{total:.2f}",
            "100%",
            f"{sum(v for k, v in timed[0].items() if k != 'total'):.2f}",
        ]
    )
    idle = [m["idle_share"] for m in metrics if number(m, "idle_share") is not None]
    waits = (
        f" The device waits for the host {np.mean(idle[1:] or idle):.1%} of an epoch."
        if idle
        else ""
    )
    over = (
        f"{len(steady)} epoch(s) after the first, which compiles"
        if timed[1:]
        else "the only epoch, which compiles"
    )
    evaluation = [e["seconds"] for e in evaluations if number(e, "seconds") is not None]
    return (
        f'<p class="note">Mean over {over}. Scores are computed while the next batch is sampled: '
        f'only the wait for the last ones counts.{waits}</p><div class="bar">{bar}</div>'
        + table(["stage", "s an epoch", "share", "first epoch, s"], rows, escape=False)
        + (
            f'<p class="note">Held-out evaluations: {len(evaluation)}, {np.mean(evaluation):.1f} s each, beside the '
            "epochs.</p>"
            if evaluation
            else ""
        )
    )


def _health(metrics: list[dict]) -> str:
    """The first, the last and the worst value of each metric; below it those of each of two
    experts.
    """
    rows, several = [], [m for m in metrics if isinstance(m.get(EXPERTS), dict)]
    experts = dict.fromkeys(expert for m in several for expert in m[EXPERTS])
    for key, (name, worse, expect) in HEALTH.items():
        rows += _health_row(metrics, key, name, worse, expect)
        for expert in experts:
            theirs = [
                m[EXPERTS][expert] | {"epoch": m["epoch"]}
                for m in several
                if isinstance(m[EXPERTS].get(expert), dict)
            ]
            rows += _health_row(theirs, key, f"{name}, {expert}", worse, "")
    return table(["", "first", "last", "worst", "expected"], rows) if rows else ""


def _health_row(
    records: list[dict], key: str, name: str, worse: Callable, expect: str
) -> list[list[str]]:
    """Of the records that have the metric. The worst is that of single updates where an epoch has
    several.
    """
    found = [
        (m[key], m["epoch"], number(m, f"{key}_{worse.__name__}"))
        for m in records
        if number(m, key) is not None
    ]
    if not found:
        return []
    ends = [(value if end is None else end, epoch) for value, epoch, end in found]
    bad = [(value, epoch) for value, epoch, _ in found if not math.isfinite(value)]
    worst, epoch = bad[0] if bad else worse(ends, key=lambda v: v[0])
    return [
        [
            name,
            _short(found[0][0]),
            _short(found[-1][0]),
            f"{_short(worst)} (epoch {epoch})",
            expect,
        ]
    ]


def _settings(config: dict) -> str:
    rows = [
        [key.replace("/", "."), str(value)]
        for key, value in run_log.flatten(config).items()
        if key != "command"
    ]
    if not rows:
        return ""
    return f"<details><summary>{len(rows)} settings</summary>{table(['setting', 'value'], rows)}</details>"


def _command(config: dict) -> str:
    return f"<pre>{html.escape(str(config['command']))}</pre>" if config.get("command") else ""


def _short(value: float) -> str:
    return f"{value:.3g}"
