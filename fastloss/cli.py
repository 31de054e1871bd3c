"""The command line: fastloss train | train-clip | tune | sample | bench | info, the same as `python -m fastloss`.

typer and everything of the training system are imported when a command runs, so that the losses alone need neither.
Help, version and completion come without torch: see `_is_the_command` in the package's `__init__.py`.
A mistake of the user ends with one line and exit code 2, an interrupted run with 130.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

EXTRA = 'pip install ".[train]" in its checkout, as its README has it'
HELP = "Fused losses for PyTorch: reference trainings, text to image and image-text, benchmarks, what is installed."


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    without_typer = {("info",): info, ("--version",): version}  # they say what is there, so they must not need it
    given = tuple(sys.argv[1:] if arguments is None else arguments)
    if given in without_typer:
        without_typer[given]()
        sys.exit(0)
    if given[:1] == ("bench",):
        _bench(list(given[1:]))
    try:
        app = make_app()
    except ImportError as error:
        _fail(f"{error.name or error} is missing; the command line needs it: {EXTRA}")
    app(arguments, prog_name="fastloss")


def make_app() -> Any:
    """The typer application with all its commands. Another command is one more `app.command` here."""
    import typer

    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)
    app.callback()(_version_option(typer))
    app.command("info")(info)
    app.command("train")(_with_run_options(train, typer, "imagen"))
    app.command("train-clip")(_with_run_options(train_clip, typer, "clip"))
    app.command("tune")(_with_run_options(tune, typer, "imagen"))
    app.command("sample")(_sample_command(typer))
    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    bench.__annotations__["context"] = typer.Context
    app.command("bench", context_settings=anything)(bench)
    return app


def _version_option(typer: Any) -> Callable[..., None]:
    def say(wanted: bool) -> None:
        if wanted:
            version()
            raise typer.Exit

    def options(version: bool = False) -> None:
        """The options before a command."""

    option = typer.Option("--version", help="the version of fastloss", callback=say, is_eager=True)
    options.__annotations__["version"] = _annotated(bool, option)
    options.__doc__ = HELP
    return options


def version() -> None:
    from ._version import __version__

    print(f"fastloss {__version__}")


def info() -> None:
    """Versions, devices, and which backends there are or why one is missing."""
    for line in info_lines():
        print(line)


def info_lines() -> list[str]:
    import platform

    import torch

    from . import __version__, core

    lines = [f"fastloss {__version__}", f"python {platform.python_version()}", f"torch {torch.__version__}"]
    lines += [f"{name} {_version(name)}" for name in ("triton", "torchvision")]
    lines.append(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        lines.append(
            f"cuda:{i}: {properties.name}, {memory:.0f} GiB, {core.gpus.name_of(properties)}, "
            f"{core.gpus.described(properties)}"
        )
    lines += [] if count else ["cuda: none visible to torch"]
    return lines + [f"backend {name}: {state}" for name, state in core.backend_report().items()]


def bench(context: Any) -> None:
    """Time the losses against eager, torch.compile and other libraries; `fastloss bench --help` lists the options."""
    _bench(context.args)


def _bench(arguments: list[str]) -> typing.NoReturn:
    """In a process of its own, whose memory allocator it sets; needs neither typer nor a checkout of the repository."""
    import subprocess

    package = Path(__file__).parent
    root = next((r for r in (package.parent, package / "_bench") if (r / "benchmarks" / "run.py").is_file()), None)
    if root is None:
        _fail("this installation has no benchmarks (setup.py copies them into a wheel): install fastloss again")
    code = f"import sys; sys.path[0] = {str(root)!r}; from benchmarks.run import command; command(sys.argv[1:])"
    sys.exit(subprocess.run([sys.executable, "-c", code, *arguments]).returncode)


def train(config: Any, explicit: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
    """Train the text-to-image system; writes pictures, curves, metrics, a report and a checkpoint to --out."""
    from .recipes.imagen.run import train as job

    line = job(config, explicit, resume, overwrite)
    if _rank() == 0:
        print(line)


def train_clip(config: Any, explicit: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
    """Train an image and a text encoder (CLIP, SigLIP); writes pictures, curves, metrics, a report and a checkpoint."""
    from .recipes.clip.run import train as job

    line = job(config, explicit, resume, overwrite)
    if _rank() == 0:
        print(line)


def tune(config: Any, explicit: dict[str, Any], trials: int = 20) -> None:
    """Search the fusion weights with short runs; a second call with the same --out goes on with the search."""
    from .recipes.imagen.tune import tune as job

    print(job(config, trials))


EXTRA_OPTIONS = {
    "resume": "continue the run in --out, with its options",
    "overwrite": "delete the run in --out, where there is one",
    "trials": "trials in all",
}
FLAGS = {"resume": ("--resume",), "overwrite": ("--overwrite",)}
ALIASES = {"learning_rate": ("--learning-rate", "--lr")}
OTHER_DEFAULTS: dict[str, dict[str, Any]] = {"tune": {"steps": 200, "out": "runs/tune"}}


def _with_run_options(command: Callable[..., None], typer: Any, recipe: str) -> Callable[..., None]:
    """`command` with an option for every field of the recipe's `Config`, and one for each parameter of its own."""
    config_file = importlib.import_module(f".recipes.{recipe}.config", __package__)
    Config, RUN = config_file.Config, config_file.RUN  # noqa: N806
    hints = {"str": str, "int": int, "float": float, "bool": bool}
    defaults = OTHER_DEFAULTS.get(command.__name__, {})
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    groups = list(dict.fromkeys([RUN, *(field.metadata["group"] for field in dataclasses.fields(Config))]))
    for field in sorted(dataclasses.fields(Config), key=lambda field: groups.index(field.metadata["group"])):
        option = typer.Option(
            *ALIASES.get(field.name, ()),
            help=field.metadata["help"],
            rich_help_panel=field.metadata["group"],
            autocompletion=_completion(field.metadata["choices"]),
        )
        note = _annotated(hints[str(field.type)], option)
        default = defaults.get(field.name, field.default)
        parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=note))
    own = [p for p in inspect.signature(command).parameters.values() if p.name in EXTRA_OPTIONS]
    for p in own:
        option = typer.Option(*FLAGS.get(p.name, ()), help=EXTRA_OPTIONS[p.name], rich_help_panel=RUN)
        note = _annotated(type(p.default), option)
        parameters.append(inspect.Parameter(p.name, keyword, default=p.default, annotation=note))

    def run(context: Any, **options: Any) -> None:
        with _one_line_errors([p.name for p in parameters]):
            extra = {p.name: options.pop(p.name) for p in own}
            given = {name: v for name, v in options.items() if _given(context, name)}
            command(_made_together(Config, options), given, **extra)

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _made_together(config: type, options: dict[str, Any]) -> Any:
    """The configuration; under torchrun a mistake in it is one error of all ranks."""
    if _ranks() == 1:
        return config(**options)
    from .recipes.training.world import World

    return World.join(options["device"]).together(lambda: config(**options))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete if choices else None


