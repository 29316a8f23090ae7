"""A converted model on disk, as `convert.from_diffusers` writes it.

    MODEL/wan_jax.json                          format, source and dtype; written last, so its presence means whole
    MODEL/model_index.json, scheduler/, tokenizer/          as published
    MODEL/{transformer,vae,text_encoder}/config.json        as published
    MODEL/{transformer,vae,text_encoder}/params/            orbax, flat dict {'blocks/attn1/to_q/kernel': array}

Wan 2.2 A14B has a second expert in MODEL/transformer_2/. The arrays lie on disk as `array_store` describes.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from wan_jax import config as config_lib
from wan_jax import mesh as mesh_lib
from wan_jax import params as P
from wan_jax.array_store import ArrayStore, StoreError
from wan_jax.cli import UserError
from wan_jax.text_encoder import UMT5Encoder
from wan_jax.transformer import WanTransformer3D
from wan_jax.vae import AutoencoderKLWan

FORMAT = 1
MANIFEST = "wan_jax.json"
AGAIN = "convert the model again with python -m convert.from_diffusers --overwrite"
COMPONENTS = {"transformer": (config_lib.TransformerConfig, WanTransformer3D),
              "transformer_2": (config_lib.TransformerConfig, WanTransformer3D),
              "vae": (config_lib.VAEConfig, AutoencoderKLWan),
              "text_encoder": (config_lib.TextEncoderConfig, UMT5Encoder)}


@dataclasses.dataclass(frozen=True)
class ModelDir:
    path: pathlib.Path
    manifest: dict
    index: dict  # model_index.json

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for name in COMPONENTS if name in self.manifest["components"])

    @property
    def experts(self) -> tuple[str, ...]:
        """The transformers, the one for high noise first."""
        return tuple(name for name in ("transformer", "transformer_2") if name in self.manifest["components"])

    @property
    def boundary(self) -> float | None:
        """Steps with timestep >= boundary x 1000 belong to the first expert, the others to the second; None: one."""
        return self.index.get("boundary_ratio")

    def config(self, component: str):
        """The component's configuration dataclass."""
        return config_lib.load(COMPONENTS[component][0], self.path / component / "config.json")

    @property
    def scheduler(self) -> config_lib.SchedulerConfig:
        return config_lib.load(config_lib.SchedulerConfig, self.path / "scheduler" / "scheduler_config.json")

    @property
    def tokenizer_path(self) -> pathlib.Path:
        return self.path / "tokenizer"

    def load(self, component: str, like: nnx.State, mesh=None) -> nnx.State:
        """The weights in the structure and dtypes of the abstract state `like`.

        They are sharded over `mesh`, which all processes do together; None: on this process's first device, and
        no other process need take part.

        Raises `UserError` when the stored arrays do not fit.
        """
        wanted, store = P.flatten(like), self.arrays(component)
        if wrong := sorted(k for k in wanted.keys() | store.shapes.keys()
                           if k not in wanted or store.shapes.get(k) != tuple(wanted[k].shape)):
            raise UserError(f"{store.path} does not fit {component}/config.json: {len(wrong)} arrays are missing, "
                            f"unknown or of another shape ({', '.join(wrong[:3])}); {AGAIN}")
        shardings = mesh_lib.param_shardings(wanted, mesh) if mesh else dict.fromkeys(
            wanted, SingleDeviceSharding(jax.local_devices()[0]))
        # one array at a time: the host holds this process's shards of the largest
        flat = {k: jax.block_until_ready(store.place(k, v.dtype, shardings[k])) for k, v in wanted.items()}
        return P.unflatten(like, flat)

    def load_numpy(self, component: str) -> dict[str, np.ndarray]:
        """The weights as stored, on the host."""
        store = self.arrays(component)
        return {k: store.read(k) for k in store.shapes}

    def arrays(self, component: str) -> ArrayStore:
        """The stored arrays, not read yet. Raises `UserError` when they are missing or damaged."""
        try:
            store = ArrayStore(params_path(self.path, component))
            store.check_whole()
            return store
        except StoreError as error:
            raise UserError(f"{error}; {AGAIN}") from None


def params_path(model: pathlib.Path, component: str) -> pathlib.Path:
    return (model / component / "params").absolute()


def open_model(path) -> ModelDir:
    """Raises `UserError` when the folder is missing, is no converted model, or one of another format."""
    path = pathlib.Path(path)
    advice = f"convert one with: python -m convert.from_diffusers --src DIFFUSERS_FOLDER --dst {path}"
    if not path.is_dir():
        raise UserError(f"model folder {path} does not exist; {advice}")
    if not (path / MANIFEST).is_file():
        diffusers = (path / "model_index.json").is_file()
        kind = "a Diffusers folder, not a converted model" if diffusers else "no converted model"
        raise UserError(f"{path} is {kind} (it has no {MANIFEST}); {advice}")
    parts = []
    for name in (MANIFEST, "model_index.json"):
        try:
            parts.append(json.loads((path / name).read_text()))
        except (json.JSONDecodeError, FileNotFoundError):
            raise UserError(f"{path / name} is missing or damaged; {advice}") from None
    manifest, index = parts
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}; {advice}")
    model = ModelDir(path, manifest, index)
    if len({model.config(name) for name in model.experts}) > 1:
        raise UserError(f"{path}: the two transformers have different configurations; no Wan model has that, {advice}")
    return model


def abstract(component: str, config, *, dtype=jnp.float32, **kwargs) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, abstract state) of a component; kwargs go to the transformer (attention, remat)."""
    model_class = COMPONENTS[component][1]
    return nnx.split(nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0), **kwargs)))


def build(component: str, model: ModelDir, *, dtype=jnp.float32, mesh=None, **kwargs) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, state) of a component with its stored weights, cast to the dtypes the module keeps them in."""
    graphdef, like = abstract(component, model.config(component), dtype=dtype, **kwargs)
    return graphdef, model.load(component, like, mesh)
