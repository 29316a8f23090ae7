"""A converted model on disk, as `convert.from_diffusers` writes it.

    MODEL/wan_jax.json                          format, source, dtype, and each file's size and
                                                digest
                                                (`wan_jax.storage.integrity`); written last, so its
                                                presence means whole
    MODEL/model_index.json, scheduler/, tokenizer/          as published
    MODEL/{transformer,vae,text_encoder}/config.json        as published
    MODEL/{transformer,vae,text_encoder}/params/            orbax, flat dict
                                                            {'blocks/attn1/to_q/kernel': array}

Wan 2.2 A14B has a second expert in MODEL/transformer_2/. The arrays lie on disk as `array_store`
describes. Every file is compared with its digest: small ones when the folder is opened, the arrays'
when they are read, by the process that reads them. Folders of earlier versions have no digests;
their files are only checked for presence and size.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import multihost
from wan_jax.errors import UserError
from wan_jax.models import config as config_lib
from wan_jax.models import params as P
from wan_jax.models.text_encoder import UMT5Encoder
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import integrity
from wan_jax.storage.array_store import AGAIN, CHUNK_FILE, ArrayStore, StoreError
from wan_jax.storage.paths import expand

FORMAT = 1
MANIFEST = "wan_jax.json"
COMPONENTS = {
    "transformer": (config_lib.TransformerConfig, WanTransformer3D),
    "transformer_2": (config_lib.TransformerConfig, WanTransformer3D),
    "vae": (config_lib.VAEConfig, AutoencoderKLWan),
    "text_encoder": (config_lib.TextEncoderConfig, UMT5Encoder),
}


@dataclasses.dataclass(frozen=True)
class ModelDir:
    path: pathlib.Path
    manifest: dict
    index: dict  # model_index.json

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the digests of weights, configurations, tokenizer and scheduler: the same for
        a copy or a second conversion of the same model, wherever it is. None: the folder has no
        digests.
        """
        files = self.manifest.get("files")
        return (
            None
            if files is None
            else integrity.combined(
                (name, *entry)
                for name, entry in files.items()
                if "/params/" not in name or CHUNK_FILE.fullmatch(name)
            )
        )

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for name in COMPONENTS if name in self.manifest["components"])

    @property
    def experts(self) -> tuple[str, ...]:
        """The transformers, the one for high noise first."""
        return tuple(
            name for name in ("transformer", "transformer_2") if name in self.manifest["components"]
        )

    @property
    def boundary(self) -> float | None:
        """Steps with timestep >= boundary x 1000 belong to the first expert, the others to the
        second; None: one.
        """
        return self.index.get("boundary_ratio")

    @property
    def metadata(self) -> dict[str, str]:
        """What a safetensors file that was made from this model says of it, besides its tensors."""
        return {} if self.fingerprint is None else {"wan_jax_model": self.fingerprint}

    def check_same(
        self, digest: str | None, path: str, what: str, setting: str = "the model given"
    ) -> None:
        """Raises `UserError` when `what`, which was trained on the model `path` with the
        fingerprint `digest`, belongs to another model; prints a line where that cannot be known.
        setting: how the user names this model.
        """
        mine = self.fingerprint
        if digest is None or mine is None:
            if multihost.first():
                print(
                    f"{what}: it cannot be checked that it was trained on {self.path}, because the "
                    f"{'model' if mine is None else 'file'} was written by an earlier version, "
                    "without digests",
                    flush=True,
                )
        elif digest != mine:
            raise UserError(
                f"{what} was trained on {path} ({digest[:12]}), {setting} is {self.path} "
                f"({mine[:12]}), which is another model: give the one it was trained on, wherever "
                "it is now"
            )

    def config(self, component: str):
        """The component's configuration dataclass. Raises `UserError`."""
        return self._config(COMPONENTS[component][0], f"{component}/config.json")

    @property
    def scheduler(self) -> config_lib.Scheduler:
        return config_lib.load_scheduler(self.path / "scheduler" / "scheduler_config.json")

    def _config(self, kind: type, name: str):
        try:
            return config_lib.load(kind, self.path / name)
        except config_lib.ConfigError as error:
            raise UserError(f"{error}; {AGAIN}") from None

    @property
    def tokenizer_path(self) -> pathlib.Path:
        return self.path / "tokenizer"

    def load(self, component: str, like: nnx.State, mesh=None) -> nnx.State:
        """The weights in the structure and dtypes of the abstract state `like`.

        They are sharded over `mesh`, which all processes do together; None: on this process's first
        device, and no other process need take part.

        Raises `UserError` when the stored arrays do not fit.
        """
        wanted, store = P.flatten(like), self.arrays(component)
        if wrong := sorted(
            k
            for k in wanted.keys() | store.shapes.keys()
            if k not in wanted or store.shapes.get(k) != tuple(wanted[k].shape)
        ):
            raise UserError(
                f"{store.path} does not fit {component}/config.json: {len(wrong)} arrays are "
                f"missing, unknown or of another shape ({', '.join(wrong[:3])}); {AGAIN}"
            )
        shardings = (
            mesh_lib.param_shardings(wanted, mesh)
            if mesh
            else dict.fromkeys(wanted, SingleDeviceSharding(jax.local_devices()[0]))
        )
        # one array at a time: the host holds this process's shards of the largest
        flat = {
            k: jax.block_until_ready(store.place(k, v.dtype, shardings[k]))
            for k, v in wanted.items()
        }
        return P.unflatten(like, flat)

    def load_numpy(self, component: str) -> dict[str, np.ndarray]:
        """The weights as stored, on the host."""
        store = self.arrays(component)
        return {k: store.read(k) for k in store.shapes}

    def arrays(self, component: str) -> ArrayStore:
        """The stored arrays, not read yet. Raises `UserError` when they are missing or damaged, and
        so does reading.
        """
        files, prefix = self.manifest.get("files"), f"{component}/params/"
        if files is not None:
            files = {
                name.removeprefix(prefix): entry
                for name, entry in files.items()
                if name.startswith(prefix)
            }
        try:
            store = ArrayStore(params_path(self.path, component), files=files)
            store.check_whole()
            return store
        except StoreError as error:
            raise UserError(f"{error}; {AGAIN}") from None


