"""The errors that users see: one tree, every message says what is wrong, where, and what to do."""


class LoraDAError(Exception):
    """Base of every error this package raises on purpose."""


class OptionError(LoraDAError, ValueError):
    """An option is unknown, malformed or out of range; raised before any work starts."""


class UnknownNameError(OptionError, LookupError):
    """No component of that kind has that name."""


class TargetError(LoraDAError):
    """The targets match nothing, or match layers that cannot be initialised as asked."""


class DataError(LoraDAError):
    """The data set is empty, unreadable, or holds nothing to learn from."""


class ModelError(LoraDAError):
    """The model cannot be loaded, or its loss or gradients are not finite."""


class PluginError(LoraDAError):
    """A plugin raised, or broke its contract; names the plugin, its distribution and the layer."""


class ConvergenceError(LoraDAError):
    """A solver did not reach its tolerance and the configuration asks for an error."""


class AdapterError(LoraDAError):
    """PEFT does not hold what was computed: a missing key, a wrong value, a tensor left on meta."""


class StorageError(LoraDAError):
    """A file is missing, damaged, foreign, or cannot be written."""


class RankError(LoraDAError):
    """Another process of a distributed run failed, was killed, is late or disagrees; names its rank."""
