"""Finds plugins through entry points, keeps the broken ones' reasons, and turns names into components."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pluggy

from lora_da_core import hookspecs
from lora_da_core.config import ComponentChoice, Preset
from lora_da_core.errors import OptionError, PluginError, UnknownNameError
from lora_da_core.interfaces import (
    API_VERSION,
    FisherEstimator,
    GradientEstimator,
    Objective,
    RankAllocator,
    Regularizer,
    Solver,
    TrainerPlugin,
)

HOOK_OF_KIND: dict[str, tuple[str, type]] = {
    "estimator": ("lora_da_fisher_estimators", FisherEstimator),
    "gradient": ("lora_da_gradient_estimators", GradientEstimator),
    "solver": ("lora_da_solvers", Solver),
    "objective": ("lora_da_objectives", Objective),
    "allocator": ("lora_da_rank_allocators", RankAllocator),
    "regularizer": ("lora_da_regularizers", Regularizer),
    "trainer": ("lora_da_trainer_plugins", TrainerPlugin),
    "preset": ("lora_da_presets", Preset),
}
"""Kinds of component: the hook that offers them and the type each must have."""


@dataclass(frozen=True)
class PluginRecord:
    """One line of `lora-da plugins`.

    Attributes:
        kind: Kind of component, or `plugin` for one that could not be loaded.
        name: What the kind's option takes.
        distribution: The distribution that offers it.
        version: That distribution's version.
        status: `ok`, `failed`, `blocked` or `clash`.
        reason: Why it cannot be used; empty where it can.
    """

    kind: str
    name: str
    distribution: str
    version: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class _Offer:
    record: PluginRecord
    component: Any


class Registry:
    """The components of all installed plugins, and what is wrong with the others."""

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._strict = os.environ.get("LORA_DA_STRICT_PLUGINS", "") == "1"
        self._blocked = {name.strip() for name in os.environ.get("LORA_DA_BLOCK", "").split(",") if name.strip()}
        self._broken: list[PluginRecord] = []
        self._origin: dict[str, tuple[str, str]] = {}
        found = entry_points(group=hookspecs.PROJECT) if points is None else points
        unique = {(_distribution(point), point.name, point.value): point for point in found}
        for key in sorted(unique):
            self._load(unique[key])
        self._offers = [offer for kind in HOOK_OF_KIND for offer in self._collect(kind)]

    def _load(self, point: EntryPoint) -> None:
        distribution = _distribution(point)
        version = point.dist.version if point.dist else ""
        plugin_name = f"{distribution}:{point.name}"
        if {point.name, plugin_name} & self._blocked:
            record = PluginRecord("plugin", point.name, distribution, version, "blocked", "listed in LORA_DA_BLOCK")
            self._broken.append(record)
            return
        try:
            self._manager.register(point.load(), name=plugin_name)
            self._manager.check_pending()
        except (Exception, SystemExit) as error:
            if self._manager.has_plugin(plugin_name):
                self._manager.unregister(name=plugin_name)
            if self._strict:
                raise PluginError(f"plugin {plugin_name} could not be loaded: {_describe(error)}") from error
            record = PluginRecord("plugin", point.name, distribution, version, "failed", _describe(error))
            self._broken.append(record)
        else:
            self._origin[plugin_name] = (distribution, version)

    def _collect(self, kind: str) -> list[_Offer]:
        hook_name, expected = HOOK_OF_KIND[kind]
        offers: list[_Offer] = []
        for implementation in getattr(self._manager.hook, hook_name).get_hookimpls():
            distribution, version = self._origin[implementation.plugin_name]
            try:
                components = list(implementation.function())
            except (Exception, SystemExit) as error:
                self._refuse(kind, implementation.plugin_name.split(":", 1)[1], distribution, version, _describe(error))
                continue
            for component in components:
                fault = _fault(component, expected)
                name = str(getattr(component, "name", component))
                if not fault and any((o.record.distribution, o.record.name) == (distribution, name) for o in offers):
                    fault = f"{distribution} offers another {kind} of this name already"
                if fault:
                    self._refuse(kind, name, distribution, version, fault)
                else:
                    offers.append(_Offer(PluginRecord(kind, name, distribution, version, "ok"), component))
        return [_mark_clash(offer, offers) for offer in offers]

    def _refuse(self, kind: str, name: str, distribution: str, version: str, reason: str) -> None:
        if self._strict:
            raise PluginError(f"{kind} {name!r} of {distribution} {version} cannot be used: {reason}")
        self._broken.append(PluginRecord(kind, name, distribution, version, "failed", reason))

    def records(self) -> list[PluginRecord]:
        """Every component and every broken plugin, sorted by kind and name."""
        records = [offer.record for offer in self._offers] + self._broken
        return sorted(records, key=lambda record: (record.kind, record.name, record.distribution))

    def names(self, kind: str) -> dict[str, Any]:
        """The components of a kind by the name that reaches them; clashing ones as `distribution:name`."""
        return {_reachable_name(offer): offer.component for offer in self._offers if offer.record.kind == kind}

    def origin(self, kind: str, component: Any) -> str:
        """`distribution version` of a component, for error messages."""
        for offer in self._offers:
            if offer.record.kind == kind and offer.component is component:
                return f"{offer.record.distribution} {offer.record.version}"
        return "unknown distribution"

    def resolve(self, kind: str, name: str) -> Any:
        """The component of that kind and name.

        Args:
            kind: A key of `HOOK_OF_KIND`.
            name: A name, or `distribution:name`.

        Returns:
            The class (or the preset).

        Raises:
            UnknownNameError: No such component, or several distributions claim the name.
            OptionError: The name is no text.
        """
        if not isinstance(name, str):
            raise OptionError(f"{kind} is {name!r}; give a name.")
        for offer in self._offers:
            qualified = f"{offer.record.distribution}:{offer.record.name}"
            if offer.record.kind == kind and name in (_reachable_name(offer), qualified):
                return offer.component
        raise UnknownNameError(self._unknown(kind, name))

    def _unknown(self, kind: str, name: str) -> str:
        claims = [o.record for o in self._offers if (o.record.kind, o.record.name) == (kind, name)]
        if claims:
            choices = " or ".join(f"'{record.distribution}:{record.name}'" for record in claims)
            return f"{kind} {name!r} is claimed by {len(claims)} distributions. Say which: {choices}."
        available = sorted([*self.names(kind), *(["auto"] if kind == "solver" else [])])
        close = difflib.get_close_matches(name, available, n=1)
        message = f"unknown {kind} {name!r}."
        message += f" Did you mean {close[0]!r}?" if close else ""
        message += f" Available: {', '.join(available) or 'none'}."
        if self._broken:
            count = "1 plugin" if len(self._broken) == 1 else f"{len(self._broken)} plugins"
            listed = "; ".join(f"{r.distribution}:{r.name} {r.version} — {r.reason}" for r in self._broken)
            message += f" {count} could not be loaded: {listed}. Run 'lora-da plugins'."
        return message

    def create(self, kind: str, choice: ComponentChoice) -> Any:
        """An instance of a component.

        Args:
            kind: A key of `HOOK_OF_KIND` other than `preset`.
            choice: A name, or (name, options).

        Returns:
            `cls(options)`.

        Raises:
            OptionError: An option is unknown or out of range.
            PluginError: The component raised otherwise, or does not keep its options.
        """
        name, given = (choice, {}) if isinstance(choice, str) else _name_and_options(kind, choice)
        cls = self.resolve(kind, name)
        known = [entry.name for entry in fields(cls.Options)]
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise OptionError(
                    f"{kind} {name!r} has no option {key!r}.{hint} Options: {', '.join(known) or 'none'}."
                )
        for key, value in given.items():
            wanted = _plain_types(cls.Options, key)
            if wanted and not _is_of(value, wanted):
                listed = " or ".join("None" if one is NoneType else one.__name__ for one in wanted)
                raise OptionError(f"{kind} {name!r}: {key} is {value!r}; it must be of type {listed}.")
        named = f"{kind} {name!r} ({self.origin(kind, cls)})"
        try:
            options = cls.Options(**given)
        except (ValueError, TypeError) as error:
            raise OptionError(f"{kind} {name!r}: {_sentence(error)}") from error
        except (Exception, SystemExit) as error:
            raise PluginError(f"{named} raised when its options were made: {_describe(error)}") from error
        try:
            component = cls(options)
        except (OptionError, PluginError):
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{named} raised when it was made: {_describe(error)}") from error
        if getattr(component, "options", None) != options:
            raise PluginError(f"{named} does not keep its options; its __init__ must call super().__init__(options)")
        return component

    def choose_solver(self, size: int, rank: int, device_type: str, failed: Collection[str] = ()) -> str:
        """The solver's name that `solver="auto"` takes for a layer, from the `lora_da_choose_solver` hook.

        Args:
            size: Order of Ω.
            rank: Eigenpairs wanted.
            device_type: `torch.device.type` of Ω.
            failed: Solvers that did not converge on this Ω; they are not available.

        Returns:
            A name that `resolve` knows.

        Raises:
            OptionError: No plugin has an opinion.
            PluginError: A plugin raised, or chose what is not there.
        """
        available = {name: solver for name, solver in self.names("solver").items() if name not in failed}
        arguments: dict[str, Any] = {"size": size, "rank": rank, "device_type": device_type, "available": available}
        for implementation in reversed(self._manager.hook.lora_da_choose_solver.get_hookimpls()):
            wanted = [arguments[name] for name in implementation.argnames]
            try:
                name = implementation.function(*wanted)
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"lora_da_choose_solver of {implementation.plugin_name}: {_describe(error)}"
                ) from error
            if name is not None and str(name) not in available:
                raise PluginError(
                    f"lora_da_choose_solver of {implementation.plugin_name} chose {name!r}, which is not available. "
                    f"Available: {', '.join(sorted(available))}."
                )
            if name is not None:
                return str(name)
        raise OptionError(f"no plugin chooses a solver for size {size}; name one: {', '.join(sorted(available))}.")

    def layer_finished(self, layer: str, report: Any) -> list[str]:
        """Tells the observers; what they raised comes back as sentences, to be logged.

        Args:
            layer: The layer's name.
            report: Its `LayerReport`.

        Returns:
            One sentence per observer that raised.
        """
        faults = []
        for implementation in self._manager.hook.lora_da_layer_finished.get_hookimpls():
            values = {"layer": layer, "report": report}
            try:
                implementation.function(*[values[name] for name in implementation.argnames])
            except (Exception, SystemExit) as error:
                faults.append(f"lora_da_layer_finished of {implementation.plugin_name}: {_describe(error)}")
        return faults


def list_plugins() -> list[dict[str, str]]:
    """Every installed component and every broken plugin.

    Returns:
        One mapping each, with `kind`, `name`, `distribution`, `version`, `status` and `reason`.
    """
    return [asdict(record) for record in Registry().records()]


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _sentence(error: BaseException) -> str:
    """What a plugin says of its options, with the full stop that every message of ours has."""
    text = str(error).strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _fault(component: Any, expected: type) -> str:
    """What keeps a component from being used; empty where nothing does."""
    if expected is Preset:
        if not isinstance(component, Preset):
            return f"{component!r} is not a Preset"
    elif not (isinstance(component, type) and issubclass(component, expected)):
        return f"{component!r} is not a subclass of {expected.__name__}"
    if isabstract(component):
        return f"methods are missing: {', '.join(sorted(getattr(component, '__abstractmethods__', ())))}"
    version = getattr(component, "api_version", None)
    if version != API_VERSION:
        return f"written for plugin API version {version}; this lora-da-core has version {API_VERSION}"
    name = getattr(component, "name", None)
    if not isinstance(name, str) or not name or ":" in name:
        return f"its name is {name!r}; it must be a non-empty string without ':'"
    if expected is Preset:
        return ""
    options = getattr(component, "Options", None)
    if not (isinstance(options, type) and is_dataclass(options) and options.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        return "its Options is not a frozen dataclass"
    return ""


def _mark_clash(offer: _Offer, offers: list[_Offer]) -> _Offer:
    rivals = {o.record.distribution for o in offers if o.record.name == offer.record.name and o is not offer}
    if not rivals:
        return offer
    record = offer.record
    reason = f"also claimed by {', '.join(sorted(rivals))}; use '{record.distribution}:{record.name}'"
    clash = PluginRecord(record.kind, record.name, record.distribution, record.version, "clash", reason)
    return _Offer(clash, offer.component)


def _reachable_name(offer: _Offer) -> str:
    record = offer.record
    return f"{record.distribution}:{record.name}" if record.status == "clash" else record.name


def _plain_types(options: type[Any], key: str) -> tuple[type, ...]:
    """The types an option may have, where its annotation is made of plain ones; empty otherwise."""
    try:
        hint = get_type_hints(options)[key]
    except (NameError, AttributeError):  # an annotation that only a type checker can resolve
        return ()
    members = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    return members if all(member in (bool, int, float, str, NoneType) for member in members) else ()


def _is_of(value: Any, wanted: tuple[type, ...]) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return int in wanted or float in wanted
    return type(value) in wanted


def _name_and_options(kind: str, choice: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(choice, (tuple, list)) and len(choice) == 2:
        name, options = choice
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, options
    raise OptionError(f"{kind} is {choice!r}; give a name, or (name, {{option: value}}).")
