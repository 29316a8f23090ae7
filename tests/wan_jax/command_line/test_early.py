"""What commands answer without importing JAX: help, settings, completion, a missing recipe."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from convert import choices as convert_choices
from convert import lora
from tests import commands
from wan_jax.command_line import flag_source
from wan_jax.command_line.scripts import COMMANDS

# Each request in a child, which has no flags yet: [exit code, output, error, whether JAX is imported]
PROGRAM = """
import contextlib, io, json, os, sys
from wan_jax.command_line import early

def ask(module, arguments):
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            early.answer(module, arguments)
        except SystemExit as ended:
            code = ended.code
    text = f"{code}\\n" if isinstance(code, str) else ""
    return [1 if text else code, out.getvalue(), err.getvalue() + text, "jax" in sys.modules]

answers = []
for module, *arguments in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        with open(writing, "w") as file:
            json.dump(ask(module, arguments), file)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        answers.append(json.load(file))
print(json.dumps(answers))
"""
HELP = [[module, "--help"] for module in COMMANDS.values() if module != "grpo.settings"]
OTHERS = {
    "filtered": ["grpo.train", "--settings", "learning"],
    "equals": ["grpo.train", "--settings=learning"],
    "all": ["grpo.plan", "--settings", "--config=configs/tiny_ocr.py"],
    "no such word": ["grpo.train", "--settings", "zebra"],
    "bash": ["grpo.train", "--completion", "bash"],
    "zsh": ["grpo.train", "--completion=zsh"],
    "bash sample": ["wan_jax.sample", "--completion", "bash"],
    "fish": ["grpo.train", "--completion", "fish"],
    "positional": ["grpo.train", "configs/tiny_ocr.py"],
    "misspelt": ["grpo.evaluate", "--config=configs/tiny_orc.py", "--out=x"],
    "value": ["grpo.evaluate", "--config=tiny_ocr", "--checkpoint", "configs/tiny_ocr.py"],
    "full": ["grpo.train", "--helpfull"],
    "short": ["convert.export_lora", "-h"],
    "nothing": ["grpo.train", "--config=configs/tiny_ocr.py", "--", "--help"],
    "no command": ["wan_jax.models.config", "--help"],
}


@pytest.fixture(scope="module")
def answers():
    """{request: [exit code or None, standard output, standard error, whether JAX is imported]}"""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*HELP, *OTHERS.values()])],
        env=commands.environment(),
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [*(module for module, _ in HELP), *OTHERS]
    return dict(zip(names, json.loads(done.stdout), strict=True))


def test_nothing_imports_jax(answers):
    assert [name for name, answer in answers.items() if answer[3]] == []


@pytest.mark.parametrize("module", [module for module, _ in HELP])
def test_help_fits_one_screen_and_has_every_flag(answers, module):
    code, out, err, _ = answers[module]
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    source = flag_source.read(module)
    shown = re.findall(r"^  --(?:\[no\])?(\w+)", out, re.MULTILINE)
    assert [name for name in shown if name != "settings"] == list(source.names)
    path = commands.ROOT / f"{module.replace('.', '/')}.py"
    text = (path if path.exists() else path.with_suffix("") / "__main__.py").read_text()
    defined = r"^(?:    )?(?:\w+ = )?(?:\w+\.)?(?:DEFINE|define)_\w+\("
    assert len(source.names) == len(re.findall(defined, text, re.MULTILINE)) > 0


@pytest.mark.parametrize(
    "module", ["grpo.train", "grpo.plan", "wan_jax.sample", "convert.export_lora"]
)
def test_help_is_that_of_the_flags_themselves(answers, module):
    """The command has defined its own flags when it prints its help after its imports."""
    done = subprocess.run(
        commands.command(module, "--help"),
        env=commands.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == answers[module][1]


def test_choices_of_an_export_are_those_of_its_writer():
    assert tuple(lora.PREFIXES) == convert_choices.LORA_FORMATS
    assert tuple(lora.DTYPES) == convert_choices.LORA_DTYPES


def test_help_says_default_choices_and_need(answers):
    page = answers["grpo.train"][1]
    assert (
        "no limit [7200]" in page
        and "auto|none|slurm" in page
        and "docs/reference/settings.md" in page
    )
    for module in ("grpo.train", "grpo.evaluate", "grpo.plan", "grpo.reward_head"):
        config = answers[module][1].partition("--config ")[2].partition("\n  --")[0]
        assert all(
            text in config for text in ("(required)", "docs/reference/settings.md", "grpo.settings")
        )
    assert "The methods are Flow-GRPO" in answers["full"][1] and answers["full"][0] == 0
    assert "The methods are" not in page
    assert answers["short"][1] == answers["convert.export_lora"][1]


def test_settings_are_listed_and_filtered(answers):
    assert answers["filtered"] == answers["equals"] and answers["filtered"][0] == 0
    out = answers["filtered"][1]
    assert out.startswith("train.learning_rate=0.0001  (number; above 0 and below 1)\n    ")
    assert "train.kl_kind" not in out and "train.kl_kind" in answers["all"][1]
    code, out, err, _ = answers["no such word"]
    assert code == 1 and out == "" and "'zebra'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("request_name", "message"),
    [
        ("positional", "--config=configs/tiny_ocr.py"),
        ("misspelt", "did you mean configs/tiny_ocr.py?"),
        ("fish", "bash or zsh"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(answers, request_name, message):
    code, out, err, _ = answers[request_name]
    assert code == 1 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("request_name", ["value", "nothing", "no command"])
def test_other_command_lines_are_left_to_the_command(answers, request_name):
    assert answers[request_name] == [None, "", "", False]


COMPLETED = [
    (["--config.train.learn"], ["--config.train.learning_rate="]),
    (["--clu"], ["--cluster="]),
    (["--cluster", "=", "s"], ["slurm"]),
    (["--cluster", "k"], ["k8s"]),
    (
        ["--config.train.method", "="],
        ["awm", "dgpo", "dpo", "grpo", "nft", "rvm", "rwr", "sft", "tgo"],
    ),
    (["--config", "=", "conf"], []),  # files, by bash itself
]


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_flags_settings_and_choices(answers):
    script = [answers["bash"][1], "compopt() { :; }"]
    for words, _ in COMPLETED:
        quoted = " ".join(f"'{word}'" for word in ["wan-train", *words, *[""] * (words[-1] == "=")])
        script += [
            f"COMP_WORDS=({quoted})",
            "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))",
            '_wan_train; echo "${COMPREPLY[*]}"',
        ]
    done = subprocess.run(
        ["bash", "-u", "-c", "\n".join(script)], capture_output=True, text=True, check=True
    )
    assert [line.split() for line in done.stdout.splitlines()] == [found for _, found in COMPLETED]
    assert "--frames=" in answers["bash sample"][1] and "--config." not in answers["bash sample"][1]


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_completes_flags_settings_and_choices(answers):
    """With the builtins of its completion replaced by functions that print what they are given."""
    script = [
        "compdef() { :; }",
        "compset() { : }",
        "_files() { echo files }",
        "compadd() { while [[ $1 != -- ]]; do shift; done; shift; print -r -- ${(M)@:#$shown*} }",
        answers["zsh"][1],
    ]
    asked = [
        (["--config.train.learn"], "--config.train.learn"),
        (["--cluster=s"], "s"),
        (["--cluster", "k"], "k"),
        (["--config=c"], ""),
    ]
    for words, shown in asked:
        quoted = " ".join(f"'{word}'" for word in ["wan-train", *words])
        script.append(
            f"words=({quoted}) CURRENT={len(words) + 1} PREFIX='{words[-1]}' shown='{shown}'"
        )
        script.append("_wan_train")
    done = subprocess.run(["zsh", "-f", "-c", "\n".join(script)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--config.train.learning_rate=", "slurm", "k8s", "files"], (
        done.stderr
    )