def params_path(model: pathlib.Path, component: str) -> pathlib.Path:
    return expand(model) / component / "params"


def previous_folder(path: pathlib.Path) -> pathlib.Path:
    """Return where a folder that is being replaced waits until the new one has its name."""
    return path.with_name(f".{path.name}.previous")


def open_model(path, verify: bool = True) -> ModelDir:
    """Raises `UserError` when the folder is missing, damaged, no converted model, or one of another
    format.

    verify: compare all files but the arrays with their digests now, and the arrays when they are
    read.
    """
    path = expand(path)
    advice = (
        f"convert one with: python -m convert.from_diffusers --src DIFFUSERS_FOLDER --dst {path}"
    )
    if not path.is_dir():
        if (previous := previous_folder(path)).is_dir():
            raise UserError(
                f"model folder {path} does not exist: its replacement was stopped half-way. The "
                f"previous model is complete in {previous}; rename it, or convert to {path} again"
            )
        raise UserError(f"model folder {path} does not exist; {advice}")
    if not (path / MANIFEST).is_file():
        if (path / "model_index.json").is_file():
            raise UserError(
                f"{path} is a Diffusers folder, not a converted model (it has no {MANIFEST}); "
                f"convert it with: python -m convert.from_diffusers --src {path} --dst "
                f"{path}-converted"
            )
        raise UserError(f"{path} is no converted model (it has no {MANIFEST}); {advice}")
    try:
        manifest = integrity.read_manifest(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {manifest.get('format')}, this version reads {FORMAT}; {advice}"
            )
        files = manifest.get("files")
        if not verify:
            manifest.pop("files", None)
        elif files is None:
            if multihost.first():
                print(
                    f"{path} was converted by an earlier version, without digests: damage to its "
                    "files cannot be seen; convert the model again to have them",
                    flush=True,
                )
        elif found := integrity.problem(
            path, {k: v for k, v in files.items() if "/params/" not in k}
        ):
            raise integrity.Damaged(f"model folder {path} is damaged: {found}")
        model = ModelDir(path, manifest, integrity.read_json(path / "model_index.json"))
        if "transformer" not in manifest.get("components", ()):
            raise integrity.Damaged(f"{path / MANIFEST} names no transformer")
        configs = {model.config(name) for name in model.experts}
    except integrity.Damaged as error:
        raise UserError(f"{error}; {AGAIN}") from None
    if len(configs) > 1:
        raise UserError(
            f"{path}: the two transformers have different configurations; no Wan model has that, "
            f"{advice}"
        )
    return model


@functools.cache
def abstract(
    component: str, config, *, dtype=jnp.float32, **kwargs
) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, abstract state) of a component; kwargs go to the transformer (attention, remat).

    Equal arguments give the same objects: do not change them.
    """
    model_class = COMPONENTS[component][1]
    return nnx.split(
        nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0), **kwargs))
    )


def build(
    component: str, model: ModelDir, *, dtype=jnp.float32, mesh=None, **kwargs
) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, state) of a component with its stored weights, cast to the dtypes the module keeps
    them in.
    """
    graphdef, like = abstract(component, model.config(component), dtype=dtype, **kwargs)
    return graphdef, model.load(component, like, mesh)
