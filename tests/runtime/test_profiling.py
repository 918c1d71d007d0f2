"""A profiled block leaves a trace that says which operations ran."""

import json

import torch

from pipeline.runtime.profiling import profiled


def test_trace_and_table_name_the_operations(tmp_path):
    with profiled(tmp_path / "profile", 7):
        torch.randn(50, 50) @ torch.randn(50, 50)
    events = json.loads((tmp_path / "profile/step_7.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    table = (tmp_path / "profile/step_7.txt").read_text()
    assert "aten::mm" in table and "Self CPU time total" in table
