"""LoRA files that are merged into a model's transformers while these are loaded.

A LoRA is written FILE[:SCALE]. FILE is a file or a folder of one. For a model with two experts it
holds both, or is HIGH,LOW, the file for high noise first; an empty one leaves its expert as it is.
SCALE multiplies all that the file changes, products of factors and differences, and is 1 if it is
not given.

`merge` returns the model with LoRAs: every load of its transformers adds scale * A B (and the
differences) to the weights in float32 and rounds the sum once. `merge_with_checkpoint` adds those
that a run's base had, which the run's checkpoints name, with the digests of the files.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wan_jax.errors import UserError
from wan_jax.storage import checkpoint as checkpoint_lib
from wan_jax.storage import lora_files, lora_names
from wan_jax.storage.model_dir import ModelDir
from wan_jax.storage.paths import expand
from wan_jax.storage.weight_changes import WeightChanges, product, whole


@dataclasses.dataclass(frozen=True)
class MergedLoRA:
    """A LoRA that is merged into a model.

    Attributes:
        files: absolute paths, one for all experts or one for each; '' leaves an expert out.
        scale: of all that the files change.
        digest: of the files' contents.
    """

    files: tuple[str, ...]
    scale: float
    digest: str

    @property
    def identity(self) -> tuple[str, float]:
        """What tells two LoRAs apart, wherever their files are."""
        return self.digest, self.scale

    @property
    def record(self) -> dict[str, Any]:
        """The LoRA as JSON, for the meta of a checkpoint."""
        return {"files": list(self.files), "scale": self.scale, "digest": self.digest}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "MergedLoRA":
        return cls(tuple(record["files"]), float(record["scale"]), record["digest"])

    def __str__(self) -> str:
        return f"{','.join(self.files)}:{self.scale:g}"


def parse(text: str, what: str) -> tuple[tuple[str, ...], float | None]:
    """Return (files, scale, None if it is not given) of FILE[:SCALE].

    what: the setting, for messages. Raises `UserError` on a scale that is 0 or not finite, and
    where no file is given.
    """
    files, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon else None
    except ValueError:  # a colon of the path
        scale = None
    if scale is None:
        files = text
    elif not scale or not math.isfinite(scale):
        raise UserError(f"{what}={text}: the scale {number} must be a finite number other than 0")
    names = tuple(name.strip() for name in files.split(","))
    if not any(names):
        raise UserError(f"{what}={text} names no file: expected FILE[:SCALE]")
    return tuple(str(expand(name)) if name else "" for name in names), scale


def digest(files: Sequence[str]) -> str:
    """Return a digest of the contents of a LoRA's files. Raises `UserError`."""
    digests = [lora_files.digest(file) if file else "" for file in files]
    return digests[0] if len(digests) == 1 else ",".join(digests)


def find(texts: Iterable[str], what: str) -> tuple[MergedLoRA, ...]:
    """Return the LoRAs of FILE[:SCALE] texts. what: the setting. Raises `UserError`."""
    found = []
    for text in texts:
        files, scale = parse(text, what)
        found.append(MergedLoRA(files, 1.0 if scale is None else scale, digest(files)))
    return tuple(found)


def merge(model: ModelDir, texts: Iterable[str], what: str = "config.model.loras") -> ModelDir:
    """Return a model with LoRAs merged into its transformers when these are loaded.

    texts: FILE[:SCALE] each. what: the setting, for messages. The files are read once now, to
    check them, and again when a transformer is loaded. Raises `UserError` when a file is missing or
    damaged, or has a layer that the model has not.
    """
    return _with(model, find(texts, what), what)


def _with(model: ModelDir, loras: tuple[MergedLoRA, ...], what: str) -> ModelDir:
    if not loras:
        return model
    for lora in loras:
        _read(model, lora, f"{what}={lora}")
    return dataclasses.replace(
        model, loras=loras, changes=functools.partial(changes_of, model, loras)
    )


def _read(model: ModelDir, lora: MergedLoRA, what: str) -> dict[str, lora_files.LoRAFile]:
    parameters = lora_names.parameters(model.config("transformer"))
    return lora_files.read_for(
        lora.files,
        model.experts,
        what,
        lambda path: lora_files.read_experts(path, parameters.kernels, parameters),
    )


