"""A converted model on disk, as `convert.from_diffusers` writes it.

    MODEL/wan_jax.json                            format, source, dtype, size and digest of each
                                                  file (`integrity`); written last, so its presence
                                                  means that the folder is complete
    MODEL/model_index.json, scheduler/, tokenizer/      as published
    MODEL/{transformer,vae,text_encoder}/config.json    as published
    MODEL/{transformer,vae,text_encoder}/params/        orbax, a flat dict
                                                  {'blocks/attn1/to_q/kernel': array}

Wan 2.2 A14B has a second expert in MODEL/transformer_2/. `array_store` describes the files of
arrays. Every file is compared with its digest: small ones when the folder is opened, arrays when
they are read, by the process that reads them. Folders of earlier versions have no digests; their
files are only checked for presence and size.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from wan_jax.distributed import multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.models import config as config_lib
from wan_jax.models import flat_params, quantised
from wan_jax.models.quantised import Quantisation
from wan_jax.models.text_encoder import UMT5Encoder
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import integrity
from wan_jax.storage.array_store import CHUNK_FILE, CONVERT_AGAIN, ArrayStore, StoreError
from wan_jax.storage.paths import expand
from wan_jax.storage.weight_changes import WeightChanges

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
    """An open model folder."""

    path: pathlib.Path
    manifest: dict
    index: dict  # model_index.json
    single_expert: bool = False  # of two experts, whether the first one is used for all steps
    # LoRAs that are merged into the transformers, and what they change of one by its name; by
    # `merged_loras.merge`
    loras: tuple = ()
    changes: Callable[[str], WeightChanges] | None = None

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the digests of weights, configurations, tokenizer and scheduler; None if the
        folder has no digests.

        A copy and a second conversion of the same model have the same fingerprint.
        """
        files = self.manifest.get("files")
        if files is None:
            return None
        return integrity.combined(
            (name, *entry)
            for name, entry in files.items()
            if "/params/" not in name or CHUNK_FILE.fullmatch(name)
        )

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the networks that the folder has."""
        return tuple(name for name in COMPONENTS if name in self.manifest["components"])

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the transformers, the one for high noise first."""
        names = ("transformer",) if self.single_expert else ("transformer", "transformer_2")
        return tuple(name for name in names if name in self.manifest["components"])

    @property
    def boundary(self) -> float | None:
        """Steps with timestep >= boundary x 1000 belong to the first expert, others to the second.
        None if there is one.
        """
        return None if self.single_expert else self.index.get("boundary_ratio")

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata for a safetensors file that is made from this model."""
        return {} if self.fingerprint is None else {"wan_jax_model": self.fingerprint}

    def check_same(
        self, digest: str | None, path: str, what: str, setting: str = "the model given"
    ) -> None:
        """Raise `UserError` when something was trained on another model; print a line if that is
        unknown.

        Args:
            digest: fingerprint of the model it was trained on; None if unknown.
            path: where that model was.
            what: what was trained, for the message.
            setting: how the user chose this model, for the message.
        """
        own = self.fingerprint
        if digest is None or own is None:
            if multihost.first():
                print(
                    f"{what}: it cannot be checked that it was trained on {self.path}, because the "
                    f"{'model' if own is None else 'file'} was written by an earlier version, "
                    "without digests",
                    flush=True,
                )
        elif digest != own:
            raise UserError(
                f"{what} was trained on {path} ({digest[:12]}), {setting} is {self.path} "
                f"({own[:12]}), which is another model: give the one it was trained on, wherever "
                "it is now"
            )

    def config(self, component: str):
        """Return the configuration of a component. Raises `UserError`."""
        return self._config(COMPONENTS[component][0], f"{component}/config.json")

    @property
    def scheduler(self) -> config_lib.Scheduler:
        """How the model's own scheduler samples. Raises `UserError`."""
        return config_lib.load_scheduler(self.path / "scheduler" / "scheduler_config.json")

    def _config(self, kind: type, name: str):
        try:
            return config_lib.load(kind, self.path / name)
        except config_lib.ConfigError as error:
            raise UserError(f"{error}; {CONVERT_AGAIN}") from None

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """Folder of the tokenizer."""
        return self.path / "tokenizer"

    def load(
        self,
        component: str,
        like: nnx.State,
        mesh=None,
        device=None,
        quantisation: Quantisation | None = None,
    ) -> nnx.State:
        """Return the weights of a component in the structure and dtypes of the abstract state
        `like`.

        mesh: shards them over it, and all processes must call this; None places them on `device`,
        which is this process's first one if not given. quantisation: of `like`; a weight is
        quantised on the devices, layer by layer. Raises `UserError` when the stored arrays do not fit.
        """
        wanted = flat_params.flatten(like)
        store = self.arrays(component)
        expected = {k: tuple(v.shape) for k, v in wanted.items()}
        kernels = quantised.kernels(expected)
        for name, parts in kernels.items():
            assert quantisation is not None
            expected[name] = quantisation.kernel_shape(expected[parts[0]])
            for part in parts:
                del expected[part]
        if wrong := sorted(
            k
            for k in expected.keys() | store.shapes.keys()
            if store.shapes.get(k) != expected.get(k)
        ):
            raise UserError(
                f"{store.path} does not fit {component}/config.json: {len(wrong)} arrays are "
                f"missing, unknown or of another shape ({', '.join(wrong[:3])}); {CONVERT_AGAIN}"
            )
        shardings = (
            sharding_lib.param_shardings(wanted, mesh)
            if mesh
            else dict.fromkeys(wanted, SingleDeviceSharding(device or jax.local_devices()[0]))
        )
        changes = self.changes(component) if self.changes and component in self.experts else None
        # one array at a time: the host needs memory for this process's shards of the largest one
        flat = {
            k: jax.block_until_ready(store.place(k, wanted[k].dtype, shardings[k], changes))
            for k in expected.keys() & wanted.keys()
        }
        for name, parts in kernels.items():
            assert quantisation is not None
            targets = [
                jax.ShapeDtypeStruct(wanted[k].shape, wanted[k].dtype, sharding=shardings[k])
                for k in parts
            ]
            flat |= zip(parts, _quantised(store, name, targets, quantisation, changes))
        if changes is not None:
            changes.report(component, ", ".join(map(str, self.loras)))
            if quantisation is not None and multihost.first():
                print(
                    f"{component}: the merged weights were then quantised to {quantisation.kind}; "
                    "what that lost is not counted",
                    flush=True,
                )
        return flat_params.unflatten(like, flat)

    def arrays(self, component: str) -> ArrayStore:
        """Return the stored arrays, unread. This and reading them raise `UserError` when they are
        missing or damaged.
        """
        files = self.manifest.get("files")
        prefix = f"{component}/params/"
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
            raise UserError(f"{error}; {CONVERT_AGAIN}") from None


