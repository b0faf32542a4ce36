"""The latency benchmark: what it prints, refuses and leaves alone. No time is asserted."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tinyalign_edge import cli
from tinyalign_edge.bundle import MANIFEST, MEMORY_DIR, file_entries, open_bundle
from tinyalign_edge.config import write_json
from tinyalign_edge.latency import output
from tinyalign_edge.latency.compare import compare
from tinyalign_edge.latency.energy import Battery, find_meter
from tinyalign_edge.latency.host import host
from tinyalign_edge.latency.measure import Setting, _Asking, check
from tinyalign_edge.latency.rows import DISK, ENERGY, PROCESS, STAGES, Result, Row, read_result
from tinyalign_edge.latency.run import ask_child, bench, divided
from tinyalign_edge.latency.throttle import RASPBERRY_PI, read_throttle, throttling
from tinyalign_edge.latency.work import Work, prompt_length, question_of

MEMORY_STAGES = {"retrieve", "memory_add"}
SMALL = Work(visual_tokens=6, prompt_tokens=24, new_tokens=3, contexts=(20, 40), repetitions=2, warmup=0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `tinyalign-edge bench`; returns its exit code and what it printed, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyalign-edge", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, bytes]]:
    """A bundle folder with what its files held before it was measured."""
    folder = Path(shutil.copytree(STORED_BUNDLE, tmp_path_factory.mktemp("latency") / "tiny"))
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def result(untouched: tuple[Path, dict[Path, bytes]]) -> Result:
    """One run on the tiny bundle."""
    return bench([untouched[0]], threads=(1,), work=SMALL, profile=True)


def test_every_stage_has_its_samples_with_and_without_memory(result: Result) -> None:
    times = {memory: [row for row in result.rows if row.memory is memory] for memory in (True, False)}
    assert {row.stage for row in times[True]} - {ENERGY} == {*STAGES, *PROCESS}
    assert {row.stage for row in times[False]} - {ENERGY} == {*STAGES, *PROCESS} - MEMORY_STAGES
    for row in (*times[True], *times[False]):
        assert (row.bundle, row.threads, len(row.samples)) == ("tiny", 1, 2)
        assert row.median > 0
    contexts = [row.context for row in times[True] if row.stage == "per_token"]
    assert contexts == [20, 40]
    by_stage = {row.stage: row.median for row in times[True]}
    assert by_stage["verify"] < by_stage["load"]
    assert by_stage["encode"] < by_stage["first_token"] < by_stage["total"]
    assert by_stage["process_at_import"] < by_stage["process_at_load"] < by_stage["process_peak"]


def test_bytes_on_disk_are_those_of_the_folder(result: Result, untouched: tuple[Path, dict[Path, bytes]]) -> None:
    sizes = {row.stage: row.median for row in result.rows if row.stage in DISK}
    assert set(sizes) == set(DISK)
    assert sizes["disk_total"] == sum(map(len, untouched[1].values()))
    bank = sum(len(data) for path, data in untouched[1].items() if MEMORY_DIR in path.parts)
    assert sizes["disk_memory"] == bank + (untouched[0] / "memory_connector.onnx").stat().st_size


def test_the_bundle_and_its_memory_are_left_as_they_were(
    result: Result, untouched: tuple[Path, dict[Path, bytes]]
) -> None:
    folder, before = untouched
    assert any(row.stage == "memory_add" for row in result.rows)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_work_is_what_was_asked_for(result: Result) -> None:
    assert result.bundles["tiny"]["visual_tokens"] == 6
    assert result.bundles["tiny"]["prompt_tokens"] == 24
    assert result.bundles["tiny"]["memory_tokens"] > 0  # whatever the picture, the memory speaks
    assert result.work["new_tokens"] == 3
    assert result.work["processes"] == 2


def test_the_ten_most_expensive_nodes_of_each_pass_are_named(result: Result) -> None:
    for stage in ("encode", "prefill", "per_token"):
        nodes = [node for node in result.nodes if node["stage"] == stage]
        assert len(nodes) == 10
        assert [node["ms"] for node in nodes] == sorted((node["ms"] for node in nodes), reverse=True)
        assert 0 < sum(node["share"] for node in nodes) <= 1
    assert any("GroupQueryAttention" in node["name"] for node in result.nodes)


def test_json_has_the_documented_keys_and_is_read_again(result: Result, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(output.result_text(result, "json"))
    data: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
    assert {"host", "commit", "versions", "measured_at", "work", "bundles", "nodes", "rows"} == set(data)
    assert {"cpu", "features", "cores", "core_kinds", "governor", "emulated", "throttling"} <= set(data["host"])
    assert {"tinyalign-edge", "onnxruntime", "python"} <= set(data["versions"])
    first = next(row for row in data["rows"] if row["stage"] == "first_token")
    assert set(first) == {"bundle", "memory", "threads", "stage", "median_ms", "spread_ms", "samples_ms"}
    size = next(row for row in data["rows"] if row["stage"] == "disk_total")
    assert isinstance(size["median_bytes"], int)
    assert read_result(tmp_path / "a.json") == result


def test_every_format_tells_every_row(result: Result) -> None:
    lines = [json.loads(line) for line in output.result_text(result, "jsonl").splitlines()]
    assert lines[0]["host"] == result.host
    assert [Row.from_json(line) for line in lines[1:]] == list(result.rows)
    table = list(csv.DictReader(io.StringIO(output.result_text(result, "csv"))))
    assert [(line["stage"], line["unit"]) for line in table] == [(row.stage, row.unit) for row in result.rows]
    assert float(table[0]["median"]) == result.rows[0].median
    for form in ("table", "md"):
        text = output.result_text(result, form)  # type: ignore[arg-type]
        assert all(stage in text for stage in (*STAGES, *PROCESS, "on disk", "GroupQueryAttention"))
    assert max(map(len, output.result_text(result, "table").splitlines())) <= output.WIDTH


def test_a_plot_is_written(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tinyalign_edge.latency.plot import draw

    draw(result, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.size[0] > 1000
    with pytest.raises(ta.InputError, match="cannot be written"):
        draw(result, tmp_path / "absent" / "plot.png")


def changed(result: Result, stage: str, *samples: float, **head: Any) -> Result:
    """`result` with other samples of one stage."""
    rows = tuple(replace(row, samples=samples) if row.stage == stage else row for row in result.rows)
    return replace(result, rows=rows, **head)


def test_a_difference_exceeds_the_noise_when_medians_are_farther_apart_than_both_spreads(result: Result) -> None:
    a = changed(result, "encode", 9.0, 10.0, 11.0)  # spread 0.5
    for samples, verdict in (
        ((10.0, 11.0, 12.0), "within the noise"),  # 1.0 apart, spreads 0.5 + 0.5
        ((10.1, 11.1, 12.1), "more"),
        ((7.9, 8.9, 9.9), "less"),
        ((99.0, 99.0), "too few samples"),
        ((9.0, 10.0, 11.0), "equal"),
    ):
        found = [c for c in compare(a, changed(a, "encode", *samples)).changes if c.stage == "encode"]
        assert [change.verdict for change in found] == [verdict] * 2
        assert found[0].beyond_noise == (verdict in ("more", "less"))
    (size,) = [c for c in compare(a, changed(a, "disk_total", 12.0)).changes if c.stage == "disk_total"]
    assert (size.verdict, size.b) == ("less", 12.0)  # counted, not measured
    slow = next(c for c in compare(a, changed(a, "encode", 30.0, 30.0, 30.0)).changes if c.stage == "encode")
    assert slow.ratio == 3


def test_a_comparison_names_what_else_differs_and_needs_something_in_common(result: Result) -> None:
    label, about = next(iter(result.bundles.items()))
    other = replace(
        result,
        versions={**result.versions, "onnxruntime": "0.0"},
        bundles={"another": {**about, "visual_tokens": 9}},
        rows=tuple(replace(row, bundle="another") for row in result.rows),
    )
    found = compare(result, other)  # one bundle each: its name does not matter
    assert len(found.changes) == len(result.rows)
    assert any("onnxruntime" in note and "0.0" in note for note in found.notes)
    assert any(f"visual_tokens of {label}: 6 and 9" in note for note in found.notes)
    for form in output.FORMATS:
        assert "encode" in output.comparison_text(found, form)
    with pytest.raises(ta.InputError, match="nothing in common"):
        compare(result, replace(result, rows=tuple(replace(row, threads=7) for row in result.rows)))
    with pytest.raises(ta.InputError, match="emulation"):
        compare(result, replace(result, host={**result.host, "emulated": True}))


def test_the_command_measures_compares_and_refuses(command: Any, tmp_path: Path) -> None:
    small = ("--threads", "1", "--new-tokens", "2", "--repetitions", "1", "--warmup", "0", "--output", "json")
    code, out, err = command(STORED_BUNDLE, *small)
    assert code == 0, err
    (tmp_path / "a.json").write_text(out)
    _, compared, _ = command("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert "first_token" in compared and "equal" in compared
    (tmp_path / "bad.json").write_text('{"rows": [{"stage": "load"}]}')
    for arguments, wanted in (
        (("compare", tmp_path / "a.json"), "takes two files"),
        (("compare", tmp_path / "a.json", tmp_path / "bad.json"), "not what 'tinyalign-edge bench --output json'"),
        ((STORED_BUNDLE, "--threads", "1,x"), "--threads 1,x: must be numbers"),
        ((STORED_BUNDLE, "--output", "xml"), "not one of table, md"),
        ((tmp_path,), "not a bundle"),
    ):
        code, _, err = command(*arguments)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert wanted in err


def test_a_plot_needs_a_folder_that_exists(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = command(STORED_BUNDLE, "--plot", tmp_path / "absent" / "a.png")
    assert code == 2
    assert "in a folder that exists" in err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyalign_edge.latency.plot import check_plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ta.MissingExtraError, match=r"tinyalign-edge\[plot\]"):
        check_plot(Path("a.png"))


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        ({"prompt_tokens": 3}, "--prompt-tokens 3: chat template and shortest question take"),
        ({"visual_tokens": 200}, "the context has 256"),
        ({"contexts": (250,)}, "--context 250 and 32 new tokens"),
        ({"new_tokens": 1}, "--new-tokens 1: must be at least 2"),
        ({"repetitions": 0}, "--repetitions 0"),
        ({"warmup": -1}, "--warmup -1"),
        ({"contexts": (9, 9)}, "named twice"),
    ],
)
def test_work_that_does_not_fit_is_refused_before_anything_is_timed(work: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ta.InputError, match=wanted):
        check(Setting(str(STORED_BUNDLE), "tiny", True, 1), Work(**work))


def test_a_bundle_that_computes_something_else_is_not_timed(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    probe = json.loads((bundle / manifest.probe_file).read_text("utf-8"))
    probe["logits"] = probe["logits"][::-1]
    write_json(bundle / manifest.probe_file, probe)
    write_json(bundle / MANIFEST, replace(manifest, files=file_entries(bundle)))
    with pytest.raises(ta.GateError, match="nothing was timed"):  # raised in another process, as the same kind
        ask_child("check", Setting(str(bundle), "tiny", True, 1), Work())


def test_an_interrupt_ends_the_other_process_and_leaves_no_copy_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        assert [path.name[:10] for path in tmp_path.iterdir()] == ["tinyalign-"]
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    setting, work = Setting(str(STORED_BUNDLE), "tiny", True, 1), Work(new_tokens=2)
    with pytest.raises(KeyboardInterrupt):
        ask_child("measure", setting, work, advance=interrupt, expected=[], repetitions=1)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_changes_between_checking_and_timing_is_an_error() -> None:
    setting, work = Setting(str(STORED_BUNDLE), "tiny", False, 1), Work(new_tokens=4, warmup=0)
    answer = check(setting, work).answer
    assert len(answer) == 3
    with pytest.raises(ta.GateError, match="another answer"):
        ask_child("measure", setting, work, expected=[*answer[:-1], answer[-1] + 1], repetitions=1)


def test_bundles_and_threads_are_named_once() -> None:
    with pytest.raises(ta.InputError, match="named twice"):
        bench([STORED_BUNDLE, STORED_BUNDLE])
    with pytest.raises(ta.InputError, match="different numbers"):
        bench([STORED_BUNDLE], threads=(1, 1))
    assert divided(20, 5) == [4] * 5
    assert divided(7, 3) == [3, 2, 2]


def test_questions_have_the_length_that_is_asked_for() -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        for tokens in (22, 40, 90):
            assert prompt_length(model.prompt, question_of(model.prompt, tokens)) == tokens


def test_nothing_of_a_first_question_was_kept_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        asking = _Asking(model, Work(new_tokens=2))
        for _ in range(2):
            image, _ = asking.first()
            assert asking.ask(image, 1).cached_tokens >= len(image.tokens)
        monkeypatch.setattr(ta.Model, "clear_cache", lambda _: None)
        with pytest.raises(ta.GateError, match="kept from before"):
            asking.first()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_arm_board_tells_its_kinds_of_cores_governor_and_name(tmp_path: Path) -> None:
    block = "processor\t: {}\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: {}\n"
    parts = ["0xd05"] * 4 + ["0xd0b"] * 2 + ["0xfff"]
    cores = "sys/devices/system/cpu/cpu{}/cpufreq/{}"
    files = {"proc/cpuinfo": "\n".join(block.format(i, part) for i, part in enumerate(parts))}
    files |= {"proc/device-tree/model": "A board\0", "proc/version": "Linux version 6.1 (gcc)"}
    files |= {cores.format(i, "cpuinfo_max_freq"): "1800000" if i < 4 else "2400000" for i in range(6)}
    files |= {cores.format(i, "scaling_governor"): "ondemand\n" for i in range(6)}
    found = host(write(tmp_path, files), machine="aarch64")
    assert found["core_kinds"] == [
        {"kind": "Cortex-A55", "count": 4, "max_mhz": 1800},
        {"kind": "Cortex-A76", "count": 2, "max_mhz": 2400},
        {"kind": "0x41 0xfff", "count": 1, "max_mhz": None},
    ]
    assert (found["device"], found["governor"], found["emulated"]) == ("A board", "ondemand", False)
    assert found["features"] == ["asimd", "asimddp", "i8mm"]
    assert found["cpu"] == "Cortex-A55, Cortex-A76, 0x41 0xfff"


def test_emulation_is_seen_by_the_machine_below(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor : 0\nvendor_id : AuthenticAMD\nmodel name : x\n"})
    assert host(tmp_path, machine="aarch64")["emulated"]
    assert not host(tmp_path, machine="x86_64")["emulated"]
    kinds = host(write(tmp_path, {"sys/devices/cpu_core/cpus": "0-7", "sys/devices/cpu_atom/cpus": "8-11,15"}))
    assert [(kind["kind"], kind["count"]) for kind in kinds["core_kinds"]] == [("core", 8), ("atom", 5)]


def test_throttling_is_what_counters_cooling_or_firmware_tell(tmp_path: Path) -> None:
    assert throttling([read_throttle(tmp_path)] * 2) == {"seen": None, "temperature_c": None}
    counter = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    zone = "sys/class/thermal/thermal_zone0/temp"
    before = read_throttle(write(tmp_path, {counter: "5", zone: "41000"}))
    after = read_throttle(write(tmp_path, {counter: "6", zone: "71500"}))
    assert throttling([before, before]) == {"seen": False, "temperature_c": {"first": 41.0, "highest": 41.0}}
    assert throttling([before, after]) == {"seen": True, "temperature_c": {"first": 41.0, "highest": 71.5}}
    board = write(tmp_path / "board", {RASPBERRY_PI: "50000"})  # it was once, it is not now
    assert throttling([read_throttle(board)])["seen"] is False
    cooling = {"type": "thermal-cpufreq-0", "cur_state": "2"}
    write(board, {f"sys/class/thermal/cooling_device0/{name}": text for name, text in cooling.items()})
    assert throttling([read_throttle(board)])["seen"] is True


def test_energy_is_read_from_rapl_or_from_a_battery_that_discharges(tmp_path: Path) -> None:
    assert find_meter(tmp_path) is None
    supply = {"type": "Battery", "status": "Charging", "current_now": "-500000", "voltage_now": "4000000"}
    battery = "sys/class/power_supply/battery/{}"
    write(tmp_path, {battery.format(name): text for name, text in supply.items()})
    assert find_meter(tmp_path) is None
    write(tmp_path, {battery.format("status"): "Discharging"})
    meter = find_meter(tmp_path)
    assert isinstance(meter, Battery)
    meter.start()
    assert meter.stop() > 0
    package = "sys/class/powercap/intel-rapl:0/{}"
    write(tmp_path, {package.format("energy_uj"): "9000", package.format("max_energy_range_uj"): "10000"})
    write(tmp_path, {"sys/class/powercap/intel-rapl:0:0/energy_uj": "1"})  # a part of the package
    meter = find_meter(tmp_path)
    assert meter is not None and meter.source == "rapl"
    meter.start()
    write(tmp_path, {package.format("energy_uj"): "1500"})
    assert meter.stop() == 2.5  # mJ; the counter began anew


def test_the_benchmark_needs_the_base_dependencies_alone(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "optimum", "onnx", "safetensors", "accelerate", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy!r}))\n"
        "from pathlib import Path\n"
        "from tinyalign_edge.latency import measure, output, profile, run\n"
        "from tinyalign_edge.latency.work import Work\n"
        "setting = measure.Setting(sys.argv[1], 'tiny', True, 1)\n"
        "work = Work(new_tokens=2, repetitions=1)\n"
        "facts = measure.check(setting, work)\n"
        "given = {'expected': facts.answer, 'repetitions': 1, 'scratch': Path(sys.argv[2]), 'advance': lambda: None}\n"
        "rows = measure.measure(setting, work, **given)\n"
        "print(len(rows), len(profile.profile(Path(sys.argv[1]), threads=1, tokens=9)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(STORED_BUNDLE), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 15 and done.stdout.split()[1] == "30"
