# SPDX-License-Identifier: MIT
"""``qmpmirror completion``: scripts for bash, zsh and fish, and the man page, from the parsers.

A wheel has them in its ``share``; this command is for everybody else.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from qmpmirror.cli.arguments import Parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from qmpmirror.cli.manual import Command, Option

_FILES: Final = frozenset({"FILE", "PATH", "DIR", "DEST"})
_DOMAINS: Final = "qmpmirror completion --domains 2>/dev/null"

_BASH: Final = """\
# bash completion of qmpmirror, made from its parsers
_qmpmirror() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local command=${{COMP_WORDS[1]}} options= valued= named= position=0 i
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {commands} -- "$word"))
        return
    fi
    case "$command:$before" in
{values}
    *:--domain)
        COMPREPLY=($(compgen -W "$({domains})" -- "$word"))
        compopt -o default
        return ;;
    esac
    case "$command" in
{options}
    *) return ;;
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
        return
    fi
    for ((i = 2; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in
        -*) [[ " $valued " == *" ${{COMP_WORDS[i]}} "* ]] && ((++i)) ;;
        *) ((++position)) ;;
        esac
    done
    compopt -o default
    if [ "$position" -eq 0 ] && [ "$named" = domain ]; then
        COMPREPLY=($(compgen -W "$({domains})" -- "$word"))
    fi
}}
complete -F _qmpmirror qmpmirror
"""

_ZSH: Final = """\
#compdef qmpmirror
# zsh completion of qmpmirror, made from its parsers

_qmpmirror_domains() {{
    local -a found
    found=(${{(f)"$({domains})"}})
    compadd -a found
    _files
}}

_qmpmirror() {{
    local curcontext=$curcontext state line
    local -a commands=(
{commands}
    )
    _arguments -C '1:command:->command' '*::argument:->arguments'
    case $state in
    command) _describe command commands ;;
    arguments)
        case $words[1] in
{options}
        esac ;;
    esac
}}

if [ "$funcstack[1]" = _qmpmirror ]; then
    _qmpmirror "$@"
else
    compdef _qmpmirror qmpmirror
fi
"""


def parser() -> Parser:
    """The command's parser."""
    made = Parser(
        "completion",
        "Print a completion script for bash, zsh or fish, or the man page. Packages install them;"
        " this is for a shell that does not find them: put the output where it looks, such as"
        " ~/.local/share/bash-completion/completions/qmpmirror.",
        "qmpmirror completion bash",
    )
    made.add_named("shell", "bash, zsh, fish or man", required=False)
    made.add_argument(
        "--domains", action="store_true", help="print the names of the QEMUs that run here"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    if arguments.domains:
        from qmpmirror import discover  # noqa: PLC0415 - the scripts need nothing of it

        found = [process for process in discover.processes() if process.endpoints]
        print(*(process.name or process.pid for process in found), sep="\n")
        return 0
    if arguments.shell not in SCRIPTS:
        made.error("say for which shell: bash, zsh or fish; or man, for the man page")
    print(SCRIPTS[arguments.shell](), end="")
    return 0


def bash() -> str:
    """The script for bash."""
    values: list[str] = []
    options: list[str] = []
    for command in _commands():
        for option in command.options:
            values += _bash_values(command, option)
        flags = " ".join(flag for option in command.options for flag in option.flags)
        valued = " ".join(flag for o in command.options if o.value for flag in o.flags)
        first = command.named[0] if command.named else "none"
        options.append(
            f"    {command.name}) options={shlex.quote(flags)}"
            f" valued={shlex.quote(valued)} named={first.strip('[]')} ;;"
        )
    words = " ".join([*(command.name for command in _commands()), "--help", "--version"])
    return _BASH.format(
        commands=shlex.quote(words),
        values="\n".join(values),
        options="\n".join(options),
        domains=_DOMAINS,
    )


def _bash_values(command: Command, option: Option) -> Iterator[str]:
    if not option.value or option.value == "DOMAIN":
        return
    cases = "|".join(f"{command.name}:{flag}" for flag in option.flags)
    if option.choices:
        words = shlex.quote(" ".join(option.choices))
        yield f'    {cases}) COMPREPLY=($(compgen -W {words} -- "$word")); return ;;'
    elif option.value in _FILES:
        yield f"    {cases}) compopt -o default; return ;;"
    else:
        yield f"    {cases}) return ;;"


def zsh() -> str:
    """The script for zsh."""
    commands, options = [], []
    for command in _commands():
        commands.append(f"        {shlex.quote(f'{command.name}:{command.summary}')}")
        words = [_zsh_option(option) for option in command.options]
        if command.named[:1] == ("domain",):
            words.append("'1:domain:_qmpmirror_domains'")
        words.append("'*:argument:_files'")
        lines = " \\\n            ".join(words)
        options.append(f"        {command.name}) _arguments -s \\\n            {lines} ;;")
    return _ZSH.format(commands="\n".join(commands), options="\n".join(options), domains=_DOMAINS)


def _zsh_option(option: Option) -> str:
    text = option.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    ending = ""
    if option.value:
        action = f"({' '.join(option.choices)})" if option.choices else ""
        if option.value in _FILES:
            action = "_files"
        elif option.value == "DOMAIN":
            action = "_qmpmirror_domains"
        ending = f":{option.value.replace(':', ' ').replace('|', ' or ')}:{action}"
    several = "*" if option.value.endswith(("[,...]", "[,shallow=on]")) else ""
    if len(option.flags) == 1:
        return shlex.quote(f"{several}{option.flags[0]}[{text}]{ending}")
    joined = ",".join(option.flags)
    return f"{{{joined}}}{shlex.quote(f'[{text}]{ending}')}"


def fish() -> str:
    """The script for fish."""
    lines = ["# fish completion of qmpmirror, made from its parsers"]
    first = "complete -c qmpmirror -f -n __fish_use_subcommand"
    lines += [f"{first} -l help -d 'show help'", f"{first} -l version -d 'show the version'"]
    for command in _commands():
        lines.append(f"{first} -a {command.name} -d {_fish_quote(command.summary)}")
        after = f"complete -c qmpmirror -n '__fish_seen_subcommand_from {command.name}'"
        lines += [f"{after} {_fish_option(option)}" for option in command.options]
        if command.named[:1] == ("domain",):
            lines.append(f"{after} -a '({_DOMAINS})'")
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    words = [
        f"-l {flag.removeprefix('--')}" if flag.startswith("--") else f"-s {flag[1:]}"
        for flag in option.flags
    ]
    if option.choices:
        words.append(f"-x -a {_fish_quote(' '.join(option.choices))}")
    elif option.value == "DOMAIN":
        words.append(f"-x -a '({_DOMAINS})'")
    elif option.value:
        words.append("-r -F" if option.value in _FILES else "-x")
    return " ".join([*words, f"-d {_fish_quote(option.help)}"])


def _fish_quote(text: str) -> str:
    """Fish knows these two escapes between single quotes, and no way to join strings."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _man() -> str:
    from qmpmirror.cli.manpage import manpage  # noqa: PLC0415 - only here

    return manpage()


def _commands() -> list[Command]:
    from qmpmirror.cli.manual import commands  # noqa: PLC0415 - imports this module

    return commands()


SCRIPTS: Final[Mapping[str, Callable[[], str]]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
    "man": _man,
}
"""What can be printed, by its name."""
