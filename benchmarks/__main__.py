"""This project beside others: products, eigenvalues at equal error, two ranks, growth.

    python -m benchmarks --output benchmarks/RESULTS.md

prints every table, and writes the report after each of them. With ``--only`` the other tables of an existing report
stay, so that a report can be made in several runs. Everything runs on one thread a process; contestants take turns
within a process, and ratios are formed round by round. A cell of the eigenvalue tables gets a share of ``--minutes``
and makes as many rounds as fit, one at least. With the defaults most large cells make one round. Three
rounds of every cell (``--rounds 3 --minutes 400``) take about two hours. The extra ``benchmarks`` is needed and,
installed without their dependencies, curvlinops-for-pytorch, backpack-for-pytorch and hessian-eigenthings.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks import paper_scale, product_table, ranks_table, scaling_table, top_table
from benchmarks.cases import trained
from benchmarks.report_sections import with_sections, write_sections
from benchmarks.timing import circumstances, pin_threads

CASES = ("mlp", "lenet", "resnet", "gpt")
# The share of the time that each cell of the table of eigenvalues gets. Others are run on request.
SHARES: dict[tuple[str, int], float] = {
    ("mlp", 10): 0.01,
    ("lenet", 10): 0.03,
    ("resnet", 10): 0.03,
    ("gpt", 10): 0.05,
    ("mlp", 50): 0.02,
    ("lenet", 50): 0.07,
    ("resnet", 50): 0.15,
    ("gpt", 50): 0.22,
    ("mlp", 200): 0.04,
    ("lenet", 200): 0.1,
}
PARTS = ("products", "top10", "top50", "top200", "ranks", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="tables to make; the others stay")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "tiny"], default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="rounds at the most")
    parser.add_argument("--minutes", type=float, default=25, help="what the whole may take, about")
    parser.add_argument("--all-k", action="store_true", help="k = 200 on the large cases, too")
    parser.add_argument("--quick", action="store_true", help="the tiny case and two rounds: whether it runs")
    parser.add_argument("--paper-scale", action="store_true", help="add the last saved run of benchmarks.paper_scale")
    parser.add_argument("--output", type=Path, help="write the report there")
    options = parser.parse_args()
    if options.quick:
        options.cases, options.rounds = ["tiny"], 2
    pin_threads()
    kept = HEAD
    if options.only and options.output is not None and options.output.exists():
        kept = with_sections(options.output.read_text(encoding="utf-8"), [HEAD])
    write_sections(options.output, kept, sections(options))


def sections(options: argparse.Namespace) -> Iterator[str]:
    """Make the tables, one after another."""
    names = options.cases
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pt" for name in names}
        for name, file in files.items():
            trained(name, weights=file)
        parts: dict[str, Callable[[], str]] = {
            "products": lambda: product_table.report(names, files, options.rounds),
            **{f"top{k}": partial(_top, k, names, files, options) for k in (10, 50, 200)},
            "ranks": lambda: _ranks(names, files, options),
            "scaling": lambda: scaling_table.report(min(3, options.rounds), options.quick),
        }
        for part in options.only or PARTS:
            began = time.perf_counter()
            print(f"{part} ...", flush=True)
            made = parts[part]()
            minutes = (time.perf_counter() - began) / 60
            section = f"## {TITLES[part]}\n\n{circumstances(1)} The table took {minutes:.0f} minutes.\n\n{made}"
            print(section, flush=True)
            yield section
    if options.paper_scale:
        yield f"## LeNet on MNIST images, a thousand eigenvalues\n\n{paper_scale.last_saved()}"


TITLES = {
    "products": "Hessian-vector products",
    "top10": "The 10 largest eigenvalues",
    "top50": "The 50 largest eigenvalues",
    "top200": "The 200 largest eigenvalues",
    "ranks": "Two ranks",
    "scaling": "Growth",
}

HEAD = """# Beside others

Written by `python -m benchmarks`. Contestants take turns round by round on the same weights and samples; a ratio is
formed in each round, and median and range over the rounds are shown. The largest error is that of the k values in the
order of their size, relative to this project in float64 with proven bounds of 1e-6. Who is off by more than 1 % is
wrong, and not compared on time. Everyone works in float32; times include all that is built or traced, except what only
the first trace of a process takes (imports, which Lightning makes anyway, and caches; one to two seconds). *Times the
limit*: in units of the fewest products after which Lanczos could stop if it knew the truth, each as fast as our fastest
exact one; the two factors follow each table.

*By hand*: the settings that need the fewest products for 0.8 %, found beforehand by `benchmarks.settings`, which a user
could not know: the number of Lanczos steps for hessian-eigenthings, which then reorthogonalises each, and scipy's `ncv`
and `tol`. This project is told k and nothing else. curvlinops has no eigenvalue solver of its own. PyHessian is left
out: files of its package state another licence than its metadata. Attention is computed by PyTorch's math kernel, the
only one with second derivatives."""


def _top(k: int, names: list[str], files: dict[str, Path], options: argparse.Namespace) -> str:
    cells = [(name, k) for name in names]
    wanted = [cell for cell in cells if cell in SHARES or options.all_k or cell[0] == "tiny"]
    if k >= 200:  # the tiny network has few that are not zero
        wanted = [cell for cell in wanted if cell[0] != "tiny"]
    seconds = {cell: 60 * options.minutes * SHARES.get(cell, 0.2) for cell in wanted}
    results = top_table.measure_all(wanted, files, options.rounds, seconds)
    return top_table.report(results, [cell for cell in cells if cell not in wanted])


def _ranks(names: list[str], files: dict[str, Path], options: argparse.Namespace) -> str:
    chosen = [name for name in names if name in ("lenet", "gpt", "tiny")]
    k = 10 if options.quick else 50
    return ranks_table.report(chosen, files, k, options.rounds, {"lenet": 3, "gpt": 1, "tiny": 2})


if __name__ == "__main__":
    main()
