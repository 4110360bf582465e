"""What a step is predicted to need, beside what it takes."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data.medical_vlm_dataset import Draw
from engine.training.memory import LiveBytes, MemoryModel, measure

CPU = torch.device("cpu")


def test_live_bytes_follow_what_lives():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        assert live.now == live.peak == 8000
        del a, b
        assert live.now == 4000, "a view keeps its storage"
        del view
        assert live.now == 0
        torch.ones(10).add_(1)
    assert live.peak == 8000


def test_cases_that_fit_are_counted_from_the_need():
    model = MemoryModel(fixed=1000, per_case=300)
    assert model.needed(4) == 2200
    assert [model.cases_in(room) for room in (900, 1299, 1300, 2200)] == [0, 0, 1, 4]


class Reports(Dataset):
    """Cases of (tokens, width) numbers."""

    def __init__(self, tokens: int, width: int) -> None:
        self.tokens, self.width = tokens, width
        self.rows = [SimpleNamespace(answer="a" * n) for n in range(40)]

    def __getitem__(self, draw: Draw) -> Tensor:
        return torch.full((self.tokens, self.width), float(draw.row))


class Mixer(nn.Module):
    """What a language model keeps for its backward pass: a frozen part, a trained one, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
              for _ in range(4)), nn.Dropout(0.1),
        )  # fmt: skip
        self.net[0].requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen += 1
        return self.net(batch["images"]).square().mean((1, 2)).sum()[None]


def batches(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"images": torch.stack(samples)}


def counts(batch: dict[str, Tensor]) -> Tensor:
    return torch.tensor([len(batch["images"])])


def setting(tokens: int, width: int) -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    return Mixer(width), DataLoader(Reports(tokens, width), collate_fn=batches)


def test_measuring_leaves_no_trace():
    model, loader = setting(8, 16)
    state = torch.get_rng_state()
    found = measure(model, loader, counts, Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), state) and model.seen == 0
    assert all(p.grad is None for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.fixed >= 3 * 4 * trained and found.per_case > 8 * 16 * 4, "gradients and moments, and a case"


def resident(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


def peak_of_a_step(tokens: int, width: int, cases: int, answer: object) -> None:
    """In a process of its own: what is predicted, and what the system says that the second step has taken."""
    torch.set_num_threads(1)
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 17)  # what is freed is given back, so that the peak is what was allocated
    model, loader = setting(tokens, width)
    predicted = measure(model, loader, counts, Accelerator(cpu=True)).needed(cases)
    batch = batches([loader.dataset[Draw(row, 0)] for row in range(cases)])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        (model(batch) / counts(batch)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    answer.put((predicted, resident("VmHWM") - before))


@pytest.mark.minutes
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("tokens", "width", "cases"), [(512, 256, 4), (1024, 256, 8), (512, 256, 16)])
def test_the_prediction_is_within_ten_per_cent_of_the_peak(tokens: int, width: int, cases: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "train_vlm"])
    answer = context.Queue()
    process = context.Process(target=peak_of_a_step, args=(tokens, width, cases, answer))
    process.start()
    predicted, measured = answer.get(timeout=300)
    process.join()
    print(f"{cases} cases of {tokens} tokens, width {width}: predicted {predicted / 1e6:.0f} MB, "
          f"measured {measured / 1e6:.0f} MB")  # fmt: skip
    assert predicted == pytest.approx(measured, rel=0.1)
