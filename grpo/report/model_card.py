"""Writes the model card of an exported LoRA: README.md with YAML front matter, and its pictures.

The card is made from the records of the run up to the exported epoch, as `report.html` is, and from
what was exported. Folders of the machine are left out, as cards are published.
"""

import dataclasses
import json
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from grpo.records import run_log
from grpo.records.run_log import reward_name
from grpo.report import charts
from grpo.report.page import plural, render
from grpo.report.provenance_tables import devices, working_time
from grpo.report.reward_chart import RewardChart
from grpo.report.run_records import RunRecords
from grpo.report.run_report import guard_lines, result_sentence
from wan_jax.storage import media

CARD = "README.md"
MARK = "<!-- made by convert.export_lora -->"  # in a card, which a later export may replace
PICTURES = 4  # prompts that are shown
LOWEST, HIGHEST = 192, 480  # pixels of a picture's height
MARKDOWN = re.compile(r"([\\`*_\[\]|<>#])")
# of a Diffusers pipeline for each solver of evaluations; the others are not in Diffusers
SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}
TAGS = ("text-to-video", "lora", "wan", "reinforcement-learning", "jax")


@dataclasses.dataclass(frozen=True)
class ExportedLoRA:
    """What a card describes.

    Attributes:
        name: title of the card.
        layout: 'diffusers', 'comfyui' or 'peft'.
        files: of each trained expert, relative to the card's folder.
        experts: of the model.
        repository: hub id that the files are uploaded to; "": none.
        base: hub id of the base model, or the name of its folder.
        on_hub: whether `base` is a hub id.
        license: of the LoRA, as the hub names it.
        epoch: of the run.
        rank, alpha, targets: of the adapters.
        loras: names of the LoRAs that the run's base had, with their scales.
        fps: frames per second of the model.
        config: settings of the run, nested.
    """

    name: str
    layout: str
    files: Mapping[str, pathlib.PurePath]
    experts: tuple[str, ...]
    repository: str
    base: str
    on_hub: bool
    license: str
    epoch: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    loras: tuple[str, ...]
    fps: float
    config: Mapping[str, Any]

    def setting(self, key: str) -> Any:
        """Return a setting by its dotted key; None where the run did not record it."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def make_card(folder: pathlib.Path, lora: ExportedLoRA) -> dict[str, bytes]:
    """Return {file: content} of the card and its pictures, of the run in `folder`."""
    run = RunRecords.read(folder).until(lora.epoch)
    # 1 pictures
    files: dict[str, bytes] = {}
    reward = RewardChart(run)
    if reward:
        files["images/reward.png"] = charts.png(reward.draw)
    samples = _samples(run, files)
    # 2 text
    steps, guidance = lora.setting("eval.steps"), lora.setting("eval.guidance")
    guidance, two = 5.0 if guidance is None else guidance, len(lora.experts) > 1
    size = {
        key: lora.setting(f"sample.{key}") or default
        for key, default in (("height", 480), ("width", 832), ("frames", 81))
    }
    size["frames"] = lora.setting("eval.frames") or size["frames"]
    prompt = samples[0]["raw"] if samples else 'A neon sign that says "OPEN".'
    solver = lora.setting("eval.solver")
    text = render(
        "model_card.md",
        mark=MARK,
        front=_front_matter(lora, run, samples),
        lora=lora,
        scale=lora.alpha / lora.rank,
        reward=reward_name(run.evaluations[-1] if run.evaluations else {}),
        measured=_rewards(lora),
        method=str(lora.setting("train.method") or ""),
        result=result_sentence(run),
        warnings=[escaped(line) for line in guard_lines(run)],
        chart=bool(reward),
        samples=samples,
        ends=[e["epoch"] for e in run.ends],
        evaluations=run.ends,
        prompt=json.dumps(prompt, ensure_ascii=False),
        quoted=shlex.quote(prompt),
        steps=steps or 50,
        guidance=guidance,
        guidance_2=(lora.setting("eval.guidance_2") or guidance) if two else None,
        argument=_argument(lora),
        shift=lora.setting("sample.shift"),
        scheduler=SCHEDULERS.get(str(solver)),
        solver=solver,
        size=size,
        settings=_settings(lora, run),
    )
    return {CARD: text.encode(), **files}


def escaped(text: str) -> str:
    """Return text in one line, in which nothing is Markdown."""
    return MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def metadata(lora: ExportedLoRA, folder: pathlib.Path) -> dict[str, str]:
    """Return what a LoRA file says of its origin: base model, in how many bits where it was quantised,
    epoch, optimiser steps, the reward and its held-out mean before and after, as far as the run recorded them.
    """
    run = RunRecords.read(folder).until(lora.epoch)
    found = {"base_model": lora.base, "epoch": str(lora.epoch), "reward": _rewards(lora)}
    found["base_weights"] = _quantised(lora.setting("model.weights"))
    if run.metrics and all("updates" in m for m in run.metrics):
        found["step"] = str(sum(int(m["updates"]) for m in run.metrics))
    if run.evaluations:
        last = run.evaluations[-1]
        found["reward_heldout"] = f"{last['reward']:.4f} after epoch {last['epoch']}"
    if len(run.ends) == 2:
        found["reward_heldout_before"] = f"{run.ends[0]['reward']:.4f}"
    return {key: value for key, value in found.items() if value}


def _argument(lora: ExportedLoRA) -> str:
    """Return the value of `wan-sample --lora`: for two experts HIGH,LOW, where one may be empty."""
    if lora.layout == "peft":
        names = {
            e: "FOLDER" if f.parent == f.parent.parent else f.parent for e, f in lora.files.items()
        }
    else:
        names = lora.files
    return shlex.quote(",".join(str(names.get(expert, "")) for expert in lora.experts))


def _samples(run: RunRecords, files: dict[str, bytes]) -> list[dict[str, str]]:
    """Return the first prompts with the names of their pictures before and after, which are added to
    `files`. A video's picture is its middle frame.
    """
    if not run.previews:
        return []
    after, videos = run.previews[-1]
    before = run.previews[0][1] if len(run.previews) > 1 else None
    shown = []
    for i, prompt in enumerate(after["prompts"][: min(PICTURES, len(videos))]):
        row = {"raw": prompt, "prompt": escaped(prompt), "before": ""}
        for side, found in (("before", before), ("after", videos)):
            if found is not None and i < len(found):
                frame = media.fit_height(found[i][len(found[i]) // 2], LOWEST, HIGHEST)
                row[side] = f"images/{side}_{i}.png"
                files[row[side]] = media.png_bytes(frame)
        shown.append(row)
    return shown


def _front_matter(lora: ExportedLoRA, run: RunRecords, samples: list[dict[str, str]]) -> str:
    """Return the YAML at the head of the card, without its lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    last = run.evaluations[-1] if run.evaluations else None
    method = lora.setting("train.method")
    results: Any = last and [
        EvalResult(
            task_type="text-to-video",
            dataset_type="prompts",
            dataset_name=f"{last['num']} held-out prompts",
            metric_type=reward_name(last).replace(" ", "_").lower(),
            metric_name=reward_name(last),
            metric_value=round(last["reward"], 4),
        )
    ]
    more: dict[str, Any] = {"base_model_relation": "adapter"} if lora.on_hub else {}
    if samples:
        more["widget"] = [{"text": row["raw"], "output": {"url": row["after"]}} for row in samples]
    data = ModelCardData(
        base_model=lora.base if lora.on_hub else None,
        library_name="peft" if lora.layout == "peft" else "diffusers",
        license=lora.license,
        pipeline_tag="text-to-video",
        tags=[*TAGS, *([str(method)] if method else [])],
        model_name=lora.name if results else None,
        eval_results=results or None,
        **more,
    )
    return data.to_yaml()


