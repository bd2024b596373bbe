"""DistributedDataParallel: two processes see the mean of both gradients."""

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

import tn


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [tn.StructuredLinear(24, 32, structure="btt", rank=2), nn.GELU(), tn.StructuredLinear(32, 8, structure="low_rank", rank=4)]
    return nn.Sequential(*layers)


def batch(rank: int) -> torch.Tensor:
    return torch.randn(40, 24, generator=torch.Generator().manual_seed(rank))


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(model())
    parallel(batch(rank)).square().mean().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in parallel.parameters()], f"{path}/gradients")
    dist.destroy_process_group()


def test_gradients_are_averaged(tmp_path):
    processes.spawn(work, (str(tmp_path),), nprocs=2)
    got = torch.load(tmp_path / "gradients")
    alone = model()
    (sum(alone(batch(rank)).square().mean() for rank in range(2)) / 2).backward()
    for a, parameter in zip(got, alone.parameters(), strict=True):
        assert torch.allclose(a, parameter.grad, rtol=1e-5, atol=1e-7)
