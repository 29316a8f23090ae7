"""One description of a run: what follows from recipe, model and devices, before a weight is read.

`RunSpec.make` builds it once; training, evaluation, planning and the reward head share it. It is
immutable, and what is expensive is computed once.
"""

import dataclasses
import functools

import jax
import numpy as np

from grpo.compiled import placement
from grpo.learning.method import Method
from grpo.sde_windows import Windows, batches_with
from grpo.settings import frame_schedule
from grpo.settings.parse import Settings, settings_of
from grpo.settings.schema import Recipe
from wan_jax.diffusion.experts import Segment, guidances, segments
from wan_jax.diffusion.schedule import Schedule, flow_sigmas
from wan_jax.diffusion.solvers import make_solver
from wan_jax.distributed import memory as device_memory
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.presets import Preset
from wan_jax.storage import media


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run without its weights."""

    recipe: Recipe
    settings: Settings  # what follows from them alone
    preset: Preset  # the model's configurations
    mesh: jax.sharding.Mesh
    backend: str  # of attention
    memory: int | None = None  # bytes of a device; None: not known
    placed: str = ""  # one line for the log: how the run is placed on the mesh

    @classmethod
    def make(
        cls,
        recipe: Recipe,
        settings: Settings,
        preset: Preset,
        *,
        training: bool = True,
        devices: list[jax.Device] | None = None,
        memory: int | None = None,
    ) -> "RunSpec":
        """Return the run on `devices`, all that are here by default, with `memory` bytes each.

        Raises ValueError or `UserError` where settings, model and devices do not fit together.
        """
        trained = trained_names(preset, recipe) if training else ()
        mesh, placed = placement.choose_mesh(
            recipe,
            settings,
            preset.transformer,
            experts=len(preset.experts),
            trained=len(trained),
            devices=devices,
            memory=memory,
        )
        backend = choose_backend(
            recipe.model.attention,
            platform_of(mesh.devices.flat[0]),
            settings.dtype,
            preset.transformer.attention_head_dim,
        )
        if memory is None:
            memory = device_memory.limit(mesh.local_devices[0])
        spec = cls(recipe, settings, preset, mesh, backend, memory, placed)
        spec.check(training)
        return spec

    def check(self, training: bool = True) -> None:
        """Raise ValueError or `UserError` where the model cannot make the videos that are asked
        for, ffmpeg is missing, or a trained expert would learn nothing.
        """
        if training:
            if not self.trained:
                raise UserError(
                    f"config.train.experts={tuple(self.recipe.train.experts)} leaves nothing to "
                    f"train: {self.recipe.model.path} has {', '.join(self.preset.experts)}"
                )
            _ = self.windows
        for frames in (*(self.trained_frames if training else ()), *self.evaluated_frames):
            self.shape_of(frames)
        if max(self.evaluated_frames) > 1:
            media.check_ffmpeg()  # for the report
        _ = self.schedule, self.solver

    # ---- videos ------------------------------------------------------------------------------
    def shape_of(self, frames: int) -> tuple[int, ...]:
        """Return (F, H, W, C) of the latents of a video of this many frames."""
        sample = self.recipe.sample
        return pipeline.latent_shape(
            frames, sample.height, sample.width, self.preset.vae, self.preset.transformer
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of one video's latents in training."""
        return self.shape_of(self.recipe.sample.frames)

    @property
    def eval_shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of one video's latents in evaluations."""
        return self.shape_of(self.evaluated_frames[0])

    @property
    def trained_frames(self) -> tuple[int, ...]:
        """The lengths of epochs' videos, each once."""
        sample = self.recipe.sample
        return frame_schedule.trained(sample.frames, sample.frame_schedule)

    @property
    def evaluated_frames(self) -> tuple[int, ...]:
        """The lengths of evaluations, each once; the run is judged by the first."""
        recipe = self.recipe
        return frame_schedule.evaluated(
            recipe.sample.frames, recipe.eval.frames, recipe.eval.more_frames
        )

    @property
    def tokens(self) -> int:
        """S of one video in training."""
        return tokens(self.shape)

    @property
    def eval_batches(self) -> int:
        """The batches of an evaluation."""
        return -(-self.recipe.eval.num_prompts // self.recipe.sample.batch_size)

    # ---- denoising ---------------------------------------------------------------------------
    @functools.cached_property
    def schedule(self) -> Schedule:
        """The rollout's schedule."""
        return flow_sigmas(self.recipe.sample.steps, self.recipe.sample.shift)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The rollout's steps by expert."""
        return segments(self.schedule.timesteps, self.preset.boundary)

    @functools.cached_property
    def solver(self):
        """The evaluation's solver, with its schedule."""
        evaluation = self.recipe.eval
        return make_solver(evaluation.solver, evaluation.steps, self.recipe.sample.shift)

    @functools.cached_property
    def eval_segments(self) -> tuple[Segment, ...]:
        """The evaluation's steps by expert."""
        return segments(self.solver.schedule.timesteps, self.preset.boundary)

    @property
    def sampling_guidance(self) -> tuple[float, ...]:
        """The rollout's guidance of each expert."""
        sample = self.recipe.sample
        return guidances(sample.guidance, sample.guidance_2, len(self.preset.experts))

    @property
    def eval_guidance(self) -> tuple[float, ...]:
        """The evaluation's guidance of each expert."""
        evaluation = self.recipe.eval
        return guidances(evaluation.guidance, evaluation.guidance_2, len(self.preset.experts))

    # ---- training ----------------------------------------------------------------------------
    @property
    def method(self) -> Method:
        return self.settings.method

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the trained experts."""
        return trained_names(self.preset, self.recipe)

    @property
    def trained_experts(self) -> list[int]:
        """The numbers of the trained experts."""
        return [i for i, name in enumerate(self.preset.experts) if name in self.trained]

    @functools.cached_property
    def windows(self) -> Windows:
        """Which steps are stochastic, by epoch."""
        return Windows.make(
            self.recipe.sample,
            self.segments,
            self.preset.experts,
            self.trained,
            self.method.levels,
        )

    def trained_steps(self, expert: int) -> int:
        """Return K: the stochastic steps of an epoch that train an expert, or the noise levels of a
        video.
        """
        pairs = zip(self.segments, self.windows.quotas)
        return sum(quota for segment, quota in pairs if segment.expert == expert)

    def update_batches(self, expert: int) -> np.ndarray:
        """Return the rollout batches that train an expert in each optimiser step of an epoch: int
        [updates, M].
        """
        settings, updates = self.settings, self.recipe.train.updates_per_epoch
        if settings.train_batches < settings.batches:  # of those that are chosen by their rewards
            return np.arange(settings.train_batches).reshape(updates, -1)
        i = next(i for i, segment in enumerate(self.segments) if segment.expert == expert)
        return batches_with(
            self.windows.videos(i), self.recipe.sample.batch_size, settings.batches, updates
        )

    @functools.cached_property
    def remat(self) -> str:
        """How much of each block the backward pass recomputes, one of `REMAT_POLICIES`, chosen for
        the longest videos.
        """
        return placement.choose_remat(
            self.recipe,
            self.settings,
            self.preset.transformer,
            self.mesh,
            tokens=tokens(self.shape_of(max(self.trained_frames))),
            experts=len(self.preset.experts),
            trained=len(self.trained),
            memory=self.memory,
        )

    # ---- runs like this one ------------------------------------------------------------------
    def changed(self, **sections: dict) -> "RunSpec":
        """Return the run with other settings, {section: {key: value}}, on the same mesh."""
        recipe = changed(self.recipe, **sections)
        return dataclasses.replace(self, recipe=recipe, settings=settings_of(recipe))

    def with_frames(self, sample: int, evaluation: int) -> "RunSpec":
        """Return the run at one length in training and one in evaluation."""
        if (self.trained_frames, self.evaluated_frames) == ((sample,), (evaluation,)):
            return self
        return self.changed(
            sample={"frames": sample, "frame_schedule": ()},
            eval={"frames": evaluation, "more_frames": ()},
        )


def changed(recipe: Recipe, **sections: dict) -> Recipe:
    """Return a recipe with other settings, {section: {key: value}}."""
    parts = {
        name: dataclasses.replace(getattr(recipe, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(recipe, **parts)


def trained_names(preset: Preset, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of a model's experts that a recipe trains."""
    return tuple(name for name in preset.experts if name in recipe.train.experts)


def tokens(shape: tuple[int, ...]) -> int:
    """Return S of latents (F, H, W, C)."""
    frames, height, width, _ = shape
    return frames * (height // 2) * (width // 2)
