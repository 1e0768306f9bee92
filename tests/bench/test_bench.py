"""The benchmark: its timer, its gate, its measurements and its files. Nothing here asserts a speed."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import signal

import pytest
import torch
from torch import nn

import fastbn
from bench import bandwidth, calls, command, compare, results, runner, workloads
from bench.machine import machine
from bench.results import Measurement, Results
from fastbn.cli import main
from fastbn.measure import implementations, operations, timer
from fastbn.measure.gate import expect, why_wrong
from fastbn.measure.implementations import Implementation, Prepared
from fastbn.measure.inputs import make_inputs
from fastbn.measure.timer import Budget
from fastbn.measure.workload import Workload
from fastbn.testing.cases import make_case
from tests.implementations import require_gpu

CPU = torch.device("cpu")
BRIEF = Budget(seconds=0.002, warm_up_seconds=0.0, min_rounds=2)


def operation(name: str) -> operations.Operation:
    return next(each for each in operations.OPERATIONS if str(each) == name)


def prepare(name, op, inputs) -> Prepared:
    known = {each.name: each for each in implementations.implementations(inputs.input.device)}
    return known[name].prepare(operation(op), inputs)


# The table of docs/design.md: tensors moved, and bits per element beside them.
@pytest.mark.parametrize(
    "op, tensors, bits",
    [
        ("train", 2, 0),
        ("train+relu", 2, 0),
        ("train+add+relu", 3, 0),
        ("train+silu", 2, 0),
        ("train_backward", 5, 0),
        ("train_backward+relu", 5, 0),
        ("train_backward+add+relu", 7, 2),
        ("train_backward+silu", 5, 0),
        ("eval", 2, 0),
        ("frozen", 5, 0),
    ],
)
def test_floor_bytes(op, tensors, bits):
    assert operation(op).floor_bytes(numel=800, itemsize=2) == tensors * 1600 + bits * 100


def test_a_residual_before_another_activation_is_read_again():
    assert operations.Operation("train_backward", "silu", True).floor_bytes(8, 4) == 8 * 32


@pytest.mark.parametrize("name", workloads.SUITES)
def test_suites_name_each_workload_once(name):
    names = [str(workload) for workload in workloads.suite(name)]
    assert names and len(set(names)) == len(names)


def test_the_activations_of_resnet50_are_those_of_the_network():
    from bench.architectures import resnet50

    seen = set()
    with torch.device("meta"):
        model = resnet50()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape[1:3])))
        model(torch.empty(2, 3, 224, 224))
    assert seen == set(workloads.RESNET50)


def test_inputs_are_the_same_each_time_and_their_gradient_keeps_off_kinks():
    case = make_case("bench", 4, 8, 9, 9, layout="channels_last")
    first, second = (make_inputs(case, torch.bfloat16, CPU) for _ in range(2))
    for one, other in zip(vars(first).values(), vars(second).values()):
        assert one is other or torch.equal(one, other)
    assert first.input.is_contiguous(memory_format=torch.channels_last)
    assert not first.input.is_contiguous()
    z = nn.functional.batch_norm(first.input.float(), None, None, first.weight, first.bias, True)
    near = (z.abs() < 0.01) | ((z + first.residual).abs() < 0.01)
    assert near.any() and not first.grad_out[near].any()
    assert (first.grad_out != 0).float().mean() > 0.7


GATED = [
    make_case("gated", 8, 5, 6, 7),
    make_case("gated", 8, 5, 6, 7, layout="channels_last"),
    make_case("gated", 64, 33),
    make_case("gated", 4, 3, 2, 5, 4, layout="channels_last_3d"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GATED, ids=str)
def test_the_gate_passes_what_is_right(case, dtype):
    inputs = make_inputs(case, dtype, CPU)
    passed = set()
    for op in operations.OPERATIONS:
        workload = Workload("gated", case, dtype, op)
        for rival in implementations.implementations(CPU):
            if rival.compiles or rival.why_not(workload) or (rival.name, dtype) == ("onednn", torch.float16):
                continue
            assert why_wrong(rival.prepare(op, inputs), inputs, expect(op, inputs)) is None, f"{rival.name} {workload}"
            passed.add((rival.name, str(op)))
    assert {(name, str(op)) for name in ("torch", "fastbn") for op in operations.OPERATIONS} <= passed


def _spoiled(results, index, change):
    spoiled = list(results)
    spoiled[index] = change(spoiled[index].detach().clone())
    return tuple(spoiled)


def _off_in_the_last_channel(tensor):
    tensor.select(tensor.dim() and min(1, tensor.dim() - 1), -1).mul_(1.1)
    return tensor


def _nan_in_one_element(tensor):
    tensor.flatten()[tensor.numel() // 3] = torch.nan
    return tensor


WRONG = {
    "the output is off in the last channel": (0, _off_in_the_last_channel),
    "one element is NaN": (0, _nan_in_one_element),
    "the output is zero": (0, torch.zeros_like),
    "the output has another dtype": (0, lambda t: t.double()),
    "the output has another memory format": (0, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "the output has another shape": (0, lambda t: t[:1]),
    "grad_input is shifted": (1, lambda t: t + 0.2),
    "grad_weight is off in the last channel": (2, lambda t: torch.cat([t[:-1], 1.5 * t[-1:]])),
    "grad_bias is the mean": (3, lambda t: t / 336),
    "grad_residual is not masked": (4, lambda t: t + (t == 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index, change", WRONG.values(), ids=list(WRONG))
def test_the_gate_refuses_what_is_wrong(index, change, dtype):
    inputs = make_inputs(GATED[0], dtype, CPU)
    op = operation("train_backward+add+relu")
    right = prepare("torch", str(op), inputs)
    assert why_wrong(right, inputs, expect(op, inputs)) is None
    right = prepare("torch", str(op), inputs)
    wrong = dataclasses.replace(right, call=lambda: _spoiled(right.call(), index, change))
    names = ("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")
    assert why_wrong(wrong, inputs, expect(op, inputs)).startswith(f"{names[index]}: ")


def test_the_gate_sees_running_statistics_that_are_biased_or_left_alone():
    inputs, op = make_inputs(GATED[0], torch.float32, CPU), operation("train")
    count = inputs.case.count
    for name, change in (
        ("running_var", lambda module: module.running_var.sub_(0.1 / count)),
        ("running_mean", lambda module: module.running_mean.copy_(inputs.running_mean)),
    ):
        right = prepare("torch", "train", inputs)

        def call(right=right, change=change):
            results = right.call()
            change(right.module)
            return results

        assert why_wrong(dataclasses.replace(right, call=call), inputs, expect(op, inputs)).startswith(f"{name}: ")


def test_the_gate_compares_the_first_and_the_last_of_many_channels(monkeypatch):
    monkeypatch.setattr("fastbn.measure.gate.MAX_COMPARED", 10)
    inputs, op = make_inputs(make_case("gated", 7, 50, 3), torch.float32, CPU), operation("train")
    right = prepare("torch", "train", inputs)
    assert why_wrong(right, inputs, expect(op, inputs)) is None
    right = prepare("torch", "train", inputs)
    wrong = dataclasses.replace(right, call=lambda: _spoiled(right.call(), 0, _off_in_the_last_channel))
    assert why_wrong(wrong, inputs, expect(op, inputs))


class ScriptedClock:
    """Sample times from lists, and who was called when."""

    def __init__(self, *times):
        self.times, self.called, self.host_seconds = [iter(each) for each in times], [], None

    def prepare(self, host_seconds):
        self.host_seconds = host_seconds

    def sample(self, call):
        index = call()
        self.called.append(index)
        seconds = next(self.times[index])
        return lambda: seconds

    def wait(self):
        pass


def test_each_call_has_one_sample_a_round():
    clock = ScriptedClock([1, 2, 3], [10, 20, 30])
    budget = Budget(seconds=0, warm_up_seconds=0, min_rounds=3)
    samples = timer.time_in_turns([lambda: 0, lambda: 1], clock, budget)
    assert samples == [[1, 2, 3], [10, 20, 30]]
    assert len(clock.host_seconds) == 2 and all(seconds > 0 for seconds in clock.host_seconds)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_no_call_follows_itself_and_each_follows_every_other_as_often(number):
    rounds = 2000
    clock = ScriptedClock(*[iter(lambda: 1.0, None)] * number)
    calls = [lambda index=index: index for index in range(number)]
    timer.time_in_turns(calls, clock, Budget(0, 0, rounds, rounds))
    called = clock.called
    assert all(sorted(called[i : i + number]) == list(range(number)) for i in range(0, len(called), number))
    followed = collections.Counter(itertools.pairwise(called))
    if number > 1:
        assert len(followed) == number * (number - 1) and all(first != second for first, second in followed)
        expected = rounds / (number - 1)
        assert all(0.7 * expected < times < 1.4 * expected for times in followed.values()), followed


def test_rounds_end_with_the_budget():
    forever = ScriptedClock(iter(lambda: 1.0, None))
    assert len(timer.time_in_turns([lambda: 0], forever, Budget(1e9, 0, 2, max_rounds=9))[0]) == 9
    few = ScriptedClock(iter(lambda: 1.0, None))
    assert len(timer.time_in_turns([lambda: 0], few, Budget(0, 0, 4))[0]) == 4


def test_garbage_is_collected_again_afterwards():
    import gc

    timer.time_in_turns([lambda: None], timer.HostClock(), BRIEF)
    assert gc.isenabled()


def test_statistics_of_samples():
    times = timer.summarize([1e-6, 2e-6, 3e-6, 4e-6, 6e-6, 10e-6])
    assert times.rounds == 6
    assert (times.median_us, times.p20_us, times.p80_us) == pytest.approx((3.5, 2, 6))
    # The rival drifts threefold with this one: the ratio of each round is 2.
    assert timer.speedup([1, 3, 1.5], [2, 6, 3]) == 2


def test_the_hosts_clock_times_the_call():
    import time

    (samples,) = timer.time_in_turns([lambda: time.sleep(0.002)], timer.HostClock(), BRIEF)
    assert all(0.002 <= seconds < 0.1 for seconds in samples)


def _brief_runner(*rivals):
    measured = Results(machine(CPU), {}, copy=[results.CopyPoint(1, 1.0, 1.0)])
    return runner.Runner(CPU, rivals, BRIEF, measured), measured


def _workload(op="train", case=GATED[0]):
    return Workload("gated", case, torch.float32, operation(op))


def test_a_wrong_implementation_is_not_timed():
    stock = implementations.implementations(CPU)[0]

    def wrong(op, inputs):
        right = stock.prepare(op, inputs)
        return dataclasses.replace(right, call=lambda: _spoiled(right.call(), 0, _off_in_the_last_channel))

    def broken(op, inputs):
        raise RuntimeError("out of\nluck")

    run, measured = _brief_runner(stock, Implementation("wrong", wrong), Implementation("broken", broken))
    run.layer(_workload()).run()
    run.call(_workload()).run()
    assert [each.implementation for each in measured.measurements + measured.calls] == ["torch", "torch"]
    assert measured.measurements[0].speedup_over == {}
    refused = {refusal.implementation: refusal for refusal in measured.refusals}
    assert refused["wrong"].wrong and refused["wrong"].reason.startswith("output: got ")
    assert not refused["broken"].wrong and refused["broken"].reason == "RuntimeError: out of"
    assert refused["broken"].count == 2


def test_what_compiles_takes_part_only_where_asked():
    rivals = implementations.implementations(CPU)
    run, measured = _brief_runner(*(rival for rival in rivals if rival.compiles or rival.name == "torch"))
    run.layer(_workload()).run()
    assert [each.implementation for each in measured.measurements] == ["torch"]
    assert measured.refusals == []


@pytest.mark.slow  # compares times, and so runs alone
def test_a_measurement_holds_what_it_was_made_of():
    run, measured = _brief_runner(*[r for r in implementations.implementations(CPU) if r.name in ("torch", "fastbn")])
    measured.copy[:] = [results.CopyPoint(1 << 12, 1.0, 8.0)]
    run.layer(_workload("train_backward")).run()
    stock, fast = measured.measurements
    assert (stock.kernel, fast.kernel) == ("native", "cpu: channel_tiles")
    assert fast.tensor_bytes == 8 * 5 * 6 * 7 * 4 and fast.floor_bytes == 5 * fast.tensor_bytes
    assert fast.gb_per_s == pytest.approx(fast.floor_bytes / fast.median_us / 1e3)
    assert fast.copy_share == pytest.approx(fast.gb_per_s / 8)
    assert fast.speedup_over["torch"] == pytest.approx(1 / stock.speedup_over["fastbn"], rel=0.5)
    assert fast.p20_us <= fast.median_us <= fast.p80_us


def test_held_and_peak_bytes():
    case = make_case("block", 8, 16, 32, 32)
    inputs = make_inputs(case, torch.float32, CPU)
    size = case.numel * 4
    for name in ("torch", "fastbn"):
        block = prepare(name, "train_backward+relu", inputs)
        # The output alone: relu of torch.nn, in place, saves that very tensor.
        assert size <= calls.held_bytes(block, inputs.input) < 1.01 * size, name
        assert 2 * size <= calls.peak_bytes(block.call, CPU) < 4.01 * size, name
    # silu of torch.nn saves what it is given: a second tensor.
    assert calls.held_bytes(prepare("torch", "train_backward+silu", inputs), inputs.input) >= 2 * size
    assert calls.held_bytes(prepare("fastbn", "train_backward+silu", inputs), inputs.input) < 1.01 * size
    assert calls.count_launches(lambda: None, CPU) == (None, [])


def test_copy_bandwidth_is_interpolated_by_time():
    run = Results({}, {}, copy=[results.CopyPoint(1000, 2.0, 1.0), results.CopyPoint(3000, 4.0, 1.5)])
    assert run.copy_gb_per_s(2000) == pytest.approx(2 * 2000 / 3.0 / 1e3)
    assert run.copy_gb_per_s(10) == 1.0 and run.copy_gb_per_s(10**9) == 1.5


def test_the_schema_names_the_fields_of_the_records():
    schema = json.loads(results.SCHEMA.read_text())
    assert set(schema["properties"]) == {"format"} | {field.name for field in dataclasses.fields(Results)}
    times, layer = schema["$defs"]["times"], schema["$defs"]["timed_layer"]
    shared = {"measurements": (times, layer), "calls": (times, layer), "networks": (times,)}
    for name, record in results._RECORDS.items():
        item = schema["properties"][name]["items"]
        named = [set(part["properties"]) for part in (item, *shared.get(name, ()))]
        assert set.union(*named) == {field.name for field in dataclasses.fields(record)}
        for part in (item, *shared.get(name, ())):
            assert set(part["required"]) == set(part["properties"])


@pytest.fixture
def brief(monkeypatch):
    """Return arguments for a run of some seconds on one small case."""
    monkeypatch.setattr(bandwidth, "_LARGEST", {"cpu": 2**16, "cuda": 2**16})
    return [
        *(
            "bench",
            "--suite",
            "quick",
            "--device",
            "cpu",
            "--case",
            "lenet",
            "--dtype",
            "float32",
            "--op",
            "train,eval",
        ),
        # Selected by name, since other tests may have registered backends.
        *("--implementation", "torch,onednn,fastbn", "--seconds", "0.01", "--part", "layers"),
    ]


def override(brief, *arguments):
    """Return the arguments of `brief`, each name with its value, with others in place of those of the same name."""
    pairs = zip(brief[1::2], brief[2::2], strict=True)
    return [brief[0], *(part for pair in pairs if pair[0] not in arguments for part in pair), *arguments]


@pytest.mark.parametrize("path", sorted((results.SCHEMA.parent / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_records_fit_the_schema(path):
    read_valid(path)


def read(path):
    return json.loads(path.read_text())


def read_valid(path):
    import jsonschema  # here, for a visit to a GPU may do without; where it is asked for it must be there

    content = read(path)
    jsonschema.validate(content, json.loads(results.SCHEMA.read_text()))
    return content


def test_a_run_writes_valid_json_plots_and_a_table(brief, tmp_path, capsys):
    path, plots = tmp_path / "new" / "run.json", tmp_path / "plots"
    assert main([*brief, "--json", str(path), "--plots", str(plots)]) == 0
    content = read_valid(path)
    assert content["complete"]
    assert {(each["op"], each["implementation"]) for each in content["measurements"]} == {
        (op, name) for op in ("train", "eval") for name in ("torch", "onednn", "fastbn")
    }
    assert (plots / "report.md").read_text().startswith("#") and list(plots.glob("*.png"))
    shown = capsys.readouterr().out
    assert "lenet-256x6x24x24" in shown and f"torch {torch.__version__}" in shown
    loaded = results.load(path)
    assert dataclasses.asdict(loaded) | {"format": results.FORMAT} == json.loads(json.dumps(content)) | {
        key: [item | ({"shape": tuple(item["shape"])} if "shape" in item else {}) for item in content[key]]
        for key in ("measurements", "calls")
    }
    # The same records again, without measuring.
    assert main(["bench", "--load", str(path), "--compare", str(path)]) == 0
    assert "0 regressions of 2 cases" in capsys.readouterr().out


def test_calls_are_valid_too(brief, tmp_path):
    path = tmp_path / "run.json"
    arguments = [argument for argument in brief if argument != "layers"]
    arguments[arguments.index("lenet")] = "small*"
    arguments[arguments.index("train,eval")] = "train_backward+relu"
    assert main([*arguments, "calls", "--shape", "32x128", "--json", str(path)]) == 0
    names = [call["implementation"] for call in read_valid(path)["calls"]]
    assert names == ["torch", "fastbn"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["keyboard", "terminate"])
def test_an_interrupt_keeps_what_was_measured(brief, tmp_path, capsys, monkeypatch, how):
    path = tmp_path / "run.json"
    layer, made = runner.Runner.layer, []

    def interrupted(self, workload):
        made.append(workload)
        if len(made) == 1:
            return layer(self, workload)
        stop = signal.SIGTERM if how == "terminate" else signal.SIGINT
        return runner.Step("interrupted", 1.0, lambda: os.kill(os.getpid(), stop))

    monkeypatch.setattr(runner.Runner, "layer", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started pytest with &
    try:
        assert main([*brief, "--json", str(path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    content = read_valid(path)
    assert not content["complete"]
    assert {each["op"] for each in content["measurements"]} == {"train"}
    shown = capsys.readouterr().out
    assert "Not complete" in shown and "lenet-256x6x24x24" in shown


@pytest.mark.slow
def test_a_step_that_fails_keeps_what_was_measured(brief, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    layer, made = runner.Runner.layer, []

    def fail():
        raise RuntimeError("the device is lost")

    def failing(self, workload):
        made.append(workload)
        return layer(self, workload) if len(made) == 1 else runner.Step("failing", 1.0, fail)

    monkeypatch.setattr(runner.Runner, "layer", failing)
    with pytest.raises(RuntimeError, match="lost"):
        main([*brief, "--json", str(path)])
    assert len(read_valid(path)["measurements"]) == 3


def test_the_time_limit_ends_a_run_between_steps(brief, tmp_path):
    path = tmp_path / "run.json"
    assert main([*brief, "--json", str(path), "--time-limit", "0"]) == 0
    content = read_valid(path)
    assert not content["complete"] and content["measurements"] == []


@pytest.mark.slow
def test_a_wrong_fastbn_fails_the_command(brief, monkeypatch, capsys):
    forward = fastbn.BatchNorm2d.forward
    monkeypatch.setattr(fastbn.BatchNorm2d, "forward", lambda self, x, residual=None: forward(self, x, residual) * 1.01)
    assert main(brief) == 1
    assert "output: got" in capsys.readouterr().out


@pytest.mark.slow
def test_against_itself_times_a_second_instance(brief, tmp_path):
    path = tmp_path / "run.json"
    arguments = ["--op", "train", "--implementation", "torch,fastbn", "--against-itself", "--json", str(path)]
    assert main(override(brief, *arguments)) == 0
    names = [each["implementation"] for each in read_valid(path)["measurements"]]
    assert names == ["torch", "fastbn", "torch (again)", "fastbn (again)"]


def test_list_names_what_would_be_measured(brief, capsys):
    assert main([*brief, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "copy",
        "lenet-256x6x24x24 float32 train",
        "lenet-256x6x24x24 float32 eval",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "nothing"], "expected patterns that some case fits"),
        (["--implementation", "cudnn"], "--implementation: expected some of torch, "),
        (["--load", "missing.json"], "--load: cannot read missing.json: No such file"),
        (["--compare", "missing.json"], "--compare: cannot read missing.json: No such file"),
    ],
)
def test_bad_arguments(brief, capsys, arguments, message):
    assert main(override(brief, *arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected JSON"),
        ("[]", "expected the format 'fastbn bench 1', got None"),
        ('{"format": "fastbn bench 0"}', "got 'fastbn bench 0'"),
        ('{"format": "fastbn bench 1"}', "expected the fields of"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        results.load(path)


def measured(case, implementation, median_us, speedup_over=None, spread=0.02):
    return Measurement(
        median_us=median_us,
        p20_us=median_us * (1 - spread / 2),
        p80_us=median_us * (1 + spread / 2),
        rounds=9,
        group="g",
        case=case,
        shape=(2, 3),
        layout="contiguous",
        dtype="float32",
        op="train",
        implementation=implementation,
        kernel="k",
        tensor_bytes=24,
        floor_bytes=48,
        gb_per_s=1.0,
        copy_share=1.0,
        speedup_over=speedup_over or {},
    )


def run_of(*measurements):
    return Results({}, {}, complete=True, measurements=list(measurements))


def test_compare_takes_times_in_units_of_torchs():
    old = run_of(measured("a", "torch", 100.0), measured("a", "fastbn", 50.0, {"torch": 2.0}))
    slower_machine = run_of(measured("a", "torch", 200.0), measured("a", "fastbn", 100.0, {"torch": 2.0}))
    comparison = compare.compare(old, slower_machine)
    assert comparison.regressions == [] and comparison.changes[0].ratio == 1
    assert comparison.drift == {"torch": 2, "fastbn": 2}


def pair_of(times, torch_times):
    """Make a run of the cases a, b, c, ... with both implementations."""
    cases = zip("abcdefgh", times, torch_times)
    return run_of(
        *(
            each
            for case, time, torch_time in cases
            for each in (
                measured(case, "torch", torch_time),
                measured(case, "fastbn", time, {"torch": torch_time / time}),
            )
        )
    )


def test_a_regression_shows_in_units_of_torchs_time_and_by_itself():
    old = pair_of([100] * 5, [200] * 5)
    # a: slower; b: only torch is faster; c: the machine is slower, for both; d, e: as before.
    new = pair_of([150, 100, 150, 100, 100], [200, 133, 300, 200, 200])
    assert [change.record.case for change in compare.compare(old, new).regressions] == ["a"]
    back = compare.compare(new, old)
    assert back.regressions == []
    assert [change.record.case for change in back.changes if change.is_improvement] == ["a"]


def test_compare_lists_regressions_first_and_counts_the_rest():
    old = run_of(*(measured(name, "fastbn", 100.0) for name in "abcde"))
    times = {"a": 105.0, "b": 150.0, "c": 50.0, "d": 300.0, "f": 1.0}
    comparison = compare.compare(old, run_of(*(measured(name, "fastbn", time) for name, time in times.items())))
    assert [change.record.case for change in comparison.regressions] == ["d", "b"]
    assert (comparison.only_old, comparison.only_new) == (1, 1)
    text = "\n".join(compare.lines(comparison))
    assert text.index("2 regressions of 4 cases") < text.index(" 3.00 x") < text.index(" 1.50 x")
    assert text.index(" 1.50 x") < text.index("1 improvements of 4 cases") < text.index(" 0.50 x")


def test_compare_leaves_alone_what_is_within_the_noise():
    old, new = (run_of(measured("a", "fastbn", time, spread=0.5)) for time in (100.0, 170.0))
    assert compare.compare(old, new).regressions == []
    precise = run_of(measured("a", "fastbn", 170.0))
    assert compare.compare(run_of(measured("a", "fastbn", 100.0)), precise).regressions


@pytest.mark.slow
def test_a_suspected_regression_is_measured_again(brief, tmp_path, capsys, monkeypatch):
    path = tmp_path / "old.json"
    assert main(override(brief, "--op", "train", "--json", str(path))) == 0
    content = read_valid(path)
    for each in content["measurements"]:
        if each["implementation"] == "fastbn":  # as if it had been so fast that no noise hides the difference
            for name in ("median_us", "p20_us", "p80_us"):
                each[name] /= 1000
            each["speedup_over"]["torch"] *= 1000
    path.write_text(json.dumps(content))
    append, timed = runner.Runner._append_measurements, []
    monkeypatch.setattr(
        runner.Runner, "_append_measurements", lambda self, *about: timed.append(about) or append(self, *about)
    )
    new = tmp_path / "new.json"
    assert main(override(brief, "--op", "train", "--compare", str(path), "--json", str(new))) == 1
    assert "1 regressions of 1 cases" in capsys.readouterr().out
    assert len(timed) == 1 + command.CONFIRMATIONS
    assert len(read_valid(new)["measurements"]) == 3


@pytest.mark.gpu
def test_device_time_of_a_copy_is_plausible():
    require_gpu()
    device = torch.device("cuda")
    points = bandwidth.measure_copies(device, timer.clock_of(device), Budget(0.05))
    # The limits are a slow laptop's GPU and a little more than any datasheet, which a copy within L2 would exceed.
    assert 50 < points[-1].gb_per_s < (machine(device)["datasheet_gb_per_s"] or 10000)


@pytest.mark.gpu
def test_launches_are_those_of_the_plan():
    require_gpu()
    device = torch.device("cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # every fill is a launch of its own
    inputs = make_inputs(make_case("launches", 8, 16, 14, 14), torch.bfloat16, device)
    launches, names = calls.count_launches(prepare("fastbn", "train+relu", inputs).call, device)
    assert launches == fastbn.explain(inputs.input, activation="relu").launches, names


@pytest.mark.gpu
def test_the_quick_suite_runs_on_a_gpu(tmp_path):
    require_gpu()
    path = tmp_path / "run.json"
    arguments = ["--suite", "quick", "--device", "cuda", "--op", "train,train+relu", "--seconds", "0.02"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    content = read(path)
    assert content["complete"] and content["measurements"] and content["calls"][0]["launches"] > 0
