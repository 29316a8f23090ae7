"""The settings of published runs: one epoch of a recipe against Flow-GRPO's formulas in PyTorch, and a
run that is continued.

The formulas are the list of noise levels, 20 stochastic steps with guidance, rewards, advantages, the
videos that are dropped, the loss with its KL, clipping and AdamW. The model is tiny, with AMD's recipe
for Wan 2.1 14B. The reference shares the model's weights, the texts' embeddings and the random numbers
with the product, and no code: the forward pass is Diffusers' with PEFT's adapters.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.published import amd_wan21_14b
from grpo.compiled.functions import Functions
from grpo.credit import compute_credit
from grpo.data.prompts import PromptSet
from grpo.learning.optimiser import init_state
from grpo.learning.policy import COMPILER_OPTIONS
from grpo.records.clock import Stopwatch
from grpo.run import RunSpec
from grpo.sampling import Session, sample_epoch
from grpo.scoring.scores import gather_scores
from grpo.settings import parse
from grpo.setup import initial_arrays
from grpo.update import update_epoch
from rewards.ocr.engines import TextLine
from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from tests.grpo import tiny_run
from tests.grpo.here import train_here
from tests.grpo.specs import devices_mesh
from wan_jax.inference.pipeline import TextTable, Videos
from wan_jax.models import presets
from wan_jax.storage import model_dir
from wan_jax.storage.trained_weights import load_trained

STEPS, TRAINED, SHIFT, GUIDANCE = 20, 19, 3.0, 4.5
VIDEOS, GROUP, BATCH, RANK, ALPHA = 16, 4, 4, 4, 8.0
CLIP = 1e-4  # the published range, 1e-3, clips nothing here
KL, RATE, DECAY, EPS = 0.004, 1e-4, 1e-4, 1e-8
PROMPTS = tuple(f'A sign, number {i}, that says "Open".' for i in range(4))
TEXT = 6  # rows of every prompt's embedding
# what is read in each video, by group
READ = [
    ["", "zzzz", "", "x y"],  # rewards are all 0
    ["open", "ope", "op", ""],
    ["OPEN", "o p e n", "Open", "open"],  # rewards are all 1
    ["open", "opend", "", "op"],  # rewards 1, 3/4, 0 and 1/2
]


def read(video: int, frame: int) -> str:
    """The text on a frame. On its second scored frame the last video shows nothing, which does not
    count.
    """
    return "" if (video, frame) == (VIDEOS - 1, 4) else READ[video // GROUP][video % GROUP]


# ---- the product ---------------------------------------------------------------------------------
class Epoch:
    """An epoch of the recipe: what it sampled, scored and learnt."""

    def __init__(self, folder):
        opened = model_dir.open_model(folder)
        c = amd_wan21_14b.get_config()
        c.model.path, c.model.dtype, c.model.remat = str(folder), "float32", "none"
        c.lora.rank, c.lora.alpha = RANK, ALPHA
        c.train.clip_low = c.train.clip_high = CLIP
        c.sample.frames, c.sample.height, c.sample.width = 5, 32, 32
        c.sample.groups, c.sample.group_size, c.sample.batch_size = VIDEOS // GROUP, GROUP, BATCH
        recipe = parse.recipe_from_config(c)
        preset, mesh = presets.of_folder(opened), devices_mesh(1)
        spec = RunSpec(recipe, parse.settings_of(recipe), preset, mesh, "xla")
        self.frozen = model_dir.build("transformer", opened, dtype=jnp.float32, mesh=mesh)[1]
        rng = np.random.default_rng(0)
        width = preset.transformer.text_dim
        texts = rng.standard_normal((len(PROMPTS) + 1, TEXT, width), np.float32)
        self.table = TextTable(tuple(texts[:-1]), texts[-1], TEXT)
        # B is not 0, so that the policy differs from the reference
        start = initial_arrays(spec, lambda expert: self.frozen, None, ["transformer"])[
            "transformer"
        ]
        start = {
            name: x + 0.1 * rng.standard_normal(x.shape, np.float32)
            for name, x in sorted(start.items())
        }
        self.start = {name: np.asarray(x) for name, x in start.items()}
        states = {"transformer": init_state(start, spec.settings.optimiser)}
        self.final = []
        session = Session(
            functions=Functions(spec, TEXT),
            prompts=PromptSet(PROMPTS, (("Open",),) * len(PROMPTS)),
            table=self.table,
            decode=self.decode,
            pool=RewardPool(lambda: OCRReward("flow_grpo_video", self.engine), workers=0),
            frozen=lambda expert: self.frozen,
            start={},
            to_device=lambda arrays: arrays,
            progress=lambda batches, **options: batches,
        )
        self.rollout, pending = sample_epoch(session, states, 1, Stopwatch())
        self.scores = gather_scores(pending, VIDEOS)
        self.credit = compute_credit(spec, self.scores, self.rollout.prompt_of, {})
        # the update uses the trajectories up
        used = dataclasses.replace(self.rollout, trajectories={**self.rollout.trajectories})
        states, self.record = update_epoch(session, states, 1, used, self.credit)
        self.state, self.spec = states["transformer"], spec

    def decode(self, latents):
        """Keep the latents; the frames hold the numbers of video and frame in their first pixel."""
        first = BATCH * len(self.final)
        self.final.append(np.asarray(latents))
        frames = np.zeros((BATCH, 5, 32, 32, 3), np.uint8)
        frames[..., 0] = np.arange(first, first + BATCH)[:, None, None, None]
        frames[..., 1] = np.arange(5)[:, None, None]
        return lambda: Videos(frames, np.ones(BATCH, bool))

    @staticmethod
    def engine(frame):
        text = read(int(frame[0, 0, 0]), int(frame[0, 0, 1]))
        box = ((0.0, 0.0), (9.0, 0.0), (9.0, 9.0), (0.0, 9.0))
        return [TextLine(text, 0.3, box)] if text else []

    def trajectory(self, name: str) -> np.ndarray:
        """An array of the trained steps of all videos, [K, N, ...]."""
        batches = self.rollout.trajectories["transformer"]
        return np.concatenate([np.asarray(getattr(t, name)) for t in batches], 1)


# ---- Flow-GRPO's formulas ------------------------------------------------------------------------
def levels(steps: int, shift: float) -> tuple[list[float], list[int]]:
    """Sigmas and timesteps of UniPCMultistepScheduler with flow sigmas in Diffusers 0.33: alphas from
    1 to 1/1000, sigma = 1 - alpha, shifted, in reverse, without the last, and 0 at the end.
    """
    alphas = [1 + (0.001 - 1) * i / steps for i in range(steps + 1)]
    sigmas = [shift * (1 - a) / (1 + (shift - 1) * (1 - a)) for a in alphas]
    sigmas = sigmas[::-1][:-1]
    return [*sigmas, 0.0], [int(1000 * s) for s in sigmas]


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def video_ocr(video: int) -> float:
    """Every fourth frame, without spaces and case; the mean of those above 0."""
    target = PROMPTS[0].split('"')[1].replace(" ", "").lower()
    values = []
    for frame in (0, 4):
        text = read(video, frame).replace(" ", "").lower()
        values.append(1 - min(edit_distance(text, target), len(target)) / len(target))
    positive = [value for value in values if value > 0]
    return sum(positive) / len(positive) if positive else 0.0


def advantages_of(rewards: list[float]) -> np.ndarray:
    groups = np.reshape(rewards, (-1, GROUP))
    mean, std = groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
    return np.clip((groups - mean) / (std + 1e-4), -5, 5).ravel()


def noise_of(video: int, step: int, shape) -> np.ndarray:
    """The documented draw of (seed, epoch, video, step): of the stream of the rollout, 1."""
    key = jax.random.key(42)
    for number in (1, 1, video, step):  # the stream, the epoch
        key = jax.random.fold_in(key, number)
    return np.asarray(jax.random.normal(key, shape, jnp.float32))


class Reference:
    """Diffusers' transformer with PEFT's adapters, and the steps of Flow-GRPO."""

    def __init__(self, source, epoch: Epoch, torch):
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
        from peft import LoraConfig, get_peft_model

        self.torch = torch
        self.sigmas, self.timesteps = levels(STEPS, SHIFT)
        model = WanTransformer3DModel.from_pretrained(source, subfolder="transformer")
        model.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        self.model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        )
        self.parameters = {}
        for name, value in self.model.named_parameters():
            if value.requires_grad:
                value.data = torch.tensor(self.to_torch(epoch.start, name))
                self.parameters[name] = value
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=DECAY
        )
        rows = np.zeros((len(PROMPTS) + 1, 512, epoch.table.negative.shape[1]), np.float32)
        rows[:, :TEXT] = [*epoch.table.prompts, epoch.table.negative]
        self.texts = torch.tensor(rows)
        self.prompt_of = epoch.rollout.prompt_of

    @staticmethod
    def to_torch(arrays: dict, name: str) -> np.ndarray:
        """The array of a PEFT parameter, e.g. ...blocks.1.attn1.to_out.0.lora_A.default.weight."""
        ((block, attention, module, factor),) = re.findall(
            r"blocks\.(\d+)\.(\w+)\.(.+)\.lora_([AB])\.default\.weight$", name
        )
        key = f"blocks/{attention}/{module.replace('.', '_')}/lora_{factor.lower()}"
        return np.ascontiguousarray(np.asarray(arrays[key])[int(block)].T)

    def velocity(self, x, step: int, videos):
        def forward(texts):
            t = self.torch.full((len(x),), self.timesteps[step])
            return self.model(
                hidden_states=x, timestep=t, encoder_hidden_states=texts, return_dict=False
            )[0]

        text = forward(self.texts[self.prompt_of[videos]])
        empty = forward(self.texts[[-1] * len(x)])
        return empty + GUIDANCE * (text - empty)

    def step(self, x, step: int, videos, x_next=None, noise=None):
        """(x_next, log_prob [B], mean, std)"""
        s, s_next = self.sigmas[step], self.sigmas[step + 1]
        dt, g = s_next - s, self.sigmas[-1] + (self.sigmas[1] - self.sigmas[-1]) * s
        v = self.velocity(x, step, videos)
        mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
        std = g * math.sqrt(-dt)
        if x_next is None:
            x_next = mean + std * noise
        density = (
            -((x_next.detach() - mean) ** 2) / (2 * std**2)
            - math.log(std)
            - math.log(math.sqrt(2 * math.pi))
        )
        return x_next, density.mean((1, 2, 3, 4)), mean, std

    def rollout(self, shape):
        """All latents [STEPS + 1, N, C, F, H, W] and log-probs [STEPS, N]."""
        torch, videos = self.torch, np.arange(VIDEOS)

        def noise(step):
            drawn = np.stack([noise_of(video, step, shape) for video in videos])
            return torch.tensor(drawn).permute(0, 4, 1, 2, 3)

        with torch.no_grad():
            xs, log_probs = [noise(2**31 - 1)], []
            for i in range(STEPS):
                x, log_prob, *_ = self.step(xs[-1], i, videos, noise=noise(i))
                xs.append(x)
                log_probs.append(log_prob)
        return torch.stack(xs), torch.stack(log_probs)

    def update(self, xs, log_probs, advantages, videos) -> float:
        """One optimiser step on the videos that have an advantage; the gradient's norm."""
        torch = self.torch
        videos = videos[advantages[videos] != 0]
        a = torch.tensor(advantages[videos], dtype=torch.float32)
        for i in range(TRAINED):
            x, x_next = xs[i, videos], xs[i + 1, videos]
            _, log_prob, mean, std = self.step(x, i, videos, x_next)
            with torch.no_grad(), self.model.disable_adapter():
                *_, reference, _ = self.step(x, i, videos, x_next)
            ratio = torch.exp(log_prob - log_probs[i, videos])
            clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
            policy = torch.maximum(-a * ratio, -a * clipped).mean()
            kl = (((mean - reference) ** 2).mean((1, 2, 3, 4)) / (2 * std**2)).mean()
            ((policy + KL * kl) / TRAINED).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(norm)

    def changes(self, epoch: Epoch):
        """Return the function: name of a parameter -> its changes, ours and this one's, and the first
        moments of AdamW, ours and this one's.
        """

        def of(name: str):
            start, found, moment = (
                self.to_torch(arrays, name)
                for arrays in (epoch.start, epoch.state.trainable, epoch.state.opt[1][0].mu)
            )
            value = self.parameters[name]
            own_moment = self.optimiser.state[value]["exp_avg"].numpy()
            return found - start, value.detach().numpy() - start, moment, own_moment

        return of


