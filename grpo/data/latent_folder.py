"""Data to train on: latents of pictures or videos, each with the embedding of its own prompt, in a
folder that `python -m grpo.encode_clips` writes.

    DATA/data.json            what the data is (`Kind`), its items, and size and CRC-32 of every file;
                              written last, so that what it names is complete
    DATA/00000_latents.npy    float32 [n, F, H, W, C], normalised latents of a shard
    DATA/00000_text.npy       float32 [rows, text_dim], embeddings of their prompts, one after the
                              other, without the zero rows after each

A shard is never changed. A further run adds shards with the items that are missing; items whose file
or caption changed are no longer named by data.json. Embeddings computed in bfloat16 are exact in
float32.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wan_jax.errors import UserError
from wan_jax.storage import integrity
from wan_jax.storage.array_store import CHUNK_FILE
from wan_jax.storage.model_dir import ModelDir
from wan_jax.storage.paths import expand

if TYPE_CHECKING:
    from grpo.data.labels import Labels

MANIFEST = "data.json"
FORMAT = 1
ENCODERS = ("vae", "text_encoder", "tokenizer")  # folders of a model that encode data
SHARD = 64  # items of a shard


def encoders_digest(model: ModelDir) -> str | None:
    """Return the SHA-256 of the digests of the networks that encode data, which data and model must
    share; None for model folders of versions without digests. The transformer does not
    matter: models that share VAE, text encoder and tokenizer share data.
    """
    files = model.manifest.get("files")
    if files is None:
        return None
    return integrity.combined(
        (name, *entry)
        for name, entry in files.items()
        if name.split("/")[0] in ENCODERS and ("/params/" not in name or CHUNK_FILE.fullmatch(name))
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all items of a folder share.

    Attributes:
        encoders: `encoders_digest` of the model.
        height, width, frames: of the videos, in pixels and frames.
        fps: frames a second that were taken of videos; None: samples of a model.
        dtype: in which the text encoder computed.
        source: 'files', or how a model sampled them.
    """

    encoders: str | None
    height: int
    width: int
    frames: int
    fps: float | None
    dtype: str
    source: str


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture or a video with its prompt.

    Attributes:
        name: of the file, or of the sample.
        digest: of the file; "" for samples.
        prompt: its own.
        shard: the number of its shard.
        row: its place in the shard.
        first, last: its rows in the shard's embeddings, `last` not included.
    """

    name: str
    digest: str
    prompt: str
    shard: int
    row: int
    first: int
    last: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What the item was encoded from."""
        return self.name, self.digest, self.prompt


class Writer:
    """A folder of data that is written, shard by shard. Raises `UserError` on a folder with data of
    another kind, or with something else.
    """

    def __init__(self, folder, kind: Kind):
        self.folder, self.kind = expand(folder), kind
        self.items: dict[tuple[str, str, str], Item] = {}
        self.files: dict[str, tuple[int, int]] = {}
        if not (self.folder / MANIFEST).is_file():
            strange = sorted(p.name for p in self.folder.glob("*") if not _is_own(p.name))
            if strange:
                raise UserError(
                    f"--out={folder} has other files, e.g. {strange[0]}: give a new folder, or one "
                    "that this command wrote"
                )
            return
        found, self.files, items = read_manifest(self.folder, "--out")
        if found != kind:
            differs = [
                f"{f.name} {getattr(found, f.name)}, now {getattr(kind, f.name)}"
                for f in dataclasses.fields(Kind)
                if getattr(found, f.name) != getattr(kind, f.name)
            ]
            raise UserError(
                f"--out={folder} has data of another kind: {'; '.join(differs)}. Give the same "
                "settings and model, or another folder"
            )
        if problem := integrity.problem(self.folder, self.files):
            raise UserError(
                f"--out={folder} is damaged: {problem}. Remove the folder, and encode again"
            )
        self.items = {item.key: item for item in items}

    def add(
        self,
        keys: Sequence[tuple[str, str, str]],
        latents: Sequence[np.ndarray],
        texts: Sequence[np.ndarray],
    ) -> None:
        """Write a shard. On return it is complete on disk, and data.json names it.

        keys: `Item.key` of each. latents: float32 [F, H, W, C] each. texts: [rows, text_dim] each.
        """
        shard = 1 + max((int(name.partition("_")[0]) for name in self.files), default=-1)
        ends = np.cumsum([len(text) for text in texts]).tolist()
        for row, (key, last) in enumerate(zip(keys, ends)):
            self.items[key] = Item(*key, shard, row, last - len(texts[row]), last)
        rows = np.concatenate([text.astype(np.float32) for text in texts])
        arrays = {"latents": np.stack(latents).astype(np.float32), "text": rows}
        written = [_file(shard, part) for part in arrays]
        for name, array in zip(written, arrays.values()):
            np.save(self.folder / name, array)
        others = {path.name for path in self.folder.iterdir()} - {*written}
        self.files |= integrity.measure(self.folder, exclude=others, flush=True)
        self.write([*self.items])

    def write(self, keys: Sequence[tuple[str, str, str]]) -> None:
        """Write data.json with the items of these keys, in their order, and forget all others."""
        self.items = {key: self.items[key] for key in keys}
        values = {
            "format": FORMAT,
            "kind": dataclasses.asdict(self.kind),
            "items": [dataclasses.asdict(item) for item in self.items.values()],
        }
        integrity.write_manifest(self.folder / MANIFEST, values, self.files)


