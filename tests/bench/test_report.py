"""Tables, plots and the report of a benchmark's records: the figures they state, and what they do without any."""

from __future__ import annotations

import base64
import dataclasses
import math
import re

import pytest
from matplotlib.image import imread

from bench import compare, network_tables, plots, report, tables
from bench.command import _report
from bench.results import Call, CopyPoint, Measurement, NetworkStep, Refusal, Results

MACHINE = {
    "device": "cpu",
    "name": "Some | CPU",
    "cpu": "Some | CPU",
    "cores": 2,
    "threads": 2,
    "gpu": None,
    "datasheet_gb_per_s": None,
    "system": "Linux",
    "python": "3.11.2",
    "torch": "2.13.0",
    "cuda": None,
    "cudnn": None,
    "triton": None,
    "fastbn": "0.1.0",
    "instruction_set": "avx2",
    "revision": "0123abcd",
    "modified": True,
    "date": "2026-01-02T03:04:05+00:00",
}
GPU = {
    "name": "NVIDIA H200",
    "driver": "570.1",
    "capability": "9.0",
    "memory_bytes": 150 * 10**9,
    "l2_bytes": 60 * 10**6,
    "sm_count": 132,
}
FASTBN_COLOUR, COMPILE_COLOUR = (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)


def layer(shape, op, times, dtype="float32", group="resnet50", layout="contiguous", copy_share=0.5):
    """Return the measurements of one op, with `times` in microseconds by implementation."""
    case = "-".join([group.replace(" ", "_"), "x".join(map(str, shape)), *[layout] * (layout != "contiguous")])
    tensor_bytes = math.prod(shape) * {"float32": 4}.get(dtype, 2)
    return [
        Measurement(
            time,
            0.9 * time,
            1.1 * time,
            21,
            group,
            case,
            shape,
            layout,
            dtype,
            op,
            name,
            f"{name} kernel",
            tensor_bytes,
            2 * tensor_bytes,
            2 * tensor_bytes / time / 1e3,
            copy_share,
            {other: rival / time for other, rival in times.items() if other != name},
        )
        for name, time in times.items()
    ]


def call(launches, held_bytes):
    about = ("resnet50", "small", (2, 64, 7, 7), "contiguous", "float32", "train", "fastbn", "channel_tiles")
    return Call(12.34, 11, 13, 21, *about, launches, ["kernel"] * (launches or 0), held_bytes, None)


def step(implementation, speedup_over, norm_share=None, *, network="resnet50", op="train_backward", ms=250, **changes):
    about = {"group": "usual", "shape": (16, 3, 224, 224), "dtype": "float32", "layout": "channels_last"} | changes
    ran = {"source": "torchvision", "implementation": implementation, "first_loss": 6.90776, "peak_bytes": None}
    times = {"median_us": 1e3 * ms, "p20_us": 0.9e3 * ms, "p80_us": 1.1e3 * ms, "rounds": 9}
    return NetworkStep(
        **{
            **times,
            **ran,
            **about,
            "network": network,
            "op": op,
            "norm_share": norm_share,
            "speedup_over": speedup_over,
        }
    )


def steps(ms, times, **about):
    """Return the steps of a case, with milliseconds by implementation."""
    times = {"torch": ms, **times}
    return [
        step(name, {other: rival / time for other, rival in times.items() if other != name}, ms=time, **about)
        for name, time in times.items()
    ]


def networks():
    """Return records in which fusion gives 2, 1.25 and 0.5, and conversion 1.25 and 0.8, of torch's speed."""
    small = {"group": "small", "shape": (4, 3, 64, 64)}
    return [
        *steps(200, {"convert": 160, "fused": 100}),
        *steps(20, {"convert": 25, "fused": 16}, layout="contiguous", **small),
        *steps(10, {"fused": 20}, network="unet", dtype="bfloat16", **small),
        *steps(30, {"convert": 30, "fused": 30}, op="eval"),
    ]


