"""The shapes and dtypes in the signatures of `wan_jax.diffusion` and `wan_jax.models` are true.

The test wraps every function and method with a jaxtyping annotation in a type checker, traces all
networks, solvers and steps at small sizes, and asserts that each was called.
"""

import functools
import inspect
import pkgutil
import sys
import types
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from flax import nnx

import wan_jax.diffusion
import wan_jax.models
from tests import tiny
from wan_jax.diffusion import experts, guidance, schedule, sde, solvers
from wan_jax.models import (
    attention,
    layers,
    lora,
    positions,
    quantised,
    text_encoder,
    vae_chunks,
)
from wan_jax.models.attention import pallas
from wan_jax.models.config import TextEncoderConfig, TransformerConfig, VAEConfig, from_dict
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.quantised import Quantisation
from wan_jax.models.tokenizer import Tokenizer
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage.model_dir import ModelDir

FOR_TYPES = {"ModelDir": ModelDir}  # what modules import for type checkers alone


def modules() -> list[types.ModuleType]:
    found = []
    for package in (wan_jax.diffusion, wan_jax.models):
        names = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [__import__(info.name, fromlist=["_"]) for info in names]
    return found


def has_shapes(annotation) -> bool:
    """Return whether an annotation contains a jaxtyping type."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(has_shapes, typing.get_args(annotation)))


def annotated() -> dict[str, tuple[object, str, typing.Callable]]:
    """Return {qualified name: (owner, attribute, function)} of what has shapes in its signature."""
    found = {}
    for module in modules():
        for owner in (module, *(x for x in vars(module).values() if inspect.isclass(x))):
            if inspect.isclass(owner) and owner.__module__ != module.__name__:
                continue
            for name, function in vars(owner).items():
                if not inspect.isfunction(function) or function.__module__ != module.__name__:
                    continue
                if name == "__init__":  # of a dataclass, which transformations fill with non-arrays
                    continue
                hints = typing.get_type_hints(function, localns=FOR_TYPES)
                if any(map(has_shapes, hints.values())):
                    found[f"{module.__name__}.{function.__qualname__}"] = owner, name, function
    return found


def checked(function: typing.Callable) -> typing.Callable:
    return jaxtyping.jaxtyped(typechecker=beartype)(function)


def recorded(name: str, function: typing.Callable, names: set[str]) -> typing.Callable:
    """Return a wrapper that adds `name` to `names` when it is called."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        names.add(name)
        return function(*args, **kwargs)

    return wrapper


