"""Commands that refuse an option given twice, where the second one would silently replace the first."""

from __future__ import annotations

from typing import Any, cast

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose options with one value may be given once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click.

        Raises:
            BadParameter: An option that takes one value was given several times.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        seen: set[str] = set()
        for parameter in cast("list[Any]", order):
            single = not (parameter.multiple or getattr(parameter, "is_flag", False) or parameter.nargs == -1)
            if single and parameter.name in seen:
                raise typer.BadParameter("it was given twice, and takes one value", ctx=ctx, param=parameter)
            seen.add(parameter.name)
        return super().parse_args(ctx, args)
