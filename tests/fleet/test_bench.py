"""The bench: what it makes of its rows, that it measures what it says, and a run of it that is as short as can be."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from balancer import document
from benchmarks import profile
from benchmarks.bench import bodies, features, figures, ours, peers, programs, report, run, tables, targets
from benchmarks.bench.about import About
from benchmarks.bench.contestants import Missing
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import SMALL, STREAM, Load, Phase, Row
from benchmarks.bench.run import Found, Part
from benchmarks.bench.targets import Target
from benchmarks.clients.__main__ import Row as ClientRow
from benchmarks.clients.__main__ import report as clients_report
from tests.topologies import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
UPSTREAMS = ["http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"]
ABOUT = About(
    plan="2 rounds",
    date="now",
    commit="c0ffee",
    command="bench",
    machine="a machine",
    load_average=0.1,
    versions={"x": "1"},
)


def a_row(contestant: str, cpu_us: float, round_: int = 0, phase: Phase = SMALL, **load: float | str) -> Row:
    """A measurement."""
    found = msgspec.convert({"per_s": 100.0, "right": 10, "all_right": 12, **load}, Load)
    return Row(
        contestant=contestant,
        round=round_,
        phase=phase.name,
        load=found,
        cpu_us=cpu_us,
        cores=1.0,
        memory_mib=10.0,
        upstream_cores=0.1,
        redis_cores=0.1,
        redis_us=11.0,
    )


def test_a_ratio_compares_within_a_round_before_it_takes_the_median() -> None:
    found = Figures(
        [
            *(a_row("ours", cpu, i) for i, cpu in enumerate((10.0, 40.0, 30.0))),
            *(a_row("nginx", cpu, i) for i, cpu in enumerate((5.0, 40.0, 10.0))),
        ]
    )
    assert found.ratio("ours", "nginx", SMALL, figures.cpu_us) == 2.0
    assert found.added("ours", "nginx", SMALL, figures.cpu_us) == 5.0
    assert found.median("ours", SMALL, figures.cpu_us) == 30.0


def test_a_round_without_a_right_answer_is_no_figure_and_is_said() -> None:
    found = Figures([a_row("ours", 10.0, 0), a_row("ours", 0.0, 1, right=0, all_right=0, wrong=3, complaint="503")])
    assert found.median("ours", SMALL, figures.cpu_us) == 10.0
    assert (found.wrong("ours"), found.complaint("ours"), found.silent("ours")) == (3, "503", [SMALL.name])
    assert found.median("ours", STREAM, figures.cpu_us) is None
    assert found.ratio("ours", "nobody", SMALL, figures.cpu_us) is None


@pytest.mark.parametrize(
    ("measured", "is_least", "verdict"),
    [
        (5.0, True, "aim"),
        (3.0, True, "must"),
        (1.0, True, "missed"),
        (1.0, False, "aim"),
        (2.0, False, "must"),
        (2.6, False, "missed"),
        (None, False, "not measured"),
    ],
)
def test_a_target_is_judged_by_its_direction(measured: float | None, is_least: bool, verdict: str) -> None:
    aim = 4.0 if is_least else 1.5
    assert Target(what="x", must=2.5, aim=aim, measured=measured, is_least=is_least).verdict == verdict


def test_the_targets_are_read_from_the_rows_that_they_are_about() -> None:
    found = Figures(
        [
            a_row("ours", 44.0, per_s=4000.0),
            a_row("aiohttp", 160.0, per_s=1000.0),
            a_row("nginx", 20.0, per_s=9000.0),
            a_row("nginx", 100.0, phase=STREAM),
            a_row("ours", 120.0, phase=STREAM),
        ]
    )
    measured = {each.what: (each.measured, each.verdict) for each in targets.targets(found)}
    assert measured["requests/s, of the bare aiohttp proxy's"] == (4.0, "aim")
    assert measured["CPU a request, of nginx's"] == (2.2, "aim")
    assert measured["CPU a stream of 51 events, of nginx's"] == (1.2, "must")
    assert measured["CPU of Redis a request"] == (11.0, "aim")
    assert measured["requests/s, of vllm-router's"] == (None, "not measured")


def test_numbers_and_tables_read_as_people_write_them() -> None:
    assert [tables.number(1234567.0, 0), tables.number(0.126, 2), tables.number(None)] == ["1 234 567", "0.13", "–"]
    assert tables.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | --: |\n| x | 1 |"


def test_the_report_shows_who_was_not_measured_and_comes_back_from_its_file(tmp_path: Path) -> None:
    part = Part(
        rows=[a_row("ours", 44.0), a_row("nginx", 20.0)],
        missing=[Missing(name="portkey", reason="needs node")],
        evidence=["breaker: seen"],
    )
    found = Found(about=ABOUT, contestants=part, workers=Part(rows=[], missing=[]))
    report.write(tmp_path, found)
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| portkey | not measured |" in text
    assert "- portkey: not measured: needs node" in text
    assert "- breaker: seen" in text
    assert "| ours | 100 | – | 44 | 2.20 |" in text
    read = report.read(tmp_path / "bench.json")
    assert report.document(read) == report.document(found)
    assert "| CPU a request, of nginx's | ≤ 4 × | ≤ 2.2 × | 2.20 × | aim |" in report.readme_part(read)


@pytest.mark.parametrize("variant", [*features.VARIANTS, *features.LOOPS, *features.WORKERS], ids=lambda v: v.name)
def test_a_variant_is_a_configuration_that_the_strict_door_takes(variant: ours.Variant) -> None:
    read = document.read(ours.document(UPSTREAMS, variant), door="strict")
    assert not read.warnings
    (rule,) = read.configuration.rules
    providers = read.configuration.providers
    assert [provider.api_base for provider in providers] == [f"{url}/v1" for url in UPSTREAMS]
    assert all((provider.limits.rpm > 0) == variant.has_limits for provider in providers)
    assert all((service.limits.in_flight > 0) == variant.has_limits for service in rule.services)
    assert all((provider.breaker.failures > 0) == variant.has_breaker for provider in providers)
    assert rule.lb_tactic.reserve == variant.reserve
    assert all(ours.has_setting(name) for name in variant.settings)


def test_every_variant_but_the_bases_differs_from_a_base_that_is_measured_too() -> None:
    names = {variant.name for variant in features.VARIANTS}
    bases = {variant.name: variant.base for variant in features.VARIANTS if variant.base}
    assert set(bases.values()) <= names
    assert names - set(bases) == {"off", "all"}


def test_the_bodies_are_the_same_every_time_and_of_the_sizes_that_the_report_names(tmp_path: Path) -> None:
    first, second = ({name: path.read_bytes() for name, path in bodies.write(tmp_path).items()} for _ in range(2))
    assert first == second
    assert (len(first["small"]), len(first["agent"]) // 1000) == (331, 43)
    assert b'"stream": true' in first["small_stream"]


def test_samples_are_added_up_by_file_and_by_function() -> None:
    samples = profile.read_samples(
        "main (a.py:1);run (b.py:2) 3\nmain (a.py:1);run (b.py:9) 1\nmain (a.py:4) 2\n0x7f 1\n"
    )
    assert samples.total == 7
    assert samples.by_file() == {"b.py": 4, "a.py": 2, "0x7f": 1}
    assert samples.by_function() == {"run (b.py)": 4, "main (a.py)": 2, "0x7f": 1}
    assert samples.inclusive()["main (a.py)"] == 6
    scope = msgspec.json.decode(profile.speedscope(samples, "x"))
    assert scope["profiles"][0]["weights"] == [3, 1, 2, 1]
    assert [scope["shared"]["frames"][i]["name"] for i in scope["profiles"][0]["samples"][1]] == [
        "main (a.py:1)",
        "run (b.py:9)",
    ]


def test_a_thread_that_waits_for_work_is_no_sample() -> None:
    """It was: with one thread in the pool, 45% of all samples were of its waiting."""
    text = "_worker (thread.py:81);PyThread_acquire_lock_timed (libpython3.11.so.1.0) 9\nmain (a.py:1) 3\n"
    assert profile.read_samples(text).total == 3


def test_what_redis_did_is_told_by_request() -> None:
    text = profile.commands_table({"evalsha": (10, 1000.0)}, {"evalsha": (30, 5000.0), "ping": (0, 0.0)}, 100)
    assert text.splitlines()[2:] == ["| evalsha | 0.200 | 200.0 | 40.00 |"]


def test_client_libraries_stand_beside_aiohttp_of_the_same_round() -> None:
    def row(small_us: float) -> ClientRow:
        return ClientRow(
            small_us=small_us, small_per_s=1, stream_us=2 * small_us, streams_per_s=1, parts=51, memory_mib=30
        )

    text = clients_report({"aiohttp": [row(100), row(200)], "ours": [row(50), row(50)]}, {"ry": "no wheel"})
    assert "| ours | 50 | 0.38 | 100 | 0.38 | 51 | 30 |" in text
    assert "- ry: no wheel" in text


def test_a_peer_that_cannot_be_had_is_named_and_the_others_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_PEERS", str(tmp_path))

    def nowhere() -> None:
        raise RuntimeError("there is no wheel")

    monkeypatch.setattr(peers, "PEERS", {"a": nowhere, "b": lambda: None})
    assert peers.main([]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["a: cannot be had here: there is no wheel", "b: there"]


@pytest.mark.needs("apt:gcc")
@pytest.mark.parametrize("name", ["load", "mock"])
def test_the_programs_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(tmp_path / name), str(programs.source(name))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.needs("apt:gcc")
def test_a_short_run_measures_ours_with_everything_on_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.bench", "--only", "direct,aiohttp,ours", "--phases", "small,stream"),
            *("--rounds", "1", "--seconds", "0.6", "--results", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.read(tmp_path / "bench.json")
    assert found.contestants
    rows = {(row.contestant, row.phase): row for row in found.contestants.rows}
    assert set(rows) == {(name, phase.name) for name in ("direct", "aiohttp", "ours") for phase in (SMALL, STREAM)}
    assert all(row.load.right > 0 and row.load.wrong == 0 for row in rows.values())
    own = rows["ours", SMALL.name]
    assert own.cpu_us > 0
    assert own.redis_us > 0
    assert own.scripts_per_request > 0
    evidence = {line.partition(":")[0] for line in found.contestants.evidence}
    assert evidence >= {"breaker", "limits of services", "limits of providers", "reservation", "leases", "settlement"}
    # What was killed may take a moment to be gone.
    wait_until(lambda: not _left_behind(), "all that was started has ended")


@pytest.mark.needs("apt:gcc")
def test_a_run_that_is_stopped_ends_what_it_has_started() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench", "--only", "aiohttp,ours", "--rounds", "50"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("ready: aiohttp")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said.splitlines()[-1]) == (1, "stopped")
    # What was killed may take a moment to be gone.
    wait_until(lambda: not _left_behind(), "all that was started has ended")


def _left_behind() -> list[str]:
    """Programs that a bench has started and not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            # The folder of a run that has ended is gone; one that goes on elsewhere is none of our business.
            folder = path.readlink().name
            if folder.startswith("bench-") and folder.endswith(" (deleted)"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_what_redis_does_not_show_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ours, "_evidence", lambda client, variant: [ours.Evidence(what="breaker", where="x", is_there=False)]
    )
    with pytest.raises(RuntimeError, match="no breaker"):
        ours.check("redis://127.0.0.1:1", ours.ALL, functools.partial(time.sleep, 0.1))


def test_no_part_is_left_out_of_the_whole() -> None:
    found = Found(about=ABOUT, loops=Part(rows=[], missing=[]))
    assert list(found.parts()) == ["loops"]
    assert run.Found(about=ABOUT).parts() == {}
