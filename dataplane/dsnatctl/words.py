"""The man page and the bash completion, made from the parser itself: they cannot disagree with it.

python3 -m dsnatctl.words man > dsnatctl.1
python3 -m dsnatctl.words bash > /usr/share/bash-completion/completions/dsnatctl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from dsnatctl.arguments import parser

FILES = """\
.SH FILES
.TP
.I /etc/dsnat/dsnatd.yaml
the engine's configuration; dsnatd \\-\\-check FILE judges one
.TP
.I /run/dsnatd/control.sock
where the engine answers: one JSON request a line. Who may use it is a matter of the file's group and mode
.SH EXIT STATUS
0 done; 1 the engine refused, the packet would be dropped, nobody was found;
2 wrong usage or an invalid configuration file;
3 the engine cannot be reached; 130 interrupted
.SH SEE ALSO
.BR ipvsadm (8),
.BR pcap-filter (7)
"""


def verbs(top: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """(words, help, parser) of every verb, those of `show` one by one."""
    for action in top._actions:  # argparse has no other way to ask
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {one.dest: one.help or "" for one in action._choices_actions}
        for name, one in action.choices.items():
            words = f"{path} {name}".strip()
            inner = list(verbs(one, words))
            if inner:
                yield from inner
            else:
                yield words, helps.get(name, one.description or ""), one


def options(one: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in one._actions
        if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
    ]


def roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def described(action: argparse.Action) -> str:
    name = action.metavar or action.dest
    words = " ".join(name) if isinstance(name, tuple) else str(name)
    if action.choices is not None and len(list(action.choices)) <= 8:
        words = "|".join(map(str, action.choices))
    if not action.option_strings:
        return f"\\fI{roff(words)}\\fR"
    flags = ", ".join(f"\\fB{roff(flag)}\\fR" for flag in action.option_strings)
    return flags if action.nargs == 0 else f"{flags} \\fI{roff(words)}\\fR"


def man() -> str:
    top = parser()
    common = {"--socket", "--json"}
    text = '.TH DSNATCTL 1 "" "dsnat" "dsnat gateway"\n.SH NAME\n'
    text += f"dsnatctl \\- {roff((top.description or '').rstrip('.').lower())}\n"
    text += ".SH SYNOPSIS\n.B dsnatctl\n.I VERB\n[\\fIoptions\\fR] [\\fB\\-\\-json\\fR] "
    text += "[\\fB\\-\\-socket\\fR \\fIPATH\\fR]\n"
    text += ".SH VERBS\n"
    for words, help_, one in verbs(top):
        mine = [action for action in options(one) if not common & set(action.option_strings)]
        places = " ".join(described(action) for action in mine if not action.option_strings)
        text += f".SS dsnatctl {roff(words)} {places}\n{roff(help_)}\n"
        for action in mine:
            if action.help or action.option_strings:
                text += f".TP\n{described(action)}\n{roff(action.help or '')}\n"
    return text + FILES


def bash() -> str:
    top = parser()
    cases: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for words, _, one in verbs(top):
        parts = words.split()
        for depth, part in enumerate(parts):
            known = cases.setdefault(" ".join(parts[:depth]), [])
            if part not in known:
                known.append(part)
        cases[words] = []
        for action in options(one):
            cases[words] += [flag for flag in action.option_strings if flag.startswith("--")]
            choices = [str(choice) for choice in action.choices or ()]
            if action.option_strings and choices and len(choices) <= 8:
                values[action.option_strings[-1]] = " ".join(choices)
            elif not action.option_strings:
                cases[words] += choices
    lines = ["# bash completion of dsnatctl; made by dsnatctl.words from the parser", "_dsnatctl() {"]
    lines += [
        "\tlocal cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} path= word words=",
        "\tCOMPREPLY=()",
    ]
    lines += ['\tfor word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do', '\t\tcase "$path $word" in']
    lines += [
        f'\t\t"{" " if " " not in words else ""}{words}") path="{words}" ;;' for words in cases if words
    ]
    lines += ["\t\tesac", "\tdone", "\tcase $before in"]
    lines += [
        f'\t{flag}) COMPREPLY=($(compgen -W "{choice}" -- "$cur")); return ;;'
        for flag, choice in values.items()
    ]
    lines += [
        '\t--config|--write|-w|--socket|--output) COMPREPLY=($(compgen -f -- "$cur")); return ;;',
        "\tesac",
    ]
    lines += ["\tcase $path in"]
    lines += [f'\t"{words}") words="{" ".join(known)}" ;;' for words, known in cases.items()]
    lines += ["\tesac", '\tCOMPREPLY=($(compgen -W "$words" -- "$cur"))']
    lines += [
        '\t[ "$path" = plan ] && COMPREPLY+=($(compgen -f -- "$cur"))',
        "\treturn 0",
        "}",
        "complete -F _dsnatctl dsnatctl",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write({"man": man, "bash": bash}[sys.argv[1]]())
