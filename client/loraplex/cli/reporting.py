"""Errors as a person reads them: one red line, no traceback unless `--debug`, exit status 1."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class ReportingGroup(TyperGroup):
    """The root command: what a sub-command raises is reported here, once for all."""

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command.

        Raises:
            typer.Exit: with status 1, after an error was reported.
            KeyboardInterrupt: also where Ctrl-C made something else fail on its way out.
        """
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if _was_interrupted(error):
                raise KeyboardInterrupt from error
            # Usage errors (exit status 2) show themselves: they have `format_message`, in Typer as in Click.
            if ctx.params.get("debug") or hasattr(error, "format_message"):
                raise
            report(error)
            raise typer.Exit(1) from error


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether `error` came of an interrupt: raised while it was handled, or what C code made of it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def report(error: Exception) -> None:
    """Write to stderr what went wrong and, where it is known, what to do."""
    from rich.text import Text

    from loraplex.cli.output import to_stderr

    message, *more = describe(error)
    console = to_stderr()
    console.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
    for line in more:
        console.print(Text(f"  {line}"), soft_wrap=True)


def describe(error: Exception) -> list[str]:
    """Return the line that says what went wrong, then lines with findings or advice."""
    from loraplex.adapters.errors import LoraplexError
    from loraplex.client.errors import LoraplexClientError

    if isinstance(error, LoraplexClientError):
        return _describe_client_error(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("loraplex"):
        return [f"{error}: this command needs packages that are not installed", "pip install 'loraplex[server]'"]
    message = " ".join(str(error).split())
    if isinstance(error, LoraplexError | OSError):
        return [message or type(error).__name__]
    return [f"unexpected {type(error).__name__}: {message}", "`loraplex --debug ...` shows where it happened"]


def _describe_client_error(error: Exception) -> list[str]:
    from loraplex.client.errors import InternalError, PreconditionError, UnavailableError

    lines = [" ".join(str(error).split())]
    if isinstance(error, PreconditionError):
        lines += [f"{violation.field}: {violation.description}" for violation in error.violations]
        left = error.violation_count - len(error.violations)
        if error.report_id:
            lines.append(f"{f'and {left} more; ' if left else ''}all of it: loraplex adapter report {error.report_id}")
    elif isinstance(error, UnavailableError) and "failed to connect" in lines[0]:
        lines.append("is the server running (`loraplex serve`), and is --server right?")
    elif isinstance(error, InternalError):
        lines.append(f"the server's log has more under request {error.request_id}")
    return lines