def make_results():
    """Return results with speed-ups 2, 0.5 and 4 in train, a sweep that would change the mean, and both refusals."""
    measurements = [
        *layer((16, 64, 56, 56), "train", {"torch": 200, "compile": 150, "fastbn": 100}, copy_share=0.9),
        *layer((16, 512, 7, 7), "train", {"torch": 50, "fastbn": 100}, copy_share=0.2),
        *layer((16, 64, 56, 56), "train", {"torch": 400, "fastbn": 100}, layout="channels_last", copy_share=0.7),
        *layer((16, 64, 56, 56), "train_backward", {"torch": 300, "fastbn": 100}),
        *layer((16, 64, 56, 56), "train", {"torch": 97, "fastbn": 100}, dtype="bfloat16"),
        *layer((16, 6, 24, 24), "eval", {"torch": 33, "onednn": 22, "fastbn": 11.0}, group="lenet"),
    ]
    for size in (1, 10, 100):
        for layout in ("contiguous", "channels_last"):
            measurements += layer(
                (size, 16, 8, 8),
                "train",
                {"torch": 1000.0 * size, "fastbn": 1.0 * size},
                group="sweep N",
                layout=layout,
            )
    refusals = [
        Refusal("a", "bfloat16", "train", "onednn", False, "float32 alone", 7),
        Refusal("b", "float32", "train", "fastbn", True, "output: got 1,\nexpected 2 | within 0.1", 3),
        Refusal("c", "float16", "eval", "onednn", False, "float32 alone"),
    ]
    copy = [CopyPoint(2**exponent, 2.0 ** (exponent - 14), 32.768) for exponent in (12, 20, 26)]
    networks = [step("torch", {}, 0.314), step("fused", {"torch": 1.25})]
    settings = {"suite": "quick", "parts": ["layers"], "filters": {}, "seconds": 0.3}
    return Results(dict(MACHINE), settings, True, copy, measurements, [call(None, 12_345_678)], networks, refusals)


def cells(lines, *start):
    """Return the cells of the row of a text table that begins with `start`."""
    rows = [re.split(" {2,}", line) for line in lines]
    (row,) = [row for row in rows if tuple(row[: len(start)]) == start]
    return row


def column(lines, name, *start):
    return cells(lines, *start)[cells(lines, lines_header(lines)[0]).index(name)]


def lines_header(lines):
    """Return the header: the first line of a table that has columns."""
    return next(row for row in (re.split(" {2,}", line) for line in lines) if len(row) > 2)


def test_summary_states_means_extremes_and_counts():
    lines = tables.summary(make_results()).lines()
    start = ("train", "float32")
    got = {name: column(lines, name, *start) for name in lines_header(lines)}
    assert got == {
        "op": "train",
        "dtype": "float32",
        "cases": "3",
        "over torch": "1.59",  # the cube root of 2 * 0.5 * 4
        "worst": "0.50",
        "best": "4.00",
        "below 0.97": "1",
        "over compile": "1.50 (1)",
        "over onednn": "-",
        "of a copy": "70%",
        "worst case": "resnet50-16x512x7x7",
    }


def test_summary_orders_by_mode_and_dtype_and_leaves_sweeps_out():
    rows = tables.summary(make_results()).rows
    assert [row[:3] for row in rows] == [
        ("train", "float32", "3"),
        ("train", "bfloat16", "1"),
        ("train_backward", "float32", "1"),
        ("eval", "float32", "1"),
    ]


def test_a_case_at_the_limit_does_not_count_as_slower():
    assert column(tables.summary(make_results()).lines(), "below 0.97", "train", "bfloat16") == "0"


def test_summary_keeps_an_op_that_fastbn_was_refused_for():
    results = Results({}, {}, measurements=layer((2, 3), "train", {"torch": 5}))
    (row,) = tables.summary(results).rows
    assert row == ("train", "float32", "0", "-", "-", "-", "-", "-", "-")


