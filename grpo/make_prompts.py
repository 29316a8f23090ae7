"""Writes prompts for training a video model to spell.

    python -m grpo.make_prompts --count=20000 --heldout=1000 --out=prompts --seed=0
    python -m grpo.make_prompts --out=prompts --styles=short,long,two_texts,chinese
    python -m grpo.make_prompts --out=rewritten --rewrite=http://gpu1:8000 --src=prompts.jsonl

A prompt names something that carries a text, where it is, and how the camera moves. OUT gets train
and heldout, each as .txt (one prompt per line) and .jsonl, whose lines have the prompt, its targets,
text, surface, scene, light and camera. Everything is ASCII; the text is in straight double quotes.
Words of held-out texts, random ones too, occur in no training text. The seed determines both sets,
and a larger set begins with the smaller one. Before the command ends, it reads the files back as
`grpo.train` does.

With `--styles` the prompts are written as people write them, each style in turn: `short` (a few words),
`long` (60 to 100 words), `two_texts`, `chinese`, and `standard`, the sentence of this command without
`--styles`. Lines have their style too, and each style has a file heldout_STYLE of its own, for
`eval.more_prompts`. The Chinese words of held-out texts occur in no training text; their characters may.

With `--rewrite` a chat model behind an OpenAI-style endpoint (POST URL/v1/chat/completions) rewrites the
prompts of `--src` as prompt editors do. OUT gets files of the same name, with the original's targets and
other fields. A rewrite that does not quote exactly the original's texts is refused: the original stays,
and the command prints how many and why. OUT/rewrites stores the answers, so that the same command asks
only for what is missing.
"""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

from grpo.data.prompt_generator import CASES, TextStyle, generate, words_of
from grpo.data.prompt_rewriting import rewrite
from grpo.data.prompt_styles import STYLES, generate_styles
from grpo.data.prompts import load_prompts
from grpo.records.run_files import write_atomically
from rewards.base import RewardError, last_line
from rewards.choices import ENGINES
from rewards.judge import VisionEndpoint
from rewards.ocr.rules import make_readable_check
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_path
from wan_jax.errors import UserError

NO_FRAMES = np.zeros((0, 1, 1, 3), np.uint8)  # for a chat model that is shown no video


def write(path: pathlib.Path, lines: Sequence[dict]) -> None:
    """Write `path`.txt and `path`.jsonl, and check that training reads the same prompts.

    lines: from `draw_prompts`.

    Raises:
      UserError: a file is not read back as it was written.
    """
    prompts = tuple(line["prompt"] for line in lines)
    targets = tuple(tuple(line["targets"]) for line in lines)
    json_lines = [json.dumps(line, ensure_ascii=False) for line in lines]
    for suffix, rows in ((".txt", prompts), (".jsonl", json_lines)):
        file = path.with_name(path.name + suffix)
        write_atomically(file, ("\n".join(rows) + "\n").encode())
        read = load_prompts(file, parse_targets)
        if (read.prompts, read.targets) != (prompts, targets):
            raise UserError(f"{file} is not read back as it was written")


def check_readable(sets: Mapping[str, Sequence[dict]], engine: str) -> None:
    """Raise `UserError` where the OCR engine cannot read a text; print a note where its characters are
    not known.
    """
    check = make_readable_check(engine)
    if check is None:
        print(f"note: the characters that --engine={engine} can read are not known: not checked")
        return
    for line in (line for lines in sets.values() for line in lines):
        try:
            check(line["targets"])
        except ValueError as error:
            raise UserError(
                f"--styles={line['style']} with --engine={engine}: {error}; leave out this style, or "
                "give an engine that reads it"
            ) from None


def rewrite_file(src: str, out: pathlib.Path, url: str, model: str, token: str) -> None:
    """Write the prompts of a file as a chat model rewrites them. Raises `UserError`.

    src: of the prompts. url, model, token: of the endpoint.
    """
    prompts = load_prompts(src, parse_targets, remedy="--src: correct the file")
    try:
        endpoint = VisionEndpoint([url], model, token=token, setting="--model")
        try:
            done = rewrite(
                prompts,
                lambda question: endpoint.ask(question, NO_FRAMES),
                endpoint.model,
                out / "rewrites",
                functools.partial(
                    tqdm, desc="prompts", leave=False, disable=not sys.stderr.isatty()
                ),
            )
        finally:
            endpoint.close()
    except (RewardError, ValueError) as error:
        raise UserError(f"--rewrite={url}: {last_line(str(error))}") from None
    lines = [
        {**fields, "prompt": new, "targets": list(targets)}
        | ({"original": old} if new != old else {})
        for old, new, targets, fields in zip(
            prompts.prompts, done.prompts, prompts.targets, prompts.metadata
        )
    ]
    write(out / pathlib.Path(src).stem, lines)
    kept = sum(done.refused.values())
    print(
        f"{out / pathlib.Path(src).stem}.jsonl, .txt: {len(lines) - kept} of {len(lines)} prompts "
        f"rewritten, {done.asked} requests"
    )
    for reason, count in done.refused.most_common():
        print(f"{count} rewrites refused, the original stays: {reason}")
    if done.example:
        print(f"a refused one: {done.example[:300]}")


