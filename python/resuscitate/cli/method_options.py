"""Options made from the fields of the registered methods and of the ways to re-estimate BatchNorm."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ResuscitateError
from ..methods.base import AUTO, Method, option_names, registered
from ..methods.batchnorm import RECALIBRATIONS
from .flags import Command, Options, opt, takes

_commands: list[tuple[Callable[..., Any], set[str]]] = []  # with the names of their other options


def takes_methods(command: Command) -> Command:
    """Give a command, whose last parameter is `**given`, an option for each field of each registered method."""
    _commands.append((command, set(inspect.signature(command).parameters)))
    return takes(_of_methods())(command)


def of_recalibrations() -> Options:
    """An option for each field of each recalibration, with the name of that before it: --ema-batches."""
    kinds = RECALIBRATIONS.items()
    return {f"{name}_{field.name}": _option(field, [kind]) for name, kind in kinds for field in fields(kind)}


def load_methods(words: list[str]) -> None:
    """Import each package.module:Class that a command line names as a method, so that its fields are options too.

    Raises ResuscitateError where the class is no registered method, or has a field named like another option.
    """
    for word, after in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option in ("--method", "--methods"):
            for name in (value if equals else after).split(","):
                method_name(name)
    asked = next((word for word in words if not word.startswith("-")), None)  # flags before the command have no value
    for command, others in _commands:
        if command.__name__ == asked and (taken := option_names() & others):
            raise ResuscitateError(f"rename the field {min(taken)!r}: `{command.__name__}` has an option of that name")
        takes(_of_methods())(command)


def method_name(given: str) -> str:
    """The name of a method, given by its name or as package.module:Class, which is imported.

    Raises ResuscitateError where the class cannot be imported, or is no registered method.
    """
    module, colon, attribute = given.partition(":")
    if not colon:
        return given
    try:
        found = getattr(import_users(module), attribute)
    except Exception as error:  # the user's own code, which may raise anything
        raise ResuscitateError(f"--method {given} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)) or registered().get(found.name) is not found:
        raise ResuscitateError(f"--method {given} is no registered method: decorate its class with @register")
    return found.name


def import_users(module: str) -> Any:
    """A module of the user, by its name or its file, such as nets.small or nets/small.py.

    The current folder is searched first, or that of the file. Raises FileNotFoundError for a file that is not there.
    """
    path = Path(module)
    if path.suffix == ".py" and not path.exists():
        raise FileNotFoundError(f"there is no file {module}")
    folder, name = (str(path.resolve().parent), path.stem) if path.suffix == ".py" else (os.getcwd(), module)
    if sys.path[0] != folder:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def method_options(options: Options) -> dict[str, Any]:
    """Of the options of a command, those of methods that were given."""
    return _given({name: value for name, value in options.items() if name in option_names()})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given, None for the word "none"."""
    return {name: None if value == "none" else value for name, value in values.items() if value is not None}


def recalibration(options: Options) -> Any:
    """What `repair` takes as `recalibrate`: by its name, with the options that were given for it.

    Raises typer.BadParameter for an option of another recalibration.
    """
    word = options["recalibrate"]
    chosen = None if word == "none" else word
    for name, kind in RECALIBRATIONS.items():
        given = _given({field.name: options[f"{name}_{field.name}"] for field in fields(kind)})
        if given and word not in (name, AUTO):
            raise typer.BadParameter(f"--{name}-{next(iter(given)).replace('_', '-')} is for --recalibrate {name}")
        if given or word == name:
            word, chosen = name, kind(**given)
    return chosen


def _of_methods() -> Options:
    """An option for each field of a method; methods that have a field of the same name share it."""
    found: dict[str, tuple[Any, list[type[Method]]]] = {}
    for method in registered().values():
        for field in fields(method):
            found.setdefault(field.name, (field, []))[1].append(method)
    return {name: _option(field, owners) for name, (field, owners) in found.items()}


def _option(field: Any, owners: list[Any]) -> Any:
    """The annotation of one option: a pair of flags for a truth value, else a number or a word."""
    presets = {owner.name: getattr(owner, field.name, field.default) for owner in owners}
    each = ", ".join(f"{value} for {name}" for name, value in presets.items())
    preset = field.default if len(set(presets.values())) == 1 else each
    text = f"Of {', '.join(presets)}: {_described(owners[0], field.name)}; default: {preset}."
    more: dict[str, Any] = {"show_default": False, "rich_help_panel": "Options of methods"}
    if isinstance(field.default, bool):
        return Annotated[bool | None, opt(text, **more)]
    return Annotated[Any, opt(text, parser=parse_value, metavar="VALUE", **more)]


def _described(owner: type, name: str) -> str:
    """The first sentence on a field in the docstring of its class, or of a class that this extends."""
    for kind in owner.__mro__:
        found = re.search(rf"(?:^|\s){name}: (.+?)(?:\.\s|\.$|;|$)", " ".join((kind.__doc__ or "").split()))
        if found:
            return found[1]
    return name.replace("_", " ")


def parse_value(text: str) -> Any:
    """A number, or a word; "none" stays a word, since None is an option that is not given."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text.lower() if text.lower() == "none" else text
