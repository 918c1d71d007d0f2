"""The fake CUDA device refuses what CUDA refuses, counts what makes the host wait, and computes as the CPU does."""

import threading

import pytest
import torch
from fake_device import fake_cuda
from torch import nn


@pytest.fixture
def ledger():
    with fake_cuda() as ledger:
        yield ledger


@pytest.fixture
def x(ledger):
    tensor = torch.arange(6.0).view(2, 3).to("cuda")
    ledger.clear()
    return tensor


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: nn.functional.linear(x, torch.ones(2, 3)),
        lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda x: nn.functional.embedding(torch.zeros(2, dtype=torch.long), x),
        lambda x: x.index_select(0, torch.tensor(1)),
    ],
)
def test_tensors_of_two_devices_do_not_mix(x, operation):
    with pytest.raises(RuntimeError, match="same device"):
        operation(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([1])],
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x[0].__setitem__(0, 5.0),
        lambda _x: torch.cuda.synchronize(),
    ],
)
def test_what_the_host_must_wait_for_is_counted(ledger, x, operation):
    operation(x)
    assert len(ledger.waits) == 1


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x * 2 + torch.tensor(1.0),
        lambda x: torch.where(x > 1, x, 0.0),
        lambda x: x[:, 1:].transpose(0, 1),
        lambda x: x[torch.zeros(1, dtype=torch.long, device=x.device)],
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: torch.full((3,), 1.0, device=x.device),
        lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    ],
)
def test_what_it_need_not_wait_for_is_not(ledger, x, operation):
    operation(x)
    assert not ledger.waits


def test_operations_are_counted_and_views_are_not(ledger, x):
    with ledger.under("here"):
        (x.view(3, 2).t() * 2).sum()
    assert dict(ledger.operations) == {("here", "mul"): 1, ("here", "sum"): 1}


def test_a_graph_computes_again_on_the_same_memory_with_the_hosts_numbers_of_the_capture(x):
    total, factor = torch.zeros(3, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += (x * factor).sum(0)
    x.fill_(1.0)
    factor = 100
    total.zero_()
    graph.replay()
    graph.replay()
    assert total.tolist() == [8.0, 8.0, 8.0]


@pytest.mark.parametrize("operation", [lambda x: x.sum().item(), lambda x: x + torch.ones(3, device="cpu").to("cuda")])
def test_nothing_is_asked_of_the_host_while_a_graph_is_captured(x, operation):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(
        torch.cuda.CUDAGraph()
    ):  # fmt: skip
        operation(x)
    assert x.sum().item() == 15.0  # and afterwards all is as before


def test_a_graph_does_not_keep_alive_what_it_reads(x):
    graph, other = torch.cuda.CUDAGraph(), x * 2
    with torch.cuda.graph(graph):
        x.add_(other)
    graph.replay()
    del other
    with pytest.raises(RuntimeError, match="memory that was freed"):
        graph.replay()


def test_autocast_and_gradients_are_as_on_the_cpu(ledger):
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)).to(device)
        with torch.autocast(device, torch.bfloat16):
            output = model(torch.ones(3, 4).to(device))
        assert output.dtype == torch.bfloat16 and output.device.type == device
        output.float().sum().backward()
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_as_on_the_cpu(ledger, dtype):
    results = []
    for device in ("cpu", "cuda"):
        draw = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, 4, 5, 8, generator=draw).to(device, dtype).requires_grad_() for _ in "qkv")
        mask = torch.ones(5, 5, dtype=torch.bool).tril().to(device)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output.float().square().sum().backward()
        results.append([x.detach().cpu().float() for x in (output, query.grad, key.grad, value.grad)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
    assert ledger.operations["start", "_scaled_dot_product_efficient_attention_backward"] == 1


def test_moving_a_model_keeps_tied_weights_tied(ledger):
    head, embedding = nn.Linear(2, 3, bias=False), nn.Embedding(3, 2)
    head.weight = embedding.weight
    both = nn.ModuleList([head, embedding]).to("cuda")
    assert both[0].weight is both[1].weight and both[0].weight.device.type == "cuda"


def test_other_threads_have_the_device_too_and_are_counted_apart(ledger):
    thread = threading.Thread(target=lambda: torch.ones(2).to("cuda").sum().item())
    thread.start()
    thread.join()
    assert ledger.launches == {"thread": 1} and len(ledger.waits) == 2


def test_outside_of_the_context_there_is_no_device():
    with fake_cuda():
        assert torch.cuda.is_available() and torch.accelerator.is_available()
    assert not torch.cuda.is_available() and not torch.accelerator.is_available()
