"""Products and eigenvalues on a GPU: what they cost, whose the seconds are, and what others need for the same.

    python -m benchmarks.gpu products:lenet --output FOLDER
    python -m benchmarks.gpu --output FOLDER
    python -m benchmarks.gpu --device cpu --quick --output FOLDER

The first command runs one part in this process. The second runs all of them, each in a process with a time limit of its
own, and continues after one that fails. The third shows without a GPU that everything runs, in one process. Every
result is one line of JSON, printed and appended to FOLDER/gpu.jsonl as soon as it is known. What a process of a part
writes to stderr is in FOLDER/PART.log.

Images, labels and tokens are random: what a product costs does not depend on them, and no data set need be there.
Models are trained on them for some steps, so that their spectra are not those of chance.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases, peers
from benchmarks.cases import GPT, Case, Residual, cross_entropy, next_token
from benchmarks.limited_processes import run_limited
from benchmarks.paper_scale import Clock
from benchmarks.timing import circumstances, in_turns
from hessian_callback import HessianOperator, measure, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.krylov_basis import row_products
from hessian_callback.operators.cuda_graphs import waits_counted

MEMORY = 30 * 10**9
# All graphs of the last block of GPT-2.
MEMORY_OF_LAST_BLOCK = 45 * 10**9
# Beside a basis of 75 vectors of 0.5 GB each.
MEMORY_BESIDE_BASIS = 20 * 10**9

# Seconds that each part may take, in the order in which they run.
LIMITS: dict[str, float] = {
    "basis": 30,
    "tf32": 60,
    "products:lenet": 60,
    "top50:lenet": 60,
    "products:resnet18": 90,
    "top50:resnet18": 120,
    "products:gpt2_256": 120,
    "products:gpt2_1024": 120,
    "measure:gpt2_last_block": 300,
    "full:gpt2": 240,
    "compiled:lenet": 90,
}
# What a process returns whose failure is written already.
REPORTED = 3


@dataclass
class Bench:
    """What every part needs: where to compute, how small, and where results go."""

    part: str
    device: torch.device
    quick: bool
    output: Path
    began: float = field(default_factory=time.perf_counter)

    @property
    def k(self) -> int:
        return 3 if self.quick else 50

    def write(self, **fields: Any) -> None:
        """Print a line, and append it to the file."""
        seconds = round(time.perf_counter() - self.began, 1)
        line = json.dumps({"part": self.part, **fields, "after_seconds": seconds}, default=str)
        print(line, flush=True)
        with (self.output / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def wait(self) -> None:
        """Wait for what was queued on the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def settle(self) -> int:
        """Give unused memory back, begin a new peak, and return the bytes in use."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self, before: int) -> int | None:
        """The most bytes in use since `settle`, beside those that were in use then."""
        return torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else None

    def waiting(self, function: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
        """The function, called so many times and waited for."""

        def call() -> None:
            for _ in range(calls):
                function()
            self.wait()

        return call

    def direction(self, case: Case, seed: int = 0) -> Tensor:
        """A random vector, the same on every device."""
        return torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(seed)).to(self.device)


def reason(error: BaseException) -> str:
    """An error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def median_seconds(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds of a call that nothing takes turns with."""
    return statistics.median(in_turns({"": call}, 1 if bench.quick else 5, seconds_a_turn=0.0)[""])


def distance(found: Tensor, truth: Tensor) -> float:
    """The norm of a difference relative to the truth's, in float64."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())


# What is measured on.


def images(size: int, num_samples: int, batch_size: int, channels: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Random images in the place of digits."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(num_samples, channels, size, size, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    return list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))


def tokens(length: int, vocabulary: int, num_sequences: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Random sequences, each token with the one that follows it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (num_sequences, length + 1), generator=generator)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(batch_size)]


def lenet(quick: bool) -> Case:
    with mock.patch.object(cases, "digits", images):
        model = cases.lenet().model
    count = 16 if quick else 1024
    return Case(model, cross_entropy, images(28, count, count))


def resnet18_model(first_width: int = 64, stages: int = 4, blocks: int = 2) -> nn.Module:
    """ResNet-18 as for CIFAR: a stem of 3x3 without pooling, then four stages of two basic blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, first_width, 3, 1, 1, bias=False), nn.BatchNorm2d(first_width), nn.ReLU()]
    before = first_width
    for stage in range(stages):
        width = first_width * 2**stage
        for number in range(blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            block = Residual(before, width, stride)
            if stride > 1:
                block.shortcut = nn.Sequential(block.shortcut, nn.BatchNorm2d(width))
            layers.append(block)
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def resnet18(quick: bool) -> Case:
    count, size = (8, 8) if quick else (256, 32)
    model = resnet18_model(2, stages=2, blocks=1) if quick else resnet18_model()
    return Case(model, cross_entropy, images(size, count, count, channels=3))


def gpt2_model(length: int, quick: bool = False) -> nn.Module:
    """GPT-2 small's shape: 124 million parameters, with a tied head."""
    if quick:
        return GPT(depth=1 if length < 8 else 2, width=24, heads=2, block=length, vocabulary=64)
    return GPT(depth=12, width=768, heads=12, block=length, vocabulary=50257)


def gpt2(length: int, num_sequences: int, batch_size: int, quick: bool) -> Case:
    if quick:
        length, num_sequences, batch_size = length // 128, 4, 2  # 2 or 8
    vocabulary = 64 if quick else 50257
    return Case(gpt2_model(length, quick), next_token, tokens(length, vocabulary, num_sequences, batch_size))


# Each with the steps and the rate of its training.
CASES: dict[str, tuple[Callable[[bool], Case], int, float]] = {
    "lenet": (lenet, 60, 1e-3),
    "resnet18": (resnet18, 30, 1e-3),
    "gpt2_256": (lambda quick: gpt2(256, 16, 4, quick), 20, 3e-4),
    "gpt2_1024": (lambda quick: gpt2(1024, 4, 1, quick), 20, 3e-4),
    "gpt2_256_sequences": (lambda quick: gpt2(256, 256, 8, quick), 20, 3e-4),
    "gpt2_8_sequences": (lambda quick: gpt2(256, 8, 4, quick), 20, 3e-4),
}


def case_of(bench: Bench, name: str) -> Case:
    """A case on the device, trained for some steps, in eval mode."""
    torch.manual_seed(0)
    build, steps, rate = CASES[name]
    made = build(bench.quick)
    batches = [tuple(part.to(bench.device) for part in batch) for batch in made.batches]
    case = Case(made.model.to(bench.device), made.loss_fn, batches)
    optimizer = torch.optim.Adam(case.model.parameters(), lr=rate)
    case.model.train()
    for step in range(3 if bench.quick else steps):
        optimizer.zero_grad()
        case.loss_fn(case.model, batches[step % len(batches)]).backward()
        optimizer.step()
    case.model.eval().zero_grad()
    bench.write(case=name, parameters=case.num_parameters, batches=len(batches), inputs=list(batches[0][0].shape))
    return case


# Products.


@dataclass
class Contestant:
    """A way to multiply, how to end it, and what there is to say about it."""

    multiply: peers.Product
    close: Callable[[], None] = lambda: None
    details: Callable[[], dict[str, Any]] = dict


Build = Callable[[Case], Contestant]


def own(case: Case, hvp: str, *, memory: int = MEMORY, cuda_graphs: bool = True) -> Contestant:
    """This project's operator, after one product: what it makes at its first product exists then."""
    with contextlib.ExitStack() as stack:
        if not cuda_graphs:
            stack.enter_context(mock.patch("hessian_callback.operators.products.recorded", return_value=None))
        operator = HessianOperator(case.model, case.loss_fn, case.batches, hvp=hvp, memory_budget=memory)
        operator.matvec(torch.ones(case.num_parameters, device=operator.device))
    return Contestant(operator.matvec, operator.close, partial(about, operator))


def compiled(case: Case, backend: str) -> Contestant:
    """The traced product, compiled."""
    contestant = own(case, "linearize", cuda_graphs=False)
    operator: Any = contestant.multiply.__self__  # type: ignore[attr-defined]
    # Batches of one shape share a trace.
    for traced in {id(traced): traced for traced, _ in operator._engine._traced}.values():
        traced._tangent = torch.compile(traced._tangent, backend=backend)
    return contestant


def about(operator: HessianOperator) -> dict[str, Any]:
    """What an operator tells about itself, and whether its products are recorded."""
    return {
        "engine": operator.engine,
        "engine_reason": operator.engine_reason,
        "num_cached_graphs": operator.num_cached_graphs,
        "bytes_per_graph": operator.bytes_per_graph,
        "batches_evaluated": len(operator.batches),
        "num_halvings": operator.num_halvings,
        "cuda_graph": getattr(operator._engine, "_recorded", None) is not None,
    }


GRADIENT: dict[str, Build] = {"gradient": lambda case: Contestant(peers.gradient(case))}
REFERENCE = "double backward, graphs kept"
KEPT: dict[str, Build] = {REFERENCE: lambda case: own(case, "double_backward")}
TRACED: dict[str, Build] = {"linearize, no CUDA graphs": lambda case: own(case, "linearize", cuda_graphs=False)}
OWN: dict[str, Build] = {
    **KEPT,
    "double backward, rebuilt": lambda case: own(case, "double_backward", memory=0),
    **TRACED,
}
PEERS: dict[str, Build] = {
    "hessian-eigenthings": lambda case: Contestant(peers.eigenthings(case)),
    "curvlinops": lambda case: Contestant(peers.curvlinops(case)),
}
# A recording that fails may leave the GPU unusable for this process, so nothing follows it.
RECORDED: dict[str, Build] = {"linearize, CUDA graphs": lambda case: own(case, "linearize")}


def products(bench: Bench, case: Case, contestants: dict[str, Build], *, together: bool) -> None:
    """Time a product by each contestant.

    Args:
        bench: where.
        case: what.
        contestants: how each is made; the first of ours is what the others are compared with.
        together: keep all contestants, and let them take turns at the end. Otherwise each is released before the next
            one is made.
    """
    vector, reference = bench.direction(case), None
    seconds: dict[str, float] = {}
    ready: dict[str, Contestant] = {}
    # The settings that ours has by itself: TF32 would let convolutions of others be faster and wrong.
    with full_float32(), sdpa_kernel(SDPBackend.MATH):
        for name, build in contestants.items():
            before, began = bench.settle(), time.perf_counter()
            contestant = product = None
            try:
                contestant = build(case)
                product = contestant.multiply(vector)
                bench.wait()
                preparing = time.perf_counter() - began
                call = bench.waiting(partial(contestant.multiply, vector))
                seconds[name] = median_seconds(bench, call)
                if name == REFERENCE:
                    reference = product
                bench.write(
                    contestant=name,
                    milliseconds_alone=round(1e3 * seconds[name], 4),
                    seconds_preparing=round(preparing, 3),
                    peak_bytes=bench.peak(before),
                    difference=None if reference is None or name in GRADIENT else distance(product, reference),
                    **contestant.details(),
                )
                if together:
                    ready[name] = contestant
                else:
                    contestant.close()
            except Exception as error:  # One that fails is a finding, and the others continue.
                bench.write(contestant=name, failed=reason(error), peak_bytes=bench.peak(before))
                if contestant is not None:
                    contestant.close()
            # What a contestant keeps must be gone before the next one is made.
            contestant = product = call = None  # type: ignore[assignment]
        bench.settle()
        if ready:
            calls = {name: bench.waiting(partial(one.multiply, vector)) for name, one in ready.items()}
            rounds, turn = (2, 0.0) if bench.quick else (7, 0.05)
            found = in_turns(calls, rounds, seconds_a_turn=turn)
            seconds = {name: statistics.median(values) for name, values in found.items()}
            calls.clear()
    others = GRADIENT.keys() | PEERS.keys()
    ours = [value for name, value in seconds.items() if name not in others]
    bench.write(
        timed="in turns" if together else "one after another",
        milliseconds={name: round(1e3 * value, 4) for name, value in seconds.items()},
        ratio_to_fastest_of_ours={name: round(value / min(ours), 3) for name, value in seconds.items()} if ours else {},
    )
    for one in ready.values():
        one.close()


def all_products(bench: Bench, name: str, together: bool) -> None:
    products(bench, case_of(bench, name), {**GRADIENT, **OWN, **PEERS, **RECORDED}, together=together)


def compiled_products(bench: Bench) -> None:
    # A small run without a GPU need not wait for a C++ compiler.
    backend = "eager" if bench.quick and bench.device.type == "cpu" else "inductor"
    last: dict[str, Build] = {"linearize, compiled": partial(compiled, backend=backend)}
    products(bench, case_of(bench, "lenet"), {**GRADIENT, **KEPT, **TRACED, **last}, together=True)


# Eigenvalues.


@dataclass(kw_only=True)
class SynchronisedClock(Clock):
    """A clock that waits for what was queued before it looks."""

    wait: Callable[[], None]

    def lap(self) -> float:
        self.wait()
        return super().lap()


@dataclass
class Progress:
    """Writes a line every few seconds, so that a run that is ended by its limit has told how far it came."""

    bench: Bench
    clock: Clock
    every: float = 10.0
    last: float = field(default_factory=time.perf_counter)

    def __call__(self, state: LanczosProgress) -> None:
        self.clock.reported()
        if time.perf_counter() > self.last + self.every:
            self.last = time.perf_counter()
            self.bench.write(progress={"products": state.num_matvecs, "converged": state.num_converged, "k": state.k})


def spectrum(bench: Bench, case: Case, *, count_waits: bool = False, solver: Any = None, **options: Any) -> Any:
    """Compute the largest eigenvalues, and tell the seconds by what they were spent on."""
    before, began = bench.settle(), time.perf_counter()
    clock = SynchronisedClock(wait=bench.wait)
    with HessianOperator(case.model, case.loss_fn, case.batches, **options) as operator:
        bench.wait()
        preparing = time.perf_counter() - began
        with mock.patch.object(operator, "matvec_slice", operator.matvec_slice):
            clock.watch(operator)
            peers.expect(operator, bench.k)
            clock.start()
            found = top_eigenvalues(operator, bench.k, progress=Progress(bench, clock), **(solver or {}))
            clock.checks += clock.lap()
        seconds = time.perf_counter() - began
        details, peak = about(operator), bench.peak(before)
        waits = waits_of(operator, bench) if count_waits else {}
    solving = seconds - preparing
    return {
        "k": bench.k,
        "seconds": round(seconds, 3),
        "seconds_preparing": round(preparing, 3),
        "products": found.num_matvecs,
        "stopped": found.stopped,
        "converged": found.num_converged,
        **details,
        "share_in_products": round(clock.products / solving, 3),
        "share_in_orthogonalisation": round(clock.orthogonalisation / solving, 3),
        "share_in_checks": round(clock.checks / solving, 3),
        "peak_bytes": peak,
        "largest": float(found.eigenvalues[0]),
        "smallest": float(found.eigenvalues[-1]),
        "largest_error_bound": float(found.error_bounds.max()),
        "asymmetry": found.symmetry_defect,
        **waits,
    }


def waits_of(operator: HessianOperator, bench: Bench) -> dict[str, Any]:
    """How often the host waits for the GPU in a product, and in a step of the solver."""
    if bench.device.type != "cuda":
        return {}
    vector = torch.ones(operator.num_parameters, device=operator.device)
    operator.matvec(vector)
    with waits_counted() as in_product:
        operator.matvec(vector)
    with waits_counted() as in_solve:
        found = top_eigenvalues(operator, 10)
    return {
        "waits_in_a_product": len(in_product),
        "waits_in_a_step": round(len(in_solve) / found.num_matvecs, 2),
    }


def top50(bench: Bench, name: str) -> None:
    """Each engine twice, because the first run makes what libraries keep."""
    case = case_of(bench, name)
    runs = 1 if bench.quick else 2
    for hvp in ("double_backward", "auto", "linearize"):
        for run in range(1, runs + 1):
            last = run == runs and name == "lenet"
            try:
                bench.write(hvp=hvp, run=run, **spectrum(bench, case, hvp=hvp, count_waits=last))
            except Exception as error:
                bench.write(hvp=hvp, run=run, failed=reason(error))
                break
    for call in range(1, runs + 1) if name == "lenet" else ():
        began = time.perf_counter()
        found = measure(case.model, case.loss_fn, case.batches, num_eigenvalues=bench.k)
        bench.wait()
        seconds = round(time.perf_counter() - began, 3)
        bench.write(whole_measurement=call, seconds=seconds, slope=found.slope, num_fitted=found.num_fitted)


def last_block(bench: Bench) -> None:
    """The last block of GPT-2: 7 million parameters, and every token of 256 sequences."""
    case = case_of(bench, "gpt2_256_sequences")
    name = r"^blocks\.0\." if bench.quick else r"^blocks\.11\."
    budget = MEMORY_OF_LAST_BLOCK
    found = spectrum(bench, case, hvp="double_backward", parameters=name, memory_budget=budget)
    bench.write(**found, memory_budget=budget)


def full(bench: Bench) -> None:
    """All parameters of GPT-2, with a basis that is restarted before it fills the memory."""
    case = case_of(bench, "gpt2_8_sequences")
    size, budget = 20 if bench.quick else 75, MEMORY_BESIDE_BASIS
    found = spectrum(
        bench, case, hvp="double_backward", memory_budget=budget, solver={"max_basis_size": size, "seed": 0}
    )
    basis = 4 * size * case.num_parameters
    bench.write(**found, memory_budget=budget, max_basis_size=size, basis_bytes=basis, budget_and_basis=budget + basis)


# Precision.


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow products of matrices to round their factors to ten bits, or forbid it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a sum: the ten leading bits of each entry, which TF32 holds, and the rest."""
    high = (matrix.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, matrix - high


def three_products(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The product of two matrices from their halves, without that of the two rests; small terms first."""
    result = one[1] @ other[0]
    result += one[0] @ other[1]
    result += one[0] @ other[0]
    return result


def split_and_multiply(left: Tensor, right: Tensor) -> Tensor:
    """The same, from the matrices themselves."""
    return three_products(halves(left), halves(right))


def matrix_products(bench: Bench) -> None:
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "mlp": ((4096, 768), (768, 3072)),
        "head": ((4096, 768), (768, 50257)),
        "attention": ((48, 256, 64), (48, 64, 256)),
    }
    if bench.quick:
        shapes = {name: (tuple(min(n, 64) for n in a), tuple(min(n, 64) for n in b)) for name, (a, b) in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    for name, (left, right) in shapes.items():
        a, b = (torch.randn(shape, generator=generator).to(bench.device) for shape in (left, right))
        split = halves(a), halves(b)
        tasks: dict[str, tuple[bool, Callable[[], Tensor]]] = {
            "float32": (False, partial(torch.matmul, a, b)),
            "tf32": (True, partial(torch.matmul, a, b)),
            "three_tf32": (True, partial(split_and_multiply, a, b)),
            "three_tf32_split_before": (True, partial(three_products, *split)),
        }
        truth = a.double() @ b.double()
        errors = {}
        for task, (allowed, function) in tasks.items():
            with tf32(allowed):
                errors[task] = distance(function(), truth)
        del truth

        def under(allowed: bool, call: Callable[[], None]) -> None:
            with tf32(allowed):
                call()

        calls = {task: partial(under, allowed, bench.waiting(run, 10)) for task, (allowed, run) in tasks.items()}
        seconds = in_turns(calls, 2 if bench.quick else 7, seconds_a_turn=0.0)
        bench.write(
            matrices=name,
            shapes=[list(left), list(right)],
            milliseconds={task: round(1e2 * statistics.median(values), 4) for task, values in seconds.items()},
            relative_errors=errors,
        )


def tf32_part(bench: Bench) -> None:
    """Products of matrices, and a Hessian-vector product, in float32 and in TF32."""
    matrix_products(bench)
    bench.settle()
    case = case_of(bench, "gpt2_256")
    vector = bench.direction(case)
    truth: Tensor | None = None
    full_product: Tensor | None = None
    for allowed in (False, True):
        with contextlib.ExitStack() as stack:
            stack.enter_context(tf32(allowed))
            if allowed:
                # Otherwise the package computes in full float32 whatever the settings are.
                name = "hessian_callback.operators.derivatives.full_float32"
                stack.enter_context(mock.patch(name, contextlib.nullcontext))
            options: dict[str, Any] = {"hvp": "double_backward", "memory_budget": MEMORY}
            operator = stack.enter_context(HessianOperator(case.model, case.loss_fn, case.batches, **options))
            product = operator.matvec(vector)
            call = bench.waiting(partial(operator.matvec, vector))
            seconds = median_seconds(bench, call)
            if not allowed:
                full_product = product
                precise = operator.precise_products(vector[:, None])
                truth = None if precise is None else precise[:, 0]
            assert full_product is not None
            bench.write(
                hessian_product="TF32" if allowed else "float32",
                milliseconds=round(1e3 * seconds, 4),
                error_against_float64=None if truth is None else distance(product, truth),
                difference_from_float32=distance(product, full_product),
                num_cached_graphs=operator.num_cached_graphs,
            )
            del product, call, operator
        bench.settle()


# The basis.


def basis_operations(bench: Bench) -> None:
    """Bytes of the basis read a second, in billions, by what orthogonalisation is made of."""
    length = 10**4 if bench.quick else 10**7
    for num_rows in (1, 32, 128):
        rows, vector = torch.randn(num_rows, length, device=bench.device), torch.randn(length, device=bench.device)
        weights = torch.full((num_rows,), 1e-3, device=bench.device)
        tasks: dict[str, Callable[[], Tensor]] = {
            "row_products": partial(row_products, rows, vector),
            "addmv": partial(vector.addmv_, rows.t(), weights, alpha=-1),
        }
        if num_rows == 1:
            tasks["dot"] = partial(torch.dot, rows[0], vector)
        calls = 10
        waited = {name: bench.waiting(task, calls) for name, task in tasks.items()}
        seconds = in_turns(waited, 2 if bench.quick else 7, seconds_a_turn=0.0)
        speeds = {
            name: round(4e-9 * num_rows * length * calls / statistics.median(values), 2)
            for name, values in seconds.items()
        }
        bench.write(length=length, num_rows=num_rows, gigabytes_a_second=speeds)


PARTS: dict[str, Callable[[Bench], None]] = {
    "basis": basis_operations,
    "tf32": tf32_part,
    "products:lenet": partial(all_products, name="lenet", together=True),
    "top50:lenet": partial(top50, name="lenet"),
    "products:resnet18": partial(all_products, name="resnet18", together=True),
    "top50:resnet18": partial(top50, name="resnet18"),
    "products:gpt2_256": partial(all_products, name="gpt2_256", together=False),
    "products:gpt2_1024": partial(all_products, name="gpt2_1024", together=False),
    "measure:gpt2_last_block": last_block,
    "full:gpt2": full,
    "compiled:lenet": compiled_products,
}


def run_here(bench: Bench) -> int:
    """Run a part in this process; return the exit status."""
    on_gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if on_gpu else "cpu"
    bench.write(device=name, quick=bench.quick, when=circumstances(torch.get_num_threads()))
    try:
        PARTS[bench.part](bench)
    except Exception as error:
        bench.write(failed=reason(error))
        sys.excepthook(*sys.exc_info())
        return REPORTED
    bench.write(finished=True, peak_bytes_reserved=torch.cuda.max_memory_reserved(bench.device) if on_gpu else None)
    return 0


def run_apart(bench: Bench, limit: float) -> None:
    """Run a part in a process of its own, and end it with all its children at the limit."""
    command = [sys.executable, "-m", "benchmarks.gpu", bench.part]
    command += ["--device", str(bench.device), "--output", str(bench.output), *(["--quick"] if bench.quick else [])]
    log = bench.output / f"{bench.part.replace(':', '_')}.log"
    root = Path(__file__).parents[1]
    with log.open("w", encoding="utf-8") as stderr:
        status = run_limited(command, limit, cwd=root, stderr=stderr)
    if status is None:
        bench.write(failed=f"ended by its limit of {limit:g} seconds")
    elif status not in (0, REPORTED):
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        bench.write(failed=f"ended with status {status}: {' '.join(last)}"[:300])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder of gpu.jsonl; default: gpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="all parts together, if they are several")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    make = partial(Bench, device=torch.device(options.device), quick=options.quick, output=output)
    if len(options.parts) == 1:
        return run_here(make(options.parts[0]))
    end = time.perf_counter() + options.seconds
    for part in options.parts or PARTS:
        bench, left = make(part), end - time.perf_counter()
        if left < 5:
            bench.write(failed="not begun: no time left")
        elif options.quick and options.device == "cpu":
            run_here(bench)  # The imports would take longer than the parts.
        else:
            run_apart(bench, min(LIMITS[part], left))
    return 0


if __name__ == "__main__":
    sys.exit(main())