@pytest.fixture
def quick(monkeypatch):
    """Compiles rollout and update without LLVM's optimisation; PyTorch on one thread."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    monkeypatch.setitem(COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_an_epoch_is_that_of_flow_grpo(model, quick):
    epoch = Epoch(model)
    reference = Reference(model.parent / "source", epoch, quick)

    # ---- rollout -------------------------------------------------------------------------------
    xs, log_probs = reference.rollout(epoch.spec.shape)
    latents = xs.permute(0, 1, 3, 4, 5, 2).numpy()
    # Guidance makes 2 x 4.5 - 1 = 8 roundings of fp32 of one, in each of the 20 steps.
    step_error = 8 * 2**-24 * np.abs(latents).max()
    for found, wanted in (
        (epoch.trajectory("x"), latents[:TRAINED]),
        (epoch.trajectory("x_next"), latents[1 : TRAINED + 1]),
        (np.concatenate(epoch.final), latents[STEPS]),
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=STEPS * step_error)
    # a step's error over its standard deviation, of which the least trained one is 0.082
    found = epoch.trajectory("log_prob")
    np.testing.assert_allclose(found, log_probs[:TRAINED], rtol=0, atol=step_error / 0.082)

    # ---- rewards and advantages: two groups are equal ------------------------------------------
    rewards = [video_ocr(video) for video in range(VIDEOS)]
    np.testing.assert_allclose(epoch.scores.values, rewards, rtol=1e-12)  # float64
    advantages = advantages_of(rewards)
    np.testing.assert_allclose(epoch.credit.advantages, advantages, rtol=2**-23, atol=1e-12)
    assert np.flatnonzero(advantages).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]

    # ---- two updates, the second one off-policy ------------------------------------------------
    norms = [
        reference.update(xs, log_probs, advantages, videos)
        for videos in np.split(np.arange(VIDEOS), 2)
    ]
    assert epoch.record["updates"] == 2 and epoch.record["videos_trained"] == 8
    assert 0 < epoch.record["clip_fraction_max"] < 1
    found, wanted, moment, wanted_moment = (
        np.concatenate([arrays.ravel() for arrays in changes])
        for changes in zip(*map(reference.changes(epoch), reference.parameters))
    )
    # Gradients have the relative error of z = (x_next - mean) / std, step_error / 0.082 = 3e-5 (the
    # KL's is that of a difference of means, which is ten times as large, in a part of the loss).
    np.testing.assert_allclose(
        [epoch.record["grad_norm_min"], epoch.record["grad_norm_max"]], sorted(norms), rtol=3e-4
    )
    assert np.linalg.norm(moment - wanted_moment) < 3e-4 * np.linalg.norm(wanted_moment)
    # AdamW divides by the gradient's own size, so elements of any size have that error.
    assert np.linalg.norm(found - wanted) < 3e-3 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_a_run_of_the_first_expert_alone(two_experts, tmp_path, capsys):
    """With the settings of published runs, and a file with a line that cannot be scored and a held-out
    prompt. A continued run is equal to the bit.
    """
    options = (
        *("model.single_expert=True", "sample.schedule=legacy", "sample.untrained_noise=True"),
        *("sample.sde_range=(0,2)", "train.zero_advantages=drop", "prompts.skip_invalid=True"),
    )
    results = []
    for stops in ((2,), (1, 2)):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        config, run = tiny_run.write_recipe(two_experts, folder)
        heldout = (folder / "heldout.txt").read_text().splitlines()
        with open(folder / "train.txt", "a") as file:
            file.write(f"nothing to write\n{heldout[0]}\n")
        for epochs in stops:
            train_here(config, *tiny_run.MEASURES, *tiny_run.PICTURE, *options, f"epochs={epochs}")
        assert "prompts.train: 2 lines are left out" in capsys.readouterr().out
        _, trained, _ = load_trained(run)
        assert list(trained) == ["transformer"]
        results.append((tiny_run.arrays_of(run), tiny_run.records_of(run)[0]))
    (arrays, metrics), (again, metrics_again) = results
    assert metrics == metrics_again and [record["updates"] for record in metrics] == [2, 2]
    assert arrays.keys() == again.keys() and len(arrays) > 20
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], again[name], err_msg=name)
