"""One run of the suite: its results so far, the file that holds them, what is still to be measured, and the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from twotower.command import say

from . import ceilings, compare, machine, model, report, results, suite
from .cases import Case
from .peers import Peer
from .roofline import Dimensions, Machine

MODEL_SHARE = 0.3  # of the time


@dataclass(frozen=True)
class Plan:
    """What a run measures, and how long it may take."""

    backend: str
    shapes: dict[str, Dimensions]
    dtypes: list[torch.dtype]
    cases: list[Case]
    peers: list[Peer]
    model_dtypes: list[torch.dtype]  # of whole models; empty: none are run
    threads: int
    minutes: float
    effort: suite.Effort

    @property
    def all_dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys((*self.dtypes, *self.model_dtypes)))

    @property
    def quick(self) -> bool:
        return self.effort == suite.QUICK

    def settings(self, isa: str | None) -> dict[str, Any]:
        """As results hold them."""
        return {
            "backend": self.backend,
            "shape": " ".join(self.shapes),
            "threads": self.threads,
            "isa": isa,
            "quick": self.quick,
            "dimensions": {name: asdict(dimensions) for name, dimensions in self.shapes.items()},
        }


class Session:
    """`data` is what the file at `path` holds, or will after the next case.

    A file of this machine, build and setting is gone on with; any other is kept under another name and begun anew.
    Raises ValueError where the file holds something else than results, OSError where it cannot be written.
    """

    def __init__(self, plan: Plan, path: Path, fresh: bool = False):
        self.path = path
        self._plan = plan
        self._facts = machine.facts(plan.backend)
        self.data = _begin(path, self._facts, plan.settings(self._facts["build"].get("cpu_isa")))
        if fresh:
            self._forget()
        results.save(path, self.data)

    def _forget(self) -> None:
        """Drops what this run is going to measure."""
        keys = {case.key for case in self._plan.cases}
        for section in ("results", "refused", "skipped"):
            self.data[section] = {k: v for k, v in self.data[section].items() if k not in keys}
        for name in self._ceilings():
            self.data["ceilings"].pop(name, None)
        for shape, _, dtype in self._models():
            for key in model.keys(shape, [dtype]):
                self.data["model"].pop(key, None)

    def measure(self) -> None:
        """All that the file does not hold yet; it is written after every case."""
        plan = self._plan
        due = [case for case in plan.cases if not self._finished(case)]
        models = [(*m, m_due) for m in self._models() if (m_due := self._model_due(*m))]
        if due or models:
            doubt = max(self.data["machine"].get("busy") or 0, self._facts["busy"] or 0)
            self.data["machine"] = self._facts | {"busy": doubt}
        else:
            when = self.data["machine"].get("time")
            say(f"benchmarks: {self.path} holds all of it already, measured until {when}; --fresh measures again")
        budget = suite.Budget(60 * plan.minutes * (1 - MODEL_SHARE * bool(models)), plan.effort)
        with _progress(1 + len(due) + sum(len(keys) for *_, keys in models)) as bar:
            self._measure_ceilings(bar.step)
            bar.next()
            for index, case in enumerate(due):
                bar.begin(case.key)
                self._measure(case, budget.share(len(due) - index), bar.step)
                bar.next()
            if due:
                self._measure_ceilings_again(bar.step)
            for shape, dimensions, dtype, keys in models:
                bar.begin(f"{shape} model")
                self._measure_model(shape, dimensions, dtype, keys, bar)

    def report(self, old: dict[str, Any] | None) -> int:
        """Prints the table, and what changed since `old`; 1 where an op is wrong or slower, else 0."""
        keys = [case.key for case in self._plan.cases]
        found = self._compare(old) if old is not None else None
        print(machine.describe(self.data["machine"]))
        print(report.ceilings(self.data))
        for text in (report.table(self.data, keys), report.model_table(self.data)):
            if text:
                print(f"\n{text}")
        for name, reason in self.data["skipped"].items():
            if name.startswith("model/"):
                print(f"{name}: skipped: {reason}")
        if reasons := report.missing_peers(self.data, keys):
            print(f"\nnot compared with:\n{reasons}")
        if doubts := report.doubts(self.data):
            print(f"\n{doubts}")
        status = int(any(key in self.data["refused"] for key in keys))
        if found is not None:
            print(f"\n{report.comparison(found)}")
            status = max(status, int(found.regressed))
        print(f"\nwritten to {self.path}")
        return status

    def _finished(self, case: Case) -> bool:
        entry = self.data["results"].get(case.key)
        if entry is None:
            return False
        known = entry["peers"].keys() | entry["missing"].keys()
        return all(peer.name in known for peer in self._plan.peers if peer.supports(case))

    def _machine(self, dtype: torch.dtype) -> Machine:
        threads = self._plan.threads if self._plan.backend == "cpu" else 1
        return Machine.from_results(self.data, ceilings.name_of(dtype), threads)

    def _ceilings(self) -> set[str]:
        return {"read", "copy", *(f"matmul_{ceilings.name_of(dtype)}" for dtype in self._plan.all_dtypes)}

    def _measure_ceilings(self, step: Callable[[str], None]) -> None:
        plan = self._plan
        if self._ceilings() <= self.data["ceilings"].keys():
            return
        threads = machine.thread_counts(plan.threads)
        self.data["ceilings"] |= ceilings.measure(plan.backend, threads, plan.all_dtypes, plan.effort.ceiling, step)
        results.save(self.path, self.data)

    def _measure_ceilings_again(self, step: Callable[[str], None]) -> None:
        """Keeps the higher of each ceiling before and after the cases, and what they changed by."""
        plan, known = self._plan, self.data["ceilings"]
        after = ceilings.measure(plan.backend, [plan.threads], plan.all_dtypes, plan.effort.ceiling, step)
        self.data["drift"] = {}
        for name, values in after.items():
            for count, value in values.items():
                self.data["drift"][name] = value / known[name][count]
                known[name][count] = max(known[name][count], value)
        for key, entry in self.data["results"].items():
            if f"matmul_{entry['dtype']}" in known:
                self.data["results"][key] = suite.judged(entry, self._machine(getattr(torch, entry["dtype"])))
        results.save(self.path, self.data)

    def _measure(self, case: Case, seconds: float, step: Callable[[str], None]) -> None:
        for section in ("results", "refused", "skipped"):
            self.data[section].pop(case.key, None)
        plan = self._plan
        try:
            self.data["results"][case.key] = suite.measure(
                case, plan.backend, self._machine(case.dtype), plan.peers, plan.effort, seconds, step
            )
        except suite.Refused as reason:
            self.data["refused"][case.key] = str(reason)
        except suite.Skipped as reason:
            self.data["skipped"][case.key] = str(reason)
        results.save(self.path, self.data)

    def _models(self) -> list[tuple[str, Dimensions, torch.dtype]]:
        return [(shape, d, dtype) for shape, d in self._plan.shapes.items() for dtype in self._plan.model_dtypes]

    def _model_due(self, shape: str, dimensions: Dimensions, dtype: torch.dtype) -> list[str]:
        """Keys of a model's entries that are to be measured: none where it does not fit in memory."""
        name = f"model/{shape}/{ceilings.name_of(dtype)}"
        self.data["skipped"].pop(name, None)
        if reason := suite.too_large(model.memory_needed(dimensions, dtype), self._plan.backend):
            self.data["skipped"][name] = reason
            return []
        return [key for key in model.keys(shape, [dtype]) if key not in self.data["model"]]

    def _measure_model(
        self, shape: str, dimensions: Dimensions, dtype: torch.dtype, keys: list[str], bar: _Bar
    ) -> None:
        plan = self._plan
        found = model.entries(
            dimensions, shape, [dtype], device=plan.backend, machines={dtype: self._machine(dtype)},
            done=set(model.keys(shape, [dtype])) - set(keys), peers=bool(plan.peers), quick=plan.quick, step=bar.step,
        )  # fmt: skip
        for key, entry in found:
            self.data["model"][key] = entry
            results.save(self.path, self.data)
            bar.next()

    def _compare(self, old: dict[str, Any]) -> compare.Comparison:
        """An op that seems slower is timed once more: only what is slower then as well counts."""
        keys = {case.key: case for case in self._plan.cases}
        for change in compare.compare(old, self.data).changes:
            if change.slower and change.key in keys:
                case, first = keys[change.key], self.data["results"][change.key]
                again = suite.measure_again(
                    case, self._plan.backend, self._machine(case.dtype), first,
                    self._plan.effort, self._plan.effort.longest_case / 4,
                )  # fmt: skip
                self.data["results"][case.key] = min(first, again, key=lambda entry: entry["seconds"])
        results.save(self.path, self.data)
        return compare.compare(old, self.data)


