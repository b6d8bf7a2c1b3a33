"""The command line `var-deploy`: the commands, which are thin functions over the library, and how they fail.

Errors that a user can mend are one line on standard error and exit status 1; wrong usage exits with 2.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from .commands import bundles, evaluate, images, measure, report, sample
from .commands.console import needs
from .errors import run_command

app = typer.Typer(
    help="Deploy VAR image models: checkpoint in, bundle out, images from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point: runs the command and turns errors into one line and a status."""
    run_command(app)


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", help="Log what is chosen and why.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


for command in (
    bundles.export,
    bundles.build,
    bundles.triton_repo,
    bundles.inspect,
    images.generate,
    images.edit,
    images.vary,
    images.encode,
    images.reconstruct,
    sample.sample,
    bundles.verify,
    measure.bench,
    evaluate.evaluate,
    evaluate.evaluate_digits,
    report.report,
):
    app.command()(command)
app.command(name="cache")(bundles.cache_command)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(context: typer.Context) -> None:
    """Train a VQVAE and a VAR: vqvae, var, tokens, scaling-law (see train --help)."""
    needs("var_train.command", "train").app(args=context.args, prog_name="var-deploy train")


if __name__ == "__main__":
    main()