def _rewards(lora: ExportedLoRA) -> str:
    """Return the rewards of a run with their weights: "ocr (spelling, rapidocr)", "1 ocr + 0.2 clip"."""
    weights = dict(lora.setting("reward.weights") or {}) | dict(
        lora.setting("reward.own_weights") or {}
    )
    used = {name: weight for name, weight in weights.items() if weight}
    if list(used) == ["ocr"]:
        return f"ocr ({lora.setting('reward.rule')}, {lora.setting('reward.engine')})"
    if len(used) == 1:
        return next(iter(used))
    return " + ".join(f"{weight:g} {name}" for name, weight in used.items())


def _settings(lora: ExportedLoRA, run: RunRecords) -> list[tuple[str, str]]:
    """Return the rows (what, value) of the table of settings, as far as they are recorded."""
    get, newest = lora.setting, run.starts[-1] if run.starts else {}
    kl, hardware = get("train.kl_weight"), newest.get("hardware") or {}
    size = [get(f"sample.{key}") for key in ("frames", "height", "width")]
    held = run.evaluations[-1] if run.evaluations else {}
    versions = {"Python": newest.get("python")} | (newest.get("versions") or {})
    rows = {
        "base model": lora.base,
        "LoRAs merged into the base": ", ".join(lora.loras),
        "method": get("train.method"),
        "reward": _rewards(lora),
        "training prompts": _file(get("prompts.train")),
        "held-out prompts": _file(get("prompts.heldout"))
        and f"{_file(get('prompts.heldout'))}, {held.get('num', get('eval.num_prompts'))} prompts",
        "epochs": f"{lora.epoch} of {get('epochs')}" if get("epochs") else lora.epoch,
        "videos sampled": f"{sum(run_log.number(m, 'videos') or 0 for m in run.metrics):,.0f}"
        if run.metrics
        else None,
        "adapters": f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}",
        "learning rate": get("train.learning_rate"),
        "KL weight": "of the method" if kl is None and get("train.method") else kl,
        "videos": f"{plural(size[0], 'frame')} of {size[1]} x {size[2]}" if all(size) else None,
        "sampling in training": get("sample.steps")
        and f"{get('sample.steps')} steps, guidance {get('sample.guidance')}, shift {get('sample.shift')}",
        "sampling in evaluation": get("eval.steps")
        and f"{get('eval.steps')} steps of {get('eval.solver')}, guidance {get('eval.guidance')}",
        "groups": get("sample.groups") and f"{get('sample.groups')} of {get('sample.group_size')}",
        "seed": get("seed"),
        "weights of the base in": get("model.dtype"),
        "base in training and evaluation": _quantised(get("model.weights")),
        "hardware": hardware
        and f"{devices(hardware)}, {hardware.get('cpus', 'unknown')} CPU cores",
        "time of epochs and evaluations": working_time(run) if run.metrics else None,
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
        "commit of the source": newest.get("commit"),
    }
    return [(key, escaped(value)) for key, value in rows.items() if value not in (None, "")]


def _quantised(weights: str | None) -> str:
    """Return how a base in fewer bits was stored; "" where it was not."""
    if weights in (None, "dtype"):
        return ""
    return f"quantised to {weights} (model.weights); on the unquantised base rewards may differ"


def _file(path: Any) -> str:
    """Return the name of a file without its folder; "" if there is none."""
    return pathlib.PurePath(str(path)).name if path else ""
