"""The parts of a run: beside others, each feature, each loop, two workers. Each is measured in rounds of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from benchmarks.bench import contestants, features, measuring, ours, rounds
from benchmarks.bench.about import About
from benchmarks.bench.contestants import Contestant, Missing
from benchmarks.bench.features import Bridges
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import BURST, PACED, SMALL, STREAM, Phase, Row
from benchmarks.bench.ours import Variant
from benchmarks.bench.rounds import Plan
from benchmarks.bench.site import Site
from benchmarks.bench.targets import OURS, Target, targets

Say = Callable[[str], None]
_EVIDENCE_S = 1.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a part has measured, and who could not be; `evidence` is what Redis showed of ours."""

    rows: list[Row]
    missing: list[Missing]
    evidence: list[str] = []

    @property
    def figures(self) -> Figures:
        """The rows as figures."""
        return Figures(self.rows)


class Found(msgspec.Struct, kw_only=True):
    """Everything that a run has found; a part that was not asked for is None."""

    about: About
    contestants: Part | None = None
    features: Part | None = None
    loops: Part | None = None
    workers: Part | None = None

    def parts(self) -> dict[str, Part]:
        """Those that were measured, by name."""
        named = {
            "contestants": self.contestants,
            "features": self.features,
            "loops": self.loops,
            "workers": self.workers,
        }
        return {name: part for name, part in named.items() if part}

    def targets(self) -> list[Target]:
        """The targets, as far as they were measured."""
        beside = self.contestants.figures if self.contestants else Figures([])
        return targets(beside, self.workers.figures if self.workers else None)


def beside_others(site: Site, names: Sequence[str], plan: Plan, say: Say) -> Part:
    """Ours and the others."""
    evidence: list[str] = []

    def check(contestant: Contestant) -> None:
        evidence.extend(ours.check(contestant.redis_url, ours.ALL, lambda: _stream(site, contestant)))

    with rounds.field(site, say) as field:
        for name in names:
            field.add(contestants.ALL[name](site), check if name == OURS else None)
        return Part(rows=list(field.run(plan)), missing=field.missing, evidence=evidence)


def by_feature(site: Site, plan: Plan, say: Say) -> Part:
    """Ours alone, with each switch."""
    return _variants(site, features.VARIANTS, plan, say)


def by_loop(site: Site, plan: Plan, say: Say) -> Part:
    """Ours alone, on each loop."""
    return _variants(site, features.LOOPS, with_phases(plan, (SMALL, STREAM, BURST)), say)


def by_workers(site: Site, plan: Plan, say: Say) -> Part:
    """One worker of ours, and two on the same core, under an equal load."""
    return _variants(site, features.WORKERS, with_phases(plan, (PACED,)), say)


def with_phases(plan: Plan, phases: tuple[Phase, ...]) -> Plan:
    """The same plan for other phases."""
    return msgspec.structs.replace(plan, phases=phases)


def _variants(site: Site, variants: Sequence[Variant], plan: Plan, say: Say) -> Part:
    bridges = Bridges(site)
    made = [(variant, features.contestant(site, variant, bridges)) for variant in variants]
    with bridges.running(), rounds.field(site, say) as field:
        for variant, contestant in made:
            field.add(contestant, _check_of(site, variant))
        return Part(rows=list(field.run(plan)), missing=field.missing)


def _check_of(site: Site, variant: Variant) -> Callable[[Contestant], None]:
    def check(contestant: Contestant) -> None:
        ours.check(contestant.redis_url, variant, lambda: _stream(site, contestant))

    return check


def _stream(site: Site, contestant: Contestant) -> None:
    measuring.run_load(site, contestant, STREAM, _EVIDENCE_S)
