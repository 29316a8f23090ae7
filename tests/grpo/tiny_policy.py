"""A tiny policy with random weights, its rollouts, and its optimiser."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grpo.learning.optimiser import OptimiserConfig, make_update
from grpo.learning.policy import make_structure
from grpo.learning.policy_gradient import make_gradient
from grpo.learning.step_table import StepTable
from grpo.rollout import initial_noise, make_step, rollout
from tests.grpo.specs import devices_mesh
from wan_jax.diffusion import sde
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.models import flat_params
from wan_jax.models.config import TransformerConfig
from wan_jax.models.lora import LoRAConfig

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=12,
    freq_dim=16,
    ffn_dim=64,
    num_layers=2,
)
SHAPE, STEPS, WINDOW = (1, 4, 4, 4), 4, np.array([0, 2])
LORA = LoRAConfig(rank=4, alpha=8.0)
TABLE = StepTable.make(flow_sigmas(STEPS, 3.0), sde.SDEConfig("flow_sde", 0.7))
OPTIMISER = OptimiserConfig(learning_rate=1e-2, ema_decay=0.9)


def setup(lora=LORA, mesh=None, dtype=jnp.float32, remat="none", config=CONFIG):
    """Return (policy, trainable, frozen) of a random model; adapters are moved away from zero so
    that they matter.

    The trained arrays are a copy that may be donated. The rest is shared by all calls with the same
    arguments.
    """
    policy, trainable, frozen = shared_setup(lora, mesh, dtype, remat, config)
    return policy, copies(trainable), frozen


@cache
def shared_setup(lora, mesh, dtype, remat, config):
    mesh = mesh or devices_mesh(1)
    policy = make_structure(config, lora=lora, dtype=dtype, attention="xla", remat=remat, mesh=mesh)
    rng = np.random.default_rng(0)
    base = {
        path: random_array(rng, path, x)
        for path, x in sorted(flat_params.flatten(policy.base).items())
    }
    frozen = sharding_lib.shard_params(flat_params.unflatten(policy.base, base), mesh)
    trainable = {}
    for path, x in sorted(policy.trainable.items()):
        start = base[path].astype(np.float32) if lora is None else random_array(rng, path, x)
        trainable[path] = start + 0.05 * rng.standard_normal(x.shape, np.float32)
    return policy, sharding_lib.shard_params(trainable, mesh), frozen


def random_array(rng, path: str, x) -> np.ndarray:
    """Return a matrix that keeps the variance, a norm's scale near 1, or small numbers. Drawn on the
    host: to compile the model's own initialisation takes seconds for every mesh.
    """
    value = rng.standard_normal(x.shape, np.float32)
    if path.endswith("/scale"):
        value = 1 + 0.1 * value
    elif path.endswith("/lora_b"):
        value = np.zeros(x.shape, np.float32)
    else:
        stacked = path.startswith("blocks/")
        inputs = np.prod(x.shape[stacked:-1]) if path.endswith(("/kernel", "/lora_a")) else 100
        value = value * inputs**-0.5
    return value.astype(x.dtype)


# jitted functions by what they are made of; each keeps its policy, so that no other one gets its id
MADE = {}


def made(policy, make, *key):
    """Return make(), once for a policy and a key."""
    key = id(policy), *key
    if key not in MADE:
        MADE[key] = make()
    return MADE[key]


def step_of(policy, guidance=1.0, kl_kind=None):
    """Return the jitted denoising step with TABLE, one for equal arguments."""
    make = partial(make_step, policy, TABLE, guidance, kl_kind=kl_kind)
    return made(policy, make, "step", guidance, kl_kind)


def update_of(policy, loss, guidance=1.0, optimiser=OPTIMISER):
    """Return Flow-GRPO's jitted update with TABLE, one for equal arguments."""

    def make():
        return make_update(make_gradient(policy, TABLE, guidance, loss), policy, optimiser)

    return made(policy, make, "update", loss, guidance, optimiser)


def gradient_of(policy, loss, guidance=1.0):
    """Return Flow-GRPO's jitted gradient with TABLE, one for equal arguments."""
    make = partial(make_gradient, policy, TABLE, guidance, loss)
    return made(policy, lambda: jax.jit(make()), "gradient", loss, guidance)


compiled_velocity = nnx.jit(velocity, static_argnums=4)


def text_batch(batch: int, mesh=None) -> TextBatch:
    """Return random prompts of 6 rows."""
    rng = np.random.default_rng(0)
    embeddings, negative = rng.standard_normal((batch, 6, 12)), rng.standard_normal((6, 12))
    mesh = mesh or devices_mesh(1)
    return TextBatch(
        jax.device_put(embeddings.astype(np.float32), sharding_lib.batch_sharding(mesh)),
        jax.device_put(negative.astype(np.float32), sharding_lib.replicated(mesh)),
        10,
    )


def sampled(policy, trainable, frozen, samples, guidance=1.0, text=None, mesh=None, shape=SHAPE):
    """Return (final latents, Trajectory) of a rollout with TABLE and WINDOW. samples: numbers."""
    mesh = mesh or devices_mesh(1)
    step = step_of(policy, guidance)
    samples = jax.device_put(jnp.asarray(samples, jnp.int32), sharding_lib.batch_sharding(mesh))
    text = text or text_batch(len(samples), mesh)
    key = jax.random.key(3)
    return rollout(
        step,
        trainable,
        frozen,
        initial_noise(key, samples, shape),
        text,
        key=key,
        samples=samples,
        steps=range(STEPS),
        window=WINDOW,
    )


def flat_vector(tree) -> np.ndarray:
    """Return all arrays of a dict as one float64 vector."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for _, x in sorted(tree.items())])


copies = jax.jit(partial(jax.tree.map, jnp.copy))