def test_noise_is_stated_and_is_no_rival():
    results = make_results()
    for torch_time, again in ((100, 110), (100, 90)):
        results.measurements += layer(
            (again, 3), "frozen", {"torch": torch_time, "torch (again)": again, "compile": 60, "fastbn": 50}
        )
    text = "\n".join(tables.summary(results).lines())
    assert "noise: torch over itself 1.005, from 0.909 to 1.111, on 2 rows of cases." in text
    assert "over torch (again)" not in text
    lines = tables.cases(results).lines()
    assert column(lines, "torch (again) µs", "resnet50-90x3", "float32", "frozen") == "90.0"
    assert column(lines, "over fastest rival", "resnet50-90x3", "float32", "frozen") == "1.20"
    labels = [label for figure in plots.speedup(results).values() for label in row_labels(figure)]
    assert "over compile: resnet50" in labels and not [label for label in labels if "again" in label]


def test_cases_states_times_speedups_and_bandwidth():
    lines = tables.cases(make_results()).lines()
    start = ("resnet50-16x64x56x56", "float32", "train")
    assert column(lines, "torch µs", *start) == "200"
    assert column(lines, "compile µs", *start) == "150"
    assert column(lines, "onednn µs", *start) == "-"
    assert column(lines, "over torch", *start) == "2.00"
    assert column(lines, "over fastest rival", *start) == "1.50"
    assert column(lines, "GB/s", *start) == "257"  # 2 * 4 * 16 * 64 * 56 * 56 bytes in 100 us
    assert column(lines, "of a copy", *start) == "90%"
    assert column(lines, "fastbn µs", "lenet-16x6x24x24", "float32", "eval") == "11.0"


def test_cases_keeps_groups_and_cases_together_however_they_were_measured():
    results = make_results()
    results.measurements += layer((16, 64, 56, 56), "train+relu", {"torch": 3, "fastbn": 1})
    results.measurements += layer((9, 9), "train", {"torch": 3, "fastbn": 1})
    rows = [row[:3] for row in tables.cases(results).rows]
    assert rows[:7] == [
        ("resnet50-16x64x56x56", "float32", "train"),
        ("resnet50-16x64x56x56", "float32", "train+relu"),
        ("resnet50-16x64x56x56", "float32", "train_backward"),
        ("resnet50-16x64x56x56", "bfloat16", "train"),
        ("resnet50-16x512x7x7", "float32", "train"),
        ("resnet50-16x64x56x56-channels_last", "float32", "train"),
        ("resnet50-9x9", "float32", "train"),
    ]
    assert rows[7] == ("lenet-16x6x24x24", "float32", "eval")
    assert len(rows) == len({m.key[:3] for m in results.measurements})


def test_limited_cases_are_the_worst_and_say_so():
    results = make_results()
    results.measurements += layer((9, 9), "train", {"torch": 1})  # compares nothing
    table = tables.cases(results, limit=2)
    assert [row[:2] for row in table.rows] == [("resnet50-16x512x7x7", "float32"), ("resnet50-16x64x56x56", "bfloat16")]
    assert table.lines()[0] == "The 2 of 12 rows in which fastbn does worst against torch, worst first:"


def test_calls():
    lines = tables.calls(make_results()).lines()
    assert column(lines, "host µs", "small") == "12.3"
    assert column(lines, "launches", "small") == "-"
    assert column(lines, "held", "small") == "12.3 MB"
    results = make_results()
    results.calls = [call(1, None)]
    assert tables.calls(results).rows[0][7:9] == ("1", "-")


def test_cases_of_networks_name_the_slowest_first():
    results = only(networks=networks())
    table = network_tables.cases(results)
    assert table.header[6:] == ("torch ms", "convert", "fused", "torch norm share", "fused norm share")
    assert table.rows[0] == (
        *("unet", "small", "4x3x64x64", "bfloat16", "channels_last", "train_backward", "10.0", "-", "0.50", "-", "-"),
    )
    assert [row[6:9] for row in table.rows[1:]] == [
        ("20.0", "0.80", "1.25"),
        ("30.0", "1.00", "1.00"),
        ("200", "1.25", "2.00"),
    ]
    assert "Sources: torchvision (resnet50, unet)." in table.notes
    results.networks += [step("torch", {}, 0.314, network="mlp", peak_bytes=10**9), step("fused", {}, 0, network="mlp")]
    table = network_tables.cases(results)
    assert table.header[-2:] == ("torch peak", "fused peak")
    assert table.rows[-1][6:] == ("250", "-", "-", "31%", "0%", "1.00 GB", "-")


