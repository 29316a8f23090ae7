"""Rollout step and update step of Wan at full size with random weights: seconds, model FLOP/s and
peak memory.

    python -m benchmarks.full_size --size 1.3b [--height 512 --width 512 --frames 1 --batch 9
    --guidance 1 --json FILE] python -m benchmarks.full_size --size 14b --devices 4 --fsdp 4 --batch
    36 --full

The transformer is the real configuration with weights drawn on the devices, LoRA rank 32 on
attention, or with --full all weights trained; text is 64 rows of random embeddings (--text_rows)
padded to 512. Model FLOPs count the matrix products of a forward pass (two for guidance), times
three in the update; recomputation and the reference of --kl are not counted. TFLOP/s are of one
device, MFU is of an H200's nominal 989. `benchmarks.peer` measures the same in PyTorch,
`benchmarks.side_by_side` both, `benchmarks.scaling` several devices beside one.
"""

import dataclasses
import functools
import statistics
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import kernels, workload
from benchmarks.workload import Record, Stage
from grpo.compiled import offload
from grpo.learning import optimiser as update
from grpo.learning.optimiser import OptimiserConfig
from grpo.learning.policy import Policy, make_policy
from grpo.learning.policy_loss import LossConfig
from grpo.methods.grpo import make_gradient, stack_batches
from grpo.rollout import StepTable, make_step, rollout
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.sde import SDEConfig
from wan_jax.distributed import memory
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.models import flat_params
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.config import TransformerConfig
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.transformer import REMAT_POLICIES, WanTransformer3D


def random_bias(name: str, array: jax.Array) -> jax.Array:
    """The array, or where it is a bias, numbers of about a trained one's size: with zeros, two
    programs that round before and after a bias would agree.
    """
    if not name.endswith("bias"):
        return array
    key = jax.random.fold_in(jax.random.key(2), zlib.crc32(name.encode()))
    return (0.02 * jax.random.normal(key, array.shape)).astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class RandomPolicy:
    """A policy with weights drawn on the devices."""

    config: TransformerConfig
    mesh: jax.sharding.Mesh
    backend: str
    policy: Policy
    trainable: dict
    frozen: nnx.State | None

    @classmethod
    def draw(
        cls, size: str, dtype, remat: str, mesh: jax.sharding.Mesh | None = None, full: bool = False
    ) -> "RandomPolicy":
        """mesh: None for the first device. full: trains all weights, with no reference beside them."""
        config, dtype = workload.transformer_config(size), jnp.dtype(dtype)
        mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
        backend = choose_backend(
            "auto", platform_of(mesh.devices.flat[0]), dtype, config.attention_head_dim
        )

        def weights():
            state = nnx.split(
                WanTransformer3D(config, dtype=dtype, attention=backend, rngs=nnx.Rngs(0))
            )[1]
            return flat_params.unflatten(
                state, {k: random_bias(k, v) for k, v in flat_params.flatten(state).items()}
            )

        frozen = jax.jit(
            weights, out_shardings=sharding_lib.param_shardings(jax.eval_shape(weights), mesh)
        )()
        policy, trainable = make_policy(
            config,
            frozen,
            mesh,
            lora=None if full else LoRAConfig(workload.RANK, workload.ALPHA),
            key=jax.random.key(0),
            dtype=dtype,
            attention=backend,
            remat=remat,
        )
        return cls(config, mesh, backend, policy, trainable, None if full else frozen)

    def placed(self, rows: jax.Array) -> jax.Array:
        """[B, ...] on the mesh as training lays them: elsewhere the second call of a program would
        compile it again.
        """
        return sharding_lib.place(rows, sharding_lib.batch_sharding(self.mesh))

    def random_text(self, batch: int, rows: int = workload.TEXT) -> TextBatch:
        """Embeddings of a batch of prompts and of the negative one, in the weights' type as
        training has them.
        """
        dtype = self.policy.base["proj_out"]["kernel"].dtype
        text = jax.random.normal(jax.random.key(1), (batch + 1, rows, 4096), dtype)
        return TextBatch(
            self.placed(text[:-1]),
            sharding_lib.place(text[-1], sharding_lib.replicated(self.mesh)),
            workload.TEXT_ROWS - rows,
        )


def step_table() -> StepTable:
    return StepTable.make(flow_sigmas(workload.STEPS, workload.SHIFT), SDEConfig("flow_grpo_wan"))


def peak_bytes() -> int | None:
    """Of the fullest device so far."""
    return memory.peaks().device


def software() -> str:
    return f"JAX {jax.__version__}"


