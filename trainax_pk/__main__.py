"""The command line: `python -m trainax_pk` or `trainax-pk`."""

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import yaml

import trainax_pk.experiment as experiment
from trainax_pk._extras import load
from trainax_pk.checkpoint import RunChanged

_DONE, _DIFFERENT, _REFUSED, _INTERRUPTED = 0, 1, 2, 130
# Best trials of a sweep that are printed; the file has all.
_SHOWN = 10
_EPILOG = """exit codes: 0 done; 1 a reproduction that differs; 2 a command, file or folder
that cannot be used: nothing computed, or not saved; 130 and 143 interrupted, and
saved."""


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
    """Parts that do not fit each other, or a folder that cannot be used."""


def _run(options: argparse.Namespace) -> int:
    run = _read(options)
    return _do_run(run, _folder(options.run_dir, "runs", options.file))


def _folder(given: str | None, above: str, file: Path) -> str | Path:
    # No Path of what is given: an empty text would be the working directory.
    return Path(above) / file.stem if given is None else given


def _do_run(run: experiment.Run, folder: str | Path) -> int:
    progress = sys.stderr.isatty()
    try:
        _, history, artifact = experiment.train(run, folder, progress=progress)
    except (ValueError, OSError) as error:
        raise _Refused(str(error)) from error
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
    _say(json.dumps(experiment.json_schema(options.of), indent=1))
    return _DONE


def _sweep(options: argparse.Namespace) -> int:
    spec = experiment.read_sweep(options.file, options.fields)
    _set_precision(spec.run)
    folder = _folder(options.sweep_dir, "sweeps", options.file)
    return _do_sweep(spec, folder, options.num_devices)


def _do_sweep(
    spec: experiment.HyperSweep, folder: str | Path, num_devices: int | None = None
) -> int:
    progress = sys.stderr.isatty()
    try:
        ranked = experiment.sweep(
            spec, folder, num_devices=num_devices, progress=progress
        )
    except (ValueError, OSError) as error:
        raise _Refused(str(error)) from error
    for place, trial in enumerate(ranked[:_SHOWN], 1):
        fields = ", ".join(f"{name}={value}" for name, value in trial.fields.items())
        _say(f"{place}. {trial.value:.6g}  {trial.status}  {fields}")
    counts = Counter(trial.status for trial in ranked)
    _say(", ".join(f"{n} {status}" for status, n in counts.items()))
    _say(str(Path(folder) / experiment.RANKING))
    return _DONE


def _resume(options: argparse.Namespace) -> int:
    folder = options.run_dir
    if (folder / experiment.SWEEP).is_file():
        spec = experiment.read_sweep(folder / experiment.SWEEP)
        _set_precision(spec.run)
        return _do_sweep(spec, folder, options.num_devices)
    if options.num_devices is not None:
        raise _Refused(
            f"--num-devices: expected the folder of a sweep, got {folder}, which holds "
            "none. Leave it out."
        )
    run = experiment.read_run(folder / experiment.RUN)
    _set_precision(run)
    return _do_run(run, folder)


def _report(options: argparse.Namespace) -> int:
    recorded = experiment.read_artifact(options.run_dir)
    _set_precision(experiment.read_run(yaml.safe_dump(recorded["run"])))
    try:
        page = experiment.report(options.run_dir)
    except ValueError as error:
        raise _Refused(str(error)) from error
    _say(str(page))
    return _DONE


def _bench(options: argparse.Namespace) -> int:
    run = _read(options)
    try:
        found = experiment.compare_adjoints(run)
    except ValueError as error:
        raise _Refused(f"{options.file}: {error}") from error
    if found is None:
        raise _Refused(
            f"{options.file}: expected a configuration or a model with an adjoint, got "
            "none. Choose for example `configuration: supervised`."
        )
    _say(str(found))
    return _DONE


def _demo(options: argparse.Namespace) -> int:
    load("matplotlib", "plot")
    # Not imported above: it draws pictures, and every other command does without.
    small = ["--small"] if options.small else []
    output = ["--output", str(options.output)]
    importlib.import_module("trainax_pk.demo.__main__").main([*output, *small])
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
    run.add_argument("--run-dir", help="by default runs/NAME OF THE FILE")
    validate = add("validate", _validate, "Check a file; compute nothing.")
    show = add("show", _show, "Print a file with every field written out.")
    sweep = add("sweep", _sweep, "Train the trials that a file describes, rank them.")
    sweep.add_argument("--sweep-dir", help="by default sweeps/FILE'S NAME")
    bench = add("bench", _bench, "Measure parts of a run.")
    bench.add_argument("what", choices=["adjoints"], help="gradients under adjoints")
    for one in (run, validate, show, sweep, bench):
        one.add_argument("file", type=Path, metavar="file.yaml")
        one.add_argument("fields", nargs="*", metavar="field=value")
    resume = add("resume", _resume, "Go on with a run or a sweep, from its folder.")
    for one in (sweep, resume):
        one.add_argument(
            "--num-devices",
            type=int,
            metavar="N",
            help="a sweep on so many at most; by default all",
        )
    report = add("report", _report, "Write a page about a run; needs the extra `plot`.")
    for one in (resume, report):
        one.add_argument("run_dir", type=Path)
    again = add("reproduce", _reproduce, "Train again what an artifact says, compare.")
    again.add_argument("artifact", type=Path)
    again.add_argument("fields", nargs="*", metavar="field=value")
    for one in (run, validate, show, sweep, bench, resume, report, again):
        one.add_argument(
            "--module",
            action="append",
            metavar="NAME",
            help="a Python module that registers kinds; files alone run no code",
        )
    schema = add("schema", _schema, "Print the JSON schema of a file, for editors.")
    schema.add_argument("of", nargs="?", choices=["run", "sweep"], default="run")
    demo = add("demo", _demo, "Train two emulators and draw what they learned.")
    demo.add_argument("--output", type=Path, default=Path("demo_output"))
    demo.add_argument("--small", action="store_true", help="a few updates only")
    return parser


def _say(text: str, to: object = None) -> None:
    (to or sys.stdout).write(text + "\n")


def command() -> None:
    """What `trainax-pk` runs."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # What could be saved is: a traceback would say the contrary.
        _say("interrupted", sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    command()
