"""Damages every file of a checkpoint and many of a model folder, one at a time, and counts what
their readers do.

    python -m benchmarks.damage [--model models/tiny-wan] [--arrays 8] [--seed 0]

Copies the model, gives it a run folder with two checkpoints of random adapters, an exported file
and a reward head, and applies to each file: removal, a folder in its place, half of it, none of it,
other bytes, and single flipped bits. Then the functions behind the commands read it: `resume` is
what grpo.train does before its first epoch, `sample` what sampling and evaluation do, `export` what
convert.export_lora does, `model` loads a component, tokenizer, scheduler and cached prompts, `head`
is a reward head. Of a component's arrays `--arrays` files are damaged.

A reading ends in one clear message (one line that names the file or its folder), in the same values
as before, in SILENTLY altered values, or in a TRACEBACK. The exit code is 1 when there are any of
the last two.
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
from grpo import train_state
from grpo.data.prompts import load_prompts
from grpo.learning.optimiser import init_state
from grpo.settings import parse
from grpo.settings.budget import Spent
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
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
CACHED = (5, 24)  # shape of the cached rows of the prompt
OUTCOMES = ("message", "same values", "SILENT", "TRACEBACK")


def damages(path: pathlib.Path, flips: int = 3, seed: int = 0) -> dict[str, Callable[[], None]]:
    """{name: what does it} of one file; at least `flips` single bits, one more for each 100 kB up
    to 5 more.
    """
    content, rng = path.read_bytes(), np.random.default_rng([seed, len(str(path))])

    def replaced_by_folder():
        path.unlink()
        path.mkdir()

    def flip(at: int) -> Callable[[], None]:
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        return lambda: path.write_bytes(changed)

    places = {
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
    return kinds | {f"bit flipped at {at}": flip(int(at)) for at in sorted(places)}


@contextlib.contextmanager
def damaged(path: pathlib.Path, damage: Callable[[], None]) -> Iterator[None]:
    """The file is damaged inside the block, and as before after it."""
    content = path.read_bytes()
    damage()
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


def outcome(read: Callable[[], str], wanted: str, path: pathlib.Path) -> tuple[str, str]:
    """(one of `OUTCOMES`, what was said). read: returns a digest of what it read."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = read()
    except Exception as error:  # whatever it is, it is counted and shown
        known = cli.explain(error)
        if known is None:
            return "TRACEBACK", f"{type(error).__name__}: {str(error)[:200]}"
        names = (
            any(str(p) in known[0] for p in (path, *path.parents) if len(p.parts) > 3)
            or path.name in known[0]
        )
        clear = isinstance(error, cli.UserError) and names and len(known[0].splitlines()) == 1
        return ("message" if clear else "TRACEBACK"), known[0]
    return ("same values" if found == wanted else "SILENT"), ""


def digest(tree) -> str:
    """SHA-256 of a tree of arrays, text and numbers."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = leaf.encode() if isinstance(leaf, str) else np.asarray(leaf).tobytes()
        sha.update(jax.tree_util.keystr(path).encode() + value)
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model folder, a run of it, and their readers."""

    model: pathlib.Path
    run: pathlib.Path
    head: pathlib.Path
    config: dict
    state: dict
    mesh: jax.sharding.Mesh

    @classmethod
    def make(cls, folder: pathlib.Path, model: pathlib.Path) -> "Subject":
        """Copies the model into `folder`, and writes two checkpoints and a reward head there."""
        path = shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("text_cache"))
        c, mesh = tiny_ocr.get_config(), mesh_lib.make_mesh(devices=jax.devices()[:1])
        c.model.path = str(path)
        opened, s = model_dir.open_model(path), parse.from_config(c)
        prompts = load_prompts(c.prompts.train, parse_targets)
        state = {}
        for i, name in enumerate(opened.experts):
            module = WanTransformer3D(opened.config(name), dtype=jnp.float32, rngs=nnx.Rngs(0))
            adapters = flat_params.flatten(
                nnx.split(lora.attach(module, s.lora, jax.random.key(i)), LoRAParam, ...)[1]
            )
            rng = np.random.default_rng(i)
            arrays = {
                k: jnp.asarray(rng.standard_normal(v.shape, np.float32))
                for k, v in adapters.items()
            }
            state[name] = init_state(
                sharding_lib.shard_params(arrays, mesh),
                s.optimiser,
                s.method.adaptive_kl,
                s.method.lagged,
            )
        subject = cls(path, folder / "run", folder / "head.safetensors", c.to_dict(), state, mesh)
        for epoch in (1, 2):
            train_state.save(
                Checkpoints(subject.run),
                epoch,
                state,
                subject.config,
                s.lora,
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
        model, checkpoints = model_dir.open_model(self.model), Checkpoints(self.run)
        epoch = checkpoints.latest()
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
        model = model_dir.open_model(self.model)
        _, weights = load_transformers(model, str(self.run), jnp.float32, "xla", self.mesh, "never")
        return digest([flat_params.flatten(weights(i)) for i in range(len(model.experts))])

    def export(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            files = export(self.run, self.model, folder)
            return digest([load_file(path) for path in files.values()])

    def load(self, component: str) -> str:
        return digest(
            flat_params.flatten(model_dir.build(component, model_dir.open_model(self.model))[1])
        )

    def small_files(self) -> str:
        model = model_dir.open_model(self.model)
        ids, mask = Tokenizer.load(model.tokenizer_path)([PROMPT], 64)
        rows = PromptCache(model, np.float32).get(PROMPT)
        # None: they would be computed again
        rows = np.ones(CACHED, np.float32) if rows is None else rows
        configs = [dataclasses.asdict(model.config(name)) for name in model.components]
        return digest([ids, mask, rows, str(model.boundary), str(configs), str(model.scheduler)])

    def load_head(self) -> str:
        model = model_dir.open_model(self.model)
        head = reward_guidance.load_head(self.head, model.config("transformer"), model)
        return digest(flat_params.flatten(nnx.state(head, nnx.Param)))


def subjects(
    subject: Subject, arrays: int, seed: int
) -> Iterator[tuple[str, pathlib.Path, str, Callable[[], str]]]:
    """(kind of file, file, name of the reader, reader) of every pair that is tried."""
    for path in files_of(subject.run / "checkpoints/2"):
        kind = path.relative_to(subject.run / "checkpoints/2").parts[0]
        readers = {"resume": subject.resume}
        if kind != "state":  # which sampling and export do not read
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
    return sorted(path for path in folder.rglob("*") if path.is_file())


def measure(
    subject: Subject, arrays: int, seed: int, show=print
) -> dict[tuple[str, str], collections.Counter]:
    """{(kind of file, reader): how often each of `OUTCOMES`}; every bad one is shown."""
    counts, wanted = {}, {}
    for kind, path, name, read in subjects(subject, arrays, seed):
        if (key := (kind, name)) not in wanted:
            with contextlib.redirect_stdout(io.StringIO()):
                wanted[key] = read()
            counts[key] = collections.Counter()
        for how, damage in damages(path, seed=seed).items():
            with damaged(path, damage):
                found, said = outcome(read, wanted[key], path)
            counts[key][found] += 1
            if found in ("SILENT", "TRACEBACK"):
                show(f"{found}: {path} {how}, read by {name}: {said}")
    return counts


def table(counts: dict[tuple[str, str], collections.Counter]) -> list[str]:
    """In Markdown."""
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
    flags.DEFINE_string("model", "models/tiny-wan", "converted model; it is copied")
    flags.DEFINE_integer("arrays", 8, "files of values to damage in each component", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the places that are damaged")
    cli.run(main)