def changes_of(model: ModelDir, loras: Sequence[MergedLoRA], expert: str) -> WeightChanges:
    """Return what LoRAs change of an expert."""
    parameters = lora_names.parameters(model.config("transformer"))
    table = lora_names.modules(parameters.kernels)
    terms: dict[str, dict[int | None, list]] = {}
    for lora in loras:
        file = _read(model, lora, str(lora)).get(expert)
        if file is None:
            continue
        for module, (a, b) in file.factors.items():
            layer, index = table[module]
            at = terms.setdefault(f"{layer}/kernel", {}).setdefault(index, [])
            at.append(product(a, b, lora.scale * file.scales[module]))
        for (path, index), value in file.differences.items():
            terms.setdefault(path, {}).setdefault(index, []).append(whole(value, lora.scale))
    return WeightChanges(terms)


# ---- the LoRAs of a run --------------------------------------------------------------------------


def recorded(meta: Mapping[str, Any]) -> tuple[MergedLoRA, ...]:
    """Return the LoRAs that the base of a checkpoint's run had, from the checkpoint's meta."""
    return tuple(MergedLoRA.of_record(record) for record in meta.get("loras") or ())


def needed(model: ModelDir, meta: Mapping[str, Any]) -> tuple[MergedLoRA, ...]:
    """Return those LoRAs that must be merged to use a checkpoint: all, or none where the run
    trained all weights of every expert, which include them.
    """
    complete = meta["lora"] is None and set(model.experts) <= set(meta["experts"])
    return () if complete else recorded(meta)


def beyond(model: ModelDir, meta: Mapping[str, Any]) -> tuple[MergedLoRA, ...]:
    """Return the model's LoRAs that the base of a checkpoint's run did not have."""
    known = {lora.identity for lora in recorded(meta)}
    return tuple(lora for lora in model.loras if lora.identity not in known)


def check(model: ModelDir, meta: Mapping[str, Any], checkpoint) -> None:
    """Raise `UserError` where a checkpoint needs LoRAs that the model has not."""
    have = {lora.identity for lora in model.loras}
    if missing := [lora for lora in needed(model, meta) if lora.identity not in have]:
        raise UserError(
            f"{checkpoint} was trained on a base with {', '.join(map(str, missing))} merged "
            f"({missing[0].digest[:12]}), which this model does not have: give it as config.model.loras, "
            "wherever the file is now"
        )


def merge_with_checkpoint(
    model: ModelDir, checkpoint, texts: Sequence[str] | None, what: str = "--lora"
) -> ModelDir:
    """Return a model with the LoRAs that a checkpoint's base had, and with those of `texts`.

    checkpoint: a run folder or one of its checkpoints; None: without one. texts: FILE[:SCALE] each.
    One whose content is that of a LoRA of the run says where the file is now; the others are merged
    in addition. Raises `UserError` as `merge` does, and when a file of the run is gone or changed.
    """
    given = [(*parse(text, what), text) for text in texts or ()]
    files = [(digest(paths), paths, scale, text) for paths, scale, text in given]
    loras = []
    if checkpoint is not None:
        checkpoints, epoch = checkpoint_lib.find(checkpoint)
        meta = checkpoints.check(epoch, ("meta",))
        required = {lora.identity for lora in needed(model, meta)}
        for lora in recorded(meta):
            match = next((entry for entry in files if entry[0] == lora.digest), None)
            if match is not None:
                files.remove(match)
                _, paths, scale, text = match
                if scale not in (None, lora.scale):
                    raise UserError(
                        f"{what}={text}: {checkpoint} was trained with this LoRA merged at the "
                        f"scale {lora.scale:g}, not {scale:g}: give it without a scale"
                    )
                lora = dataclasses.replace(lora, files=paths)
            elif lora.identity in required:
                _check_unchanged(lora, checkpoint, what)
            if lora.identity in required:
                loras.append(lora)
    loras += [
        MergedLoRA(paths, 1.0 if scale is None else scale, sha) for sha, paths, scale, _ in files
    ]
    return _with(model, tuple(loras), what)


def _check_unchanged(lora: MergedLoRA, checkpoint, what: str) -> None:
    advice = (
        f"{checkpoint} was trained on a base with {lora} merged ({lora.digest[:12]}); "
        f"{what}=FILE says where the file is now"
    )
    try:
        found = digest(lora.files)
    except UserError as error:
        raise UserError(f"{error}. {advice}") from None
    if found != lora.digest:
        raise UserError(f"{lora} has changed ({found[:12]}): {advice}")


def metadata(loras: Iterable[MergedLoRA]) -> dict[str, str]:
    """Return metadata of a safetensors file about LoRAs of the base that it belongs to."""
    records = [{"sha256": lora.digest, "scale": lora.scale} for lora in loras]
    return {"wan_jax_loras": json.dumps(records)} if records else {}