def _file(shard: int, part: str) -> str:
    return f"{shard:05d}_{part}.npy"


def _is_own(name: str) -> bool:
    """Return whether a file may be in the folder before data.json is: of a run that was killed."""
    return name.startswith(".") or name.endswith(("_latents.npy", "_text.npy"))


def read_manifest(
    folder: pathlib.Path, key: str = "config.data.path"
) -> tuple[Kind, dict[str, tuple[int, int]], list[Item]]:
    """Return the kind, the files and the items of a folder. key: the setting that names it, for
    messages. Raises `UserError`.
    """
    make = f"make it with python -m grpo.encode_clips --out={folder}"
    if not folder.is_dir():
        raise UserError(f"{key}={folder} does not exist; {make}")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{key}={folder} has no {MANIFEST}, so it is not a folder of data; {make}")
    content = integrity.read_manifest(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{key}={folder} has format {content.get('format')}, this version reads {FORMAT}; {make}"
        )
    items = [Item(**item) for item in content["items"]]
    return Kind(**content["kind"]), content["files"], items


@dataclasses.dataclass(frozen=True)
class LatentData:
    """N pictures or videos to train on, on disk.

    Attributes:
        folder: of the data.
        kind: what they share.
        items: in the order of their numbers.
        digest: SHA-256 of items and files.
        labels: pairs or ratings of the items, where a run trains on these.
    """

    folder: pathlib.Path
    kind: Kind
    items: tuple[Item, ...]
    digest: str
    labels: "Labels | None" = None

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        kind = self.kind
        return (
            f"data: {len(self)} items of {kind.frames} x {kind.height} x {kind.width} with their own "
            f"prompts ({self.digest[:12]})"
        ) + (f"; {self.labels}" if self.labels else "")

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        names = {_file(i.shard, part) for i in self.items for part in ("latents", "text")}
        return {name: np.load(self.folder / name, mmap_mode="r") for name in sorted(names)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of the latents of an item."""
        return self.shape_of(0)

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Return (F, H, W, C) of the latents of an item by its number."""
        return self._arrays[_file(self.items[number].shard, "latents")].shape[1:]

    def latents(self, numbers: np.ndarray) -> np.ndarray:
        """Return the latents of items, float32 [n, F, H, W, C]. numbers: int [n]."""
        chosen = [self.items[n] for n in numbers]
        return np.stack([self._arrays[_file(i.shard, "latents")][i.row] for i in chosen])

    def texts(self) -> tuple[np.ndarray, ...]:
        """Return the embedding of every item's prompt, float32 [rows, text_dim] each; equal prompts
        share one array.
        """
        known: dict[str, np.ndarray] = {}
        for item in self.items:
            if item.prompt not in known:
                rows = self._arrays[_file(item.shard, "text")][item.first : item.last]
                known[item.prompt] = np.array(rows)
        return tuple(known[item.prompt] for item in self.items)

    @property
    def text_rows(self) -> int:
        """The number of rows of the longest embedding."""
        return max(item.last - item.first for item in self.items)


def open_data(folder, model: ModelDir) -> LatentData:
    """Return the data of `config.data.path`, after comparing all its files with their digests.

    model: that trains on it. Raises `UserError` where the folder has no data, is empty or damaged, or
    was encoded by another model.
    """
    path = expand(folder)
    key = "config.data.path"
    kind, files, items = read_manifest(path, key)
    if not items:
        raise UserError(f"{key}={folder} has no item: encode one with python -m grpo.encode_clips")
    own = encoders_digest(model)
    if None not in (kind.encoders, own) and kind.encoders != own:
        raise UserError(
            f"{key}={folder} was encoded by another VAE or text encoder ({str(kind.encoders)[:12]}) "
            f"than that of {model.path} ({str(own)[:12]}): encode the data again with "
            f"--model={model.path}"
        )
    used = {_file(item.shard, part) for item in items for part in ("latents", "text")}
    if missing := used - files.keys():
        raise integrity.Damaged(f"{key}={folder} is damaged: no digest of {min(missing)}")
    if problem := integrity.problem(path, {name: files[name] for name in used}):
        raise integrity.Damaged(
            f"{key}={folder} is damaged: {problem}. Remove the folder, and encode the data again"
        )
    return LatentData(path, kind, tuple(items), _digest(items, {n: files[n] for n in used}))


def _digest(items: Sequence[Item], files: Mapping[str, Any]) -> str:
    content = [[dataclasses.astuple(item) for item in items], sorted(files.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
