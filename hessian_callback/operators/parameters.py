"""Choice of the parameters that a Hessian is taken in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

__all__ = [
    "ParameterFilter",
    "chosen_sizes",
    "common_type",
    "compile_pattern",
    "matching",
    "select_parameters",
]

ParameterFilter = str | Callable[[str, nn.Parameter], bool]

# Real counterpart of each dtype of parameters that a Hessian can be taken in.
_REAL = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def compile_pattern(option: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Args:
        option: the option that the expression was given in, for the message.
        pattern: the expression.

    Raises:
        ValueError: if the expression is not valid.

    Example:
        >>> compile_pattern("parameters", "(weight")
        Traceback (most recent call last):
        ...
        ValueError: parameters='(weight' is not a valid regular expression: missing ), unterminated ...
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}={pattern!r} is not a valid regular expression: {error}") from error


def matching(option: str, pattern: str, names: Sequence[str]) -> list[str]:
    r"""Return the names in which a regular expression is found (``re.search``).

    Raises:
        ValueError: if the expression is not valid.

    Example:
        >>> matching("parameters", r"\.weight$", ["0.weight", "0.bias"])
        ['0.weight']
    """
    compiled = compile_pattern(option, pattern)
    return [name for name in names if compiled.search(name)]


def select_parameters(model: nn.Module, parameters: ParameterFilter | None = None) -> dict[str, nn.Parameter]:
    r"""Return the trainable parameters that a filter chooses, by name, each tensor once.

    Args:
        model: the module.
        parameters: a regular expression (``re.search``), ``(name, parameter) -> bool``, or ``None`` for all.

    Raises:
        ValueError: if no parameter is chosen, or the expression is not valid.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), r"^1\."))
        ['1.weight', '1.bias']
    """
    wanted: Callable[[str, nn.Parameter], bool]
    if isinstance(parameters, str):
        every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        matched = set(matching("parameters", parameters, every))

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return name in matched

    else:
        wanted = parameters if parameters is not None else lambda name, parameter: True
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    # A tied parameter has several names. A filter may choose it by any of them.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and id(parameter) not in seen and wanted(name, parameter):
            seen.add(id(parameter))
            chosen[name] = parameter
    if not chosen:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not names:
            raise ValueError("the model has no parameter that requires grad, so no Hessian; unfreeze some")
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"parameters={parameters!r} chooses no trainable parameter; there are: {shown}")
    return chosen


def chosen_sizes(model: nn.Module, parameters: ParameterFilter | None = None) -> tuple[int, int]:
    """Count the entries of the parameters that a filter chooses: of those that are trained, and of all.

    A complex entry counts as two.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> _ = model.weight.requires_grad_(False)
        >>> chosen_sizes(model), chosen_sizes(model, "weight")
        ((1, 4), (0, 3))
    """
    named = list(model.named_parameters(remove_duplicate=False))
    if isinstance(parameters, str):
        matched = set(matching("parameters", parameters, [name for name, _ in named]))
        chosen = [parameter for name, parameter in named if name in matched]
    else:
        chosen = [parameter for name, parameter in named if parameters is None or parameters(name, parameter)]
    sizes = {id(parameter): parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in chosen}
    trained = {id(parameter) for parameter in chosen if parameter.requires_grad}
    return sum(sizes[number] for number in trained), sum(sizes.values())


def common_type(parameters: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    """Return the real dtype and the device that all chosen parameters share.

    A complex parameter counts as its real and imaginary parts, so complex64 goes with float32.

    Raises:
        ValueError: if they lie on several devices, or are not all of single or all of double precision.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> common_type(dict(layer.named_parameters()))
        (torch.float32, device(type='cpu'))
        >>> common_type({"weight": layer.weight, "scale": nn.Parameter(torch.ones(1).double())})
        Traceback (most recent call last):
        ...
        ValueError: the chosen parameters have dtypes float32 (weight), float64 (scale); ...
    """
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"the chosen parameters lie on several devices ({', '.join(sorted(map(str, devices)))}); "
            "choose those of one device with parameters="
        )
    names: dict[torch.dtype, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(parameter.dtype, []).append(name)
    common = {_REAL.get(dtype) for dtype in names}
    (dtype, *others) = common
    if dtype is not None and not others:
        return dtype, devices.pop()
    counts = {dtype: sum(parameters[name].numel() for name in some) for dtype, some in names.items()}
    usable = {_REAL[dtype]: 0 for dtype in names if dtype in _REAL}
    for dtype in names:
        if dtype in _REAL:
            usable[_REAL[dtype]] += counts[dtype]
    found = ", ".join(f"{str(dtype).removeprefix('torch.')} ({_shown(some)})" for dtype, some in names.items())
    remedy = "Pass a copy of the model, copy.deepcopy(model).float()"
    if usable:
        most = max(usable, key=lambda dtype: usable[dtype])
        left_out = [name for dtype, some in names.items() if _REAL.get(dtype) != most for name in some]
        remedy = f"Leave some out with parameters={_all_but(left_out)!r}, or p{remedy[1:]}"
    raise ValueError(
        f"the chosen parameters have dtypes {found}; the Hessian needs all of them in single or all in double "
        f"precision. {remedy}"
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _all_but(names: Sequence[str]) -> str:
    """Write a regular expression that finds every name but these."""
    return f"^(?!(?:{'|'.join(re.escape(name) for name in names)})$)"