def _annotated(kind: Any, option: Any) -> Any:
    return Annotated[kind, option]


def _given(context: Any, name: str) -> bool:
    return context.get_parameter_source(name).name != "DEFAULT"


def _sample_command(typer: Any) -> Callable[..., None]:
    def sample(caption, checkpoint, out, count, seed, device, real):  # type: ignore[no-untyped-def]
        from .recipes.imagen.run import sample as job

        with _one_line_errors(options):
            print(job(Path(checkpoint), caption, Path(out), count, seed, device, real))

    options: dict[str, tuple[type, Any, list[str], str]] = {
        "caption": (list[str], [], ["--caption", "--captions"], "a caption; repeat the option for several"),
        "checkpoint": (str, "runs/digits", ["--checkpoint"], "run folder or checkpoint file"),
        "out": (str, "samples.png", ["--out"], "picture to write"),
        "count": (int, 6, ["--count"], "images per caption"),
        "seed": (int, 0, ["--seed"], "seed of the noise"),
        "device": (str, "auto", ["--device"], "auto, cpu, cuda, ..."),
        "real": (bool, False, ["--real"], "first a real image of each caption, where the run's data have one"),
    }
    sample.__doc__ = "Write images for captions with a trained model."
    sample.__annotations__ = {
        name: _annotated(kind, typer.Option(*names, help=text)) for name, (kind, _, names, text) in options.items()
    }
    sample.__defaults__ = tuple(default for _, default, _, _ in options.values())
    return sample


# What Python code calls otherwise than the command line.
OPTION_OF = {"pretrained": "backbone_weights", "folder": "data", "captions": "caption", "text encoder": "text_encoder"}
IN_WORDS = {"pretrained=PATH to": "--backbone-weights PATH of", "pretrained=False for": "--backbone-weights random for"}


def _in_options(message: str, options: Collection[str]) -> str:
    """An error as one of the command line: `learning_rate: expected ...` names the option --learning-rate."""
    head, colon, rest = message.partition(": ")
    name = OPTION_OF.get(head, head)
    if colon and name in options:
        message = f"--{name.replace('_', '-')}: {rest}"
    for words, own in IN_WORDS.items():
        message = message.replace(words, own)
    return message


@contextlib.contextmanager
def _one_line_errors(options: Collection[str]) -> Iterator[None]:
    from .recipes.training.interrupt import Interrupted

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        _end(f"interrupted: {error}" if str(error) else "interrupted", 130, error)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is missing: {EXTRA}", error)
    except (ImportError, ValueError, TypeError, OSError, FloatingPointError) as error:
        _fail(_in_options(str(error), options), error)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "backend" not in str(error) and "download" not in str(error):
            raise
        _fail(_in_options(str(error), options), error)
    if _ranks() > 1:
        from .recipes.training.world import leave

        leave()


def _fail(message: str, error: BaseException | None = None) -> typing.NoReturn:
    _end("error: " + " ".join(message.split()), 2, error)


def _end(line: str, code: int, error: BaseException | None) -> typing.NoReturn:
    """Under torchrun rank 0 says what all ranks fail of, and another what it fails of alone."""
    if error is None or _ranks() == 1:
        print(line, file=sys.stderr)
        sys.exit(code)
    from .recipes.training.world import is_said, leave

    if is_said(error):
        print(line if _rank() == 0 else f"rank {_rank()}: {line}", file=sys.stderr, flush=True)
    leave(error)
    sys.exit(code)


def _version(name: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
