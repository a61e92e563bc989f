"""`pairwise train RECIPE`: call `axolotl train` with the launcher that suits this machine.

Axolotl's default launcher, accelerate, prints its own traceback below the one line of error that
says what to mend. With one device no launcher is needed, and with several this command keeps that
line as the last one.
"""

import io
import subprocess
import sys

import click

from preprocess.core.errors import UserError, exits_with_2
from recipes.pairwise.config.recipe_files import find_recipe

ERROR_PREFIX = "error: "


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("recipe")
@click.argument("axolotl_options", nargs=-1, type=click.UNPROCESSED)
@exits_with_2
def main(recipe: str, axolotl_options: tuple[str, ...]) -> None:
    """Train RECIPE: a file, or the name of one in recipes/.

    Runs `axolotl train` on all GPUs of this machine, or on its CPU. Options that follow are
    Axolotl's, for instance --base-model FOLDER or --wandb-project NAME.
    """
    path = find_recipe(recipe)
    command = ["axolotl", "train", str(path), *axolotl_options]
    devices = count_devices()
    if not chooses_launcher(axolotl_options):
        command += launcher_options(devices)

    click.echo(f"running: {' '.join(command)}")
    if devices == 1:
        # Nothing prints below our line of error, and progress bars keep their terminal.
        raise SystemExit(subprocess.run(command).returncode)

    exit_code, error_line = run_until_error(command)
    if error_line is not None:
        raise UserError(error_line.removeprefix(ERROR_PREFIX))
    if exit_code != 0:
        raise UserError(f"{path}: axolotl train ended with exit code {exit_code}; see above")


def chooses_launcher(axolotl_options: tuple[str, ...]) -> bool:
    """Return whether the options name a launcher, or imply one: sweeps and Ray start processes."""
    names = ("--launcher", "--sweep", "--use-ray")
    return any(option.startswith(names) for option in axolotl_options)


def count_devices() -> int:
    """Count the GPUs that this process may use; a machine without one counts as one device."""
    import torch  # noqa: PLC0415  imports in seconds, which --help need not wait for

    return max(1, torch.cuda.device_count())


def launcher_options(devices: int) -> list[str]:
    """Return Axolotl's options for so many devices: torchrun, or no launcher at all for one."""
    if devices == 1:
        return ["--launcher", "python"]
    return ["--launcher", "torchrun", "--", "--nproc_per_node", str(devices)]


def run_until_error(command: list[str]) -> tuple[int, str | None]:
    """Run a command and pass its stderr on, but hold back what follows a line of error.

    Below our line a launcher prints tracebacks of its own, and with several processes each of them
    prints the line once more.

    Returns:
        The exit code, and the first line that begins with "error: ", or None where there is none
        or where the command ended well.
    """
    error_line = None
    held_back = []

    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        # newline="" ends a line at a carriage return too, with which progress bars are rewritten.
        for line in io.TextIOWrapper(process.stderr, errors="replace", newline=""):
            if error_line is None and line.startswith(ERROR_PREFIX):
                error_line = line.rstrip()
            if error_line is not None:
                held_back.append(line)
                continue
            sys.stderr.write(line)
            sys.stderr.flush()

    # Some library may print such a line and go on: then nothing was wrong.
    if process.returncode == 0:
        sys.stderr.writelines(held_back)
        return 0, None
    return process.returncode, error_line


if __name__ == "__main__":
    main()