def test_means_of_networks():
    lines = network_tables.means(only(networks=networks())).lines()
    start = ("train_backward", "float32", "fused")
    assert cells(lines, *start) == [*start, "2", "1.58", "1.25", "2.00", "0", "resnet50-4x3x64x64"]
    start = ("train_backward", "float32", "convert")
    assert cells(lines, *start) == [*start, "2", "1.00", "0.80", "1.25", "1", "resnet50-4x3x64x64"]
    rows = network_tables.means(only(networks=networks())).rows
    assert [row[:3] for row in rows] == [
        ("train_backward", "float32", "convert"),
        ("train_backward", "float32", "fused"),
        ("train_backward", "bfloat16", "fused"),
        ("eval", "float32", "convert"),
        ("eval", "float32", "fused"),
    ]


def test_runs_of_networks_are_compared():
    old, new = only(networks=networks()), only(networks=networks())
    # The machine takes twice as long for all; the first case's fused model three times as long beside that.
    slower = steps(400, {"convert": 320, "fused": 600})
    new.networks = slower + [
        dataclasses.replace(each, median_us=2 * each.median_us, p20_us=2 * each.p20_us, p80_us=2 * each.p80_us)
        for each in new.networks[len(slower) :]
    ]
    new.networks += steps(1, {"fused": 1}, network="mlp")
    # A layer's time is not that of a network of the same name.
    old.measurements = new.measurements = layer((2, 3), "train", {"torch": 4, "fastbn": 2})
    comparison = compare.compare(old, new)
    assert comparison.network_drift == {"torch": 2, "convert": 2, "fused": 2} and comparison.drift["torch"] == 1
    assert (comparison.only_old, comparison.only_new) == (0, 2)
    assert len(comparison.changes) == 1 + 3 + 4
    (regression,) = comparison.regressions
    assert regression.record is slower[2]
    assert (regression.ratio, regression.time) == (pytest.approx(3), pytest.approx(3))
    text = "\n".join(compare.lines(comparison))
    assert "medians over the cases of networks: torch 2.000, convert 2.000, fused 2.000." in text
    assert re.search("resnet50-16x3x224x224-channels_last +float32 +train_backward +fused +3.00 x", text)


def test_means_by_network():
    table = network_tables.by_network(only(networks=networks()))
    assert table.header == ("network", "train_backward small", "train_backward usual", "eval small", "eval usual")
    assert table.rows == [
        ("resnet50", "1.25 (1.25)", "2.00 (2.00)", "-", "1.00 (1.00)"),
        ("unet", "0.50 (0.50)", "-", "-", "-"),
    ]


def test_noise_of_networks_is_stated_and_is_no_rival():
    results = only(networks=steps(100, {"fused": 50, "fused (again)": 40, "torch (again)": 110}))
    text = "\n".join(network_tables.means(results).lines())
    assert "noise: fused over itself 1.250, from 1.250 to 1.250, on 1 rows of cases." in text
    assert [row[2] for row in network_tables.means(results).rows] == ["fused"]
    assert network_tables.cases(results).header[6:9] == ("torch ms", "fused", "torch norm share")


def test_wrong_results_come_first_and_the_unsupported_are_counted():
    wrong, unsupported = (table(make_results()).lines() for table in (tables.wrong, tables.unsupported))
    assert wrong[0].startswith("WRONG RESULTS: 3,")
    assert cells(wrong, "fastbn") == ["fastbn", "b", "float32", "train", "3", "output: got 1, expected 2 | within 0.1"]
    assert cells(unsupported, "onednn") == ["onednn", "8", "float32 alone"]
    shown = _report(make_results())
    assert shown.index("") < shown.index(wrong[0]) < shown.index(unsupported[0]) - 1
    assert shown[shown.index(unsupported[0]) - 1] == ""


def test_copy():
    assert tables.copies(make_results()).lines()[-1].split() == ["67.1", "MB", "4100", "32.8"]


@pytest.mark.parametrize(
    "value, text",
    [(0.0012345, "0.00123"), (1, "1.00"), (9.999, "10.0"), (99.96, "100"), (123456, "123000"), (0, "0")],
)
def test_three_significant_digits(value, text):
    assert tables.significant(value) == text


