"""Damages every file of a checkpoint and many of a model folder, one at a time, and reads them.

    python -m benchmarks.damage
    python -m benchmarks.damage --model models/tiny-wan --arrays 8 --seed 0

The model is copied, with a run folder of two checkpoints of random adapters and a reward head. Each
file is removed, replaced by a folder, halved, emptied, overwritten with other bytes, and has single
bits flipped. Then the functions of the commands read it: `resume` is what grpo.train does before
its first epoch, `sample` what sampling and evaluation do, `export` what convert.export_lora does,
`model` loads a component, tokenizer, scheduler and cached prompts, and `head` loads the reward
head. `--arrays` files of each component's arrays are damaged.

A reading ends in a message (one line that names the file or its folder), in the same values as
before, in SILENTLY altered values, or in a TRACEBACK. The exit code is 1 when either of the last
two occurs.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from safetensors.numpy import load_file

from configs import tiny_ocr
from convert.export_lora import export
from grpo.data.prompts import load_prompts
from grpo.learning import train_state
from grpo.learning.optimiser import init_state
from grpo.settings import parse
from grpo.settings.budget import Spent
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.inference import reward_guidance
from wan_jax.inference.prompt_cache import PromptCache
from wan_jax.models import flat_params, lora
from wan_jax.models.layers import LoRAParam
from wan_jax.models.tokenizer import Tokenizer
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import model_dir
from wan_jax.storage.array_store import CHUNK_FILE
from wan_jax.storage.checkpoint import Checkpoints
from wan_jax.storage.trained_weights import load_transformers

PROMPT = 'A red sign that says "open".'
CACHED = (5, 24)  # shape of the prompt's cached embedding
OUTCOMES = ("message", "same values", "SILENT", "TRACEBACK")


def damages(path: pathlib.Path, flips: int = 3, seed: int = 0) -> dict[str, Callable[[], object]]:
    """Return {name: function that damages the file}.

    At least `flips` single bits are flipped, and one more for each 100 kB up to 5.
    """
    content, rng = path.read_bytes(), np.random.default_rng([seed, len(str(path))])

    def replaced_by_folder():
        path.unlink()
        path.mkdir()

    def flip(at: int) -> Callable[[], object]:
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        return lambda: path.write_bytes(changed)

    positions = {
        0,
        len(content) - 1,
        *rng.integers(0, max(len(content), 1), flips - 2 + min(5, len(content) // 100_000)),
    }
    kinds = {
        "removed": path.unlink,
        "folder": replaced_by_folder,
        "halved": lambda: path.write_bytes(content[: len(content) // 2]),
        "emptied": lambda: path.write_bytes(b""),
        "other bytes": lambda: path.write_bytes(rng.bytes(len(content))),
    }
    if not content:
        return {name: kinds[name] for name in ("removed", "folder")}
    return kinds | {f"bit flipped at {at}": flip(int(at)) for at in sorted(positions)}


@contextlib.contextmanager
def damaged(path: pathlib.Path, damage: Callable[[], object]) -> Iterator[None]:
    """Damage the file inside the block, and restore it afterwards."""
    content = path.read_bytes()
    damage()
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


def outcome(read: Callable[[], str], expected: str, path: pathlib.Path) -> tuple[str, str]:
    """Return (one of `OUTCOMES`, the message) of reading a damaged file.

    read: returns a digest of what it read. expected: the digest of the undamaged file.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = read()
    except Exception as error:  # any exception is an outcome: it is counted and shown
        known = cli.explain(error)
        if known is None:
            return "TRACEBACK", f"{type(error).__name__}: {str(error)[:200]}"
        named = path.name in known[0] or any(
            str(folder) in known[0] for folder in (path, *path.parents) if len(folder.parts) > 3
        )
        clear = isinstance(error, UserError) and named and len(known[0].splitlines()) == 1
        return ("message" if clear else "TRACEBACK"), known[0]
    return ("same values" if found == expected else "SILENT"), ""