def timed(function, repeats: int) -> float:
    """Median seconds of a call that returns arrays, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure(f) -> Record:
    mesh = mesh_lib.make_mesh(f.fsdp, jax.devices()[: f.devices], f.context)
    r = RandomPolicy.draw(f.size, f.dtype, f.remat, mesh, f.full)
    policy, trainable, frozen = r.policy, r.trainable, r.frozen
    steps, optimiser = step_table(), OptimiserConfig()
    step = make_step(policy, steps, f.guidance)
    where = offload if f.offload_optimiser else update
    gradient = make_gradient(policy, steps, f.guidance, LossConfig(kl_beta=f.kl))
    apply = where.make_update(gradient, policy, optimiser, mesh)
    shape, text = (
        workload.latent_shape(f.frames, f.height, f.width),
        r.random_text(f.batch, f.text_rows),
    )
    flops = workload.batch_flops(r.config, shape, f.batch, f.guidance) / f.devices
    parameters, kind = (
        sum(x.size for x in jax.tree.leaves(policy.base)),
        jax.devices()[0].device_kind,
    )
    print(
        f"{f.size}: {parameters:,} parameters {f.dtype}, {'all' if f.full else 'adapters'} "
        f"trained, {f.batch} x {f.frames} x {f.height} x {f.width}, guidance {f.guidance}, "
        f"attention {r.backend}, remat {f.remat}, {f.devices} x {kind}, mesh "
        f"{mesh_lib.describe(mesh)}, jax {jax.__version__}",
        flush=True,
    )
    stages = {}

    def show(name, title, seconds, work):
        stages[name] = Stage.of(seconds, peak_bytes(), work)
        print(f"{title}: {stages[name]}", flush=True)

    samples = r.placed(jnp.arange(f.batch, dtype=jnp.int32))
    x = r.placed(jax.random.normal(jax.random.key(3), (f.batch, *shape)))
    key = jax.random.key(4)
    show(
        "rollout",
        "rollout step",
        timed(
            functools.partial(step, trainable, frozen, x, 3, True, text, key, samples), f.repeats
        ),
        flops,
    )
    window = np.array(workload.TRAINED)
    _, kept = rollout(
        step, trainable, frozen, x, text, key=key, samples=samples, steps=range(18), window=window
    )
    advantages = np.random.default_rng(0).standard_normal((1, f.batch))
    batch = stack_batches(
        [kept] * f.micro, np.repeat(advantages, f.micro, 0), np.ones((f.micro, f.batch), bool)
    )
    states, firsts = [], []
    for i in range(f.experts):
        since, own = time.perf_counter(), jax.tree.map(jnp.copy, trainable) if i else trainable
        states.append(jax.block_until_ready(where.init_state(own, optimiser)))
        if f.offload_optimiser:
            print(
                f"optimiser's state on the host after {time.perf_counter() - since:.1f} s",
                flush=True,
            )
    del r, trainable, own  # the states' own may be donated

    def one_update():
        """Of every expert."""
        for i, state in enumerate(states):
            states[i], metrics, _ = apply(state, frozen, batch)
            if not firsts:
                firsts.append(metrics.averages())
        return states

    seconds = timed(one_update, f.repeats) / f.experts
    show(
        "update",
        f"update of {f.micro} x {len(window)} steps, each",
        seconds / len(window) / f.micro,
        3 * flops,
    )
    (first,) = firsts
    if f.profile:
        kernels.show(
            "rollout step",
            lambda: step(states[0].trainable, frozen, x, 3, True, text, key, samples),
        )
        kernels.show("update", one_update)
    print(f"first update's ratio: {first['ratio_min']:.7f} to {first['ratio_max']:.7f}")
    return Record("ours", stages, kind, software(), (first["ratio_min"], first["ratio_max"]))


def main(_):
    memory.allow_pinned()
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    flags.DEFINE_integer("micro", 1, "rollout batches in an update")
    flags.DEFINE_string("dtype", "bfloat16", "of weights and matrix products")
    flags.DEFINE_enum(
        "remat", "save_matmuls", list(REMAT_POLICIES), "what the backward pass computes again"
    )
    flags.DEFINE_integer(
        "text_rows", workload.TEXT, "of the prompts; FLOPs are counted for the default"
    )
    flags.DEFINE_integer("devices", 1, "how many GPUs: data x fsdp x context", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "GPUs that share the weights")
    flags.DEFINE_integer("context", 1, "GPUs that share a video's tokens")
    flags.DEFINE_bool("full", False, "train all weights, without a reference")
    flags.DEFINE_integer("experts", 1, "trained in turn, 2 as A14B", lower_bound=1)
    flags.DEFINE_bool(
        "offload_optimiser", False, "moments and average wait in host memory between updates"
    )
    flags.DEFINE_bool("profile", False, "list the kernels by time")
    app.run(main)
