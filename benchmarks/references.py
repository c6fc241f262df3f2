"""Eigenvalues that every contestant is measured by: this project's in float64 with bounds of 1e-6.

They take longer than what they judge, so they are kept in references.json under a digest of the weights and the
samples, and computed again where that differs. `independent` compares them with ARPACK over another project's products.

    python -m benchmarks.references mlp lenet

computes them beforehand.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, measured
from benchmarks.peers import own_top, scipy_top
from benchmarks.timing import pin_threads

KEPT = Path(__file__).with_name("references.json")
RTOL = 1e-6


def digest(case: Case) -> str:
    """Tell cases apart by every bit that their Hessian depends on."""
    total = hashlib.sha256()
    for tensor in [*case.model.state_dict().values(), *(tensor for batch in case.batches for tensor in batch)]:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def in_float64(case: Case) -> Case:
    """Copy a case, weights and inputs rounded no further."""
    batches = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in case.batches]
    return Case(copy.deepcopy(case.model).double(), case.loss_fn, batches)


def reference(name: str, case: Case, k: int, *, kept: Path = KEPT) -> list[float]:
    """The k largest eigenvalues, computed if they are not kept.

    Raises:
        RuntimeError: if not all of them could be proven to 1e-6.
    """
    known = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{name}-{digest(case)}"
    if len(known.get(key, [])) < k:
        found = own_top(in_float64(case), k, hvp="double_backward", rtol=RTOL)
        if "stopped" in found.note:
            raise RuntimeError(f"the reference of {name} for k = {k} is not proven to {RTOL:g} ({found.note})")
        known = json.loads(kept.read_text()) if kept.exists() else {}
        known[key] = found.values
        kept.write_text(json.dumps(known, indent=0))
    values: list[float] = known[key][:k]
    return values


def independent(case: Case, k: int) -> list[float]:
    """The same by ARPACK to rounding, over curvlinops in float64: nothing in common but PyTorch."""
    return sorted(scipy_top(in_float64(case), k, ncv=4 * k, tol=1e-12).values, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--k", type=int, default=50)
    options = parser.parse_args()
    pin_threads()
    with sdpa_kernel(SDPBackend.MATH):
        for name in options.cases:
            values = reference(name, measured(name), options.k)
            print(f"{name}: {values[0]:.6g} to {values[-1]:.6g}, {digest(measured(name))}", flush=True)


if __name__ == "__main__":
    main()
