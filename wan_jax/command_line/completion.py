"""Completion of a command's flags and settings by bash and zsh: a script that the command prints."""

import shlex
from collections.abc import Mapping, Sequence

from absl import flags

from wan_jax.command_line import help_page
from wan_jax.errors import UserError

# Words: --flag= and --flag. After --flag= or --flag its choices, else files.
BASH = """\
# {name}: source this file, or save it as ~/.local/share/bash-completion/completions/{name}
_{function}() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flag=${{COMP_WORDS[COMP_CWORD-1]}} choices=
  [[ $word == = ]] && word= || {{ [[ $flag == = ]] && flag=${{COMP_WORDS[COMP_CWORD-2]}}; }}
  COMPREPLY=()
  if [[ $word == -* ]]; then
    compopt -o nospace
    COMPREPLY=($(compgen -W {words} -- "$word"))
    return
  fi
  case $flag in
{cases}
  esac
  COMPREPLY=($(compgen -W "$choices" -- "$word"))
}}
complete -o default -F _{function} {name}"""
ZSH = """\
#compdef {name}
# {name}: source this file after compinit, or save it as _{name} in a folder of $fpath
_{function}() {{
  local flag=${{words[CURRENT-1]}} choices=
  if [[ $PREFIX == -*=* ]]; then
    flag=${{PREFIX%%=*}}
    compset -P '*='
  elif [[ $PREFIX == -* ]]; then
    compadd -S '' -- {listed}
    return
  fi
  case $flag in
{cases}
  esac
  if [[ -n $choices ]]; then compadd -- ${{=choices}}; else _files; fi
}}
if [[ $funcstack[1] == _{name} ]]; then _{function} "$@"; else compdef _{function} {name}; fi"""
SHELLS = {"bash": BASH, "zsh": ZSH}


def script(shell: str, name: str, defined: Sequence[flags.Flag], settings: Mapping) -> str:
    """Return the script that completes a command. Raises `UserError` on another shell.

    name: of the command, e.g. 'wan-train'. settings: choices of each setting by key, () if any
    value of its type is allowed; of a command without a recipe none.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion={shell} is unknown: give {' or '.join(SHELLS)}")
    choices = {f"--{flag.name}": help_page.choices_of(flag) for flag in defined}
    words = [f"--{f.name}" if f.boolean else f"--{f.name}=" for f in defined]
    words += [f"--no{f.name}" for f in defined if f.boolean]
    for key, values in settings.items():
        choices[f"--config.{key}"] = values
        words.append(f"--config.{key}=")
    cases = [
        f"    {flag}) choices={shlex.quote(' '.join(v))} ;;" for flag, v in choices.items() if v
    ]
    return SHELLS[shell].format(
        name=name,
        function=name.replace("-", "_"),
        words=shlex.quote(" ".join(words)),
        listed=" ".join(words),
        cases="\n".join(cases or ["    *) ;;"]),
    )
