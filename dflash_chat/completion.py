"""Completion scripts for bash, zsh and fish, generated from the parser itself.

Pair names are asked from `dflash-chat list -q` when a person presses Tab.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dflash_chat.settings import KEYS

SHELLS = ("bash", "zsh", "fish")
_BEFORE_A_PAIR = ("pull", "rm", "show", "plan")


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script to evaluate in the shell's start-up file."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parser)


def words(parser: argparse.ArgumentParser) -> list[str]:
    """Commands, then options, of one level."""
    return [*commands(parser), *_flags(parser)]


def flags(parser: argparse.ArgumentParser) -> list[str]:
    """Every option of every level."""
    below = (flag for command in commands(parser).values() for flag in flags(command))
    return list(dict.fromkeys([*_flags(parser), *below]))


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a level's commands by all their names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings


def _after_command(name: str, command: argparse.ArgumentParser) -> str:
    """Words that may follow a command, as shell text."""
    after = words(command)
    if name in _BEFORE_A_PAIR:
        after.append("$(dflash-chat list -q 2>/dev/null)")
    return " ".join([*after, *(SHELLS if name == "completion" else ())])


def _bash(parser: argparse.ArgumentParser) -> str:
    cases = "\n".join(
        f'    {name}) words="{_after_command(name, command)}" ;;'
        for name, command in commands(parser).items()
    )
    return f"""\
# dflash-chat completion for bash: eval "$(dflash-chat completion bash)"
_dflash_chat() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words
  case "$previous" in
    -m|--model|--random-weights) words="$(dflash-chat list -q 2>/dev/null)" ;;
    --resume) words="$(dflash-chat sessions -q 2>/dev/null)" ;;
    -o) words="{" ".join(f"{key}=" for key in KEYS)}"; compopt -o nospace ;;
    --prompts|--replay|--to) COMPREPLY=($(compgen -f -- "$word")); return ;;
    --once|-s|--system|--seed|--max-tokens|--limit|--quant) return ;;
    *) case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="{" ".join(words(parser))}" ;;
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -F _dflash_chat dflash-chat"""


def _zsh(parser: argparse.ArgumentParser) -> str:
    return f"""\
# dflash-chat completion for zsh: eval "$(dflash-chat completion zsh)"
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
{_bash(parser).split(chr(10), 1)[1]}"""


def _fish(parser: argparse.ArgumentParser) -> str:
    lines = [
        "# dflash-chat completion for fish: dflash-chat completion fish | source",
        "complete -c dflash-chat -f",
    ]
    names = " ".join(commands(parser))
    anywhere = f"not __fish_seen_subcommand_from {names}"
    lines.append(f"complete -c dflash-chat -n '{anywhere}' -a '{names}'")
    lines += _fish_options(parser, anywhere)
    for name, command in commands(parser).items():
        here = f"__fish_seen_subcommand_from {name}"
        if name in _BEFORE_A_PAIR:
            lines.append(f"complete -c dflash-chat -n '{here}' -a '(dflash-chat list -q)'")
        if below := commands(command):
            lines.append(f"complete -c dflash-chat -n '{here}' -a '{' '.join(below)}'")
        if name == "completion":
            lines.append(f"complete -c dflash-chat -n '{here}' -a '{' '.join(SHELLS)}'")
        lines += _fish_options(command, here)
    return "\n".join(lines)


def _fish_options(parser: argparse.ArgumentParser, condition: str) -> Iterator[str]:
    for action in parser._actions:
        if not action.option_strings:
            continue
        names = " ".join(
            f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            for flag in action.option_strings
        )
        values = ""
        if action.dest in ("model", "random_weights"):
            values = " -x -a '(dflash-chat list -q)'"
        elif action.dest == "resume":
            values = " -x -a '(dflash-chat sessions -q)'"
        elif action.dest == "options":
            values = f" -x -a '{' '.join(f'{key}=' for key in KEYS)}'"
        elif action.type is Path:
            values = " -r -F"
        elif action.choices:
            values = f" -x -a '{' '.join(map(str, action.choices))}'"
        elif action.nargs != 0:
            values = " -x"
        yield f"complete -c dflash-chat -n '{condition}' {names}{values}"
