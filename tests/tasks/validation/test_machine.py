import json
import os

import numpy as np
import torch

from tasks.validation.machine import Machine, machine, main, measure, times_s

FOUND = Machine(
    threads=2,
    read_bytes_per_s={10: 8.0, 20: 4.0, 40: 3.0},
    operations_per_s={"float32": 5.0, "bfloat16": 7.0, "int8": 9.0},
)


def test_bandwidth_depends_on_what_is_read():
    assert [FOUND.bandwidth(size) for size in (1, 10, 15, 30, 1000)] == [8, 8, 6, 3.5, 3]


def test_the_better_of_two_measurements_counts():
    other = FOUND.model_copy(
        update={
            "read_bytes_per_s": {10: 9.0, 20: 1.0, 40: 3.0},
            "operations_per_s": FOUND.operations_per_s | {"int8": 1},
        }
    )
    best = FOUND.best_with(other)
    assert best.read_bytes_per_s == {10: 9, 20: 4, 40: 3}
    assert best.operations_per_s == FOUND.operations_per_s


def test_limits_survive_json():
    assert Machine.model_validate(json.loads(FOUND.model_dump_json())) == FOUND


def test_every_function_is_timed_in_turn_and_once_before():
    calls = []
    times = times_s([lambda: calls.append("a"), lambda: calls.append("b")], 0.0)
    assert calls == ["a", "b"] * 4
    assert len(times) == 6
    assert min(times) > 0


def test_no_product_and_no_copy_is_faster_than_the_measured_limits():
    before = torch.get_num_threads()
    found = measure(1, sizes_mb=(4, 64), try_s=0.05)
    assert torch.get_num_threads() == before
    assert set(found.read_bytes_per_s) == {4_000_000, 64_000_000}
    side = 512
    a, b = np.ones((side, side), np.float32), np.ones((side, side), np.float32)
    product_s = min(times_s([lambda: a @ b], 0.05))
    threads = 2 * len(os.sched_getaffinity(0))  # numpy uses as many as it likes
    assert 2 * side**3 / product_s < 1.5 * threads * found.operations_per_s["float32"]
    matrix = np.ones(16_000_000, np.float32)
    assert matrix.nbytes / min(times_s([matrix.max], 0.05)) < 1.5 * found.read_bytes_per_s[64_000_000]
    # between a machine of the nineties and one that does not exist
    assert 1e8 < found.read_bytes_per_s[64_000_000] < 1e13
    assert 1e7 < found.operations_per_s["bfloat16"] < 1e15
    assert 1e8 < found.operations_per_s["int8"] < 1e15


def test_a_process_measures_once(monkeypatch):
    monkeypatch.setattr("tasks.validation.machine.measure", lambda threads: FOUND)
    machine.cache_clear()
    try:
        assert machine(2) is machine(2) is FOUND
    finally:
        machine.cache_clear()


def test_the_limits_are_printed_as_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        "tasks.validation.machine.measure", lambda threads: FOUND.model_copy(update={"threads": threads})
    )
    monkeypatch.setattr("sys.argv", ["machine", "--threads", "3"])
    main()
    assert Machine.model_validate_json(capsys.readouterr().out).threads == 3
