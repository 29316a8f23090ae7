"""Reads and checks files of prompts, and chooses the prompts of an epoch.

The formats are those of `wan_jax.inference.prompt_files`. A JSON line may have "targets": ["..."];
without them, they are the texts in the prompt's quotes. Its other fields are metadata.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from grpo.random_streams import Stream
from rewards.ocr.text_match import visible
from wan_jax.errors import UserError
from wan_jax.inference import prompt_files
from wan_jax.models.tokenizer import clean


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts with what each asks for.

    Attributes:
      prompts: different texts.
      targets: per prompt the texts to write, tuple[str, ...]; or what else its rewards ask for.
      metadata: per prompt the other fields of its line.
      left_out: what is wrong with the lines that were left out.
    """

    prompts: tuple[str, ...]
    targets: tuple
    metadata: tuple[dict, ...] = ()
    left_out: tuple[str, ...] = ()

    def __len__(self):
        return len(self.prompts)

    def select(self, keep: Iterable[bool]) -> "PromptSet":
        """Return the prompts for which `keep`, one value each, is true."""
        keep = [*keep]
        prompts = tuple(itertools.compress(self.prompts, keep))
        targets = tuple(itertools.compress(self.targets, keep))
        metadata = tuple(itertools.compress(self.metadata, keep))
        return PromptSet(prompts, targets, metadata, self.left_out)


def load_prompts(
    path,
    parse: Callable[[str], tuple[str, ...]],
    limit: int | None = None,
    check: Callable[[tuple[str, ...]], None] | None = None,
    skip_invalid: bool = False,
    hint: str = "",
    remedy: str = "--config.prompts.skip_invalid=True leaves them out",
) -> PromptSet:
    """Read a prompt file in the format of its suffix; repeated prompts are dropped.

    Args:
      path: of the file.
      parse: returns a prompt's targets, or raises ValueError if it has none
        (`rewards.ocr.targets.parse_targets`).
      limit: number of prompts to take; None: all.
      check: raises ValueError on targets that cannot be scored.
      skip_invalid: leave out lines that cannot be scored.
      hint, remedy: end the message about lines that cannot be scored.

    Raises:
      UserError: the file cannot be read, has no prompt, or, without `skip_invalid`, has lines that
        cannot be scored, which are reported together.
    """
    lines, read = prompt_files.open_lines(path)
    found, problems = {}, []
    for number, line in enumerate(lines, 1):
        try:
            entry = read(line)
            if entry is None or entry[0] in found:
                continue
            prompt, metadata = entry
            targets = _targets(metadata) or tuple(parse(prompt))
            if check is not None:
                check(targets)
            found[prompt] = (targets, metadata)
        except ValueError as error:
            problems.append(f"  line {number}: {error}")
    if problems and not skip_invalid:
        shown = "\n".join(problems[:5])
        if len(problems) > 5:
            shown += f"\n  and {len(problems) - 5} more"
        raise UserError(
            f"{path}: {len(problems)} of {len(lines)} lines cannot be scored:\n{shown}{hint}\n{remedy}"
        )
    if not found:
        raise UserError(f"{path} holds no prompt")
    prompts = tuple(found)[:limit]
    targets, metadata = zip(*(found[prompt] for prompt in prompts))
    return PromptSet(prompts, targets, metadata, tuple(problems))


def without_shared(prompts: PromptSet, heldout: PromptSet, skip_invalid: bool) -> PromptSet:
    """Return the training prompts that are not held out. Raises `UserError` where some are, without
    `skip_invalid`.
    """
    known = set(map(clean, heldout.prompts))
    shared = [clean(prompt) in known for prompt in prompts.prompts]
    found = [*itertools.compress(prompts.prompts, shared)]
    if found and not skip_invalid:
        raise UserError(
            f"{len(found)} held-out prompts are training prompts too, e.g. {min(found)!r}; remove "
            "them from one of the files, or leave them out of training with "
            "--config.prompts.skip_invalid=True"
        )
    apart = prompts.select([not held_out for held_out in shared])
    reasons = (f"held out too: {prompt!r}" for prompt in found)
    return dataclasses.replace(apart, left_out=(*apart.left_out, *reasons))


def examples(prompts: PromptSet) -> list[str]:
    """Return a line for each of the first two prompts, which shows a misread file at the start."""
    lines = []
    for prompt, targets in zip(prompts.prompts[:2], prompts.targets):
        texts = getattr(targets, "targets", targets)
        lines.append(f"prompt: {prompt}" + (f" -> {', '.join(map(repr, texts))}" if texts else ""))
    return lines


def _targets(fields: dict) -> tuple[str, ...]:
    """Take the targets from the fields of a line, cleaned like those that are read from the prompt;
    none if it has no such field. Raises ValueError.
    """
    targets = fields.pop("targets", [])
    if not isinstance(targets, list) or not all(isinstance(t, str) and t.strip() for t in targets):
        raise ValueError(f'"targets" is {targets!r}: give a list of texts that are not blank')
    targets = tuple(visible(clean(target)).strip() for target in targets)
    if "" in targets:
        raise ValueError('"targets" has a text without a character that can be seen')
    return targets


def epoch_prompts(seed: int, epoch: int, total: int, groups: int) -> np.ndarray:
    """Return the indices [groups] of an epoch's prompts.

    They are different and determined by (seed, epoch). Epochs draw without replacement from a
    shuffled pass over the prompts; where `groups` does not divide `total`, a pass leaves out the
    remainder.

    Raises:
      UserError: there are fewer prompts than groups.
    """
    if groups > total:
        raise UserError(
            f"sample.groups={groups} needs as many prompts, the file has {total}; lower "
            "sample.groups"
        )
    per_pass = total // groups
    shuffled = Stream.PROMPT_ORDER.generator(seed, epoch // per_pass).permutation(total)
    start = (epoch % per_pass) * groups
    return shuffled[start : start + groups]
