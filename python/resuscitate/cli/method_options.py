"""Options of the commands that are made from the fields of the registered methods and recalibrations."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import typer

from ..errors import ResuscitateError
from ..methods.base import Method, option_names, registered
from ..methods.batchnorm import RECALIBRATIONS
from .flags import opt

Command = TypeVar("Command", bound=Callable[..., Any])
# with the names of their other options, and whether they recalibrate
_commands: list[tuple[Callable[..., Any], set[str], bool]] = []


def with_method_options(recalibrates: bool) -> Callable[[Command], Command]:
    """Give a command, whose last parameter is `**chosen`, an option for each field of each method.

    recalibrates: also one for each field of each recalibration, with the name of that before it: --ema-batches.
    """

    def decorate(command: Command) -> Command:
        _commands.append((command, set(inspect.signature(command).parameters), recalibrates))
        _extend(command, recalibrates)
        return command

    return decorate


def load_methods(words: list[str]) -> None:
    """Import what `--method package.module:Class` names, so that its fields are options too.

    Raises ResuscitateError where that is no method, or has a field named like another option of the command.
    """
    for name in _named(words):
        module, _, attribute = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the user's own code, which may raise anything
            raise ResuscitateError(f"--method {name} cannot be loaded: {type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Method)) or registered().get(found.name) is not found:
            raise ResuscitateError(f"--method {name} is no registered method: decorate its class with @register")
    for command, others, recalibrates in _commands:
        if command.__name__ in words and (taken := option_names() & others):
            raise ResuscitateError(f"rename the field {min(taken)!r}: `{command.__name__}` has an option of that name")
        _extend(command, recalibrates)


def method_name(given: str) -> str:
    """The name of a method, given by name or as package.module:Class."""
    module, colon, attribute = given.partition(":")
    return getattr(sys.modules[module], attribute).name if colon and module in sys.modules else given


def method_options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Of all options of this kind, those of methods that were given."""
    return _given({name: value for name, value in chosen.items() if name in option_names()})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given, None for the word "none"."""
    return {name: None if value == "none" else value for name, value in values.items() if value is not None}


def recalibration(word: str, chosen: Mapping[str, Any]) -> Any:
    """What `repair` takes as `recalibrate`: by its name, with the options that were given for it.

    Raises typer.BadParameter for an option of another recalibration.
    """
    given = {
        name: _given({field.name: chosen.get(f"{name}_{field.name}") for field in fields(kind)})
        for name, kind in RECALIBRATIONS.items()
    }
    for name, options in given.items():
        if options and word not in (name, "auto"):
            raise typer.BadParameter(f"--{name}-{next(iter(options)).replace('_', '-')} is for --recalibrate {name}")
    chosen_by_option = next((name for name, options in given.items() if options), word)
    if chosen_by_option in RECALIBRATIONS:
        return RECALIBRATIONS[chosen_by_option](**given[chosen_by_option])
    return None if word == "none" else word


def _named(words: list[str]) -> list[str]:
    """The classes in modules that --method, or --methods of `map`, names on a command line."""
    found = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in ("--method", "--methods"):
            found += (value if equals else after).split(",")
    return [name for name in found if ":" in name]


def _extend(command: Callable[..., Any], recalibrates: bool) -> None:
    """Write the options into the signature of the command, which Typer reads when the command line runs."""
    own = inspect.signature(inspect.unwrap(command), eval_str=True) if not hasattr(command, "__signature__") else None
    signature: inspect.Signature = own or command.__signature__  # type: ignore[attr-defined]
    kept = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    known = {each.name for each in kept}
    options = {field.name: _option(field, owners) for field, owners in _method_fields()}
    for name, kind in RECALIBRATIONS.items() if recalibrates else ():
        options |= {f"{name}_{field.name}": _option(field, [kind]) for field in fields(kind)}
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
        if name not in known
    ]
    positional = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in kept]
    command.__signature__ = signature.replace(parameters=positional + new)  # type: ignore[attr-defined]


def _method_fields() -> list[tuple[Any, list[type]]]:
    """Each field of a method, once by name, and the methods that have it."""
    found: dict[str, tuple[Any, list[type]]] = {}
    for method in registered().values():
        for field in fields(method):
            found.setdefault(field.name, (field, []))[1].append(method)
    return list(found.values())


def _option(field: Any, owners: list[Any]) -> Any:
    """The annotation of one option: a pair of flags for a truth value, else a number or a word."""
    of = ", ".join(owner.name for owner in owners)
    text = f"Of {of}: {_described(owners[0], field.name)}; default: {field.default}."
    if isinstance(field.default, bool):
        return Annotated[bool | None, opt(text, show_default=False)]
    return Annotated[Any, opt(text, parser=parse_value, metavar="VALUE", show_default=False)]


def _described(owner: type, name: str) -> str:
    """The first sentence that the docstring of the class, or of a class that it extends, has about a field."""
    for kind in owner.__mro__:
        found = re.search(rf"(?:^|\s){name}: (.+?)(?:\.\s|\.$|;|$)", " ".join((kind.__doc__ or "").split()))
        if found:
            return found[1]
    return name.replace("_", " ")


def parse_value(text: Any) -> Any:
    """A number, or a word; "none" stays a word, since None is an option that is not given."""
    if not isinstance(text, str):
        return text
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text.lower() if text.lower() == "none" else text
