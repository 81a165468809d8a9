"""What the commands' options share: parameters from a dataclass's fields, components by name, lists of modules."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typer

from lora_da_core.config import NO_ALLOCATOR, ComponentChoice, Preset
from lora_da_core.errors import OptionError, StorageError

OptionsT = TypeVar("OptionsT")


class ExitCode(IntEnum):
    """How a command ended; Ctrl-C is what a shell makes of SIGINT."""

    DONE = 0
    FAILED = 1
    WRONG_USE = 2
    INTERRUPTED = 130


def one_of(*values: str) -> str:
    """How help shows an option that takes one of a few values, with spaces at which a narrow column breaks the line.

    >>> one_of("auto", "fixed")
    'auto | fixed'
    """
    return " | ".join(values)


DTYPES = one_of("auto", "float32", "bfloat16", "float16", "float64")


def path(value: object) -> Path:
    """The parser of every option that is a path, by which name some of typer's versions show it in help.

    Args:
        value: What was given: a text on the command line, any value in a file.

    Returns:
        The path.

    Raises:
        typer.BadParameter: It is empty, which would be taken for the working directory.
    """
    text = str(value)
    if not text:
        raise typer.BadParameter("the path is empty; '.' is the working directory")
    return Path(text)


def component_choice(options: object, kind: str, preset: Preset) -> ComponentChoice:
    """The component of a kind, with its options: what was given, on top of the preset's.

    Args:
        options: Options with a field of that name, such as `estimator`, and one for its options, `estimator_option`.
        kind: `estimator`, `gradient`, `solver` or `allocator`.
        preset: The preset that is named there.

    Returns:
        What `build_pipeline` takes.

    Raises:
        OptionError: An option is not KEY=VALUE, or options are given for an automatic choice or for none.
    """
    choice: ComponentChoice = getattr(preset, kind)
    default, standing = (choice, {}) if isinstance(choice, str) else choice
    name: str = default if getattr(options, kind) is None else getattr(options, kind)
    given = _pairs(f"--{kind}-option", getattr(options, f"{kind}_option") or ())
    merged = {**(standing if name == default else {}), **given}
    if name in ("auto", NO_ALLOCATOR) and merged:
        raise OptionError(f"--{kind}-option needs --{kind}: {name!r} takes no options.")
    return (name, merged) if merged else name


def module_names(text: str) -> str | list[str]:
    """A comma-separated list of module names as a list; anything else is a regex, or PEFT's `all-linear`.

    >>> module_names("q_proj, v_proj"), module_names("q_proj,"), module_names(r".*[qk]"), module_names("all-linear")
    (['q_proj', 'v_proj'], ['q_proj'], '.*[qk]', 'all-linear')
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text == "all-linear" or not names or not all(name.replace("_", "").replace(".", "").isalnum() for name in names):
        return text
    return names


def memory_limit(text: str | None) -> int | None:
    """What `--max-memory` says, in bytes.

    Args:
        text: A size such as `24GiB`; None where no limit is given.

    Raises:
        OptionError: It is no size; the message names the option.
    """
    from lora_da_core.memory.workload import parse_size

    try:
        return None if text is None else parse_size(text)
    except OptionError as error:
        raise OptionError(f"--max-memory: {error}") from error


@contextmanager
def places_checked() -> Iterator[None]:
    """Makes a place that cannot be written a fault of the option that names it, which is told before work.

    Raises:
        OptionError: The block raised a `StorageError`.
    """
    try:
        yield
    except StorageError as error:
        raise OptionError(str(error)) from error


def command_of(options: type[OptionsT], body: Callable[[OptionsT], None]) -> Callable[..., None]:
    """A function with one parameter per field of `options`, as typer wants it, that calls `body` with an instance.

    Args:
        options: A dataclass whose fields are annotated with typer's options.
        body: What the command does; its docstring is the command's help.

    Returns:
        The function, to be given to `app.command`.
    """

    def command(**values: Any) -> None:
        body(options(**values))

    hints = get_type_hints(options, include_extras=True)
    signature = inspect.signature(options)
    parameters = [entry.replace(annotation=hints[entry.name]) for entry in signature.parameters.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    command.__doc__ = body.__doc__
    return command


def parsed(options: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Options from a file's values, read as the command line reads them.

    Args:
        options: A dataclass as `command_of` takes it.
        values: By field name, as `file_defaults` gives them.

    Returns:
        An instance.

    Raises:
        OptionError: A value is not of its option's type, or one that must be given is not there.
    """
    made: list[OptionsT] = []
    program = typer.Typer(add_completion=False)
    program.command()(command_of(options, made.append))
    try:
        typer.main.get_command(program).main([], "settings", standalone_mode=False, default_map=dict(values))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own, whose class has moved between its versions
            raise
        raise OptionError(f"{error.format_message().rstrip('.')}.") from error
    return made[0]


def _pairs(option: str, texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"{option} {text!r} is not KEY=VALUE, e.g. output=full.")
        found[key.strip().replace("-", "_")] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    """Numbers, true, false and null as JSON reads them (any case for words), everything else as text."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "null") else text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or brackets without end
        return text