TABLES = (
    tables.summary,
    tables.cases,
    tables.calls,
    *network_tables.TABLES,
    tables.wrong,
    tables.unsupported,
    tables.copies,
)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_no_records_no_lines(table):
    assert table(Results({}, {})).lines() == []
    assert table(make_results()).lines()


def without(name):
    """Return results without an implementation, as a run that was restricted or refused it."""
    results = make_results()
    results.measurements = [
        dataclasses.replace(m, speedup_over={k: v for k, v in m.speedup_over.items() if k != name})
        for m in results.measurements
        if m.implementation != name
    ]
    return results


def only(**fields):
    return Results({}, {}, **fields)


def with_other_names():
    results = make_results()
    for number in range(5):
        times = {"torch": 4, f"rival-{number}": 3, "fastbn-triton": 2, "fastbn": 1}
        results.measurements += layer((3, 5, 7), "later_mode+add", times, "int8", f"group {number}")
    results.machine = {"name": None, "gpu": GPU, "datasheet_gb_per_s": 4800}
    return results


PARTIAL = {
    "empty": lambda: Results({}, {}),
    "without torch": lambda: without("torch"),
    "without fastbn": lambda: without("fastbn"),
    "without a copy": lambda: dataclasses.replace(make_results(), copy=[]),
    "one measurement": lambda: only(measurements=layer((1, 1), "train", {"fastbn": 1})),
    "one sweep": lambda: only(measurements=layer((2, 1), "train", {"fastbn": 1}, group="sweep N")),
    "networks alone": lambda: only(networks=[step("fused", {})]),
    "other names": with_other_names,
}


@pytest.mark.slow
@pytest.mark.parametrize("make", PARTIAL.values(), ids=PARTIAL.keys())
def test_partial_results_make_tables_plots_and_a_report(make, tmp_path):
    results = make()
    for table in TABLES:
        assert all(isinstance(line, str) for line in table(results).lines())
    paths = plots.save_all(results, tmp_path)
    assert all(path.is_file() for path in paths)
    report.write(results, paths, tmp_path / "report.md")
    text = re.sub(r"\(data:[^)]*\)", "", (tmp_path / "report.md").read_text())
    assert not re.search(r"\b(nan|inf|None)\b", text)


def row_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def pixels(path):
    """Return rows of RGB tuples."""
    image = imread(path)
    return (image[..., :3] * 255).round().astype(int).reshape(-1, 3)


def has_colour(path, colour):
    return bool((pixels(path) == colour).all(axis=1).any())


