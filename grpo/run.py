"""The description of a run: everything that follows from recipe, model and devices, before a weight is
read.

`RunSpec.make` builds it once. Training, evaluation, planning and the reward head share it. It is
immutable, and expensive values are computed once.
"""

import dataclasses
import functools

import jax
import numpy as np

from grpo.compiled import placement
from grpo.data import latent_folder
from grpo.learning.method import Method
from grpo.learning.sde_windows import Windows, batches_with
from grpo.settings import frame_schedule, video_sizes
from grpo.settings.parse import Settings, settings_of
from grpo.settings.schema import Recipe
from grpo.settings.video_sizes import Size
from wan_jax.diffusion.experts import Segment, guidances, segments
from wan_jax.diffusion.schedule import Schedule, flow_sigmas
from wan_jax.diffusion.solvers import make_solver
from wan_jax.distributed import memory as device_memory
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.precision import describe
from wan_jax.models.presets import Preset
from wan_jax.models.quantised import Quantisation
from wan_jax.storage import media, merged_loras, model_dir
from wan_jax.storage.paths import expand


def open_model(recipe: Recipe) -> model_dir.ModelDir:
    """Return a recipe's model, with its LoRAs merged, and with one expert where the recipe asks for
    it. Raises `UserError` where the folder or a LoRA file cannot be used.
    """
    settings = recipe.model
    model = model_dir.open_model(settings.path, single_expert=settings.single_expert)
    return merged_loras.merge(model, settings.loras)


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run without its weights.

    Attributes:
        recipe: all settings.
        settings: the objects that follow from the recipe alone.
        preset: the model's configurations.
        mesh: the devices.
        backend: of attention.
        memory: bytes of a device; None: unknown.
        placed: one line for the log about the placement on the mesh.
    """

    recipe: Recipe
    settings: Settings
    preset: Preset
    mesh: jax.sharding.Mesh
    backend: str
    memory: int | None = None
    placed: str = ""

    @classmethod
    def make(
        cls,
        recipe: Recipe,
        settings: Settings,
        preset: Preset,
        *,
        training: bool = True,
        devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
        memory: int | None = None,
    ) -> "RunSpec":
        """Return a run. Raises ValueError or `UserError` where settings, model and devices contradict
        each other.

        training: whether the run trains, or only evaluates. devices: None for all of this machine.
        memory: bytes of a device; None: as the backend reports.
        """
        trained = trained_names(preset, recipe) if training else ()
        mesh, placed = placement.choose_mesh(
            recipe, settings, preset, trained=len(trained), devices=devices, memory=memory
        )
        platform = platform_of(mesh.devices.flat[0])
        backend = choose_backend(
            recipe.model.attention,
            platform,
            settings.dtype,
            preset.transformer.attention_head_dim,
        )
        if platform != "cpu" and recipe.model.dtype == "float32":
            placed += f"\nfloat32 products in {describe(recipe.model.matmul_precision, platform)}"
        if memory is None:
            memory = device_memory.limit(mesh.local_devices[0])
        spec = cls(recipe, settings, preset, mesh, backend, memory, placed)
        spec.check(training)
        return spec

    def check(self, training: bool = True) -> None:
        """Raise ValueError or `UserError` where the model cannot make videos of the given sizes,
        ffmpeg is missing, or a trained expert would have no step.
        """
        if training:
            if not self.trained:
                raise UserError(
                    f"config.train.experts={tuple(self.recipe.train.experts)} has no expert of the "
                    f"model: {self.recipe.model.path} has {', '.join(self.preset.experts)}"
                )
            rank, width = self.recipe.lora.rank, self.preset.transformer.width
            if rank > width:
                raise UserError(
                    f"config.lora.rank={rank} is above the model's width, {width}: set a lower one, 16 "
                    "to 128 are usual, or 0 to train all weights"
                )
            _ = self.windows  # raises where an expert has no step
            _ = self.data_shape  # raises where there is no data
        for size in (*(self.trained_sizes if training else ()), *self.evaluated_sizes):
            self.check_size(size)
        if training:
            for size in self.trained_sizes[1:]:
                _ = self.of_sizes(size, self.evaluated_sizes[0]).windows
        if max(size.frames for size in self.evaluated_sizes) > 1:
            media.check_ffmpeg()  # for the report
        _ = self.schedule, self.solver  # raise where steps and shift are invalid

    @functools.cached_property
    def quantisation(self) -> Quantisation | None:
        """How the frozen weights of the blocks are stored; None: in the model's type."""
        device = self.mesh.devices.flat[0]
        return Quantisation.choose(self.recipe.model.weights, platform_of(device), device)

    # ---- videos ------------------------------------------------------------------------------
    def shape_of(self, frames: int) -> tuple[int, ...]:
        """Return (F, H, W, C) of the latents of a video with `frames` frames, of training's size."""
        return self.latent_shape(dataclasses.replace(self.trained_sizes[0], frames=frames))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return (F, H, W, C) of the latents of a video. Raises `UserError` where the model cannot make
        videos of this size.
        """
        return pipeline.latent_shape(
            size.frames, size.height, size.width, self.preset.vae, self.preset.transformer
        )

    def check_size(self, size: Size) -> None:
        """Raise `UserError` as `latent_shape` does, with the size where it is not that of the first
        epoch.
        """
        sample = self.recipe.sample
        try:
            self.latent_shape(size)
        except UserError as error:
            if (size.height, size.width) == (sample.height, sample.width):
                raise
            raise UserError(f"videos of {size} (frames x height x width): {error}") from None

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of one video's latents in training."""
        return self.latent_shape(self.trained_sizes[0])

    @property
    def eval_shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of one video's latents in evaluations."""
        return self.latent_shape(self.evaluated_sizes[0])

    @property
    def trained_sizes(self) -> tuple[Size, ...]:
        """All sizes that videos of epochs have, each once."""
        return video_sizes.trained(self.recipe.sample)

    @functools.cached_property
    def evaluated_sizes(self) -> tuple[Size, ...]:
        """All sizes that videos of evaluations have, each once. The first is the one by which the run
        is judged.
        """
        return tuple(dict.fromkeys(map(self.size_of, self.evaluations)))

    @property
    def evaluated_frames(self) -> tuple[int, ...]:
        """All numbers of frames that videos of evaluations have, each once. The first is the one by
        which the run is judged.
        """
        recipe = self.recipe
        return frame_schedule.evaluated(
            recipe.sample.frames, recipe.eval.frames, recipe.eval.more_frames
        )

    @property
    def evaluations(self) -> tuple[int | str, ...]:
        """All series of evaluations: numbers of frames, then names of further sizes and of further
        prompts. The first is the one by which the run is judged.
        """
        prompts = (name for name, _ in self.recipe.eval.more_prompts)
        return (*self.evaluated_frames, *video_sizes.more(self.recipe), *prompts)

    def size_of(self, series: int | str) -> Size:
        """Return the size of the videos of a series of evaluations."""
        judged = video_sizes.judged(self.recipe)
        if isinstance(series, str):
            return video_sizes.more(self.recipe).get(series, judged)
        return dataclasses.replace(judged, frames=series)

    def label(self, series: int | str) -> str:
        """Return the end of a printed line about an evaluation that names its series; "" where there is
        only one.
        """
        if isinstance(series, str):
            of_size = series in video_sizes.more(self.recipe)
            size = series.replace("_1_frames", "_1_frame").replace("_", " ")
            return f", {size}" if of_size else f", prompts {series}"
        return f", {series} frames" if len(self.evaluated_frames) > 1 else ""

    @functools.cached_property
    def data_kind(self) -> latent_folder.Kind | None:
        """What the data are; None where training sees none. Raises `UserError` where the folder is no
        data.
        """
        if not self.recipe.data.used:
            return None
        return latent_folder.read_manifest(expand(self.recipe.data.path))[0]

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """(F, H, W, C) of the latents of the data; None where training sees none."""
        kind = self.data_kind
        if kind is None:
            return None
        return pipeline.latent_shape(
            kind.frames, kind.height, kind.width, self.preset.vae, self.preset.transformer
        )

    @property
    def tokens(self) -> int:
        """S, the number of tokens of one video in training."""
        return tokens(self.shape)

    @property
    def eval_batches(self) -> int:
        """The number of batches of an evaluation."""
        return -(-self.recipe.eval.num_prompts // self.recipe.sample.batch_size)

    # ---- denoising ---------------------------------------------------------------------------
    @functools.cached_property
    def schedule(self) -> Schedule:
        """The schedule of the rollout."""
        sample = self.recipe.sample
        return flow_sigmas(sample.steps, sample.shift, sample.schedule)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The steps of the rollout by expert."""
        return segments(self.schedule.timesteps, self.preset.boundary)

    @functools.cached_property
    def solver(self):
        """The solver of the evaluation, with its schedule."""
        evaluation, sample = self.recipe.eval, self.recipe.sample
        version = sample.schedule if evaluation.schedule == "sample" else evaluation.schedule
        shift = self.evaluated_sizes[0].shift
        return make_solver(evaluation.solver, evaluation.steps, shift, version=version)

    @functools.cached_property
    def eval_segments(self) -> tuple[Segment, ...]:
        """The steps of the evaluation by expert."""
        return segments(self.solver.schedule.timesteps, self.preset.boundary)

    @property
    def sampling_guidance(self) -> tuple[float, ...]:
        """The guidance of each expert in the rollout."""
        sample = self.recipe.sample
        return guidances(sample.guidance, sample.guidance_2, len(self.preset.experts))

    @property
    def eval_guidance(self) -> tuple[float, ...]:
        """The guidance of each expert in the evaluation."""
        evaluation = self.recipe.eval
        return guidances(evaluation.guidance, evaluation.guidance_2, len(self.preset.experts))

    # ---- training ----------------------------------------------------------------------------
    @property
    def method(self) -> Method:
        """The training method."""
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
        """The rule by which epochs draw their stochastic steps."""
        return Windows.make(
            self.recipe.sample,
            self.segments,
            self.preset.experts,
            self.trained,
            self.method.levels,
        )

    def trained_steps(self, expert: int) -> int:
        """Return K. For Flow-GRPO it is the number of stochastic steps of an epoch that train an
        expert; of methods on finished videos it is the number of noise levels of a video.
        """
        pairs = zip(self.segments, self.windows.quotas)
        return sum(quota for segment, quota in pairs if segment.expert == expert)

    def kept_latents(self, expert: int) -> int:
        """Return the number of latents of a video that Flow-GRPO trains an expert with, K + 1 where
        its stochastic steps follow each other, else 2 K.
        """
        steps = self.trained_steps(expert)
        segment = [part.expert for part in self.segments].index(expert)
        return steps + 1 if self.windows.neighbours(segment) else 2 * steps

    def update_batches(self, expert: int) -> np.ndarray:
        """Return which rollout batches train an expert in each optimiser step of an epoch, as
        indices into `Credit.order`: int [updates, M].
        """
        settings, updates = self.settings, self.recipe.train.updates_per_epoch
        if settings.train_batches < settings.batches:  # groups are selected by their rewards
            return np.arange(settings.train_batches).reshape(updates, -1)
        i = next(i for i, segment in enumerate(self.segments) if segment.expert == expert)
        return batches_with(
            self.windows.videos(i), self.recipe.sample.batch_size, settings.batches, updates
        )

    @functools.cached_property
    def remat(self) -> str:
        """The rematerialisation of blocks in the backward pass, one of `REMAT_POLICIES`, chosen for
        the largest videos.
        """
        largest = max(self.trained_sizes, key=lambda size: size.volume)
        return placement.choose_remat(
            self.recipe,
            self.settings,
            self.preset,
            self.mesh,
            tokens=tokens(self.latent_shape(largest)),
            trained=len(self.trained),
            memory=self.memory,
        )

    # ---- variants of this run ----------------------------------------------------------------
    def changed(self, **sections: dict) -> "RunSpec":
        """Return the run with other settings, {section: {key: value}}, on the same mesh."""
        recipe = changed(self.recipe, **sections)
        return dataclasses.replace(self, recipe=recipe, settings=settings_of(recipe))

    def of_sizes(self, sample: Size, evaluation: Size) -> "RunSpec":
        """Return the run with one size in training and one in evaluations."""
        if (self.trained_sizes, self.evaluated_sizes) == ((sample,), (evaluation,)):
            return self
        return self.changed(
            sample=vars(sample) | {"frame_schedule": (), "size_schedule": ()},
            eval=vars(evaluation) | {"more_frames": (), "more_sizes": ()},
        )


def changed(recipe: Recipe, **sections: dict) -> Recipe:
    """Return a recipe with other settings, {section: {key: value}}."""
    replaced = {
        name: dataclasses.replace(getattr(recipe, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(recipe, **replaced)


def trained_names(preset: Preset, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the experts of a model that a recipe trains."""
    return tuple(name for name in preset.experts if name in recipe.train.experts)


def tokens(shape: tuple[int, ...]) -> int:
    """Return S, the number of tokens of latents (F, H, W, C)."""
    frames, height, width, _ = shape
    return frames * (height // 2) * (width // 2)
