"""The command line: `python -m trainax_pk` or `trainax-pk`."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import yaml

import trainax_pk.experiment as experiment
from trainax_pk.checkpoint import RunChanged

_DONE, _DIFFERENT, _REFUSED = 0, 1, 2
_EPILOG = """exit codes: 0 done; 1 a reproduction that differs; 2 a command, file or folder
that cannot be used, nothing computed; 130 and 143 interrupted, and saved."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those of the process, by default.

    Returns:
        The exit code.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from trainax_pk.__main__ import main
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "run.yaml"
        ...     _ = file.write_text("model: mpl")
        ...     main(["validate", str(file)])
        2
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Fields may stand on either side of options.
    if unknown := [r for r in rest if "=" not in r or r.startswith("-")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if rest:
        options.fields = [*options.fields, *rest]
    try:
        for module in getattr(options, "module", None) or ():
            importlib.import_module(module)
        return options.command(options)
    except experiment.RunFileError as error:
        for problem in error.problems:
            _say(problem, sys.stderr)
    except (_Refused, ImportError, RunChanged, TimeoutError) as error:
        _say(str(error), sys.stderr)
    return _REFUSED


class _Refused(Exception):
    """Parts that do not fit each other."""


def _run(options: argparse.Namespace) -> int:
    run = _read(options)
    folder = options.run_dir or Path("runs") / options.file.stem
    try:
        built = experiment.build(run, progress=sys.stderr.isatty())
    except ValueError as error:
        raise _Refused(f"{options.file}: {error}") from error
    _, history, artifact = experiment.train(built, folder)
    _say(f"{int(history.state.step)} updates; {history.program}")
    for name, value in artifact["results"].items():
        _say(f"{name}: {value:.6g}")
    _say(str(Path(folder) / experiment.ARTIFACT))
    return _DONE


def _validate(options: argparse.Namespace) -> int:
    _read(options)
    _say(f"{options.file}: fine")
    return _DONE


def _show(options: argparse.Namespace) -> int:
    run = _read(options)
    _say(yaml.safe_dump(run.to_data(), sort_keys=False, width=88).rstrip())
    return _DONE


def _schema(options: argparse.Namespace) -> int:
    del options
    _say(json.dumps(experiment.json_schema(), indent=1))
    return _DONE


def _reproduce(options: argparse.Namespace) -> int:
    recorded = experiment.read_artifact(options.artifact)
    text = yaml.safe_dump(recorded["run"])
    run = experiment.read_run(text, options.fields, name=str(options.artifact))
    _set_precision(run)
    found = experiment.reproduce(options.artifact, run)
    for name, (old, new) in found.differences.items():
        _say(f"{name}: recorded {old}, now {new}")
    _say("identical" if found.is_identical else "different")
    return _DONE if found.is_identical else _DIFFERENT


def _read(options: argparse.Namespace) -> experiment.Run:
    run = experiment.read_run(options.file, options.fields)
    _set_precision(run)
    return run


def _set_precision(run: experiment.Run) -> None:
    jax.config.update("jax_enable_x64", run.precision == "float64")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainax-pk", description="Train from a file.", epilog=_EPILOG
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, epilog=_EPILOG)
        one.set_defaults(command=command)
        return one

    run = add("run", _run, "Train what a file describes; go on where it was cut off.")
    run.add_argument("--run-dir", type=Path, help="by default runs/NAME OF THE FILE")
    validate = add("validate", _validate, "Check a file; compute nothing.")
    show = add("show", _show, "Print a file with every field written out.")
    for one in (run, validate, show):
        one.add_argument("file", type=Path, metavar="run.yaml")
        one.add_argument("fields", nargs="*", metavar="field=value")
        one.add_argument(
            "--module",
            action="append",
            metavar="NAME",
            help="a Python module that registers kinds; files alone run no code",
        )
    again = add("reproduce", _reproduce, "Train again what an artifact says, compare.")
    again.add_argument("artifact", type=Path)
    again.add_argument("fields", nargs="*", metavar="field=value")
    again.add_argument("--module", action="append", metavar="NAME")
    add("schema", _schema, "Print the JSON schema of run files, for editors.")
    return parser


def _say(text: str, to: object = None) -> None:
    (to or sys.stdout).write(text + "\n")


def command() -> None:
    """What `trainax-pk` runs."""
    sys.exit(main())


if __name__ == "__main__":
    command()