def test_every_plot_is_written_and_shows_fastbn(tmp_path):
    paths = plots.save_all(make_results(), tmp_path)
    names = ["bandwidth", "speedup-float32", "speedup-bfloat16", "growth-float32"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        assert path.stat().st_size > 10_000
    assert has_colour(paths[0], FASTBN_COLOUR) and has_colour(paths[0], COMPILE_COLOUR)
    assert has_colour(paths[3], FASTBN_COLOUR) and not has_colour(paths[3], COMPILE_COLOUR)
    assert not has_colour(plots.save_all(without("fastbn"), tmp_path)[0], FASTBN_COLOUR)


def test_bandwidth_shows_the_copy_and_the_datasheet_where_it_is_known():
    results = make_results()

    def lines():
        (figure,) = plots.bandwidth(results).values()
        assert [axes.get_title() for axes in figure.axes[:3]] == ["train", "train_backward", "eval"]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        return legend, [list(line.get_ydata()) for line in figure.axes[0].lines]

    legend, drawn = lines()
    assert "copy" in legend and "datasheet" not in legend and [32.768] * 3 in drawn
    results.machine["datasheet_gb_per_s"] = 4800
    legend, drawn = lines()
    assert "datasheet" in legend and [4800, 4800] in drawn


def test_growth_draws_time_against_the_size_that_changes():
    (figure,) = plots.growth(make_results()).values()
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("train, Nx16x8x8", "N", "µs")
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([1, 10, 100], [1, 10, 100]) in drawn and ([1, 10, 100], [1000, 10000, 100000]) in drawn


@pytest.mark.parametrize("group, shape, size", [("sweep C", (8, 30, 5, 5), 30), ("sweep HW", (8, 16, 1, 300), 300)])
def test_other_sweeps(group, shape, size):
    results = Results({}, {}, measurements=layer(shape, "train", {"torch": 2, "fastbn": 1}, group=group))
    (figure,) = plots.growth(results).values()
    assert [size] in [list(line.get_xdata()) for line in figure.axes[0].lines]


def test_speedup_pages_hold_every_case_once():
    results = Results({}, {})
    shapes = [(channels, 8) for channels in range(1, 101)]
    for shape in shapes:
        group = f"group {shape[0] // 30}"
        results.measurements += layer(shape, "train", {"torch": shape[0], "fastbn": 1}, group=group)
    figures = plots.speedup(results)
    assert list(figures) == ["speedup-float32-1", "speedup-float32-2", "speedup-float32-3"]
    labels = [label for figure in figures.values() for label in row_labels(figure)]
    assert [label for label in labels if label[0].isdigit()] == ["x".join(map(str, shape)) for shape in shapes]
    for figure in figures.values():
        assert row_labels(figure)[0].startswith("over torch: group ")
        assert len(row_labels(figure)) <= 50
        assert len(figure.axes[0].lines[-1].get_xdata()) == sum(label[0].isdigit() for label in row_labels(figure))


def test_report_needs_no_other_file_and_holds_the_plots(tmp_path):
    paths = plots.save_all(make_results(), tmp_path)
    report.write(make_results(), paths, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    prefix = "data:image/png;base64,"
    assert all(link.startswith(prefix) for link in links)
    assert [base64.b64decode(link.removeprefix(prefix)) for link in links] == [path.read_bytes() for path in paths]
    assert not re.search(r"https?:|<img|\.png|\.json", text) and str(tmp_path) not in text


def test_report_states_machine_method_summary_and_wrong_results(tmp_path):
    report.write(make_results(), [], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# fastbn on Some \\| CPU\n")
    assert "The run is complete." in text
    assert "**WRONG RESULTS: 3." in text.partition("## ")[0]
    assert "revision 0123abcd, with changes that are not committed" in text
    assert "Rounds: 21 to 21. The 80th percentile of a time is 20.0% of it above the 20th" in text
    assert "| train | float32 | 3 | 1.59 | 0.50 | 4.00 | 1 | 1.50 (1) | - | 70% | resnet50-16x512x7x7 |" in text
    assert "| torch kernel | fastbn kernel |" in text
    assert "Not drawn here." in text and "Not measured here." not in text
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    sections = ["Summary", "Figures", "Calls", "Networks", "Refused", "Every case", "Copy bandwidth"]
    assert headings == ["How it was measured", *sections]


def test_report_says_what_is_absent(tmp_path):
    report.write(Results({}, {}), [], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "**Not complete: interrupted, or out of time.**" in text
    assert text.count("Not measured here.") == 5
    assert "WRONG" not in text and "Rounds" not in text and "CUDA" not in text


def test_report_of_a_gpu(tmp_path):
    results = make_results()
    results.machine |= {"device": "cuda", "gpu": GPU, "datasheet_gb_per_s": 4800, "cuda": "13.0", "cudnn": 91002}
    report.write(results, [], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "between two CUDA events" in text
    assert "| bandwidth by its datasheet | 4800 GB/s |" in text
    assert "150 GB, L2 60.0 MB, 132 multiprocessors, driver 570.1" in text


def test_markdown_tables_survive_what_cells_hold(tmp_path):
    results = Results({}, {})
    results.refusals = [Refusal("a|b", "<i>", "`train`", "_x_ [y](z)", True, "one\ntwo | *three* \\")]
    report.write(results, [], tmp_path / "report.md")
    (row,) = [line for line in (tmp_path / "report.md").read_text().splitlines() if "three" in line]
    assert row == r"| \_x\_ \[y\](z) | a\|b | \<i\> | \`train\` | 1 | one two \| \*three\* \\ |"