def digest(tree) -> str:
    """Return the SHA-256 of a tree of arrays, text and numbers."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = leaf.encode() if isinstance(leaf, str) else np.asarray(leaf).tobytes()
        sha.update(jax.tree_util.keystr(path).encode() + value)
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model folder and a run of it, with methods that read them and return a digest."""

    model: pathlib.Path
    run: pathlib.Path
    head: pathlib.Path
    config: dict
    state: dict
    mesh: jax.sharding.Mesh

    @classmethod
    def make(cls, folder: pathlib.Path, model: pathlib.Path) -> "Subject":
        """Copy the model into `folder`, and write two checkpoints and a reward head there."""
        path = shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("text_cache"))
        config, mesh = tiny_ocr.get_config(), mesh_lib.make_mesh(devices=jax.devices()[:1])
        config.update_from_flattened_dict({"model.path": str(path)})
        opened, settings = model_dir.open_model(path), parse.from_config(config)
        assert settings.lora is not None
        prompts = load_prompts(config.to_dict()["prompts"]["train"], parse_targets)
        state = {}
        for i, name in enumerate(opened.experts):
            module = WanTransformer3D(opened.config(name), dtype=jnp.float32, rngs=nnx.Rngs(0))
            adapters = flat_params.flatten(
                nnx.split(lora.attach(module, settings.lora, jax.random.key(i)), LoRAParam, ...)[1]
            )
            rng = np.random.default_rng(i)
            arrays = {
                k: jnp.asarray(rng.standard_normal(v.shape, np.float32))
                for k, v in adapters.items()
            }
            state[name] = init_state(
                sharding_lib.shard_params(arrays, mesh),
                settings.optimiser,
                settings.method.adaptive_kl,
                settings.method.lagged,
            )
        head_path = folder / "head.safetensors"
        subject = cls(path, folder / "run", head_path, config.to_dict(), state, mesh)
        for epoch in (1, 2):
            train_state.save(
                Checkpoints(subject.run),
                epoch,
                state,
                subject.config,
                settings.lora,
                Spent(epoch, 1.0),
                train_state.origin(opened, prompts),
            )
        head = reward_guidance.make_head(
            reward_guidance.head_config(opened.config("transformer"), heads=1, layers=1)
        )
        reward_guidance.save_head(subject.head, head, opened.metadata)
        PromptCache(opened, np.float32).put(PROMPT, np.ones(CACHED, np.float32))
        return subject

    def resume(self) -> str:
        """Read what grpo.train reads before its first epoch."""
        model, checkpoints = model_dir.open_model(self.model), Checkpoints(self.run)
        epoch = checkpoints.latest()
        assert epoch is not None
        meta = checkpoints.check(epoch)
        prompts = load_prompts(self.config["prompts"]["train"], parse_targets)
        train_state.check_resume(
            meta, checkpoints.path(epoch), self.config, model, train_state.origin(model, prompts)
        )
        spent = train_state.spent_by(checkpoints, epoch)
        return digest(
            [epoch, dataclasses.asdict(spent), train_state.restore(checkpoints, epoch, self.state)]
        )

    def sample(self) -> str:
        """Load the weights as sampling and evaluation do."""
        model = model_dir.open_model(self.model)
        _, weights = load_transformers(model, str(self.run), jnp.float32, "xla", self.mesh, "never")
        return digest([flat_params.flatten(weights(i)) for i in range(len(model.experts))])

    def export(self) -> str:
        """Export the adapters as a LoRA file."""
        with tempfile.TemporaryDirectory() as folder:
            files = export(self.run, self.model, folder)
            return digest([load_file(path) for path in files.values()])

    def load(self, component: str) -> str:
        """Load one component of the model."""
        return digest(
            flat_params.flatten(model_dir.build(component, model_dir.open_model(self.model))[1])
        )

    def small_files(self) -> str:
        """Load the tokenizer, the scheduler, the configurations and a cached prompt."""
        model = model_dir.open_model(self.model)
        ids, mask = Tokenizer.load(model.tokenizer_path)([PROMPT], 64)
        rows = PromptCache(model, np.float32).get(PROMPT)
        # None: the damaged embedding would be computed again
        rows = np.ones(CACHED, np.float32) if rows is None else rows
        configs = [dataclasses.asdict(model.config(name)) for name in model.components]
        return digest([ids, mask, rows, str(model.boundary), str(configs), str(model.scheduler)])

    def load_head(self) -> str:
        """Load the reward head."""
        model = model_dir.open_model(self.model)
        head = reward_guidance.load_head(self.head, model.config("transformer"), model)
        return digest(flat_params.flatten(nnx.state(head, nnx.Param)))


