"""compress and decompress hold a part of their samples in memory, as checked by a system limit."""

import json
import subprocess
import sys

import pytest

BIG = """
import json, resource, sys
import numpy as np, torch, aezoo
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress
torch.set_num_threads(1)
folder, n, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = aezoo.create_model("linear_ae", (4096,), latent_dim=4)
x = np.lib.format.open_memmap(folder + "/x.npy", "w+", np.uint8, (n, 4096))
x[::97] = np.arange(4096) % 251
work = lambda x: decompress(model, compress(model, x, mode="lossy", compare=False, fit_on=x, batch_size=64,
                                            out=folder).files[0], out=folder)
work(x[:200])
def data():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines["VmData"].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (data() + most, data() + most))
print(json.dumps([work(x).same, 4 * x.size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_coding_memory_stays_below_data_size(tmp_path):
    most = 2**27
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BIG, str(tmp_path), "12000", str(most)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    same, size = json.loads(run.stdout)
    assert same and size > 1.4 * most