def _quantised(store: ArrayStore, name: str, like, quantisation: Quantisation, changes):
    """Return values and scales of a stored kernel [L, in, out], of which one layer at a time is on
    the devices as it is stored. like: abstract values and scales, with shardings.
    """
    # the device has the same outputs of the kernel as of the values
    sharding = like[0].sharding
    if isinstance(sharding, NamedSharding):
        _, outputs, inputs = (*sharding.spec, None, None, None)[:3]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(inputs, outputs))
    changed = changes is not None and name in changes.terms
    dtype = np.float32 if changed else store.dtypes[name]
    layers = range(like[0].shape[0])
    kernels = (store.place(name, dtype, sharding, changes, layer) for layer in layers)
    return quantised.quantise_layers(quantisation, kernels, *like)


def params_path(model: pathlib.Path, component: str) -> pathlib.Path:
    """Return the folder of a component's arrays."""
    return expand(model) / component / "params"


def previous_folder(path: pathlib.Path) -> pathlib.Path:
    """Return the temporary name of a folder while it is being replaced."""
    return path.with_name(f".{path.name}.previous")


def open_model(path, verify: bool = True, single_expert: bool = False) -> ModelDir:
    """Open a converted model. Raises `UserError` when the folder is missing, damaged, not a
    converted model, or one of another format.

    verify: compare all files but the arrays with their digests now, and the arrays when they are
    read. single_expert: of two experts, use the first one for all steps.
    """
    # Is it a converted model?
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
        raise UserError(f"{path} is not a converted model (it has no {MANIFEST}); {advice}")
    # Are its files complete and undamaged?
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
        index = integrity.read_json(path / "model_index.json")
        model = ModelDir(path, manifest, index, single_expert=single_expert)
        if "transformer" not in manifest.get("components", ()):
            raise integrity.Damaged(f"{path / MANIFEST} names no transformer")
        configs = {model.config(name) for name in model.experts}
    except integrity.Damaged as error:
        raise UserError(f"{error}; {CONVERT_AGAIN}") from None
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
    """Return (graphdef, abstract state) of a component; kwargs go to the transformer (attention,
    remat).

    Equal arguments return the same objects, which must not be changed.
    """
    model_class = COMPONENTS[component][1]
    return nnx.split(
        nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0), **kwargs))
    )


def component_bytes(component: str, model: ModelDir, dtype, **kwargs) -> int:
    """Return the bytes of the weights of a component as `build` makes them."""
    _, state = abstract(component, model.config(component), dtype=dtype, **kwargs)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def build(
    component: str, model: ModelDir, *, dtype=jnp.float32, mesh=None, device=None, **kwargs
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return (graphdef, state) of a component with its stored weights, cast to the dtypes of the
    module's parameters; mesh, device: as in `ModelDir.load`.
    """
    graphdef, like = abstract(component, model.config(component), dtype=dtype, **kwargs)
    return graphdef, model.load(component, like, mesh, device, kwargs.get("quantisation"))