def main(_):
    args = flags.FLAGS
    if args.rewrite:
        if not args.src:
            raise UserError("--rewrite needs the file of prompts to rewrite: give --src=FILE")
        others = ("count", "heldout", "styles", "seed", "engine", "words", "characters")
        others += ("cases", "numbers", "punctuation", "random")
        check_used(args, dict.fromkeys(others, "to be without --rewrite"))
        token = os.environ.get(args.token_env, "")
        out = pathlib.Path(args.out)
        if out.resolve() == pathlib.Path(args.src).resolve().parent:
            raise UserError(f"--out={args.out} is the folder of --src={args.src}: give another one")
        rewrite_file(args.src, out, args.rewrite, args.model, token)
        return
    check_used(args, dict.fromkeys(("src", "model", "token_env"), "--rewrite"))
    try:
        (fewest, most), (shortest, longest) = (map(int, x) for x in (args.words, args.characters))
    except ValueError as error:
        raise UserError(
            f"--words={','.join(args.words)} --characters={','.join(args.characters)}: {error}"
        ) from None
    style = TextStyle(
        words=(fewest, most),
        characters=(shortest, longest),
        cases=tuple(args.cases),
        numbers=args.numbers,
        punctuation=args.punctuation,
        random=args.random,
    )
    out = pathlib.Path(args.out)
    if args.styles:
        sets = generate_styles(args.count, args.heldout, args.seed, style, args.styles)
        check_readable(sets, args.engine)
    else:
        check_used(args, {"engine": "--styles"})
        sets = generate(args.count, args.heldout, args.seed, style)
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in sets.items():
        write(out / name, lines)
        lengths = [len(line["text"].replace(" ", "")) for line in lines]
        print(
            f"{out / name}.jsonl, .txt: {len(lines)} prompts, "
            f"{len({line['text'] for line in lines})} texts of {min(lengths)} to {max(lengths)} "
            f"characters, median {np.median(lengths):.0f}"
            + (f", {words} words" if (words := len(words_of(lines))) else "")
        )


if __name__ == "__main__":
    default = TextStyle()
    flags.DEFINE_integer(
        "count", 20_000, "number of training prompts", lower_bound=1, upper_bound=1_000_000
    )
    flags.DEFINE_integer(
        "heldout", 1000, "number of held-out prompts", lower_bound=1, upper_bound=1_000_000
    )
    define_path("out", "folder to write", required=True)
    flags.DEFINE_integer("seed", 0, "determines both sets", lower_bound=0)
    flags.DEFINE_list("styles", [], f"what the prompts look like: {', '.join(STYLES)}")
    flags.DEFINE_enum(
        "engine", ENGINES[0], ENGINES, "OCR engine that must be able to read the texts"
    )
    flags.DEFINE_string("rewrite", "", "URL of a chat model that rewrites the prompts of --src")
    define_path("src", "file of prompts to rewrite")
    flags.DEFINE_string("model", "", "name of the chat model; not given: the only one at the URL")
    flags.DEFINE_string(
        "token_env",
        "PROMPTS_TOKEN",
        "environment variable with the endpoint's token, if it needs one",
    )
    flags.DEFINE_list("words", [str(n) for n in default.words], "least and most words of a text")
    flags.DEFINE_list(
        "characters",
        [str(n) for n in default.characters],
        "least and most characters of a text, without spaces",
    )
    flags.DEFINE_list("cases", list(CASES), "cases of the texts")
    flags.DEFINE_float("numbers", default.numbers, "share of texts with a number")
    flags.DEFINE_float("punctuation", default.punctuation, "share of texts with one of ! ? & -")
    flags.DEFINE_float("random", default.random, "share of words that are random letters")
    cli.run(main)