def subjects(
    subject: Subject, arrays: int, seed: int
) -> Iterator[tuple[str, pathlib.Path, str, Callable[[], str]]]:
    """Yield (kind of file, file, name of the reader, reader) for every pair that is tried."""
    for path in files_of(subject.run / "checkpoints/2"):
        kind = path.relative_to(subject.run / "checkpoints/2").parts[0]
        readers = {"resume": subject.resume}
        if kind != "state":  # sampling and export do not read the state
            readers |= {"sample": subject.sample, "export": subject.export}
        for name, read in readers.items():
            yield f"checkpoint {kind}", path, name, read
    yield "reward head", subject.head, "head", subject.load_head
    rng, files = np.random.default_rng(seed), files_of(subject.model)
    for path in files:
        name = str(path.relative_to(subject.model))
        if "/params/" not in name:
            yield "model, small files", path, "model", subject.small_files
    for component in model_dir.open_model(subject.model).components:
        params = subject.model / component / "params"
        stored = [path for path in files if params in path.parents]
        chunks = [path for path in stored if CHUNK_FILE.fullmatch(path.name)]
        rest = [path for path in stored if path not in chunks]
        chosen = [path for path in rest if path.parent == params]
        for group in (chunks, [path for path in rest if path.parent != params]):
            chosen += [
                group[i] for i in rng.permutation(len(group))[: arrays if group is chunks else 2]
            ]
        for path in chosen:
            yield f"model, {component}", path, "model", lambda name=component: subject.load(name)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return all files in a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def measure(
    subject: Subject, arrays: int, seed: int, show=print
) -> dict[tuple[str, str], collections.Counter]:
    """Return {(kind of file, reader): number of each of `OUTCOMES`}; bad ones are shown."""
    counts, expected = {}, {}
    for kind, path, name, read in subjects(subject, arrays, seed):
        key = (kind, name)
        if key not in expected:
            with contextlib.redirect_stdout(io.StringIO()):
                expected[key] = read()
            counts[key] = collections.Counter()
        for how, damage in damages(path, seed=seed).items():
            with damaged(path, damage):
                found, message = outcome(read, expected[key], path)
            counts[key][found] += 1
            if found in ("SILENT", "TRACEBACK"):
                show(f"{found}: {path} {how}, read by {name}: {message}")
    return counts


def table(counts: dict[tuple[str, str], collections.Counter]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        f"| files | read by | damages | {' | '.join(OUTCOMES)} |",
        "|---|---|" + "---|" * (1 + len(OUTCOMES)),
    ]
    for (kind, reader), count in counts.items():
        lines.append(
            f"| {kind} | {reader} | {count.total()} | "
            f"{' | '.join(str(count[o]) for o in OUTCOMES)} |"
        )
    total = sum(counts.values(), collections.Counter())
    return [*lines, f"| all | | {total.total()} | {' | '.join(str(total[o]) for o in OUTCOMES)} |"]


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.make(pathlib.Path(folder), pathlib.Path(flags.FLAGS.model))
        counts = measure(subject, flags.FLAGS.arrays, flags.FLAGS.seed)
    print(*table(counts), sep="\n")
    if any(count["SILENT"] or count["TRACEBACK"] for count in counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("model", "models/tiny-wan", "converted model, which is copied")
    flags.DEFINE_integer(
        "arrays", 8, "files of array values to damage in each component", lower_bound=0
    )
    flags.DEFINE_integer("seed", 0, "seed of the positions that are damaged")
    cli.run(main)
