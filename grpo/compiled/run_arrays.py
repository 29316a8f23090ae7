"""The abstract arrays of a run: their types and shardings are those of the arrays in training."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from grpo.learning import abstract, data_loss
from grpo.learning.optimiser import TrainState, state_shapes
from grpo.learning.policy import Policy, make_structure
from grpo.run import RunSpec
from grpo.settings.choices import ONE_PER_GROUP
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import SolverState
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline

# Rows of text that are assumed where the prompts have not been encoded. The transformer attends to
# 512.
TEXT_ROWS = 64


@dataclasses.dataclass(frozen=True)
class RunArrays:
    """The abstract arrays of a run: parameters and states, batches, and what an epoch keeps.

    Attributes:
        spec: the description of the run.
        text_rows: St of every batch.
    """

    spec: RunSpec
    text_rows: int = TEXT_ROWS

    def params(self, tree):
        """Return abstract parameters with the shardings of `mesh.shard_params`. tree: parameters, or
        arrays with their shapes.
        """
        return jax.tree.map(
            lambda x, sharding: abstract.array(x.shape, x.dtype, sharding=sharding),
            tree,
            sharding_lib.param_shardings(tree, self.spec.mesh),
        )

    @functools.cached_property
    def policy(self) -> Policy:
        """The structure of the policy."""
        spec = self.spec
        return make_structure(
            spec.preset.transformer,
            lora=spec.settings.lora,
            dtype=spec.settings.dtype,
            attention=spec.backend,
            remat=spec.remat,
            quantisation=spec.quantisation,
            mesh=spec.mesh,
        )

    @functools.cached_property
    def frozen(self):
        """The base weights of one expert; None in full fine-tuning without a reference."""
        needed = self.spec.settings.lora is not None or self.spec.method.needs_reference
        return self.params(self.policy.base) if needed else None

    @functools.cached_property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The trained arrays of one expert."""
        return self.params(self.policy.trainable)

    @functools.cached_property
    def state(self) -> TrainState:
        """The state of one trained expert."""
        config, method = self.spec.settings.optimiser, self.spec.method
        return self.params(state_shapes(self.policy, config, method.adaptive_kl, method.lagged))

    def solver_state(self) -> SolverState:
        """Return the state of the evaluation's solver for a batch."""
        x = self.rows(jnp.float32, shape=self.spec.eval_shape)
        return SolverState(x, (x,) * len(jax.eval_shape(self.spec.solver.init, x).history))

    @property
    def step_per_video(self) -> bool:
        """Whether the videos of a batch have different stochastic steps."""
        return self.spec.windows.rule == ONE_PER_GROUP

    @property
    def stochastic(self) -> Any:
        """The flag of a stochastic step: bool [], or [B] where it differs between videos."""
        return self.rows(bool) if self.step_per_video else abstract.array((), bool)

    def rows(self, dtype, *leading: int, shape: tuple[int, ...] = (), batch: int = 0) -> Any:
        """Return an abstract array [*leading, B, *shape], with B split over the mesh. batch: B; 0:
        the recipe's.
        """
        sharding = sharding_lib.batch_sharding(self.spec.mesh, len(leading))
        size = batch or self.spec.recipe.sample.batch_size
        return abstract.array((*leading, size, *shape), dtype, sharding=sharding)

    @staticmethod
    def random_key() -> Any:
        """Return an abstract JAX key."""
        return jax.eval_shape(lambda: jax.random.key(0))

    def latents(self, *leading: int) -> Any:
        """Return the latents of a rollout batch, fp32 [*leading, B, F, H, W, C]."""
        return self.rows(jnp.float32, *leading, shape=self.spec.shape)

    def text(self, *leading: int, batch: int = 0) -> TextBatch:
        """Return the text of a batch, in the text encoder's dtype, which is the model's."""
        dtype = self.spec.settings.dtype
        shape = (self.text_rows, self.spec.preset.transformer.text_dim)
        replicated = sharding_lib.replicated(self.spec.mesh)
        return TextBatch(
            self.rows(dtype, *leading, shape=shape, batch=batch),
            abstract.array((*leading, *shape), dtype, sharding=replicated),
            pipeline.TEXT_ROWS - self.text_rows,
        )

    @functools.cached_property
    def trajectories(self) -> tuple:
        """The arrays that the rollout of an epoch leaves on the devices."""
        return () if self.spec.recipe.data.only else self.spec.method.epoch_shapes(self)

    def waiting(self, expert: int) -> tuple:
        """Return the arrays of the epoch that are on the devices during an update, beside its batch."""
        return () if self.spec.recipe.data.only else self.spec.method.waiting_shapes(self, expert)

    def update_batch(self, expert: int):
        """Return the batch of one optimiser step of an expert."""
        data = self.spec.recipe.data
        if data.only:
            return data_loss.data_shapes(self)
        batch = self.spec.method.batch_shapes(self, expert)
        return data_loss.AnchoredBatch(batch, data_loss.data_shapes(self)) if data.used else batch
