"""What a video is worth: `reward`."""

import dataclasses

from grpo.settings.choices import COMBINATIONS, JUDGE, JUDGE_QUESTIONS
from grpo.settings.setting import PER_PROCESS, POSITIVE, Section, setting
from rewards.choices import ENGINES, MEASURES, PANEL, READ_MEASURES, RULES
from wan_jax.command_line.limits import PROCESSES, Range


def _weight(default: float | None, meaning: str):
    return setting(default, meaning, bounds=Range(0))


def _deviation(measure: str, counts: str = ""):
    """Declare the weight of a measure of quality. counts: which deviations count; "": both."""
    end = f"; {counts}." if counts else "."
    return _weight(None, f"Deviation of {measure} from the base model's videos, -1 to 0{end}")


@dataclasses.dataclass(frozen=True)
class Weights(Section):
    """Weight of each reward. 0: it is measured and logged, but not trained. None: not measured. A
    reward of `reward.own` or of named servers has a weight here too, `c.reward.weights.NAME`.
    """

    ocr: float | None = _weight(1.0, "Spelling, by `reward.rule`, 0 to 1.")
    stability: float | None = _weight(
        None, "Similarity of the texts that are read in neighbouring frames, 0 to 1."
    )
    clip: float | None = _weight(
        None, "Cosine of the prompt and the frames by the model in `reward.clip_model`."
    )
    pickscore: float | None = _weight(
        None, "PickScore of the prompt and the frames, over 26, by `reward.pickscore_model`."
    )
    sharpness: float | None = _deviation("the frames' sharpness")
    exposure: float | None = _deviation("the frames' mean brightness")
    contrast: float | None = _deviation("the frames' contrast")
    compressibility: float | None = _deviation("the bits that a pixel takes as JPEG")
    flicker: float | None = _deviation(
        "the changes between neighbouring frames", "only more of them counts"
    )
    motion: float | None = _deviation("the length of the optical flow", "only less of it counts")
    dark: float | None = _deviation("the share of dark pixels", "only more of them counts")
    edges: float | None = _deviation("the share of pixels on an edge")
    colours: float | None = _deviation("the entropy of the colours")
    text_area: float | None = _deviation(
        "the share of the frame that the boxes of the text cover",
        "only more of it counts. It needs an OCR engine on this machine",
    )


@dataclasses.dataclass(frozen=True)
class Reward(Section):
    """The rewards, and where videos are scored."""

    rule: str = setting(
        "spelling",
        "Rule that turns the texts read in a video into a score. Train with `spelling`, or with "
        "`confident`, in which a right letter counts by the reader's confidence; the "
        "others are Flow-GRPO's own, for comparison.",
        choices=RULES,
    )
    engine: str = setting(
        "rapidocr",
        "What reads the frames: an OCR engine, or `judge`, the vision model at `reward.servers`.",
        choices=(*ENGINES, JUDGE),
    )
    reader_two: str = setting(
        "",
        "Second OCR engine of the reward: each frame has the lower one of the two readers' values. "
        "The values of both are logged as `ocr.reader_one` and `ocr.reader_two`. Empty: one reader.",
        choices=("", *ENGINES),
    )
    panel: tuple[str, ...] = setting(
        PANEL,
        "Measures of quality, names as in `reward.weights`, that are measured without a weight, in "
        "training and in evaluations. The guard compares them with those of the base model's "
        "videos (docs/explanation/hacking.md).",
        choices=(*MEASURES, *READ_MEASURES),
        resume=True,
    )
    second_engine: str = setting(
        "",
        "OCR engine that also reads the videos, by the same rule and without a weight, logged as "
        "`second_reader`: a reader that training does not see. Empty: none.",
        choices=("", *ENGINES),
        resume=True,
    )
    max_frames: int = setting(
        9,
        "Largest number of frames of a video that are scored, spread evenly from the first to the "
        "last.",
        bounds=Range(2),
    )
    weights: Weights = dataclasses.field(default_factory=Weights)
    own: tuple[tuple[str, str], ...] = setting(
        (),
        "Your own rewards by name, `module:factory` each (docs/howto/own_rewards.md). In a recipe "
        '`c.reward.own = {"red": "redness:Redness"}`, on the command line '
        "`--config.reward.own=red=redness:Redness,NAME=MODULE:FACTORY`.",
        named=str,
    )
    own_weights: tuple[tuple[str, float], ...] = setting(
        (),
        "Weights of your own rewards and of rewards of named servers, or of their parts, by name: "
        "on the command line `--config.reward.own_weights=red=1.0,NAME.PART=0.5`. In a recipe, "
        "`c.reward.weights.red = 1.0` is the same. The default of a weight is 0: measured, but not trained.",
        named=float,
    )
    clip_model: str = setting(
        "",
        "Folder of a CLIP model as `transformers` writes it, for `reward.weights.clip`.",
        path=True,
        **PER_PROCESS,
    )
    pickscore_model: str = setting(
        "",
        "Folder of PickScore as `transformers` writes it, for `reward.weights.pickscore`.",
        path=True,
        **PER_PROCESS,
    )
    combine: str = setting(
        "rewards",
        "What is summed by weight. `rewards`: the rewards. `advantages`: each reward's advantages "
        "(GDPO), so that weights do not depend on the spread of the rewards.",
        choices=COMBINATIONS,
        experimental=("advantages",),
    )
    confidence: float = setting(
        0.0,
        "Weight of one more reward: how well the policy recovers noise from its own videos, standardised "
        "over the epoch (SOLACE; docs/explanation/algorithms.md). A model may become surer of pictures that "
        "show less, so watch the other rewards. Only in training; it costs 4 forward passes at half of the steps.",
        bounds=Range(0),
        experimental=True,
    )
    head_refit: int = setting(
        50,
        "With `sample.reward_guidance`: updates of the head in every epoch, on its videos and rewards. 0: "
        "the head stays as in its file.",
        bounds=Range(0),
        experimental=True,
    )
    workers: int = setting(
        2,
        "Number of scoring processes. 0: the training process scores. With `reward.servers`: "
        "videos sent at the same time, at least the number of workers of all servers.",
        bounds=Range(0, PROCESSES.high),
        **PER_PROCESS,
    )
    servers: tuple[str, ...] = setting(
        (),
        "URLs of reward servers (docs/howto/rewards_server.md): URL for those that compute `ocr`, NAME=URL "
        "for those of another reward. Empty: videos are scored on this machine.",
        **PER_PROCESS,
    )
    token_env: str = setting(
        "REWARD_TOKEN",
        "Name of the environment variable that holds the servers' token. The token itself is "
        "stored nowhere.",
        **PER_PROCESS,
    )
    timeout: float = setting(
        120.0,
        "Seconds after which a server that does not answer counts as down.",
        bounds=POSITIVE,
        **PER_PROCESS,
    )
    retries: int = setting(
        3,
        "Number of further servers that are asked for the score of one video.",
        bounds=Range(0),
        **PER_PROCESS,
    )
    patience: float = setting(
        120.0,
        "Seconds to wait when no server works. After that the video is masked and counted.",
        bounds=Range(0),
        **PER_PROCESS,
    )
    judge_model: str = setting(
        "", "Name of the vision model at its servers. Empty: the only one that they serve."
    )
    judge_question: str = setting(
        "transcribe",
        "What the vision model is asked. `transcribe`: the text of each frame, which "
        "`reward.rule` scores. `yes_no`: whether the video shows the text. `rate`: a mark from 0 "
        "to 10. `letters`: how many letters are missing, extra or wrong.",
        choices=JUDGE_QUESTIONS,
    )
