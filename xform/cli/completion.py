"""`xform completion`: the script that completes commands and options in a shell."""

from __future__ import annotations

from typing import Annotated

import typer

from xform.cli.common import Debug, examples
from xform.errors import UsageError
from xform.text import shown

EXAMPLES = examples(
    "xform completion bash >> ~/.bashrc", "xform completion fish > ~/.config/fish/completions/xform.fish"
)


def completion(
    shell: Annotated[str, typer.Argument(help="The shell that the script is for.")], debug: Debug = False
) -> None:
    """Print the script that completes xform in a shell: bash, zsh, fish, powershell or pwsh."""
    from typer._completion_shared import Shells, get_completion_script  # of no public module; nothing else needs it

    known = [one.value for one in Shells]
    if shell not in known:
        raise UsageError(f"no completion for the shell {shown(shell)!r}", hint=f"use {', '.join(known)}")
    typer.echo(get_completion_script(prog_name="xform", complete_var="_XFORM_COMPLETE", shell=shell))
