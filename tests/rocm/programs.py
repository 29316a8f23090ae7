"""The programs that training runs on the devices, with abstract arguments: to be lowered and compiled, never executed.

Built by the same functions as in `grpo.train`, for a preset's configuration and a recipe, on any mesh, be it of devices
that exist or of a topology to compile for. Arguments lie on the mesh as training lays them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from configs import wan21_14b_ocr
from grpo import settings
from grpo.policy import make_structure
from grpo.rollout import StepTable, Trajectory, initial_noise, make_step
from grpo.update import UpdateBatch, make_update, state_shapes
from wan_jax import mesh as mesh_lib
from wan_jax import model_dir, pipeline, presets, vae_chunks
from wan_jax.guidance import TextBatch
from wan_jax.schedule import flow_sigmas
from wan_jax.solvers import SolverState, make_solver

TEXT_ROWS = 64  # the prompts' longest, of the 512 that the transformer attends to


@dataclasses.dataclass(frozen=True)
class Program:
    jitted: Callable
    args: tuple  # abstract, up to static ones


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run before it has weights: a published model, a recipe, a mesh and an attention backend."""

    preset: presets.Preset
    recipe: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    backend: str

    @property
    def settings(self) -> settings.Settings:
        return settings.from_config(self.recipe)

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of one video's latents."""
        sample = self.recipe.sample
        return pipeline.latent_shape(sample.frames, sample.height, sample.width, self.preset.vae,
                                     self.preset.transformer)

    @property
    def tokens(self) -> int:
        """S of one video."""
        frames, height, width, _ = self.shape
        return frames * (height // 2) * (width // 2)

    @property
    def policy(self):
        return make_structure(self.preset.transformer, lora=self.settings.lora, dtype=self.settings.dtype,
                              attention=self.backend, remat=self.recipe.model.remat, mesh=self.mesh)

    @property
    def table(self) -> StepTable:
        return StepTable.make(flow_sigmas(self.recipe.sample.steps, self.recipe.sample.shift), self.settings.sde)

    def initial_noise(self) -> Program:
        return Program(initial_noise, (random_key(), self.rows(jnp.int32), self.shape))

    def rollout_step(self) -> Program:
        policy = self.policy
        step = make_step(policy, self.table, self.recipe.sample.guidance)
        return Program(step, (self.params(policy.trainable), self.params(policy.base), self.latents(), integer(),
                              jax.ShapeDtypeStruct((), bool), self.text(), random_key(), self.rows(jnp.int32)))

    def ode_step(self) -> Program:
        """Of evaluation: the deployment sampler's."""
        policy, evaluation = self.policy, self.recipe.eval
        solver = make_solver(evaluation.solver, evaluation.steps, self.recipe.sample.shift)
        x = self.latents()
        history = (x,) * len(jax.eval_shape(solver.init, x).history)
        return Program(pipeline.make_ode_step(policy.module, solver, evaluation.guidance),
                       ((self.params(policy.trainable), self.params(policy.base)), SolverState(x, history), integer(),
                        self.text()))

    def update(self) -> Program:
        """Of one optimiser step: M micro-batches of the recipe's batch, K stochastic steps each."""
        s, policy, sample = self.settings, self.policy, self.recipe.sample
        m, k = s.batches // self.recipe.train.updates_per_epoch, sample.sde_steps
        state = state_shapes(policy, s.optimiser)
        x = self.latents(m, k)
        trajectory = Trajectory(x, x, self.rows(jnp.float32, m, k), jax.ShapeDtypeStruct((m, k), jnp.int32),
                                self.text(m))
        b = sample.batch_size
        batch = UpdateBatch(trajectory, jax.ShapeDtypeStruct((m, b), jnp.float32), jax.ShapeDtypeStruct((m, b), bool))
        update = make_update(policy, self.table, sample.guidance, s.loss, s.optimiser, self.mesh)
        return Program(update, (self.params(state), self.params(policy.base), batch))

    def decode(self) -> Program:
        """The VAE on a rollout batch: whole clips, or the chunk that `pipeline.make_decoder` chooses in mid-clip."""
        graph, state = model_dir.abstract("vae", self.preset.vae)
        state = place(state, mesh_lib.replicated(self.mesh))
        whole, step = pipeline.decoder_programs(graph)
        latents = self.latents()
        chunk = vae_chunks.choose_chunk(self.preset.vae, latents.sharding.shard_shape(latents.shape))
        if not chunk:
            return Program(whole, (state, latents))
        piece = jax.ShapeDtypeStruct((latents.shape[0], chunk, *self.shape[1:]), jnp.float32, sharding=latents.sharding)
        _, history = jax.eval_shape(step, state, piece, ())
        return Program(step, (state, piece, place(history, latents.sharding)))

    def encode_text(self) -> Program:
        """The text encoder on 16 prompts, on one device."""
        graph, state = model_dir.abstract("text_encoder", self.preset.text_encoder, dtype=self.settings.dtype)
        here = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
        ids = jax.ShapeDtypeStruct((16, TEXT_ROWS), jnp.int32, sharding=here)
        return Program(pipeline.make_encoder(graph), (place(state, here), ids, ids))

    # ---- arguments -------------------------------------------------------------------------------------------------
    def params(self, tree):
        """Abstract parameters, or what has their shapes, as `mesh.shard_params` lays them."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                            mesh_lib.param_shardings(tree, self.mesh))

    def rows(self, dtype, *leading: int, shape: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
        """[*leading, B, *shape], split over the mesh by B."""
        sharding = mesh_lib.batch_sharding(self.mesh, len(leading))
        return jax.ShapeDtypeStruct((*leading, self.recipe.sample.batch_size, *shape), dtype, sharding=sharding)

    def latents(self, *leading: int) -> jax.ShapeDtypeStruct:
        return self.rows(jnp.float32, *leading, shape=self.shape)

    def text(self, *leading: int) -> TextBatch:
        rows = (TEXT_ROWS, self.preset.transformer.text_dim)
        negative = jax.ShapeDtypeStruct((*leading, *rows), jnp.float32, sharding=mesh_lib.replicated(self.mesh))
        return TextBatch(self.rows(jnp.float32, *leading, shape=rows), negative, pipeline.TEXT_ROWS - TEXT_ROWS)


def place(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def integer() -> jax.ShapeDtypeStruct:
    """A Python int."""
    return jax.ShapeDtypeStruct((), jnp.int32, weak_type=True)


def random_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Case:
    """One of the runs that are lowered and compiled: the recipe of single frames, 9 videos a device, at this size."""

    model: str  # of `presets.PRESETS`
    lora: bool  # or all weights
    devices: int  # 8: a mesh of data 2 x fsdp 4
    video: bool = False  # 33 x 240 x 416 instead of 1 x 512 x 512

    def __str__(self) -> str:
        return (f"{self.model}-{'lora' if self.lora else 'full'}-{'33x240x416' if self.video else '1x512x512'}"
                f"-{self.devices}")

    def run(self, devices: list, backend: str) -> Run:
        """On the first of `devices`, which may be those of a topology."""
        recipe = wan21_14b_ocr.get_config()
        recipe.sample.batch_size = 9 * self.devices
        if self.video:
            recipe.sample.frames, recipe.sample.height, recipe.sample.width = 33, 240, 416
        if not self.lora:
            recipe.lora.rank = 0
        mesh = mesh_lib.make_mesh(fsdp=4 if self.devices == 8 else 1, devices=devices[: self.devices])
        return Run(presets.PRESETS[self.model], recipe, mesh, backend)


CASES = [Case(model, lora, devices) for model in ("wan2.1-1.3b", "wan2.1-14b") for lora in (True, False)
         for devices in (1, 8) if lora or devices == 8 or model == "wan2.1-1.3b"]
CASES += [Case("wan2.1-1.3b", True, 1, True), Case("wan2.1-1.3b", True, 8, True), Case("wan2.1-14b", True, 1, True)]
TOO_LARGE = Case("wan2.1-14b", False, 1)  # its weights, moments and average alone are more than a device has
