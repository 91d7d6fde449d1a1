"""A headless ComfyUI server with a small Anima and a small VAE of random weights, for doctor."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import tiny_anima
import torch

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("ANIMA_FAST_COMFYUI", "")
PACK = os.environ.get("ANIMA_FAST_REGIONAL_NODES")

# A text encoder would be 1.2 GB of random numbers: the test brings a node with what one would say.
PROMPTS = """
import sys
sys.path.append({here!r})
import tiny_anima

class TinyPrompt:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"tokens": ("INT",), "seed": ("INT",)}}}})
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, tokens, seed):
        return (tiny_anima.conditioning(tokens, seed),)

NODE_CLASS_MAPPINGS = {{"TinyPrompt": TinyPrompt}}
"""


@contextlib.contextmanager
def started(base):
    """A running server whose files are all in `base`; its address."""
    from safetensors.torch import save_file

    custom, page = base / "custom_nodes", base / "page"
    for folder in (custom, page, base / "models" / "diffusion_models", base / "models" / "vae"):
        folder.mkdir(parents=True)
    save_file(tiny_anima.state_dict(), base / "models" / "diffusion_models" / "tiny.safetensors")
    save_file(vae_state_dict(), base / "models" / "vae" / "tiny_vae.safetensors")
    (custom / "anima_fast").symlink_to(ROOT, target_is_directory=True)
    (custom / "tiny_prompt.py").write_text(PROMPTS.format(here=str(Path(__file__).parent)))
    if PACK:
        (custom / "anima-regional-comfy-nodes").symlink_to(Path(PACK).resolve(), target_is_directory=True)
    (page / "index.html").write_text("<html></html>")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", address.rpartition(":")[2]]
    command += ["--base-directory", str(base), "--front-end-root", str(page), "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:"]
    log = base / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, f"the server ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the server did not come up:\n{log.read_text()}"
            try:
                urllib.request.urlopen(address + "/system_stats", timeout=20).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def vae_state_dict(dim: int = 8, seed: int = 0) -> dict:
    """A VAE of the shape that Anima's has (Qwen-Image's, a Wan 2.1), random and narrow: the loader reads its width."""
    import comfy.ldm.wan.vae

    with torch.device("meta"):
        model = comfy.ldm.wan.vae.WanVAE(
            dim=dim,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
            image_channels=3,
            conv_out_channels=3,
            dropout=0.0,
        )
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in ((name, value.shape) for name, value in model.state_dict().items()):
        if name.endswith("gamma"):
            weights[name] = torch.ones(shape)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
    return weights
