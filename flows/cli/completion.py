"""`mergeline completion SHELL`: what a shell needs to complete commands, options, methods and their parameters; and
`mergeline completion names`, by which it asks for those of a params.yaml.
"""

from __future__ import annotations

import argparse
from typing import Any, Iterator, Mapping

SHELLS = ("bash", "zsh", "fish")
NAMES = "names"

_FILES = {"FILE", "P", "OUT", "STORE"}  # metavars of what is a file or a folder
_FOLDERS = {"DIR"}
_BASH_SETTINGS = "_mergeline_settings"
_NAMES = "_mergeline_names"  # a function, in bash and zsh

_BASH_NAMES = f"""
{_NAMES}() {{
  local i params=params.yaml
  for ((i = 1; i < COMP_CWORD; i++)); do
    [[ "${{COMP_WORDS[i]}}" == --params ]] && params="${{COMP_WORDS[i + 1]}}"
  done
  compgen -W "$(mergeline completion {NAMES} --params "$params" 2>/dev/null)" -- "$1"
}}

# bash takes names of stages, such as merge@cart, for three words.
_mergeline_joined() {{
  local i joined=0 words=("${{COMP_WORDS[0]}}")
  for ((i = 1; i < ${{#COMP_WORDS[@]}}; i++)); do
    if [[ "${{COMP_WORDS[i]}}" == @ || "${{COMP_WORDS[i - 1]}}" == @ ]]; then
      words[${{#words[@]}} - 1]+="${{COMP_WORDS[i]}}"
      ((i <= COMP_CWORD)) && joined=$((joined + 1))
    else
      words+=("${{COMP_WORDS[i]}}")
    fi
  done
  local COMP_WORDS=("${{words[@]}}") COMP_CWORD=$((COMP_CWORD - joined))
  _shtab_mergeline
  local typed="${{COMP_WORDS[COMP_CWORD]}}"
  ((joined)) && [[ "$typed" == *@* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{typed%%@*}}@"}}")
  return 0
}}
complete -o bashdefault -F _mergeline_joined mergeline"""

_ZSH_NAMES = f"""
{_NAMES}() {{
  local params=params.yaml at=${{words[(I)--params]}}
  ((at)) && params="${{words[at + 1]}}"
  compadd -- ${{(f)"$(mergeline completion {NAMES} --params "$params" 2>/dev/null)"}}
}}
"""
# Of the params.yaml in the current folder: fish hands a command no words.
_FISH_NAMES = f"(mergeline completion {NAMES} 2>/dev/null)"


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What a shell is to read; `parser` has all commands with all their options, and is changed."""
    import shtab

    from mergeline.merging.methods import catalogue

    methods = {entry.id: entry.parameters for entry in catalogue().values()}
    for action in _actions(parser):
        _describe(action, methods)
    made = shtab.complete(parser, shell, preamble=_ZSH_NAMES if shell == "zsh" else "")
    if shell == "bash":
        return "\n".join([made, _bash_settings(methods), _BASH_NAMES])
    if shell == "zsh":  # what is read by `source` registers itself, too, not only what is read by `eval`
        return made.replace(
            "[[ $zsh_eval_context[-1] == eval ]]", "[[ $zsh_eval_context[-1] == (eval|file) ]]"
        )
    return made


def names(params_file: str) -> list[str]:
    """What --only and --force of `mergeline run` may name: merges and other items, stages and steps of a file."""
    from mergeline.tasks import status
    from mergeline.tasks.workspace import Workspace

    return sorted(status.names(Workspace(params_file)))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _describe(action: Any, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what an argument may be, in the way that shtab asks for it."""
    import shtab

    if action.dest in ("method", "id"):
        action.choices = list(methods)
    elif action.dest in ("set", "grid"):
        names = sorted({name for parameters in methods.values() for name in parameters})
        words = " ".join(f"{name}=" for name in names)
        action.complete = {"bash": _BASH_SETTINGS, "zsh": f"({words})", "fish": words}
    elif action.dest in ("only", "force") and action.nargs != 0:  # --force of other commands takes nothing
        action.complete = {"bash": _NAMES, "zsh": _NAMES, "fish": _FISH_NAMES}
    elif action.metavar in _FILES or action.dest in ("out", "checkpoint", "a", "b"):
        action.complete = shtab.FILE
    elif action.metavar in _FOLDERS or action.dest == "folder":
        action.complete = shtab.DIRECTORY


def _bash_settings(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """A function that completes the parameters of the method that the line names, with their defaults; else of any."""
    from shlex import quote

    lines = [
        f"{_BASH_SETTINGS}() {{",
        "  local i method=",
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        '    [[ "${COMP_WORDS[i]}" == --method ]] && method="${COMP_WORDS[i + 1]}"',
        "  done",
        '  case "$method" in',
    ]
    for id, parameters in methods.items():
        words = " ".join(f"{name}={_plain(default)}" for name, default in parameters.items())
        lines.append(f'    {id}) compgen -W {quote(words)} -- "$1" ;;')
    names = sorted({f"{name}=" for parameters in methods.values() for name in parameters})
    lines += [f'    *) compgen -W {quote(" ".join(names))} -- "$1" ;;', "  esac", "}"]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