def _begin(path: Path, facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return results.new(facts, settings)
    found = results.load(path)
    if not machine.same(found["machine"], facts) or not _same_settings(found["settings"], settings):
        kept = path.with_suffix(f".old{path.suffix}")
        path.replace(kept)
        say(f"benchmarks: {path} is begun anew; what it held, of another machine, build or setting, is now {kept}")
        return results.new(facts, settings)
    dimensions = found["settings"]["dimensions"] | settings["dimensions"]
    found["settings"] |= {"dimensions": dimensions, "shape": " ".join(dimensions)}
    return found


def _same_settings(old: dict[str, Any], new: dict[str, Any]) -> bool:
    dimensions = old.get("dimensions", {})
    return all(old.get(name) == new[name] for name in ("backend", "threads", "isa", "quick")) and all(
        dimensions.get(name, sizes) == sizes for name, sizes in new["dimensions"].items()
    )


class _Bar:
    """Progress on stderr, where that is a terminal."""

    def __init__(self, bar: Any = None):
        self._bar, self._case = bar, ""

    def begin(self, case: str) -> None:
        self._case = f"{case}: "

    def step(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._case + text)

    def next(self) -> None:
        self._case = ""
        if self._bar is not None:
            self._bar.update()


@contextmanager
def _progress(count: int) -> Iterator[_Bar]:
    if not sys.stderr.isatty():
        yield _Bar()
        return
    from tqdm import tqdm

    form = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed}, {remaining} left{postfix}"
    with tqdm(total=count, bar_format=form, file=sys.stderr, leave=False) as bar:
        yield _Bar(bar)
