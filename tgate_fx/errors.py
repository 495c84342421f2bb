"""The errors of tgate_fx: each says what was given, what was expected and what to do."""


class TGateError(Exception):
    """Base of every error that tgate_fx raises."""


class ArgumentError(TGateError, ValueError):
    """An argument has the wrong type or value, or does not exist."""


class UnsupportedError(TGateError, ValueError):
    """The pipeline, the denoiser or an input of it is one that tgate_fx cannot gate exactly."""


class StateError(TGateError, RuntimeError):
    """The call does not fit what was done to the pipeline before, or the pipeline was changed since."""


class CompileError(TGateError, RuntimeError):
    """torch could not trace or compile a phase as one graph."""


def check_count(name: str, value: object, *, least: int, unit: str = "steps") -> None:
    """Raise `ArgumentError` unless ``value`` is an int ≥ ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(
            f"{name}={value!r} ({type(value).__name__}) is not a number of {unit}: expected an int ≥ {least}."
        )