@pytest.fixture
def called():
    """Wrap all annotated functions, wherever they were imported; return their names, and those of
    the functions that were called.
    """
    functions = annotated()
    names = set()
    with pytest.MonkeyPatch.context() as patch:
        for qualified, (owner, attribute, function) in functions.items():
            wrapper = recorded(qualified, checked(function), names)
            patch.setattr(owner, attribute, wrapper)
            for module in list(sys.modules.values()):
                if getattr(module, "__name__", "").startswith("wan_jax."):
                    for name, value in list(vars(module).items()):
                        if value is function:
                            patch.setattr(module, name, wrapper)
        yield set(functions), names


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def run_transformer():
    config = from_dict(TransformerConfig, tiny.SETTINGS["transformer"])
    model = WanTransformer3D(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    lora.attach(model, LoRAConfig(rank=2), jax.random.key(0))
    text = guidance.TextBatch(
        normal(2, 3, config.text_dim, dtype=jnp.bfloat16),
        normal(3, config.text_dim, dtype=jnp.bfloat16),
        padding=5,
    )
    timestep = jnp.array([300.0, 900.0])
    guidance.velocity(model, normal(2, 1, 4, 6, 16), timestep, text, 4.0)
    layers.layer_norm(normal(2, 8), 1e-6)
    Quantisation("int8").quantise(normal(8, 4))
    positions.rope_table((1, 2, 3), 12)


def run_products_in_8_bits():
    config = TransformerConfig(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=160, num_layers=1, text_dim=24
    )
    how = Quantisation("fp8", native=True, kernel=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "SMALLEST", 0)
        model = WanTransformer3D(config, quantisation=how, rngs=nnx.Rngs(0))
        model(normal(1, 1, 4, 6, 16), jnp.ones(1), normal(1, 3, 24))


def run_attention():
    q, k = normal(1, 16, 2, 16), normal(1, 5, 2, 16)
    counts = np.array([1, 1, 1, 1, 7])
    for backend in ("xla", "chunked"):
        attention.attention(q, k, k, backend=backend, key_counts=counts)
    attention.repeat_keys(k, counts)
    pallas.pallas_attention(q, k, k, jnp.zeros(5), interpret=True)


def run_text_encoder():
    model = text_encoder.UMT5Encoder(
        from_dict(TextEncoderConfig, tiny.SETTINGS["text_encoder"]), rngs=nnx.Rngs(0)
    )
    text_encoder.encode(model, jnp.ones((2, 6), jnp.int32), jnp.array([[1] * 6, [1] * 3 + [0] * 3]))


def run_tokenizer(folder):
    Tokenizer.load(tiny.write_pipeline(folder) / "tokenizer")(["a sign", "b"], 8)


def run_vae():
    for settings in (tiny.SETTINGS["vae"], tiny.TI2V["vae"]):
        config = from_dict(VAEConfig, settings)
        vae = AutoencoderKLWan(config, rngs=nnx.Rngs(0))
        cell = config.scale_factor_spatial
        pixels = jnp.tanh(normal(1, 5, cell, 2 * cell, 3))
        mean, _ = vae.encode(pixels)
        list(vae_chunks.encode_chunks(vae.encode_chunk, pixels, [1, 1], 4))
        vae.decode(vae.denormalise(vae.normalise(mean)))
        list(vae_chunks.decode_chunks(vae.decode_chunk, mean, [1, 1]))
        video = np.zeros((1, 5, cell, cell, 3), np.float32)
        vae_chunks.decode_tiles(lambda z, video=video: video, mean, 1, 0)


def run_diffusion():
    x, velocity = normal(2, 1, 4, 6, 16), normal(2, 1, 4, 6, 16, dtype=jnp.bfloat16)
    for name in solvers.SOLVERS:
        solver = solvers.make_solver(name, 3, 3.0)
        state = solver.init(x)
        for i in (0, jnp.int32(1)):
            state = solver.step(state, i, velocity)
    for kind in sde.DEFAULTS:
        config, steps = sde.SDEConfig(kind), schedule.flow_sigmas(3, 3.0)
        g = sde.diffusion_coefficient(config, steps)
        sde.mean_slope(config, steps)
        for i in (0, np.array([0, 1])):
            sde.sde_step(
                x, velocity, steps.sigmas[i], steps.sigmas[i + 1], g[i], x, config.preserving
            )
    experts.segments(steps.timesteps, 0.875)


@pytest.mark.slow
def test_all_signatures_are_true(called, tmp_path):
    expected, names = called
    for run in (
        run_transformer,
        run_products_in_8_bits,
        run_attention,
        run_text_encoder,
        run_vae,
        run_diffusion,
    ):
        jax.eval_shape(run)  # tracing calls everything, and compiles nothing
    run_tokenizer(tmp_path / "pipeline")
    assert names == expected


def test_the_check_refuses_wrong_shapes_and_dtypes():
    x = normal(2, 3)
    log_prob = checked(sde.log_prob)
    assert log_prob(x, x, 1.0).shape == (2,)
    for wrong in ((x, x[:1], 1.0), (x, x.astype(jnp.int32), 1.0), (x, x, jnp.ones(3))):
        with pytest.raises(jaxtyping.TypeCheckError, match="log_prob"):
            log_prob(*wrong)
