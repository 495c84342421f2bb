"""The command line: `tgate-fx`."""

from __future__ import annotations

import sys

import click

from ..errors import TGateError
from .bench import bench
from .demo import demo
from .macs import macs
from .tune import tune


@click.group()
def app() -> None:
    """T-GATE for diffusers pipelines, compiled."""


app.add_command(bench)
app.add_command(demo)
app.add_command(macs)
app.add_command(tune)


def main() -> None:
    """Run a command; an error of the user's is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (TGateError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"tgate-fx: {message}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
