"""``gcsctl completion SHELL``, and the ``gcsctl __complete`` that the shells' scripts call on each Tab.

What they say to each other is one value per line, for zsh and fish with a tab and what it means behind it;
``:files`` alone means that paths may stand there, ``:glued`` that no space is to follow.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from gcsagent.host.cli.completion import complete
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.parser import build, command_of

SHELLS = ("bash", "zsh", "fish")
_BASH_BREAKS = ":="
"""Of COMP_WORDBREAKS: bash replaces only what is behind the last of them."""

_MEANING = 80
"""Characters of what a value means."""

_END = "\x00"

BASH = r"""# gcsctl for bash: source <(gcsctl completion bash)
_gcsctl() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            :files) compopt -o default -o filenames ;;
            :glued) compopt -o nospace ;;
            *) COMPREPLY+=("$line") ;;
        esac
    done < <("$1" __complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -F _gcsctl gcsctl
"""

ZSH = r"""#compdef gcsctl
# gcsctl for zsh, after compinit: source <(gcsctl completion zsh)
_gcsctl() {
    local line
    local -a typed values meanings glued
    typed=("${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}")
    for line in "${(@f)$("${words[1]}" __complete zsh "${typed[@]}" 2>/dev/null)}"; do
        case $line in
            '') ;;
            :files) _files && return ;;
            :glued) glued=(-S '') ;;
            *) values+=("${line%%$'\t'*}"); meanings+=("${line/$'\t'/  -- }") ;;
        esac
    done
    compadd -l -d meanings "${glued[@]}" -a values
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _gcsctl gcsctl
"""

FISH = r"""# gcsctl for fish: gcsctl completion fish | source
function __gcsctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in ($words[1] __complete fish $words[2..-1] "$current" 2>/dev/null)
        switch $line
            case ':files'
                __fish_complete_path "$current"
            case ':glued'
            case '*'
                echo $line
        end
    end
end
complete -c gcsctl -f -a '(__gcsctl_complete)'
"""


def add_completion_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "completion",
        completion,
        "print what teaches a shell to complete gcsctl's command lines",
        "source <(gcsctl completion bash)",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS))


async def completion(args: argparse.Namespace) -> int:
    from gcsagent.host.cli.common import print_json

    script = {"bash": BASH, "zsh": ZSH, "fish": FISH}[args.shell]
    print_json({"shell": args.shell, "script": script}) if args.json else print(script, end="")
    return 0


def answer(shell: str, words: list[str]) -> list[str]:
    """The lines for ``shell``, whose cursor is at the end of ``words`` (bash: of the line so far)."""
    if shell == "bash":
        words = _split(words[0])[1:]
    found = complete(build(command_of(words[:-1])), words)
    lines = [":files"] if found.files else [":glued"] if found.glued else []
    if shell == "bash":
        kept = _broken_off(words[-1] if words else "")
        return lines + [value[kept:] for value, _ in found.values]
    return lines + [f"{value}\t{_short(about)}" if about else value for value, about in found.values]


def _split(line: str) -> list[str]:
    """As bash would, a quote that is open yet being closed at the end."""
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(line + _END + closing)
        except ValueError:
            continue
        return [word.removesuffix(_END) for word in words]
    return [""]


def _broken_off(word: str) -> int:
    return max(word.rfind(mark) for mark in _BASH_BREAKS) + 1


def _short(about: str) -> str:
    return about if len(about) <= _MEANING else f"{about[: _MEANING - 1]}…"
