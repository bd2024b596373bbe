"""One training step of one model in this process, whose peak memory is printed: `python -m bench.memory JSON` (used by throughput)."""

import json
import resource
import sys

import torch

import zoo
from bench.peers import TorchGPT


def main(request: str) -> int:
    """Print the peak in bytes; `request` holds config, name, batch, sequence and threads."""
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    config = zoo.GPTConfig.from_dict(wanted["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if wanted["name"] == "plain torch":
        model: torch.nn.Module = TorchGPT(config).to(device)
    else:
        model = zoo.GPT(config.override(structure="dense", rank=None) if wanted["name"] == "dense twin" else config, device=device)
    tokens = torch.zeros(wanted["batch"], wanted["sequence"], dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for _ in range(2):  # the second step has the optimiser's state in memory too
        optimizer.zero_grad(set_to_none=True)
        model.loss(tokens, tokens).backward()
        optimizer.step()
    unit = 1 if sys.platform == "darwin" else 1024
    print(torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
